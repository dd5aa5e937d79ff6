"""D3PO (Yang et al. 2023, arXiv 2311.13231): preferences between whole trajectories, without a reward model.

If an image is preferred, every step of its trajectory is (paper, §4.2). For two trajectories of one prompt from one
initial noise, at the same step of both,

    loss = -log sigmoid(beta log c(rho_w) - beta log c(rho_l)),      c(rho) = clamp(rho, 1 - e, 1 + e)

with rho = p_theta / p_ref of what was drawn, log-densities as means over the latent (official code). The clamp has no
gradient outside its band in either direction, unlike PPO's min. Preferences come from rewards as a proxy, on images
drawn while training (:class:`Prompts`), or from people (:class:`LabelledRollout`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from align.common.errors import UserError, require_at_least
from align.data.prompts import PromptBatch
from align.data.trajectories import TrajectoryBatch
from align.diffusion.process import upload
from align.families import Family, Resolution
from align.objectives.losses import ratio_metrics
from align.objectives.objective import Context, Cost, KeepsState, Metrics, Needs, Objective, Reference
from align.objectives.online.collect import collect
from align.objectives.online.pairs import preferences
from align.objectives.online.replay import ReferenceLogProbs, replay_step
from align.objectives.rows import SHARED, Rows
from align.sampling.sampler import Sampler, SDEWindow, count_trained
from align.sampling.trajectory import Trajectories


@dataclass(frozen=True, kw_only=True)
class D3PORows(Rows):
    """R steps of pairs: ``winner``, ``loser`` (R,) number ``trajectories``, ``step`` (R,) their kept steps."""

    of_items = True
    winner: Tensor
    loser: Tensor
    step: Tensor
    trajectories: Trajectories = field(metadata=SHARED)  # of the M images that are in a pair
    reference: Tensor = field(metadata=SHARED)  # (M, K) log-densities under the reference


@dataclass
class D3PO(Objective, KeepsState):
    """Direct preference optimisation of trajectories.

    Args:
        sampler: how images are drawn (official: 20 steps, guidance 5); people's labels bring their own.
        images_per_prompt: images of each prompt; all pairs with a preference train (official: 2, or 7 for people).
        beta: temperature (official 0.1); inside the clamp it is little but a factor of the learning rate.
        clip_range: half width e of the clamp (official 0.1; an older 0.2 collapsed).
        reference: ``base``, or ``start``, the ``initial_weights`` of this run (the paper's rounds).
        timestep_fraction: the share of the steps that is trained, from the noisiest on (official: all).
        window: draw only these steps with noise and train them, so that what is preferred follows from them; null draws
            every step with noise. For a reward as proxy: people's labels bring images that are drawn already.
        shared_noise: the images of a prompt start from one noise, or the preference is mostly about noise.
        reference_batch: rows in one call of the reference.
    """

    sampler: Sampler = field(default_factory=Sampler)
    images_per_prompt: int = 2
    beta: float = 0.1
    clip_range: float = 0.1
    reference: Reference = "base"
    timestep_fraction: float = 1.0
    window: SDEWindow | None = None
    shared_noise: bool = True
    reference_batch: int = 32

    def __post_init__(self) -> None:
        require_at_least(2, self, "images_per_prompt")  # a preference needs two
        require_at_least(1, self, "reference_batch")
        count_trained(self.sampler, self.window, self.timestep_fraction)
        if self.beta <= 0 or not 0 < self.clip_range < 1:
            raise ValueError(f"beta must be positive and clip_range in (0, 1), got {self.beta} and {self.clip_range}")
        self._reference = ReferenceLogProbs()

    @property
    def needs(self) -> Needs:
        kinds = (PromptBatch, TrajectoryBatch)
        return Needs(kinds, True, rewards=True, group_size=self.images_per_prompt, whole_groups=True, online=True)

    @property
    def trained_steps(self) -> int:
        """Steps of each trajectory that are trained, where each has noise; see :func:`count_trained`."""
        return count_trained(self.sampler, self.window, self.timestep_fraction)

    def cost(self, family: Family, resolution: Resolution) -> Cost:
        each, steps = self.sampler.evaluations(family), self.sampler.num_inference_steps
        trained = count_trained(self.sampler, self.window, self.timestep_fraction, family)
        bound = self.beta * torch.log(torch.tensor((1 + self.clip_range) / (1 - self.clip_range))).item()
        notes = {
            "sampler": self.sampler.describe(family, trained),
            "sigmoid's argument": f"within {bound:.3g} of 0 (beta {self.beta:g}, clamp {self.clip_range:g})",
            "trained": "once an image where train_batch_size holds the pairs of a prompt, else once a chunk",
            "people's labels": f"a sample is a pair: at most {2 * trained * each} evaluations; the reference once",
        }
        return Cost(trained * each, (steps + trained) * each, None, notes, sampling=steps * each)

    def rollout(self, ctx: Context, batch: PromptBatch | TrajectoryBatch) -> D3PORows:
        if isinstance(batch, TrajectoryBatch):
            if self.window:
                raise UserError("window chooses steps of images to be drawn; of labelled ones timestep_fraction does")
            batch.require(self.sampler, ctx.policy.family)
            return self.rows_of(ctx, batch.trajectories.first_steps(self.trained_steps), batch.pairs, {}, batch.names)
        window = self.window.steps(self.sampler.num_inference_steps, ctx.seed, ctx.step) if self.window else None
        keep = range(self.trained_steps) if window is None else window
        rollout = collect(ctx, self.sampler, batch, self.images_per_prompt, keep, window, self.shared_noise)
        scores = torch.stack([weight * rollout.scores[name] for name, weight in ctx.rewards.weights.items()], 1)
        pairs = preferences(scores, rollout.groups)
        possible = len(rollout.groups) * (self.images_per_prompt - 1) / 2
        metrics = {"tie_share": 1 - ctx.gather(torch.tensor([len(pairs) / possible])).mean().item()}
        return self.rows_of(ctx, rollout.trajectories, pairs, rollout.metrics | metrics)

    def rows_of(
        self,
        ctx: Context,
        trajectories: Trajectories,
        pairs: Tensor,
        metrics: Mapping[str, float],
        names: Sequence[str] | None = None,
    ) -> D3PORows:
        """Every step of every pair (P, 2), winner first, as a row: both members at the same step. The pairs of a prompt
        keep together in training, where images that are in several are then asked about once.

        The reference is asked about the images that are in a pair, and about those that have ``names``, which stay
        the same from batch to batch, once in a run.
        """
        needed, place = torch.unique(pairs, return_inverse=True)
        kept = replace(trajectories.take(needed), log_probs=None)
        names = [names[k] for k in needed] if names else None
        steps = trajectories.latents.shape[1] - 1
        pair = torch.arange(len(pairs)).repeat_interleave(steps)
        return D3PORows(
            image=trajectories.prompt_index[pairs[pair, 0]],
            winner=place[pair, 0],
            loser=place[pair, 1],
            step=torch.arange(steps).repeat(len(pairs)),
            trajectories=kept,
            reference=self._reference(ctx, self.sampler, kept, self.reference_batch, names),
            metrics=metrics,
        )

    def state(self) -> dict[str, Any]:
        return self._reference.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._reference.load_state(state)

    def loss(self, ctx: Context, rows: D3PORows) -> tuple[Tensor, Metrics]:
        """One forward of the images and steps in these rows, at most 2R."""
        members = torch.stack([torch.cat([rows.winner, rows.loser]), rows.step.repeat(2)])
        (image, step), place = torch.unique(members, dim=1, return_inverse=True)
        new, y = replay_step(ctx, self.sampler, rows.trajectories, image, step)
        log_ratio = (new.log_prob(y) - upload(rows.reference[image, step], y.device))[upload(place, y.device)]
        low, high = torch.log(torch.tensor([1 - self.clip_range, 1 + self.clip_range])).tolist()
        winner, loser = log_ratio.clamp(low, high).chunk(2)
        won, lost = log_ratio.detach().chunk(2)
        metrics = ratio_metrics(log_ratio) | {
            "implicit_acc": ((won > lost).float() + 0.5 * (won == lost).float()).mean(),
            "clip_fraction": ((log_ratio <= low) | (log_ratio >= high)).float().mean(),
        }
        return -F.logsigmoid(self.beta * (winner - loser)).mean(), metrics
