"""Curves of several runs as one SVG: lines by run, held-out ones dashed, values beside them for a pointer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from align.evaluation.curves import Axis, Bucket, Curve
from align.evaluation.ticks import ticks

WIDTH, HEIGHT = 340, 190  # of the view box; text keeps its size where a page gives a chart about that much
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 22
SPREAD = 2.0  # how far, in heights of the lines, a band may widen the chart; a spike beyond leaves it


@dataclass(frozen=True)
class Line:
    """A curve in a chart: of the run ``number``, named ``name``, on held-out data or not."""

    number: int
    name: str
    curve: Curve
    held_out: bool = False


@dataclass(frozen=True)
class Scale:
    """Numbers from ``low`` to ``high`` on pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def number(value: float, digits: int = 3) -> str:
    """Few characters for an axis or a caption: 0.0123, 1.5, 3,000, 24k, 1.2e-7; ``digits`` that count."""
    size = abs(value)
    if size >= 1e9 or 0 < size < 1e-3:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        text = f"{mantissa}e{int(power)}"
    elif size >= 1e4:
        unit, name = (1e6, "M") if size >= 1e6 else (1e3, "k")
        text = f"{value / unit:.{max(digits, 3)}g}{name}"
    else:
        text = f"{value:,.0f}" if size >= 1e3 else f"{value:.{digits}g}"
    return text.replace("-", "−") if text.startswith("-") else text


def tick(value: float, step: float) -> str:
    """:func:`number` with the digits that tell ticks ``step`` apart."""
    if abs(value) < step / 2:
        return "0"
    power = math.floor(math.log10(step) + 1e-9)
    if 1e-3 <= abs(value) < 1e3:
        return f"{value:.{max(0, -power)}f}".replace("-", "−")
    return number(value, max(1, math.floor(math.log10(abs(value)) + 1e-9) - power + 1))


def has(lines: Sequence[Line], axis: Axis) -> bool:
    """Whether any of the lines can be drawn against ``axis``."""
    return any(bucket.last.on(axis) is not None for line in lines for bucket in line.curve.buckets)


def chart(lines: Sequence[Line], axis: Axis, title: str) -> Markup:
    """The SVG of ``lines`` against ``axis``; empty where none of them has a value there."""
    places = [(line, _placed(line.curve, axis)) for line in lines]
    places = [(line, points) for line, points in places if points]
    if not places:
        return Markup()
    at = [x for _, points in places for x, _ in points]
    across = Scale(*_widened(min(0.0, *at), max(at)), LEFT, WIDTH - RIGHT)
    upright = Scale(*_range([bucket for _, points in places for _, bucket in points]), HEIGHT - BOTTOM, TOP)
    parts = [_axes(across, upright, axis), *(_line(line, points, across, upright) for line, points in places)]
    label = escape(f"{title}, against {axis.value}")
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-axis="{axis.value}" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def _placed(curve: Curve, axis: Axis) -> list[tuple[float, Bucket]]:
    ends = [(bucket.first.on(axis), bucket.last.on(axis), bucket) for bucket in curve.buckets]
    return [((first + last) / 2, bucket) for first, last, bucket in ends if first is not None and last is not None]


def _widened(low: float, high: float) -> tuple[float, float]:
    """At least a thousandth of the numbers themselves, so that rounding errors do not look like a mountain range."""
    middle = (low + high) / 2
    if low == high:
        return (low - abs(low) / 10, high + abs(high) / 10) if low else (0.0, 1.0)
    room = max(high - low, 1e-3 * abs(middle))
    return middle - room / 2, middle + room / 2


def _range(buckets: Sequence[Bucket]) -> tuple[float, float]:
    """From the least to the greatest mean, wider by what their bands need, up to :data:`SPREAD`, and a little more."""
    means = [bucket.mean for bucket in buckets]
    low, high = _widened(min(means), max(means))
    room = SPREAD * (high - low)
    low = max(low - room, min(low, *(bucket.low for bucket in buckets)))
    high = min(high + room, max(high, *(bucket.high for bucket in buckets)))
    pad = 0.06 * (high - low)
    return low - pad, high + pad


def _axes(across: Scale, upright: Scale, axis: Axis) -> str:
    parts = []
    marks, step = ticks(upright.low, upright.high, 4)
    for value in marks:
        y = upright(value)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{tick(value, step)}</text>')
    marks, step = ticks(across.low, across.high, 5)
    for value in marks:
        x = across(value)
        where = "end" if x > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="{where}">{tick(value, step)}</text>')
    return "".join(parts)


def _line(line: Line, points: Sequence[tuple[float, Bucket]], across: Scale, upright: Scale) -> str:
    xs = [f"{across(x):.1f}" for x, _ in points]
    means = [f"{upright(bucket.mean):.1f}" for _, bucket in points]
    kind = " held-out" if line.held_out else ""
    name = f"{line.name}, held out" if line.held_out else line.name
    told_x = " ".join(f"{x:.6g}" for x, _ in points)
    told_y = " ".join(f"{bucket.mean:.4g}" for _, bucket in points)
    parts = [
        f'<g class="run r{line.number}{kind}" data-name="{escape(name)}" data-x="{told_x}" data-y="{told_y}" '
        f'data-at="{" ".join(xs)}">'
    ]
    if any(bucket.low < bucket.high for _, bucket in points):
        top, bottom = (
            [f"{x},{_inside(upright(v)):.1f}" for x, v in zip(xs, values, strict=True)]
            for values in ([b.high for _, b in points], [b.low for _, b in points])
        )
        parts.append(f'<polygon class="band" points="{" ".join([*top, *reversed(bottom)])}"/>')
    parts.append(f'<polyline points="{" ".join(f"{x},{y}" for x, y in zip(xs, means, strict=True))}"/>')
    if line.held_out or len(points) == 1:
        parts += [f'<circle cx="{x}" cy="{y}" r="2.6"/>' for x, y in zip(xs, means, strict=True)]
    return "".join([*parts, "</g>"])


def _inside(y: float) -> float:
    return min(max(y, TOP), HEIGHT - BOTTOM)
