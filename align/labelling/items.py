"""What people are shown: an item is a prompt and one picture of it, or several among which they choose."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from align.common.errors import UserError
from rewards.common.files import atomic
from rewards.data.hub_files import address, file_size
from rewards.data.images import BROKEN, UnreadableError
from rewards.data.tables import LazyImage

Task = Literal["pair", "best", "thumbs", "score"]
MOST = 9  # pictures of a grid: as many as there are digits to press
_tables = threading.Lock()  # a table keeps its place, and the server has threads


@dataclass(frozen=True)
class Picture:
    """A picture that lies at ``image``. ``name`` is what answers call it, empty where it lies inside a table;
    ``model`` is who drew it, where that is known; ``scores`` are rewards', by name; one that is ``awaited`` may still
    have to be drawn."""

    name: str
    image: LazyImage
    model: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    awaited: bool = False

    @property
    def place(self) -> str:
        return self.name or str(self.image)

    def data(self) -> bytes:
        """The encoded bytes. Raises ``UnreadableError``."""
        with _tables:
            return self.image.data()

    def keep(self, folder: Path) -> str:
        """What an answers file in ``folder``'s parent calls the picture; one inside a table is written into ``folder``
        first, byte for byte, so that the file is all that training needs."""
        if self.name:
            return self.name
        cell = f"{self.image.file.stem}-{self.image.row:06d}-{self.image.column}"
        try:
            data = self.data()
        except UnreadableError:  # it can only be skipped
            return f"{folder.name}/{cell}"
        try:
            with Image.open(io.BytesIO(data)) as opened:
                suffix = {"JPEG": "jpg"}.get(str(opened.format), str(opened.format).lower())
        except BROKEN:
            suffix = "bin"
        path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', cell)}.{suffix}"
        if not path.is_file():
            with atomic(path) as draft:
                draft.write_bytes(data)
        return f"{folder.name}/{path.name}"


@dataclass(frozen=True)
class Item:
    """Pictures of one prompt. ``known`` is what the source says of them, worth by worth, where it says something."""

    prompt: str
    pictures: tuple[Picture, ...]
    known: tuple[float, ...] | None = None

    @property
    def ready(self) -> bool:
        """Whether none of its pictures is still being drawn. One that is gone is shown as that."""
        return all(not picture.awaited or picture.image.file.is_file() for picture in self.pictures)


@dataclass(frozen=True)
class Source:
    """Pictures to choose between: ``groups`` of one prompt, or ``pairs`` of a preference set. Names of pictures start
    from ``root``, or where that is None from the folder of the answers."""

    title: str
    groups: Sequence[Item]
    pairs: Sequence[Item] | None = None
    root: Path | None = None

    def items(self, task: Task, k: int | None = None, limit: int | None = None) -> list[Item]:
        """The first ``limit`` items of a task; grids have at most ``k`` pictures, else all, but no more than
        :data:`MOST`. Raises :class:`UserError` where there is none."""
        most = MOST if k is None else k
        if task == "pair" and self.pairs is not None:
            items = list(self.pairs)
        elif task == "pair":
            items = [Item(group.prompt, pair) for group in self.groups for pair in _pairs(group.pictures)]
        elif task == "best":
            parts = [
                (g.prompt, g.pictures[at : at + most]) for g in self.groups for at in range(0, len(g.pictures), most)
            ]
            items = [Item(prompt, pictures) for prompt, pictures in parts if len(pictures) > 1]
        else:
            items = [Item(group.prompt, (picture,)) for group in self.groups for picture in group.pictures]
        if not items:
            raise UserError(
                f"{self.title}: no prompt has two pictures, so there is nothing to choose between; rate them one by "
                "one with --task thumbs or --task score"
            )
        return items[:limit]


def _pairs(pictures: Sequence[Picture]) -> list[tuple[Picture, ...]]:
    """Every two pictures, of different models where models are known."""
    return [(a, b) for a, b in combinations(pictures, 2) if not a.model or a.model != b.model]


def _cell(image: LazyImage) -> tuple[str, int, str]:
    return image.file.name, image.row, image.column


def digest_of(items: Sequence[Item]) -> str:
    """The same for the same prompts and pictures in the same order."""
    digest = hashlib.sha256()
    for item in items:
        places = [picture.name or [*_cell(picture.image)] for picture in item.pictures]
        digest.update(json.dumps([item.prompt, places]).encode())
    return digest.hexdigest()[:16]


def sizes_of(items: Sequence[Item]) -> str:
    """Another one where other pictures lie under the same names: by the sizes of their files, which copies of them
    share. Pictures that are still to be drawn are not looked at."""
    files = dict.fromkeys(one.image.file for item in items for one in item.pictures if not one.awaited)
    sizes = [file_size(file) if address(file) or file.is_file() else None for file in files]
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]


def relative(path: Path, folder: Path) -> str:
    """``path`` as a file in ``folder`` calls it."""
    return Path(os.path.relpath(path, folder)).as_posix()


def uncertainty(items: Sequence[Item]) -> np.ndarray:
    """How little rewards tell of each item, (N,): minus the distance between its two best pictures, or of a single one
    to the median picture, in the mean over rewards of scores in units of their standard deviation. Rewards that
    contradict each other cancel, so what they disagree on comes out high. Raises :class:`UserError` without scores."""
    names = set.intersection(*({*picture.scores} for item in items for picture in item.pictures))
    if not names:
        raise UserError("first: uncertain needs scores of every picture; give --scores, or --reward, once or twice")
    flat = [picture for item in items for picture in item.pictures]
    table = np.array([[picture.scores[name] for name in sorted(names)] for picture in flat])
    table = np.where(np.isfinite(table), table, np.nanmedian(np.where(np.isfinite(table), table, np.nan), 0))
    spread = table.std(0)
    means = ((table - np.median(table, 0)) / np.where(spread > 0, spread, 1)).mean(1)
    gaps, at = [], 0
    for item in items:
        part = np.sort(means[at : at + len(item.pictures)])[::-1]
        at += len(item.pictures)
        gaps.append(abs(part[0]) if len(part) == 1 else part[0] - part[1])
    return -np.array(gaps)
