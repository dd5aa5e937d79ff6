"""FIND (Chen et al. 2024, arXiv 2407.19453): learn the distribution of initial noise of a prompt, and no weight.

One-step decision: the state is the prompt, the action its initial noise z, the environment the whole frozen sampler,
the reward that of the image; no gradient crosses the sampler, so any reward will do. The policy of a prompt is
N(mean, diag(std^2)) of latent shape (:class:`align.policy.initial_noise.InitialNoise`). With rho = p(z) / p_old(z),

    loss = -min(rho A, clip(rho, 1 - c, 1 + c) A) + kl_weight KL(p || N(0, I))

on the noises just drawn and on replayed ones, each with its own reward; p_old is the policy at the start of the
iteration, for replayed noises too, so that the clip bounds every update and not the whole way. Other than the released
code: p_old is refreshed (there it is N(0, I) for ever), the clip is PPO's minimum, the KL is exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from align.common.errors import UserError
from align.data.dataset import Data
from align.data.prompts import PromptBatch, Prompts
from align.diffusion.process import Reduction
from align.families import Family, Resolution, sides
from align.objectives.losses import clip_fraction, clipped_surrogate
from align.objectives.noise_memory import FINDRows, NoiseMemory, NoiseSamples, ReplayBy
from align.objectives.objective import Context, Cost, KeepsState, Metrics, Needs, Objective, TrainsModule
from align.objectives.online.advantages import calibrated_advantages
from align.objectives.online.collect import Start, collect, initial_noise
from align.objectives.online.replay import require_on_policy
from align.objectives.value_network import RewardForecast, pooled
from align.policy.initial_noise import InitialNoise, kl, log_prob
from align.sampling.sampler import Sampler


@dataclass
class FIND(Objective, KeepsState, TrainsModule):
    """Policy optimisation of the initial noise, each prompt of the data with a distribution of its own.

    Args:
        sampler: how images are drawn; without a kernel the deterministic sampler (the official code's eta of 1 blames
            z for the noise of the steps).
        images_per_prompt: images of each prompt in a rollout, over all processes; even, if ``antithetic``.
        antithetic: draw pairs mean +- std * eps.
        replay: how many earlier images of a prompt are trained on again; 0 none.
        replay_by: which: the ``newest``, or those of the best ``reward``, of equals the older (self-imitation).
        clip_range: of rho, in the convention of ``reduction``.
        reduction: log-densities as a ``mean`` over the latent (official: the clip hardly ever binds) or their ``sum``
            (the true ratio, which leaves the range at once).
        calibration: what a reward is compared with: the ``leave_one_out`` mean of the prompt's other images, or the
            ``value`` that a network expects of the prompt's distribution (FIND's dynamic reward calibration).
        value_steps: steps of that network per rollout (the official code's 5 batches make one optimizer step).
        value_learning_rate: of that network (official: 1e-4).
        kl_weight: of the exact KL to N(0, I), a mean over the latent.
        typical: keep the norm of z where that of N(0, I) is, the only one that samplers know: as the mean grows, the
            standard deviation shrinks.
        kl_budget: hard bound of that KL in nats a dimension (0.01 is a mean of about 0.14); null for none.
    """

    sampler: Sampler = field(default_factory=Sampler)
    images_per_prompt: int = 16
    antithetic: bool = True
    replay: int = 0
    replay_by: ReplayBy = "newest"
    clip_range: float = 0.2
    reduction: Reduction = "mean"
    calibration: Literal["leave_one_out", "value"] = "leave_one_out"
    value_steps: int = 5
    value_learning_rate: float = 1e-4
    kl_weight: float = 1e-3
    typical: bool = True
    kl_budget: float | None = 0.02

    def __post_init__(self) -> None:
        if self.images_per_prompt < 2 or (self.antithetic and self.images_per_prompt % 2):
            raise ValueError(f"images_per_prompt must be at least 2, and even in pairs; got {self.images_per_prompt}")
        if self.clip_range <= 0 or self.kl_weight < 0 or (self.kl_budget is not None and self.kl_budget <= 0):
            raise ValueError("clip_range must be positive, kl_weight at least 0, and kl_budget positive or null")
        self.memory = NoiseMemory(self.replay, self.replay_by)
        self.forecast = RewardForecast(self.value_learning_rate, self.value_steps)
        self.best: dict[str, float] = {}

    @property
    def needs(self) -> Needs:
        return Needs((PromptBatch,), False, rewards=True, group_size=self.images_per_prompt, online=True)

    def trains(self, family: Family, data: Data) -> InitialNoise:
        if not isinstance(data, Prompts):
            raise UserError(f"FIND learns the noise of single prompts: expected Prompts, got {type(data).__name__}")
        prompts, shape = [row["prompt"] for row in data.read()], family.latent_shape(*sides(data.resolution))
        return InitialNoise(prompts, shape, family.source, family.scheduler_name, self.kl_budget, self.typical)

    def cost(self, family: Family, resolution: Resolution) -> Cost:
        size, each = math.prod(family.latent_shape(*sides(resolution))), self.sampler.evaluations(family)
        budget = f"{self.kl_budget:g} nats a dimension" if self.kl_budget else "unbounded"
        steps, scale = self.sampler.num_inference_steps, self.sampler.guidance_scale_of(family)
        drawn = f"{steps} steps, {self.sampler.kernel or 'deterministic'}, guidance {scale:g}"
        return Cost(0, steps * each, None, {"sampler": drawn, "noise": f"D={size} a prompt, KL at most {budget}"})

    def rollout(self, ctx: Context, batch: PromptBatch) -> FINDRows:
        noise = ctx.policy.trained
        if not isinstance(noise, InitialNoise):
            raise TypeError(f"FIND trains an InitialNoise, the policy has {type(noise).__name__}")
        prompt = torch.tensor([position // self.images_per_prompt for position in ctx.sample_indices])
        index = torch.tensor(batch.ids)[prompt - prompt[0]]
        mean, log_std = noise.detached(index)
        pairs = [position - position % 2 if self.antithetic else position for position in ctx.sample_indices]
        sign = torch.tensor([1.0 - 2.0 * (self.antithetic and p % 2) for p in ctx.sample_indices])
        eps = initial_noise(ctx, pairs, noise.shape) * sign[:, None, None, None]
        z = mean + log_std.exp() * eps
        stochastic = None if self.sampler.kernel else ()
        rollout = collect(ctx, self.sampler, batch, self.images_per_prompt, (), stochastic, start=Start(z))
        text = pooled(batch.cond)[prompt - prompt[0]] if self.calibration == "value" else None
        fresh = NoiseSamples(  # every process holds all samples, and trains on its share
            ctx.gather(index),
            ctx.gather(z),
            ctx.gather(ctx.rewards.total(rollout.scores).float()),
            ctx.gather(torch.full((len(z),), ctx.step)),
            None if text is None else ctx.gather(text),
        )
        samples = self.memory.recall(fresh)
        expected = self.forecast(noise, samples, ctx.step, ctx.seed) if self.calibration == "value" else None
        rows = FINDRows(
            image=torch.arange(len(samples)),
            index=samples.index,
            noise=samples.noise,
            log_prob=log_prob(samples.noise, *noise.detached(samples.index), self.reduction),
            advantage=calibrated_advantages(samples.reward, samples.index, expected),
            reward=samples.reward,
            rollout=samples.rollout,
            metrics=rollout.metrics | noise.describe(fresh.index.unique()) | self._measure(fresh, noise.prompts),
        )
        world, rank = len(fresh) // len(index), ctx.sample_indices[0] // len(index)
        local = rows.take(torch.arange(rank, len(rows), world))
        return replace(local, image=torch.arange(len(local)))

    def _measure(self, fresh: NoiseSamples, prompts: Sequence[str]) -> dict[str, float]:
        for index, reward in zip(fresh.index.tolist(), fresh.reward.tolist(), strict=True):
            self.best[prompts[index]] = max(reward, self.best.get(prompts[index], -math.inf))
        return {
            "best_so_far": sum(self.best.values()) / len(self.best),  # best of all images yet, a mean over prompts
            "noise_norm": fresh.noise.flatten(1).norm(dim=1).mean().item() / fresh.noise[0].numel() ** 0.5,
        }

    def loss(self, ctx: Context, rows: FINDRows) -> tuple[Tensor, Metrics]:
        device = ctx.policy.family.device
        mean, log_std = ctx.policy.model(rows.index.to(device))  # accelerate's wrapper, if any, joins gradients
        log_ratio = log_prob(rows.noise.to(device), mean, log_std, self.reduction) - rows.log_prob.to(device)
        ratio, advantage = log_ratio.exp(), rows.advantage.to(device)
        fresh = (rows.rollout == ctx.step).nonzero().flatten()
        if ctx.on_policy and len(fresh):
            require_on_policy(ctx, ratio[fresh.to(device)])
        surrogate = clipped_surrogate(ratio, advantage, self.clip_range)
        return (surrogate + self.kl_weight * kl(mean, log_std)).mean(), {
            "approx_kl": 0.5 * log_ratio.detach().square().mean(),
            "ratio_max": ratio.detach().max(),
            "clip_fraction": clip_fraction(ratio, advantage, self.clip_range),
        }

    def state(self) -> dict[str, Any]:
        return {"best": self.best, **self.memory.state(), **self.forecast.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.best = dict(state["best"])
        self.memory.load_state(state)
        self.forecast.load_state(state)
