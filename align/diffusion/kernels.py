"""One reverse step as a distribution."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from align.diffusion.process import (
    Grid,
    Prediction,
    PredictionType,
    Reduction,
    append_dims,
    reduce_dims,
    upcast,
    upload,
)


@dataclass(frozen=True)
class Gaussian:
    """One reverse transition p(x_s | x_t): mean (B, ...), one standard deviation per sample, scalar or (B,).

    Densities need a positive ``std``: ValueError tells on the CPU. On a GPU asking would be waiting for it, and the
    answer is no finite number, which stops a run all the same.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """``mean + std * noise``; with ``std`` 0 this is the mean and the noise does not matter."""
        return self.mean + append_dims(self.std, self.mean) * noise

    def log_prob(self, x: Tensor, reduction: Reduction = "mean") -> Tensor:
        """(B,) log density of ``x``, averaged (default) or summed over the latent's dimensions."""
        std = append_dims(self.std, self.mean)
        if std.device.type == "cpu" and bool((std <= 0).any()):
            raise ValueError("log_prob of a deterministic step (std 0): sample with eta > 0 or noise > 0")
        z = (upcast(x) - self.mean) / std
        return reduce_dims(-0.5 * z.square() - torch.log(std) - 0.5 * math.log(2 * math.pi), reduction)

    def kl(self, other: Gaussian, reduction: Reduction = "mean") -> Tensor:
        """(B,) KL(self || other) for two transitions of one standard deviation, as kernels of one grid have."""
        std = append_dims(self.std, self.mean)
        if std.device.type == "cpu" and (bool((std <= 0).any()) or not torch.equal(self.std, other.std)):
            raise ValueError("kl needs two transitions with the same positive std")
        return reduce_dims((self.mean - other.mean).square() / (2 * std.square()), reduction)


Step = int | Tensor


class Kernel(ABC):
    """A reverse step: the distribution of knot ``i + 1`` given what the network says at knot ``i``.

    ``i`` is one step for the whole batch, or (B,) integers, one for each row: a rollout asks for the former, a
    training batch, whose rows come from different steps, for the latter.
    """

    schedule: str | None = None  # of the noise, where the step is written with several

    @abstractmethod
    def __call__(self, prediction: Prediction, grid: Grid, i: Step) -> Gaussian: ...

    def settings(self) -> dict[str, Any]:
        """Its fields, as a config names them; ``schedule`` where it is not the class's own, since folders that were
        written before there was another do not say it."""
        usual = type(self).schedule
        return {name: value for name, value in vars(self).items() if name != "schedule" or value != usual}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings().items())})"


def _knots(grid: Grid, i: Step, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha and sigma at knots ``i`` and ``i + 1``, on the device of ``x``."""
    grid = grid.to(x.device)
    i = upload(i, x.device) if isinstance(i, Tensor) else i
    return grid.alpha[i], grid.sigma[i], grid.alpha[i + 1], grid.sigma[i + 1]


def std_of(kernel: Kernel, grid: Grid, i: int, prediction_type: PredictionType) -> Tensor:
    """The standard deviation of ``kernel`` at step ``i`` of ``grid``, which no prediction changes. Asked on the grid's
    own device, the CPU, so that nobody waits for a GPU."""
    zero = torch.zeros(1, 1, 1, 1)
    prediction = Prediction(zero, zero, grid.alpha[i], grid.sigma[i], prediction_type)
    return kernel(prediction, grid, i).std


def has_noise(kernel: Kernel, grid: Grid, i: int, prediction_type: PredictionType) -> bool:
    """Whether ``kernel`` draws at step ``i`` of ``grid``; see :func:`std_of`."""
    return bool((std_of(kernel, grid, i, prediction_type) > 0).all())


@dataclass(frozen=True, repr=False)
class DDIM(Kernel):
    """DDIM with stochasticity ``eta`` (DDIM eq. 12, 16), written for any alpha and sigma.

    On a variance-preserving grid eta = 1 is the DDPM posterior; on a flow grid eta = 0 is the Euler step.
    ``schedule`` ``cps`` is Flow-CPS (arXiv 2509.05952): ``std = sigma_s sin(eta pi / 2)``, of which every step but one
    into the data has some. No step leaves x_s noisier than the grid says, as ``alpha_s`` and ``sigma_s`` are kept, but
    it does not keep the marginals. Published code drops ``1 / (2 std^2)`` from its log-densities, which ours have: its
    clip ranges do not carry over.
    """

    eta: float = 0.0
    schedule: Literal["ddim", "cps"] = "ddim"

    def __post_init__(self) -> None:
        if self.eta < 0 or (self.schedule == "cps" and self.eta > 1):
            most = "0 to 1" if self.schedule == "cps" else "at least 0"
            raise ValueError(f"eta of schedule {self.schedule} must be {most}, got {self.eta}")

    def __call__(self, prediction: Prediction, grid: Grid, i: Step) -> Gaussian:
        x0, eps = prediction.x0, prediction.eps
        alpha, sigma, alpha_s, sigma_s = _knots(grid, i, x0)
        if self.schedule == "cps":
            std = math.sin(self.eta * math.pi / 2) * sigma_s
        else:
            lost = (sigma.square() - (alpha / alpha_s).square() * sigma_s.square()).clamp(min=0)
            std = self.eta * sigma_s / sigma * lost.sqrt()
        keep = (sigma_s.square() - std.square()).clamp(min=0).sqrt()
        return Gaussian(append_dims(alpha_s, x0) * x0 + append_dims(keep, x0) * eps, std)


@dataclass(frozen=True, repr=False)
class FlowSDE(Kernel):
    """The marginal-preserving SDE step for rectified flow (alpha = 1 - t, sigma = t):

        mean = x + dt (v + sigma_t^2 / (2 t) (x + (1 - t) v))        std = sigma_t sqrt(-dt)

    Flow-GRPO's ``sigma_t = noise * sqrt(t / (1 - t))``; at t = 1, where that diverges, 1 - t is taken at the next knot.
    With ``schedule`` ``constant`` it is DanceGRPO's (arXiv 2505.07818; noise 0.3), ``sigma_t = noise``.
    """

    noise: float = 0.7
    schedule: Literal["flow_grpo", "constant"] = "flow_grpo"

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise ValueError(f"noise must be at least 0, got {self.noise}")

    def __call__(self, prediction: Prediction, grid: Grid, i: Step) -> Gaussian:
        if not grid.rectified:
            raise ValueError("FlowSDE needs a rectified-flow grid (alpha + sigma = 1); use DDIM(eta) for this model")
        x = upcast(prediction.x_t)
        _, t, _, s = _knots(grid, i, x)
        dt = s - t
        if self.schedule == "constant":
            variance = torch.full_like(t, self.noise**2)
        else:
            variance = self.noise**2 * t / torch.where(t < 1, 1 - t, 1 - s)
        velocity = prediction.eps - prediction.x0
        drift = velocity + append_dims(variance / (2 * t), x) * (x + append_dims(1 - t, x) * velocity)
        return Gaussian(x + append_dims(dt, x) * drift, (variance * -dt).sqrt())


@dataclass(frozen=True)
class WindowedKernel(Kernel):
    """``kernel`` at ``steps``, and the deterministic step (DDIM with eta 0, on a flow grid Euler) elsewhere."""

    kernel: Kernel
    steps: Sequence[int]

    def __call__(self, prediction: Prediction, grid: Grid, i: Step) -> Gaussian:
        if isinstance(i, Tensor):
            raise TypeError("a training batch asks the kernel itself: its rows all lie within the window")
        return (self.kernel if i in self.steps else DDIM())(prediction, grid, i)
