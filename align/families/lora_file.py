"""LoRA files of any tool, read exactly: a layer adds scale · B · A, and each format keeps the scale in another place,
where readers that look at tensors alone lose it.

| written by | keys | scale |
|---|---|---|
| this toolkit, diffusers | ``unet.….to_q.lora_A.weight``, older ``….lora.down.weight`` | JSON in the header |
| peft | ``base_model.model.….lora_A.weight`` | ``adapter_config.json`` |
| kohya and kin | ``lora_unet_…_to_q.lora_down.weight`` | tensors ``….alpha`` |

Without any the scale is 1 (alpha = rank). DoRA, LoKr and LoHa, which are no B · A, are refused.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from align.common.errors import UserError
from align.families.folder import LORA_FILE

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PEFT_FILE, PEFT_SETTINGS, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
HEADER = "lora_adapter_metadata"  # diffusers' key in the header of a safetensors file
_PARTS = re.compile(r"(.+)\.(lora_A|lora_B|lora\.down|lora\.up|lora_down|lora_up|lora_linear_layer\.(?:down|up)|alpha)")
_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.")  # diffusers before 0.20
_KOHYA = {"lora_unet_": "", "lora_transformer_": "", "lora_te_": "text_encoder", "lora_te1_": "text_encoder"}
_KOHYA |= {"lora_te2_": "text_encoder_2", "lora_te3_": "text_encoder_3"}  # "" is the denoiser
_OTHERS = ("dora_scale", "lora_magnitude_vector", "lokr_", "hada_", "oft_", "lora_embedding")


@dataclass(frozen=True)
class LoRALayer:
    """What is added to one weight: ``scale * B @ A``, A (r, in[, kh, kw]) and B (out, r[, 1, 1])."""

    A: Tensor
    B: Tensor
    scale: float


@dataclass(frozen=True)
class LoRAFile:
    """The layers of a LoRA by component and module: ``unet.mid_block.attentions.0.….to_q``."""

    path: Path
    layers: Mapping[str, LoRALayer]

    def of(self, component: str) -> dict[str, LoRALayer]:
        """The layers of one component, by module."""
        prefix = f"{component}."
        return {name.removeprefix(prefix): v for name, v in self.layers.items() if name.startswith(prefix)}

    def state_dict(self, component: str = "") -> dict[str, Tensor]:
        """The tensors in diffusers' spelling, of one component or all, with the scale in B: for readers that take
        alpha to be the rank."""
        state = {}
        for name, layer in self.layers.items():
            if name.startswith(component):
                state[f"{name}.lora_A.weight"] = layer.A
                state[f"{name}.lora_B.weight"] = layer.B if layer.scale == 1.0 else layer.B * layer.scale
        return state


def lora_path(source: Path) -> Path | None:
    """The LoRA file at ``source``: itself, or the one in a folder; None where there is none. Raises :class:`UserError`
    for a folder with several, and for a pickled one, which is not opened."""
    if source.is_file():
        return source
    if (
        known := next((source / name for name in (LORA_FILE, PEFT_FILE) if (source / name).is_file()), None)
    ) is not None:
        return known
    files = sorted(source.glob("*.safetensors"))
    if len(files) > 1:
        raise UserError(
            f"{source} has {len(files)} .safetensors files ({files[0].name}, …); name the one that is meant"
        )
    if not files and (pickled := sorted(p.name for p in source.glob("*lora*") if p.suffix in (".bin", ".pt", ".ckpt"))):
        raise UserError(
            f"{source} has {pickled[0]}, a pickle, which may run code when read; convert it to .safetensors"
        )
    return files[0] if files else None


def read_lora(source: Path, pipe: DiffusionPipeline | None = None, denoiser: str | None = None) -> LoRAFile:
    """The LoRA at ``source``, a file or a folder with one, checked against ``pipe`` where that is given.

    ``denoiser`` is the component that peft's and kohya's files are of; both need ``pipe``. Raises :class:`UserError`
    for a file that is no LoRA or of a kind that is not B · A; and for layers that ``pipe`` does not have, naming them.
    """
    path = lora_path(source)
    if path is None:
        raise UserError(f"no LoRA at {source}; expected the folder of a LoRA run ({LORA_FILE}) or a .safetensors file")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = (file.metadata() or {}).get(HEADER, "{}")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no whole safetensors file: {error}") from error
    if pipe is not None and denoiser is None:
        denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    settings = _settings(path, header, denoiser)
    names = _kohya_names(pipe, denoiser) if pipe is not None and denoiser is not None else {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, part = _parse(path, key, names, denoiser)
        parts.setdefault(name, {})[part] = tensor
    layers = {}
    for name, found in parts.items():
        if "A" not in found or "B" not in found:
            raise UserError(f"{path}: {name} has {' and '.join(sorted(found))} alone, and a layer needs both A and B")
        a, b = found["A"], found["B"]
        if a.ndim < 2 or b.ndim < 2 or len(a) != b.shape[1] or not len(a):
            raise UserError(f"{path}: {name} has A {tuple(a.shape)} and B {tuple(b.shape)}, whose ranks differ")
        if not (a.is_floating_point() and b.is_floating_point()):
            raise UserError(f"{path}: {name} has weights of {a.dtype} and {b.dtype}, and a LoRA's are floating-point")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise UserError(f"{path}: {name} has NaN or infinite weights; was training stopped too late?")
        scale = _scale(path, name, len(a), found.get("alpha"), settings)
        layers[name] = LoRALayer(a, b, scale)
    if not layers:
        raise UserError(f"{path} has no LoRA layers; expected keys such as unet.….lora_A.weight")
    if pipe is not None:
        _fits(path, layers, pipe)
    if not any(layer.B.any() for layer in layers.values()):
        warnings.warn(f"the LoRA in {path} changes nothing: every B is zero", stacklevel=2)
    return LoRAFile(path, layers)


def load_lora(pipe: DiffusionPipeline, source: Path, denoiser: str, adapter: str | None = None) -> LoRAFile:
    """Put the LoRA at ``source`` into ``pipe``, as ``pipe.load_lora_weights`` does, of any format, at its own strength,
    and with nothing left out. Raises :class:`UserError`."""
    if not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"diffusers has no LoRA for {type(pipe).__name__}; {source} is another model's")
    file = read_lora(source, pipe, denoiser)
    pipe.load_lora_weights(file.state_dict(), adapter_name=adapter)
    return file


def _parse(path: Path, key: str, names: Mapping[str, str], denoiser: str | None) -> tuple[str, str]:
    """The layer and the part of it (A, B, alpha) that ``key`` is of."""
    if any(other in key for other in _OTHERS) or key.endswith((".bias", ".diff", ".diff_b")):
        raise UserError(
            f"{path}: {key!r} belongs to DoRA, LoKr, LoHa or a trained bias, which are more than scale · B · A; merge "
            "it into the model with the tool that made it, or train a plain LoRA"
        )
    plain = _PROCESSOR.sub(lambda m: f".to_{m[1]}{'.0' if m[1] == 'out' else ''}.lora.", key).removesuffix(".weight")
    match = _PARTS.fullmatch(plain)
    if match is None:
        raise UserError(
            f"{path}: {key!r} is no LoRA tensor; expected names that end in lora_A.weight and lora_B.weight"
        )
    name, part = match[1], "alpha" if match[2] == "alpha" else "A" if match[2].endswith(("A", "down")) else "B"
    if name.startswith(PEFT_PREFIX) and denoiser is not None:
        return f"{denoiser}.{name.removeprefix(PEFT_PREFIX)}", part
    if name.startswith(tuple(_KOHYA)):
        if name not in names:
            raise UserError(f"{path}: {name!r} is the layer of another model, or in a spelling other than diffusers'")
        return names[name], part
    return name, part


def _kohya_names(pipe: DiffusionPipeline, denoiser: str) -> dict[str, str]:
    """kohya's name of every module of ``pipe`` -> ours."""
    names: dict[str, str] = {}
    for prefix, component in _KOHYA.items():
        module = getattr(pipe, component or denoiser, None)
        if isinstance(module, nn.Module):
            paths = (name for name, _ in module.named_modules())
            names |= {prefix + path.replace(".", "_"): f"{component or denoiser}.{path}" for path in paths}
    return names


