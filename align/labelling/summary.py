"""Figures of a session: who answered how much and how steadily, whether people agree, which model they prefer, what
they dispute, and which rewards agree with them. Pure functions of items and answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median, pstdev
from typing import Any, Literal

import numpy as np

from align.evaluation.intervals import bootstrap
from align.labelling.answers import TAGS, Answer
from align.labelling.decisions import counted, decisions
from align.labelling.items import Item, Picture, Task
from align.labelling.sources import finite
from rewards.agreement import Choice, Choices, compare

Level = Literal["nominal", "ordinal"]
LEVELS: dict[Task, Level] = {
    "pair": "ordinal",
    "best": "nominal",
    "thumbs": "nominal",
    "score": "ordinal",
}  # of alpha's distance


@dataclass(frozen=True)
class Share:
    """``mean`` of ``count`` values, and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Person:
    """Of one annotator: answers that stand, of them skips; median seconds; how many of the items that came again were
    answered alike, (alike, all), as they were and in the other order; the share of choices that fell on picture 1."""

    name: str
    answers: int
    skipped: int
    seconds: float
    repeat: tuple[int, int]
    swap: tuple[int, int]
    first: Share | None


@dataclass(frozen=True)
class Disputed:
    """An item that people do not agree on: what they said, (words, votes)."""

    item: int
    prompt: str
    said: list[tuple[str, int]]
    dispute: float


@dataclass(frozen=True)
class Summary:
    """``models``: of pairs and grids the share of other models' pictures that each beats, ties half; of ratings the
    mean. ``rewards``: the share of people's choices that each gives the higher score, over prompts. ``known``: the
    share of the source's own labels that people confirm."""

    task: Task
    items: int
    answered: int
    votes: int
    people: list[Person]
    alpha: float | None
    level: str
    models: dict[str, Share]
    rewards: dict[str, Share]
    known: Share | None
    reasons: dict[str, int]
    disputed: list[Disputed]


def summarize(items: Sequence[Item], answers: Sequence[Answer], task: Task, most: int = 12) -> Summary:
    """All of it, with the ``most`` most disputed items."""
    votes = counted(answers)
    names = list(dict.fromkeys(answer.annotator for answer in answers))
    reasons = Counter(tag for answer in votes for tag in answer.why)
    return Summary(
        task=task,
        items=len(items),
        answered=len({answer.item for answer in votes}),
        votes=len(votes),
        people=[_person(name, [answer for answer in answers if answer.annotator == name]) for name in names],
        alpha=alpha([(a.annotator, a.item, verdict(a)) for a in votes], LEVELS[task]),
        level=LEVELS[task],
        models=_models(items, votes),
        rewards=_rewards(items, answers),
        known=_known(items, votes),
        reasons={TAGS[tag]: count for tag, count in reasons.most_common()},
        disputed=disputed(items, votes, task)[:most],
    )


def verdict(answer: Answer) -> float:
    """An answer as a number: which picture, or -1 for none, of a grid; 1, 0 (tie), -1 of a pair; a rating as it is."""
    worth = answer.worth or ()
    if len(worth) == 1:
        return worth[0]
    if len(worth) == 2:
        return float(np.sign(worth[0] - worth[1]))
    best = max(worth, default=0.0)
    return float(worth.index(best)) if worth.count(best) == 1 else -1.0


def words(value: float, task: Task, shown: str = "picture") -> str:
    """A :func:`verdict` in words; pictures numbered in the source's order."""
    if task == "pair":
        return {1.0: f"{shown} A", -1.0: f"{shown} B"}.get(value, "tie")
    if task == "best":
        return "none" if value < 0 else f"{shown} {'ABCDEFGHI'[int(value)]}"
    return {1.0: "good", 0.0: "bad"}[value] if task == "thumbs" else f"{value:g}"


