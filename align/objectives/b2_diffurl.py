"""B²-DiffuRL (Hu et al. 2025): train the last steps first, and compare images that differ in nothing else.

A reward comes only at the end of a trajectory. Backward progressive training trains the last k of N steps and lets k
grow from stage to stage; branch-based sampling draws the first N - k steps of a prompt once, forks there, and keeps
the best and the worst branch, whose difference is then due to the trained steps alone. Both are ways to roll out, so
this objective wraps the one whose update is to be used: :class:`PolicyGradient` (as released) or :class:`D3PO`, whose
pairs are then best over worst.

With the scores r of a prompt's images over this stage and the last 8, an image's advantage is

    A = (r - mean) / (std + 1e-8),    its group's best kept if A >= threshold_best, its worst if A < -threshold_worst

and the loss is that of the update rule on what is kept.

Official schedule: k_i = L + floor((R - L + 1) i / S) with (L, R, S) = (14, 20, 100) of N = 20 steps, stage i being one
rollout. Selection is by scores normalised per prompt over this stage and the last 8, not within the branch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from align.common.errors import require_at_least
from align.data.prompts import PromptBatch
from align.families import Family, Resolution
from align.objectives.d3po import D3PO
from align.objectives.objective import Context, Cost, KeepsState, Metrics, Needs, Objective, Reference
from align.objectives.online.advantages import PromptHistory, staged_advantages
from align.objectives.online.collect import Rollout, collect, collect_prefix
from align.objectives.online.pairs import best_over_worst
from align.objectives.policy_gradient import PolicyGradient
from align.objectives.rows import Rows


@dataclass
class B2DiffuRL(Objective, KeepsState):
    """Backward progressive training and branch-based sampling over another objective's update.

    Args:
        update: the update rule, PolicyGradient or D3PO, with its sampler. Its ``images_per_prompt`` is the number of
            branches.
        progressive: train the last k steps only, k growing; else all steps, from the start.
        branches: fork the trajectory where training begins and select; else every image has a noise of its own.
        first: L, the trained steps of the first stage.
        stages: S, the number of rollouts over which they grow to all.
        threshold_best: the best branch is kept from this normalised score on (official run: 0.5).
        threshold_worst: the worst is kept below minus this (official run: 0.5).
        history: stages whose scores a prompt's statistics remember.
        weight_best: factor of the advantages above 0 (official beta1).
        weight_worst: factor of the others (official beta2).
    """

    update: Objective
    progressive: bool = True
    branches: bool = True
    first: int = 14
    stages: int = 100
    threshold_best: float = 0.5
    threshold_worst: float = 0.5
    history: int = 8
    weight_best: float = 1.0
    weight_worst: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.update, PolicyGradient | D3PO):
            raise ValueError(f"update must be PolicyGradient or D3PO, got {type(self.update).__name__}")
        total = self.rule.sampler.num_inference_steps
        if self.progressive and not 1 <= self.first <= total:
            raise ValueError(f"first must be between 1 and the sampler's {total} steps, got {self.first}")
        require_at_least(1, self, "stages")
        require_at_least(0, self, "history", "weight_best", "weight_worst")
        if self.rule.window:
            raise ValueError("B2DiffuRL chooses the trained steps itself: leave the update's window unset")
        self.scores = PromptHistory(self.history, "stage")

    @property
    def rule(self) -> PolicyGradient | D3PO:
        """The update rule, as what it is."""
        assert isinstance(self.update, PolicyGradient | D3PO)
        return self.update

    @property
    def needs(self) -> Needs:
        return replace(self.update.needs, batch_types=(PromptBatch,), whole_groups=True)

    @property
    def reference(self) -> Reference:
        return self.rule.reference

    def interval(self, stage: int) -> range:
        """The trained steps of stage ``stage``: the last k of N."""
        total = self.rule.sampler.num_inference_steps
        grown = self.first + (total - self.first + 1) * stage // self.stages
        return range(total - (min(grown, total) if self.progressive else total), total)

    def evaluations(self, prompts: int, stage: int, guided: bool = True) -> int:
        """Network evaluations of a rollout over ``prompts`` prompts."""
        k, total = len(self.interval(stage)), self.rule.sampler.num_inference_steps
        prefix = total - k if self.branches else self.rule.images_per_prompt * (total - k)
        return prompts * (prefix + self.rule.images_per_prompt * k) * (2 if guided else 1)

    def cost(self, family: Family, resolution: Resolution) -> Cost:
        inner = self.update.cost(family, resolution)
        first, last = (len(self.interval(stage)) for stage in (0, self.stages - 1))
        selected = f"best from {self.threshold_best:g}, worst below -{self.threshold_worst:g}"
        notes = {
            "trained steps": f"the last {first}, growing to {last} over {self.stages} rollouts",
            "branches": f"{self.rule.images_per_prompt} a prompt, {selected}" if self.branches else "none",
        }
        return Cost(inner.trained, inner.frozen, None, dict(inner.notes) | notes)

    def rollout(self, ctx: Context, batch: PromptBatch) -> Rows:
        rule, steps, group_size = self.rule, self.interval(ctx.step), self.rule.images_per_prompt
        forked = self.branches and steps.start > 0
        start = collect_prefix(ctx, rule.sampler, batch, group_size, steps.start) if forked else None
        shared_noise = self.branches or rule.shared_noise
        means = isinstance(rule, PolicyGradient) and rule.keeps_means
        rollout = collect(ctx, rule.sampler, batch, group_size, steps, None, shared_noise, start, means)
        total = ctx.gather(ctx.rewards.total(rollout.scores)).double()
        advantage = ctx.local(staged_advantages(total, ctx.gather_text(rollout.prompts), self.scores)).float()
        chosen = self.select(advantage, rollout.groups) if self.branches else torch.ones_like(advantage).bool()
        metrics = rollout.metrics | {
            "reward/total": total.mean().item(),
            "trained_steps": float(len(steps)),
            "selected_share": ctx.gather(chosen.float()).mean().item(),
        }
        return self.rows_of(ctx, rollout, advantage, chosen, metrics)

    def select(self, scores: Tensor, groups: Tensor) -> Tensor:
        """(N,) which images are kept: of each group the best and the worst, where they pass their thresholds."""
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        for group in torch.unique(groups):
            members = (groups == group).nonzero().flatten()
            best, worst = members[scores[members].argmax()], members[scores[members].argmin()]
            chosen[best] |= scores[best] >= self.threshold_best
            chosen[worst] |= scores[worst] < -self.threshold_worst
        return chosen

    def rows_of(
        self, ctx: Context, rollout: Rollout, advantage: Tensor, chosen: Tensor, metrics: Mapping[str, float]
    ) -> Rows:
        """The rows that the update rule trains on: the chosen images, or pairs of them."""
        if isinstance(self.rule, D3PO):
            pairs = best_over_worst(advantage, rollout.groups, chosen)
            return self.rule.rows_of(ctx, rollout.trajectories, pairs, metrics)
        limit, weight = self.rule.adv_clip_max, torch.where(advantage > 0, self.weight_best, self.weight_worst)
        step = torch.arange(len(rollout.trajectories.kept_steps)).expand(len(advantage), -1)
        # clamped before they are weighted, as in the official code
        rows = self.rule.rows_of(rollout, weight * advantage.clamp(-limit, limit), step, metrics)
        return rows.take(chosen[rows.image].nonzero().flatten())

    def loss(self, ctx: Context, rows: Rows) -> tuple[Tensor, Metrics]:
        return self.update.loss(ctx, rows)

    def state(self) -> dict[str, Any]:
        return self.scores.state()

    def load_state(self, state: Any) -> None:
        self.scores.load_state(state)
