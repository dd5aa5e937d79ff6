"""Prompts, and preference pairs in the layouts that people have. Nothing is decoded here: pictures are lazy.

:func:`read_pairs` finds out which layout a path holds, says so, and gives the pairs in file order.
:mod:`align.encoded` turns them into cached latents and text embeddings.
"""

from __future__ import annotations

import functools
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch

from align.errors import DataError
from align.families import Cond, Family
from align.files import write
from align.layouts import CAPTIONS, parse, recognise
from align.pictures import Picture, Readable
from align.shapes import locate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two pictures for one caption, the first preferred. ``id`` counts the source's pairs, ties and bad rows too."""

    id: int
    source: str
    caption: str
    chosen: Picture
    rejected: Picture

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


def read_pairs(
    path: str | Path,
    split: str | None = None,
    ties: Literal["drop", "error"] = "drop",
    max_bad_share: float = 0.01,
    report: Path | None = None,
    caption_column: str | None = None,
    image_root: str | Path | None = None,
) -> ItemSet:
    """The preference pairs at ``path``: a file, a folder or a hub id, in one of :data:`align.layouts.LAYOUTS`.

    Args:
        path: what to read.
        split: which split of a hub id (default ``train``) or of a folder that holds several.
        ties: leave out rows without a winner, or stop at them.
        max_bad_share: stop when more of the rows than this are unusable.
        report: JSONL file that gets a line for each unusable row.
        caption_column: the caption's name where it is not one of :data:`align.layouts.CAPTIONS`.
        image_root: folder that relative picture paths start from; default the folder of the file that names them.

    Raises:
        DataError: nothing at ``path``, no known layout, ties where refused, or too many bad rows.
    """
    layout, files, rows = recognise(str(path), split, caption_column, Path(image_root) if image_root else None)
    logger.info("%s: %s", path, layout)
    pairs, bad, tied, total = list[Pair](), list[Bad](), 0, 0
    for total, row in enumerate(rows, 1):
        fault = row.fault()
        if fault:
            bad.append(Bad(total - 1, row.source, fault))
        elif row.sides is None:
            if ties == "error":
                raise DataError(f"{row.source} is a tie; remove it, or drop ties with ties: drop")
            tied += 1
        else:
            pairs.append(Pair(total - 1, row.source, str(row.caption).strip(), *row.sides))
    logger.info("%s: %d pairs, %d ties left out, %d bad rows", path, len(pairs), tied, len(bad))
    check_bad(bad, total, max_bad_share, report)
    if not pairs:
        raise DataError(f"{path} ({layout}) holds no usable pair: {total} rows, {tied} ties, {len(bad)} bad")
    return ItemSet(layout, pairs, bad, tied, total, files)


def check_bad(bad: Sequence[Bad], total: int, max_share: float, report: Path | None) -> None:
    """Report the bad rows; raise :class:`DataError` when they are more than ``max_share`` of ``total``."""
    if not bad:
        return
    if report:
        write(report, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in bad))
    first = "".join(f"\n  row {row.row}, {row.source}: {row.reason}" for row in bad[:3])
    message = f"{len(bad)} of {total} rows are unusable{f', listed in {report}' if report else ''}; the first:{first}"
    if len(bad) > max_share * total:
        raise DataError(f"{message}\nrepair them, or allow a larger share than max_bad_share = {max_share}")
    logger.warning(message)


# Prompts and their order.
def read_prompts(path: str | Path) -> list[str]:
    """The prompts of :func:`read_prompt_rows`."""
    return [row["prompt"] for row in read_prompt_rows(path)]


def read_prompt_rows(path: str | Path) -> list[dict[str, Any]]:
    """{"prompt": .., and what else stands there} from .jsonl or .json (objects or strings), or from a text file with
    one prompt on each line.

    Raises:
        DataError: no such file, an entry without a prompt, or no prompt at all.
    """
    file = Path(locate(str(path))).expanduser()
    if not file.is_file():
        raise DataError(f'there is no prompt file {file}; expected .jsonl with {{"prompt": ..}}, or .txt, one a line')
    prompts = []
    for where, entry in parse(file):
        words = (
            next((entry[n] for n in ("prompt", *CAPTIONS) if n in entry), None) if isinstance(entry, dict) else entry
        )
        if not isinstance(words, str) or not words.strip():
            raise DataError(f'{where}: expected {{"prompt": ".."}} or a string, found {entry!r}')
        prompts.append((entry if isinstance(entry, dict) else {}) | {"prompt": words.strip()})
    if not prompts:
        raise DataError(f"{file} holds no prompt")
    return prompts


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
        """Raise :class:`align.errors.DataError` where the data can be seen to be unusable before a model is loaded."""

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


