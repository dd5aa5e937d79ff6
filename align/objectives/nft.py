"""DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117): policy improvement on the forward process, without likelihoods.

Pictures are drawn by whatever sampler, noised again, and told apart by their rewards r in [0, 1]. With the answer v_old
of the weights that drew them and v the true target at x_t,

    v+ = v_old + beta (v_theta - v_old)      v- = v_old - beta (v_theta - v_old)
    loss = r |v+ - v|^2 + (1 - r) |v- - v|^2

which at beta 1 pulls towards good images, pushes from bad ones, and ties to v_old by beta^2 |v_theta - v_old|^2. No
step of the sampler has to be stochastic or kept; one row costs one trained and one frozen evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from align.common import rng
from align.data.prompts import PromptBatch
from align.diffusion.kernels import DDIM
from align.diffusion.process import Prediction, add_noise, reduce_dims
from align.families import Conditioning, Family
from align.objectives.objective import Context, Cost, Metrics, Needs, Objective
from align.objectives.online.advantages import ScaleRewards, group_advantages, zero_std_mask
from align.objectives.online.collect import collect
from align.objectives.rows import SHARED, Rows
from align.sampling.sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class NFTRows(Rows):
    """R noise levels of N images."""

    t: Tensor  # (R,)
    eps: Tensor  # (R, C, h, w)
    old: Tensor  # (R, C, h, w) what the network of the weights that drew predicts there
    x0: Tensor = field(metadata=SHARED)  # (N, C, h, w)
    good: Tensor = field(metadata=SHARED)  # (N,) r in [0, 1]
    cond: Conditioning = field(metadata=SHARED)  # of P prompts
    prompt_index: Tensor = field(metadata=SHARED)  # (N,) the row of ``cond`` of each image


@dataclass
class NFT(Objective):
    """Negative-aware fine-tuning on images that the policy draws.

    Args:
        sampler: how images are drawn; without a kernel the deterministic sampler. Training is without guidance, as
            in the paper, which also draws without (``guidance: 1``).
        images_per_prompt: images of each prompt in a rollout, over all processes (paper: 24).
        draws_per_image: noise levels at which each image is trained on.
        beta: strength of the implicit positive and negative policies (paper: 1, or 0.1).
        scale_rewards: what a reward's distance from its group's mean is divided by: the std of the ``group`` or of all
            (``batch``).
        adv_clip_max: that quotient is cut to this size, which becomes r = 0 or 1 (paper: 1; its code: 5).
        weighting: ``adaptive`` squares errors of x0 over their own mean size (paper, eq. 12), ``native`` those of the
            network's output.
        old: drawn by, and tied to, the ``current`` weights at the rollout, or their moving ``average`` (``ema_decay``;
            the paper's soft update).
    """

    sampler: Sampler = field(default_factory=Sampler)
    images_per_prompt: int = 8
    draws_per_image: int = 2
    beta: float = 1.0
    scale_rewards: ScaleRewards = "group"
    adv_clip_max: float = 2.0
    weighting: Literal["adaptive", "native"] = "native"
    old: Literal["current", "average"] = "current"

    def __post_init__(self) -> None:
        if self.images_per_prompt < 2 or self.draws_per_image < 1:
            raise ValueError("images_per_prompt must be at least 2 and draws_per_image at least 1")
        if self.beta <= 0 or self.adv_clip_max <= 0:
            raise ValueError("beta and adv_clip_max must be positive")

    @property
    def needs(self) -> Needs:
        return Needs((PromptBatch,), False, rewards=True, group_size=self.images_per_prompt, online=True)

    def cost(self, family: Family, resolution: int | None) -> Cost:
        rows, each = self.draws_per_image, self.sampler.evaluations(family)
        notes = {
            "sampler": f"{self.sampler.num_inference_steps} steps of {self.sampler.kernel or DDIM()}, guidance "
            f"{self.sampler.guidance_scale_of(family):g}"
        }
        return Cost(rows, self.sampler.num_inference_steps * each + rows, rows, notes)

    def rollout(self, ctx: Context, batch: PromptBatch) -> NFTRows:
        if self.old == "average":
            with ctx.policy.ema_scope():
                return self._rollout(ctx, batch)
        return self._rollout(ctx, batch)

    def _rollout(self, ctx: Context, batch: PromptBatch) -> NFTRows:
        family, count = ctx.policy.family, self.draws_per_image
        last = self.sampler.num_inference_steps - 1
        stochastic = None if self.sampler.kernel else ()
        rollout = collect(ctx, self.sampler, batch, self.images_per_prompt, [last], stochastic, likelihood=False)
        trajectories = rollout.trajectories
        scores = {name: ctx.gather(values).double() for name, values in rollout.scores.items()}
        total, groups = ctx.rewards.total(scores), ctx.gather(rollout.groups)
        advantage = ctx.local(group_advantages(total, groups, self.scale_rewards)).float()
        generators = ctx.generators("nft")
        t = family.sample_timesteps(rng.strata(generators, count).flatten())
        eps = rng.normal((count, *trajectories.latents.shape[2:]), generators).flatten(0, 1)
        rows = NFTRows(
            image=torch.arange(len(advantage)).repeat_interleave(count),
            t=t,
            eps=eps,
            old=torch.zeros_like(eps),  # filled in below, by the network's own answer to these rows
            x0=trajectories.latents[:, -1].cpu().float(),
            good=0.5 + 0.5 * (advantage / self.adv_clip_max).clamp(-1, 1),
            cond=trajectories.cond,
            prompt_index=trajectories.prompt_index,
            metrics=rollout.metrics
            | {
                "reward/total": total.mean().item(),
                "zero_std_share": zero_std_mask(total, groups).double().mean().item(),
            },
        )
        old = [self._predict(ctx, part)[0].raw.float().cpu() for part in rows.chunks(self.sampler.batch_size)]
        return replace(rows, old=torch.cat(old))

    def _predict(self, ctx: Context, rows: NFTRows) -> tuple[Prediction, Tensor, Tensor]:
        """What the policy says of the rows, and their x0 and eps."""
        family = ctx.policy.family
        x0, eps, t = (values.to(family.device) for values in (rows.x0[rows.image], rows.eps, rows.t))
        cond = rows.cond.take(rows.prompt_index[rows.image].to(family.device))
        return ctx.policy.predict(add_noise(x0, eps, *family.path(t)), t, cond), x0, eps

    def loss(self, ctx: Context, rows: NFTRows) -> tuple[Tensor, Metrics]:
        new, x0, eps = self._predict(ctx, rows)
        old, good = rows.old.to(new.x_t.device), rows.good[rows.image].to(new.x_t.device)
        step = self.beta * (new.raw.float() - old)
        positive = self._error(replace(new, raw=old + step), x0, eps)
        negative = self._error(replace(new, raw=old - step), x0, eps)
        moved = reduce_dims((new.raw.float() - old).square(), "mean").detach()
        return (good * positive + (1 - good) * negative).mean(), {
            "error_positive": positive.mean().detach(),
            "error_negative": negative.mean().detach(),
            "moved": moved.mean(),
        }

    def _error(self, prediction: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
        """(R,) squared error in the chosen weighting."""
        if self.weighting == "native":
            return reduce_dims((prediction.raw.float() - prediction.target(x0, eps)).square(), "mean")
        gap = prediction.x0 - x0
        return reduce_dims(gap.square(), "mean") / reduce_dims(gap.detach().abs(), "mean").clamp(min=1e-5)
