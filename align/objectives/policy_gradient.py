"""The clipped policy gradient through the sampler: DDPO, Flow-GRPO and their kin are settings of it.

A sampler is a Markov decision process whose action is the next latent and whose reward comes at the end
(DDPO, Black et al. 2023, §4; Flow-GRPO, Liu et al. 2025, arXiv 2505.05470, §4). With the advantage A of a picture
and rho = p_theta(x_s | x_t) / p_old(x_s | x_t) at a trained step,

    loss = max(-A rho, -A clip(rho, 1 - c, 1 + c)) + beta KL(p_theta || p_ref)

DDPO is the step DDIM with eta 1 and statistics per prompt; Flow-GRPO is FlowSDE, a group per prompt and the std of
all; Flow-GRPO-Fast and MixGRPO (arXiv 2507.21802) add a window; GDPO normalises several rewards one by one.
log-densities are means over the latent, as in all of the official code, so that clip ranges carry over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from align.common import rng
from align.data.prompts import PromptBatch
from align.diffusion.process import Reduction, append_dims, reduce_dims
from align.families import Family
from align.objectives.objective import Context, Metrics, Objective, Plan
from align.objectives.online import advantages
from align.objectives.online.advantages import ScaleRewards
from align.objectives.online.collect import Rollout, draw
from align.objectives.online.replay import replay_step, require_on_policy
from align.objectives.rows import Rows
from align.sampling.sampler import Sampler, SDEWindow, count_trained, grid_of


@dataclass
class PolicyGradient(Objective):
    """Clipped policy gradient on pictures that the policy draws.

    Args:
        sampler: how pictures are drawn.
        images_per_prompt: pictures of each prompt in a rollout, over all processes (Flow-GRPO: 24).
        clip_range: of the likelihood ratio, in the convention of ``reduction`` (official: 1e-4).
        adv_clip_max: advantages are cut to this size.
        advantage: ``group`` compares the pictures of a prompt; ``history`` is DDPO's statistics per prompt; ``batch``
            compares the whole rollout.
        scale_rewards: what ``group`` divides by: the std of the ``group``, of all (``batch``, Flow-GRPO), or ``none``.
        rewards: normalise the ``sum`` of the weighted rewards, or ``each`` of them (GDPO).
        history_size: scores a prompt's statistics remember (DDPO: 16); ``history_min_count``: how many they need.
        history_min_count: below it the rollout's own statistics serve.
        timestep_fraction: the share of the steps that is trained (Flow-GRPO: 0.99, all but the last).
        timestep_choice: the ``first`` so many, or as many at ``random`` for every picture (DanceGRPO).
        window: draw and train a window of steps only; the others are deterministic.
        shared_noise: all pictures of a prompt start from one noise (DanceGRPO).
        beta: weight of the KL to the reference; 0 asks the reference nothing.
        kl: ``exact``, or as Flow-GRPO's code has it (``flow_grpo``: the step's length left out of the variance).
        step_normalisation: ``none``, or GRPO-Guard's (arXiv 2510.22319, eq. 8-10) ``guard``: the log-ratio freed of
            its bias and scaled by the step's std, the loss divided by the step's length.
        reduction: log-densities as a ``mean`` over the latent (official) or their ``sum``.
    """

    sampler: Sampler = field(default_factory=Sampler)
    images_per_prompt: int = 8
    clip_range: float = 1e-4
    adv_clip_max: float = 5.0
    advantage: Literal["group", "history", "batch"] = "group"
    scale_rewards: ScaleRewards = "batch"
    rewards: Literal["sum", "each"] = "sum"
    history_size: int = 16
    history_min_count: int = 16
    timestep_fraction: float = 1.0
    timestep_choice: Literal["first", "random"] = "first"
    window: SDEWindow | None = None
    shared_noise: bool = False
    beta: float = 0.0
    kl: Literal["exact", "flow_grpo"] = "exact"
    step_normalisation: Literal["none", "guard"] = "none"
    reduction: Reduction = "mean"

    batch_types: ClassVar[tuple[type, ...]] = (PromptBatch,)
    online: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.advantage == "group" and self.images_per_prompt < 2:
            raise ValueError("a group of one picture has no advantage: images_per_prompt must be at least 2")
        if self.clip_range <= 0 or self.adv_clip_max <= 0 or self.beta < 0:
            raise ValueError("clip_range and adv_clip_max must be positive, beta at least 0")
        count_trained(self.sampler, self.window, self.timestep_fraction)
        self.history = advantages.PromptHistory(self.history_size, "score")

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0

    @property
    def group(self) -> int:
        return self.images_per_prompt

    @property
    def trained_steps(self) -> int:
        """Steps of each picture that are trained."""
        return count_trained(self.sampler, self.window, self.timestep_fraction)

    @property
    def keeps_means(self) -> bool:
        """Whether the loss needs the means of the steps as they were drawn."""
        return self.step_normalisation == "guard"

    def plan(self, family: Family, resolution: int | None) -> Plan:
        size, each = math.prod(family.latent_shape(resolution)), self.sampler.evaluations(family)
        rows = self.trained_steps
        frozen = (self.sampler.num_inference_steps + (rows if self.beta else 0)) * each
        kernel = self.sampler.kernel_of(family)
        nats = self.clip_range * (size if self.reduction == "mean" else 1)
        notes = {
            "sampler": f"{self.sampler.num_inference_steps} steps of {kernel}, {rows} trained, guidance "
            f"{self.sampler.guidance_scale_of(family):g}",
            "clip range": f"{self.clip_range:g} ({self.reduction} over D={size}) = {nats:.3g} nats of a step's density",
        }
        return Plan(rows * each, frozen, rows, notes)

    def rollout(self, ctx: Context, batch: PromptBatch) -> Rows:
        total = self.sampler.num_inference_steps
        window = self.window.steps(total, ctx.seed, ctx.step) if self.window else None
        first = range(self.trained_steps) if self.timestep_choice == "first" else range(total)
        keep = window if window is not None else first
        drawn = draw(ctx, self.sampler, batch, self.group, keep, window, self.shared_noise, means=self.keeps_means)
        count, kept = len(drawn.groups), len(keep)
        if self.timestep_choice == "random" and window is None:
            order = rng.normal((kept,), ctx.generators("timesteps")).argsort(1)
            step = order[:, : self.trained_steps].sort(1).values
        else:
            step = torch.arange(kept).expand(count, kept)
        own, metrics = self.compute_advantages(ctx, drawn)
        return self.table(drawn, own, step, metrics)

    def compute_advantages(self, ctx: Context, drawn: Rollout) -> tuple[Tensor, dict[str, float]]:
        """(N,) advantages of this process's pictures, from the scores of all, and what the rollout measured."""
        assert ctx.scorer is not None
        scores = {name: ctx.gather(values).double() for name, values in drawn.scores.items()}
        groups, total = ctx.gather(drawn.groups), ctx.scorer.total(scores)
        if self.rewards == "each":
            all_of = advantages.combine(scores, ctx.scorer.weights, groups, self.scale_rewards)
        elif self.advantage == "group":
            all_of = advantages.group_advantages(total, groups, self.scale_rewards)
        elif self.advantage == "history":
            texts = ctx.gather_text(drawn.prompts)
            all_of = advantages.tracked_advantages(total, texts, self.history, self.history_min_count)
        else:
            all_of = advantages.batch_advantages(total)
        metrics = {
            **drawn.metrics,
            "reward/total": total.mean().item(),
            "zero_std_share": advantages.zero_std_mask(total, groups).double().mean().item(),
            "advantage_std": all_of.std(correction=0).item(),
        }
        mine = all_of[ctx.sample_indices[0] : ctx.sample_indices[-1] + 1]
        return mine.clamp(-self.adv_clip_max, self.adv_clip_max).float(), metrics

    def table(self, drawn: Rollout, own: Tensor, step: Tensor, metrics: Mapping[str, float]) -> Rows:
        """One row for each step ``step`` (N, k) of every picture."""
        image = torch.arange(len(step)).repeat_interleave(step.shape[1])
        return Rows({"step": step.flatten()}, {**drawn.columns, "advantage": own}, image, metrics)

    def loss(self, ctx: Context, rows: Rows) -> tuple[Tensor, Metrics]:
        step, picture, images = rows.tensor("step"), rows.image, rows.images
        new, y = replay_step(ctx, self.sampler, images, picture, step)
        advantage = rows.tensor("advantage").to(y.device)
        old = images["log_probs"][picture, step].to(y.device)  # type: ignore[index]
        log_ratio = new.log_prob(y, "mean") - old
        weight = torch.ones_like(log_ratio)
        if self.step_normalisation == "guard":
            mean = images["means"][picture, step].to(y.device)  # type: ignore[index]
            log_ratio = reduce_dims((new.mean - mean) * (y - mean) / append_dims(new.std, y), "mean")
            weight = 1 / self.lengths(ctx, images, step).to(y.device)
        elif self.reduction == "sum":
            log_ratio = log_ratio * y[0].numel()
        ratio = log_ratio.exp()
        if ctx.on_policy:
            require_on_policy(ratio, ctx.tolerance)
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        loss = (weight * torch.maximum(-advantage * ratio, -advantage * clipped)).mean()
        with torch.no_grad():
            active = torch.where(advantage > 0, ratio > 1 + self.clip_range, ratio < 1 - self.clip_range)
            metrics: Metrics = {
                "approx_kl": 0.5 * log_ratio.square().mean(),
                "ratio_mean": ratio.mean(),
                "ratio_max": ratio.max(),
                "clip_fraction": (active & (advantage != 0)).float().mean(),
            }
        if self.beta:
            with torch.no_grad(), ctx.policy.reference():
                reference, _ = replay_step(ctx, self.sampler, images, picture, step)
            divergence = new.kl(reference, self.reduction)
            if self.kl == "flow_grpo":
                divergence = divergence * self.lengths(ctx, images, step).to(y.device)
            loss = loss + self.beta * divergence.mean()
            metrics["kl_reference"] = divergence.mean().detach()
        return loss, metrics

    def lengths(self, ctx: Context, images: Mapping[str, Any], step: Tensor) -> Tensor:
        """(R,) |dt| of the rows' steps, in units of sigma."""
        sigma = grid_of(ctx.policy.family, self.sampler.num_inference_steps).sigma
        i = images["steps"][step]
        return (sigma[i] - sigma[i + 1]).abs()

    def state(self) -> dict[str, Any]:
        return self.history.state() if self.advantage == "history" else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        if state:
            self.history.load_state(state)
