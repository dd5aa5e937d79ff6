"""Captioned images that are good or bad: by thumbs, by a score's threshold, or as the two images of each pair."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.common.assets import locate
from align.common.errors import DataError
from align.data.captioned import Images
from align.data.dataset import Bad, Example, Rows, Setup, Unlabelled
from align.data.latent_cache import EncodedBatch, EncodedDataset
from rewards.data.images import ImageRow
from rewards.data.pair_rows import PairRow
from rewards.data.preferences import Layout, recognise
from rewards.data.tables import Cells
from rewards.data.text import brief, clean
from rewards.data.verdicts import number, unwrap

logger = logging.getLogger(__name__)
LABELS = ("label", "good")
WORDS = {
    **dict.fromkeys(("true", "good", "up", "yes", "like", "liked", "desirable"), 1.0),
    **dict.fromkeys(("false", "bad", "down", "no", "dislike", "disliked", "undesirable"), 0.0),
}


@dataclass(frozen=True)
class RatedBatch(EncodedBatch):
    """B images: ``latents`` (B, C, h, w), the conditions of their captions, and ``labels`` (B,), 1 good and 0 bad."""

    images = 1


@dataclass
class RatedImages(Images):
    """Captioned images, each good or bad: any layout of :class:`align.data.Images` with a column that says so, or any
    of :class:`align.data.PreferencePairs` with ``pairs``.

    Args:
        label_column: true, 1, good or up, and false, 0, bad or down; default the first of label and good that is there.
            A row whose label is empty is left out.
        threshold: an image is good whose score is at least this; the labels are not asked then.
        score_column: where ``threshold`` finds the score.
        pairs: ``path`` holds pairs, whose winners are good and whose losers are bad.
        positive_ratio: the share of good images in an epoch, for which those of the other class come more than once
            (Diffusion-KTO: 0.8, drawn with replacement); null takes each image once.
        image_root: folder that relative image paths of pairs start from; default that of the file that names them.
    """

    label_column: str | None = None
    threshold: float | None = None
    score_column: str = "score"
    pairs: bool = False
    positive_ratio: float | None = None
    image_root: str | None = None

    batch_type = RatedBatch

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs and (self.threshold is not None or self.label_column):
            raise ValueError("pairs say themselves which image is good: leave threshold and label_column out")
        if self.threshold is not None and self.label_column:
            raise ValueError("threshold and label_column both say which image is good: give one of them")
        if self.positive_ratio is not None and not 0 < self.positive_ratio < 1:
            raise ValueError(f"positive_ratio must lie between 0 and 1, got {self.positive_ratio}")

    def rows(self) -> Rows:
        if self.pairs:
            layout = self._recognised()
            return layout.name, layout.files, self.limited(_members(layout.rows))
        return super().rows()

    def cells(self) -> Cells | None:
        return self._recognised().cells if self.pairs else super().cells()

    def _recognised(self) -> Layout:
        root = Path(self.image_root).expanduser() if self.image_root else None
        try:
            return recognise(locate(self.path), self.split, self.caption_column, root, self.streaming)
        except DataError as error:
            raise DataError(f"pairs is true, which is for pairs; false reads images with a label: {error}") from error

    def check(self) -> None:
        super().check()
        labels = (item.label for item in self.items().items)
        first = next(labels)
        if all(label == first for label in labels):
            kind = "good" if first else "bad"
            logger.warning("%s: all images are %s; nothing shows what the other kind is", self.path, kind)

    def label(self, row: ImageRow) -> float | str | None:
        names = [self.score_column] if self.threshold is not None else [self.label_column or "", *LABELS]
        name = next((name for name in names if name in row.metadata), None)
        wanted = names[0] or " or ".join(LABELS)
        if name is None or (self.label_column and name != self.label_column):
            return f"expected a column {wanted}, found {', '.join(row.metadata) or 'no other than image and caption'}"
        value = unwrap(row.metadata[name])
        if value is None or value == "":
            return None
        if self.threshold is not None:
            score = number(value)
            return f"{name} is {brief(value)}; expected a number" if score is None else float(score >= self.threshold)
        said = number(value)
        if said in (0, 1):
            return said
        if isinstance(value, str) and (word := value.strip().lower()) in WORDS:
            return WORDS[word]
        return f"{name} is {brief(value)}; expected true or false, 1 or 0, good or bad, up or down"

    def prepare(self, setup: Setup) -> Any:
        dataset = super().prepare(setup)
        if self.positive_ratio is None:
            return dataset
        labels = np.array([dataset.examples.items[place].label for place in dataset.lies["place"].tolist()])
        if labels.all() or not labels.any():
            raise DataError(
                f"{self.path}: all images are {'good' if labels.all() else 'bad'}; leave positive_ratio out"
            )
        return Resampled(dataset, labels > 0, self.positive_ratio)


class Resampled:
    """``data`` whose epochs hold ``good`` items and others as ``ratio`` to 1 - ``ratio``, each item at least once."""

    def __init__(self, data: EncodedDataset, good: np.ndarray[Any, np.dtype[np.bool_]], ratio: float) -> None:
        self.data, self.buckets = data, list[range]()
        chosen = list[np.ndarray[Any, Any]]()
        for bucket in data.buckets:
            items, start = np.asarray(bucket), sum(map(len, chosen))
            classes = items[good[items]], items[~good[items]]
            if all(map(len, classes)):
                whole = max(len(classes[0]) / ratio, len(classes[1]) / (1 - ratio))
                sizes = round(whole * ratio), round(whole * (1 - ratio))
                items = np.concatenate([np.resize(each, size) for each, size in zip(classes, sizes, strict=True)])
            chosen.append(items)
            self.buckets.append(range(start, start + len(items)))
        self.items = np.concatenate(chosen)

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, indices: Sequence[int], variants: Sequence[int] | None = None) -> Any:
        return self.data.batch(self.items[list(indices)].tolist(), variants)


def _members(rows: Iterable[PairRow]) -> Iterator[Example | Bad | Unlabelled | None]:
    """Both images of each pair, the winner first."""
    for pair, row in enumerate(rows):
        for side in range(2):
            number = 2 * pair + side
            if fault := row.fault():
                yield Bad(number, row.source, fault)
            elif row.unlabelled:
                yield Unlabelled(number, row.source, row.unlabelled)
            elif row.sides is None:
                yield None
            else:
                yield Example(number, row.source, clean(str(row.caption)), (row.sides[side],), float(side == 0))
