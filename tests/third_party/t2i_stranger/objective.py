"""Reward-weighted regression on images that lie on disk (Peters & Schaal 2007; for text-to-image Lee et al. 2023,
arXiv 2302.12192). Of the two images of a pair, with rewards r and l the mean squared error of the network's output,

    w = 2 softmax(r / temperature)        loss = mean of w * l

so both members count alike where their rewards do, and only the better one where they are far apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from align.common import rng
from align.data.preferences import PairBatch
from align.diffusion.process import add_noise
from align.families import Conditioning, Family
from align.objectives import Context, Cost, Metrics, Needs, Objective
from align.objectives.losses import denoising_error
from align.objectives.rows import Rows


@dataclass(frozen=True, kw_only=True)
class WeightedRows(Rows):
    """R images, two of each pair in order; ``image`` is the number of the pair."""

    latents: Tensor  # (R, C, h, w)
    cond: Conditioning
    eps: Tensor  # (R, C, h, w)
    t: Tensor  # (R,)
    weight: Tensor  # (R,)


def pair_weights(rewards: Tensor, temperature: float) -> Tensor:
    """(R,) the weights of images whose ``rewards`` (R,) are those of two after two."""
    return 2 * torch.softmax(rewards.unflatten(0, (-1, 2)) / temperature, 1).flatten()


@dataclass
class RewardWeightedRegression(Objective):
    """Regression on both images of a pair, weighted by the rewards; who won by the data is not looked at.

    Args:
        temperature: of the softmax over the pair, in units of the rewards' sum.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    @property
    def needs(self) -> Needs:
        return Needs((PairBatch,), reference=False, rewards=True)

    def cost(self, family: Family, resolution: int | None) -> Cost:
        return Cost(trained=2, frozen=0, rows=2, notes={"temperature": f"{self.temperature:g}"})

    def rollout(self, ctx: Context, batch: PairBatch) -> WeightedRows:
        family, generators = ctx.policy.family, ctx.generators("rwr")
        pair = torch.arange(len(batch.ids)).repeat_interleave(2)
        latents = batch.latents.to(family.device).float().flatten(0, 1)
        scores = ctx.rewards.score(family.to_image(latents), [batch.captions[k] for k in pair])
        weight = pair_weights(ctx.rewards.total(scores), self.temperature)
        t = family.sample_timesteps(rng.uniform(generators)).to(family.device)
        eps = rng.normal(tuple(latents.shape[1:]), generators).to(family.device)
        return WeightedRows(
            image=pair,
            latents=latents,
            cond=batch.cond.to(family.device).take(pair.to(family.device)),
            eps=eps.repeat_interleave(2, 0),  # the two of a pair share noise and time, so that only they differ
            t=t.repeat_interleave(2),
            weight=weight.to(family.device),
            metrics={f"reward/{name}": ctx.gather(values).mean().item() for name, values in scores.items()},
        )

    def loss(self, ctx: Context, rows: WeightedRows) -> tuple[Tensor, Metrics]:
        x_t = add_noise(rows.latents, rows.eps, *ctx.policy.family.path(rows.t))
        error = denoising_error(ctx.policy.predict(x_t, rows.t, rows.cond), rows.latents, rows.eps)
        return (rows.weight * error).mean(), {"error": error.mean().detach(), "weight_max": rows.weight.max()}
