"""FIND (Chen et al. 2024, arXiv 2407.19453): learn the distribution of initial noise of a prompt, and no weight.

One-step decision: the state is the prompt, the action its initial noise z, the environment the whole frozen sampler,
the reward that of the picture; no gradient crosses the sampler, so any reward will do. The policy of a prompt is
N(mean, diag(std^2)) of latent shape (:class:`align.policy.initial_noise.InitialNoise`). With rho = p(z) / p_old(z),

    loss = -min(rho A, clip(rho, 1 - c, 1 + c) A) + kl_weight KL(p || N(0, I))

on the noises just drawn and on replayed ones, each with its own reward; p_old is the policy at the start of the
iteration, for replayed noises too, so that the clip bounds every update and not the whole way. Other than the released
code: p_old is refreshed (there it is N(0, I) for ever), the clip is PPO's minimum, the KL is exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from align.common.errors import UserError
from align.data.dataset import Data
from align.data.prompts import PromptBatch, Prompts
from align.diffusion.process import Reduction
from align.families import Conditioning, Family
from align.objectives.objective import Context, Metrics, Objective, Plan
from align.objectives.online.advantages import group_means
from align.objectives.online.collect import Start, draw, initial
from align.objectives.online.replay import require_on_policy
from align.objectives.rows import Rows
from align.objectives.value_network import ValueNet
from align.policy.initial_noise import InitialNoise, Tying, kl, log_prob
from align.sampling.sampler import Sampler


@dataclass
class FIND(Objective):
    """Policy optimisation of the initial noise, each prompt of the data with a distribution of its own.

    Args:
        sampler: how pictures are drawn; without a kernel the deterministic sampler (the official code's eta of 1 blames
            z for the noise of the steps).
        images_per_prompt: pictures of each prompt in a rollout, over all processes; even, if ``antithetic``.
        antithetic: draw pairs mean +- std * eps.
        replay: how many earlier pictures of a prompt are trained on again; 0 none.
        replay_by: which: the ``newest``, or those of the best ``reward``, of equals the older (self-imitation: it makes
            up the policy's mind among several ways to do well).
        clip_range: of rho, in the convention of ``reduction``.
        reduction: log-densities as a ``mean`` over the latent (official: the clip hardly ever binds, the learning rate
            is the trust region) or their ``sum`` (the true ratio, which leaves the range at once).
        calibration: what a reward is compared with: the ``leave_one_out`` mean of the prompt's other pictures, or the
            ``value`` that a network expects of the prompt's distribution (FIND's dynamic reward calibration).
        value_steps: steps of that network per rollout (official: 5), at ``value_learning_rate``.
        value_learning_rate: of that network (official: 1e-4).
        kl_weight: of the exact KL to N(0, I), a mean over the latent.
        typical: keep the norm of z where that of N(0, I) is: as the mean grows, the standard deviation shrinks. No
            sampler has seen other norms.
        kl_budget: hard bound of that KL in nats a dimension (0.01 is a mean of about 0.14); null for none.
        tying: ``none``, one number a ``channel``, or ``low_rank`` maps.
        rank: of ``low_rank``.
    """

    sampler: Sampler = field(default_factory=Sampler)
    images_per_prompt: int = 16
    antithetic: bool = True
    replay: int = 0
    replay_by: Literal["newest", "reward"] = "newest"
    clip_range: float = 0.2
    reduction: Reduction = "mean"
    calibration: Literal["leave_one_out", "value"] = "leave_one_out"
    value_steps: int = 5
    value_learning_rate: float = 1e-4
    kl_weight: float = 1e-3
    typical: bool = True
    kl_budget: float | None = 0.02
    tying: Tying = "none"
    rank: int = 2

    batch_types: ClassVar[tuple[type, ...]] = (PromptBatch,)
    online: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.images_per_prompt < 2 or (self.antithetic and self.images_per_prompt % 2):
            raise ValueError(f"images_per_prompt must be at least 2, and even in pairs; got {self.images_per_prompt}")
        if self.clip_range <= 0 or self.replay < 0 or self.kl_weight < 0:
            raise ValueError("clip_range must be positive, replay and kl_weight at least 0")
        self.memory: dict[str, Tensor] = {}  # replayed rows, oldest first
        self.best: dict[str, float] = {}
        self.value: ValueNet | None = None
        self._restored: Mapping[str, Any] | None = None

    @property
    def needs_reference(self) -> bool:
        return False

    @property
    def group(self) -> int:
        return self.images_per_prompt

    def trains(self, family: Family, data: Data) -> InitialNoise:
        if not isinstance(data, Prompts):
            raise UserError(
                f"FIND learns the noise of single prompts: expected data: Prompts, got {type(data).__name__}"
            )
        return InitialNoise(
            [row["prompt"] for row in data.read()],
            family.latent_shape(data.resolution),
            family.source,
            family.scheduler_name,
            self.tying,
            self.rank,
            self.kl_budget,
            self.typical,
        )

    def plan(self, family: Family, resolution: int | None) -> Plan:
        size, each = math.prod(family.latent_shape(resolution)), self.sampler.evaluations(family)
        notes = {
            "sampler": f"{self.sampler.num_inference_steps} steps, {self.sampler.kernel or 'deterministic'}, guidance "
            f"{self.sampler.guidance_scale_of(family):g}",
            "noise": f"D={size} a prompt, tying {self.tying}, KL at most "
            + (f"{self.kl_budget:g} nats a dimension" if self.kl_budget else "unbounded"),
        }
        return Plan(0, self.sampler.num_inference_steps * each, None, notes)

    def rollout(self, ctx: Context, batch: PromptBatch) -> Rows:
        noise = ctx.policy.trained
        assert isinstance(noise, InitialNoise) and ctx.scorer is not None
        own = torch.tensor([position // self.group for position in ctx.sample_indices])
        index = torch.tensor(batch.ids)[own - own[0]]
        mean, log_std = (part.cpu().float() for part in noise(index.to(ctx.policy.family.device)))
        pairs = [position - position % 2 if self.antithetic else position for position in ctx.sample_indices]
        sign = torch.tensor([1.0 - 2.0 * (self.antithetic and p % 2) for p in ctx.sample_indices])
        eps = initial(ctx, pairs, noise.shape) * sign[:, None, None, None]
        z = mean + log_std.exp() * eps
        stochastic = None if self.sampler.kernel else ()
        drawn = draw(ctx, self.sampler, batch, self.group, (), stochastic, start=Start(z))
        fresh = {
            "index": index,
            "noise": z,
            "reward": ctx.scorer.total(drawn.scores).float(),
            "rollout": torch.full((len(z),), ctx.step),
        }
        if self.calibration == "value":
            fresh["text"] = pooled(batch.cond)[own - own[0]]
        # every process holds all rows, and trains on its share
        fresh = {name: ctx.gather(column) for name, column in fresh.items()}
        rows = self._recall(fresh)
        with torch.no_grad():
            mean_of, log_std_of = (part.cpu().float() for part in noise(rows["index"].to(ctx.policy.family.device)))
        rows["log_prob"] = log_prob(rows["noise"], mean_of, log_std_of, self.reduction)
        rows["advantage"] = self.advantages(ctx, rows, noise)
        world, rank = len(fresh["index"]) // len(own), ctx.sample_indices[0] // len(own)
        mine = {name: column[rank::world] for name, column in rows.items() if name != "text"}
        metrics = drawn.metrics | self._measure(fresh, noise)
        return Rows(mine, {}, torch.arange(len(mine["index"])), metrics)

    def _recall(self, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The fresh rows and the replayed ones of their prompts; the fresh ones are remembered."""
        everything = {n: torch.cat([self.memory[n], c]) for n, c in fresh.items()} if self.memory else dict(fresh)
        ours = torch.isin(everything["index"], fresh["index"])
        rows = {name: column[ours] for name, column in everything.items()}
        if self.replay:
            keep = torch.zeros(len(everything["index"]), dtype=torch.bool)
            for prompt in everything["index"].unique():
                own = (everything["index"] == prompt).nonzero().flatten()
                if self.replay_by == "reward":
                    best = everything["reward"][own].sort(descending=True, stable=True).indices[: self.replay]
                    keep[own[best]] = True
                else:
                    keep[own[-self.replay :]] = True
            self.memory = {name: column[keep] for name, column in everything.items()}
        return rows

    def advantages(self, ctx: Context, rows: Mapping[str, Tensor], noise: InitialNoise) -> Tensor:
        """(R,) calibrated rewards in units of their prompt's standard deviation; 0 where all are alike."""
        reward, index = rows["reward"], rows["index"]
        centred = reward - group_means(reward, index)
        scale = group_means(centred.square(), index).sqrt()
        if self.calibration == "value":
            expected = self._expected(ctx, rows, noise)
            centred = reward - expected
        else:
            count = index.bincount()[index]
            centred = centred * count / (count - 1)  # the mean of the others, not of all
        return torch.where(scale > 0, centred / (scale + 1e-4), 0.0)

    def _expected(self, ctx: Context, rows: Mapping[str, Tensor], noise: InitialNoise) -> Tensor:
        """(R,) what the value network expects of the rows' prompts, before it learns from them."""
        prompts, row = rows["index"].unique(return_inverse=True)
        mean, log_std = (part.cpu().float() for part in noise(prompts.to(ctx.policy.family.device)))
        text = torch.stack([rows["text"][row == k][0] for k in range(len(prompts))])
        seen = torch.cat([mean.flatten(1), log_std.exp().flatten(1), text], 1)
        if self.value is None:
            self.value = ValueNet(seen.shape[1], self.value_learning_rate, ctx.seed)
            if self._restored is not None:
                self.value.load_state(self._restored)
        expected = self.value(seen)[row]
        fresh = rows["rollout"] == ctx.step
        self.value.learn(seen[row[fresh]], rows["reward"][fresh], self.value_steps)
        return expected

    def _measure(self, fresh: Mapping[str, Tensor], noise: InitialNoise) -> dict[str, float]:
        """Of the pictures of all processes."""
        for index, reward in zip(fresh["index"].tolist(), fresh["reward"].tolist(), strict=True):
            prompt = noise.prompts[index]
            self.best[prompt] = max(reward, self.best.get(prompt, -math.inf))
        z = fresh["noise"].flatten(1)
        with torch.no_grad():
            mean, log_std = noise(fresh["index"].unique().to(noise.left["mean"].device))
        return {
            "best_so_far": sum(self.best.values()) / len(self.best),  # best of all pictures yet, a mean over prompts
            "kl": kl(mean, log_std).mean().item(),
            "noise_norm": (z.norm(dim=1) / z.shape[1] ** 0.5).mean().item(),
            "std": log_std.exp().mean().item(),
        }

    def loss(self, ctx: Context, rows: Rows) -> tuple[Tensor, Metrics]:
        noise = ctx.policy.model  # perhaps in accelerate's wrapper, which joins gradients
        device = ctx.policy.family.device
        mean, log_std = noise(rows.tensor("index").to(device))
        new = log_prob(rows.tensor("noise").to(device), mean, log_std, self.reduction)
        log_ratio = new - rows.tensor("log_prob").to(device)
        ratio, advantage = log_ratio.exp(), rows.tensor("advantage").to(device)
        fresh = rows.tensor("rollout").to(device) == ctx.step
        if ctx.on_policy and bool(fresh.any()):
            require_on_policy(ratio[fresh], ctx.tolerance)
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        divergence = kl(mean, log_std)
        loss = (torch.maximum(-ratio * advantage, -clipped * advantage) + self.kl_weight * divergence).mean()
        outside = torch.where(advantage > 0, ratio > 1 + self.clip_range, ratio < 1 - self.clip_range)
        return loss, {
            "approx_kl": 0.5 * log_ratio.detach().square().mean(),
            "ratio_max": ratio.detach().max(),
            "clip_fraction": (outside & (advantage != 0)).float().mean(),
        }

    def state(self) -> dict[str, Any]:
        value = self.value.state() if self.value is not None else {}
        return {"best": self.best, **{f"memory.{name}": column for name, column in self.memory.items()}, **value}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.best = dict(state["best"])
        self.memory = {k.removeprefix("memory."): v for k, v in state.items() if k.startswith("memory.")}
        self._restored = {k: v for k, v in state.items() if k.startswith("value.")} or None


def pooled(cond: Conditioning) -> Tensor:
    """(B, D) one vector a prompt, whatever the family's conditions are: means over tokens, joined."""
    parts = [v.float().cpu() for v in cond.tensors.values()]
    return torch.cat([v.flatten(1, -2).mean(1) if v.ndim > 2 else v for v in parts], 1)
