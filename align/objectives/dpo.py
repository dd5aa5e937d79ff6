"""Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908) for epsilon, v and flow networks.

With l = mean over (C, h, w) of the squared error of the network's output, and one noise and one time per pair,

    delta = (l_w - l_w_ref) - (l_l - l_l_ref)        loss = -log sigmoid(-beta/2 * delta)

which is the official code (its mean and its half; the paper's eq. 14 writes a sum, T and omega folded into beta).
For flow it is Flow-DPO with constant beta (Liu et al. 2025, arXiv 2501.13918).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from align.common import rng
from align.data.preferences import PairBatch
from align.diffusion.process import Prediction, Reduction, add_noise, append_dims, reduce_dims, upcast
from align.families import Conditioning, Family
from align.objectives.objective import Context, Metrics, Objective, Plan
from align.objectives.rows import Rows


@dataclass
class DPO(Objective):
    """Diffusion-DPO on preference pairs.

    Args:
        beta: strength of the tie to the reference, in the convention of ``reduction``. The official scripts use
            2000 (paper, SD1.5) to 5000 with the mean; a mean's beta weakens as latents grow, D times a sum's.
        reduction: ``mean`` over the latent (official) or ``sum`` (the paper's formula; divide beta by D).
        loss_type: ``sigmoid`` (DPO), ``ipo`` (Azar et al. 2023, eq. 17) or ``hinge`` (SLiC).
        target_space: ``native`` squares the error of what the network predicts; ``epsilon`` that of the noise.
        label_smoothing: the share of labels taken to be wrong (cDPO); ``sigmoid`` only.
        sft_weight: weight of the winner's own denoising loss, against both errors rising together.
        proportion_empty_prompts: the share of pairs trained on the empty prompt (official: 0.2).
    """

    beta: float = 2000.0
    reduction: Reduction = "mean"
    loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    target_space: Literal["native", "epsilon"] = "native"
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    proportion_empty_prompts: float = 0.2

    batch_types: ClassVar[tuple[type, ...]] = (PairBatch,)

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing is defined for loss_type sigmoid, not {self.loss_type}")
        if not 0 <= self.proportion_empty_prompts <= 1:
            raise ValueError(f"proportion_empty_prompts must be a share, got {self.proportion_empty_prompts}")

    def plan(self, family: Family, resolution: int | None) -> Plan:
        size = math.prod(family.latent_shape(resolution))
        other, value = ("sum", self.beta / size) if self.reduction == "mean" else ("mean", self.beta * size)
        return Plan(2, 2, notes={"beta": f"{self.beta:g} ({self.reduction} over D={size}) = {value:g} as a {other}"})

    def rollout(self, ctx: Context, batch: PairBatch) -> Rows:
        """One row a pair: its two latents, its caption, and the noise and time that both members share."""
        family = ctx.policy.family
        generators = ctx.generators("dpo")
        empty = rng.uniform(generators) < self.proportion_empty_prompts
        cond = family.drop_prompts(batch.cond, empty)
        t = family.sample_timesteps(rng.uniform(generators))
        eps = rng.normal(tuple(batch.latents.shape[2:]), generators)
        latents = batch.latents.to(family.device).float()
        rows = {"t": t.to(family.device), "eps": eps.to(family.device)}
        return Rows(rows, {"latents": latents, "cond": cond}, torch.arange(len(t)))

    def loss(self, ctx: Context, rows: Rows) -> tuple[Tensor, Metrics]:
        winner, loser, error = self.deltas(ctx, rows)
        logit = -0.5 * self.beta * (winner - loser)
        loss = self.preference(logit).mean()
        if self.sft_weight:
            loss = loss + self.sft_weight * error.mean()
        return loss, {
            "implicit_acc": ((logit > 0).float() + 0.5 * (logit == 0).float()).mean(),
            "delta_winner": winner.mean().detach(),
            "delta_loser": loser.mean().detach(),
            "error_winner": error.mean().detach(),
        }

    def deltas(self, ctx: Context, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """By how much the policy's error exceeds the reference's, on winners and on losers, and the policy's error
        on winners; each (R,). The implicit reward is minus beta/2 times the excess. One forward of 2R rows each."""
        x0 = torch.cat(rows.tensor("latents").unbind(1))
        eps, t, cond = rows.tensor("eps").repeat(2, 1, 1, 1), rows.tensor("t").repeat(2), rows.cond()
        x_t = add_noise(x0, eps, *ctx.policy.family.path(t))
        both = Conditioning.cat([cond, cond])
        with torch.no_grad(), ctx.policy.reference():
            reference = self.error(ctx.policy.predict(x_t, t, both), x0, eps)
        trained = self.error(ctx.policy.predict(x_t, t, both), x0, eps)
        winner, loser = (trained - reference).chunk(2)
        return winner, loser, trained[: len(winner)]

    def error(self, prediction: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
        """(R,) squared error of each row in the chosen space and reduction."""
        gap = upcast(prediction.raw) - prediction.target(x0, eps)
        if self.target_space == "epsilon" and prediction.prediction_type != "epsilon":
            gap = append_dims(prediction.alpha, gap) * gap  # eps - eps_hat = alpha (v - v_hat), for v and flow alike
        return reduce_dims(gap.square(), self.reduction)

    def preference(self, logit: Tensor) -> Tensor:
        """(R,) loss from (R,) ``-beta/2 * delta``, the implicit reward margin of winner over loser."""
        if self.loss_type == "ipo":
            return (logit / self.beta - 1 / (2 * self.beta)).square()
        if self.loss_type == "hinge":
            return F.relu(1 - logit)
        smooth = self.label_smoothing
        return -(1 - smooth) * F.logsigmoid(logit) - smooth * F.logsigmoid(-logit)
