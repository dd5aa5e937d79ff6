"""The one reverse loop: rollouts, evaluation and sample grids all come through here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from align.common import rng
from align.diffusion.kernels import DDIM, Gaussian, Kernel, has_noise
from align.diffusion.process import Grid, Prediction, upload
from align.families import Conditioning


class Predictor(Protocol):
    """Anything that answers as :meth:`align.policy.policy.Policy.predict` does."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float) -> Prediction: ...


def initial_noise(shape: tuple[int, int, int], seeds: Sequence[int]) -> Tensor:
    """Starting latents (B, *shape): image k is the one a diffusers pipeline draws from ``manual_seed(seeds[k])``."""
    return rng.normal(shape, [torch.Generator().manual_seed(seed) for seed in seeds])


def sample(
    predict: Predictor,
    grid: Grid,
    cond: Conditioning,
    x: Tensor,
    guidance_scale: float,
    kernel: Kernel = DDIM(),
    noise: Callable[[int], Tensor] | None = None,
    callback: Callable[[int, Tensor, Gaussian, Tensor], None] | None = None,
    steps: Sequence[int] | None = None,
    trained: Collection[int] | None = None,
    stop: int | None = None,
) -> Tensor:
    """Run ``x`` (B, C, h, w), standard normal, through every step of ``grid`` and return the clean latents.

    ``noise(i)`` is the standard normal draw of step i, asked for where the step is stochastic.
    ``callback(i, x, step, y)`` sees the state before each step, the step's distribution and what was drawn
    from it, and keeps of it what it wants. ``steps`` runs a part of the grid, for a trajectory that is
    forked. Gradients flow unless the caller forbids them, or, with ``trained``, at these steps alone through the
    network; what the kernel makes of the state itself passes them on at the others. With ``stop`` the clean latents
    are what the network takes them for at that step, and the loop ends there.
    """
    there = grid.to(x.device)
    for i in steps if steps is not None else range(len(grid)):
        with torch.set_grad_enabled(torch.is_grad_enabled() and (trained is None or i in trained)):
            prediction = predict(x, there.t[i].expand(len(x)), cond, guidance_scale)
        if i == stop:
            return prediction.x0
        step = kernel(prediction, there, i)
        if not has_noise(kernel, grid, i, prediction.prediction_type):
            y = step.mean
        elif noise is None:
            raise ValueError("this kernel is stochastic: pass noise, a function of the step number")
        else:
            y = step.sample(upload(noise(i), x.device))
        if callback is not None:
            callback(i, x, step, y)
        x = y
    return x
