"""Reward back-propagation: the gradient of a differentiable reward, through decoder and sampler, to the weights.

    loss = mean over images of f(reward(decode(x0))) + kl_weight |v_theta - v_ref|^2

with f(r) = -r, or max(0, hinge - r). What papers differ in is which evaluations of the network the gradient reaches,
and which x0 is judged; each is a setting, by default DRaFT-1:

- DRaFT-K (Clark et al. 2023, arXiv 2309.17400): the last K steps, ``last_steps: K``; null is all of them.
- DRaFT-LV (the same): the last step alone, also from ``noise_draws`` - 1 noisings of the finished image to its level.
- AlignProp (Prabhudesai et al. 2023, 2310.03739): ``random_truncation``, K uniform in 1 ... ``last_steps``.
- ReFL (Xu et al. 2023, 2304.05977): ``early_stop: 10`` judges what the network takes for x0 at a random one of the last
  10 steps (of 40), which alone trains; ``hinge: 2.0``. Its 1e-3 weighs that against a pre-training loss.
- DRTune (Wu et al. 2024, 2405.00760): ``last_steps: null``, ``train_steps: K`` of these, evenly spaced from a random
  one; ``stop_input_gradient``: the network's input has no gradient, which passes from step to step by the sampler's own
  arithmetic, x_s = a x_t + b v(sg(x_t)); ``early_stop`` as above.

Everything is sampled in the loss, by the weights that it trains. Rewards of weight 0 are only watched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from align.common import rng
from align.common.errors import UserError
from align.common.resolution import sides
from align.data.prompts import PromptBatch
from align.diffusion.kernels import DDIM
from align.diffusion.process import add_noise
from align.families import Conditioning, Family, Resolution
from align.objectives.objective import Context, Cost, Metrics, Needs, Objective, Prepares, Reference
from align.objectives.online.collect import initial_noise, noise_of
from align.objectives.online.differentiate import TrainedPredictor, decoded
from align.objectives.online.rewards import Scorer
from align.objectives.rows import SHARED, Rows
from align.policy.policy import Policy
from align.sampling.loop import sample
from align.sampling.sampler import Sampler, grid_of


@dataclass(frozen=True, kw_only=True)
class DirectRewardRows(Rows):
    """R images to come: each one's ``number`` (R,) in the rollout, which names its noise, its condition, and what
    rewards want to know of image ``image``."""

    number: Tensor
    cond: Conditioning
    prompts: Sequence[str] = field(metadata=SHARED)
    metadata: Sequence[Mapping[str, Any]] = field(metadata=SHARED)


@dataclass
class DirectReward(Objective, Prepares):
    """Rewards' gradients to the weights, through the steps that the settings choose.

    Args:
        sampler: how images are drawn; without a kernel the deterministic sampler.
        last_steps: the gradient reaches the network at the last so many steps that are run; null is all.
        random_truncation: at a number of steps uniform in 1 ... ``last_steps`` instead, drawn for each rollout.
        train_steps: at so many of these steps only, evenly spaced from a random one on; null is all.
        stop_input_gradient: no gradient passes through the network to the state it was asked about.
        early_stop: judge the network's x0 at one of the last so many steps, drawn for each rollout; 0 is the sample.
        noise_draws: images judged for each drawn one: itself, and its last step from other noise.
        hinge: the reward from which on an image teaches nothing; null is none.
        kl_weight: of the mean square of v_theta - v_ref where the gradient passes; the state, v_ref are taken as given.
        reference: ``base``, or ``start``, the ``initial_weights`` of this run.
        checkpoint: keep only the states of the steps, and run each trained one again in the backward pass.
        decode_batch_size: images decoded at once, again in the backward pass; null decodes all and keeps what it takes.
    """

    sampler: Sampler = field(default_factory=Sampler)
    last_steps: int | None = 1
    random_truncation: bool = False
    train_steps: int | None = None
    stop_input_gradient: bool = False
    early_stop: int = 0
    noise_draws: int = 1
    hinge: float | None = None
    kl_weight: float = 0.0
    reference: Reference = "base"
    checkpoint: bool = True
    decode_batch_size: int | None = 1

    def __post_init__(self) -> None:
        total = self.sampler.num_inference_steps
        if not 1 <= self._most <= total or not 0 <= self.early_stop <= total:
            raise ValueError(f"last_steps must be 1 to the sampler's {total} steps, early_stop 0 to {total}")
        if self.train_steps is not None and not 1 <= self.train_steps <= self._most:
            raise ValueError(f"train_steps must be 1 to last_steps, {self._most}, got {self.train_steps}")
        if self.noise_draws < 1 or (self.noise_draws > 1 and (self._most > 1 or self.early_stop)):
            raise ValueError("noise_draws must be at least 1, and more only with last_steps: 1 and early_stop: 0")
        if self.kl_weight < 0 or (self.decode_batch_size is not None and self.decode_batch_size < 1):
            raise ValueError("kl_weight must be at least 0 and decode_batch_size at least 1, or null")

    @property
    def _most(self) -> int:
        return self.sampler.num_inference_steps if self.last_steps is None else self.last_steps

    @property
    def needs(self) -> Needs:
        return Needs((PromptBatch,), self.kl_weight > 0, rewards=True, online=True)

    def prepare(self, policy: Policy, scorer: Scorer | None) -> None:
        if scorer and (blind := scorer.without_gradient):
            raise UserError(
                f"DirectReward needs differentiable rewards, {', '.join(blind)} has no gradient; give it weight 0, or "
                "train on it by PolicyGradient or NFT"
            )

    def cost(self, family: Family, resolution: Resolution) -> Cost:
        each, steps = self.sampler.evaluations(family), self.sampler.num_inference_steps
        through = self.train_steps or self._most  # at most: a random truncation or stop makes it less
        trained, frozen = through + self.noise_draws - 1, steps - through
        notes = {"sampler": f"{steps} steps of {self.sampler.kernel or DDIM()}, gradient through {through} of them"}
        if self.checkpoint:
            notes["checkpoints"] = f"{trained * each} evaluations run again in the backward pass"
        return Cost(trained * each, (frozen + trained * self.needs.reference) * each, notes=notes)

    def rollout(self, ctx: Context, batch: PromptBatch) -> DirectRewardRows:
        number = torch.tensor(list(ctx.sample_indices))
        return DirectRewardRows(
            image=torch.arange(len(number)),
            metrics={"pictures": float(len(ctx.gather(number)))},
            number=number,
            cond=batch.cond,
            prompts=batch.prompts,
            metadata=batch.metadata,
        )

    def steps(self, seed: int, rollout: int) -> tuple[list[int], int | None]:
        """The steps of this rollout whose answers have a gradient, and the one at which it ends early, if it does."""
        draws = rng.uniform([rng.generator(seed, "direct reward", rollout, k) for k in range(3)]).tolist()
        last = self.sampler.num_inference_steps - 1 - int(draws[0] * self.early_stop)
        count = 1 + int(draws[1] * self._most) if self.random_truncation else self._most
        steps = range(max(0, last + 1 - count), last + 1)
        chosen = min(self.train_steps or len(steps), len(steps))
        apart = len(steps) // chosen
        first = steps[0] + int(draws[2] * (len(steps) - (chosen - 1) * apart))
        return [first + k * apart for k in range(chosen)], last if self.early_stop else None

    def loss(self, ctx: Context, rows: DirectRewardRows) -> tuple[Tensor, Metrics]:
        policy, family, sampler = ctx.policy, ctx.policy.family, self.sampler
        shape, numbers = family.latent_shape(*sides(ctx.resolution)), rows.number.tolist()
        x = initial_noise(ctx, numbers, shape).to(family.device)
        cond, scale, kernel = rows.cond.to(family.device), sampler.guidance_scale_of(family), sampler.kernel or DDIM()
        grid, noise = grid_of(family, sampler.num_inference_steps, x), noise_of(ctx, numbers, "step", shape)
        trained, stop = self.steps(ctx.seed, ctx.step)
        predict = TrainedPredictor(policy, self.stop_input_gradient, self.checkpoint, self.kl_weight > 0)
        ends = [sample(predict, grid, cond, x, scale, kernel, noise, trained=trained, stop=stop)]
        for k in range(1, self.noise_draws):
            eps = noise_of(ctx, numbers, f"noise {k}", shape)(trained[0]).to(family.device)
            noisy = add_noise(ends[0].detach(), eps, grid.alpha[trained[0]], grid.sigma[trained[0]])
            ends.append(sample(predict, grid, cond, noisy, scale, kernel, noise, steps=trained))
        images = decoded(policy, torch.cat(ends), self.decode_batch_size)
        places = rows.image.tolist() * self.noise_draws
        prompts, metadata = [rows.prompts[k] for k in places], [rows.metadata[k] for k in places]
        scores = ctx.rewards.differentiable_scores(images, prompts, metadata)
        reward = ctx.rewards.total({name: scores[name] for name in ctx.rewards.weights})
        loss = (-reward if self.hinge is None else (self.hinge - reward).clamp(min=0)).mean()
        metrics = {"reward": reward.mean().detach()}
        metrics |= {f"reward/{name}": score.mean().detach() for name, score in scores.items()}
        if self.kl_weight:
            kl = torch.cat(predict.moved).mean()
            loss, metrics["kl_reference"] = loss + self.kl_weight * kl, kl.detach()
        return loss, metrics
