"""Preference pairs, cached as latents and text embeddings by :mod:`align.data.latent_cache`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from align.common.assets import locate
from align.common.errors import DataError
from align.data.captioned import EncodedData
from align.data.dataset import Bad, Example, ExampleSet, Rows, Unlabelled
from align.data.latent_cache import EncodedBatch
from rewards.data.pair_rows import PairRow
from rewards.data.preferences import Layout, recognise
from rewards.data.tables import Cells
from rewards.data.text import clean

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairBatch(EncodedBatch):
    """B pairs: ``latents`` (B, 2, C, h, w) with the winner first, the conditions of their captions, and the winners'
    shares of the votes, ``labels``."""

    images = 2


@dataclass
class PreferencePairs(EncodedData):
    """A preference data set in one of the layouts of :mod:`rewards.data.preferences`, and how its images are cut.

    Args:
        ties: drop rows that have no winner, or stop at them (error).
        soft_labels: a ``label_0`` between 0 and 1 is an error, or the first image's share of the ``votes``; the image
            with more of them is the winner.
        max_contradicted_share: stop when more of the pairs than this are there with the other winner too.
        image_root: folder that relative image paths start from; default the folder of the file that names them.
    """

    ties: Literal["drop", "error"] = "drop"
    soft_labels: Literal["error", "votes"] = "error"
    max_contradicted_share: float = 0.5
    image_root: str | None = None

    batch_type = PairBatch
    what = "pairs"

    def rows(self) -> Rows:
        layout, files, rows, _ = self._recognised()
        return layout, files, self.limited(self._examples(rows))

    def cells(self) -> Cells | None:
        return self._recognised().cells

    def _recognised(self) -> Layout:
        root = Path(self.image_root).expanduser() if self.image_root else None
        return recognise(locate(self.path), self.split, self.caption_column, root, self.streaming)

    def read(self) -> ExampleSet:
        examples = super().read()
        opposite = examples.contradicted
        told = f"{self.path}: {opposite} of {len(examples)} pairs are there with the other winner too"
        if opposite > self.max_contradicted_share * len(examples):
            raise DataError(
                f"{told}; keep what most people said, or allow a larger share than max_contradicted_share = "
                f"{self.max_contradicted_share}"
            )
        if opposite:
            logger.warning(told)
        return examples

    def _examples(self, rows: Iterable[PairRow]) -> Iterator[Example | Bad | Unlabelled | None]:
        for number, row in enumerate(rows):
            if row.soft and self.soft_labels == "votes":
                row = replace(row, problem="")
            if fault := row.fault():
                yield Bad(number, row.source, fault)
            elif row.unlabelled:
                yield Unlabelled(number, row.source, row.unlabelled)
            elif row.sides is not None:
                yield Example(number, row.source, clean(str(row.caption)), row.sides, row.share)
            elif self.ties == "error":
                raise DataError(f"{row.source} is a tie; remove it, or drop ties with ties: drop")
            else:
                yield None
