"""Losses of a pair from the errors of its members, and what keeps the winner's from rising; (R,) each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from align.diffusion.process import reduce_dims
from align.objectives.losses import preference_loss

PairLoss = Literal["sigmoid", "ipo", "hinge", "dspo", "mapo", "orpo"]
PUBLISHED_BETA = {"dspo": 0.001, "mapo": 0.1, "orpo": 0.1}  # of losses whose beta is not DPO's


@dataclass(frozen=True)
class PairErrors:
    """(R,) each: squared errors of winners and losers, now and by the reference, and by how much the network's answer
    to winners has ``moved`` away from the reference's, squared."""

    winner: Tensor
    loser: Tensor
    ref_winner: Tensor
    ref_loser: Tensor
    moved: Tensor

    def logit(self, beta: float) -> Tensor:
        """(R,) DPO's margin, ``-beta/2 ((l_w - l_w_ref) - (l_l - l_l_ref))``."""
        return -0.5 * beta * ((self.winner - self.ref_winner) - (self.loser - self.ref_loser))


def pair_loss(
    errors: PairErrors, loss_type: PairLoss, beta: float, label_smoothing: float | Tensor = 0.0
) -> tuple[Tensor, Tensor]:
    """(R,) each: loss and margin of winner over loser; formulas in :mod:`align.objectives.dpo`."""
    if loss_type == "mapo" or loss_type == "orpo":
        logit = mapo_logit(errors.winner, errors.loser) if loss_type == "mapo" else errors.loser - errors.winner
        return errors.winner - beta * F.logsigmoid(logit), logit
    logit = errors.logit(beta)
    if loss_type == "dspo":
        return dspo_loss(errors, logit, beta), logit
    return preference_loss(logit, loss_type, beta, label_smoothing), logit


def dspo_loss(errors: PairErrors, logit: Tensor, beta: float) -> Tensor:
    """(R,) ``|(v - target) - c (v - v_ref)|^2`` of winners with ``c = beta (1 - sigmoid(logit))`` (DSPO, Zhu et al.
    2025), multiplied out."""
    c = beta * torch.sigmoid(-logit)
    return (1 - c) * errors.winner + c * errors.ref_winner - c * (1 - c) * errors.moved


def mapo_logit(winner: Tensor, loser: Tensor, snr: float = 0.5, timesteps: int = 1000) -> Tensor:
    """(R,) MaPO's margin ``T (phi(l_w) - phi(l_l))`` with ``phi(l) = k l / (e^(k l) - 1)``; k = ``snr`` and T as in its
    code."""

    def phi(error: Tensor) -> Tensor:
        return snr * error / torch.expm1(snr * error)

    return timesteps * (phi(winner) - phi(loser))


def safeguard(winner: Tensor, loser: Tensor, mu: float) -> Tensor:
    """(R,) what the loser's gradient is multiplied by so that, to first order, the winner's error falls by at least
    ``mu`` times what it would fall by without the loser (Diffusion-SDPO, arXiv 2511.03317), from their gaps (R, ...)
    to the targets, which are half the errors' gradients with respect to the prediction:

        min(1, (1 - mu) |g_w|^2 / <g_l, g_w>) where <g_l, g_w> > 0, and 1 elsewhere

    For each pair; the published code has one for all pairs of a process's batch.
    """
    winner, loser = winner.detach(), loser.detach()
    size, along = reduce_dims(winner.square(), "mean"), reduce_dims(winner * loser, "mean")
    bound = (1 - mu) * size / along.clamp(min=1e-12)
    return torch.where(along > 0, bound.clamp(max=1), torch.ones_like(bound))


def scale_gradient(value: Tensor, scale: Tensor | float) -> Tensor:
    """``value`` (R,), whose gradient is ``scale`` times its own."""
    return value.detach() + scale * (value - value.detach())
