"""How images are drawn: steps, guidance, the stochastic kernel, and the window of steps that trains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import torch

from align.common import rng
from align.common.errors import UserError
from align.diffusion.kernels import FlowSDE, Kernel
from align.diffusion.process import Grid, Prediction
from align.families import Family


@dataclass
class SDEWindow:
    """The steps that are drawn stochastically and trained; elsewhere the sampler is deterministic.

    Args:
        size: how many steps.
        until: the window lies before this step; default the first half, as in Flow-GRPO-Fast.
        start: and not before this one (the two are Flow-GRPO's ``sde_window_range``).
        every: null draws the window's place anew for each rollout (Flow-GRPO-Fast); a number moves it on by
            ``stride`` after so many rollouts, from noise to data (MixGRPO: 25).
        stride: by how many steps it moves.
    """

    size: int = 2
    until: int | None = None
    every: int | None = None
    stride: int = 1
    start: int = 0

    def steps(self, total: int, seed: int, rollout: int) -> range:
        """The window of this rollout, of a sampler of ``total`` steps."""
        last = (self.until if self.until is not None else total if self.every else -(-total // 2)) - self.size
        if not 0 <= self.start <= last or last + self.size > total:
            after = f"from step {self.start} on and " if self.start else ""
            raise ValueError(
                f"a window of {self.size} steps does not fit {after}before step {last + self.size} of {total}"
            )
        if self.every:
            first = min(self.start + rollout // self.every * self.stride, last)
        else:
            places = last + 1 - self.start
            first = self.start + int(rng.uniform([rng.generator(seed, "window", rollout)]) * places)
        return range(first, first + self.size)


def count_trained(sampler: Sampler, window: SDEWindow | None, timestep_fraction: float) -> int:
    """Steps of each image that train: those of the window, or this fraction of all.

    Raises ValueError for a fraction outside (0, 1], for both at once, and for a window that does not fit."""
    if not 0 < timestep_fraction <= 1:
        raise ValueError(f"timestep_fraction must be in (0, 1], got {timestep_fraction}")
    if window is None:
        return max(1, int(sampler.num_inference_steps * timestep_fraction))
    if timestep_fraction < 1:
        raise ValueError("window and timestep_fraction both choose the trained steps: give one of them")
    window.steps(sampler.num_inference_steps, 0, 0)
    return window.size


@dataclass
class Sampler:
    """How an online objective draws its images.

    Args:
        num_inference_steps: sampler steps; fewer than for evaluation will do (Flow-GRPO: 10 against 40).
        guidance_scale: guidance scale, the same in rollout and training; null is the pipeline's own.
        kernel: the stochastic step; null is the family's: DDIM with eta 1, or FlowSDE with noise 0.7 on a flow.
        batch_size: images drawn at once.
        keep_on: where latents wait for training: the ``device``, or the ``cpu``.
    """

    num_inference_steps: int = 10
    guidance_scale: float | None = None
    kernel: Kernel | None = None
    batch_size: int = 32
    keep_on: Literal["device", "cpu"] = "device"

    def __post_init__(self) -> None:
        if not 1 <= self.num_inference_steps <= 1000:  # no schedule of a model has more
            raise ValueError(
                f"sampler: num_inference_steps must lie between 1 and 1000, got {self.num_inference_steps}"
            )
        if self.batch_size < 1:
            raise ValueError(f"sampler: batch_size must be at least 1, got {self.batch_size}")
        if self.guidance_scale is not None and self.guidance_scale < 0:
            raise ValueError(f"sampler: guidance_scale must be at least 0, got {self.guidance_scale}")

    def kernel_of(self, family: Family) -> Kernel:
        if isinstance(self.kernel, FlowSDE) and family.prediction_type != "flow_prediction":
            raise UserError(
                f"sampler.kernel: FlowSDE draws from flow models, and {family.source} predicts "
                f"{family.prediction_type}; use DDIM with an eta above 0, or leave the kernel out"
            )
        return self.kernel or family.kernel

    def require_noise(self, family: Family, steps: Iterable[int]) -> None:
        """Raise :class:`UserError` where the kernel takes one of ``steps`` without noise, which has no likelihood."""
        grid, kernel, zero = grid_of(family, self.num_inference_steps), self.kernel_of(family), torch.zeros(1, 1, 1, 1)
        for i in steps:
            prediction = Prediction(zero, zero, grid.alpha[i], grid.sigma[i], family.prediction_type)
            if not bool((kernel(prediction, grid, i).std > 0).all()):
                raise UserError(
                    f"{kernel} takes step {i} of {self.num_inference_steps} without noise, so it has no likelihood to "
                    "train on; set eta or noise of objective.sampler.kernel above 0, or leave that step out"
                )

    def guidance_scale_of(self, family: Family) -> float:
        return family.default_guidance_scale if self.guidance_scale is None else self.guidance_scale

    def describe(self, family: Family, trained: int) -> str:
        """Steps, kernel and guidance in words, of which ``trained`` steps train."""
        return (
            f"{self.num_inference_steps} steps of {self.kernel_of(family)}, {trained} trained, guidance "
            f"{self.guidance_scale_of(family):g}"
        )

    def evaluations(self, family: Family) -> int:
        """Network evaluations of one prediction: 2, or 1 without guidance."""
        return family.evaluations(self.guidance_scale_of(family))


def grid_of(family: Family, steps: int) -> Grid:
    """A grid costs a scheduler call; training asks for the same one thousands of times."""
    grids = _GRIDS.setdefault(family, {})
    if steps not in grids:
        grids[steps] = family.grid(steps)
    return grids[steps]


_GRIDS: WeakKeyDictionary[Family, dict[int, Grid]] = WeakKeyDictionary()
