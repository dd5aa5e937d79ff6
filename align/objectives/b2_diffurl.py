"""B²-DiffuRL (Hu et al. 2025): train the last steps first, and compare pictures that differ in nothing else.

A reward comes only at the end of a trajectory. Backward progressive training trains the last k of N steps and lets k
grow from stage to stage; branch-based sampling draws the first N - k steps of a prompt once, forks there, and keeps
the best and the worst branch, whose difference is then due to the trained steps alone. Both are ways to roll out, so
this objective wraps the one whose update is to be used: :class:`PolicyGradient` (as released) or :class:`D3PO`, whose
pairs are then best over worst.

Official schedule: k_i = L + floor((R - L + 1) i / S) with (L, R, S) = (14, 20, 100) of N = 20 steps, stage i being one
rollout. Selection is by scores normalised per prompt over this stage and the last 8, not within the branch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from align.data.prompts import PromptBatch
from align.families import Family
from align.objectives.d3po import D3PO
from align.objectives.objective import Context, Metrics, Objective, Plan
from align.objectives.online.advantages import PromptHistory, staged_advantages
from align.objectives.online.collect import Rollout, Start, draw, initial, noise_of
from align.objectives.policy_gradient import PolicyGradient
from align.objectives.rows import Rows
from align.sampling.loop import sample


@dataclass
class B2DiffuRL(Objective):
    """Backward progressive training and branch-based sampling over another objective's update.

    Args:
        update: the update rule, PolicyGradient or D3PO, with its sampler. Its ``images_per_prompt`` is the number of
            branches.
        progressive: train the last k steps only, k growing; else all steps, from the start.
        branches: fork the trajectory where training begins and select; else every picture has a noise of its own.
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

    batch_types: ClassVar[tuple[type, ...]] = (PromptBatch,)
    online: ClassVar[bool] = True
    whole_groups: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.update, PolicyGradient | D3PO):
            raise ValueError(f"update must be PolicyGradient or D3PO, got {type(self.update).__name__}")
        total = self.rule.sampler.num_inference_steps
        if self.progressive and not 1 <= self.first <= total:
            raise ValueError(f"first must be between 1 and the sampler's {total} steps, got {self.first}")
        if self.stages < 1 or self.history < 0:
            raise ValueError(f"stages must be at least 1 and history at least 0, got {self.stages}, {self.history}")
        if self.rule.window:
            raise ValueError("B2DiffuRL chooses the trained steps itself: leave the update's window unset")
        self.scores = PromptHistory(self.history, "stage")

    @property
    def rule(self) -> PolicyGradient | D3PO:
        """The update rule, as what it is."""
        assert isinstance(self.update, PolicyGradient | D3PO)
        return self.update

    @property
    def needs_reference(self) -> bool:
        return self.update.needs_reference

    @property
    def reference(self) -> str:
        return self.update.reference

    @property
    def group(self) -> int:
        return self.rule.images_per_prompt

    def interval(self, stage: int) -> range:
        """The trained steps of stage ``stage``: the last k of N."""
        total = self.rule.sampler.num_inference_steps
        grown = self.first + (total - self.first + 1) * stage // self.stages
        return range(total - (min(grown, total) if self.progressive else total), total)

    def evaluations(self, prompts: int, stage: int, guided: bool = True) -> int:
        """Network evaluations of a rollout over ``prompts`` prompts (invariant I8)."""
        k, total = len(self.interval(stage)), self.rule.sampler.num_inference_steps
        prefix = total - k if self.branches else self.group * (total - k)
        return prompts * (prefix + self.group * k) * (2 if guided else 1)

    def plan(self, family: Family, resolution: int | None) -> Plan:
        inner = self.update.plan(family, resolution)
        ends = [len(self.interval(stage)) for stage in (0, self.stages - 1)]
        notes = {
            "trained steps": f"the last {ends[0]}, growing to {ends[1]} over {self.stages} rollouts",
            "branches": f"{self.group} a prompt, best from {self.threshold_best:g}, worst below "
            f"-{self.threshold_worst:g}"
            if self.branches
            else "none",
        }
        return Plan(inner.trained, inner.frozen, None, dict(inner.notes) | notes)

    def rollout(self, ctx: Context, batch: PromptBatch) -> Rows:
        steps = self.interval(ctx.step)
        start = self.prefix(ctx, batch, steps.start) if self.branches and steps.start else None
        shared = self.branches or self.rule.shared_noise
        means = isinstance(self.rule, PolicyGradient) and self.rule.keeps_means
        drawn = draw(ctx, self.rule.sampler, batch, self.group, steps, None, shared, start, means)
        assert ctx.scorer is not None
        total = ctx.gather(ctx.scorer.total(drawn.scores)).double()
        all_of = staged_advantages(total, ctx.gather_text(drawn.prompts), self.scores)
        own = all_of[ctx.sample_indices[0] : ctx.sample_indices[-1] + 1].float()
        chosen = self.select(own, drawn.groups) if self.branches else torch.ones_like(own, dtype=torch.bool)
        metrics = drawn.metrics | {
            "reward/total": total.mean().item(),
            "trained_steps": float(len(steps)),
            "selected_share": ctx.gather(chosen.float()).mean().item(),
        }
        return self.table(ctx, drawn, own, chosen, metrics)

    def prefix(self, ctx: Context, batch: PromptBatch, end: int) -> Start:
        """Every prompt's trajectory up to step ``end``, drawn once, and seen by each of its branches."""
        family, sampler = ctx.policy.family, self.rule.sampler
        prompts = sorted({position // self.group for position in ctx.sample_indices})
        shape, grid = family.latent_shape(ctx.resolution), family.grid(sampler.num_inference_steps)
        states = []
        for part in torch.arange(len(prompts)).split(sampler.batch_size):
            numbers = [prompts[k] for k in part.tolist()]
            x = sample(
                ctx.policy.predict,
                grid,
                batch.cond.take(part).to(family.device),
                initial(ctx, numbers, shape).to(family.device),
                sampler.guidance_scale_of(family),
                sampler.kernel_of(family),
                noise_of(ctx, numbers, "prefix", shape),
                steps=range(end),
            )
            states.append(x)
        return Start(torch.cat(states).repeat_interleave(self.group, 0), end)

    def select(self, scores: Tensor, groups: Tensor) -> Tensor:
        """(N,) which pictures are kept: of each group the best and the worst, where they pass their thresholds."""
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        for group in torch.unique(groups):
            members = (groups == group).nonzero().flatten()
            best, worst = members[scores[members].argmax()], members[scores[members].argmin()]
            chosen[best] |= scores[best] >= self.threshold_best
            chosen[worst] |= scores[worst] < -self.threshold_worst
        return chosen

    def table(self, ctx: Context, drawn: Rollout, own: Tensor, chosen: Tensor, metrics: dict[str, float]) -> Rows:
        """The rows that the update rule trains on: the chosen pictures, or pairs of them."""
        if isinstance(self.rule, D3PO):
            return self.rule.table(ctx, drawn.columns, self.pairs(own, drawn.groups, chosen), metrics)
        own = torch.where(own > 0, self.weight_best, self.weight_worst) * own
        limit = self.rule.adv_clip_max
        step = torch.arange(len(drawn.kept)).expand(len(own), -1)
        whole = self.rule.table(drawn, own.clamp(-limit, limit), step, metrics)
        return whole.take(chosen[whole.image].nonzero().flatten())

    def pairs(self, scores: Tensor, groups: Tensor, chosen: Tensor) -> Tensor:
        """(P, 2) best over worst of each group of which both are chosen and differ."""
        found = []
        for group in torch.unique(groups):
            members = ((groups == group) & chosen).nonzero().flatten()
            if len(members) > 1:
                best, worst = members[scores[members].argmax()], members[scores[members].argmin()]
                if scores[best] > scores[worst]:
                    found.append((int(best), int(worst)))
        return torch.tensor(found, dtype=torch.long).reshape(-1, 2)

    def loss(self, ctx: Context, rows: Rows) -> tuple[Tensor, Metrics]:
        return self.update.loss(ctx, rows)

    def state(self) -> dict[str, Any]:
        return self.scores.state()

    def load_state(self, state: Any) -> None:
        self.scores.load_state(state)
