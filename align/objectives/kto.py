"""Diffusion-KTO (Li et al. 2024, arXiv 2404.04465): images that are good or bad, without pairs.

With l = mean over (C, h, w) of the squared error of the network's output, and one noise and one time for each image,

    g = l_ref - l        z = max(0, mean of g over the batch)        loss = w (1 - sigmoid(+-beta (g - z)))

with + and w = ``desirable_weight`` for good images, - and w = ``undesirable_weight`` for bad ones. z, the reference
point, has no gradient. This is the official code, but that its z is of what the processes pass through the network at
once, and ours of the whole batch, however that is cut up.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from align.common import rng
from align.data.rated import RatedBatch
from align.diffusion.process import Reduction, add_noise, upload
from align.families import Conditioning, Family, Resolution
from align.objectives.losses import TargetSpace, beta_note, denoising_error
from align.objectives.objective import Context, Cost, Metrics, Needs, Objective, Reference
from align.objectives.rows import SHARED, Rows


@dataclass(frozen=True, kw_only=True)
class KTORows(Rows):
    """R images: their latents (R, C, h, w), captions, noise and time, and what stays while they train."""

    latents: Tensor
    cond: Conditioning
    eps: Tensor  # (R, C, h, w)
    t: Tensor  # (R,)
    good: Tensor  # (R,) 1 or 0
    weight: Tensor  # (R,)
    ref_error: Tensor  # (R,)
    reference_point: float = field(metadata=SHARED)  # z
    good_share: float = field(metadata=SHARED)  # of all images of the batch


@dataclass
class KTO(Objective):
    """Diffusion-KTO on images that are good or bad.

    Args:
        beta: strength of the tie to the reference, in the convention of ``reduction`` (official code: 1000). There
            is no half in it: 1000 is as much as DPO's 2000.
        desirable_weight: of good images, TRL's name (official: 1).
        undesirable_weight: of bad images, TRL's name (official: 1).
        balance: scale both weights as if each batch held as many good images as bad ones.
        reference_point: z is the ``batch``'s mean, which costs a forward pass, or ``zero``.
        reduction: ``mean`` over the latent (official) or ``sum``.
        target_space: ``native`` squares the error of what the network predicts; ``epsilon`` that of the noise.
        proportion_empty_prompts: the share of images trained on the empty prompt (official: 0.2).
        reference: ``base``, or ``start``, the ``initial_weights`` of this run.
    """

    beta: float = 1000.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    balance: bool = False
    reference_point: Literal["batch", "zero"] = "batch"
    reduction: Reduction = "mean"
    target_space: TargetSpace = "native"
    proportion_empty_prompts: float = 0.2
    reference: Reference = "base"

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if min(self.desirable_weight, self.undesirable_weight) < 0:
            raise ValueError("desirable_weight and undesirable_weight must be at least 0")
        if not self.desirable_weight and not self.undesirable_weight:
            raise ValueError("desirable_weight and undesirable_weight are both 0, which trains nothing")
        if not 0 <= self.proportion_empty_prompts <= 1:
            raise ValueError(f"proportion_empty_prompts must be a share, got {self.proportion_empty_prompts}")

    @property
    def needs(self) -> Needs:
        return Needs((RatedBatch,))

    def cost(self, family: Family, resolution: Resolution) -> Cost:
        notes = {"beta": beta_note(self.beta, self.reduction, family, resolution)}
        return Cost(1, 1 + (self.reference_point == "batch"), notes=notes)

    def rollout(self, ctx: Context, batch: RatedBatch) -> KTORows:
        family, generators = ctx.policy.family, ctx.generators("kto")
        assert batch.labels is not None
        good = ctx.gather(batch.labels)
        latents = upload(batch.latents, family.device).float()
        rows = KTORows(
            image=torch.arange(len(latents)),
            latents=latents,
            cond=family.drop_prompts(batch.cond, rng.uniform(generators) < self.proportion_empty_prompts),
            eps=upload(rng.normal(tuple(latents.shape[1:]), generators), family.device),
            t=upload(family.sample_timesteps(rng.uniform(generators)), family.device),
            good=upload(batch.labels, family.device),
            weight=upload(self.weights(batch.labels, good), family.device),
            ref_error=torch.zeros(len(latents), device=family.device),  # both filled in below, from these rows
            reference_point=0.0,
            good_share=good.mean().item(),
        )
        chunks = list(rows.chunks(ctx.chunk))
        with ctx.policy.reference():
            rows = replace(rows, ref_error=torch.cat([self.errors(ctx, part) for part in chunks]))
        if self.reference_point == "zero":
            return rows
        gain = rows.ref_error - torch.cat([self.errors(ctx, part) for part in chunks])
        return replace(rows, reference_point=max(0.0, ctx.gather(gain).double().mean().item()))

    def weights(self, labels: Tensor, everyone: Tensor) -> Tensor:
        """(B,) of images that ``labels`` (B,) call good or bad, as all of the batch, ``everyone`` (N,), are."""
        desirable, undesirable = self.desirable_weight, self.undesirable_weight
        if self.balance and 0 < (share := everyone.mean().item()) < 1:
            desirable, undesirable = desirable / (2 * share), undesirable / (2 * (1 - share))
        return torch.where(labels > 0, desirable, undesirable)

    def errors(self, ctx: Context, rows: KTORows) -> Tensor:
        """(R,) squared errors of whichever weights answer."""
        x_t = add_noise(rows.latents, rows.eps, *ctx.policy.family.path(rows.t))
        prediction = ctx.policy.predict(x_t, rows.t, rows.cond)
        return denoising_error(prediction, rows.latents, rows.eps, self.target_space, self.reduction)

    def loss(self, ctx: Context, rows: KTORows) -> tuple[Tensor, Metrics]:
        error = self.errors(ctx, rows)
        gain, sign = rows.ref_error - error, 2 * rows.good - 1
        logit = sign * self.beta * (gain - rows.reference_point)
        loss = (rows.weight * torch.sigmoid(-logit)).mean()
        share = max(rows.good_share, 1e-9), max(1 - rows.good_share, 1e-9)
        return loss, {
            "implicit_acc": ((logit > 0).float() + 0.5 * (logit == 0).float()).mean(),
            "delta_good": -(rows.good * gain).mean().detach() / share[0],
            "delta_bad": -((1 - rows.good) * gain).mean().detach() / share[1],
            "reference_point": error.new_tensor(rows.reference_point),
        }
