"""What a run trains on: examples as files hold them, data sets as a model sees them, and the order of the items."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from align.common.errors import DataError
from align.common.resolution import Resolution
from align.families import Family
from rewards.common.files import write_text
from rewards.data.hub_files import address, hub_size
from rewards.data.verdicts import contradicted

logger = logging.getLogger(__name__)


class Readable(Protocol):
    """An image that is read when somebody looks at it; ``file``, ``row`` and ``column`` tell it from all others."""

    @property
    def file(self) -> Path: ...
    @property
    def row(self) -> int: ...
    @property
    def column(self) -> str: ...
    def data(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Example:
    """A caption and its images: one, or of a preference two, the winner first. ``id`` counts the source's rows, ties
    and bad ones too. ``label`` is what people said of it, where they did: of a pair the winner's share of the votes, of
    an image 1 for good and 0 for bad."""

    id: int
    source: str
    caption: str
    images: tuple[Readable, ...]
    label: float | None = None


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used."""

    row: int
    source: str
    reason: str


@dataclass(frozen=True)
class Unlabelled:
    """A row that nobody was asked about, or could answer: neither an example, nor a tie, nor bad."""

    row: int
    source: str
    reason: str


Row = Example | Bad | Unlabelled | None  # None: a tie
Rows = tuple[str, Sequence[Path], Iterable[Row]]  # layout, files that it depends on, rows


def image_key(file: Path, stats: dict[Path, tuple[str, int, int]]) -> tuple[str, int, int]:
    """A file's true name, size and time, which ``stats`` remembers; one of the hub has its commit in its name."""
    if (known := stats.get(file)) is None:
        if (url := address(file)) is not None:
            known = url, hub_size(url), 0
        else:
            found = os.stat(file)
            known = os.path.realpath(file), found.st_size, found.st_mtime_ns
        stats[file] = known
    return known


def text_key(text: str) -> bytes:
    """128 bits that are equal for equal texts."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def content_key(item: Example, sizes: Sequence[int]) -> bytes:
    """What an example holds, its images' files being of ``sizes`` bytes, wherever these lie."""
    images = [[size, image.row, image.column] for size, image in zip(sizes, item.images, strict=True)]
    return json.dumps([item.id, item.caption, images, item.label]).encode()


@dataclass(frozen=True)
class ExampleSet:
    """The usable examples of a source of ``layout``, in file order, and what was left out of its ``total`` rows."""

    layout: str
    items: Sequence[Example]
    bad: list[Bad]
    ties: int
    total: int
    unlabelled: int
    contradicted: int  # of pairs, how many are there with the other winner too
    numbers: np.ndarray[Any, np.dtype[np.int32]]  # of each item's caption, in the order in which captions first occur
    firsts: np.ndarray[Any, np.dtype[np.int32]]  # of each caption, the first item that has it
    digest: str  # of the images, by the names, sizes and times of their files, and of where in these they lie
    caption_digest: str
    content_digest: str  # of captions, and of images by their size: the same wherever they lie

    @staticmethod
    def of(layout: str, rows: Iterable[Row], files: Sequence[Path] = ()) -> ExampleSet:
        """Sort ``rows`` into examples, bad rows, unlabelled ones and ties (None), all in memory."""
        kept = list(rows)
        items = [row for row in kept if isinstance(row, Example)]
        bad = [row for row in kept if isinstance(row, Bad)]
        unlabelled = sum(isinstance(row, Unlabelled) for row in kept)
        sides = ([(item.caption, str(image)) for image in item.images] for item in items if len(item.images) == 2)
        captions = list(dict.fromkeys(item.caption for item in items))
        number = {caption: place for place, caption in enumerate(captions)}
        numbers = np.array([number[item.caption] for item in items], np.int32)
        stats: dict[Path, tuple[str, int, int]] = {}
        keys = [[i.id, [(*image_key(image.file, stats), image.row, image.column) for image in i.images]] for i in items]
        described = [layout, [image_key(file, stats) for file in files], keys]
        images = hashlib.sha256(json.dumps(described).encode()).hexdigest()
        contents = hashlib.sha256()
        for item in items:
            contents.update(content_key(item, [image_key(image.file, stats)[1] for image in item.images]))
        texts = hashlib.sha256(b"".join(map(text_key, captions))).hexdigest()
        firsts = np.unique(numbers, return_index=True)[1].astype(np.int32)
        opposite = contradicted((won, lost) for won, lost in sides)
        counts = kept.count(None), len(kept), unlabelled, opposite
        return ExampleSet(layout, items, bad, *counts, numbers, firsts, images, texts, contents.hexdigest())

    def counts(self) -> str:
        """What the rows were, in words."""
        unlabelled = f", {self.unlabelled} unlabelled" if self.unlabelled else ""
        return f"{self.total} rows, {self.ties} ties, {len(self.bad)} bad{unlabelled}"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        return self.items[index]


