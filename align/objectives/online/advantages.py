"""From rewards to advantages: pure functions, the running statistics per prompt that two papers keep, and which of
these a rollout uses.

Rewards and groups are those of the whole rollout, over all processes: (N,) each, in the order of the images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from align.objectives.objective import Context
from align.objectives.online.collect import Rollout

ScaleRewards = Literal["group", "batch", "none"]
Advantage = Literal["group", "history", "batch"]


def group_means(values: Tensor, groups: Tensor) -> Tensor:
    """(N,) the mean of ``values`` over each element's group."""
    _, index = torch.unique(groups, return_inverse=True)
    count = torch.zeros(int(index.max()) + 1, dtype=values.dtype).index_add(0, index, torch.ones_like(values))
    return (torch.zeros_like(count).index_add(0, index, values) / count)[index]


def zero_std_mask(values: Tensor, groups: Tensor) -> Tensor:
    """(N,) whether all of an element's group have one and the same value: such a group teaches nothing."""
    _, index = torch.unique(groups, return_inverse=True)
    size = int(index.max()) + 1
    low = torch.full((size,), torch.inf, dtype=values.dtype).scatter_reduce(0, index, values, "amin")
    high = torch.full((size,), -torch.inf, dtype=values.dtype).scatter_reduce(0, index, values, "amax")
    return (low == high)[index]


def group_advantages(
    rewards: Tensor, groups: Tensor, scale_rewards: ScaleRewards = "group", eps: float = 1e-4
) -> Tensor:
    """(N,) ``(r - mean of its group) / (std + eps)``, and exactly 0 where a group's rewards are all alike.

    ``scale_rewards``: the std of the group (GRPO), of the whole batch (Flow-GRPO's ``global_std``), or none (Dr. GRPO).
    Standard deviations are the population's (ddof 0), as Flow-GRPO's.
    """
    centred = rewards - group_means(rewards, groups)
    if scale_rewards == "group":
        scale = group_means(centred.square(), groups).sqrt() + eps
    else:
        scale = rewards.std(correction=0) + eps if scale_rewards == "batch" else torch.ones(())
    return torch.where(zero_std_mask(rewards, groups), 0.0, centred / scale)


def batch_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """(N,) normalised over the whole rollout, whatever the prompt (DDPO without per-prompt statistics)."""
    return (rewards - rewards.mean()) / (rewards.std(correction=0) + eps)


class PromptHistory:
    """The scores that each prompt has had: DDPO's running per-prompt statistics and B2-DiffuRL's stage history.

    ``limit`` counts scores (``by="score"``: DDPO's buffer of 16) or calls of :meth:`add` in which the prompt need
    not appear (``by="stage"``: B2's last 8 stages).
    """

    def __init__(self, limit: int, by: Literal["score", "stage"]) -> None:
        self.limit, self.by = limit, by
        self.stages: list[dict[str, list[float]]] = []

    def add(self, prompts: Sequence[str], scores: Sequence[float]) -> None:
        """Remember the scores of one rollout, and forget what is beyond the limit."""
        stage: dict[str, list[float]] = {}
        for prompt, score in zip(prompts, scores, strict=True):
            stage.setdefault(prompt, []).append(float(score))
        if self.by == "stage":
            self.stages = [*self.stages, stage][-self.limit :] if self.limit else []
            return
        kept = self.stages[0] if self.stages else {}
        self.stages = [kept | {p: [*kept.get(p, []), *values][-self.limit :] for p, values in stage.items()}]

    def of(self, prompt: str) -> list[float]:
        """All scores that are remembered for ``prompt``, oldest first."""
        return [score for stage in self.stages for score in stage.get(prompt, [])]

    def state(self) -> dict[str, Any]:
        return {"stages": self.stages}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.stages = [dict(stage) for stage in state["stages"]]


def tracked_advantages(
    rewards: Tensor, prompts: Sequence[str], history: PromptHistory, min_count: int, eps: float = 1e-6
) -> Tensor:
    """(N,) DDPO's: by a prompt's own running statistics once it has ``min_count`` scores, till then by the rollout's.

    The history takes the scores in first, as the official tracker does.
    """
    history.add(prompts, rewards.tolist())
    advantages = batch_advantages(rewards, eps)
    for k, prompt in enumerate(prompts):
        past = torch.tensor(history.of(prompt), dtype=rewards.dtype)
        if len(past) >= min_count:
            advantages[k] = (rewards[k] - past.mean()) / (past.std(correction=0) + eps)
    return advantages


