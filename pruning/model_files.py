"""The files of a saved model: read part by part, and what is missing, torn, NaN or of another class is named."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor

from align.common.errors import UserError
from pruning.linear4bit import BLOCK, STATE, Linear4bit, piece_of
from pruning.nf4 import COMPUTE


def torn(layer: Linear4bit, name: str, pieces: Mapping[str, Tensor]) -> list[str]:
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
        *(f"{full[piece]} {reason}" for piece, tensor in pieces.items() if (reason := unsound(tensor))),
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


def unsound(tensor: Tensor) -> str | None:
    return "holds NaN or infinity" if tensor.is_floating_point() and not bool(tensor.isfinite().all()) else None


def require_sound(folder: Path) -> None:
    """Refuse damaged numbers that stock loading would take: of a packed weight its scales, and what is not packed."""
    files = weight_files(folder)
    problems = []
    for file in files:
        for key, tensor in read_tensors(file, codes=False):
            damaged = piece_of(key)[1] == STATE and _state(tensor) is None
            if reason := "is damaged" if damaged else unsound(tensor):
                problems.append(f"{key} {reason}")
    require_none(problems, files, "is damaged")


def require_none(problems: Sequence[str], files: Sequence[Path], wrong: str) -> None:
    if problems:
        where = files[0] if len(files) == 1 else files[0].parent
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"{where} {wrong}: {'; '.join(problems[:8])}{more}")


def read_tensors(file: Path, codes: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file; without ``codes``, not those of whole numbers that are no state."""
    try:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  it is no dict
                if codes or piece_of(key)[1] == STATE or tensors.get_slice(key).get_dtype() not in ("U8", "I8"):
                    yield key, tensors.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no whole safetensors file: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}; expected the settings of a model")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise UserError(f"no model_index.json and no config.json in {folder}; expected a pipeline or one part of it")
    return read_json(folder / "config.json")


def model_class(folder: Path) -> Any:
    """diffusers writes ``_class_name``, transformers ``architectures``."""
    config = read_config(folder)
    if "_class_name" in config:
        return class_named(diffusers, config["_class_name"], folder / "config.json")
    names = config.get("architectures")
    return class_named(transformers, names[0] if isinstance(names, list) and names else None, folder / "config.json")


def class_named(library: Any, name: object, where: Path) -> Any:
    cls = getattr(library, name, None) if isinstance(name, str) else None
    if not isinstance(cls, type):
        raise UserError(f"{where} names the class {name!r}, which the installed {library.__name__} does not have")
    return cls


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that hold the weights: one, or the shards that an index names."""
    for stem in ("diffusion_pytorch_model", "model"):
        if (index := folder / f"{stem}.safetensors.index.json").is_file():
            named = read_json(index).get("weight_map")
            if not isinstance(named, dict) or not all(Path(str(name)).name == name for name in named.values()):
                raise UserError(f"{index} has no weight_map of tensors to files beside it")
            files = [folder / name for name in dict.fromkeys(named.values())]
            if absent := [file.name for file in files if not file.is_file()]:
                raise UserError(f"{folder} lacks {', '.join(absent)}, which {index.name} names")
            return files
        if (whole := folder / f"{stem}.safetensors").is_file():
            return [whole]
    raise UserError(f"no safetensors weights in {folder}")


def stored_dtype(folder: Path) -> torch.dtype:
    """The commonest dtype of the tensors that are not pieces of packed weights."""
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    count: Counter[torch.dtype] = Counter()
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  it is no dict
                    kind = tensors.get_slice(key).get_dtype()
                    if not piece_of(key)[1] and kind in kinds:
                        count[kinds[kind]] += 1
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is no whole safetensors file: {error}") from error
    return count.most_common(1)[0][0] if count else torch.float32
