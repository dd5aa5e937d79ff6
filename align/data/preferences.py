"""Preference pairs, cached as latents and text embeddings by :mod:`align.data.latent_cache`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from align.common.assets import locate
from align.common.errors import DataError
from align.data.captioned import EncodedData, Rows
from align.data.dataset import Bad, Example
from align.data.latent_cache import EncodedBatch
from rewards.data.preferences import PairRow, recognise


@dataclass(frozen=True)
class PairBatch(EncodedBatch):
    """B pairs: ``latents`` (B, 2, C, h, w) with the winner first, and the conditions of their captions."""

    images = 2


@dataclass
class PreferencePairs(EncodedData):
    """A preference data set in one of the ``LAYOUTS`` of :mod:`rewards.data.preferences`, and how its images are cut.

    Args:
        ties: drop rows that have no winner, or stop at them (error).
        image_root: folder that relative image paths start from; default the folder of the file that names them.
    """

    ties: Literal["drop", "error"] = "drop"
    image_root: str | None = None

    batch_type = PairBatch
    what = "pairs"

    def rows(self) -> Rows:
        root = Path(self.image_root) if self.image_root else None
        layout, files, rows = recognise(locate(self.path), self.split, self.caption_column, root)
        return layout, files, self._examples(rows)

    def _examples(self, rows: Iterable[PairRow]) -> Iterator[Example | Bad | None]:
        for number, row in enumerate(rows):
            if fault := row.fault():
                yield Bad(number, row.source, fault)
            elif row.sides is not None:
                yield Example(number, row.source, str(row.caption).strip(), row.sides)
            elif self.ties == "error":
                raise DataError(f"{row.source} is a tie; remove it, or drop ties with ties: drop")
            else:
                yield None
