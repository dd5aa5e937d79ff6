"""Mistakes of the user, as against bugs of ours: shown as one line, without a traceback, with exit status 2."""

from __future__ import annotations


class UserError(ValueError):
    """What arrived, what was expected, what to do next."""


class DataError(UserError):
    """Data that cannot be used as they stand; the message says what was found and what to do."""


class RewardError(UserError):
    """A reward was misused or answered nonsense; ``row`` is the offending row of the batch where there is one."""

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class RewardFailure(RewardError):
    """A reward broke: it raised something that it should not, or did not answer in time."""


class WriteError(UserError):
    """A file or folder that cannot be written, since the disk is full, read-only or gone."""


def one_line(error: BaseException) -> str:
    """The error's kind and text, on one line, for a message that goes on."""
    return f"{type(error).__name__}: {shortened(str(error), 400)}"


def shortened(text: str, most: int = 200) -> str:
    """``text`` on one line, of about ``most`` characters where it is longer: the middle goes."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
