"""From a folder, a hub id or an embedded name to the family that fits it."""

from __future__ import annotations

import functools
import sys
import threading
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from align.common.assets import EMBEDDED, locate
from align.common.errors import UserError
from align.common.imports import uncollected
from align.families.family import Family
from align.families.folder import LORA_FILE, Unsupported
from align.families.lora_file import load_lora, lora_path
from align.families.parts import (
    configs,
    read_json,
    read_part,
    read_parts,
    require_finite,
    require_finite_module,
    require_tokenizers,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of ``mixed_precision``


READERS = "t2i_align.readers"
GROUP = "t2i_align.families"  # entry points by which installed packages add families


# pipeline class in model_index.json -> family; a new family of ours is one file and one line here
FAMILIES = {
    "StableDiffusionPipeline": "align.families.sd:SD",
    "StableDiffusion3Pipeline": "align.families.sd3:SD3",
    "StableDiffusionXLPipeline": "align.families.sdxl:SDXL",
    "FluxPipeline": "align.families.flux:Flux",
    "QwenImagePipeline": "align.families.qwen_image:QwenImage",
    "ZImagePipeline": "align.families.z_image:ZImage",
    "Flux2Pipeline": "align.families.flux2:Flux2",
    "Flux2KleinPipeline": "align.families.flux2:Flux2Klein",
    "SanaPipeline": "align.families.sana:Sana",
    "ChromaPipeline": "align.families.chroma:Chroma",
    "Lumina2Pipeline": "align.families.lumina2:Lumina2",
    "PixArtSigmaPipeline": "align.families.pixart:PixArtSigma",
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
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:  # ValueError: no hub id at all
            said = " ".join(str(error).split())[:300]
            raise Unsupported(f"{source!r} is neither a folder nor a reachable hub pipeline: {said}") from error
    if not index.is_file():
        raise Unsupported(
            f"no model_index.json in {str(folder)!r}; expected a diffusers pipeline folder, a hub id or one of "
            f"{', '.join(EMBEDDED[:2])}; a single file becomes a folder by the pipeline class's from_single_file(file)"
            ".save_pretrained(folder)"
        )
    name = read_json(index).get("_class_name")
    if not isinstance(name, str):
        raise Unsupported(f"{index} has no _class_name; expected the index of a diffusers pipeline")
    return name


def find(source: str, revision: str | None = None) -> type[Family]:
    """The family that fits ``source``, without loading a weight; :class:`Unsupported` where there is none, or where the
    configs of a folder's parts say that it does not run."""
    family, folder = _family(pipeline_class(source, revision), source), Path(locate(source))
    if folder.is_dir():
        family.require_supported(source, configs(folder))
    return family


def _family(pipeline: str, source: str) -> type[Family]:
    """The family of the pipeline class called ``pipeline``."""
    known = supported()
    if pipeline not in known:
        raise Unsupported(f"{source!r} is a {pipeline}; supported pipelines: {', '.join(known)}")
    module, _, name = known[pipeline].partition(":")
    with uncollected(last=True):
        found: type[Family] = getattr(import_module(module), name)
    return found


def supported() -> dict[str, str]:
    """Pipeline class -> ``module:Class`` of its family: ours, and those of installed packages, which say in their
    ``pyproject.toml``::

        [project.entry-points."t2i_align.families"]
        FluxPipeline = "their_package.flux:Flux"
    """
    return {entry.name: entry.value for entry in _entries(GROUP, tuple(sys.path))} | FAMILIES


@functools.cache
def _entries(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """What installed packages on ``path`` offer: to find out takes longer than to read a small part of a pipeline."""
    return tuple(entry_points(group=group))


# while they load, libraries put functions of their own in torch's place; two at once would leave them there for good
_ONE_AT_A_TIME = threading.RLock()


def load(
    source: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    variant: str | None = None,
    quantize: Literal["nf4"] | None = None,
    offload_idle: bool = False,
) -> Family:
    """Load a diffusers folder, hub id or embedded pipeline as the family that fits it; also a folder that stock
    diffusers does not read, where an installed package does (:func:`reader`).

    ``quantize`` packs the denoiser in 4 bit (:func:`quantized`); with ``offload_idle`` text encoders and autoencoder
    are on ``device`` only while they work (:class:`align.families.resting.Resting`).

    Raises :class:`Unsupported` naming the pipeline class and those that are supported, or the part or file that is
    missing, damaged or another model's; :class:`UserError` for a device or precision that is not to be had here.
    """
    family = find(source, revision)
    require_device(device, dtype)
    folder = _local(source, revision, variant)
    if not Path(locate(source)).is_dir():  # of the hub: its configs are here now
        family.require_supported(source, configs(folder))
    with _ONE_AT_A_TIME:
        if (other := reader(folder)) is not None:
            pipe = other.load(folder, dtype)
        else:
            parts = read_parts(folder, dtype, variant)
            try:
                pipe = family.read(str(folder), {"dtype": dtype, **parts})
            except (TypeError, ValueError) as error:  # of a part that is named as none
                raise Unsupported(f"{source} is no whole pipeline: {' '.join(str(error).split())[:300]}") from error
    require_tokenizers(pipe, source, family.token_limits)
    if quantize is not None:
        quantized(getattr(pipe, family.denoiser_name))
    if offload_idle:
        from align.families.resting import Resting

        Resting(pipe, getattr(pipe, family.denoiser_name), device)
    else:
        pipe.to(device)
    require_finite(pipe, source)
    loaded = family(pipe, source)
    _require_usable(loaded)
    return loaded


def _require_usable(family: Family) -> None:
    """What every run will ask, asked now and not after an hour. Raises :class:`Unsupported`."""
    try:
        (channels, _, _), _ = family.latent_shape(), family.grid(2)
        family.default_guidance_scale, family.default_num_inference_steps  # noqa: B018
        statistics = [torch.as_tensor(part) for part in family.statistics()]
    except (ArithmeticError, AttributeError, RuntimeError, TypeError) as error:
        raise Unsupported(f"{family.source}: a config of its parts has a number that no model has: {error}") from error
    if wrong := [s for s in statistics if not s.isfinite().all() or (s.ndim and len(s) != channels)]:
        raise Unsupported(
            f"{family.source}: the VAE's config has {wrong[0].flatten().tolist()[:8]} for the statistics of {channels} "
            "channels; is it another model's?"
        )


def require_device(device: torch.device | str, dtype: torch.dtype) -> None:
    """Raise :class:`UserError` for a device that is not there, and for half precision where it does not run."""
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU here, or torch was built without CUDA; set device: cpu")
    if kind == "cpu" and dtype == torch.float16:
        raise UserError(
            "fp16 needs a GPU: on a CPU layers mix it with float32 and fail; set mixed_precision: bf16 or no"
        )


def _local(source: str, revision: str | None, variant: str | None) -> Path:
    """The folder of ``source``, which is brought here from the hub where it has to be."""
    folder = Path(locate(source))
    if folder.is_dir():
        return folder
    from diffusers import DiffusionPipeline

    options = {"revision": revision, "variant": variant, "use_safetensors": True}  # no pickle
    try:
        return Path(DiffusionPipeline.download(source, safety_checker=None, **options))
    except (OSError, ValueError) as error:
        raise Unsupported(f"{source!r} cannot be had from the hub: {' '.join(str(error).split())[:300]}") from error


def set_attention_backend(family: Family, name: str) -> None:
    """Have the denoiser use the attention backend called ``name`` by diffusers. Raises :class:`UserError` for one that
    is unknown, not installed, or not for this device."""
    try:
        family.denoiser.set_attention_backend(name)
    except (ValueError, RuntimeError, ImportError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"attention_backend: {name} cannot be used: {said}; leave it out for torch's own") from error
    if family.device.type == "cpu" and not name.lstrip("_").startswith(("native", "flex")):
        raise UserError(f"attention_backend: {name} needs a GPU; leave it out for torch's own")


def reader(folder: Path | str) -> Any | None:
    """Who reads ``folder``, a pipeline or one component, in place of stock diffusers; None where nobody has to.

    Packages of the entry point group ``t2i_align.readers`` are asked; each has ``reads(folder)`` and
    ``load(folder, dtype)``. :mod:`pruning` is one.
    """
    readers = (entry.load() for entry in _entries(READERS, tuple(sys.path))) if Path(folder).is_dir() else ()
    return next((found for found in readers if found.reads(folder)), None)


def quantized(module: nn.Module) -> None:
    """Pack the Linears of ``module`` in NF4, in place, by the installed package that reads such models.

    Raises :class:`UserError` where there is none, and for a module that is packed already.
    """
    packers = (entry.load() for entry in _entries(READERS, tuple(sys.path)))
    packer = next((found for found in packers if hasattr(found, "pack")), None)
    if packer is None:
        raise UserError("quantize: no installed package packs weights; install t2i-align whole, which has `pruning`")
    packer.pack(module)


def stock_scheduler(pipe: DiffusionPipeline) -> Any:
    """The scheduler with which the stock ``pipe`` draws what its family draws. Raises :class:`Unsupported`."""
    return _family(type(pipe).__name__, type(pipe).__name__).stock_scheduler(pipe.scheduler)


def stock_latents(pipe: DiffusionPipeline, x: Tensor) -> Tensor:
    """(B, C, h, w) as the argument ``latents`` of the stock ``pipe`` takes them. Raises :class:`Unsupported`."""
    return _family(type(pipe).__name__, type(pipe).__name__).stock_latents(x)


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
        denoiser = read_part(folder / name, type(family.denoiser), family.dtype)
    require_finite_module(denoiser, f"{folder / name}:")
    family.pipe.register_modules(**{name: denoiser.to(family.device)})
    return type(family)(family.pipe, family.source)
