"""The parts of a pipeline's folder, each read whole or refused by name.

Stock loaders fill what a file lacks with random numbers, skip what they do not know and build tokenizers without a
vocabulary, with a warning at most; a run on such a model trains on noise. Here each of these is an error of one line.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from align.families.folder import Unsupported

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INDEX = "model_index.json"
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(\w+))?\.safetensors")
_SHARDS = re.compile(r"(?:diffusion_pytorch_model|model)\.safetensors\.index(?:\.(\w+))?\.json")
_BUFFERS = ("position_ids",)  # that older files hold and today's classes make themselves
_MOST = 10_000  # layers or training times; a class with more is still being built tomorrow
CONVERT = (
    "convert it once where you trust it: DiffusionPipeline.from_pretrained(folder, use_safetensors=False)"
    ".save_pretrained(other_folder)"
)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises :class:`Unsupported`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Unsupported(f"there is no {path}; is the folder whole?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Unsupported(f"{path} cannot be read as JSON: {error}; get the file again") from error
    if not isinstance(value, dict):
        raise Unsupported(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def components(folder: Path) -> dict[str, tuple[str, str]]:
    """Library and class of every part that ``model_index.json`` names. Raises :class:`Unsupported`."""
    import diffusers

    found = {}
    for name, entry in read_json(folder / INDEX).items():
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(word, str) for word in entry):
            continue  # a setting of the pipeline, or a part that it has none of
        library, class_name = entry
        # diffusers calls a module of a pipeline's own package by the package's name
        if library not in ("diffusers", "transformers") and not hasattr(diffusers.pipelines, library):
            raise Unsupported(
                f"{folder / INDEX}: {name} is said to be {class_name} of {library!r}; expected a class of diffusers or "
                "transformers"
            )
        found[name] = library, class_name
    return found


def configs(folder: Path) -> dict[str, dict[str, Any]]:
    """What the config file of every part says; raises :class:`Unsupported` for one that is broken or impossible."""
    found = {}
    for name in components(folder):
        for path in sorted((folder / name).glob("*.json")):
            content = read_json(path)
            if path.name in ("config.json", "scheduler_config.json"):
                _require_possible(path, content)
                found[name] = content
    return found


def read_parts(folder: Path, dtype: torch.dtype, variant: str | None) -> dict[str, Any]:
    """Every part of diffusers and transformers in ``folder``, the small ones first; None for one that the pipeline can
    do without. ``variant`` None takes the files without one, or the only variant there is. Raises :class:`Unsupported`.
    """
    import diffusers

    named = components(folder)
    pipeline = getattr(diffusers, str(read_json(folder / INDEX).get("_class_name")), None)
    optional = [] if pipeline is None else list(pipeline._optional_components)
    if variant is not None and not any(variant in variants(folder / name) for name in named):
        there = sorted({v for name in named for v in variants(folder / name) if v is not None})
        raise Unsupported(f"{folder} has no weights of variant {variant!r}; it has {', '.join(there) or 'no variant'}")
    parts: dict[str, Any] = {}
    for name in sorted(named, key=lambda name: sum(f.stat().st_size for f in (folder / name).glob("*") if f.is_file())):
        library, class_name = named[name]
        if library not in ("diffusers", "transformers"):
            continue  # the pipeline's own, such as the safety checker
        cls = getattr(import_module(library), class_name, None)
        if cls is not None and (folder / name).is_dir():
            parts[name] = read_part(folder / name, cls, dtype, variant)
        elif name in optional:
            warnings.warn(f"{folder} has no {name}, which {INDEX} names; the pipeline does without", stacklevel=2)
            parts[name] = None
        elif cls is None:
            raise Unsupported(
                f"{folder / INDEX}: the installed {library} has no {class_name}, which {name} is said to be"
            )
        else:
            raise Unsupported(f"{folder} has no folder {name}/, which {INDEX} names ({class_name}); get it again")
    return parts


def read_part(where: Path, cls: type[Any], dtype: torch.dtype, variant: str | None = None) -> Any:
    """The part in ``where``, with every tensor that its class has and no other. Raises :class:`Unsupported`."""
    read = cls.from_pretrained
    try:
        if not issubclass(cls, nn.Module):
            return read(str(where))
        read_json(where / "config.json")
        options = {"dtype": dtype, "variant": _check_weights(where, variant), "use_safetensors": True}
        part, report = read(str(where), output_loading_info=True, **options)
    except Unsupported:
        raise
    except Exception as error:  # a class of diffusers or transformers meets files of a stranger
        text = " ".join(str(error).split())[:300]
        raise Unsupported(f"{where} cannot be read as a {cls.__name__}: {type(error).__name__}: {text}") from error
    _require_whole(where, report)
    return part


def _require_whole(where: Path, report: Mapping[str, Any]) -> None:
    wrong = []
    for kind, said in (("missing_keys", "missing"), ("unexpected_keys", "unknown"), ("mismatched_keys", "mismatched")):
        keys = sorted(str(key) for key in report.get(kind) or () if not str(key).endswith(_BUFFERS))
        if keys:
            more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
            wrong.append(f"{len(keys)} tensors are {said}: {', '.join(keys[:2])}{more}")
    if wrong:
        remedy = "get it again"
        if not where.name.startswith(("vae", "text_encoder")):
            remedy += ", or, of a model that lost parts of blocks, read a local folder by an installed t2i-align"
        raise Unsupported(
            f"{where} is not whole or is of another model than its config says: {'; '.join(wrong)}; {remedy}"
        )


# files
def variants(where: Path) -> set[str | None]:
    """The variants of the weights in ``where``; None stands for those without one."""
    matches = (_WEIGHTS.fullmatch(p.name) or _SHARDS.fullmatch(p.name) for p in where.glob("*"))
    return {match[1] for match in matches if match is not None}


def _check_weights(where: Path, variant: str | None) -> str | None:
    """The variant to read, whose files are all there, whole, and no pickles."""
    there = variants(where)
    if not there:
        pickled = sorted(path.name for path in where.glob("*") if path.suffix in (".bin", ".pt", ".ckpt"))
        if pickled:
            raise Unsupported(f"{where} has {pickled[0]} alone, a pickle, which may run code when read; {CONVERT}")
        raise Unsupported(f"{where} has no weights; expected a .safetensors file, was the download complete?")
    chosen = variant if variant in there else None
    if chosen not in there:
        if len(there) > 1:
            raise Unsupported(f"{where} has weights of {', '.join(sorted(map(str, there)))}; say which: variant")
        (chosen,) = there
        warnings.warn(f"{where} has {chosen} weights only; these are read", stacklevel=2)
    for path in _weight_files(where, chosen):
        require_safetensors(path)
    return chosen


def _weight_files(where: Path, variant: str | None) -> Iterator[Path]:
    for path in sorted(where.glob("*")):
        whole, shards = _WEIGHTS.fullmatch(path.name), _SHARDS.fullmatch(path.name)
        if whole is not None and whole[1] == variant:
            yield path
        elif shards is not None and shards[1] == variant:
            named = read_json(path).get("weight_map")
            if not isinstance(named, dict) or not named:
                raise Unsupported(f"{path} has no weight_map; get the file again")
            for name in sorted({str(name) for name in named.values()}):
                if Path(name).name != name or not (where / name).is_file():
                    raise Unsupported(f"there is no {where / name}, which {path.name} names; is the folder whole?")
                yield where / name


def require_safetensors(path: Path) -> None:
    """Raise :class:`Unsupported` for a file that is cut, of another kind, or a pointer to what was not fetched."""
    with path.open("rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise Unsupported(f"{path} is git-lfs's pointer to the weights; run git lfs pull in that folder")
    try:
        with safe_open(path, "pt"):  # reads the header, which has to cover the file
            pass
    except (SafetensorError, OSError) as error:
        raise Unsupported(f"{path} is no whole safetensors file ({error}); get it again") from error


def _require_possible(path: Path, content: object, key: str = "") -> None:
    """Raise :class:`Unsupported` for a number that is not finite, or so large that the model is never built."""
    if isinstance(content, Mapping | list):
        items = content.items() if isinstance(content, Mapping) else ((key, item) for item in content)
        for name, item in items:
            _require_possible(path, item, str(name))
    elif isinstance(content, int | float) and not isinstance(content, bool):
        count = "layers" in key or "timesteps" in key
        endless = content > _MOST and count
        finite = math.isfinite(content) or key == "lambda_min_clipped"  # DPM++ says -inf for no bound
        low = content <= 0 if key in ("scaling_factor", "num_train_timesteps") else count and content < 0
        if not finite or endless or low:
            raise Unsupported(f"{path}: {key} is {content}, which no model has; get the file again")


def require_latents(source: str, name: str, denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """Raise :class:`Unsupported` unless the denoiser ``name`` takes and gives the latents of the VAE, by config."""
    channels = vae.get("latent_channels")
    taken, given = denoiser.get("in_channels", channels), denoiser.get("out_channels", channels)
    if channels is not None and taken != channels:
        raise Unsupported(
            f"{source}: the {name} takes {taken} channels and the VAE gives {channels}; a model for inpainting, "
            "editing or upscaling draws from more than a prompt; take the text-to-image model that it was made from"
        )
    if channels is not None and (given or taken) != channels:
        raise Unsupported(f"{source}: the {name} gives {given} channels and the VAE takes {channels}")


# what was read
def require_finite(pipe: DiffusionPipeline, source: str) -> None:
    """Raise :class:`Unsupported` where a weight or a buffer, such as a scale of packed weights, is NaN or infinite."""
    for part, module in pipe.components.items():
        if isinstance(module, nn.Module):
            require_finite_module(module, f"{source}: {part}")


def require_finite_module(module: nn.Module, what: str) -> None:
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            low, high = tensor.aminmax()  # NaN passes through, and no copy is made
            if not (math.isfinite(low.item()) and math.isfinite(high.item())):
                raise Unsupported(
                    f"{what} has NaN or infinite numbers in {name}; was it saved after training diverged?"
                )


def tokenizers(pipe: DiffusionPipeline) -> dict[str, PreTrainedTokenizerBase]:
    """The tokenizers that there are, by name; a multimodal encoder has its own within a processor."""
    found = {name: part for name, part in pipe.components.items() if name.startswith("tokenizer") and part is not None}
    return {name: getattr(part, "tokenizer", part) for name, part in found.items()}


def require_tokenizers(pipe: DiffusionPipeline, source: str, limits: Mapping[str, int]) -> None:
    """Raise :class:`Unsupported` for a tokenizer that has lost its vocabulary, or is another encoder's; ``limits`` are
    the tokens that the pipeline itself cuts at."""
    for name, tokenizer in tokenizers(pipe).items():
        encoder = pipe.components.get(name.replace("tokenizer", "text_encoder"))
        if isinstance(encoder, nn.Module):
            most = limits.get(name, tokenizer.model_max_length)
            _require_tokenizer(tokenizer, encoder, most, f"{source}: {name}")


def _require_tokenizer(tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel, most: int, what: str) -> None:
    vocabulary = tokenizer.get_vocab()
    rows, highest = encoder.get_input_embeddings().num_embeddings, max(vocabulary.values(), default=0)
    if vocabulary.keys() <= {*tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder}:
        raise Unsupported(
            f"{what} has no vocabulary, so that every prompt is the same to the model; its folder lacks "
            "tokenizer.json, or vocab.json and merges.txt"
        )
    if highest >= rows:
        raise Unsupported(f"{what} has tokens up to {highest}, and its text encoder {rows} rows; it is another model's")
    longest = getattr(encoder.config, "max_position_embeddings", None)
    if longest is not None and most > longest:
        raise Unsupported(
            f"{what} allows {most} tokens, and its text encoder {longest}; set model_max_length "
            f"to {longest} in tokenizer_config.json"
        )
