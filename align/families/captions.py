"""Captions longer than a text encoder reads."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from align.families.family import Family
from align.families.parts import tokenizers

_TOLD: WeakKeyDictionary[Family, set[str]] = WeakKeyDictionary()


def token_limits(family: Family) -> dict[str, int]:
    """The most tokens of a prompt, special ones included, that reach a text encoder, by its tokenizer's name."""
    found = tokenizers(family.pipe)
    return {name: family.token_limits.get(name, part.model_max_length) for name, part in found.items()}


@dataclass(frozen=True)
class Truncated:
    """How many captions every tokenizer cuts, at how many tokens the longest reader of them stops, and one of them."""

    count: int = 0
    limit: int = 0
    example: str = ""

    @staticmethod
    def among(family: Family, captions: Sequence[str]) -> Truncated:
        cut = truncated(family, captions)
        return Truncated(len(cut), max(token_limits(family).values()), cut[0][:60]) if cut else Truncated()

    def __add__(self, other: Truncated) -> Truncated:
        return Truncated(self.count + other.count, max(self.limit, other.limit), self.example or other.example)

    def tell(self, total: int) -> None:
        """On the standard error, by the first process."""
        if self.count and int(os.environ.get("RANK", "0")) == 0:
            print(
                f"warning: {self.count} of {total} captions are longer than the {self.limit} tokens that the text "
                f"encoder reads, and are cut there, for example {self.example!r}",
                file=sys.stderr,
            )


def truncated(family: Family, captions: Sequence[str]) -> list[str]:
    """Those that every tokenizer of ``family`` cuts. What is kept of one ends with the end token."""
    if not (limits := token_limits(family)):
        return []
    words = tokenizers(family.pipe)
    lengths = [  # a token is a byte or more, so that short prompts need no counting
        (prompt, [len(words[name](prompt, truncation=False, verbose=False).input_ids) for name in limits])
        for prompt in captions
        if len(prompt.encode()) + 2 > min(limits.values())
    ]
    return [text for text, counts in lengths if all(n > limits[k] for n, k in zip(counts, limits, strict=True))]


def tell_truncated(family: Family, prompts: Sequence[str]) -> int:
    """Say on the standard error, by the first process, how many of ``prompts`` every tokenizer of ``family`` cuts; each
    prompt is told once. Returns the number."""
    told = _TOLD.setdefault(family, set())
    fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in told]
    cut = truncated(family, fresh)
    told.update(cut)
    if cut:
        Truncated(len(cut), max(token_limits(family).values()), cut[0][:60]).tell(len(fresh))
    return len(cut)
