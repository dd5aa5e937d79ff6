"""Denoisers that lost parts of blocks, back from a folder; and a LoRA of the whole denoiser for the pruned one.

A denoiser that lost whole blocks only needs neither: stock ``from_pretrained`` loads it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors.torch import load_file
from torch import Tensor

from align.errors import UserError
from pruning.graph import BlockGraph, follow
from pruning.layout import CLASSES

WEIGHTS = "diffusion_pytorch_model.safetensors"
_DENOISERS = ("transformer.", "unet.")  # how the keys of a diffusers LoRA begin
_OTHERS = ("text_encoder.", "text_encoder_2.", "text_encoder_3.")


def skeleton(config: Mapping[str, Any]) -> ModelMixin:
    """The denoiser of a ``config.json`` on the meta device, without the parts that its ``pruning`` entry lists.

    Raises :class:`UserError` for a class that has no block graph or an entry that does not fit it.
    """
    name = config.get("_class_name")
    if name not in CLASSES:
        raise UserError(f"config.json is of a {name}; expected {', '.join(CLASSES)}")
    removed = (config.get("pruning") or {}).get("removed", [])
    with torch.device("meta"):
        denoiser = CLASSES[name].from_config({key: value for key, value in config.items() if key != "pruning"})
    return BlockGraph.of(denoiser).remove(removed)


def load_pruned(folder: Path | str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> ModelMixin:
    """A denoiser from a folder of ``save_pretrained``, whether or not parts of its blocks are gone; in eval mode.

    ``dtype`` None keeps that of the file. Raises :class:`UserError` where a file is missing, or where weights and
    config do not fit each other exactly: stock diffusers would fill what is missing with random numbers.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"no config.json in {folder}; expected a denoiser's folder, as save_pretrained writes it")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    denoiser, state = skeleton(config), _weights(folder)
    mine = {name: tuple(tensor.shape) for name, tensor in denoiser.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if differ := sorted(name for name in mine.keys() | found.keys() if mine.get(name) != found.get(name)):
        raise UserError(
            f"{folder}: weights and config.json differ in {len(differ)} tensors, for example {differ[0]!r}: "
            f"config {mine.get(differ[0])}, file {found.get(differ[0])}"
        )
    denoiser.load_state_dict(state, assign=True)
    if left := [name for name, tensor in denoiser.named_buffers() if tensor.is_meta]:
        raise UserError(f"{folder}: {left[0]!r} is computed and not saved; load this model with stock diffusers")
    return denoiser.to(device=device, dtype=dtype).eval()


def _weights(folder: Path) -> dict[str, Tensor]:
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [WEIGHTS]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"no {', '.join(missing)} in {folder}")
    return {key: tensor for name in names for key, tensor in load_file(folder / name).items()}


def remap_lora(
    state: Mapping[str, Tensor], moved: Mapping[str, str | None], allow_lost: bool = False
) -> dict[str, Tensor]:
    """A LoRA of the whole denoiser with the names that the pruned one needs.

    ``state`` has diffusers' keys (``transformer.transformer_blocks.3.attn.to_q.lora_A.weight``), ``moved`` is
    :meth:`pruning.graph.BlockGraph.moved`. Keys of text encoders stay. Raises :class:`UserError` naming what would be
    lost with blocks that are gone, unless ``allow_lost``; and where keys are of another format or another model.
    """
    lists = {path.rpartition(".")[0] for path in moved if path.rpartition(".")[2].isdigit()}
    new: dict[str, Tensor] = {}
    strange, beyond, lost = [], [], Counter[str]()
    for key, tensor in state.items():
        prefix = next((p for p in _DENOISERS if key.startswith(p)), None)
        if prefix is None:
            if key.startswith(_OTHERS):
                new[key] = tensor
            else:
                strange.append(key)
            continue
        path = key.removeprefix(prefix)
        heads = [path[:end] for end, letter in enumerate(path) if letter == "."]
        beyond += [key for head in heads if head.rpartition(".")[0] in lists and head not in moved][:1]
        there = follow(path, moved)
        if there is None:
            lost[next(head for head in reversed(heads) if head in moved)] += 1
        else:
            new[prefix + there] = tensor
    if strange:
        raise UserError(
            f"{len(strange)} keys are not of diffusers' LoRA format, for example {strange[0]!r}; load the file with "
            "the pipeline's load_lora_weights and write it with save_lora_weights first"
        )
    wrong = []
    if beyond:
        wrong.append(f"{len(beyond)} keys are of blocks that this model never had, for example {beyond[0]!r}")
    if lost and not allow_lost:
        names = ", ".join(f"{head} ({count} tensors)" for head, count in lost.items())
        wrong.append(f"the LoRA trains blocks that were removed: {names}; allow_lost drops these")
    if not new:
        wrong.append("nothing of the LoRA is left")
    if wrong:
        raise UserError("cannot remap the LoRA: " + "; ".join(wrong))
    return new
