"""The size of an image, as users write it."""

from __future__ import annotations

import re

from align.common.errors import UserError

Resolution = int | str | None  # 1024: pixels a side of a square; "768x1344": width x height; None: the model's own


def sides(resolution: Resolution) -> tuple[int | None, int | None]:
    """(height, width) in pixels; None, both, where the model's own size is meant. Raises :class:`UserError`."""
    if resolution is None:
        return None, None
    found = re.fullmatch(r"(-?\d+)(?:[xX×](\d+))?", str(resolution).replace(" ", ""))
    if found is None:
        raise UserError(
            f"resolution: {resolution!r} is no size; expected pixels a side, such as 1024, or WIDTHxHEIGHT, such as "
            "768x1344"
        )
    width, height = int(found[1]), int(found[2] or found[1])
    if min(width, height) < 1:
        raise UserError(f"resolution must be at least 1, got {resolution}")
    return height, width
