"""The embeddings of a data set's captions: on disk, in memory, or encoded whenever they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from align.data.dataset import ExampleSet, Setup
from align.data.packed import Storage, pack, unpack
from align.data.shards import Shards
from align.families import Conditioning, Family, Truncated

TEXTS = 64  # captions in one call of the text encoders, and in a file

TextCache = Literal["disk", "memory", "none"]


class Captions:
    """The distinct captions of the first ``count`` of some examples, in the order in which they first occur."""

    def __init__(self, examples: ExampleSet, count: int) -> None:
        self.items, self.firsts = examples.items, examples.firsts[: int(examples.firsts.searchsorted(count))]
        self.key = [examples.caption_digest, len(self.firsts)]

    def __len__(self) -> int:
        return len(self.firsts)

    def __getitem__(self, number: int) -> str:
        return self.items[int(self.firsts[number])].caption


class Embeddings(Protocol):
    """Conditions of captions by their numbers."""

    def take(self, numbers: Sequence[int]) -> Conditioning: ...


def encode(family: Family, captions: Sequence[str]) -> Conditioning:
    # without the autocast of whoever asks: a T5 keeps some layers in float32 for a reason
    with torch.no_grad(), torch.autocast(torch.device(family.device).type, enabled=False):
        return family.encode(captions)


class EncodedWhenAsked:
    """Embeddings that the text encoders, which have to stay loaded, make when they are first asked for, or, where
    nothing is kept, every time."""

    def __init__(self, family: Family, captions: Captions, keep: bool, storage: Storage) -> None:
        self.family, self.captions, self.keep, self.storage = family, captions, keep, storage
        self._kept: dict[int, dict[str, Tensor]] = {}

    def take(self, numbers: Sequence[int]) -> Conditioning:
        missing = [number for number in dict.fromkeys(numbers) if number not in self._kept]
        made: dict[int, dict[str, Tensor]] = {}
        for start in range(0, len(missing), TEXTS):
            part = missing[start : start + TEXTS]
            cond = encode(self.family, [self.captions[number] for number in part])
            made |= {n: pack(cond.take(slice(row, row + 1)), self.storage) for row, n in enumerate(part)}
        if self.keep:
            self._kept |= made
        return Conditioning.cat([unpack((self._kept if n in self._kept else made)[n], 0) for n in numbers])


class EncodedOnDisk:
    """Embeddings in shards of :data:`TEXTS` captions, encoded once by all processes together."""

    def __init__(self, home: Path, setup: Setup, captions: Captions, storage: Storage) -> None:
        self.setup, self.captions, self.storage = setup, captions, storage
        texts = {"dtype": str(setup.family.dtype), "captions": captions.key, "storage": storage}
        model = dict(setup.family.identity()["captions"])
        self.shards = Shards(home / "captions", "conds", len(captions), TEXTS, texts | {"model": model})
        self.todo = self.shards.todo(setup)
        self._first = self._encoded(self.todo[0]) if self.todo else {}

    @property
    def row_bytes(self) -> float:
        """Of a caption, by those of the first shard that is missing; 0 where none is."""
        if not self.todo:
            return 0.0
        span = self.shards.span(self.todo[0])
        return sum(tensor.nbytes for tensor in self._first.values()) / (span.stop - span.start)

    def write(self, done: Callable[[int], object]) -> None:
        """Encode this process's share of what is missing."""
        for number in self.todo:
            span = self.shards.span(number)
            tensors, self._first = self._first or self._encoded(number), {}
            cut = Truncated.among(self.setup.family, self._texts(number))
            self.shards.save(number, tensors, cut=[cut.count, cut.limit, cut.example])
            done(span.stop - span.start)
        self.todo = []

    def open(self) -> None:
        """Raises :class:`DataError` where a shard is missing; says how many captions the text encoders cut."""
        cut = sum((Truncated(*self.shards.require(k)["cut"]) for k in range(self.shards.number)), Truncated())
        cut.tell(len(self.captions))

    def take(self, numbers: Sequence[int]) -> Conditioning:
        size = self.shards.size
        return Conditioning.cat([unpack(self.shards.tensors(n // size), n % size) for n in numbers])

    def _texts(self, number: int) -> list[str]:
        span = self.shards.span(number)
        return [self.captions[k] for k in range(span.start, span.stop)]

    def _encoded(self, number: int) -> dict[str, Tensor]:
        return pack(encode(self.setup.family, self._texts(number)), self.storage)
