"""Which of two images people say is better, in the words and numbers that they use."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping

# as our own files, pages with two images side by side, Label Studio's Pairwise and the arenas spell it; without spaces
SIDE = re.compile(
    r"(?:the)?(?:image|img|picture|option|choice|chosen|model)?(?:(a|left|first)|(b|right|second))"
    r"(?:image|picture|one)?(?:(?:is)?better|wins|won|vote)?"
)
TIES = {
    *("tie", "tied", "tievote", "draw", "equal", "equallygood", "same", "nopreference", "both", "neither", "bothgood"),
    *("bothbad", "bothbadvote", "tiebothbad", "aboutthesame", "undecided"),
}
NO_LETTERS = re.compile(r"[\s_.()\[\]'\"`\u2018-\u201f-]+")


def verdict(
    label: object,
    columns: tuple[str, str] = ("image_a", "image_b"),
    counted: bool = False,
    images: tuple[object, object] = (None, None),
) -> float | None:
    """1.0 where ``label`` says that the first image is better, -1.0 for the second, 0.0 for a tie; None where it says
    neither. The names of the two ``columns`` and ``images`` are words too. ``counted``: 1 and 2 are numbers of the
    images, which :func:`counts_from_one` tells of a whole file; alone, 1 could be either image."""
    label = unwrap(label)
    if counted and (value := number(label)) in (1, 2):
        return 3 - 2 * value
    if not isinstance(label, str):
        return None
    if label.strip() and label.strip() in images and images[0] != images[1]:
        return 1.0 if label.strip() == images[0] else -1.0
    word = _word(label)
    if word in (names := [_word(name) for name in columns]):
        return 1.0 if word == names[0] else -1.0
    if said := SIDE.fullmatch(word):
        return 1.0 if said[1] else -1.0
    return 0.0 if word in TIES else None


def counts_from_one(labels: Iterable[object]) -> bool:
    """Whether the numbers among ``labels`` are 1 and 2, both of them and no other."""
    return {value for label in labels if (value := number(unwrap(label))) is not None} == {1, 2}


def unwrap(label: object) -> object:
    """Label Studio's exports wrap an answer: ``{"selected": "left"}``, ``{"choices": ["a"]}``, ``["a"]``."""
    if isinstance(label, Mapping):
        label = next((label[name] for name in ("selected", "choices", "choice") if name in label), label)
    return label[0] if isinstance(label, list) and len(label) == 1 else label


def _word(text: str) -> str:
    return NO_LETTERS.sub("", unicodedata.normalize("NFKC", text).casefold())


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
