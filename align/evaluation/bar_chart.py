"""Scores as one picture: a panel a reward, a row a task, a bar a model with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

from align.evaluation.ticks import ticks

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f7f7f", "#f0e442")  # Okabe and Ito
WIDE, BAR, GAP = 420, 12, 10  # pixels: of the axis, of a bar, between rows
INK, FAINT = "#1c1c1c", "#dddddd"
Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Value:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Panel:
    """What one reward says: row -> model -> value."""

    title: str
    rows: Mapping[str, Mapping[str, Value]]

    @property
    def axis(self) -> tuple[float, float, bool]:
        """From where to where, and whether bars may be drawn: where 0 is in reach. Of scores that lie close together,
        far from it (PickScore's), a bar's length would say nothing: they are points."""
        values = [value for row in self.rows.values() for value in row.values()]
        low, high = min(value.low for value in values), max(value.high for value in values)
        bars = low <= high / 2 and high >= low / 2  # 0 is between, or no further than the values are apart
        if bars:
            low, high = min(low, 0.0), max(high, 0.0)
        slack = 0.05 * ((high - low) or abs(high) or 1.0)
        return low - slack * (low < 0 or not bars), high + slack, bars


def chart(panels: Sequence[Panel], title: str) -> Image.Image:
    """The panels one under another, below the names of the models. The intervals are black lines."""
    font, models = (
        ImageFont.load_default(13),
        list(dict.fromkeys(m for p in panels for r in p.rows.values() for m in r)),
    )
    tall = BAR * len(models) + GAP
    margin = 24 + math.ceil(max(font.getlength(row) for panel in panels for row in panel.rows))
    heights = [34 + tall * len(panel.rows) + 30 for panel in panels]
    legend = _legend(models, font, margin + WIDE + 90)
    texts = [title, *(panel.title for panel in panels)]
    width = max(margin + WIDE + 90, *(16 + math.ceil(font.getlength(text)) for text in texts), 16)
    width = max(width, *(x + 20 + math.ceil(font.getlength(model)) for model, x, _ in legend))
    top = 34 + 20 * (legend[-1][2] + 1)
    sheet = Image.new("RGB", (width, top + sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((8, 8), title, fill=INK, font=font)
    colours = {model: COLOURS[k % len(COLOURS)] for k, model in enumerate(models)}
    for model, x, line in legend:
        pen.rectangle((x, 32 + 20 * line, x + 12, 44 + 20 * line), colours[model])
        pen.text((x + 18, 30 + 20 * line), model, fill=INK, font=font)
    edges = [top, *(top + sum(heights[: k + 1]) for k in range(len(heights)))]
    for panel, (start, end) in zip(panels, pairwise(edges), strict=True):
        _panel(pen, font, panel, colours, margin, start, end, tall)
    return sheet


def _legend(models: Sequence[str], font: Font, wide: int) -> list[tuple[str, int, int]]:
    """(model, x, line) of each name, as many on a line as ``wide`` holds."""
    places, x, line = [], 8, 0
    for model in models:
        length = 34 + math.ceil(font.getlength(model))
        if x > 8 and x + length > wide:
            x, line = 8, line + 1
        places.append((model, x, line))
        x += length
    return places


def _panel(
    pen: ImageDraw.ImageDraw,
    font: Font,
    panel: Panel,
    colours: Mapping[str, str],
    margin: int,
    start: int,
    end: int,
    tall: int,
) -> None:
    low, high, bars = panel.axis

    def place(value: float) -> float:
        return margin + WIDE * (value - low) / (high - low)

    pen.text((8, start + 8), panel.title, fill=INK, font=font)
    bottom = end - 26
    for tick in ticks(low, high, 5)[0]:
        pen.line((place(tick), start + 32, place(tick), bottom), FAINT)
        text = f"{tick:.6g}"
        pen.text((place(tick) - font.getlength(text) / 2, bottom + 2), text, fill=INK, font=font)
    if bars:
        pen.line((place(0), start + 32, place(0), bottom), INK)
    for number, (row, values) in enumerate(panel.rows.items()):
        y = start + 34 + tall * number
        pen.text((margin - 10 - font.getlength(row), y + (tall - GAP) / 2 - 8), row, fill=INK, font=font)
        for model, value in values.items():
            up = y + BAR * list(colours).index(model)
            middle, x = up + BAR / 2 - 1, place(value.mean)
            if bars:
                pen.rectangle((min(place(0), x), up, max(place(0), x), up + BAR - 3), colours[model])
            pen.line((place(value.low), middle, place(value.high), middle), INK)
            for edge in (value.low, value.high):
                pen.line((place(edge), middle - 3, place(edge), middle + 3), INK)
            if not bars:
                pen.ellipse((x - 4, middle - 4, x + 4, middle + 4), colours[model])
            clear = max(place(value.high), place(0.0) if bars else 0.0)  # not on a bar that goes to the left
            pen.text((clear + 6, up - 3), f"{value.mean:.4g}", fill=INK, font=ImageFont.load_default(11))