def staged_advantages(rewards: Tensor, prompts: Sequence[str], history: PromptHistory, eps: float = 1e-8) -> Tensor:
    """(N,) B2-DiffuRL's: by the prompt's scores of this stage and of the stages remembered (ddof 1); this stage's
    are remembered afterwards. 0 where a prompt has had a single score or all were alike."""
    advantages = torch.zeros_like(rewards)
    for prompt in dict.fromkeys(prompts):
        members = torch.tensor([k for k, other in enumerate(prompts) if other == prompt])
        pool = torch.cat([torch.tensor(history.of(prompt), dtype=rewards.dtype), rewards[members]])
        if len(pool) > 1 and bool((pool != pool[0]).any()):
            advantages[members] = (rewards[members] - pool.mean()) / (pool.std() + eps)
    history.add(prompts, rewards.tolist())
    return advantages


def combine(
    scores: Mapping[str, Tensor],
    weights: Mapping[str, float],
    groups: Tensor,
    scale_rewards: ScaleRewards,
    eps: float = 1e-4,
) -> Tensor:
    """(N,) advantages from several rewards normalised one by one, then summed and normalised over the rollout
    (GDPO, Liu et al. 2026, eq. 6-8), so that a reward with a large scale does not drown the others; exactly 0 where a
    group's rewards are all alike."""
    total = sum(
        (weights[name] * group_advantages(scores[name], groups, scale_rewards, eps) for name in weights),
        torch.zeros(()),
    )
    alike = torch.stack([zero_std_mask(scores[name], groups) for name in weights]).all(0)
    return torch.where(alike, 0.0, (total - total.mean()) / (total.std(correction=0) + eps))


def calibrated_advantages(rewards: Tensor, groups: Tensor, expected: Tensor | None = None, eps: float = 1e-4) -> Tensor:
    """(N,) ``(r - expected) / (std of its group + eps)``, and 0 where a group's rewards are all alike. ``expected`` is
    (N,), or None for the leave-one-out mean: that of the group's other rewards."""
    centred = rewards - group_means(rewards, groups)
    scale = group_means(centred.square(), groups).sqrt()
    if expected is not None:
        centred = rewards - expected
    else:
        count = groups.bincount()[groups]
        centred = centred * count / (count - 1)  # the mean of the others, not of all
    return torch.where(scale > 0, centred / (scale + eps), 0.0)


@dataclass(frozen=True)
class AdvantageRule:
    """What an image's rewards are compared with: those of its ``group``, its prompt's ``history`` (which has to have
    ``history_min_count`` scores) or the whole ``batch``; ``each`` reward by itself (GDPO), or their sum."""

    advantage: Advantage
    scale_rewards: ScaleRewards
    each: bool
    history_min_count: int

    def __call__(self, ctx: Context, rollout: Rollout, history: PromptHistory) -> tuple[Tensor, dict[str, float]]:
        """(N,) advantages of this process's images, from the scores of all, and what they tell of the rollout."""
        scores = {name: ctx.gather(values).double() for name, values in rollout.scores.items()}
        groups, total = ctx.gather(rollout.groups), ctx.rewards.total(scores)
        if self.each:
            global_advantages = combine(ctx.rewards.normalized(scores), ctx.rewards.weights, groups, self.scale_rewards)
        elif self.advantage == "group":
            global_advantages = group_advantages(total, groups, self.scale_rewards)
        elif self.advantage == "history":
            texts = ctx.gather_text(rollout.prompts)
            global_advantages = tracked_advantages(total, texts, history, self.history_min_count)
        else:
            global_advantages = batch_advantages(total)
        return ctx.local(global_advantages), {
            "reward/total": total.mean().item(),
            "zero_std_share": zero_std_mask(total, groups).double().mean().item(),
            "advantage_std": global_advantages.std(correction=0).item(),
        }