def check_bad(bad: Sequence[Bad], total: int, max_share: float, report: Path | None) -> None:
    """Report the bad rows; raise :class:`DataError` when they are more than ``max_share`` of ``total``."""
    if not bad:
        return
    if report:
        write_text(report, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in bad))
    first = "".join(f"\n  row {row.row}, {row.source}: {row.reason}" for row in bad[:3])
    message = f"{len(bad)} of {total} rows are unusable{f', listed in {report}' if report else ''}; the first:{first}"
    if len(bad) > max_share * total:
        raise DataError(f"{message}\nrepair them, or allow a larger share than max_bad_share = {max_share}")
    logger.warning(message)


@dataclass(frozen=True)
class Setup:
    """What a run gives its data to get ready with.

    Attributes:
        family: encodes images and captions.
        seed: of random crops and flips.
        process_index: this process encodes every ``num_processes``-th shard, from this one.
        num_processes: how many share the work and see the same cache folder.
        progress: show a bar.
        wait_for_everyone: returns when all processes have called it.
    """

    family: Family
    seed: int = 0
    process_index: int = 0
    num_processes: int = 1
    progress: bool = True
    wait_for_everyone: Callable[[], None] = lambda: None


class Dataset(Protocol):
    """Data as a model sees it: ``batch(indices, variants)`` gives the items, each in one of its cached views."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int], variants: Sequence[int] | None = None) -> Any: ...


class Data(ABC):
    """What a run trains on. ``batch_type`` is what :meth:`prepare`'s result gives; objectives name what they take."""

    batch_type: ClassVar[type]
    resolution: Resolution
    variants: int = 1  # cached views of each item
    multiple: int = 1  # a process has to be given a multiple of so many items

    @abstractmethod
    def check(self) -> None:
        """Raise :class:`DataError` where the data can be seen to be unusable before a model is loaded."""

    @abstractmethod
    def prepare(self, setup: Setup) -> Dataset:
        """Encode what is to be encoded."""


@runtime_checkable
class Bucketed(Protocol):
    """Data whose items are of several sizes; ``buckets`` are the items of each, of which alone a batch is made."""

    buckets: Sequence[Sequence[int]]


@runtime_checkable
class Fingerprinted(Protocol):
    """Data that says what it holds, the same wherever it lies: a resumed run must go on with what it began with."""

    @property
    def fingerprint(self) -> str: ...


def contents_of(data: Dataset) -> dict[str, str]:
    """What a checkpoint keeps of ``data`` beside the settings of the run."""
    return {"contents of data": data.fingerprint} if isinstance(data, Fingerprinted) else {}


def batches(data: Dataset, size: int) -> Iterator[Sequence[int]]:
    """All items, at most ``size`` at a time, of one bucket each."""
    for bucket in data.buckets if isinstance(data, Bucketed) else [range(len(data))]:
        for start in range(0, len(bucket), size):
            yield [int(item) for item in bucket[start : start + size]]


def drawn(data: Dataset, size: int, seed: int, step: int) -> list[int]:
    """The ``size`` items, of one bucket, that step ``step`` trains on, a pure function of ``seed`` and ``step``.

    A bucket of n of N items has n of every N steps, in an order that is shuffled anew every N steps, and goes through
    its own items in epochs that do not end with those: none is thrown away or filled up, and in N steps every item is
    drawn ``size`` times. With one bucket this is :func:`shuffled`.
    """
    if not isinstance(data, Bucketed) or len(data.buckets) == 1:
        return shuffled(len(data), size, seed, step)
    counts = tuple(map(len, data.buckets))
    cycle, place = divmod(step, sum(counts))
    turns = _turns(counts, seed, cycle)
    bucket = int(turns[place])
    turn = cycle * counts[bucket] + int(np.count_nonzero(turns[:place] == bucket))
    return [int(data.buckets[bucket][item]) for item in shuffled(counts[bucket], size, seed, turn)]


@functools.lru_cache(maxsize=2)
def _turns(counts: tuple[int, ...], seed: int, cycle: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Which bucket has each step of a cycle."""
    turns = np.repeat(np.arange(len(counts), dtype=np.uint16), counts)
    return np.random.default_rng([seed, cycle, len(counts)]).permutation(turns)


def shuffled(count: int, size: int, seed: int, step: int) -> list[int]:
    """The ``size`` indices below ``count`` that step ``step`` trains on: a slice of endless shuffled epochs.

    A pure function, so that any step resumes without replaying the ones before it.
    """
    if count < 1 or size < 1:
        raise ValueError(f"cannot draw batches of {size} from {count} items")
    places = range(step * size, (step + 1) * size)
    return [int(_epoch(count, seed, place // count)[place % count]) for place in places]


@functools.lru_cache(maxsize=2)
def _epoch(count: int, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.random.default_rng([seed, epoch]).permutation(np.arange(count, dtype=np.int32))
