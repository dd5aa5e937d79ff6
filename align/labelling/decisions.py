"""What all answers together say: which picture of two is preferred, and by how many votes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from align.labelling.answers import Answer
from align.labelling.items import Item, Picture


@dataclass(frozen=True)
class Decision:
    """Two pictures of ``prompt`` and the votes for each; that with more is preferred, equal votes are a tie."""

    prompt: str
    pictures: tuple[Picture, Picture]
    votes: tuple[float, float]

    @property
    def tie(self) -> bool:
        return self.votes[0] == self.votes[1]

    @property
    def ordered(self) -> Decision:
        """The preferred picture first."""
        return self if self.votes[0] >= self.votes[1] else Decision(self.prompt, self.pictures[::-1], self.votes[::-1])


def counted(answers: Sequence[Answer]) -> list[Answer]:
    """Those that are votes: no skips, and no items that came again."""
    return [answer for answer in answers if answer.worth is not None and not answer.check]


def decisions(items: Sequence[Item], answers: Sequence[Answer]) -> list[Decision]:
    """Every two pictures that were compared, in the order of ``items``. In a grid those that were not placed were not
    compared with each other. Pictures that were rated one by one are compared by their mean rating within a prompt."""
    votes: dict[tuple[str, str, str], list[float]] = {}
    ratings: dict[tuple[str, str], list[float]] = {}
    pictures: dict[str, Picture] = {}
    for answer in sorted(counted(answers), key=lambda answer: answer.item):
        item, worth = items[answer.item], answer.worth or ()
        pictures |= {picture.place: picture for picture in item.pictures}
        if len(worth) == 1:
            ratings.setdefault((item.prompt, item.pictures[0].place), []).append(worth[0])
        for i, j in combinations(range(len(worth)), 2):
            if len(worth) == 2 or worth[i] != worth[j]:
                key = (item.prompt, item.pictures[i].place, item.pictures[j].place)
                both = votes.setdefault(key, [0.0, 0.0])
                both[0] += worth[i] > worth[j]
                both[1] += worth[i] < worth[j]
    means = [(prompt, place, fmean(values)) for (prompt, place), values in ratings.items()]
    by_prompt: dict[str, list[tuple[str, float]]] = {}
    for prompt, place, mean in means:
        by_prompt.setdefault(prompt, []).append((place, mean))
    for prompt, rated in by_prompt.items():
        for (one, a), (other, b) in combinations(rated, 2):
            votes[prompt, one, other] = [float(a > b), float(a < b)]
    return [
        Decision(prompt, (pictures[one], pictures[other]), (both[0], both[1]))
        for (prompt, one, other), both in votes.items()
    ]
