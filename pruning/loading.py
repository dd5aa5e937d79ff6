"""Pipelines and components that stock diffusers does not read here: 4 bit without a GPU, and parts of blocks gone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from align.common.errors import UserError
from pruning.architectures import CLASSES
from pruning.graph import BlockGraph
from pruning.linear4bit import BLOCK, STATE, Linear4bit, empty_layer, piece_of
from pruning.nf4 import COMPUTE, NF4
from pruning.quantize import Model, mark, skip_list, split


def load(folder: Path | str, dtype: torch.dtype | None = None) -> DiffusionPipeline | Model:
    """The pipeline in ``folder``, or the single component; what is not packed in ``dtype``, or as it was saved. Built
    here, packed weights are multiplied in that dtype too: many CPUs take ten times as long in half precision.

    Where a GPU is, stock ``from_pretrained`` reads it, and puts the quantised parts on the GPU and the rest on the CPU:
    ``.to("cuda")`` brings them together, as with any pipeline of diffusers. Built here, on the CPU, is what it cannot
    read: quantised parts where there is no GPU, which diffusers refuses ("No GPU found"), and denoisers that lost parts
    of blocks. They are the stock classes, but for their Linears and for what is gone. Raises
    :class:`UserError` with all that is missing, unexpected or of the wrong size.
    """
    folder = Path(folder)
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        return _component(folder, dtype)
    index = json.loads(index_file.read_text(encoding="utf-8"))
    cls = _class(diffusers, index.get("_class_name"), index_file)
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0]]
    if absent := [name for name in parts if not (folder / name).is_dir()]:
        raise UserError(f"{folder} lacks {', '.join(absent)}, which its model_index.json names")
    models = [folder / name for name in parts if (folder / name / "config.json").is_file()]
    built = {part.name: build(part, dtype) for part in models if not stock_reads(_config(part))}
    dtypes = {part.name: dtype or _stored_dtype(part) for part in models} | {"default": torch.float32}
    return cls.from_pretrained(folder, dtype=dtypes, use_safetensors=True, **built)


def _component(folder: Path, dtype: torch.dtype | None) -> Model:
    if not _gpu() or not stock_reads(_config(folder)):
        return build(folder, dtype)
    return _model_class(folder).from_pretrained(folder, dtype=dtype or _stored_dtype(folder), use_safetensors=True)


def stock_reads(config: Mapping[str, Any]) -> bool:
    """Whether stock diffusers can read, on this machine, the component with this ``config.json``."""
    return not _lost_parts(config) and ("quantization_config" not in config or _gpu())


def _lost_parts(config: Mapping[str, Any]) -> bool:
    return bool((config.get("pruning") or {}).get("removed"))


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
    tensors = {key: tensor for file in _files(folder) for key, tensor in load_file(file).items()}
    for key in list(tensors):
        layer, piece = piece_of(key)
        if layer in packed:
            packed[layer][piece] = tensors.pop(key)
    problems = [problem for name in packed for problem in _torn(model.get_submodule(name), name, packed[name])]
    problems += _fill(model, tensors, {f"{name}.weight" for name in packed})
    if problems:
        raise UserError(f"{folder} does not fit {type(model).__name__}: " + "; ".join(problems))
    for name, pieces in packed.items():
        linear = model.get_submodule(name)
        codes = pieces.pop("")
        linear.weight = bnb.nn.Params4bit.from_prequantized(codes, pieces, device="cpu", module=linear)
        linear.compute_dtype = dtype or linear.compute_dtype
    for tensor in (*model.parameters(), *model.buffers()) if dtype else ():
        if tensor.is_floating_point() and not isinstance(tensor, bnb.nn.Params4bit):
            tensor.data = tensor.data.to(dtype)
    if saved:
        mark(model, settings)
    return model.eval()


def outline(folder: Path) -> Model:
    """The component of ``folder`` from its config, parameters on the meta device."""
    cls, config = _model_class(folder), _config(folder)
    if _lost_parts(config):
        return skeleton({key: value for key, value in config.items() if key != "quantization_config"})
    with init_empty_weights(include_buffers=False):
        if issubclass(cls, ModelMixin):
            return cls.from_config(cls.load_config(folder))
        return cls(cls.config_class.from_pretrained(folder))


def skeleton(config: Mapping[str, Any]) -> ModelMixin:
    """The denoiser of a ``config.json``, parameters on the meta device, without the parts that its ``pruning`` entry
    lists. Raises :class:`UserError` for a class that has no block graph or an entry that does not fit it."""
    name = config.get("_class_name")
    if name not in CLASSES:
        raise UserError(f"config.json is of a {name}; expected {', '.join(CLASSES)}")
    removed = (config.get("pruning") or {}).get("removed", [])
    stock = {key: value for key, value in config.items() if key != "pruning"}
    with init_empty_weights(include_buffers=False):
        denoiser = getattr(diffusers, name).from_config(stock)
    return BlockGraph.of(denoiser).remove(removed)


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
    """Put in what is not packed, in the dtype it has; returns what is missing, unexpected or of another size. The keys
    ``elsewhere`` are not looked for."""
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
    size, weights = [layer.out_features, layer.in_features], layer.out_features * layer.in_features
    state = json.loads(bytes(pieces[STATE].tolist()))
    if (state["shape"], state["blocksize"]) != (size, BLOCK):
        return [f"{name} was {state['shape']} in blocks of {state['blocksize']}, expected {size} in blocks of {BLOCK}"]
    counts = {"": -(-weights // 2), "absmax": -(-weights // BLOCK)}
    return [
        f"{full[piece]} holds {pieces[piece].numel()} values, expected {count}"
        for piece, count in counts.items()
        if pieces[piece].numel() != count
    ]


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise UserError(f"no model_index.json and no config.json in {folder}; expected a pipeline or one part of it")
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _model_class(folder: Path) -> Any:
    """diffusers writes ``_class_name``, transformers ``architectures``."""
    config = _config(folder)
    if "_class_name" in config:
        return _class(diffusers, config["_class_name"], folder / "config.json")
    return _class(transformers, (config.get("architectures") or [None])[0], folder / "config.json")


def _class(library: Any, name: str | None, where: Path) -> Any:
    cls = getattr(library, name or "", None)
    if cls is None:
        raise UserError(f"{where} names the class {name!r}, which the installed {library.__name__} does not have")
    return cls


def _files(folder: Path) -> list[Path]:
    """The safetensors that hold the weights: one, or the shards that an index names."""
    for stem in ("diffusion_pytorch_model", "model"):
        if (index := folder / f"{stem}.safetensors.index.json").is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = [folder / name for name in dict.fromkeys(names)]
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
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  it is no dict
                kind = tensors.get_slice(key).get_dtype()
                if not piece_of(key)[1] and kind in kinds:
                    count[kinds[kind]] += 1
    return count.most_common(1)[0][0] if count else torch.float32
