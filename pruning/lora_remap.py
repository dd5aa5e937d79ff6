"""A LoRA of the whole denoiser for the pruned one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from align.common.errors import UserError
from pruning.graph import follow

_DENOISERS = ("transformer.", "unet.")  # how the keys of a diffusers LoRA begin
_OTHERS = ("text_encoder.", "text_encoder_2.", "text_encoder_3.")


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
