"""Stopping before the optimizer steps: at a loss or gradient that is no number, by the name of the rows that gave it,
and at what an objective has asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from align.common.errors import NonFinite
from align.objectives.rows import Rows


def settle(checks: Iterable[Callable[[], object]]) -> None:
    """Ask what waited until all rows of an update had passed; each raises what it finds wrong."""
    for check in checks:
        check()


def require_finite(
    values: Mapping[str, float],
    losses: Sequence[Tensor],
    chunks: Sequence[Rows],
    ids: Sequence[int],
    group: int,
    step: int,
    last_good: Path | None,
    scaler: object | None,
) -> None:
    """Raise :class:`NonFinite` where ``loss`` or ``grad_norm`` of an update is not finite.

    ``losses`` are those of ``chunks``; ``ids`` name the items of the batch, of which each made ``group`` images. With
    fp16's ``scaler`` an infinite gradient only skips the step.
    """
    wrong = [name for name in ("loss", "grad_norm") if not _finite(values[name])]
    if not wrong or (wrong == ["grad_norm"] and scaler is not None):
        return
    bad = [chunk for chunk, loss in zip(chunks, losses, strict=True) if not bool(torch.isfinite(loss))] or chunks
    items = sorted({int(image) // (1 if chunk.of_items else group) for chunk in bad for image in chunk.image})
    rows = [str(ids[item]) if item < len(ids) else f"#{item}" for item in items]
    raise NonFinite(
        f"{wrong[0]} is {values[wrong[0]]} at step {step}, rows {', '.join(rows[:8])}"
        f"{' …' if len(rows) > 8 else ''}; last good checkpoint: {last_good or 'none'}. "
        "Try a lower learning rate, or look at those rows"
    )


def _finite(value: float) -> bool:
    return value - value == 0
