"""The one reverse loop: rollouts, evaluation and sample grids all come through here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from align import draws
from align.families import Cond
from align.process import DDIM, Gaussian, Grid, Kernel, Prediction


class Predictor(Protocol):
    """Anything that answers as :meth:`align.policy.Policy.predict` does."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, guidance: float) -> Prediction: ...


def initial_noise(shape: tuple[int, int, int], seeds: Sequence[int]) -> Tensor:
    """Starting latents (B, *shape): image k is the one a diffusers pipeline draws from ``manual_seed(seeds[k])``."""
    return draws.normal(shape, [torch.Generator().manual_seed(seed) for seed in seeds])


def sample(
    predict: Predictor,
    grid: Grid,
    cond: Cond,
    x: Tensor,
    guidance: float,
    kernel: Kernel = DDIM(),
    noise: Callable[[int], Tensor] | None = None,
    keep: Callable[[int, Tensor, Gaussian], None] | None = None,
) -> Tensor:
    """Run ``x`` (B, C, h, w), standard normal, through every step of ``grid`` and return the clean latents.

    ``noise(i)`` is the standard normal draw of step i; without it the kernel has to be deterministic. ``keep(i, x,
    step)`` sees the state before each step and the step's distribution, and keeps of it what it wants. Gradients
    flow unless the caller forbids them.
    """
    for i in range(len(grid)):
        t = grid.t[i].to(x.device).expand(len(x))
        step = kernel(predict(x, t, cond, guidance), grid, i)
        if keep is not None:
            keep(i, x, step)
        if noise is not None:
            x = step.sample(noise(i).to(x.device))
        elif bool((step.std > 0).any()):
            raise ValueError("this kernel is stochastic: pass noise, a function of the step number")
        else:
            x = step.mean
    return x
