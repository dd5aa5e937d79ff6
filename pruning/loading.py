"""Pipelines and components that stock diffusers does not read here: 4 bit without a GPU, and parts of blocks gone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import bitsandbytes as bnb
import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from align.common.errors import UserError
from pruning.architectures import CLASSES
from pruning.graph import BlockGraph
from pruning.linear4bit import BLOCK, STATE, Linear4bit, empty_layer, piece_of
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
    index = _json(index_file)
    cls = _class(diffusers, index.get("_class_name"), index_file)
    parts = [name for name, value in index.items() if isinstance(value, list) and value and value[0]]
    if absent := [name for name in parts if not (folder / name).is_dir()]:
        raise UserError(f"{folder} lacks {', '.join(absent)}, which its model_index.json names")
    models = [folder / name for name in parts if (folder / name / "config.json").is_file()]
    ours = [part for part in models if not stock_reads(_config(part))]
    for part in models:
        if part not in ours and "quantization_config" in _config(part):
            _require_sound(part)
    built = {part.name: build(part, dtype) for part in ours}
    dtypes = {part.name: dtype or _stored_dtype(part) for part in models} | {"default": torch.float32}
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
    if not _gpu() or not stock_reads(_config(folder)):
        return build(folder, dtype)
    _require_sound(folder)
    return _model_class(folder).from_pretrained(folder, dtype=dtype or _stored_dtype(folder), use_safetensors=True)


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
    saved = _config(folder).get("quantization_config")
    settings = _settings(saved, folder) if saved else NF4()
    packed: dict[str, dict[str, Tensor]] = {}
    if saved:
        reasons = dict.fromkeys(skip_list(model, settings), "")
        packed = {layer.name: {} for layer in split(model, reasons) if layer.kept is None}
    for name in packed:
        model.set_submodule(name, empty_layer(model.get_submodule(name), settings))
    files = _files(folder)
    tensors = {key: tensor for file in files for key, tensor in _read(file)}
    for key in list(tensors):
        layer, piece = piece_of(key)
        if layer in packed:
            packed[layer][piece] = tensors.pop(key)
    problems = [problem for name in packed for problem in _torn(model.get_submodule(name), name, packed[name])]
    problems += _fill(model, tensors, {f"{name}.weight" for name in packed})
    _require_none(problems, files, f"does not fit {type(model).__name__}")
    for name, pieces in packed.items():
        linear = model.get_submodule(name)
        codes = pieces.pop("")
        linear.weight = bnb.nn.Params4bit.from_prequantized(codes, pieces, device="cpu", module=linear)
    if dtype:
        _cast(model, dtype)
    if saved:
        mark(model, settings)
    return model.eval()


def outline(folder: Path) -> Model:
    """The component of ``folder`` from its config, parameters on the meta device."""
    cls, config = _model_class(folder), _config(folder)
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
        *(f"{key} {reason}" for key, tensor in fits.items() if (reason := _unsound(tensor))),
    ]


def _torn(layer: Linear4bit, name: str, pieces: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the pieces of one packed weight."""
    needed = {"", "absmax", "quant_map", STATE}
    needed |= {"nested_absmax", "nested_quant_map"} if layer.weight.compress_statistics else set()
    full = {piece: f"{name}.weight.{piece}".removesuffix(".") for piece in needed | pieces.keys()}
    problems = [f"{full[piece]} is missing" for piece in sorted(needed - pieces.keys())]
    problems += [f"{full[piece]} is unexpected" for piece in sorted(pieces.keys() - needed)]
    if problems:
        return problems
    state = _state(pieces[STATE])
    size, weights = [layer.out_features, layer.in_features], layer.out_features * layer.in_features
    if state is None:
        return [f"{full[STATE]} is damaged"]
    if (state["shape"], state["blocksize"]) != (size, BLOCK):
        return [f"{name} was {state['shape']} in blocks of {state['blocksize']}, expected {size} in blocks of {BLOCK}"]
    blocks = -(-weights // BLOCK)
    counts = {"": -(-weights // 2), "absmax": blocks, "quant_map": 16, "nested_quant_map": 256}
    if "nested_absmax" in needed:
        if not state.keys() >= {"nested_blocksize", "nested_offset", "nested_dtype"}:
            return [f"{full[STATE]} is damaged"]
        counts["nested_absmax"] = -(-blocks // state["nested_blocksize"])
    bytes_in = {"", STATE} | ({"absmax"} if "nested_absmax" in needed else set())
    return [
        *(
            f"{full[piece]} holds {pieces[piece].numel()} values, expected {count}"
            for piece, count in counts.items()
            if piece in pieces and pieces[piece].numel() != count
        ),
        *(
            f"{full[piece]} is {tensor.dtype}, expected {'bytes' if piece in bytes_in else 'floats'}"
            for piece, tensor in pieces.items()
            if (tensor.dtype == torch.uint8) != (piece in bytes_in)
        ),
        *(f"{full[piece]} {reason}" for piece, tensor in pieces.items() if (reason := _unsound(tensor))),
    ]


def _state(tensor: Tensor) -> dict[str, Any] | None:
    """What bitsandbytes keeps of a packed weight as JSON; None where that is damaged."""
    try:
        state = json.loads(bytes(tensor.tolist()))
        dtypes = {str(state["dtype"]), str(state.get("nested_dtype", "float32"))}
        sizes = [*state["shape"], state["blocksize"], state.get("nested_blocksize", 256)]
        sound = dtypes <= set(COMPUTE) and state["quant_type"] == "nf4" and min(sizes) > 0
        return state if sound and math.isfinite(state.get("nested_offset", 0.0)) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _unsound(tensor: Tensor) -> str | None:
    return "holds NaN or infinity" if tensor.is_floating_point() and not bool(tensor.isfinite().all()) else None


def _require_sound(folder: Path) -> None:
    """Refuse damaged numbers that stock loading would take: of a packed weight its scales, and what is not packed."""
    files = _files(folder)
    problems = []
    for file in files:
        for key, tensor in _read(file, codes=False):
            damaged = piece_of(key)[1] == STATE and _state(tensor) is None
            if reason := "is damaged" if damaged else _unsound(tensor):
                problems.append(f"{key} {reason}")
    _require_none(problems, files, "is damaged")


def _require_none(problems: Sequence[str], files: Sequence[Path], wrong: str) -> None:
    if problems:
        where = files[0] if len(files) == 1 else files[0].parent
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"{where} {wrong}: {'; '.join(problems[:8])}{more}")


def _read(file: Path, codes: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file; without ``codes``, not those of whole numbers that are no state."""
    try:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  it is no dict
                if codes or piece_of(key)[1] == STATE or tensors.get_slice(key).get_dtype() not in ("U8", "I8"):
                    yield key, tensors.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no whole safetensors file: {error}") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}; expected the settings of a model")
    return content


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise UserError(f"no model_index.json and no config.json in {folder}; expected a pipeline or one part of it")
    return _json(folder / "config.json")


def _model_class(folder: Path) -> Any:
    """diffusers writes ``_class_name``, transformers ``architectures``."""
    config = _config(folder)
    if "_class_name" in config:
        return _class(diffusers, config["_class_name"], folder / "config.json")
    names = config.get("architectures")
    return _class(transformers, names[0] if isinstance(names, list) and names else None, folder / "config.json")


def _class(library: Any, name: object, where: Path) -> Any:
    cls = getattr(library, name, None) if isinstance(name, str) else None
    if not isinstance(cls, type):
        raise UserError(f"{where} names the class {name!r}, which the installed {library.__name__} does not have")
    return cls


def _files(folder: Path) -> list[Path]:
    """The safetensors that hold the weights: one, or the shards that an index names."""
    for stem in ("diffusion_pytorch_model", "model"):
        if (index := folder / f"{stem}.safetensors.index.json").is_file():
            named = _json(index).get("weight_map")
            if not isinstance(named, dict) or not all(Path(str(name)).name == name for name in named.values()):
                raise UserError(f"{index} has no weight_map of tensors to files beside it")
            files = [folder / name for name in dict.fromkeys(named.values())]
            if absent := [file.name for file in files if not file.is_file()]:
                raise UserError(f"{folder} lacks {', '.join(absent)}, which {index.name} names")
            return files
        if (whole := folder / f"{stem}.safetensors").is_file():
            return [whole]
    raise UserError(f"no safetensors weights in {folder}")


def _stored_dtype(folder: Path) -> torch.dtype:
    """The commonest dtype of the tensors that are not pieces of packed weights."""
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    count: Counter[torch.dtype] = Counter()
    for file in _files(folder):
        try:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  it is no dict
                    kind = tensors.get_slice(key).get_dtype()
                    if not piece_of(key)[1] and kind in kinds:
                        count[kinds[kind]] += 1
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is no whole safetensors file: {error}") from error
    return count.most_common(1)[0][0] if count else torch.float32
