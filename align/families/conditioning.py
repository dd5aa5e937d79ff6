"""What a prompt batch becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from align.diffusion.process import upload


@dataclass(frozen=True)
class Conditioning:
    """Named tensors whose first dimension is the batch.

    Text of different lengths has ``mask`` (B, L), true (or 1) at a row's own tokens, and is filled up with zeros beyond
    them, which no network may see: a row's answer does not depend on its neighbors.
    """

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def take(self, index: Tensor | slice) -> Conditioning:
        """The rows ``index`` selects."""
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})

    def expand(self, count: int) -> Conditioning:
        """A batch of one, seen ``count`` times without a copy."""
        return Conditioning({name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """On ``device``, and what are no masks in ``dtype``."""
        cast = {k: v.to(dtype or v.dtype) if v.is_floating_point() else v for k, v in self.tensors.items()}
        moved = {k: upload(v, device) for k, v in cast.items()}
        return Conditioning(moved)

    @staticmethod
    def cat(conds: Sequence[Conditioning]) -> Conditioning:
        """One batch; with a ``mask`` shorter texts are filled up to the longest."""
        joined = {name: [cond[name] for cond in conds] for name in conds[0].tensors}
        if "mask" in joined:
            joined = {name: _filled(parts) for name, parts in joined.items()}
        return Conditioning({name: torch.cat(parts) for name, parts in joined.items()})


def _filled(parts: Sequence[Tensor]) -> list[Tensor]:
    longest = max(part.shape[1] for part in parts)
    return [nn.functional.pad(part, (*(0, 0) * (part.ndim - 2), 0, longest - part.shape[1])) for part in parts]
