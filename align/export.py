"""Write what was trained as other programs read it, and put it on the hub.

    python -m align.export outputs/mine --to comfyui --output mine.safetensors
    python -m align.export outputs/mine --to single-file --output merged.safetensors
    python -m align.export outputs/mine --push_to_hub --hub_model_id me/mine

``outputs/mine`` is a run folder, a LoRA folder or a ``.safetensors`` file. ``diffusers``, ``comfyui`` and ``kohya``
write a LoRA with that program's names and its alpha; ``--to diffusers --merge`` writes a whole pipeline folder, and
``single-file`` a checkpoint of a whole SD 1, 2, XL or 3 with what was trained in it. ``--push_to_hub`` alone uploads
the run (or a pipeline's folder) as it is; with ``--to`` also what was written.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open

from align import families
from align.common.assets import locate
from align.common.command import command, parse
from align.common.errors import UserError
from align.common.hub import Publishing
from align.families import lora_formats
from align.families.lora_file import read_layers
from align.families.parts import INDEX, read_json
from align.families.single_file import checkpoint, require_single_file
from align.families.skeleton import Skeleton, skeleton
from align.policy.initial_noise import NOISE_FILE
from align.training.model_card import ModelCard, code, set_weights, with_section
from align.training.publish import send, weights_in
from align.training.run_folder import base_of
from rewards.common.command import exit_status
from rewards.common.files import atomic, write_text

Target = Literal["diffusers", "comfyui", "kohya", "single-file"]


@dataclass
class Export(Publishing):
    """Write weights for other programs.

    Args:
        run: a run folder, a LoRA folder, or a LoRA's .safetensors file; the first word may stand without ``--run``.
        to: which program is to read it; null, with ``push_to_hub``, writes nothing here.
        output: the file, or with ``merge`` the folder, to write.
        merge: write the whole pipeline with the weights in it.
        pretrained_model_name_or_path: diffusers folder, hub id, ``shapes-sd`` or ``shapes-sd3`` that it was trained
            on; null is what the run's ``config.yaml`` says.
        mixed_precision: the precision of merged weights; a LoRA keeps its own.
    """

    run: Path
    to: Target | None = None
    output: Path | None = None
    merge: bool = False
    pretrained_model_name_or_path: str | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"


def export(config: Export) -> Path:
    """Write, upload where that is asked for, and return what was written; the run where nothing was. Raises
    :class:`UserError`."""
    if config.to is None or config.output is None:
        if config.to is not None or config.output is not None or config.merge or not config.push_to_hub:
            raise UserError(
                "say for which program and where: --to diffusers, comfyui, kohya or single-file, and --output; or "
                "--push_to_hub alone, which uploads the run as it is"
            )
        require_there(config)
        if config.run.is_file():
            raise UserError(f"{config.run} is a file: say as what to upload it, by --to diffusers and --output")
        files = weights_in(config.run)
        if (repository := config.repository(config.run)) is not None:
            send(repository, files, card_of(config), config.run, config.run)
        return config.run
    check(config)
    repository = config.repository(config.run)
    written = _whole(config) if config.merge or config.to == "single-file" else _lora(config)
    if repository is not None and written.is_dir():
        card = card_of(config, written)
        write_text(written / "README.md", card)
        send(repository, weights_in(written), card, config.run, written)
    elif repository is not None:
        files = (weights_in(config.run) if config.run.is_dir() else {}) | {written.name: written}
        options = f"--to {config.to} --output {shlex.quote(str(written))} "
        if (base := config.pretrained_model_name_or_path) is not None:
            options += f"--pretrained_model_name_or_path {shlex.quote(base)} "
        send(repository, files, card_of(config, written), config.run, config.run, options)
    return written


def require_there(config: Export) -> None:
    if not config.run.exists():
        raise UserError(f"there is no {config.run}; expected a run folder, a LoRA folder or a .safetensors file")


def check(config: Export) -> None:
    """Raise :class:`UserError` for what cannot be written, as far as can be said before anything is read."""
    assert config.output is not None
    whole = config.merge or config.to == "single-file"
    if config.merge and config.to in ("comfyui", "kohya"):
        raise UserError(
            f"--merge writes a pipeline folder (--to diffusers) or one file (--to single-file), not for {config.to}"
        )
    require_there(config)
    if config.run.is_file() and config.run.suffix != ".safetensors":
        raise UserError(f"{config.run} is no .safetensors file, and others may run code when read; convert it first")
    if config.run.name == NOISE_FILE or (config.run / NOISE_FILE).is_file():
        raise UserError(
            f"{config.run} holds learned initial noise, which is no weight and which no other program reads; draw from "
            "it with python -m align.sample --noise"
        )
    if config.to != "diffusers" or not whole:
        if config.output.suffix != ".safetensors":
            raise UserError(f"--output {config.output}: expected the name of a .safetensors file")
        if config.output.is_dir():
            raise UserError(f"--output {config.output} is a folder; name a file")


def card_of(config: Export, written: Path | None = None) -> str:
    """The card for the hub: the run's own where it has one, with what to do with the file that was ``written`` for
    another program, or with how the merged pipeline is loaded."""
    path, base = config.run / "README.md", base_or_none(config)
    name = config.run.resolve().name.removesuffix(".safetensors")
    lora = config.run.is_file() or (config.run / families.LORA_FILE).is_file()
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not text:
        kind = "LoRA" if lora else "Weights"
        tags = ["lora"] if lora else []
        text = ModelCard(title=name, base_model=base, introduction=f"{kind}, uploaded by t2i-align.", tags=tags).text()
    if written is None or config.to is None:
        return text
    if written.is_dir():
        dtype = families.DTYPES[config.mixed_precision]
        pipe = f"pipe = DiffusionPipeline.from_pretrained(weights, dtype={dtype})"
        load = set_weights(f"import torch\nfrom diffusers import DiffusionPipeline\n\n{pipe}", str(written))
        return with_section(text, "Load", code(load, "python"))
    return with_section(text, "For other programs", f"{code(written.name)}\n\n{READERS[config.to]}")


READERS: dict[Target, str] = {
    "diffusers": "is the LoRA with alpha in its weights, for programs that read tensors alone.",
    "comfyui": "is the LoRA for ComfyUI: into `ComfyUI/models/loras`, at strength 1.",
    "kohya": "is the LoRA for A1111, Forge and kohya's trainers, at strength 1.",
    "single-file": "is the whole model in one file, for ComfyUI, A1111 and `from_single_file`.",
}


def _lora(config: Export) -> Path:
    assert config.output is not None and config.to is not None
    path = families.lora_path(config.run)
    if path is None:
        raise UserError(
            f"{config.run} has no LoRA; of a run that trained every weight --to diffusers --merge writes the pipeline "
            "and --to single-file a checkpoint"
        )
    if config.output.exists() and config.output.samefile(path):
        raise UserError(f"--output {config.output} is what is read; name another file")
    keys = _keys(path)
    spelled = all(key.startswith(("unet.", "transformer.", "text_encoder")) for key in keys)  # so no model is needed
    if config.to == "diffusers" and config.pretrained_model_name_or_path is None and spelled:
        file, known = families.read_lora(config.run), None
        state = lora_formats.tensors_for("diffusers", file, {}, "")
    else:
        source, encoders = _base(config), any(key.startswith(("text_encoder", "lora_te")) for key in keys)
        bones = skeleton(source, families.pipeline_class(source), encoders)
        file = read_layers(config.run, bones.modules, bones.denoiser, bones.pipeline)
        if config.to != "diffusers":
            _require_known_shapes(bones)
        state = lora_formats.tensors_for(config.to, file, bones.modules, bones.denoiser)  # type: ignore[arg-type]
        network = bones.modules[bones.denoiser]
        known = None if config.to == "diffusers" else lora_formats.readers(network, bones.v_prediction)
    header = lora_formats.header(config.to, file, known, config.output.stem)  # type: ignore[arg-type]
    return lora_formats.write(config.output, state, header)


def _whole(config: Export) -> Path:
    assert config.output is not None
    itself = (config.run / "model_index.json").is_file()
    source = str(config.run) if itself else _base(config)
    bones = skeleton(source, families.pipeline_class(source), encoders=False)
    if config.to == "single-file":
        require_single_file(bones.pipeline)
    _require_known_shapes(bones)
    if bones.packed:
        raise UserError(
            f"the weights of {', '.join(bones.packed)} in {source} are in 4 or 8 bit, in which nothing can be merged "
            "and which other programs do not read; take the pipeline before it was quantised"
        )
    if config.to == "diffusers" and (config.output.exists() or config.output.suffix == ".safetensors"):
        is_file = "names a file" if config.output.suffix == ".safetensors" else "exists"
        raise UserError(f"--output {config.output} {is_file}; name another folder")
    dtype = families.DTYPES[config.mixed_precision]
    family = families.load(source, torch.float32 if dtype == torch.float16 else dtype)  # a CPU loads no fp16
    if not itself and families.what_is_tuned(family, config.run) == "lora":
        lora_formats.merge(family.pipe.components, families.read_lora(config.run, family.pipe, family.denoiser_name))
    elif not itself:
        family = families.tuned(family, str(config.run))
    pipe = family.pipe.to(dtype)
    if config.to == "single-file":
        architecture = lora_formats.readers(family.denoiser, bones.v_prediction).architecture
        header = {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": architecture}
        header |= {"modelspec.title": config.output.stem, "format": "pt"}
        return lora_formats.write(config.output, checkpoint(pipe), header)
    with atomic(config.output) as draft:
        pipe.save_pretrained(draft)
        _complete(draft, Path(locate(source)))
        settings = Path(locate(source)) / families.SAMPLING_FILE
        if settings.is_file():
            (draft / families.SAMPLING_FILE).write_text(settings.read_text())
    return config.output


def _complete(folder: Path, base: Path) -> None:
    """Parts that we do without and that stock diffusers asks for (SD3's T5 whose last norm is zero), from ``base``."""
    if not (base / INDEX).is_file():
        return
    index, before = read_json(folder / INDEX), read_json(base / INDEX)
    lacking = [name for name, entry in index.items() if entry == [None, None] and (base / name).is_dir()]
    for name in lacking:
        shutil.copytree(base / name, folder / name)
    write_text(folder / INDEX, json.dumps(index | {name: before[name] for name in lacking}, indent=2) + "\n")


def _require_known_shapes(bones: Skeleton) -> None:
    if bones.pruned:
        raise UserError(
            f"the {bones.denoiser} of {bones.source} lost parts of blocks, and other programs know the shapes of whole "
            "ones only; export from the pipeline before it was pruned, or merge by python -m pruning.compress --weights"
        )


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no whole safetensors file: {error}") from error


def base_or_none(config: Export) -> str | None:
    """The model that was trained, where that is said."""
    if config.pretrained_model_name_or_path is not None:
        return config.pretrained_model_name_or_path
    for folder in (config.run, config.run.parent):  # a checkpoint's settings are the run's
        if (folder / "config.yaml").is_file():
            with contextlib.suppress(KeyError):  # the settings of something else
                return base_of(folder)
    return None


def _base(config: Export) -> str:
    """The model that was trained. Raises :class:`UserError`."""
    if (base := base_or_none(config)) is not None:
        return base
    raise UserError(f"{config.run} does not say which model it is of; give --pretrained_model_name_or_path")


def _positional(argv: Sequence[str] | None) -> list[str]:
    """``RUN --to …`` as ``--run RUN --to …``."""
    words = list(sys.argv[1:] if argv is None else argv)
    return ["--run", *words] if words and not words[0].startswith("-") else words


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    words = _positional(argv)
    config, _ = parse(Export, "align.export", __doc__, words)
    return command(lambda: print(export(config)), words)


if __name__ == "__main__":
    sys.exit(main())
