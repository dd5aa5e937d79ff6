"""Captions longer than a text encoder reads."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from align.families.family import Family
from align.families.parts import tokenizers

_TOLD: WeakKeyDictionary[Family, set[str]] = WeakKeyDictionary()


def token_limits(family: Family) -> dict[str, int]:
    """The most tokens of a prompt, special ones included, that reach a text encoder, by its tokenizer's name."""
    found = tokenizers(family.pipe)
    return {name: family.token_limits.get(name, part.model_max_length) for name, part in found.items()}


def tell_truncated(family: Family, prompts: Sequence[str]) -> int:
    """Say on the standard error, by the first process, how many of ``prompts`` every tokenizer of ``family`` cuts; each
    prompt is told once. Returns the number. What is kept ends with the end token."""
    limits = token_limits(family)
    told = _TOLD.setdefault(family, set())
    fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in told]
    if not limits or not fresh:
        return 0
    words = tokenizers(family.pipe)
    lengths = [  # a token is a byte or more, so that short prompts need no counting
        (prompt, [len(words[name](prompt, truncation=False, verbose=False).input_ids) for name in limits])
        for prompt in fresh
        if len(prompt.encode()) + 2 > min(limits.values())
    ]
    cut = [prompt for prompt, counts in lengths if all(n > limits[k] for n, k in zip(counts, limits, strict=True))]
    told.update(cut)
    if cut and int(os.environ.get("RANK", "0")) == 0:
        longest = max(limits.values())
        print(
            f"warning: {len(cut)} of {len(fresh)} captions are longer than the {longest} tokens that the text encoder "
            f"reads, and are cut there, for example {cut[0][:60]!r}",
            file=sys.stderr,
        )
    return len(cut)
