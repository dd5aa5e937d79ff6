"""What objectives on the forward process share (DiffusionNFT, AWM, DGPO): images drawn by whatever sampler, their final
latents noised again, and what the weights that drew them, and the reference, answer there. No likelihood, no stored
trajectory; a row costs one trained evaluation, one frozen one, and one more of the reference where that is asked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from align.common import rng
from align.common.errors import UserError
from align.data.prompts import PromptBatch
from align.diffusion.kernels import DDIM
from align.diffusion.process import Prediction, add_noise, reduce_dims, upload
from align.families import Conditioning, Family, Scale
from align.objectives.objective import Context, Cost
from align.objectives.online.advantages import ScaleRewards, group_advantages, zero_std_mask
from align.objectives.online.collect import collect
from align.objectives.online.gate import Gate, isolation
from align.objectives.online.rewards import Scorer
from align.objectives.rows import SHARED, Rows
from align.policy.policy import Policy
from align.sampling.sampler import Sampler, grid_of

Old = Literal["current", "average"]
Timesteps = Literal["training", "sampler"]


@dataclass(frozen=True, kw_only=True)
class NoisedRows(Rows):
    """R noise levels of N images."""

    t: Tensor  # (R,)
    eps: Tensor  # (R, C, h, w)
    old: Tensor  # (R, C, h, w) what the network of the weights that drew predicts there
    reference: Tensor | None = None  # (R, C, h, w) what the reference does, where it is asked
    x0: Tensor = field(metadata=SHARED)  # (N, C, h, w)
    advantage: Tensor = field(metadata=SHARED)  # (N,) within adv_clip_max of 0
    cond: Conditioning = field(metadata=SHARED)  # of P prompts
    prompt_index: Tensor = field(metadata=SHARED)  # (N,) the row of ``cond`` of each image
    held: Tensor | None = field(default=None, metadata=SHARED)  # (N,) which images the reference holds; None: all
    guidance_scale: Scale = field(default=None, metadata=SHARED)  # that the network takes as an input, as it drew

    @property
    def row_advantage(self) -> Tensor:
        """(R,) of each row's image."""
        return self.advantage[self.image]


