"""Pipelines and components that stock diffusers does not read here: 4 bit without a GPU, and parts of blocks gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import bitsandbytes as bnb
import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings

from align.common.errors import UserError
from pruning.architectures import CLASSES
from pruning.graph import BlockGraph
from pruning.linear4bit import empty_layer, piece_of
from pruning.model_files import (
    class_named,
    model_class,
    read_config,
    read_json,
    read_tensors,
    require_none,
    require_sound,
    stored_dtype,
    torn,
    unsound,
    weight_files,
)
from pruning.nf4 import COMPUTE, NF4
from pruning.quantize import Model, mark, quantised, skip_list, split


def load(folder: Path | str, dtype: torch.dtype | str | None = None) -> DiffusionPipeline | Model:
    """The pipeline in ``folder``, or the single component; what is not packed in ``dtype`` (``torch.float32`` or
    ``"float32"``), or as it was saved. Built here, packed weights are multiplied in that dtype too: many CPUs take ten
    times as long in half precision. ``.to(dtype)`` of a pipeline does the same later.

    Where a GPU is, stock ``from_pretrained`` reads it, and puts the quantised parts on the GPU and the rest on the CPU:
    ``.to("cuda")`` brings them together, as with any pipeline of diffusers. Built here, on the CPU, is what it cannot
    read: quantised parts where there is no GPU, which diffusers refuses ("No GPU found"), and denoisers that lost parts
    of blocks. They are the stock classes, but for their Linears and for what is gone. Raises
    :class:`UserError` with all that is missing, unexpected, damaged or of the wrong size.
    """
    folder, dtype = Path(folder), named_dtype(dtype)
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        return _component(folder, dtype)
    index = read_json(index_file)
    cls = class_named(diffusers, index.get("_class_name"), index_file)
    parts = [name for name, value in index.items() if isinstance(value, list) and value and value[0]]
    if absent := [name for name in parts if not (folder / name).is_dir()]:
        raise UserError(f"{folder} lacks {', '.join(absent)}, which its model_index.json names")
    models = [folder / name for name in parts if (folder / name / "config.json").is_file()]
    ours = [part for part in models if not stock_reads(read_config(part))]
    for part in models:
        if part not in ours and "quantization_config" in read_config(part):
            require_sound(part)
    built = {part.name: build(part, dtype) for part in ours}
    dtypes = {part.name: dtype or stored_dtype(part) for part in models} | {"default": torch.float32}
    pipe = cls.from_pretrained(folder, dtype=dtypes, use_safetensors=True, **built)
    if quantised(pipe):
        pipe.to = MethodType(_to, pipe)
    return pipe


def named_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from its name; :class:`UserError` for what is none."""
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in COMPUTE:
        return getattr(torch, dtype.removeprefix("torch."))
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    raise UserError(f"dtype is {dtype!r}; expected {' or '.join(map(repr, COMPUTE))}, or torch's, or none as saved")


def _to(pipe: DiffusionPipeline, *args: Any, **kwargs: Any) -> DiffusionPipeline:
    """``.to`` of a pipeline with packed parts: diffusers moves these but leaves their dtype, which then is not that of
    the other parts; here, what is not packed of them is cast as well."""
    dtypes = [value for value in (*args, kwargs.pop("dtype", None)) if isinstance(value, torch.dtype)]
    type(pipe).to(pipe, *(value for value in args if not isinstance(value, torch.dtype)), **kwargs)
    packed = quantised(pipe)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and dtypes:
            _cast(part, dtypes[0]) if name in packed else part.to(dtypes[0])
    return pipe


def _cast(model: Model, dtype: torch.dtype) -> None:
    """Bring what is not packed, and products with what is, to ``dtype``."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = dtype
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and not isinstance(tensor, bnb.nn.Params4bit):
            tensor.data = tensor.data.to(dtype)


def _component(folder: Path, dtype: torch.dtype | None) -> Model:
    if not _gpu() or not stock_reads(read_config(folder)):
        return build(folder, dtype)
    require_sound(folder)
    return model_class(folder).from_pretrained(folder, dtype=dtype or stored_dtype(folder), use_safetensors=True)


def stock_reads(config: Mapping[str, Any]) -> bool:
    """Whether stock diffusers can read, on this machine, the component with this ``config.json``."""
    return not _lost_parts(config) and ("quantization_config" not in config or _gpu())


def _lost_parts(config: Mapping[str, Any]) -> bool:
    entry = config.get("pruning")
    return bool(entry.get("removed") if isinstance(entry, dict) else entry)


def _gpu() -> bool:
    """diffusers' own condition (``quantizers/bitsandbytes/bnb_quantizer.py``)."""
    return torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available()


