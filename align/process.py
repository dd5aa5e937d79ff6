"""Diffusion algebra: a schedule, what a network said, and one reverse step as a distribution.

Data is ``x0``; ``x_t = alpha * x0 + sigma * eps``. Epsilon, v and flow networks, variance-preserving and
rectified-flow schedules, differ only in these numbers. Everything is computed in float32 or better whatever the
network ran in, because half precision destroys log-probabilities. Imports only torch.

Sources: DDIM (Song et al. 2021, eq. 12 and 16); v-prediction (Salimans & Ho 2022, app. D); rectified flow and its
marginal-preserving SDE (Flow-GRPO, Liu et al. 2025, eq. 8-9).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["epsilon", "v", "flow"]
Reduction = Literal["mean", "sum"]


def exact(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def like(value: Tensor, x: Tensor) -> Tensor:
    """Shape a per-sample coefficient, (B,) or scalar, to multiply ``x`` of shape (B, ...)."""
    value = value.to(x.device)
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim else value


def reduce(x: Tensor, reduction: Reduction) -> Tensor:
    """(B, ...) to (B,). The mean is what every published beta and clip range assumes."""
    flat = x.flatten(1)
    return flat.mean(1) if reduction == "mean" else flat.sum(1)


@dataclass(frozen=True)
class Grid:
    """A discretised schedule: T+1 knots from noisy to clean.

    ``t`` is in the network's own units, ``alpha`` and ``sigma`` are the coefficients of x0 and eps; each (T+1,).
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor

    def __post_init__(self) -> None:
        if not (self.t.shape == self.alpha.shape == self.sigma.shape) or self.t.ndim != 1 or len(self.t) < 2:
            raise ValueError(
                f"a grid needs three vectors of one length of at least 2 knots; got t {tuple(self.t.shape)}, "
                f"alpha {tuple(self.alpha.shape)}, sigma {tuple(self.sigma.shape)}"
            )

    def __len__(self) -> int:
        """The number of steps T, one less than the number of knots."""
        return len(self.t) - 1


@dataclass(frozen=True)
class Prediction:
    """A network's raw output at ``x_t``, readable in every coordinate.

    ``raw`` and ``x_t`` are (B, ...); ``alpha`` and ``sigma`` scalars or (B,).
    """

    raw: Tensor
    x_t: Tensor
    alpha: Tensor
    sigma: Tensor
    kind: Kind

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = exact(self.x_t)
        return exact(self.raw), x, like(self.alpha, x), like(self.sigma, x)

    @property
    def x0(self) -> Tensor:
        """The clean sample that this prediction implies."""
        raw, x, alpha, sigma = self._parts
        if self.kind == "epsilon":
            return (x - sigma * raw) / alpha
        return alpha * x - sigma * raw if self.kind == "v" else x - sigma * raw

    @property
    def eps(self) -> Tensor:
        """The noise that this prediction implies."""
        raw, x, alpha, sigma = self._parts
        if self.kind == "epsilon":
            return raw
        return sigma * x + alpha * raw if self.kind == "v" else x + alpha * raw

    def target(self, x0: Tensor, eps: Tensor) -> Tensor:
        """What ``raw`` should have been for this ``x0`` and ``eps``, in the network's own coordinate."""
        _, _, alpha, sigma = self._parts
        if self.kind == "epsilon":
            return eps
        return alpha * eps - sigma * x0 if self.kind == "v" else eps - x0


