"""Bytes on a device, by what they are for."""

from __future__ import annotations

import enum
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

BLOCK = 512  # bytes in which the allocator of CUDA hands out memory


class Part(enum.Enum):
    """What memory is taken by."""

    WEIGHTS = "weights"
    LORA = "LoRA"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    AVERAGE = "moving average"
    REFERENCE = "reference"
    TEXT = "text encoders"
    VAE = "VAE"
    REWARDS = "rewards"
    CACHES = "rollout and rows"
    ACTIVATIONS = "activations"


Bytes = Counter[Part]
SHARDED = (Part.WEIGHTS, Part.GRADIENTS, Part.OPTIMIZER, Part.LORA, Part.AVERAGE, Part.REFERENCE)
GIB = 1 << 30


class Ledger:
    """Bytes that live on the device, by part, and the most of each phase."""

    def __init__(self) -> None:
        self.live, self.part = Bytes(), Part.CACHES
        self.total = self.most = 0
        self.peak = Bytes()
        self._entries: dict[int, tuple[weakref.ref[Any], int, Part]] = {}
        self._parked: set[int] = set()

    def track(self, tensor: Tensor) -> None:
        """Count the storage of ``tensor``, once, until it dies."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._entries or not storage.nbytes():
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK

        def freed(_: object, key: int = key) -> None:
            _, size, part = self._entries.pop(key)
            if key in self._parked:
                self._parked.remove(key)
            else:
                self.add(part, -size)

        self._entries[key] = weakref.ref(storage, freed), size, self.part
        self.add(self.part, size)

    def add(self, part: Part, size: int) -> None:
        self.live[part] += size
        self.total += size
        if self.total > self.most:
            self.most, self.peak = self.total, self.live.copy()

    def bump(self, size: int) -> None:
        """``size`` bytes more of the present part, for a moment."""
        self.add(self.part, size)
        self.add(self.part, -size)

    def move(self, tensors: Sequence[Tensor], part: Part) -> None:
        """``tensors`` belong to ``part``."""
        for tensor in tensors:
            self.track(tensor)
            key = tensor.untyped_storage()._cdata
            if key in self._entries:
                ref, size, before = self._entries[key]
                self._entries[key] = ref, size, part
                self.live[before] -= size
                self.live[part] += size

    def park(self, tensors: Sequence[Tensor], away: bool) -> None:
        """``tensors`` leave the device, or come back to it."""
        for key in {tensor.untyped_storage()._cdata for tensor in tensors} & self._entries.keys():
            if away != (key in self._parked):
                _, size, part = self._entries[key]
                self.add(part, -size if away else size)
                (self._parked.add if away else self._parked.remove)(key)

    def since(self) -> tuple[int, int, Bytes]:
        """Begin to look for a peak anew; gives back what was seen before, for :meth:`resume`."""
        before = self.total, self.most, self.peak
        self.most, self.peak = self.total, self.live.copy()
        return before

    def resume(self, before: tuple[int, int, Bytes]) -> int:
        """End what :meth:`since` began; how many bytes more there were meanwhile."""
        start, most, peak = before
        rise = self.most - start
        if self.most < most:
            self.most, self.peak = most, peak
        return rise

    @contextmanager
    def of(self, part: Part) -> Iterator[None]:
        """What is allocated within belongs to ``part``."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before


@dataclass(frozen=True)
class Phase:
    """The most that lived at once within a phase of a run, by part, in bytes."""

    name: str
    parts: Bytes

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Estimate:
    """The phases of a run, and how they come out on one of ``shards`` processes that divide what is trained."""

    phases: tuple[Phase, ...]
    shards: int = 1
    gathered: int = 0  # bytes of the blocks that a process has whole at a time

    @property
    def peak(self) -> Phase:
        return max(map(self._of_one, self.phases), key=lambda phase: phase.total)

    def _of_one(self, phase: Phase) -> Phase:
        if self.shards == 1:
            return phase
        parts = Bytes({part: -(-size // (self.shards if part in SHARDED else 1)) for part, size in phase.parts.items()})
        parts[Part.ACTIVATIONS] += self.gathered
        return Phase(phase.name, parts)

    def describe(self) -> str:
        """A line for each part at the peak, and one for each phase."""
        peak = self.peak
        parts = sorted(((size, part.value) for part, size in peak.parts.items() if size), reverse=True)
        lines = [f"peak memory, traced: {size_of(peak.total)} per GPU, in {peak.name}"]
        lines += [f"  {name:<16} {size_of(size):>11}" for size, name in parts]
        others = ", ".join(f"{p.name} {size_of(p.total)}" for p in map(self._of_one, self.phases))
        return "\n".join([*lines, f"  by phase: {others}"])


def size_of(count: int) -> str:
    """Bytes for people."""
    return f"{count / GIB:,.2f} GiB" if count >= GIB else f"{count / 2**20:,.1f} MiB"
