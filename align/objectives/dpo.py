"""Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908) for epsilon, v and flow networks.

With l = mean over (C, h, w) of the squared error of the network's output, and one noise and one time per pair,

    delta = (l_w - l_w_ref) - (l_l - l_l_ref)        loss = -log sigmoid(-beta/2 * delta)

which is the official code (its mean and its half; the paper's eq. 14 writes a sum, T and omega folded into beta).
For flow it is Flow-DPO with constant beta (Liu et al. 2025, arXiv 2501.13918).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from align.common import rng
from align.data.preferences import PairBatch
from align.diffusion.process import Reduction, add_noise, upload
from align.families import Conditioning, Family, Resolution, sides
from align.objectives.losses import PreferenceLoss, TargetSpace, denoising_error, preference_loss
from align.objectives.objective import Context, Cost, Metrics, Needs, Objective, Reference
from align.objectives.rows import Rows


@dataclass(frozen=True, kw_only=True)
class DPORows(Rows):
    """R pairs: their latents (R, 2, C, h, w), winner first, their captions, and the noise and time of both members."""

    latents: Tensor
    cond: Conditioning
    eps: Tensor  # (R, C, h, w)
    t: Tensor  # (R,)


@dataclass
class DPO(Objective):
    """Diffusion-DPO on preference pairs.

    Args:
        beta: strength of the tie to the reference, in the convention of ``reduction``. Official: 2000 (paper, SD1.5) to
            5000 with the mean, which is D times a sum's. diffusers' own SD example has no half: its 2500 is 5000 here.
        reduction: ``mean`` over the latent (official) or ``sum`` (the paper's formula; divide beta by D).
        loss_type: ``sigmoid`` (DPO), ``ipo`` (Azar et al. 2023, eq. 17) or ``hinge`` (SLiC).
        target_space: ``native`` squares the error of what the network predicts; ``epsilon`` that of the noise.
        label_smoothing: the share of labels taken to be wrong (cDPO); ``sigmoid`` only.
        sft_weight: weight of the winner's own denoising loss, against both errors rising together.
        proportion_empty_prompts: the share of pairs trained on the empty prompt (official: 0.2).
        reference: ``base``, or ``start``, the ``initial_weights`` of this run.
    """

    beta: float = 2000.0
    reduction: Reduction = "mean"
    loss_type: PreferenceLoss = "sigmoid"
    target_space: TargetSpace = "native"
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    proportion_empty_prompts: float = 0.2
    reference: Reference = "base"

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing is defined for loss_type sigmoid, not {self.loss_type}")
        if not 0 <= self.proportion_empty_prompts <= 1:
            raise ValueError(f"proportion_empty_prompts must be a share, got {self.proportion_empty_prompts}")

    @property
    def needs(self) -> Needs:
        return Needs((PairBatch,))

    def cost(self, family: Family, resolution: Resolution) -> Cost:
        size = math.prod(family.latent_shape(*sides(resolution)))
        other, value = ("sum", self.beta / size) if self.reduction == "mean" else ("mean", self.beta * size)
        return Cost(2, 2, notes={"beta": f"{self.beta:g} ({self.reduction} over D={size}) = {value:g} as a {other}"})

    def rollout(self, ctx: Context, batch: PairBatch) -> DPORows:
        family, generators = ctx.policy.family, ctx.generators("dpo")
        cond = family.drop_prompts(batch.cond, rng.uniform(generators) < self.proportion_empty_prompts)
        t = upload(family.sample_timesteps(rng.uniform(generators)), family.device)
        latents = upload(batch.latents, family.device).float()
        eps = upload(rng.normal(tuple(latents.shape[2:]), generators), family.device)
        return DPORows(image=torch.arange(len(t)), latents=latents, cond=cond, eps=eps, t=t)

    def loss(self, ctx: Context, rows: DPORows) -> tuple[Tensor, Metrics]:
        winner, loser, error = self.deltas(ctx, rows)
        logit = -0.5 * self.beta * (winner - loser)
        loss = preference_loss(logit, self.loss_type, self.beta, self.label_smoothing).mean()
        if self.sft_weight:
            loss = loss + self.sft_weight * error.mean()
        return loss, {
            "implicit_acc": ((logit > 0).float() + 0.5 * (logit == 0).float()).mean(),
            "delta_winner": winner.mean().detach(),
            "delta_loser": loser.mean().detach(),
            "error_winner": error.mean().detach(),
        }

    def deltas(self, ctx: Context, rows: DPORows) -> tuple[Tensor, Tensor, Tensor]:
        """(R,) each: l - l_ref of winners, of losers, and l of winners; the implicit reward is -beta/2 (l - l_ref)."""
        x0, eps, t = torch.cat(rows.latents.unbind(1)), rows.eps.repeat(2, 1, 1, 1), rows.t.repeat(2)
        x_t, cond = add_noise(x0, eps, *ctx.policy.family.path(t)), Conditioning.cat([rows.cond, rows.cond])
        with torch.no_grad(), ctx.policy.reference():
            then = denoising_error(ctx.policy.predict(x_t, t, cond), x0, eps, self.target_space, self.reduction)
        now = denoising_error(ctx.policy.predict(x_t, t, cond), x0, eps, self.target_space, self.reduction)
        return (now - then)[: len(rows)], (now - then)[len(rows) :], now[: len(rows)]
