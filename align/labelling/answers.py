"""What a person says of an item: as the page sends it, as a line of the answers file, and as worths of its pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.common.errors import DataError
from align.labelling.items import Item, Task
from rewards.data.answers import SKIP

TAGS = {
    "prompt": "prompt not followed",
    "anatomy": "anatomy",
    "style": "style",
    "unsafe": "unsafe",
    "other": "other",
}
SCORES = range(1, 6)
WORTHS = {"a": (1.0, 0.0), "b": (0.0, 1.0), "tie": (0.0, 0.0), "both bad": (0.0, 0.0)}  # of a pair, by its label
NAME = re.compile(r"(?!\.+$)[\w.-]{1,40}")  # of a person, who is part of an address, where . and .. are none
ID = re.compile(r"[A-Za-z0-9-]{8,64}")


class Refused(ValueError):
    """An answer that is not taken, and why."""


@dataclass(frozen=True)
class Answer:
    """``worth`` is that of each picture of item number ``item``, in the source's order, higher better; None where it
    was skipped. ``check`` says that the item was shown before and comes again to see whether the person is consistent:
    ``repeat``, or ``swap`` in the other order. ``shown`` is the order on the screen."""

    id: str
    annotator: str
    item: int
    worth: tuple[float, ...] | None
    check: str = ""
    shown: tuple[int, ...] = ()
    why: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def slot(self) -> tuple[str, int, str]:
        """What has one answer at most."""
        return self.annotator, self.item, self.check

    @classmethod
    def of(cls, line: Mapping[str, Any], where: str = "answer") -> Answer:
        """Of a line of the file. Raises :class:`DataError`."""
        try:
            return cls(
                str(line["id"]),
                str(line["annotator"]),
                int(line["item"]),
                _worth(line),
                str(line.get("check", "")),
                tuple(line.get("shown", ())),
                tuple(line.get("why", ())),
                float(line.get("seconds", 0)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{where} is no answer of this page: {type(error).__name__} {error}") from error


def _worth(line: Mapping[str, Any]) -> tuple[float, ...] | None:
    if line.get("label") == SKIP:
        return None
    if "ranking" in line:
        return tuple(-float(rank) for rank in line["ranking"])
    if "score" in line:
        return (float(line["score"]),)
    if line["label"] not in WORTHS:
        raise ValueError(f"the label is {line['label']!r}; expected {', '.join(WORTHS)} or {SKIP}")
    return WORTHS[line["label"]]


def said(task: Task, item: Item, shown: Sequence[int], choice: object, names: Sequence[str]) -> dict[str, Any]:
    """The part of a line that says what a person chose of ``item``'s pictures, which are called ``names`` and stood in
    the order ``shown``. A ``choice`` is

    - pair: ``1`` or ``2``, ``tie``, ``both bad``;
    - best: the places from the best on, ``[2]`` or ``[2, 1, 3]``, of none that is good ``[]``;
    - thumbs: ``good`` or ``bad``; score: 1 to 5; of all: ``skip``.

    Raises :class:`Refused` for anything else.
    """
    skipped = choice == SKIP
    if task == "pair":
        words = {1: "ab"[shown[0]], 2: "ab"[shown[1]], "tie": "tie", "both bad": "both bad", SKIP: SKIP}
        if not isinstance(choice, int | str) or isinstance(choice, bool) or choice not in words:
            raise Refused(f"the choice is {choice!r}; expected 1, 2, tie, both bad or skip")
        return {"prompt": item.prompt, "image_a": names[0], "image_b": names[1], "label": words[choice]}
    if task == "best":
        line = {"prompt": item.prompt, "images": list(names)}
        return line | ({"label": SKIP} if skipped else {"ranking": _ranking(choice, shown)})
    if task == "thumbs":
        values: dict[object, Any] = {"good": {"label": True, "score": 1}, "bad": {"label": False, "score": 0}}
    else:
        values = {score: {"score": score} for score in SCORES}
    if isinstance(choice, bool) or not isinstance(choice, int | str) or not (skipped or choice in values):
        raise Refused(f"the choice is {choice!r}; expected {', '.join(map(str, values))} or skip")
    return {"image": names[0], "prompt": item.prompt} | ({"label": SKIP} if skipped else values[choice])


def _ranking(choice: object, shown: Sequence[int]) -> list[int]:
    """The rank of each picture, 1 the best; those that were not placed share the last."""
    places = range(1, len(shown) + 1)
    known = isinstance(choice, list) and all(type(place) is int and place in places for place in choice)
    if not isinstance(choice, list) or not known or len(set(choice)) < len(choice):
        raise Refused(f"the choice is {choice!r}; expected places of {len(shown)} pictures, the best first, or skip")
    ranks = [len(choice) + 1] * len(shown)
    for rank, place in enumerate(choice, 1):
        ranks[shown[place - 1]] = rank
    return ranks
