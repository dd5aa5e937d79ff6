"""What a prompt batch becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What a prompt batch becomes: named tensors whose first dimension is the batch."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def take(self, index: Tensor | slice) -> Conditioning:
        """The rows ``index`` selects."""
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})

    def expand(self, count: int) -> Conditioning:
        """A batch of one, seen ``count`` times without a copy."""
        return Conditioning({name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        return Conditioning({name: tensor.to(device, dtype) for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(conds: Sequence[Conditioning]) -> Conditioning:
        return Conditioning({name: torch.cat([cond[name] for cond in conds]) for name in conds[0].tensors})
