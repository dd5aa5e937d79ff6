"""A LoRA of the whole denoiser for the pruned one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from align.common.errors import UserError
from align.families import LoRAFile, read_lora
from pruning.graph import follow

_DENOISERS = ("transformer.", "unet.")  # how the keys of a diffusers LoRA begin
_OTHERS = ("text_encoder.", "text_encoder_2.", "text_encoder_3.")
_DOWN = re.compile(r"(.+)\.(?:lora_A|lora_down|lora\.down)\.weight")
_UP = re.compile(r"(.+)\.(?:lora_B|lora_up|lora\.up)\.weight")


def remap_lora(
    lora: Path | str | LoRAFile | Mapping[str, Tensor], moved: Mapping[str, str | None], allow_lost: bool = False
) -> dict[str, Tensor]:
    """A LoRA of the whole denoiser with the names that the pruned one needs: what ``pipe.load_lora_weights`` takes. Its
    strength, alpha / rank, is multiplied into B.

    ``lora`` is a LoRA's file or folder, or what :func:`align.families.read_lora` made of one: kohya's and peft's need
    the unpruned pipeline (``read_lora(path, pipe)``). Tensors in diffusers' spelling
    (``transformer.transformer_blocks.3.attn.to_q.lora_A.weight``) with or without ``….to_q.alpha`` are taken as well;
    those of a file whose alpha stands in its header have lost it. ``moved`` is
    :meth:`pruning.graph.BlockGraph.moved`. Keys of text encoders stay. Raises :class:`UserError` naming what would be
    lost with blocks that are gone, unless ``allow_lost``; and where keys are of another format or another model.
    """
    if isinstance(lora, Path | str):
        lora = read_lora(Path(lora))
    state = lora.state_dict() if isinstance(lora, LoRAFile) else _scaled(lora)
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


def _scaled(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those of alpha, which are multiplied into B."""
    ranks = {match[1]: len(tensor) for key, tensor in state.items() if (match := _DOWN.fullmatch(key))}
    alphas = {key.removesuffix(".alpha"): alpha for key, alpha in state.items() if key.endswith(".alpha")}
    ups = {match[1]: key for key in state if (match := _UP.fullmatch(key))}
    if alone := alphas.keys() - (ranks.keys() & ups.keys()):
        raise UserError(f"{min(alone)}.alpha has no A and B beside it; give the whole LoRA")
    scaled = {ups[name]: state[ups[name]] * (alpha.item() / ranks[name]) for name, alpha in alphas.items()}
    return {key: scaled.get(key, tensor) for key, tensor in state.items() if not key.endswith(".alpha")}
