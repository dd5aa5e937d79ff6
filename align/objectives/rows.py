"""The table a rollout hands to the loss: rows to train on, plus columns shared by all rows of one image.

One row is what one call of the loss needs for one term: a pair's noise level (DPO), a step of a trajectory (RL).
What belongs to the image (latents, conditions, advantage) is stored once and looked up by the row's image number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from align.families import Conditioning
from align.families.family import Column


def _take(column: Column, index: Tensor) -> Column:
    return column.take(index) if isinstance(column, Conditioning) else column[index]


@dataclass(frozen=True)
class Rows:
    """``rows``: columns of length R. ``images``: columns of length N, or whatever else the rows point into.
    ``image``: (R,) the image of each row. ``metrics``: what the rollout measured, over all processes."""

    rows: Mapping[str, Column]
    images: Mapping[str, Column]
    image: Tensor = field(repr=False)
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = {name: len(column) for name, column in self.rows.items() if len(column) != len(self)}
        if wrong:
            raise ValueError(f"every row column needs {len(self)} rows, got {wrong}")
        if both := self.rows.keys() & self.images.keys():
            raise ValueError(f"columns named both per row and per image: {sorted(both)}")

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, name: str) -> Column:
        """A column at row length; an image column is looked up row by row."""
        return self.rows[name] if name in self.rows else _take(self.images[name], self.image)

    def tensor(self, name: str) -> Tensor:
        column = self[name]
        assert isinstance(column, Tensor), f"{name} is no tensor column"
        return column

    def cond(self, name: str = "cond") -> Conditioning:
        column = self[name]
        assert isinstance(column, Conditioning), f"{name} is no condition column"
        return column

    def take(self, index: Tensor) -> Rows:
        """The rows ``index`` selects; image columns are shared, not copied."""
        rows = {name: _take(column, index) for name, column in self.rows.items()}
        return Rows(rows, self.images, self.image[index], self.metrics)

    def shuffled(self, generator: torch.Generator) -> Rows:
        """Rows in a new order of images; the rows of one image keep together, so a chunk spans few images."""
        if not len(self):
            return self
        order = torch.randperm(int(self.image.max()) + 1, generator=generator)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        return self.take(torch.argsort(rank[self.image], stable=True))

    def chunks(self, size: int) -> Iterator[Rows]:
        """Consecutive pieces of ``size`` rows, the last one perhaps smaller."""
        for index in torch.arange(len(self)).split(size):
            yield self.take(index)