def _settings(path: Path, header: str, denoiser: str | None) -> dict[str, Any]:
    """peft's settings by ``component.name``, from the header or from the file beside."""
    beside = path.parent / PEFT_SETTINGS
    try:
        settings = json.loads(header)
        if not settings and path.name == PEFT_FILE and beside.is_file():
            settings = {f"{denoiser}.{k}": v for k, v in json.loads(beside.read_text("utf-8")).items()}
        if isinstance(settings, dict):
            return settings
    except (ValueError, AttributeError, OSError, RecursionError):
        pass
    raise UserError(f"{path}: the settings in its header or in {PEFT_SETTINGS} are no JSON object")


def _scale(path: Path, name: str, rank: int, alpha: Tensor | None, settings: Mapping[str, Any]) -> float:
    """alpha / r of one layer; alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)."""
    component, _, module = name.partition(".")
    own = {k.removeprefix(f"{component}."): v for k, v in settings.items() if k.startswith(f"{component}.")}
    if own.get("use_dora") or own.get("lora_bias"):
        raise UserError(f"{path}: its settings say DoRA or a trained bias, which are more than scale · B · A")
    patterns = own.get("alpha_pattern") or {}
    try:
        value: Any = rank if alpha is None else alpha.item()
        if alpha is None and "lora_alpha" in own:
            fitting = (v for pattern, v in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module))
            value = next(fitting, own["lora_alpha"])
        scale = float(value) / (math.sqrt(rank) if own.get("use_rslora") else rank)
    except (TypeError, ValueError, AttributeError, RuntimeError, re.error) as error:
        raise UserError(f"{path}: the alpha of {name} is no number: {error}") from error
    if not math.isfinite(scale):
        raise UserError(f"{path}: the alpha of {name} is {value}; expected a finite number")
    return scale


def _fits(path: Path, layers: Mapping[str, LoRALayer], pipe: DiffusionPipeline) -> None:
    """Raise :class:`UserError` where a layer is none of ``pipe``, or of another size."""
    modules: dict[str, nn.Module] = {}
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            modules |= {f"{name}.{inner}": module for inner, module in part.named_modules()}
    missing = [name for name in layers if name not in modules]
    wrong = []
    for name, layer in layers.items():
        if name in modules:
            base = getattr(modules[name], "base_layer", modules[name])
            if (wanted := _shape(base)) != (got := (layer.B.shape[0], *layer.A.shape[1:])):
                wrong.append(f"{name} is {got}, there {wanted}")
    if missing or wrong:
        example = f"for example {missing[0]}" if missing else f"for example {wrong[0]}"
        raise UserError(
            f"the LoRA in {path} was made for another model than this {type(pipe).__name__}: {len(missing)} of its "
            f"{len(layers)} layers are not there and {len(wrong)} have another size, {example}"
        )


def _shape(module: nn.Module) -> tuple[int, ...] | None:
    """(out, in[, kh, kw]) of a layer that can have a LoRA; of a packed one too, whose weight has another shape."""
    if isinstance(module, nn.Conv2d):
        return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return (rows, columns) if isinstance(rows, int) and isinstance(columns, int) else None
