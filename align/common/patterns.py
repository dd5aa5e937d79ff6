"""Regular expressions from strangers."""

from __future__ import annotations

import re

LONGEST = 300  # letters of a pattern, and of a name that it is held against
_BOUNDED = re.compile(r"[\w.^$\\|\[\]*+-]*")


def is_bounded(pattern: object) -> bool:
    """Whether ``pattern`` is a regular expression that is held against a layer's name in a moment: it has no groups, no
    options and at most two repetitions, so that none is inside another or tries the places of many."""
    if not isinstance(pattern, str) or len(pattern) > LONGEST or not _BOUNDED.fullmatch(pattern):
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return pattern.count("*") + pattern.count("+") <= 2
