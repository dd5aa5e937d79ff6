"""Which device a command computes on, and which of the processes of one launch it is."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from rewards.common.errors import RewardError


def pick_device(wanted: str | None, local: int = 0) -> str:
    """``wanted``, or GPU number ``local``, or the CPU. A GPU comes with its number, and becomes the one that "cuda"
    means. ``RewardError`` where there is no such device."""
    try:
        device = torch.device(wanted or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device).cpu()  # a build of torch knows names of devices that it cannot use
        if device.type == "cuda":
            torch.cuda.set_device(local if device.index is None else device)
            device = torch.device("cuda", torch.cuda.current_device())  # for other threads "cuda" may be another one
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RewardError(f"--device is {wanted}; expected cpu, cuda, cuda:0, ... ({reason})") from error
    return str(device)


@dataclass(frozen=True)
class Launched:
    """Which process this is, by the environment that ``accelerate launch`` and ``torchrun`` set: number ``rank`` of
    ``world``, number ``local`` of its machine."""

    rank: int = 0
    local: int = 0
    world: int = 1

    @staticmethod
    def here() -> Launched:
        return Launched(_environment("RANK", 0), _environment("LOCAL_RANK", 0), _environment("WORLD_SIZE", 1))


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise RewardError(f"the environment variable {name} is {text!r}; expected a number, as accelerate sets it")
    return int(text)


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, a GPU or torch on the CPU has no more memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
