"""Means over prompts and tasks, and how sure they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

PIECE = 1 << 19  # values that are drawn at once
Mean = Literal["tasks", "prompts"]  # a score is the mean of the tasks' means, or over prompts whatever their task


def over_tasks(values: np.ndarray, tasks: Sequence[str] | None) -> float:
    """The mean of ``values`` (N,), one a prompt; with ``tasks`` the mean over tasks of their means, GenEval's."""
    parts = [values] if tasks is None else [values[np.array(tasks) == task] for task in dict.fromkeys(tasks)]
    return float(np.mean([part.mean() for part in parts]))


def bootstrap(
    values: np.ndarray, tasks: Sequence[str] | None = None, resamples: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of :func:`over_tasks` of ``values`` (N,); prompts are drawn again within a task."""
    rng = np.random.default_rng(seed)
    parts = [values] if tasks is None else [values[np.array(tasks) == task] for task in dict.fromkeys(tasks)]
    means = [_resampled(part, resamples, rng) for part in parts]
    low, high = np.quantile(np.mean(means, 0), [0.025, 0.975])
    return float(low), float(high)


def _resampled(part: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """The means (resamples,) of as many draws from ``part`` as it has values, in pieces of :data:`PIECE`: memory does
    not grow with the prompts, and the draws are those of one piece."""
    each = max(1, PIECE // len(part))
    counts = [min(each, resamples - start) for start in range(0, resamples, each)]
    return np.concatenate([part[rng.integers(len(part), size=(count, len(part)))].mean(1) for count in counts])


def task_intervals(
    values: Mapping[str, np.ndarray], tasks: Sequence[str], samples: int
) -> dict[str, dict[str, tuple[float, float]]]:
    """The 95 % interval of every task's mean, by task and model; ``values`` (P*samples,) are each model's scores."""
    of = np.array(tasks)
    each = {model: scores.reshape(-1, samples).mean(1) for model, scores in values.items()}
    return {task: {model: bootstrap(v[of == task]) for model, v in each.items()} for task in dict.fromkeys(tasks)}


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` positions, from first to last: nobody picked the good ones."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()
