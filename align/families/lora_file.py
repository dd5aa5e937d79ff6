"""LoRA files of any tool, read exactly: a layer adds scale · B · A, and each format keeps the scale in another place,
where readers that look at tensors alone lose it.

| written by | keys | scale |
|---|---|---|
| this toolkit, diffusers | ``unet.….to_q.lora_A.weight``, older ``….lora.down.weight`` | JSON in the header |
| peft | ``base_model.model.….lora_A.weight`` | ``adapter_config.json`` |
| kohya and kin | ``lora_unet_…_to_q.lora_down.weight``, ``lora_unet_…_qkv.…`` | tensors ``….alpha`` |
| for ComfyUI | ``diffusion_model.….qkv.lora_A.weight``, ``lycoris_…``, names without a prefix | tensors ``….alpha`` |

Without any the scale is 1 (alpha = rank). A layer by the original network's name (:mod:`original_names`) is split where
diffusers has several. DoRA, LoKr and LoHa, which are no B · A, are refused.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from align.common.errors import UserError
from align.families.folder import LORA_FILE
from align.families.lora_layers import LoRALayer, split, swapped
from align.families.lora_settings import LoRASettings
from align.families.original_names import Original, originals

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PEFT_FILE, PEFT_PREFIX = "adapter_model.safetensors", "base_model.model."
HEADER = "lora_adapter_metadata"  # diffusers' key in the header of a safetensors file
_PARTS = re.compile(
    r"(.+)\.(lora_A|lora_B|lora\.down|lora\.up|lora_down|lora_up|lora_linear_layer\.(?:down|up)|alpha)(?:\.default)?"
)
_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.")  # diffusers before 0.20
_DENOISERS = ("lora_unet_", "lora_transformer_", "lycoris_", "diffusion_model.")  # of other tools' keys
_ENCODERS = {"lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
_ENCODERS |= {"lora_te3_": "text_encoder_3"}
_OTHERS = ("dora_scale", "lora_magnitude_vector", "lokr_", "hada_", "oft_", "lora_embedding")


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
                state[f"{name}.lora_B.weight"] = layer.folded().B
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
    if pipe is None:
        return read_layers(source, {}, denoiser, "")
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    denoiser = denoiser or ("unet" if "unet" in modules else "transformer")
    return read_layers(source, modules, denoiser, type(pipe).__name__)


def read_layers(source: Path, modules: Mapping[str, nn.Module], denoiser: str | None, what: str) -> LoRAFile:
    """:func:`read_lora` with the ``modules``, by component, of a pipeline of the class ``what``: also such as have no
    weights (:mod:`skeleton`)."""
    path = lora_path(source)
    if path is None:
        raise UserError(f"no LoRA at {source}; expected the folder of a LoRA run ({LORA_FILE}) or a .safetensors file")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = (file.metadata() or {}).get(HEADER, "{}")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no whole safetensors file: {error}") from error
    settings = LoRASettings(path, header, denoiser if any(key.startswith(PEFT_PREFIX) for key in tensors) else None)
    names = _names(modules, denoiser) if denoiser is not None and denoiser in modules else {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, part = _parse(path, key, names, denoiser)
        parts.setdefault(name, {})[part] = tensor
    layers: dict[str, LoRALayer] = {}
    for name, found in parts.items():
        for ours, own in _ours(path, name, _layer(path, name, found, settings), names, modules):
            if ours in layers:
                raise UserError(f"{path} has two layers for {ours}, under two names; which is meant?")
            layers[ours] = own
    if not layers:
        raise UserError(f"{path} has no LoRA layers; expected keys such as unet.….lora_A.weight")
    if modules:
        _fits(path, layers, modules, what)
    if not any(layer.scale and layer.A.any() and layer.B.any() for layer in layers.values()):
        warnings.warn(f"the LoRA in {path} changes nothing: every A, B or alpha is zero", stacklevel=3)
    return LoRAFile(path, layers)


def load_lora(pipe: DiffusionPipeline, source: Path, denoiser: str, adapter: str | None = None) -> LoRAFile:
    """Put the LoRA at ``source`` into ``pipe``, as ``pipe.load_lora_weights`` does, of any format, at its own strength,
    and with nothing left out. Raises :class:`UserError`."""
    if not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"diffusers has no LoRA for {type(pipe).__name__}; {source} is another model's")
    file = read_lora(source, pipe, denoiser)
    pipe.load_lora_weights(file.state_dict(), adapter_name=adapter)
    return file


def _parse(path: Path, key: str, names: Collection[str], denoiser: str | None) -> tuple[str, str]:
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
    if name not in names and name.startswith((*_DENOISERS, *_ENCODERS)):
        raise UserError(f"{path}: {name!r} is the layer of another model, or in a spelling that is not known here")
    return name, part


def _layer(path: Path, name: str, found: Mapping[str, Tensor], settings: LoRASettings) -> LoRALayer:
    if "A" not in found or "B" not in found:
        raise UserError(f"{path}: {name} has {' and '.join(sorted(found))} alone, and a layer needs both A and B")
    a, b = found["A"], found["B"]
    if a.ndim < 2 or b.ndim < 2 or len(a) != b.shape[1] or not len(a):
        raise UserError(f"{path}: {name} has A {tuple(a.shape)} and B {tuple(b.shape)}, whose ranks differ")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise UserError(f"{path}: {name} has weights of {a.dtype} and {b.dtype}, and a LoRA's are floating-point")
    a, b = (part.float() if part.element_size() == 1 else part for part in (a, b))  # float8 knows no arithmetic
    if not (a.isfinite().all() and b.isfinite().all()):
        raise UserError(f"{path}: {name} has NaN or infinite weights; was training stopped too late?")
    return LoRALayer(a, b, settings.scale(name, len(a), found.get("alpha")))


def _names(modules: Mapping[str, nn.Module], denoiser: str) -> dict[str, Original]:
    """By every name that another tool may give a layer of ``modules``, the layers of ours that it is."""
    names: dict[str, Original] = {}
    layers = [Original(path, (path,)) for path, _ in modules[denoiser].named_modules() if path]
    for layer in [*layers, *originals(modules[denoiser])]:
        own = replace(layer, parts=tuple(f"{denoiser}.{part}" for part in layer.parts))
        names |= {p + (layer.name if p.endswith(".") else layer.name.replace(".", "_")): own for p in _DENOISERS}
        names.setdefault(layer.name, own)
    encoders = _ENCODERS if "text_encoder_3" in modules else _ENCODERS | {"lora_te3_": "text_encoder_2"}  # FLUX's T5
    for prefix, component in encoders.items():
        for path, _ in modules[component].named_modules() if component in modules else ():
            own = Original(path, (f"{component}.{path}",))
            bare = path.removeprefix("text_model.")  # transformers 5.6 has taken it away from some classes
            for spelled in (path, bare, f"text_model.{bare}"):
                names |= {prefix + spelled.replace(".", "_"): own, f"{component}.{spelled}": own}
    return names


def _ours(
    path: Path, name: str, layer: LoRALayer, names: Mapping[str, Original], modules: Mapping[str, nn.Module]
) -> Iterator[tuple[str, LoRALayer]]:
    """Our layers that the layer called ``name`` in the file at ``path`` is."""
    if (original := names.get(name)) is None:
        yield name, layer
        return
    own = swapped(layer) if original.swapped else layer
    if len(original.parts) == 1:
        yield original.parts[0], own
        return
    rows = [_rows(modules, part) for part in original.parts]
    if sum(rows) != len(own.B):
        raise UserError(
            f"the LoRA in {path} was made for another model: {name} has {len(own.B)} rows, and "
            f"{', '.join(original.parts)} have {sum(rows)} together"
        )
    for part, cut in zip(original.parts, split(own, rows), strict=True):
        if cut is not None:
            yield part, cut


def _fits(path: Path, layers: Mapping[str, LoRALayer], parts: Mapping[str, nn.Module], what: str) -> None:
    """Raise :class:`UserError` where a layer is none of the pipeline's ``parts``, or of another size."""
    modules = {f"{name}.{inner}": module for name, part in parts.items() for inner, module in part.named_modules()}
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
            f"the LoRA in {path} was made for another model than this {what}: {len(missing)} of its "
            f"{len(layers)} layers are not there and {len(wrong)} have another size, {example}"
        )


def _rows(modules: Mapping[str, nn.Module], name: str) -> int:
    component, _, path = name.partition(".")
    module = modules[component].get_submodule(path)
    shape = _shape(getattr(module, "base_layer", module))
    return shape[0] if shape else 0


def _shape(module: nn.Module) -> tuple[int, ...] | None:
    """(out, in[, kh, kw]) of a layer that can have a LoRA; of a packed one too, whose weight has another shape."""
    if isinstance(module, nn.Conv2d):
        return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return (rows, columns) if isinstance(rows, int) and isinstance(columns, int) else None