def build(folder: Path, dtype: torch.dtype | None = None) -> Model:
    """One component on the CPU, quantised or pruned or neither: its class without weights, Linears swapped, tensors
    put in; what is not packed, and products with what is, in ``dtype``, or as it was saved. Raises
    :class:`UserError`."""
    model = outline(folder)
    saved = read_config(folder).get("quantization_config")
    settings = _settings(saved, folder) if saved else NF4()
    packed: dict[str, dict[str, Tensor]] = {}
    if saved:
        reasons = dict.fromkeys(skip_list(model, settings), "")
        packed = {layer.name: {} for layer in split(model, reasons) if layer.kept is None}
    for name in packed:
        model.set_submodule(name, empty_layer(model.get_submodule(name), settings))
    files = weight_files(folder)
    rename = _renaming(model)
    tensors = {rename(key): tensor for file in files for key, tensor in read_tensors(file)}
    for key in list(tensors):
        layer, piece = piece_of(key)
        if layer in packed:
            packed[layer][piece] = tensors.pop(key)
    problems = [problem for name in packed for problem in torn(model.get_submodule(name), name, packed[name])]
    problems += _fill(model, tensors, {f"{name}.weight" for name in packed})
    require_none(problems, files, f"does not fit {type(model).__name__}")
    for name, pieces in packed.items():
        linear = model.get_submodule(name)
        codes = pieces.pop("")
        linear.weight = bnb.nn.Params4bit.from_prequantized(codes, pieces, device="cpu", module=linear)
    if dtype:
        _cast(model, dtype)
    if saved:
        mark(model, settings)
    return model.eval()


def _renaming(model: Model) -> Callable[[str], str]:
    """From names in a file to those of the modules: transformers saves some models under their older names."""
    if not isinstance(model, PreTrainedModel):
        return lambda key: key
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    return lambda key: apply_renamings(key, renamings)


def outline(folder: Path) -> Model:
    """The component of ``folder`` from its config, parameters on the meta device."""
    cls, config = model_class(folder), read_config(folder)
    if _lost_parts(config):
        return skeleton({key: value for key, value in config.items() if key != "quantization_config"})
    try:
        with init_empty_weights(include_buffers=False):
            if issubclass(cls, ModelMixin):
                return cls.from_config(cls.load_config(folder))
            return cls(cls.config_class.from_pretrained(folder))
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise _no_model(folder / "config.json", cls.__name__, error) from error


def skeleton(config: Mapping[str, Any]) -> ModelMixin:
    """The denoiser of a ``config.json``, parameters on the meta device, without the parts that its ``pruning`` entry
    lists. Raises :class:`UserError` for a class that has no block graph or an entry that does not fit it."""
    name = config.get("_class_name")
    if name not in CLASSES:
        raise UserError(f"config.json is of a {name}; expected {', '.join(CLASSES)}")
    entry = config.get("pruning") or {}
    removed = entry.get("removed", []) if isinstance(entry, dict) else None
    if not isinstance(removed, list) or not all(isinstance(part, str) for part in removed):
        raise UserError(f"config.json: pruning is {entry!r}; expected removed, a list of names of blocks and parts")
    stock = {key: value for key, value in config.items() if key != "pruning"}
    try:
        with init_empty_weights(include_buffers=False):
            denoiser = getattr(diffusers, name).from_config(stock)
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise _no_model("config.json", name, error) from error
    return BlockGraph.of(denoiser).remove(removed)


def _no_model(where: Path | str, name: str, error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return UserError(f"{where} makes no {name}: {reason[:300]}")


def _settings(saved: Mapping[str, Any], folder: Path) -> NF4:
    """The settings that a saved ``quantization_config`` stands for."""
    expected: dict[str, tuple[object, ...]] = {
        "quant_method": ("bitsandbytes",),
        "load_in_4bit": (True,),
        "bnb_4bit_quant_type": ("nf4",),
        "bnb_4bit_quant_storage": ("uint8",),
        "bnb_4bit_compute_dtype": COMPUTE,
        "bnb_4bit_use_double_quant": (True, False),
    }
    wrong = {key: values for key, values in expected.items() if saved.get(key) not in values}
    if wrong:
        texts = [f"{key} is {saved.get(key)!r}, expected {' or '.join(map(repr, v))}" for key, v in wrong.items()]
        raise UserError(f"{folder / 'config.json'}: in quantization_config, " + "; ".join(texts))
    double_quant, compute_dtype = saved["bnb_4bit_use_double_quant"], saved["bnb_4bit_compute_dtype"]
    return NF4(double_quant, compute_dtype, saved.get("llm_int8_skip_modules") or ())


def _fill(model: Model, tensors: Mapping[str, Tensor], elsewhere: set[str]) -> list[str]:
    """Put in what is not packed, in the dtype it has; returns what is missing, unexpected, of another size or damaged.
    The keys ``elsewhere`` are not looked for."""
    expected = {key: tensor for key, tensor in model.state_dict().items() if key not in elsewhere}
    fits = {key: tensor for key, tensor in tensors.items() if key in expected and tensor.shape == expected[key].shape}
    model.load_state_dict(fits, strict=False, assign=True)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()  # of tied weights the file holds one
    buffers = dict(model.named_buffers())
    lost = [key for key, t in model.state_dict().items() if key not in elsewhere and (t.is_meta or key in buffers)]
    return [
        *(f"{key} is missing" for key in lost if key not in tensors),
        *(f"{key} is unexpected" for key in tensors if key not in expected),
        *(
            f"{key} is {tuple(tensors[key].shape)}, expected {tuple(tensor.shape)}"
            for key, tensor in expected.items()
            if key in tensors and key not in fits
        ),
        *(f"{key} {reason}" for key, tensor in fits.items() if (reason := unsound(tensor))),
    ]
