"""Which of two images people say is better, in the words and numbers that they use."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping

# as our own files, pages with two images side by side, and Label Studio's Pairwise spell it
WORDS = {
    **dict.fromkeys(("a", "left", "first", "image a", "option a", "chosen a"), 1.0),
    **dict.fromkeys(("b", "right", "second", "image b", "option b", "chosen b"), -1.0),
    **dict.fromkeys(("tie", "tied", "draw", "equal", "equally good", "same", "no preference"), 0.0),
    **dict.fromkeys(("both", "neither", "both good", "both bad", "about the same", "undecided"), 0.0),
}


def verdict(label: object, columns: tuple[str, str] = ("image_a", "image_b"), counted: bool = False) -> float | None:
    """1.0 where ``label`` says that the first image is better, -1.0 for the second, 0.0 for a tie; None where it says
    neither. The names of the two ``columns`` are words too. ``counted``: 1 and 2 are numbers of the images, which
    :func:`counts_from_one` tells of a whole file; alone, 1 could be either image."""
    label = unwrap(label)
    if counted and (value := number(label)) in (1, 2):
        return 3 - 2 * value
    if not isinstance(label, str):
        return None
    words = {_word(name): value for name, value in zip(columns, (1.0, -1.0), strict=True)}
    return (WORDS | words).get(_word(label))


def counts_from_one(labels: Iterable[object]) -> bool:
    """Whether the numbers among ``labels`` are 1 and 2, both of them and no other."""
    return {value for label in labels if (value := number(unwrap(label))) is not None} == {1, 2}


def unwrap(label: object) -> object:
    """Label Studio's exports wrap an answer: ``{"selected": "left"}``, ``{"choices": ["a"]}``, ``["a"]``."""
    if isinstance(label, Mapping):
        label = next((label[name] for name in ("selected", "choices", "choice") if name in label), label)
    return label[0] if isinstance(label, list) and len(label) == 1 else label


def _word(text: str) -> str:
    return re.sub(r"[\s_-]+", " ", text.strip().casefold())


def number(value: object) -> float | None:
    """A finite number, also one that CSV holds as a text; None for anything else."""
    try:
        result = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        return None
    return result if math.isfinite(result) else None


def contradicted(choices: Iterable[tuple[Hashable, Hashable]]) -> int:
    """How many of the (winner, loser) are there the other way round too, of which no reward can be right more than half
    the time."""
    counts = Counter(choices)
    return sum(count for (won, lost), count in counts.items() if (lost, won) in counts)
