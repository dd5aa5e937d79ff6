"""Captions and renderer of the embedded world. The grammar and the palette live in :mod:`rewards.models.shapes`.

Everything here is a pure function of a ``numpy.random.Generator``, so a seed names a dataset.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from rewards.models.shapes import COUNTS, OUTLINES, PALETTE, PREFIXES, RELATIONS, SHAPES, TASKS, Spec, Thing, parse

SIZE = 64  # pixels a side
# one colour-shape combination per colour that no training caption and no training image ever shows
_UNSEEN = {
    "red": "triangle",
    "green": "star",
    "blue": "square",
    "yellow": "circle",
    "purple": "star",
    "black": "triangle",
}
HELD_OUT: frozenset[tuple[str, str]] = frozenset(_UNSEEN.items())
COMBINATIONS: tuple[tuple[str, str], ...] = tuple(itertools.product(PALETTE, SHAPES))
SEEN: tuple[tuple[str, str], ...] = tuple(pair for pair in COMBINATIONS if pair not in HELD_OUT)

# how many captions of each task `training_prompts` gives: all that there are, or more where the models fail more
_TRAINING = {
    "single_object": 24,
    "two_objects": 60,
    "counting": 108,
    "colours": 48,
    "position": 120,
    "attribution": 120,
}
_MARGIN = 2.0  # pixels between two objects, and between an object and the border
_RADII = {1: (10.0, 16.0), 2: (9.0, 13.0), 3: (8.5, 11.0), 4: (8.0, 10.0)}  # circumradius by number of objects


@dataclass(frozen=True)
class Body:
    """A drawn object: centre and circumradius in pixels, rotation in radians."""

    thing: Thing
    x: float
    y: float
    radius: float
    turn: float


def _named(rng: np.random.Generator, pairs: tuple[tuple[str, str], ...]) -> str:
    colour, shape = pairs[rng.integers(len(pairs))]
    return f"{colour} {shape}"


def caption(rng: np.random.Generator, task: str, pairs: tuple[tuple[str, str], ...] = SEEN) -> str:
    """Draw a caption of ``task``; the first colour-shape combination comes from ``pairs``, others from all
    of ``pairs`` when training (``pairs is SEEN``) and from every combination when evaluating."""
    others = pairs if pairs is SEEN else COMBINATIONS
    prefix = PREFIXES[rng.integers(len(PREFIXES))] if task != "position" and rng.random() < 0.5 else ""
    one = "one" if rng.random() < 0.25 else "a"
    if task == "single_object":
        return f"{prefix}{one} {SHAPES[rng.integers(len(SHAPES))]}"
    if task == "two_objects":
        first, second = rng.choice(len(SHAPES), 2, replace=False)
        return f"{prefix}a {SHAPES[first]} and a {SHAPES[second]}"
    if task == "counting":
        return f"{prefix}{COUNTS[rng.integers(1, 4)]} {_named(rng, pairs)}s"
    if task == "colours":
        return f"{prefix}{one} {_named(rng, pairs)}"
    first_name = _named(rng, pairs)
    second_name = _named(rng, others)
    while second_name == first_name:
        second_name = _named(rng, others)
    if task == "position":
        return f"a {first_name} {tuple(RELATIONS)[rng.integers(len(RELATIONS))]} a {second_name}"
    if task == "attribution":
        return f"{prefix}a {first_name} and a {second_name}"
    raise ValueError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")


def _distinct(rng: np.random.Generator, task: str, count: int, pairs: tuple[tuple[str, str], ...] = SEEN) -> list[str]:
    captions: dict[str, None] = {}
    while len(captions) < count:
        captions[caption(rng, task, pairs)] = None
    return list(captions)


def held_out_prompts(per_task: int = 40, seed: int = 2024) -> list[str]:
    """The evaluation set: ``per_task`` distinct captions of each task. Wherever a caption names a colour with a
    shape, the first such combination is one of :data:`HELD_OUT`."""
    rng, pairs = np.random.default_rng(seed), tuple(sorted(HELD_OUT))
    return [prompt for task in TASKS for prompt in _distinct(rng, task, per_task, pairs)]


def training_prompts(seed: int = 77) -> list[str]:
    """Distinct captions over seen combinations to draw images of while training: ``shapes-prompts.txt``."""
    rng = np.random.default_rng(seed)
    return [prompt for task, count in _TRAINING.items() for prompt in _distinct(rng, task, count)]


def place(rng: np.random.Generator, spec: Spec) -> list[Body]:
    """Positions, sizes and turns for a spec: nothing overlaps, nothing leaves the image, relations hold by
    at least 12 pixels along their axis and more than across it. Open colours are drawn from :data:`SEEN`."""
    things = [thing if thing.colour else Thing(thing.shape, _open_colour(rng, thing.shape)) for thing in spec.things]
    low, high = _RADII[len(things)]
    while True:
        bodies: list[Body] = []
        for thing in things:
            radius = rng.uniform(low, high)
            edge = radius + _MARGIN
            x, y = rng.uniform(edge, SIZE - edge, 2)
            bodies.append(Body(thing, x, y, radius, _turn(rng, thing.shape)))
        if all(_apart(a, b) for a, b in itertools.combinations(bodies, 2)) and _holds(bodies, spec.relation):
            return bodies


def _open_colour(rng: np.random.Generator, shape: str) -> str:
    colours = [colour for colour, other in SEEN if other == shape]
    return colours[rng.integers(len(colours))]


def _turn(rng: np.random.Generator, shape: str) -> float:
    return math.radians(rng.uniform(-12, 12)) if shape != "circle" else 0.0


def _apart(a: Body, b: Body) -> bool:
    return math.hypot(a.x - b.x, a.y - b.y) >= a.radius + b.radius + _MARGIN


def _holds(bodies: list[Body], relation: str | None) -> bool:
    if relation is None:
        return True
    dx, dy = bodies[0].x - bodies[1].x, bodies[0].y - bodies[1].y
    sx, sy = RELATIONS[relation]
    along, across = (sx * dx, dy) if sx else (sy * dy, dx)
    return along >= 12 and along > abs(across)


def outline(body: Body, scale: float = 1.0) -> list[tuple[float, float]]:
    """Corner points of a body, in pixels times ``scale``; a circle is a 48-gon. A circle's
    radius is shrunk so that all four shapes look about equally large."""
    shrink = 0.88 if body.thing.shape == "circle" else 1.0
    corners = [(body.radius * (r * shrink), angle + body.turn) for r, angle in OUTLINES[body.thing.shape]]
    return [((body.x + r * math.cos(a)) * scale, (body.y + r * math.sin(a)) * scale) for r, a in corners]


def draw(rng: np.random.Generator, bodies: list[Body]) -> np.ndarray:
    """Paint bodies on a near-white ground, anti-aliased by 4x supersampling: (64, 64, 3) uint8."""
    scale = 4
    ground = tuple(int(v) for v in rng.integers(236, 252) + rng.integers(-3, 4, 3))
    canvas = Image.new("RGB", (SIZE * scale, SIZE * scale), ground)
    pen = ImageDraw.Draw(canvas)
    for body in bodies:
        assert body.thing.colour is not None
        jitter = rng.integers(-10, 11, 3)
        fill = tuple(int(np.clip(c + j, 0, 255)) for c, j in zip(PALETTE[body.thing.colour], jitter, strict=True))
        pen.polygon(outline(body, scale), fill=fill)
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX))


def render(rng: np.random.Generator, caption: str) -> np.ndarray:
    """An image of what ``caption`` asks for: (64, 64, 3) uint8."""
    return draw(rng, place(rng, parse(caption)))
