"""Images with captions, encoded once: what :class:`Images`, and in :mod:`align.data.preferences` pairs, are read by."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from align.common.assets import locate
from align.common.errors import DataError, UserError, require_at_least
from align.common.resolution import Resolution, sides
from align.data import latent_cache
from align.data.dataset import Bad, Data, Example, ExampleSet, Row, Rows, Setup, Unlabelled, check_bad, image_key
from align.data.example_index import code_of, indexed, listing
from align.data.latent_cache import EncodedBatch, EncodedDataset, LatentCache
from align.data.packed import Storage
from align.data.text_cache import TextCache
from align.data.views import Size, Views, buckets_of
from align.families import Family
from rewards.data.arrow_tables import WHOLE, is_hub_id
from rewards.data.formats import open_input
from rewards.data.hub_files import hub_files, hub_folder
from rewards.data.images import ImageRow, ImageSource, InOrder
from rewards.data.paths import no_such_file
from rewards.data.tables import Cells, LazyImage
from rewards.data.text import caption_fault, clean

logger = logging.getLogger(__name__)

CACHE = "~/.cache/t2i-align"
# settings of which the rows do not depend
VIEWS = frozenset({"streaming", "limit", "resolution", "aspect_ratio_buckets", "bucket_reso_steps", "center_crop"})
VIEWS |= {"random_flip", "variants", "cache_dir", "vae_batch", "positive_ratio"}
LIMITS = frozenset({"max_bad_share", "max_contradicted_share", "text_cache", "text_cache_dtype"})


@dataclass
class EncodedData(Data):
    """What data sets of images with captions share.

    Args:
        path: a file, a folder or a hub id.
        split: the split of a hub id (default train), or of a folder that holds several.
        streaming: of a hub id, read what is asked for where it lies and keep nothing but encodings: first captions and
            labels, then each image once, as it is encoded. With ``limit`` no row after the last of these is read.
            Otherwise all of a hub id is downloaded first; files of this machine are read in place either way.
        limit: use the first so many items.
        resolution: of the images, pixels a side of squares, or WIDTHxHEIGHT; default the model's own.
        aspect_ratio_buckets: ``true`` cuts each image to the aspect ratio that is nearest to its own, of all that sides
            in multiples of ``bucket_reso_steps`` make within as many pixels as ``resolution`` has; a list of sizes,
            ``[1024x1024, 768x1344, ..]``, takes those. A pair's two images share one. A batch holds one.
        bucket_reso_steps: pixels between the sides of buckets.
        center_crop: cut from the middle; otherwise at random.
        random_flip: mirror half of the views.
        variants: how many random views of each item are cached. A pair's two images share crop and flip.
        max_bad_share: stop when more of the rows than this are unusable.
        caption_column: the caption's name, where it is not caption, prompt or text.
        cache_dir: where the encodings are kept; default ``~/.cache/t2i-align``. All ranks must see the same folder.
        vae_batch: images in one call of the VAE.
        text_cache: where embeddings of captions are kept: on disk, as the latents are; in memory, once they were asked
            for; or nowhere, and the text encoders, which stay loaded, run at every step.
        text_cache_dtype: the model's own precision, exact, or float8 (e4m3 with a scale for each token): half of it.
    """

    path: str
    split: str | None = None
    streaming: bool = False
    limit: int | None = None
    resolution: Resolution = None
    aspect_ratio_buckets: bool | list[str] = False
    bucket_reso_steps: int = 64
    center_crop: bool = True
    random_flip: bool = False
    variants: int = 1
    max_bad_share: float = 0.01
    caption_column: str | None = None
    cache_dir: str | None = None
    vae_batch: int = 8
    text_cache: TextCache = "disk"
    text_cache_dtype: Storage = "model"

    batch_type: ClassVar[type[EncodedBatch]]
    what: ClassVar[str]  # the items' name in messages and in the cache

    def __post_init__(self) -> None:
        self._items: tuple[str, ExampleSet] | None = None
        require_at_least(1, self, "variants", "vae_batch", "bucket_reso_steps", "limit")
        for name in ("max_bad_share", "max_contradicted_share"):
            if not 0 <= getattr(self, name, 0) <= 1:
                raise ValueError(f"{name} must be a share, from 0 to 1, got {getattr(self, name)}")
        if self.variants > 1 and self.center_crop and not self.random_flip:
            raise ValueError("all variants would be the same: set center_crop: false or random_flip: true")

    @abstractmethod
    def rows(self) -> Rows:
        """What stands at ``path``; no image is read yet. Raises :class:`DataError`."""

    def cells(self) -> Cells | None:
        """What the :class:`LazyImage`s of :meth:`rows` read from that lie inside larger files; where none do, or no
        index is to be kept of these, nothing."""
        return None

    def _key(self) -> str:
        """The index's name: what the rows depend on."""
        place = Path(locate(self.path)).expanduser()
        if self.streamed:  # by its commit; as many rows as are needed
            there = [*map(str, hub_files(self.path, self.split or WHOLE)), str(self.limit)]
        elif place.exists():
            there = [os.path.realpath(place), listing(place.resolve(), self.cache.resolve())]
        else:  # of the hub
            there = [self.path, *(str(image_key(file, {})) for file in self.rows()[1])]
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in VIEWS | LIMITS}
        key = [type(self).__qualname__, code_of(type(self)), there, settings]
        return hashlib.sha256(json.dumps(key, default=repr, sort_keys=True).encode()).hexdigest()[:24]

    @property
    def streamed(self) -> bool:
        """Whether rows are read from the hub as they are needed."""
        return self.streaming and not Path(locate(self.path)).expanduser().exists() and is_hub_id(self.path)

    def limited(self, rows: Iterable[Row]) -> Iterator[Row]:
        """``rows`` as they are, or of a stream those up to the example that is the last of ``limit``."""
        count = 0
        for row in rows:
            yield row
            count += isinstance(row, Example)
            if self.streamed and count == self.limit:
                return

    def read(self) -> ExampleSet:
        """The examples, before ``limit``. :class:`DataError` for nothing there, no known layout, or too many bad rows,
        which are listed in :attr:`report`."""
        examples = indexed(self.cache / "index" / self._key(), self.rows, self.cells)
        layout = examples.layout
        logger.info("%s (%s): %d %s of %s", self.path, layout, len(examples), self.what, examples.counts())
        check_bad(examples.bad, examples.total, self.max_bad_share, self.report)
        if not examples.items:
            raise DataError(f"{self.path} ({layout}) holds no usable {self.what}: {examples.counts()}")
        return examples

    def items(self) -> ExampleSet:
        """:meth:`read`, once for each value of the settings: :meth:`check` and :meth:`prepare` share it."""
        settings = repr(self)
        if self._items is None or self._items[0] != settings:
            self._items = settings, self.read()
        return self._items[1]

    def check(self) -> None:
        self.items()

    @property
    def labelled(self) -> bool:
        """Whether the data says of some item what people said of it."""
        return any(item.label is not None for item in self.items().items)

    @property
    def cache(self) -> Path:
        return Path(self.cache_dir or CACHE).expanduser()

    @property
    def report(self) -> Path:
        """Where unusable rows are listed, one JSON object a line."""
        name = hashlib.sha256(f"{self.path} {self.split}".encode()).hexdigest()[:8]
        return self.cache / f"bad-rows-{Path(self.path).stem}-{name}.jsonl"

    def sizes(self, family: Family) -> tuple[Size, ...]:
        """The sizes, (height, width), that ``family`` is given the images in: one, or those of the buckets. Raises
        :class:`UserError`."""
        step = self.bucket_reso_steps
        if self.aspect_ratio_buckets is True and step % (cell := family.cell * family.patch):
            near = max(1, round(step / cell)) * cell
            raise UserError(f"bucket_reso_steps: {step} is no multiple of {cell}; the nearest is {near}")
        height, width = sides(self.resolution or family.resolution)
        assert height and width
        return buckets_of((height, width), self.aspect_ratio_buckets, self.bucket_reso_steps)

    @property
    def count(self) -> int:
        """The examples that are used."""
        return min(len(self.items()), self.limit or len(self.items()))

    @property
    def shards(self) -> int:
        """The files of the latent cache."""
        return -(-self.count // latent_cache.SHARD)

    def encode(self, setup: Setup) -> LatentCache:
        """Write this process's share of what the cache lacks. Raises :class:`DataError` for latents that are not
        finite."""
        views = Views(self.sizes(setup.family), self.center_crop, self.random_flip, self.variants, setup.seed)
        how = self.text_cache, self.text_cache_dtype
        cache = LatentCache(self.cache, self.what, self.items(), self.count, views, setup, *how)
        cache.encode(self.vae_batch)
        return cache

    def prepare(self, setup: Setup) -> EncodedDataset:
        """Encode what the cache lacks, check every row, and open the cache. Raises :class:`DataError` for a data set
        that is unusable."""
        examples, count, cache = self.items(), self.count, self.encode(setup)
        dataset, unreadable = cache.open(self.batch_type)
        # every process sees the same rows here, so that all of them stop or none
        total = (
            examples.total if count == len(examples) else examples[count - 1].id + 1
        )  # rows beyond the limit do not count
        bad = sorted((row for row in [*examples.bad, *unreadable] if row.row < total), key=lambda row: row.row)
        check_bad(bad, total, self.max_bad_share, self.report if setup.process_index == 0 else None)
        if not len(dataset):
            raise DataError(f"{self.path}: none of {count} {self.what} is readable")
        return dataset


@dataclass(frozen=True)
class ImageBatch(EncodedBatch):
    """B captioned images: ``latents`` (B, C, h, w) and the conditions of their captions."""

    images = 1


@dataclass
class Images(EncodedData):
    """Captioned images, and how they are cut: a folder with ``metadata.jsonl`` or ``.csv`` (``file_name`` and
    ``text``, ``caption`` or ``prompt``) or a ``.txt`` beside each image; a ``.jsonl`` or ``.csv`` of paths; parquet;
    webdataset tar files; a ``save_to_disk`` folder; with ``streaming`` a hub id. The layouts are
    :func:`rewards.data.formats.open_input`'s.

    Args:
        image_column: the image's column, where it is not image, jpg, png, file_name or the like.
    """

    image_column: str | None = None

    batch_type: ClassVar[type[EncodedBatch]] = ImageBatch
    what = "images"

    def rows(self) -> Rows:
        place, source = self._source()
        return json.dumps(source.identity, sort_keys=True), (), self.limited(_examples(place, source, self.label))

    def cells(self) -> Cells | None:
        return InOrder(self._source()[1])

    def label(self, row: ImageRow) -> float | str | None:
        """What people said of a row; None where nobody did, and in words why it cannot be read."""
        return math.nan

    def _source(self) -> tuple[Path, ImageSource]:
        place = Path(locate(self.path)).expanduser()
        if self.streamed:
            place = hub_folder(hub_files(self.path, self.split or WHOLE)[0])
            return place, open_input(
                self.path, None, self.caption_column, self.image_column, self.split, streaming=True
            )
        if not place.exists():
            raise DataError(
                f"there is no file or folder {place}; expected captioned images, see align.data.Images; "
                "a data set of the hub is read with streaming: true"
            )
        return place, open_input(str(place), None, self.caption_column, self.image_column, self.split)


def _examples(
    place: Path, source: ImageSource, label: Callable[[ImageRow], float | str | None]
) -> Iterator[Example | Bad | Unlabelled]:
    stream = InOrder(source)
    for number, row in enumerate(source.rows(lambda number: True)):
        assert row is not None
        if fault := _fault(row, place if place.is_dir() else place.parent):
            yield Bad(number, row.file, fault)
        elif isinstance(said := label(row), str):
            yield Bad(number, row.file, said)
        elif said is None:
            yield Unlabelled(number, row.file, "nobody has said whether it is good")
        else:
            image = LazyImage(row.image) if isinstance(row.image, Path) else LazyImage(place, number, "", stream)
            yield Example(number, row.file, clean(str(row.prompt)), (image,), None if math.isnan(said) else said)


def _fault(row: ImageRow, root: Path) -> str:
    """Why the row cannot be used; empty where it can."""
    if row.problem or row.image is None:
        return row.problem or "no image"
    if not row.prompt or not clean(row.prompt):
        return f"no caption: {row.prompt!r}; expected one in the table, metadata.jsonl, or a .txt of the image's stem"
    if isinstance(row.image, Path) and not os.path.isfile(row.image):
        return no_such_file(row.image, root)
    return caption_fault(row.prompt)
