"""Losses of a pair from the errors of its members, and what keeps the winner's from rising; (R,) each.

Beside DPO's own, and IPO and the hinge of the same margin, with l, delta and beta of :mod:`align.objectives.dpo`:

    dspo  |(v_w - target) - c (v_w - v_w_ref)|^2 with c = beta sigmoid(beta/2 * delta) (Zhu et al. 2025; SD1.5: 0.001)
    mapo  l_w - beta log sigmoid(T (phi(l_w) - phi(l_l))), no reference (Hong et al. 2024, arXiv 2406.06424; 0.1)
    orpo  l_w - beta log sigmoid(l_l - l_w), no reference (diffusers' research project; 0.1)

The betas in brackets, as published, do not compare with DPO's. diffusers' script of the last writes l_w - l_l, which
pushes the winner's error over the loser's; the sign here is ORPO's with -l as the log-likelihood.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from align.diffusion.process import Reduction, reduce_dims
from align.families import Conditioning
from align.objectives.losses import preference_loss
from align.objectives.objective import Metrics
from align.objectives.rows import Rows

Votes = Literal["ignore", "smooth", "weight"]
PairLoss = Literal["sigmoid", "ipo", "hinge", "dspo", "mapo", "orpo"]
PUBLISHED_BETA = {"dspo": 0.001, "mapo": 0.1, "orpo": 0.1}  # of losses whose beta is not DPO's


@dataclass(frozen=True, kw_only=True)
class PairRows(Rows):
    """R pairs: their latents (R, 2, C, h, w), winner first, their captions, and the noise and time of both members;
    ``votes`` (R,) is the winner's share of the votes, nan where nobody counted, and there where a setting asks."""

    latents: Tensor
    cond: Conditioning
    eps: Tensor  # (R, C, h, w)
    t: Tensor  # (R,)
    votes: Tensor | None = None


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


def check(loss_type: PairLoss, beta: float, reduction: Reduction, smooths: bool) -> None:
    """Raise ValueError for settings of a loss that cannot be; ``smooths``: labels may be taken to be wrong."""
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if smooths and loss_type != "sigmoid":
        raise ValueError(f"label_smoothing is defined for loss_type sigmoid, not {loss_type}")
    if loss_type in PUBLISHED_BETA and (beta > 10 or reduction != "mean"):
        published = f"{PUBLISHED_BETA[loss_type]:g} and reduction mean"
        raise ValueError(f"loss_type {loss_type}: beta {beta:g} is DPO's; published are {published}")


def pair_errors(
    now: Tensor, then: Tensor | None, reduction: Reduction, loser_weight: float = 1.0, mu: float | None = None
) -> tuple[PairErrors, Tensor]:
    """From gaps to the targets (2 R, ...), R winners before R losers, of the network and, where there is one, of the
    reference; and the factors (R,), which the errors have in them, of the gradients through losers: ``loser_weight``,
    which :func:`safeguard` cuts where ``mu`` is given."""
    then = now.detach() if then is None else then
    count = len(now) // 2
    winner, loser = reduce_dims(now.square(), reduction).chunk(2)
    scale = torch.full_like(loser, loser_weight)
    if mu is not None:
        scale = safeguard(now[:count], now[count:], mu, loser_weight)
    ref_winner, ref_loser = reduce_dims(then.square(), reduction).chunk(2)
    moved = reduce_dims((now - then)[:count].square(), reduction)
    return PairErrors(winner, scale_gradient(loser, scale), ref_winner, ref_loser, moved), scale


def voted(votes: Tensor | None, how: Votes, label_smoothing: float) -> tuple[float | Tensor, float | Tensor]:
    """The label smoothing and the weight, one or (R,), of pairs whose winners have these shares of ``votes``."""
    if votes is None or how == "ignore":
        return label_smoothing, 1.0
    if how == "smooth":
        return torch.where(votes.isnan(), label_smoothing, 1 - votes), 1.0
    return label_smoothing, (2 * votes - 1).clamp(min=0).nan_to_num(nan=1.0)


def metrics(errors: PairErrors, logit: Tensor, reference: bool) -> Metrics:
    """How often the winner has the better margin (R,), its error, and by how much both moved from a reference's."""
    found = {
        "implicit_acc": ((logit > 0).float() + 0.5 * (logit == 0).float()).mean(),
        "error_winner": errors.winner.mean().detach(),
    }
    if reference:
        found["delta_winner"] = (errors.winner - errors.ref_winner).mean().detach()
        found["delta_loser"] = (errors.loser - errors.ref_loser).mean().detach()
    return found


def pair_loss(
    errors: PairErrors, loss_type: PairLoss, beta: float, label_smoothing: float | Tensor = 0.0
) -> tuple[Tensor, Tensor]:
    """(R,) each: loss and margin of winner over loser; formulas above."""
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


def safeguard(winner: Tensor, loser: Tensor, mu: float, weight: float = 1.0) -> Tensor:
    """(R,) what the loser's gradient is multiplied by, ``weight`` or less, so that, to first order, the winner's error
    falls by at least ``mu`` times what it would fall by without the loser (Diffusion-SDPO, arXiv 2511.03317), from
    their gaps (R, ...) to the targets, which are half the errors' gradients with respect to the prediction:

        min(weight, (1 - mu) |g_w|^2 / <g_l, g_w>) where <g_l, g_w> > 0, and the weight elsewhere

    For each pair; the published code has one for all pairs of a process's batch.
    """
    winner, loser = winner.detach(), loser.detach()
    size, along = reduce_dims(winner.square(), "mean"), reduce_dims(winner * loser, "mean")
    bound = (1 - mu) * size / along.clamp(min=1e-12)
    return torch.where(along > 0, bound.clamp(max=weight), torch.full_like(bound, weight))


def scale_gradient(value: Tensor, scale: Tensor | float) -> Tensor:
    """``value`` (R,), whose gradient is ``scale`` times its own."""
    return value.detach() + scale * (value - value.detach())
