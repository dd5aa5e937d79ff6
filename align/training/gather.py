"""What processes tell one another: tensors and plain values, in the order of the processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor


def gather_of(accelerator: Accelerator) -> Callable[[Tensor], Tensor]:
    def gather(tensor: Tensor) -> Tensor:
        if accelerator.num_processes == 1:
            return tensor.cpu()
        return accelerator.gather(tensor.to(accelerator.device)).cpu()

    return gather


def gather_text_of(accelerator: Accelerator) -> Callable[[list[Any]], list[Any]]:
    return lambda values: gather_object(values) if accelerator.num_processes > 1 else values
