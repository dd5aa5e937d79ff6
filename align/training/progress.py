"""What the bar of a run shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def drawing(bar: Any, total: int, check: Callable[[], None]) -> Callable[[int], object]:
    """Show in the training bar how many of a rollout's images are drawn; ``check`` may give the rollout up there,
    between batches, where no weight is exchanged."""
    count = 0

    def progress(more: int) -> None:
        nonlocal count
        check()
        count += more
        bar.set_postfix_str(f"drawing {count}/{total}")

    return progress


def crossed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies after ``before`` and not after ``after``; never where it is 0."""
    return every > 0 and before // every != after // every
