"""From a folder, a hub id or an embedded name to the family that fits it."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from align.common.assets import EMBEDDED, locate
from align.families.family import LORA_FILE, Family, Unsupported
from align.families.lora_file import load_lora, lora_path

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of ``mixed_precision``


READERS = "t2i_align.readers"
GROUP = "t2i_align.families"  # entry points by which installed packages add families


# pipeline class in model_index.json -> family; a new family of ours is one file and one line here
FAMILIES = {
    "StableDiffusionPipeline": "align.families.sd:SD",
    "StableDiffusion3Pipeline": "align.families.sd3:SD3",
}


def pipeline_class(source: str, revision: str | None = None) -> str:
    """``_class_name`` of a folder's or a hub repository's ``model_index.json``, without loading a weight."""
    folder = Path(locate(source))
    index = folder / "model_index.json"
    if not folder.exists() and source.count("/") == 1 and not source.startswith((".", "/")):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            index = Path(hf_hub_download(source, "model_index.json", revision=revision))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise Unsupported(f"{source!r} is neither a folder nor a reachable hub pipeline: {error}") from error
    if not index.is_file():
        raise Unsupported(
            f"no model_index.json in {str(folder)!r}; expected a diffusers pipeline folder, a hub id "
            f"or one of {', '.join(EMBEDDED[:2])}"
        )
    return str(json.loads(index.read_text())["_class_name"])


def find(source: str, revision: str | None = None) -> type[Family]:
    """The family that fits ``source``, without loading a weight; :class:`Unsupported` where there is none."""
    return _family(pipeline_class(source, revision), source)


def _family(pipeline: str, source: str) -> type[Family]:
    """The family of the pipeline class called ``pipeline``."""
    known = supported()
    if pipeline not in known:
        raise Unsupported(f"{source!r} is a {pipeline}; supported pipelines: {', '.join(known)}")
    module, _, name = known[pipeline].partition(":")
    found: type[Family] = getattr(import_module(module), name)
    return found


def supported() -> dict[str, str]:
    """Pipeline class -> ``module:Class`` of its family: ours, and those of installed packages, which say in their
    ``pyproject.toml``::

        [project.entry-points."t2i_align.families"]
        FluxPipeline = "their_package.flux:Flux"
    """
    return {entry.name: entry.value for entry in entry_points(group=GROUP)} | FAMILIES


def load(
    source: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    variant: str | None = None,
) -> Family:
    """Load a diffusers folder, hub id or embedded pipeline as the family that fits it; also a folder that stock
    diffusers does not read, where an installed package does (:func:`reader`).

    Raises :class:`Unsupported` naming the pipeline class and those that are supported.
    """
    family = find(source, revision)
    if (other := reader(locate(source))) is not None:
        return family(other.load(locate(source), dtype).to(device), source)
    # use_safetensors: a pickled checkpoint is refused rather than run
    options = {"dtype": dtype, "revision": revision, "variant": variant, "use_safetensors": True}
    pipe = family.read(locate(source), options)
    denoiser = getattr(pipe, family.denoiser_name)
    if empty := [name for name, tensor in denoiser.named_parameters() if tensor.is_meta]:
        raise Unsupported(
            f"'{source}' lacks {empty[0]} and {len(empty) - 1} more weights of its {family.denoiser_name}; a model "
            "that lost parts of blocks is read from a local folder, by an installed t2i-align (pip install -e .)"
        )
    return family(pipe.to(device), source)


def reader(folder: Path | str) -> Any | None:
    """Who reads ``folder``, a pipeline or one component, in place of stock diffusers; None where nobody has to.

    Packages of the entry point group ``t2i_align.readers`` are asked; each has ``reads(folder)`` and
    ``load(folder, dtype)``. :mod:`pruning` is one.
    """
    readers = (entry.load() for entry in entry_points(group=READERS)) if Path(folder).is_dir() else ()
    return next((found for found in readers if found.reads(folder)), None)


def of(pipe: DiffusionPipeline, source: str) -> Family:
    """The family of a pipeline that is loaded already. Raises :class:`Unsupported`."""
    return _family(type(pipe).__name__, source)(pipe, source)


def what_is_tuned(family: Family, folder: Path) -> Literal["pipeline", "lora", "denoiser"]:
    """What a run folder, or a LoRA file, holds for ``family``. Raises :class:`Unsupported` where that is nothing."""
    name = family.denoiser_name
    if (folder / "model_index.json").is_file():
        return "pipeline"
    if (folder / name / "config.json").is_file() and not (folder / LORA_FILE).is_file():
        return "denoiser"
    if lora_path(folder) is not None:
        return "lora"
    raise Unsupported(
        f"nothing tuned in '{folder}'; expected {LORA_FILE}, another LoRA file, a {name}/ folder, or a whole pipeline "
        "(model_index.json)"
    )


def tuned(family: Family, source: str) -> Family:
    """``family`` with the weights of a run folder put in: its LoRA, or its denoiser; or another whole pipeline. A
    LoRA may also be a file, from whatever tool (:mod:`align.families.lora_file`).

    The given family is used up where it can be: LoRA and denoiser go into its own pipeline.
    """
    folder, name = Path(source), family.denoiser_name
    found = what_is_tuned(family, folder)
    if found == "pipeline":
        return load(source, family.dtype, family.device)
    if found == "lora":
        load_lora(family.pipe, folder, name)
        return family
    if (other := reader(folder / name)) is not None:
        denoiser = other.load(folder / name, family.dtype)
    else:
        denoiser = type(family.denoiser).from_pretrained(folder, subfolder=name, dtype=family.dtype)
    family.pipe.register_modules(**{name: denoiser.to(family.device)})
    return type(family)(family.pipe, family.source)
