"""How images are drawn: steps, guidance, the stochastic kernel, and the window of steps that trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

from torch import Tensor

from align.common import rng
from align.common.errors import UserError, require_at_least
from align.diffusion.kernels import FlowSDE, Kernel, has_noise
from align.diffusion.process import Grid
from align.families import Family, Scale


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

    def __post_init__(self) -> None:
        require_at_least(1, self, "size", "until", "every", "stride", of="window")
        require_at_least(0, self, "start", of="window")

    def _until(self, total: int) -> int:
        return self.until if self.until is not None else total if self.every else -(-total // 2)

    def reach(self, total: int) -> range:
        """The steps that are in the window of some rollout."""
        return range(self.start, self._until(total))

    def steps(self, total: int, seed: int, rollout: int) -> range:
        """The window of this rollout, of a sampler of ``total`` steps."""
        last = self._until(total) - self.size
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


def count_trained(
    sampler: Sampler, window: SDEWindow | None, timestep_fraction: float, family: Family | None = None
) -> int:
    """Steps of each image that train: those of the window, or this fraction of all; on ``family``, without those at the
    end that :meth:`Sampler.with_noise` leaves out.

    Raises ValueError for a fraction outside (0, 1], for both at once, and for a window that does not fit."""
    if not 0 < timestep_fraction <= 1:
        raise ValueError(f"timestep_fraction must be in (0, 1], got {timestep_fraction}")
    total = sampler.num_inference_steps
    if window is None:
        count = max(1, int(total * timestep_fraction))
        return count if family is None else len(sampler.with_noise(family, range(count)))
    if timestep_fraction < 1:
        raise ValueError("window and timestep_fraction both choose the trained steps: give one of them")
    window.steps(total, 0, 0)
    if family is not None:
        sampler.require_noise(family, window.reach(total))
    return window.size


def reach(sampler: Sampler, window: SDEWindow | None, timestep_fraction: float) -> range:
    """The steps that are trained in some rollout, where each has noise."""
    total = sampler.num_inference_steps
    return window.reach(total) if window else range(count_trained(sampler, None, timestep_fraction))


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
        require_at_least(1, self, "batch_size", of="sampler")
        require_at_least(0, self, "guidance_scale", of="sampler")

    def kernel_of(self, family: Family) -> Kernel:
        if isinstance(self.kernel, FlowSDE) and family.prediction_type != "flow_prediction":
            raise UserError(
                f"sampler.kernel: FlowSDE draws from flow models, and {family.source} predicts "
                f"{family.prediction_type}; use DDIM with an eta above 0, or leave the kernel out"
            )
        return self.kernel or family.kernel

    def _has_noise(self, family: Family, i: int) -> bool:
        grid = grid_of(family, self.num_inference_steps)
        return has_noise(self.kernel_of(family), grid, i, family.prediction_type)

    def with_noise(self, family: Family, steps: Sequence[int]) -> Sequence[int]:
        """``steps`` without those at the end that the kernel takes without noise, and which have no likelihood to train
        on. Of a schedule that ends in the data itself (``set_alpha_to_one``) that is the last one, whatever eta is.
        Raises :class:`UserError` where that leaves none, or one before them has no noise."""
        count = len(steps)
        while count > 1 and not self._has_noise(family, steps[count - 1]):
            count -= 1
        self.require_noise(family, steps[:count])
        return steps[:count]

    def require_noise(self, family: Family, steps: Sequence[int]) -> None:
        """Raise :class:`UserError` where the kernel takes one of ``steps`` without noise, which has no likelihood."""
        silent = next((i for i in steps if not self._has_noise(family, i)), None)
        if silent is None:
            return
        kernel, total = self.kernel_of(family), self.num_inference_steps
        if any(self._has_noise(family, i) for i in range(total)):
            remedy = "it ends in the data or goes nowhere on this pipeline's schedule, whatever eta is; leave it out"
        else:
            remedy = "set eta or noise of objective.sampler.kernel above 0"
        raise UserError(
            f"{kernel} takes step {silent} of {total} without noise, so it has no likelihood to train on: {remedy}"
        )

    def guidance_scale_of(self, family: Family) -> float:
        return family.default_guidance_scale if self.guidance_scale is None else self.guidance_scale

    def embedded_scale_of(self, family: Family) -> Scale:
        """The guidance scale where the network takes it as an input, and so trains as it drew; None of others, which
        train without guidance."""
        return self.guidance_scale_of(family) if family.guidance_kind == "embedded" else None

    def describe(self, family: Family, trained: int) -> str:
        """Steps, kernel and guidance in words, of which ``trained`` steps train."""
        return (
            f"{self.num_inference_steps} steps of {self.kernel_of(family)}, {trained} trained, guidance "
            f"{self.guidance_scale_of(family):g}"
        )

    def evaluations(self, family: Family) -> int:
        """Network evaluations of one prediction: 2, or 1 without guidance."""
        return family.evaluations(self.guidance_scale_of(family))


def grid_of(family: Family, steps: int, states: Tensor | None = None) -> Grid:
    """The grid for ``states`` (.., C, h, w), on which a model's schedule may depend; without, for its own size. A grid
    costs a scheduler call; training asks for the same one thousands of times."""
    key = (steps, *(() if states is None else (side * family.cell for side in states.shape[-2:])))
    grids = _GRIDS.setdefault(family, {})
    if key not in grids:
        grids[key] = family.grid(*key)
    return grids[key]


_GRIDS: WeakKeyDictionary[Family, dict[tuple[int, ...], Grid]] = WeakKeyDictionary()