def share(values: Sequence[float]) -> Share | None:
    """Mean and interval; None of nothing."""
    if not values:
        return None
    array = np.array(values, float)
    low, high = bootstrap(array, resamples=int(min(4000, max(200, 4e6 // len(array)))))
    return Share(float(array.mean()), low, high, len(array))


def alpha(votes: Sequence[tuple[str, int, float]], level: Level) -> float | None:
    """Krippendorff's α of (person, item, value), by the library of that name; None where no item has two people, or
    all said the same of everything, of which agreement beyond chance says nothing."""
    import krippendorff

    people = {name: row for row, name in enumerate(dict.fromkeys(name for name, _, _ in votes))}
    count = Counter(item for _, item, _ in votes)
    units = {item: column for column, item in enumerate(item for item in count if count[item] > 1)}
    table = np.full((len(people), len(units)), np.nan)
    for name, item, value in votes:
        if item in units:
            table[people[name], units[item]] = value
    if len(np.unique(table[np.isfinite(table)])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=table, level_of_measurement=level))


def _person(name: str, answers: Sequence[Answer]) -> Person:
    before = {answer.item: answer for answer in answers if not answer.check}
    alike: dict[str, list[bool]] = {"repeat": [], "swap": []}
    for answer in answers:
        first = before.get(answer.item)
        if answer.check and answer.worth is not None and first is not None and first.worth is not None:
            alike[answer.check].append(verdict(answer) == verdict(first))
    votes = [answer for answer in answers if answer.worth is not None]
    chosen = [a.worth[a.shown[0]] > a.worth[a.shown[1]] for a in votes if a.worth and len(a.worth) == 2 and verdict(a)]
    return Person(
        name,
        len(answers),
        len(answers) - len(votes),
        median([answer.seconds for answer in answers]),
        (sum(alike["repeat"]), len(alike["repeat"])),
        (sum(alike["swap"]), len(alike["swap"])),
        share([float(first) for first in chosen]),
    )


def _means(votes: Sequence[Answer], value: Callable[[Answer], dict[str, float]]) -> dict[str, list[float]]:
    """Of every name that ``value`` gives, its mean over people of each item: items are what is drawn again."""
    by_item: dict[str, dict[int, list[float]]] = {}
    for answer in votes:
        for name, one in value(answer).items():
            by_item.setdefault(name, {}).setdefault(answer.item, []).append(one)
    return {name: [sum(each) / len(each) for each in of.values()] for name, of in by_item.items()}


def _models(items: Sequence[Item], votes: Sequence[Answer]) -> dict[str, Share]:
    def won(answer: Answer) -> dict[str, float]:
        pictures, worth = items[answer.item].pictures, answer.worth or ()
        if not all(picture.model for picture in pictures):
            return {}
        if len(worth) == 1:
            return {pictures[0].model: worth[0]}
        points: dict[str, list[float]] = {}
        for i, j in combinations(range(len(worth)), 2):
            if pictures[i].model != pictures[j].model:
                point = 0.5 + 0.5 * float(np.sign(worth[i] - worth[j]))
                points.setdefault(pictures[i].model, []).append(point)
                points.setdefault(pictures[j].model, []).append(1 - point)
        return {model: sum(each) / len(each) for model, each in points.items()}

    found = {model: share(values) for model, values in sorted(_means(votes, won).items())}
    return {model: one for model, one in found.items() if one is not None}


def _known(items: Sequence[Item], votes: Sequence[Answer]) -> Share | None:
    def confirmed(answer: Answer) -> dict[str, float]:
        known, worth = items[answer.item].known, answer.worth or ()
        if known is None or len(worth) != 2 or known[0] == known[1] or worth[0] == worth[1]:
            return {}
        return {"": float((known[0] > known[1]) == (worth[0] > worth[1]))}

    return share(_means(votes, confirmed).get("", []))


def _rewards(items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, Share]:
    """By :func:`rewards.agreement.compare`, on the rewards that have scored every picture that was compared."""
    decided = [each.ordered for each in decisions(items, answers) if not each.tie]
    pictures: dict[str, tuple[int, Picture, str]] = {}
    for each in decided:
        for picture in each.pictures:
            pictures.setdefault(picture.place, (len(pictures), picture, each.prompt))
    if not pictures:
        return {}
    scores = [finite(picture.scores) for _, picture, _ in pictures.values()]
    named = {name: np.array([one[name] for one in scores]) for name in sorted(set.intersection(*map(set, scores)))}
    if not named:
        return {}
    numbers = {place: number for place, (number, _, _) in pictures.items()}
    choices = [
        Choice(one.prompt, numbers[one.pictures[0].place], numbers[one.pictures[1].place], one.votes) for one in decided
    ]
    pairs = Choices("answers", [(picture.image, text) for _, picture, text in pictures.values()], choices, [], [], [])
    report: dict[str, Any] = compare(pairs, named, "drop", 1.0)["rewards"]
    return {name: Share(of["accuracy"], of["interval"][0], of["interval"][1], of["n"]) for name, of in report.items()}


def disputed(items: Sequence[Item], votes: Sequence[Answer], task: Task) -> list[Disputed]:
    """Items of which people said different things, the most disputed first: by the share that is not of the most common
    opinion, of scores by their standard deviation."""
    said: dict[int, list[float]] = {}
    for answer in votes:
        said.setdefault(answer.item, []).append(verdict(answer))
    found = []
    for item, values in said.items():
        counts = Counter(values)
        if len(counts) > 1:
            dispute = pstdev(values) if task == "score" else 1 - counts.most_common(1)[0][1] / len(values)
            opinions = [(words(value, task), count) for value, count in counts.most_common()]
            found.append(Disputed(item, items[item].prompt, opinions, dispute))
    return sorted(found, key=lambda one: (-one.dispute, -sum(count for _, count in one.said), one.item))