@dataclass(frozen=True)
class PromptBatch:
    """P prompts, their conditions, and what else the prompt file says of each (for rewards that read it)."""

    prompts: list[str]
    cond: Cond
    metadata: list[Mapping[str, Any]]
    ids: list[int]


@dataclass
class Prompts(Data):
    """Prompts to draw pictures of.

    Args:
        path: .jsonl with {"prompt"} and whatever rewards want to know, a JSON list, text with one on each line, or
            ``shapes-prompts``, the embedded world's.
        limit: use the first so many.
        resolution: side of the pictures in pixels; default the model's own.
    """

    path: str
    limit: int | None = None
    resolution: int | None = None

    batch_type: ClassVar[type] = PromptBatch

    def check(self) -> None:
        self.read()

    def read(self) -> list[dict[str, Any]]:
        return read_prompt_rows(self.path)[: self.limit]

    def prepare(
        self,
        family: Family,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        progress: bool = True,
        barrier: Callable[[], None] = lambda: None,
    ) -> PromptSet:
        return PromptSet(family, self.read())


class PromptSet:
    """Prompts whose conditions are encoded when first asked for, and kept."""

    def __init__(self, family: Family, rows: list[dict[str, Any]], remember: int = 4096) -> None:
        self.family, self.rows = family, rows
        self._encode = functools.lru_cache(remember)(self._encoded)

    def __len__(self) -> int:
        return len(self.rows)

    def _encoded(self, prompt: str) -> Cond:
        with torch.no_grad():
            return self.family.encode([prompt]).to("cpu")

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Conditions of any prompts, remembered as those of the rows are."""
        return Cond.cat([self._encode(prompt) for prompt in prompts])

    def batch(self, indices: Sequence[int], variants: Sequence[int] | None = None) -> PromptBatch:
        rows = [self.rows[index] for index in indices]
        prompts = [row["prompt"] for row in rows]
        return PromptBatch(prompts, self.encode(prompts), list(rows), list(indices))


@dataclass
class TaskPrompts(Data):
    """Prompts of several tasks in equal shares: item k of a batch is of task k modulo their number.

    Args:
        tasks: a prompt file (see :class:`Prompts`) for each task; its name becomes ``task`` of its prompts' metadata.
        limit: use the first so many of each.
        resolution: side of the pictures in pixels; default the model's own.
    """

    tasks: dict[str, str]
    limit: int | None = None
    resolution: int | None = None

    batch_type: ClassVar[type] = PromptBatch

    def __post_init__(self) -> None:
        self.multiple = len(self.tasks)

    def check(self) -> None:
        if not self.tasks:
            raise DataError("tasks is empty; expected {task: prompt file, ..}")
        self.read()

    def read(self) -> list[list[dict[str, Any]]]:
        """The rows of each task."""
        return [
            [row | {"task": task} for row in read_prompt_rows(path)[: self.limit]] for task, path in self.tasks.items()
        ]

    def prepare(
        self,
        family: Family,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        progress: bool = True,
        barrier: Callable[[], None] = lambda: None,
    ) -> TaskSet:
        return TaskSet(family, self.read())


class TaskSet(PromptSet):
    """Items of the longest task's number; the place in a batch decides the task, the item its prompt."""

    def __init__(self, family: Family, tasks: list[list[dict[str, Any]]]) -> None:
        super().__init__(family, [row for rows in tasks for row in rows])
        self.tasks = tasks

    def __len__(self) -> int:
        return max(map(len, self.tasks))

    def batch(self, indices: Sequence[int], variants: Sequence[int] | None = None) -> PromptBatch:
        starts = [sum(map(len, self.tasks[:k])) for k in range(len(self.tasks))]
        places = [k % len(self.tasks) for k in range(len(indices))]
        return super().batch(
            [starts[task] + index % len(self.tasks[task]) for task, index in zip(places, indices, strict=True)]
        )


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
