"""Mistakes of the user, as against bugs of ours: shown as one line, without a traceback."""

from rewards.common.errors import DataError, UserError

__all__ = ["DataError", "NonFinite", "UserError", "require_at_least"]


def require_at_least(least: int, settings: object, *names: str, of: str = "") -> None:
    """Raises :class:`UserError` where one of these attributes, which are ``of`` a setting, is a number below ``least``;
    None is no number."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UserError(f"{of and of + ': '}{name} must be at least {least}, got {value}")


class NonFinite(UserError):
    """A loss or gradient that is NaN or infinite."""
