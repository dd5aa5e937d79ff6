"""Diffusion algebra: a schedule, what a network said, and one reverse step as a distribution.

Data is ``x0``; ``x_t = alpha * x0 + sigma * eps``. Epsilon, v and flow networks, variance-preserving and
rectified-flow schedules, differ only in these numbers. Everything is computed in float32 or better whatever the
network ran in, because half precision destroys log-probabilities. Imports only torch.

Sources: DDIM (Song et al. 2021, eq. 12 and 16); v-prediction (Salimans & Ho 2022, app. D); rectified flow and its
marginal-preserving SDE (Flow-GRPO, Liu et al. 2025, eq. 8-9).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "flow_prediction"]
Reduction = Literal["mean", "sum"]


def upcast(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def upload(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on ``device``, without waiting for what a GPU has still to do."""
    device = torch.device(device)
    if device.type == "cpu" or x.device == device:  # what comes back has to have arrived
        return x.to(device)
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def append_dims(value: Tensor, x: Tensor) -> Tensor:
    """Shape a per-sample coefficient, (B,) or scalar, to multiply ``x`` of shape (B, ...)."""
    value = upload(value, x.device)
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim else value


def reduce_dims(x: Tensor, reduction: Reduction) -> Tensor:
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

    @cached_property
    def rectified(self) -> bool:
        """Whether this is a rectified flow's grid, alpha + sigma = 1."""
        return torch.allclose(self.alpha + self.sigma, torch.ones_like(self.sigma), atol=1e-5)

    @cached_property
    def _elsewhere(self) -> dict[torch.device, Grid]:
        return {}

    def to(self, device: torch.device | str) -> Grid:
        """The grid on ``device``, brought there once; what was asked of it here is not asked again there."""
        device = torch.device(device)
        if device == self.t.device:
            return self
        if device not in self._elsewhere:
            moved = Grid(*(upload(tensor, device) for tensor in (self.t, self.alpha, self.sigma)))
            moved.__dict__["rectified"] = self.rectified
            self._elsewhere[device] = moved
        return self._elsewhere[device]


@dataclass(frozen=True)
class Prediction:
    """A network's raw output at ``x_t``, readable in every coordinate.

    ``raw`` and ``x_t`` are (B, ...); ``alpha`` and ``sigma`` scalars or (B,).
    """

    raw: Tensor
    x_t: Tensor
    alpha: Tensor
    sigma: Tensor
    prediction_type: PredictionType

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = upcast(self.x_t)
        return upcast(self.raw), x, append_dims(self.alpha, x), append_dims(self.sigma, x)

    @property
    def x0(self) -> Tensor:
        """The clean sample that this prediction implies."""
        raw, x, alpha, sigma = self._parts
        if self.prediction_type == "epsilon":
            return (x - sigma * raw) / alpha
        return alpha * x - sigma * raw if self.prediction_type == "v_prediction" else x - sigma * raw

    @property
    def eps(self) -> Tensor:
        """The noise that this prediction implies."""
        raw, x, alpha, sigma = self._parts
        if self.prediction_type == "epsilon":
            return raw
        return sigma * x + alpha * raw if self.prediction_type == "v_prediction" else x + alpha * raw

    def target(self, x0: Tensor, eps: Tensor) -> Tensor:
        """What ``raw`` should have been for this ``x0`` and ``eps``, in the network's own coordinate."""
        _, _, alpha, sigma = self._parts
        if self.prediction_type == "epsilon":
            return eps
        return alpha * eps - sigma * x0 if self.prediction_type == "v_prediction" else eps - x0


def add_noise(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """``alpha * x0 + sigma * eps`` with per-sample coefficients."""
    return append_dims(alpha, x0) * x0 + append_dims(sigma, x0) * eps
