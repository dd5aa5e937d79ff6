"""Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908) for epsilon, v and flow networks, and its kin.

With l = mean over (C, h, w) of the squared error of the network's output, and one noise and one time per pair,

    delta = (l_w - l_w_ref) - (l_l - l_l_ref)        loss = -log sigmoid(-beta/2 * delta)

which is the official code (its mean and its half; the paper's eq. 14 writes a sum, T and omega folded into beta).
For flow it is Flow-DPO with constant beta (Liu et al. 2025, arXiv 2501.13918). Other losses of a pair are in
:mod:`align.objectives.pair_losses`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from align.common import rng
from align.data.preferences import PairBatch
from align.diffusion.process import Reduction, add_noise, upload
from align.families import Conditioning, Family, Resolution
from align.objectives import pair_losses
from align.objectives.losses import TargetSpace, beta_note, denoising_gap
from align.objectives.objective import Context, Cost, Metrics, Needs, Objective, Reference
from align.objectives.pair_losses import PairErrors, PairLoss, PairRows, Votes


@dataclass
class DPO(Objective):
    """Diffusion-DPO on preference pairs.

    Args:
        beta: strength of the tie to the reference, in the convention of ``reduction``. Official: 2000 (paper, SD1.5) to
            5000 with the mean, which is D times a sum's. diffusers' own SD example has no half: its 2500 is 5000 here.
        reduction: ``mean`` over the latent (official) or ``sum`` (the paper's formula; divide beta by D).
        loss_type: ``sigmoid`` (DPO), ``ipo`` (Azar et al. 2023), ``hinge`` (SLiC), ``dspo``, ``mapo``, ``orpo``.
        target_space: ``native`` squares the error of what the network predicts; ``epsilon`` that of the noise.
        label_smoothing: the share of labels taken to be wrong (cDPO); ``sigmoid`` only.
        votes: the winner's share p of the votes smooths a pair's label by 1 - p (``smooth``), or weighs the pair by
            2 p - 1, at least 0 (``weight``); a pair without votes has ``label_smoothing``, or weighs 1.
        sft_weight: weight of the winner's own denoising loss, against both errors rising together.
        loser_weight: factor of the gradient through the loser, for the same end.
        safeguard: Diffusion-SDPO's mu (arXiv 2511.03317): cuts that factor, pair by pair, so that to first order the
            winner's error falls by at least mu of what it would alone; null is off (official: 0.9 SD1.5, 0.6 SDXL).
        proportion_empty_prompts: the share of pairs trained on the empty prompt (official: 0.2).
        reference: ``base``, or ``start``, the ``initial_weights`` of this run.
    """

    beta: float = 2000.0
    reduction: Reduction = "mean"
    loss_type: PairLoss = "sigmoid"
    target_space: TargetSpace = "native"
    label_smoothing: float = 0.0
    votes: Votes = "ignore"
    sft_weight: float = 0.0
    loser_weight: float = 1.0
    safeguard: float | None = None
    proportion_empty_prompts: float = 0.2
    reference: Reference = "base"

    def __post_init__(self) -> None:
        smooths = bool(self.label_smoothing) or self.votes == "smooth"
        pair_losses.check(self.loss_type, self.beta, self.reduction, smooths)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if min(self.loser_weight, self.sft_weight) < 0 or not 0 <= (self.safeguard or 0) <= 1:
            raise ValueError("loser_weight and sft_weight must be at least 0, and safeguard null or in [0, 1]")
        if not 0 <= self.proportion_empty_prompts <= 1:
            raise ValueError(f"proportion_empty_prompts must be a share, got {self.proportion_empty_prompts}")

    @property
    def needs(self) -> Needs:
        return Needs((PairBatch,), self.loss_type not in ("mapo", "orpo"), labels=self.votes != "ignore")

    def cost(self, family: Family, resolution: Resolution) -> Cost:
        note = beta_note(self.beta, self.reduction, family, resolution)
        other = f"{self.beta:g} of {self.loss_type}" if self.loss_type in pair_losses.PUBLISHED_BETA else note
        return Cost(2, 2 * self.needs.reference, notes={"beta": other})

    def rollout(self, ctx: Context, batch: PairBatch) -> PairRows:
        family, generators = ctx.policy.family, ctx.generators("dpo")
        cond = family.drop_prompts(batch.cond, rng.uniform(generators) < self.proportion_empty_prompts)
        t = upload(family.sample_timesteps(rng.uniform(generators)), family.device)
        latents = upload(batch.latents, family.device).float()
        eps = upload(rng.normal(tuple(latents.shape[2:]), generators), family.device)
        votes = upload(batch.labels, family.device) if self.votes != "ignore" and batch.labels is not None else None
        return PairRows(image=torch.arange(len(t)), latents=latents, cond=cond, eps=eps, t=t, votes=votes)

    def loss(self, ctx: Context, rows: PairRows) -> tuple[Tensor, Metrics]:
        errors, scale = self.errors(ctx, rows)
        smoothing, weight = pair_losses.voted(rows.votes, self.votes, self.label_smoothing)
        loss, logit = pair_losses.pair_loss(errors, self.loss_type, self.beta, smoothing)
        loss = (weight * loss).mean()
        if self.sft_weight:
            loss = loss + self.sft_weight * errors.winner.mean()
        metrics = pair_losses.metrics(errors, logit, self.needs.reference)
        return loss, metrics if self.safeguard is None else metrics | {"loser_scale": scale.mean()}

    def errors(self, ctx: Context, rows: PairRows) -> tuple[PairErrors, Tensor]:
        """Of each pair, where the implicit reward is -beta/2 (l - l_ref); and the factors, which these have in them, of
        the gradients through losers."""
        x0, eps, t = torch.cat(rows.latents.unbind(1)), rows.eps.repeat(2, 1, 1, 1), rows.t.repeat(2)
        x_t, cond = add_noise(x0, eps, *ctx.policy.family.path(t)), Conditioning.cat([rows.cond, rows.cond])
        then = None
        if self.needs.reference:
            with torch.no_grad(), ctx.policy.reference():
                then = denoising_gap(ctx.policy.predict(x_t, t, cond), x0, eps, self.target_space)
        now = denoising_gap(ctx.policy.predict(x_t, t, cond), x0, eps, self.target_space)
        return pair_losses.pair_errors(now, then, self.reduction, self.loser_weight, self.safeguard)
