"""Mistakes of the user, as against bugs of ours: shown as one line, without a traceback."""


class UserError(ValueError):
    """What arrived, what was expected, what to do next."""


def require_at_least(least: int, settings: object, *names: str) -> None:
    """Raises :class:`UserError` where one of these attributes is a number below ``least``; None is no number."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")


class NonFinite(UserError):
    """A loss or gradient that is NaN or infinite."""


class DataError(UserError):
    """A data set that cannot be used as it stands; the message says what was found and what to do."""
