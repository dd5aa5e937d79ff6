"""What processes tell one another: tensors and plain values, in the order of the processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from align.policy.policy import Policy


def gather_of(accelerator: Accelerator, policy: Policy) -> Callable[[Tensor], Tensor]:
    def gather(tensor: Tensor) -> Tensor:
        policy.settle()
        if accelerator.num_processes == 1:
            return tensor.cpu()
        return accelerator.gather(tensor.to(accelerator.device)).cpu()

    return gather


def numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    """What single numbers are, of all by one wait for the device."""
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True)) if values else {}


def merged(totals: Mapping[str, float], gather: Callable[[list[Any]], list[Any]]) -> dict[str, float]:
    """Metrics over all processes: each gives its part of a mean, and its own of what is a maximum (``…_max``)."""
    joined: dict[str, float] = {}
    for name, value in (item for part in gather([dict(totals)]) for item in part.items()):
        known = joined.get(name)
        joined[name] = value if known is None else max(known, value) if name.endswith("_max") else known + value
    return joined


def summed(counts: Mapping[str, int], gather: Callable[[Tensor], Tensor]) -> dict[str, int]:
    """``counts`` of all processes together."""
    return dict(zip(counts, gather(torch.tensor([list(counts.values())])).sum(0).tolist(), strict=True))


def gather_text_of(accelerator: Accelerator, policy: Policy) -> Callable[[list[Any]], list[Any]]:
    def gather(values: list[Any]) -> list[Any]:
        policy.settle()
        return gather_object(values) if accelerator.num_processes > 1 else values

    return gather
