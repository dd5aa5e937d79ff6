"""Pictures with captions: what a model is healed on, in the layouts that people have."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from align.common.assets import locate
from align.common.errors import DataError
from align.data.dataset import Bad, Captioned, ItemSet, check_bad
from align.data.preferences import Encoded, Encodings
from align.families import Conditioning
from rewards.data.formats import open_input
from rewards.data.images import ImageRow, ImageSource
from rewards.data.tables import LazyImage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageBatch:
    """B pictures: ``latents`` (B, C, h, w) and the conditions of their captions."""

    latents: Tensor
    cond: Conditioning
    captions: list[str]
    ids: list[int]


class EncodedImages(Encodings):
    """The cached pictures."""

    def batch(self, indices: Sequence[int], variants: Sequence[int] | None = None) -> ImageBatch:
        latents, cond, captions, ids = self.rows(indices, variants)
        return ImageBatch(latents[:, 0], cond, captions, ids)


@dataclass
class Images(Encoded):
    """Captioned pictures on disk, and how they are cut: a folder with ``metadata.jsonl`` or ``.csv`` (``file_name`` and
    ``text``, ``caption`` or ``prompt``) or a ``.txt`` beside each picture; a ``.jsonl`` or ``.csv`` of paths; parquet;
    webdataset tar files; a ``save_to_disk`` folder. The layouts are :func:`rewards.data.formats.open_input`'s.

    Args:
        image_column: the picture's column, where it is not image, jpg, png, file_name or the like.
    """

    image_column: str | None = None

    batch_type: ClassVar[type] = ImageBatch
    what: ClassVar[str] = "images"
    pictures: ClassVar[int] = 1
    opened: ClassVar[type[Encodings]] = EncodedImages

    def read(self) -> ItemSet:
        return read_images(
            self.path, self.split, self.max_bad_share, self.report, self.caption_column, self.image_column
        )


def read_images(
    path: str | Path,
    split: str | None = None,
    max_bad_share: float = 0.01,
    report: Path | None = None,
    caption_column: str | None = None,
    image_column: str | None = None,
) -> ItemSet:
    """The captioned pictures at ``path``, in the layouts of :class:`Images`; no picture is read yet.

    Raises:
        DataError: nothing at ``path``, no known layout, or too many rows without a caption or a picture.
    """
    place = Path(locate(str(path))).expanduser()
    if not place.exists():
        raise DataError(
            f"there is no file or folder {place}; expected captioned pictures, see align.data.captioned.Images"
        )
    found = open_input(str(place), None, caption_column, image_column, split)
    stream = InOrder(found)
    items, bad, total = list[Captioned](), list[Bad](), 0
    for total, row in enumerate(found.rows(lambda number: True), 1):
        assert row is not None
        if fault := _fault(row):
            bad.append(Bad(total - 1, row.file, fault))
            continue
        image = LazyImage(row.image) if isinstance(row.image, Path) else LazyImage(place, total - 1, "", stream)
        items.append(Captioned(total - 1, row.file, str(row.prompt).strip(), image))
    check_bad(bad, total, max_bad_share, report)
    if not items:
        raise DataError(f"{place} holds no captioned picture: {total} rows, {len(bad)} bad")
    logger.info("%s: %s, %d captioned pictures, %d bad rows", place, found.identity["layout"], len(items), len(bad))
    return ItemSet(json.dumps(found.identity, sort_keys=True), items, bad, 0, total, [])


def _fault(row: ImageRow) -> str:
    """Why the row cannot be used; empty where it can."""
    if row.problem or row.image is None:
        return row.problem or "no picture"
    if not row.prompt or not row.prompt.strip():
        return f"no caption: {row.prompt!r}"
    return f"no such file: {row.image}" if isinstance(row.image, Path) and not row.image.is_file() else ""


class InOrder:
    """Rows whose pictures are inside larger files, read forward: asking for them in order costs one pass."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source
        self._next = 0
        self._rows: Iterator[ImageRow | None] = iter(())

    def record(self, number: int) -> dict[str, object]:
        """{"": the image of row ``number``}."""
        if number < self._next or not self._next:
            self._next, self._rows = 0, self.source.rows(lambda row: row >= number)
        row = None
        while self._next <= number:
            row, self._next = next(self._rows), self._next + 1
        assert row is not None
        return {"": row.image}
