"""What a run trains on, its items, and the order in which they come."""

from __future__ import annotations

import functools
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from align.common.errors import DataError
from align.families import Family
from rewards.common.files import write_text
from rewards.data.tables import LazyImage

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
class Pair:
    """Two pictures for one caption, the first preferred. ``id`` counts the source's pairs, ties and bad rows too."""

    id: int
    source: str
    caption: str
    chosen: LazyImage
    rejected: LazyImage

    @property
    def pictures(self) -> tuple[Readable, ...]:
        return (self.chosen, self.rejected)


@dataclass(frozen=True, slots=True)
class Captioned:
    """One picture and its caption. ``id`` counts the source's rows, bad ones too."""

    id: int
    source: str
    caption: str
    picture: Readable

    @property
    def pictures(self) -> tuple[Readable, ...]:
        return (self.picture,)


Item = Pair | Captioned


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used."""

    row: int
    source: str
    reason: str


@dataclass(frozen=True)
class ItemSet:
    """The usable pairs, or captioned pictures, in file order, and what was left out of ``total`` rows."""

    layout: str
    items: Sequence[Item]
    bad: list[Bad]
    ties: int
    total: int
    files: list[Path]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
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


class Dataset(Protocol):
    """Data as a model sees it: ``batch(indices, views)`` gives the items, each in one of its cached views."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int], variants: Sequence[int] | None = None) -> Any: ...


class Data(ABC):
    """What a run trains on. ``batch_type`` is what :meth:`prepare`'s result gives; objectives name what they take."""

    batch_type: ClassVar[type]
    resolution: int | None  # pixels a side; None is the model's own
    variants: int = 1  # cached views of each item
    multiple: int = 1  # a process has to be given a multiple of so many items

    @abstractmethod
    def check(self) -> None:
        """Raise :class:`DataError` where the data can be seen to be unusable before a model is loaded."""

    @abstractmethod
    def prepare(
        self,
        family: Family,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        progress: bool = True,
        barrier: Callable[[], None] = lambda: None,
    ) -> Dataset:
        """Encode what is to be encoded; ``rank`` of ``world`` processes share the work and meet at ``barrier``."""


def shuffled(count: int, size: int, seed: int, step: int) -> list[int]:
    """The ``size`` indices below ``count`` that step ``step`` trains on: a slice of endless shuffled epochs.

    A pure function, so that any step resumes without replaying the ones before it.
    """
    if count < 1 or size < 1:
        raise ValueError(f"cannot draw batches of {size} from {count} items")
    places = range(step * size, (step + 1) * size)
    return [int(_epoch(count, seed, place // count)[place % count]) for place in places]


@functools.lru_cache(maxsize=4)
def _epoch(count: int, seed: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.random.default_rng([seed, epoch]).permutation(count)
