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
