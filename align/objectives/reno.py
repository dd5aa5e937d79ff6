"""ReNO (Eyring et al. 2024, arXiv 2406.04312): one good initial noise for a prompt, by the reward's own gradient.

The gradient of a differentiable reward goes through decoder and sampler to the noise, which makes sense for samplers of
one or few steps; the chi prior of the norm, ``(d - 1) ln ||z|| - ||z||^2 / 2``, keeps the noise where the model has
seen it:

    loss = -(reward(decode(sample(z))) + prior_weight ((d - 1) ln ||z|| - ||z||^2 / 2))

The best iterate is kept, not the last. The paper: 50 steps of SGD with Nesterov momentum 0.9, learning rate 5,
gradients clipped to 0.1 (``sgd_momentum``, ``learning_rate``, ``max_grad_norm`` of a run), for one prompt: a loss is
the mean over an update's prompts, whose gradients are clipped together, so that these fit ``rollout_batch_size: 1``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.common import rng
from align.common.errors import UserError, require_at_least
from align.data.dataset import Data
from align.data.prompts import PromptBatch, Prompts
from align.families import Conditioning, Family, Resolution, sides
from align.objectives.objective import Context, Cost, Metrics, Needs, Objective, Prepares, TrainsModule
from align.objectives.online.rewards import Scorer
from align.objectives.rows import SHARED, Rows
from align.policy.initial_noise import FLOOR, NOISE_FILE, InitialNoise, write
from align.policy.policy import Policy
from align.sampling.loop import sample
from align.sampling.sampler import grid_of


class BestNoise(InitialNoise):
    """One noise a prompt, and the best there has been."""

    best: Tensor
    best_score: Tensor

    def __init__(self, prompts: Sequence[str], shape: tuple[int, int, int], source: str, scheduler: str, seed: int):
        super().__init__(prompts, shape, source, scheduler)
        start = rng.normal(shape, [rng.generator("reno", seed, prompt) for prompt in prompts])
        self.left["mean"].data = start
        self.left["log_std"].data.fill_(math.log(FLOOR))
        self.left["log_std"].requires_grad_(False)
        self.register_buffer("best", start.clone())
        self.register_buffer("best_score", torch.full((len(prompts),), -torch.inf))

    @torch.no_grad()
    def note(self, index: Tensor, z: Tensor, score: Tensor) -> None:
        """Keep ``z`` (B, C, h, w) of the prompts ``index`` where ``score`` (B,) is the best yet."""
        better = score > self.best_score[index]
        self.best[index[better]] = z[better].to(self.best)
        self.best_score[index[better]] = score[better].to(self.best_score)

    @torch.no_grad()
    def initial(self, prompts: Sequence[str], noise: Tensor) -> Tensor:
        """The best noise of every prompt that has one, whatever ``noise`` is."""
        moved = noise.clone()
        for k, prompt in enumerate(prompts):
            if prompt in self.prompts:
                moved[k] = self.best[self.prompts.index(prompt)]
        return moved

    def save(self, folder: Path) -> Path:
        return write(folder / NOISE_FILE, self, self.best.cpu(), torch.zeros_like(self.best).cpu())


@dataclass(frozen=True, kw_only=True)
class ReNORows(Rows):
    """R prompts: their numbers ``index`` (R,) and conditions; ``image`` is the place of each in the batch, and
    ``prompts`` and ``metadata`` what rewards want to know of it."""

    index: Tensor
    cond: Conditioning
    prompts: Sequence[str] = field(metadata=SHARED)
    metadata: Sequence[Mapping[str, Any]] = field(metadata=SHARED)


@dataclass
class ReNO(Objective, TrainsModule, Prepares):
    """Reward gradients to the initial noise, through the whole deterministic sampler.

    Args:
        num_inference_steps: sampler steps; memory grows with them (the paper: 1).
        guidance_scale: guidance scale; null is the pipeline's own.
        prior_weight: of the noise's chi log-density (paper: 0.01).
        noise_seed: names the noises that are started from.
    """

    num_inference_steps: int = 1
    guidance_scale: float | None = None
    prior_weight: float = 0.01
    noise_seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(1, self, "num_inference_steps")
        require_at_least(0, self, "guidance_scale", "prior_weight")

    @property
    def needs(self) -> Needs:
        return Needs((PromptBatch,), False, rewards=True, online=True)

    def trains(self, family: Family, data: Data) -> BestNoise:
        if not isinstance(data, Prompts):
            raise UserError(
                f"ReNO learns the noise of single prompts: expected data: Prompts, got {type(data).__name__}"
            )
        prompts = [row["prompt"] for row in data.read()]
        shape = family.latent_shape(*sides(data.resolution))
        return BestNoise(prompts, shape, family.source, family.scheduler_name, self.noise_seed)

    def prepare(self, policy: Policy, scorer: Scorer | None) -> None:
        if scorer and (blind := scorer.without_gradient):
            raise UserError(f"ReNO needs differentiable rewards, {', '.join(blind)} has no gradient; use FIND for it")

    def cost(self, family: Family, resolution: Resolution) -> Cost:
        each = family.evaluations(self._guidance(family))
        return Cost(self.num_inference_steps * each, 0)

    def rollout(self, ctx: Context, batch: PromptBatch) -> ReNORows:
        return ReNORows(
            image=torch.arange(len(batch.ids)),
            index=torch.tensor(batch.ids),
            cond=batch.cond,
            prompts=batch.prompts,
            metadata=batch.metadata,
        )

    def loss(self, ctx: Context, rows: ReNORows) -> tuple[Tensor, Metrics]:
        family, noise = ctx.policy.family, ctx.policy.trained
        if not isinstance(noise, BestNoise):
            raise TypeError(f"ReNO trains a BestNoise, the policy has {type(noise).__name__}")
        index, places = rows.index.to(family.device), rows.image.tolist()
        z, _ = ctx.policy.model(index)
        cond, guidance_scale = rows.cond.to(family.device), self._guidance(family)
        grid = grid_of(family, self.num_inference_steps, z)
        images = family.to_image(sample(ctx.policy.predict, grid, cond, z, guidance_scale))
        metadata = [rows.metadata[k] for k in places]
        reward = ctx.rewards.differentiable_total(images, [rows.prompts[k] for k in places], metadata)
        norm = z.flatten(1).norm(dim=1)
        prior = (z[0].numel() - 1) * norm.log() - norm.square() / 2
        noise.note(*(ctx.gather(part.detach()).to(index.device) for part in (index, z, reward)))
        return -(reward + self.prior_weight * prior).mean(), {
            "reward": reward.mean().detach(),
            "best_so_far": noise.best_score[index].mean(),
            "noise_norm": norm.mean().detach() / z[0].numel() ** 0.5,
        }

    def _guidance(self, family: Family) -> float:
        return family.default_guidance_scale if self.guidance_scale is None else self.guidance_scale
