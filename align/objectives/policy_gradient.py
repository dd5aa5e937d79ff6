"""The clipped policy gradient through the sampler: DDPO, Flow-GRPO and their kin are settings of it.

A sampler is a Markov decision process whose action is the next latent and whose reward comes at the end
(DDPO, Black et al. 2023, §4; Flow-GRPO, Liu et al. 2025, arXiv 2505.05470, §4). With the advantage A of a image
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
from typing import Any, Literal

import torch
from torch import Tensor

from align.common.errors import require_at_least
from align.data.prompts import PromptBatch
from align.diffusion.process import Reduction, upload
from align.families import Family, Resolution, sides
from align.objectives.losses import clip_fraction, clipped_surrogate, masked_surrogate, ratio_metrics
from align.objectives.objective import Context, Cost, KeepsState, Metrics, Needs, Objective, Reference
from align.objectives.online import replay
from align.objectives.online.advantages import Advantage, AdvantageRule, PromptHistory, ScaleRewards
from align.objectives.online.collect import Rollout, collect
from align.objectives.rows import SHARED, Rows
from align.sampling.sampler import Sampler, SDEWindow, count_trained, reach
from align.sampling.trajectory import Trajectories


@dataclass(frozen=True, kw_only=True)
class PolicyGradientRows(Rows):
    """R steps of images: ``step`` (R,) counts the kept steps of ``trajectories``, which hold log-densities."""

    step: Tensor
    trajectories: Trajectories = field(metadata=SHARED)
    advantage: Tensor = field(metadata=SHARED)  # (N,) of each image


@dataclass
class PolicyGradient(Objective, KeepsState):
    """Clipped policy gradient on images that the policy draws.

    Args:
        sampler: how images are drawn.
        images_per_prompt: images of each prompt in a rollout, over all processes (Flow-GRPO: 24).
        clip_range: of the likelihood ratio, in the convention of ``reduction`` (official: 1e-4).
        adv_clip_max: advantages are cut to this size.
        advantage: over a prompt's images (``group``), DDPO's statistics per prompt (``history``), or all (``batch``).
        scale_rewards: what ``group`` divides by: the std of the ``group``, of all (``batch``, Flow-GRPO), or ``none``.
        rewards: normalise the ``sum`` of the weighted rewards, or ``each`` of them (GDPO).
        history_size: scores a prompt's statistics remember (DDPO: 16).
        history_min_count: of fewer scores, the rollout's own statistics serve.
        timestep_fraction: the share of the steps that trains, from the first on (Flow-GRPO: 0.99, without the last).
        window: draw and train a window of steps only; the others are deterministic.
        shared_noise: all images of a prompt start from one noise (DanceGRPO).
        beta: weight of the KL to the reference; 0 asks the reference nothing.
        kl: ``exact``, or as Flow-GRPO's code has it (``flow_grpo``: the step's length left out of the variance).
        step_normalisation: ``none``; ``guard`` (GRPO-Guard, arXiv 2510.22319): log-ratios without bias, scaled by the
            step's std, losses over its length; ``noise`` (TempFlow-GRPO, arXiv 2508.04324): losses by the std, mean 1.
        trust_region: ``clip``, or Flow-DPPO's mask ``kl`` (arXiv 2606.11025), which has no ratio clipped.
        kl_threshold: of the KL from the step as it was drawn, in the convention of ``reduction`` (official: 1e-5).
        reduction: log-densities as a ``mean`` over the latent (official) or their ``sum``.
        reference: ``base``, or ``start``, the ``initial_weights`` of this run.
    """

    sampler: Sampler = field(default_factory=Sampler)
    images_per_prompt: int = 8
    clip_range: float = 1e-4
    adv_clip_max: float = 5.0
    advantage: Advantage = "group"
    scale_rewards: ScaleRewards = "batch"
    rewards: Literal["sum", "each"] = "sum"
    history_size: int = 16
    history_min_count: int = 16
    timestep_fraction: float = 1.0
    window: SDEWindow | None = None
    shared_noise: bool = False
    beta: float = 0.0
    kl: Literal["exact", "flow_grpo"] = "exact"
    step_normalisation: replay.StepNormalisation = "none"
    trust_region: Literal["clip", "kl"] = "clip"
    kl_threshold: float = 1e-5
    reduction: Reduction = "mean"
    reference: Reference = "base"

    def __post_init__(self) -> None:
        if self.advantage == "group" and self.images_per_prompt < 2:
            raise ValueError("a group of one picture has no advantage: images_per_prompt must be at least 2")
        if min(self.clip_range, self.adv_clip_max, self.kl_threshold) <= 0 or self.beta < 0:
            raise ValueError("clip_range, adv_clip_max and kl_threshold must be positive, beta at least 0")
        require_at_least(max(1, self.history_min_count), self, "history_size")  # or no prompt ever has enough
        count_trained(self.sampler, self.window, self.timestep_fraction)
        self.history = PromptHistory(self.history_size, "score")

    @property
    def needs(self) -> Needs:
        return Needs((PromptBatch,), self.beta > 0, rewards=True, group_size=self.images_per_prompt, online=True)

    @property
    def trained_steps(self) -> int:  # of each image, where each has noise
        return count_trained(self.sampler, self.window, self.timestep_fraction)

    @property
    def keeps_means(self) -> bool:  # of the steps as they were drawn
        return self.step_normalisation == "guard" or self.trust_region == "kl"

    def cost(self, family: Family, resolution: Resolution) -> Cost:
        size, each = math.prod(family.latent_shape(*sides(resolution))), self.sampler.evaluations(family)
        rows = count_trained(self.sampler, self.window, self.timestep_fraction, family)
        frozen = (self.sampler.num_inference_steps + (rows if self.beta else 0)) * each
        limits = {"clip": ("clip range", self.clip_range), "kl": ("KL limit", self.kl_threshold)}
        (name, limit), summed = limits[self.trust_region], size if self.reduction == "mean" else 1
        nats = f"{limit:g} ({self.reduction} over D={size}) = {limit * summed:.3g} nats of a step's density"
        return Cost(rows * each, frozen, rows, {"sampler": self.sampler.describe(family, rows), name: nats})

    def rollout(self, ctx: Context, batch: PromptBatch) -> Rows:
        total, group_size = self.sampler.num_inference_steps, self.images_per_prompt
        window = self.window.steps(total, ctx.seed, ctx.step) if self.window else None
        keep, means = window if window is not None else range(self.trained_steps), self.keeps_means
        rollout = collect(ctx, self.sampler, batch, group_size, keep, window, self.shared_noise, means=means)
        step = torch.arange(len(rollout.trajectories.kept_steps)).expand(len(rollout.groups), -1)
        rule = AdvantageRule(self.advantage, self.scale_rewards, self.rewards == "each", self.history_min_count)
        advantage, metrics = rule(ctx, rollout, self.history)
        advantage = advantage.clamp(-self.adv_clip_max, self.adv_clip_max).float()
        return self.rows_of(rollout, advantage, step, rollout.metrics | metrics)

    def rows_of(self, rollout: Rollout, advantage: Tensor, step: Tensor, metrics: Mapping[str, float]) -> Rows:
        """One row for each step ``step`` (N, k) of every image, whose advantage is ``advantage`` (N,). In a group, an
        image without advantage gives none, as in Flow-GRPO's code: it would cost as much as another, and with ``beta``
        hold the policy back by its share of the batch."""
        image = torch.arange(len(step)) if self.advantage != "group" else (advantage != 0).nonzero().flatten()
        rows = {"image": image.repeat_interleave(step.shape[1]), "step": step[image].flatten()}
        return PolicyGradientRows(**rows, trajectories=rollout.trajectories, advantage=advantage, metrics=metrics)

    def loss(self, ctx: Context, rows: PolicyGradientRows) -> tuple[Tensor, Metrics]:
        drawn = rows.trajectories, rows.image, rows.step
        new, y = replay.replay_step(ctx, self.sampler, *drawn)
        advantage, guard = upload(rows.advantage[rows.image], y.device), self.step_normalisation == "guard"
        log_ratio = replay.log_ratios(new, y, *drawn, guard, self.reduction)
        ratio = log_ratio.exp()
        if ctx.on_policy:
            replay.require_on_policy(ctx, ratio)
        if self.trust_region == "clip":
            surrogate = clipped_surrogate(ratio, advantage, self.clip_range)
            outside = clip_fraction(ratio, advantage, self.clip_range)
        else:
            kl_old = replay.drawn_kl(new, *drawn, self.reduction)
            surrogate, outside = masked_surrogate(ratio, advantage, kl_old, self.kl_threshold)
        among = reach(self.sampler, self.window, self.timestep_fraction)
        loss = (replay.step_weights(ctx, self.sampler, *drawn, self.step_normalisation, among) * surrogate).mean()
        metrics = ratio_metrics(log_ratio) | {"clip_fraction": outside}
        if self.beta:
            kl = replay.reference_kl(ctx, self.sampler, *drawn, new, self.reduction, self.kl == "exact")
            loss, metrics["kl_reference"] = loss + self.beta * kl.mean(), kl.mean().detach()
        return loss, metrics

    def state(self) -> dict[str, Any]:
        return self.history.state() if self.advantage == "history" else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        if state:
            self.history.load_state(state)