@dataclass(frozen=True)
class ForwardProcess:
    """How images are drawn, compared and noised; the objectives' settings of these names.

    Attributes:
        shared_noise: the images of a prompt are noised to the same levels by the same noise (DGPO).
        gate: which images the reference holds, and what those unlike others are worth.
        drop_ties: images of a prompt whose rewards are all alike, which have no advantage, give no rows.
    """

    sampler: Sampler
    images_per_prompt: int
    draws_per_image: int
    scale_rewards: ScaleRewards
    adv_clip_max: float
    old: Old
    timesteps: Timesteps
    gate: Gate | None = None
    shared_noise: bool = False
    drop_ties: bool = False

    def check(self, kl_weight: float) -> None:
        """Raise ValueError for settings that cannot be, beside an objective's ``kl_weight``."""
        if self.gate is not None and not kl_weight:
            raise ValueError("gate holds images by kl_weight, which is 0")
        if self.images_per_prompt < 2 or self.draws_per_image < 1:
            raise ValueError("images_per_prompt must be at least 2 and draws_per_image at least 1")
        if self.adv_clip_max <= 0:
            raise ValueError(f"adv_clip_max must be positive, got {self.adv_clip_max}")
        if self.timesteps == "sampler" and self.draws_per_image > self.sampler.num_inference_steps:
            raise ValueError("timesteps: sampler needs at most as many draws_per_image as the sampler has steps")

    def require(self, policy: Policy, scorer: Scorer | None) -> None:
        """Raise :class:`UserError` for an average of weights that is not kept, and what a gate cannot have."""
        if self.gate is not None:
            self.gate.require(policy, scorer)
        if self.old == "average" and policy.ema is None:
            raise UserError(
                "old: average is the moving average of the weights, and none is kept: set ema_decay above 0"
            )

    def cost(self, family: Family, reference: bool) -> Cost:
        """Of an image, with ``reference`` where that is asked."""
        rows, each = self.draws_per_image, self.sampler.evaluations(family)
        steps, scale = self.sampler.num_inference_steps, self.sampler.guidance_scale_of(family)
        drawn = f"{steps} steps of {self.sampler.kernel or DDIM()}, guidance {scale:g}"
        return Cost(rows, steps * each + rows * (1 + reference), rows, {"sampler": drawn})

    def rows(self, ctx: Context, batch: PromptBatch, reference: bool) -> NoisedRows:
        """Draw, score, noise, and ask the weights that drew; with ``reference`` that too."""
        if self.gate is not None and self.gate.refresh and ctx.step and ctx.step % self.gate.refresh == 0:
            ctx.policy.move_reference()
        with ctx.policy.ema_scope() if self.old == "average" else nullcontext():
            rows = self._drawn(ctx, batch)
            rows = replace(rows, old=self._answers(ctx, rows, nullcontext))
        if not reference:
            return rows
        index = torch.arange(len(rows)) if rows.held is None else rows.held[rows.image].nonzero().flatten()
        answers = torch.zeros_like(rows.eps)
        answers[index] = self._answers(ctx, rows.take(index), ctx.policy.reference)
        return replace(rows, reference=answers)

    def _drawn(self, ctx: Context, batch: PromptBatch) -> NoisedRows:
        family, count = ctx.policy.family, self.draws_per_image
        last = self.sampler.num_inference_steps - 1
        stochastic = None if self.sampler.kernel else ()
        rollout = collect(ctx, self.sampler, batch, self.images_per_prompt, [last], stochastic, likelihood=False)
        trajectories = rollout.trajectories
        scores = {name: ctx.gather(values).double() for name, values in rollout.scores.items()}
        total, groups = ctx.rewards.total(scores), ctx.gather(rollout.groups)
        advantage, held = group_advantages(total, groups, self.scale_rewards), None
        if self.gate is not None:
            held = ctx.local(self.gate.held(total, scores))
            if self.gate.diversity:
                lonely = isolation(ctx.gather(trajectories.latents[:, -1].flatten(1)), groups)
                advantage = torch.where(advantage > 0, advantage * lonely, advantage)
        advantage = ctx.local(advantage).float()
        alike = zero_std_mask(total, groups)
        measured = {"reward/total": total.mean().item(), "zero_std_share": alike.double().mean().item()}
        generators, grid = self._generators(ctx, "nft"), grid_of(family, last + 1, trajectories.latents)
        if self.timesteps == "sampler":
            t = grid.t[rng.normal((len(grid),), self._generators(ctx, "nft steps")).argsort(1)[:, :count].flatten()]
        else:
            t = family.sample_timesteps(rng.strata(generators, count).flatten())
        eps = rng.normal((count, *trajectories.latents.shape[2:]), generators).flatten(0, 1)
        rows = NoisedRows(
            image=torch.arange(len(advantage)).repeat_interleave(count),
            t=t,
            eps=eps,
            old=torch.zeros_like(eps),  # filled in by the network's own answer to these rows
            x0=trajectories.latents[:, -1].cpu().float(),
            advantage=advantage.clamp(-self.adv_clip_max, self.adv_clip_max),
            cond=trajectories.cond,
            prompt_index=trajectories.prompt_index,
            held=held,
            guidance_scale=self.sampler.embedded_scale_of(family),
            metrics=rollout.metrics | measured,
        )
        return rows.take((~ctx.local(alike)[rows.image]).nonzero().flatten()) if self.drop_ties else rows

    def _generators(self, ctx: Context, purpose: str) -> list[torch.Generator]:
        if not self.shared_noise:
            return ctx.generators(purpose)
        groups = [position // self.images_per_prompt for position in ctx.sample_indices]
        return [rng.generator(ctx.seed, purpose, ctx.step, group) for group in groups]

    def _answers(self, ctx: Context, rows: NoisedRows, weights: Callable[[], AbstractContextManager[object]]) -> Tensor:
        """(R, C, h, w) raw answers to ``rows`` of the weights that act within ``weights``."""
        answers = torch.zeros_like(rows.eps)
        for part in torch.arange(len(rows)).split(self.sampler.batch_size) if len(rows) else ():
            with weights():
                answers[part] = predict_noised(ctx, rows.take(part))[0].raw.float().cpu()
        return answers


def predict_noised(ctx: Context, rows: NoisedRows) -> tuple[Prediction, Tensor, Tensor]:
    """What the policy now says of the rows, and their x0 and eps."""
    family = ctx.policy.family
    x0, eps, t = (values.to(family.device) for values in (rows.x0[rows.image], rows.eps, rows.t))
    cond = rows.cond.take(rows.prompt_index[rows.image].to(family.device))
    return ctx.policy.predict(add_noise(x0, eps, *family.path(t)), t, cond, rows.guidance_scale), x0, eps


def distance(new: Prediction, other: Tensor) -> Tensor:
    """(R,) mean square of what the network says from another answer (R, C, h, w): the KL of the two up to a weight."""
    return reduce_dims((new.raw.float() - upload(other, new.raw.device)).square(), "mean")


def distance_to_reference(new: Prediction, rows: NoisedRows) -> Tensor:
    """The mean over ``rows`` of :func:`distance` to the reference, which is 0 of those that it does not hold."""
    assert rows.reference is not None
    found = distance(new, rows.reference)
    return (found if rows.held is None else found * upload(rows.held[rows.image], found.device)).mean()
