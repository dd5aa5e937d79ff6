"""Curves of a run's ``metrics.jsonl``, read in one pass and in memory that does not grow with the file.

A curve is kept as buckets of equally many values, each by its least, greatest and mean one. There are at most
``2 * BUCKETS``; where they run out, neighbors merge, so that each holds twice as many from then on.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUCKETS = 80  # about as many as a chart of a page can show side by side
MOST, LEAST = 1e100, 1e-100  # sizes beyond which a number counts as infinite, or as 0: sums and ratios of them would be


class Axis(enum.Enum):
    """What a curve is drawn against."""

    UPDATES = "updates"
    PICTURES = "pictures"
    EVALUATIONS = "network evaluations"


@dataclass(frozen=True)
class Position:
    """Where in a run a value was logged: optimizer steps, pictures drawn so far by rollouts, and passes through the
    network so far; the last two None before a run has told any."""

    updates: float
    pictures: float | None = None
    evaluations: float | None = None

    def on(self, axis: Axis) -> float | None:
        return {Axis.UPDATES: self.updates, Axis.PICTURES: self.pictures, Axis.EVALUATIONS: self.evaluations}[axis]


@dataclass
class Bucket:
    """Values of a curve that follow one another."""

    first: Position
    last: Position
    low: float
    high: float
    total: float
    count: int = 1

    @property
    def mean(self) -> float:
        return self.total / self.count

    def absorb(self, later: Bucket) -> None:
        self.last, self.low, self.high = later.last, min(self.low, later.low), max(self.high, later.high)
        self.total, self.count = self.total + later.total, self.count + later.count


@dataclass
class Curve:
    """A metric over a run, thinned; ``broken`` counts values that were NaN or infinite and are not in it."""

    buckets: list[Bucket] = field(default_factory=list)
    size: int = 1  # values of a whole bucket
    broken: int = 0

    def add(self, at: Position, value: float) -> None:
        if not math.isfinite(value):
            self.broken += 1
            return
        one = Bucket(at, at, value, value, value)
        if self.buckets and self.buckets[-1].count < self.size:
            self.buckets[-1].absorb(one)
            return
        if len(self.buckets) == 2 * BUCKETS:
            for bucket, later in zip(self.buckets[::2], self.buckets[1::2], strict=True):
                bucket.absorb(later)
            self.buckets, self.size = self.buckets[::2], 2 * self.size
        self.buckets.append(one)

    def cut(self, step: float) -> None:
        """Forget what was logged from ``step`` on, but for the bucket in which that lies."""
        self.buckets = [bucket for bucket in self.buckets if bucket.first.updates < step]


@dataclass
class Metrics:
    """What a run has logged: curves by metric, held-out ones as ``validation/NAME``; the times (seconds of the epoch)
    of the first and the last line; how many lines there are, and how many of them were none."""

    curves: dict[str, Curve] = field(default_factory=dict)
    first: float | None = None
    last: float | None = None
    at: Position = field(default_factory=lambda: Position(0))
    lines: int = 0
    unread: int = 0

    @classmethod
    def read(cls, path: Path) -> Metrics:
        """Read ``path``, empty where there is no such file. A last line without its end, which a running or killed
        process left, is no fault."""
        metrics = cls()
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as file:
                for text in file:
                    line = parsed(text)
                    if line is not None:
                        metrics.add(line)
                    elif text.endswith("\n") and text.strip():
                        metrics.unread += 1
        return metrics

    def add(self, line: Mapping[str, Any]) -> None:
        values = {name: number for name, value in line.items() if (number := _number(value)) is not None}
        step, time = values.pop("step"), values.pop("time", None)
        time = time if time is not None and math.isfinite(time) else None
        if step < self.at.updates:  # taken again by a run that went on from a checkpoint
            for curve in self.curves.values():
                curve.cut(step)
            left = [curve.buckets[-1].last for curve in self.curves.values() if curve.buckets]
            self.at = max(left, key=lambda position: position.updates, default=Position(0))
        passed = [values[name] for name in ("evaluations/trained", "evaluations/frozen") if name in values]
        pictures = values.get("rollout/pictures")
        self.at = Position(
            step,
            self.at.pictures if pictures is None else (self.at.pictures or 0) + pictures,
            sum(passed) if passed else self.at.evaluations,
        )
        self.lines += 1
        self.first = time if self.first is None else self.first
        self.last = time if time is not None else self.last
        for name, value in values.items():
            name = f"validation/{name[9:]}" if name.startswith("held_out/") else name  # as 0.1 called it
            self.curves.setdefault(name, Curve()).add(self.at, value)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if abs(value) > MOST:
        return math.inf
    return float(value) if not abs(value) < LEAST else 0.0  # NaN stays


def parsed(text: str) -> dict[str, Any] | None:
    """A line of metrics, with the step it is of; None where it is none."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(line, dict) and (step := _number(line.get("step"))) is not None and math.isfinite(step)
    return line if whole else None
