"""The embedded world's grammar and its exact reward.

A caption is one of six GenEval task types over :data:`PALETTE` and :data:`SHAPES`:

=================  =============================================
single_object      ``a star`` / ``a picture of one star``
two_objects        ``a star and a circle``
counting           ``three red stars``
colours            ``a red star``
position           ``a red star left of a blue circle``
attribution        ``a red star and a blue circle``
=================  =============================================

:func:`parse` reads a caption back into the objects it asks for; it is the only grammar there is, so a caption
that it accepts means the same thing to the renderer, the preference judge and the reward.

:func:`find` looks at a picture, :func:`judge` compares what is there with what the caption asks for, and
:class:`Shapes` is the reward.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from rewards import RewardError
from rewards.models.shape_detector import SIDE, DetectedObject, Finder

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 220),
    "yellow": (245, 200, 30),
    "purple": (165, 55, 200),
    "black": (30, 30, 34),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star")
TASKS: tuple[str, ...] = ("single_object", "two_objects", "counting", "colours", "position", "attribution")
COUNTS: tuple[str, ...] = ("one", "two", "three", "four")
RELATIONS: dict[str, tuple[int, int]] = {
    # relation -> sign of (x_first - x_second, y_first - y_second); y grows downwards
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
PREFIXES: tuple[str, ...] = ("a picture of ", "a drawing of ", "an image of ", "a photo of ")


@dataclass(frozen=True)
class Thing:
    """One object that a caption asks for; ``colour`` is None where the caption leaves it open."""

    shape: str
    colour: str | None


@dataclass(frozen=True)
class Spec:
    """What a caption asks for: ``things`` in the caption's order, and ``relation`` between the first two."""

    task: str
    things: tuple[Thing, ...]
    relation: str | None = None


_THING = re.compile(rf"^(?:a|one)(?: ({'|'.join(PALETTE)}))? ({'|'.join(SHAPES)})$")
_COUNT = re.compile(rf"^(two|three|four) ({'|'.join(PALETTE)}) ({'|'.join(SHAPES)})s$")


def parse(caption: str) -> Spec:
    """Read a caption of the embedded world; ``ValueError`` names a caption that is not of its grammar."""
    text = " ".join(caption.lower().split())
    for prefix in PREFIXES:
        text = text.removeprefix(prefix)
    if match := _COUNT.match(text):
        count, colour, shape = match.groups()
        return Spec("counting", (Thing(shape, colour),) * (COUNTS.index(count) + 1))
    if match := _THING.match(text):
        colour, shape = match.groups()
        return Spec("colours" if colour else "single_object", (Thing(shape, colour),))
    for joint in ("and", *RELATIONS):
        left, joined, right = text.partition(f" {joint} ")
        pair = [_THING.match(left), _THING.match(right)] if joined else []
        if joined and all(pair):
            things = tuple(Thing(m.group(2), m.group(1)) for m in pair if m)
            if joint != "and":
                return Spec("position", things, joint)
            return Spec("attribution" if things[0].colour else "two_objects", things)
    raise ValueError(
        f"not a caption of the embedded world: {caption!r}; expected one like 'two red stars', "
        "'a blue circle left of a green square' or 'a star and a circle'"
    )


# The ideal shapes as (radius, angle) of their corners, the geometry that align.shapes.world draws.
OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": tuple((1.0, 2 * math.pi * k / 48) for k in range(48)),
    "square": tuple((1.0, math.pi * (0.25 + 0.5 * k)) for k in range(4)),
    "triangle": tuple((1.0, math.pi * (-0.5 + 2 * k / 3)) for k in range(3)),
    "star": tuple((1.0 if k % 2 == 0 else 0.42, math.pi * (-0.5 + k / 5)) for k in range(10)),
}
OFFSET = 4.0  # pixels of a 64-pixel picture by which the centres must differ for a relation to hold in full

_finder = functools.cache(lambda: Finder(PALETTE, OUTLINES))  # built at the first look


def find(image: Tensor) -> list[DetectedObject]:
    """Objects in one picture (3, H, W), float in [0, 1], the largest first; see :class:`Finder`."""
    return _finder()(image)


