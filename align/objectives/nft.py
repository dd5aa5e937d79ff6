"""DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117): policy improvement on the forward process, without likelihoods.

Pictures are drawn by whatever sampler, noised again, and told apart by their rewards r in [0, 1]. With the answer v_old
of the weights that drew them and v the true target at x_t,

    v+ = v_old + beta (v_theta - v_old)      v- = v_old - beta (v_theta - v_old)
    loss = r |v+ - v|^2 + (1 - r) |v- - v|^2

which at beta 1 pulls towards good images, pushes from bad ones, and ties to v_old by beta^2 |v_theta - v_old|^2. One
row costs one trained and one frozen evaluation.

The authors' code (NVlabs/DiffusionNFT) differs from these defaults, and configs/nft_sd35.yaml sets what it does:
``loss_scale`` adv_clip_max / beta, ``adv_clip_max`` 5, ``scale_rewards: batch``, ``weighting: adaptive``, ``kl_weight``
1e-4, ``timesteps: sampler`` with 9 of its 10 steps. Its v_old is an average whose decay grows, min(0.001 k, 0.5) at
update k, ours ``ema_decay``; it draws by DPM-Solver-2, we by Euler's (DDIM's) steps.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from align.common import rng
from align.common.errors import UserError
from align.data.prompts import PromptBatch
from align.diffusion.kernels import DDIM
from align.diffusion.process import Prediction, add_noise
from align.families import Conditioning, Family, Resolution
from align.objectives.losses import adaptive_error, denoising_error
from align.objectives.objective import Context, Cost, Metrics, Needs, Objective, Prepares, Reference
from align.objectives.online.advantages import ScaleRewards, group_advantages, zero_std_mask
from align.objectives.online.collect import collect
from align.objectives.online.rewards import Scorer
from align.objectives.rows import SHARED, Rows
from align.policy.policy import Policy
from align.sampling.sampler import Sampler, grid_of


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
class NFT(Objective, Prepares):
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
        weighting: squared errors ``native`` to the network, or ``adaptive``: of x0 over their size (paper, eq. 12).
        old: drawn by, and tied to, the ``current`` weights, or their moving ``average`` (the paper's soft update).
        timesteps: noise levels as in ``training``, or so many different steps of the ``sampler``.
        loss_scale: of the loss; Adam hardly feels it, gradient clipping and ``kl_weight`` do.
        kl_weight: of the mean square of v_theta - v_ref.
        reference: ``base``, or ``start``, the ``initial_weights`` of this run.
    """

    sampler: Sampler = field(default_factory=Sampler)
    images_per_prompt: int = 8
    draws_per_image: int = 2
    beta: float = 1.0
    scale_rewards: ScaleRewards = "group"
    adv_clip_max: float = 2.0
    weighting: Literal["adaptive", "native"] = "native"
    old: Literal["current", "average"] = "current"
    timesteps: Literal["training", "sampler"] = "training"
    loss_scale: float = 1.0
    kl_weight: float = 0.0
    reference: Reference = "base"

    def __post_init__(self) -> None:
        if self.images_per_prompt < 2 or self.draws_per_image < 1:
            raise ValueError("images_per_prompt must be at least 2 and draws_per_image at least 1")
        if min(self.beta, self.adv_clip_max, self.loss_scale) <= 0 or self.kl_weight < 0:
            raise ValueError("beta, adv_clip_max and loss_scale must be positive, kl_weight at least 0")
        if self.timesteps == "sampler" and self.draws_per_image > self.sampler.num_inference_steps:
            raise ValueError("timesteps: sampler needs at most as many draws_per_image as the sampler has steps")

    @property
    def needs(self) -> Needs:
        group_size = self.images_per_prompt
        return Needs((PromptBatch,), self.kl_weight > 0, rewards=True, group_size=group_size, online=True)

    def prepare(self, policy: Policy, scorer: Scorer | None) -> None:
        if self.old == "average" and policy.ema is None:
            raise UserError(
                "old: average is the moving average of the weights, and none is kept: set ema_decay above 0"
            )

    def cost(self, family: Family, resolution: Resolution) -> Cost:
        rows, each = self.draws_per_image, self.sampler.evaluations(family)
        steps, scale = self.sampler.num_inference_steps, self.sampler.guidance_scale_of(family)
        drawn = f"{steps} steps of {self.sampler.kernel or DDIM()}, guidance {scale:g}"
        return Cost(rows, steps * each + rows * (1 + self.needs.reference), rows, {"sampler": drawn})

    def rollout(self, ctx: Context, batch: PromptBatch) -> NFTRows:
        with ctx.policy.ema_scope() if self.old == "average" else nullcontext():
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
        alike = zero_std_mask(total, groups).double().mean().item()
        measured = {"reward/total": total.mean().item(), "zero_std_share": alike}
        generators, grid = ctx.generators("nft"), grid_of(family, last + 1, trajectories.latents)
        if self.timesteps == "sampler":
            t = grid.t[rng.normal((len(grid),), ctx.generators("nft steps")).argsort(1)[:, :count].flatten()]
        else:
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
            metrics=rollout.metrics | measured,
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
        error = denoising_error if self.weighting == "native" else adaptive_error
        positive, negative = (error(replace(new, raw=old + way * step), x0, eps) for way in (1, -1))
        loss = self.loss_scale * (good * positive + (1 - good) * negative).mean()
        metrics = {"error_positive": positive.mean().detach(), "error_negative": negative.mean().detach()}
        if self.kl_weight:
            with torch.no_grad(), ctx.policy.reference():
                reference = self._predict(ctx, rows)[0].raw.float()
            kl = (new.raw.float() - reference).square().mean()
            loss, metrics["kl_reference"] = loss + self.kl_weight * kl, kl.detach()
        return loss, metrics | {"moved": (new.raw.float() - old).square().mean().detach()}
