"""The rows a rollout hands to the loss, and what rows of one image share.

One row is what one call of the loss needs for one term: a pair's noise level (DPO), a step of a trajectory (RL).
Each objective declares a dataclass of its own with the fields that its loss reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from align.families import Conditioning

if TYPE_CHECKING:
    from typing_extensions import Self

SHARED = {"shared": True}  # metadata of a field that rows point into and that is neither indexed nor copied


@dataclass(frozen=True, kw_only=True)
class Rows:
    """R rows to train on; subclasses add what their loss reads.

    A field is a column with one entry a row (a tensor (R, ...), or :class:`Conditioning` of R prompts; None where an
    objective's settings do without it), unless it is declared as ``field(metadata=SHARED)``: such a field belongs to
    the rollout as a whole, and rows find their part of it by ``image`` or by a column of numbers.

    Attributes:
        image: (R,) the image (or pair) that each row belongs to.
        metrics: what the rollout measured, over all processes.
        of_items: ``image`` counts the items of the batch (a prompt's pairs), not the images made of each.
    """

    of_items: ClassVar[bool] = False

    image: Tensor = field(repr=False)
    metrics: Mapping[str, float] = field(default_factory=dict, metadata=SHARED)

    def __post_init__(self) -> None:
        wrong = {name: len(column) for name, column in self._columns().items() if len(column) != len(self)}
        if wrong:
            raise ValueError(f"every row column needs {len(self)} rows, got {wrong}")

    def __len__(self) -> int:
        return len(self.image)

    def _columns(self) -> dict[str, Tensor | Conditioning]:
        """The columns with one entry a row, by name."""
        columns = {each.name: getattr(self, each.name) for each in fields(self) if not each.metadata.get("shared")}
        return {name: column for name, column in columns.items() if column is not None}

    def take(self, index: Tensor) -> Self:
        """The rows that ``index`` selects, of the same shared fields."""
        changes: dict[str, Any] = {
            name: column.take(index) if isinstance(column, Conditioning) else column[index]
            for name, column in self._columns().items()
        }
        return replace(self, **changes)

    def shuffled(self, generator: torch.Generator) -> Self:
        """Rows in a new order of images; the rows of one image keep together, so a chunk spans few images."""
        if not len(self):
            return self
        order = torch.randperm(int(self.image.max()) + 1, generator=generator)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        return self.take(torch.argsort(rank[self.image], stable=True))

    def chunks(self, size: int) -> Iterator[Self]:
        """Consecutive pieces of ``size`` rows, the last one perhaps smaller."""
        for index in torch.arange(len(self)).split(size) if len(self) else ():
            yield self.take(index)
