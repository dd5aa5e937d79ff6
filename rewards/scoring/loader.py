"""From the rows of an input to batches of decoded pictures, made ahead of the rewards that read them."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from rewards.data.images import ImageRow, ImageSource, UnreadableError

T = TypeVar("T")
WAITING = 2**29  # bytes of decoded pictures that may wait for others of their size


@dataclass(frozen=True)
class Batch:
    """Readable pictures of one size, (B, 3, H, W), by row number; uint8 as they are decoded."""

    rows: dict[int, ImageRow]
    images: Tensor

    def on(self, device: str) -> Batch:
        """As rewards take it: on ``device``, float in [0, 1]."""
        return replace(self, images=self.images.to(device).float().div_(255))


@dataclass(frozen=True)
class BadImage:
    row: int
    file: str
    error: str


@dataclass(frozen=True)
class Finished:
    """Shard ``shard`` has no further batch; without a shard, the input ended after ``rows``."""

    rows: int
    shard: int | None = None


Work = Batch | BadImage | Finished


@dataclass
class Decoder:
    """Reads and decodes ``threads`` pictures at a time and batches them; no batch reaches over the end of a shard."""

    source: ImageSource
    limit: int | None
    shard_size: int
    batch_size: int
    threads: int

    def work(self, wanted: Callable[[int], bool], end: int | None = None) -> Iterator[Work]:
        """The shards whose number is ``wanted``; the input is not read beyond row ``end``."""
        seen = 0
        stop = min((bound for bound in (self.limit, end) if bound is not None), default=None)

        def chosen() -> Iterator[tuple[int, ImageRow]]:
            nonlocal seen
            rows = self.source.rows(lambda row: (stop is None or row < stop) and wanted(row // self.shard_size))
            for number, row in enumerate(itertools.islice(rows, stop)):
                seen = number + 1
                if row is not None:
                    yield number, row

        with ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as pool:
            decoded = self._decoded(chosen(), pool)
            for shard, pictures in itertools.groupby(decoded, key=lambda one: one[0] // self.shard_size):
                yield from self._batches(pictures)
                yield Finished(seen, shard)
        yield Finished(seen)

    def _decoded(
        self, rows: Iterator[tuple[int, ImageRow]], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[int, ImageRow, Future[Tensor]]]:
        waiting: deque[tuple[int, ImageRow, Future[Tensor]]] = deque()
        for number, row in rows:
            # only the future keeps the encoded bytes, and only until they are decoded
            place = row.image if isinstance(row.image, Path) else None
            waiting.append((number, replace(row, image=place), pool.submit(row.read)))
            if len(waiting) >= self.batch_size + self.threads:
                yield waiting.popleft()
        yield from waiting

    def _batches(self, pictures: Iterator[tuple[int, ImageRow, Future[Tensor]]]) -> Iterator[Work]:
        waiting: dict[tuple[int, ...], dict[int, tuple[ImageRow, Tensor]]] = {}
        for number, row, future in pictures:
            try:
                image = future.result()
            except UnreadableError as error:
                yield BadImage(number, row.file, str(error))
                continue
            waiting.setdefault(tuple(image.shape), {})[number] = (row, image)
            # Where every image has a size of its own no batch fills up: then the fullest leaves, to bound the memory.
            crowded = sum(math.prod(size) * len(images) for size, images in waiting.items()) >= WAITING
            fullest = max(waiting, key=lambda size: len(waiting[size]))
            if crowded or len(waiting[fullest]) == self.batch_size:
                yield _batch(waiting.pop(fullest))
        yield from map(_batch, waiting.values())


def shard_sizes(total: int, limit: int | None, shard_size: int) -> list[int]:
    """How many of ``total`` rows, the first ``limit`` of which count, each shard has."""
    total = min(total, limit or total)
    return [min(shard_size, total - start) for start in range(0, total, shard_size)]


def _batch(waiting: Mapping[int, tuple[ImageRow, Tensor]]) -> Batch:
    return Batch({n: row for n, (row, _) in waiting.items()}, torch.stack([image for _, image in waiting.values()]))


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, made in a thread that runs at most ``depth`` ahead; what it raises is raised here."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        waiting = deque(thread.submit(next, items, None) for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not None:
                waiting.append(thread.submit(next, items, None))
                yield item
        finally:
            for future in waiting:
                future.cancel()
