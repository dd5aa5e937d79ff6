"""Mistakes of the user, as against bugs of ours: shown as one line, without a traceback."""


class UserError(ValueError):
    """What arrived, what was expected, what to do next."""


class NonFinite(UserError):
    """A loss or gradient that is NaN or infinite."""


class DataError(UserError):
    """A data set that cannot be used as it stands; the message says what was found and what to do."""