def diffuse(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """``alpha * x0 + sigma * eps`` with per-sample coefficients."""
    return like(alpha, x0) * x0 + like(sigma, x0) * eps


@dataclass(frozen=True)
class Gaussian:
    """One reverse transition p(x_s | x_t): mean (B, ...), one standard deviation per sample, scalar or (B,)."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """``mean + std * noise``; with ``std`` 0 this is the mean and the noise does not matter."""
        return self.mean + like(self.std, self.mean) * noise

    def log_prob(self, x: Tensor, reduction: Reduction = "mean") -> Tensor:
        """(B,) log density of ``x``, averaged (default) or summed over the latent's dimensions."""
        std = like(self.std, self.mean)
        if bool((std <= 0).any()):
            raise ValueError("log_prob of a deterministic step (std 0): sample with eta > 0 or noise > 0")
        z = (exact(x) - self.mean) / std
        return reduce(-0.5 * z.square() - torch.log(std) - 0.5 * math.log(2 * math.pi), reduction)

    def kl(self, other: Gaussian, reduction: Reduction = "mean") -> Tensor:
        """(B,) KL(self || other) for two transitions of one standard deviation, as kernels of one grid have."""
        std = like(self.std, self.mean)
        if bool((std <= 0).any()) or not torch.equal(self.std, other.std):
            raise ValueError("kl needs two transitions with the same positive std")
        return reduce((self.mean - other.mean).square() / (2 * std.square()), reduction)


Step = int | Tensor


class Kernel(ABC):
    """A reverse step: the distribution of knot ``i + 1`` given what the network says at knot ``i``.

    ``i`` is one step for the whole batch, or (B,) integers, one for each row: a rollout asks for the former, a
    training batch, whose rows come from different steps, for the latter.
    """

    @abstractmethod
    def __call__(self, prediction: Prediction, grid: Grid, i: Step) -> Gaussian: ...


def _knots(grid: Grid, i: Step, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha and sigma at knots ``i`` and ``i + 1``, on the device of ``x``."""
    i = i.to(grid.alpha.device) if isinstance(i, Tensor) else i
    return tuple(c.to(x.device) for c in (grid.alpha[i], grid.sigma[i], grid.alpha[i + 1], grid.sigma[i + 1]))  # type: ignore[return-value]


@dataclass(frozen=True)
class DDIM(Kernel):
    """DDIM with stochasticity ``eta`` (DDIM eq. 12, 16), written for any alpha and sigma.

    On a variance-preserving grid eta = 1 is the DDPM posterior; on a flow grid eta = 0 is the Euler step.
    """

    eta: float = 0.0

    def __call__(self, prediction: Prediction, grid: Grid, i: Step) -> Gaussian:
        x0, eps = prediction.x0, prediction.eps
        alpha, sigma, alpha_s, sigma_s = _knots(grid, i, x0)
        lost = (sigma.square() - (alpha / alpha_s).square() * sigma_s.square()).clamp(min=0)
        std = self.eta * sigma_s / sigma * lost.sqrt()
        keep = (sigma_s.square() - std.square()).clamp(min=0).sqrt()
        return Gaussian(like(alpha_s, x0) * x0 + like(keep, x0) * eps, std)


@dataclass(frozen=True)
class FlowSDE(Kernel):
    """Flow-GRPO's marginal-preserving SDE step for rectified flow (alpha = 1 - t, sigma = t).

    ``sigma_t = noise * sqrt(t / (1 - t))``; at t = 1, where that diverges, 1 - t is taken at the next knot.
    """

    noise: float = 0.7

    def __call__(self, prediction: Prediction, grid: Grid, i: Step) -> Gaussian:
        if not torch.allclose(grid.alpha + grid.sigma, torch.ones_like(grid.sigma), atol=1e-5):
            raise ValueError("FlowSDE needs a rectified-flow grid (alpha + sigma = 1); use DDIM(eta) for this model")
        x = exact(prediction.x_t)
        _, t, _, s = _knots(grid, i, x)
        dt = s - t
        variance = self.noise**2 * t / torch.where(t < 1, 1 - t, 1 - s)
        velocity = prediction.eps - prediction.x0
        drift = velocity + like(variance / (2 * t), x) * (x + like(1 - t, x) * velocity)
        return Gaussian(x + like(dt, x) * drift, (variance * -dt).sqrt())


@dataclass(frozen=True)
class Within(Kernel):
    """``kernel`` at ``steps``, and the deterministic step (DDIM with eta 0, on a flow grid Euler) elsewhere."""

    kernel: Kernel
    steps: Sequence[int]

    def __call__(self, prediction: Prediction, grid: Grid, i: Step) -> Gaussian:
        if isinstance(i, Tensor):
            raise TypeError("a training batch asks the kernel itself: its rows all lie within the window")
        return (self.kernel if i in self.steps else DDIM())(prediction, grid, i)