def _credit(asked: Thing, detected: DetectedObject) -> float:
    shape = float(asked.shape == detected.shape)
    return shape if asked.colour is None else 0.5 * shape + 0.5 * (asked.colour == detected.colour)


def _relation(relation: str, first: DetectedObject, second: DetectedObject, offset: float) -> float:
    """1 where the centres differ by at least ``offset`` pixels in the asked direction, 0 where not at all."""
    sign_x, sign_y = RELATIONS[relation]
    along = sign_x * (first.x - second.x) + sign_y * (first.y - second.y)
    return min(max(along / offset, 0.0), 1.0)


def grade(spec: Spec, objects: Sequence[DetectedObject], offset: float = OFFSET) -> float:
    """How well ``objects`` are what ``spec`` asks for, in [0, 1].

    Every asked thing is given its own found object, in the way that scores best. A thing is worth 1/2 for the
    right shape and 1/2 for the right colour, or 1 for the shape where the colour is open; something missing is
    worth 0. The mean over the asked things is multiplied by ``min(n, m) / max(n, m)`` for n asked and m found
    objects and, where a relation is asked, by ``(1 + r) / 2``: r rises from 0 (not at all in the asked
    direction, or one of the two things is worth nothing) to 1 (the centres differ by ``offset`` pixels or more
    along the axis). Something that nobody asked for, once there are as many objects as asked, lowers the grade.
    """
    if not objects:
        return 0.0
    credit = np.array([[_credit(asked, other) for other in objects] for asked in spec.things])
    count = float(min(credit.shape) / max(credit.shape))
    if spec.relation is None:
        from scipy.optimize import linear_sum_assignment

        return count * float(credit[linear_sum_assignment(credit, maximize=True)].sum()) / len(spec.things)
    if len(objects) == 1:
        return count * 0.5 * float(credit.max()) / len(spec.things)
    return count * max(
        _pair(credit[0, i], credit[1, j], _relation(spec.relation, objects[i], objects[j], offset))
        for i, j in itertools.permutations(range(len(objects)), 2)
    )


def _pair(first: float, second: float, relation: float) -> float:
    # Without the gate, dirt on the right side of a wrong thing would raise the score by fulfilling the relation.
    holds = relation if first > 0 and second > 0 else 0.0
    return 0.5 * float(first + second) * 0.5 * (1 + holds)


def flawless(graded: float) -> bool:
    """The strict verdict: whether :func:`grade` found nothing to deduct, but for rounding."""
    return graded > 1 - 1e-6


def judge(caption: str, image: Tensor) -> tuple[float, float]:
    """Strict and graded score of one picture (3, H, W), float in [0, 1].

    Graded is :func:`grade`. Strict is 1 where graded is 1, and 0 otherwise: exactly the asked objects are there
    and nothing else, each with the asked shape and colour, and the relation holds by 4/64 of the shorter side.
    ``ValueError`` where the caption is not of the grammar.
    """
    graded = grade(parse(caption), find(image), OFFSET * min(image.shape[-2:]) / SIDE)
    return float(flawless(graded)), graded


@dataclass
class Shapes:
    """The reward of the embedded world: it looks. ``mode`` is "graded" (partial credit, see :func:`grade`) or
    "strict" (0 or 1); both lie in [0, 1]."""

    mode: Literal["graded", "strict"] = "graded"

    differentiable: ClassVar[bool] = False
    needs_prompt: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.mode not in ("graded", "strict"):
            raise ValueError(f"Shapes: mode is {self.mode!r}; expected 'graded' or 'strict'")

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B,) float32. ``RewardError`` names a prompt outside the grammar."""
        scores = []
        for row, (prompt, image) in enumerate(zip(prompts, images.detach().float().cpu(), strict=True)):
            try:
                strict, graded = judge(prompt, image)
            except ValueError as error:
                raise RewardError(f"Shapes: row {row}: {error}", row=row) from error
            scores.append(strict if self.mode == "strict" else graded)
        return torch.tensor(scores, dtype=torch.float32, device=images.device)
