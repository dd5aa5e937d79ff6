"""What a text encoder reads of a caption: a tokenizer that knows words, and how many of its tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm


def require_vocabulary(tokenizer: Any) -> None:
    """``ValueError`` for a tokenizer of transformers that knows its special tokens alone, such as transformers makes of
    a folder without tokenizer files: every prompt would be the same."""
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError("its tokenizer has no vocabulary, files such as tokenizer.json are missing")


class CaptionLimit:
    """The tokens, special ones included, that the text encoder of ``reward`` reads: that longer captions are cut there
    is told once, with the first.

    ``is_longer`` says it of one caption.
    """

    def __init__(self, reward: str, tokens: int, is_longer: Callable[[str], bool]) -> None:
        self.reward, self.tokens, self.is_longer = reward, tokens, is_longer
        self.told = False

    @classmethod
    def of(cls, reward: str, tokens: int, tokenizer: Any) -> CaptionLimit:
        """Counted by a tokenizer of transformers."""
        return cls(
            reward, tokens, lambda text: len(tokenizer(text, truncation=False, verbose=False).input_ids) > tokens
        )

    def tell(self, captions: Iterable[str]) -> None:
        """Look at captions that are about to be encoded."""
        if self.told:
            return
        for caption in captions:
            # a token is a byte or more, so that short captions need no counting
            if len(caption.encode()) + 2 > self.tokens and self.is_longer(caption):
                self.told = True
                text = (
                    f"warning: {self.reward} reads {self.tokens} tokens of a caption, and cuts longer ones there, for "
                    f"example {caption[:60]!r}"
                )
                tqdm.write(text, file=sys.stderr)  # beside a progress bar, too
                return
