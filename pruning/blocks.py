"""One block: what it is called and made of, where its modules go when others leave, and the streams through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pruning.architectures import PARTS, Kind

Streams = dict[str, Tensor]  # "hidden", and "context" where a block has that stream too


@dataclass(frozen=True)
class Block:
    """A block, or a part of one.

    ``position`` counts whole blocks in the order in which they run, from 0; a part has its block's. ``parameters`` is
    exact. ``modules`` are the paths of what it is made of: a U-Net's pair is a resnet and, where there is one, an
    attention. ``part_of`` names the block that a part belongs to.
    """

    name: str
    kind: Kind
    position: int
    parameters: int
    modules: tuple[str, ...]
    part_of: str | None = None


def weights(parameter: nn.Parameter) -> int:
    """How many a parameter holds; of one in 4 bit, two to a byte, those that it stands for."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def follow(path: str, moved: Mapping[str, str | None]) -> str | None:
    """Where ``path`` goes by :meth:`BlockGraph.moved`, through the longest entry that it is or lies under."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        if (head := ".".join(parts[:end])) in moved:
            new = moved[head]
            return None if new is None else ".".join([new, *parts[end:]])
    return path


def _two_streams(block: Block) -> bool:
    return block.kind in PARTS or block.kind == "dual"


def taken_in(block: Block, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Streams:
    # by keyword, or under gradient checkpointing by position
    given = dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)) | dict(kwargs)
    hidden = given["hidden_states"]
    if block.kind == "up":  # the skip is concatenated behind what comes from below
        first = block.name.endswith(".0")
        hidden = hidden[:, : module.in_channels - module.out_channels if first else module.out_channels]
    return {"hidden": hidden} | ({"context": given["encoder_hidden_states"]} if _two_streams(block) else {})


def put_out(block: Block, output: Any) -> Streams:
    if not _two_streams(block):
        return {"hidden": output if isinstance(output, Tensor) else output[0]}
    context, hidden = output
    return {"hidden": hidden} | ({} if context is None else {"context": context})
