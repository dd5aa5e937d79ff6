"""D3PO (Yang et al. 2023, arXiv 2311.13231): preferences between whole trajectories, without a reward model.

If a picture is preferred, every step of its trajectory is (paper, §4.2). For two trajectories of one prompt from one
initial noise, at the same step of both,

    loss = -log sigmoid(beta log c(rho_w) - beta log c(rho_l)),      c(rho) = clamp(rho, 1 - e, 1 + e)

with rho = p_theta / p_ref of what was drawn, log-densities as means over the latent (official code). The clamp has no
gradient outside its band in either direction, unlike PPO's min. Preferences come from rewards as a proxy, on pictures
drawn while training (:class:`Prompts`), or from people (:class:`LabelledRollout`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from align.common.errors import UserError
from align.data.prompts import PromptBatch
from align.data.trajectories import TrajectoryBatch
from align.families import Family
from align.families.family import Column
from align.objectives.objective import Context, Metrics, Objective, Plan
from align.objectives.online.collect import draw
from align.objectives.online.replay import log_probs, replay_step
from align.objectives.rows import Rows
from align.sampling.sampler import Sampler, SDEWindow, count_trained


@dataclass
class D3PO(Objective):
    """Direct preference optimisation of trajectories.

    Args:
        sampler: how pictures are drawn (official: 20 steps, guidance 5); people's labels bring their own.
        images_per_prompt: pictures of each prompt; all pairs with a preference train (official: 2 with a reward as
            proxy, 7 for people).
        beta: temperature (official 0.1); inside the clamp it is little but a factor of the learning rate.
        clip_range: half width e of the clamp (official 0.1; an older 0.2 collapsed).
        reference: ``base``, or ``start``, the weights that this run started from (the paper's rounds); they
            differ when ``initial_weights`` is set.
        timestep_fraction: the share of the steps that is trained, from the noisiest on (official: all).
        window: draw only these steps with noise and train them, so that what is preferred follows from them; null draws
            every step with noise. For a reward as proxy: people's labels bring pictures that are drawn already.
        shared_noise: the pictures of a prompt start from one noise, or the preference is mostly about noise.
        reference_batch: rows in one call of the reference.
    """

    sampler: Sampler = field(default_factory=Sampler)
    images_per_prompt: int = 2
    beta: float = 0.1
    clip_range: float = 0.1
    reference: Literal["base", "start"] = "base"
    timestep_fraction: float = 1.0
    window: SDEWindow | None = None
    shared_noise: bool = True
    reference_batch: int = 32

    batch_types: ClassVar[tuple[type, ...]] = (PromptBatch, TrajectoryBatch)
    online: ClassVar[bool] = True
    whole_groups: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.images_per_prompt < 2:
            raise ValueError(f"a preference needs two pictures: images_per_prompt is {self.images_per_prompt}")
        count_trained(self.sampler, self.window, self.timestep_fraction)
        if self.beta <= 0 or not 0 < self.clip_range < 1:
            raise ValueError(f"beta must be positive and clip_range in (0, 1), got {self.beta} and {self.clip_range}")
        self._known: dict[str, Tensor] = {}

    @property
    def group(self) -> int:
        return self.images_per_prompt

    @property
    def trained_steps(self) -> int:
        """Steps of each trajectory that are trained."""
        return count_trained(self.sampler, self.window, self.timestep_fraction)

    def plan(self, family: Family, resolution: int | None) -> Plan:
        each, steps, trained = self.sampler.evaluations(family), self.sampler.num_inference_steps, self.trained_steps
        bound = self.beta * torch.log(torch.tensor((1 + self.clip_range) / (1 - self.clip_range))).item()
        notes = {
            "sampler": f"{steps} steps of {self.sampler.kernel_of(family)}, {trained} trained, guidance "
            f"{self.sampler.guidance_scale_of(family):g}",
            "sigmoid's argument": f"within {bound:.3g} of 0 (beta {self.beta:g}, clamp {self.clip_range:g})",
        }
        notes["trained"] = "once a picture where train_batch_size holds the pairs of a prompt, else once a chunk"
        notes["people's labels"] = (
            f"a sample is a pair: at most {2 * trained * each} trained evaluations each, none frozen but the "
            "reference's, once for each picture"
        )
        return Plan(trained * each, (steps + trained) * each, None, notes, drawing=steps * each)

    def rollout(self, ctx: Context, batch: PromptBatch | TrajectoryBatch) -> Rows:
        if isinstance(batch, TrajectoryBatch):
            if self.window:
                raise UserError("window chooses steps of pictures to be drawn; of labelled ones timestep_fraction does")
            batch.require(self.sampler, ctx.policy.family)
            latents = batch.columns["latents"]
            assert isinstance(latents, Tensor)
            columns = dict(batch.columns) | {"latents": latents[:, : self.trained_steps + 1]}
            return self.table(ctx, columns, batch.pairs, names=batch.names)
        window = self.window.steps(self.sampler.num_inference_steps, ctx.seed, ctx.step) if self.window else None
        keep = range(self.trained_steps) if window is None else window
        drawn = draw(ctx, self.sampler, batch, self.group, keep, window, self.shared_noise)
        assert ctx.scorer is not None
        scores = torch.stack([weight * drawn.scores[name] for name, weight in ctx.scorer.weights.items()], 1)
        pairs = preferences(scores, drawn.groups)
        asked = len(drawn.groups) * (self.group - 1) / 2
        metrics = drawn.metrics | {"tie_share": 1 - ctx.gather(torch.tensor([len(pairs) / asked])).mean().item()}
        return self.table(ctx, drawn.columns, pairs, metrics)

    def table(
        self,
        ctx: Context,
        columns: Mapping[str, Column],
        pairs: Tensor,
        metrics: Mapping[str, float] | None = None,
        names: Sequence[str] | None = None,
    ) -> Rows:
        """Every step of every pair (P, 2), winner first, as a row: both members at the same step. The pairs of a prompt
        keep together in training, where pictures that are in several are then asked about once.

        The reference is asked about the pictures that are in a pair, and about those that have ``names``, which stay
        the same from batch to batch, once in a run.
        """
        needed, place = torch.unique(pairs, return_inverse=True)
        latents = columns["latents"]
        assert isinstance(latents, Tensor)
        images = dict(columns) | {"latents": latents[needed.to(latents.device)], "prompt": columns["prompt"][needed]}
        images.pop("log_probs", None)
        images["reference"] = self.reference_log_probs(ctx, images, [names[k] for k in needed] if names else None)
        steps = latents.shape[1] - 1
        pair = torch.arange(len(pairs)).repeat_interleave(steps)
        prompt = columns["prompt"]
        assert isinstance(prompt, Tensor)
        rows: dict[str, Column] = {
            "winner": place[pair, 0],
            "loser": place[pair, 1],
            "step": torch.arange(steps).repeat(len(pairs)),
        }
        return Rows(rows, images, prompt[pairs[pair, 0]], metrics or {})

    def reference_log_probs(self, ctx: Context, images: dict[str, Column], names: Sequence[str] | None) -> Tensor:
        """(N, K) what the reference gives each kept step; pictures with names are asked about once in a run."""
        count = len(images["prompt"])
        new = [k for k in range(count) if names is None or names[k] not in self._known]
        if not new:
            return torch.stack([self._known[name] for name in names]) if names else torch.empty(0, 0)
        some = images | {key: images[key][torch.tensor(new)] for key in ("latents", "prompt")}  # type: ignore[index]
        found = log_probs(ctx, self.sampler, some, self.reference_batch, reference=True)
        if names is None:
            return found
        self._known |= {names[k]: row.cpu() for k, row in zip(new, found, strict=True)}
        return torch.stack([self._known[name] for name in names])

    def loss(self, ctx: Context, rows: Rows) -> tuple[Tensor, Metrics]:
        """One forward of the pictures and steps in these rows, at most 2R."""
        members = torch.stack([torch.cat([rows.tensor("winner"), rows.tensor("loser")]), rows.tensor("step").repeat(2)])
        (picture, step), place = torch.unique(members, dim=1, return_inverse=True)
        new, y = replay_step(ctx, self.sampler, rows.images, picture, step)
        reference = rows.images["reference"]
        assert isinstance(reference, Tensor)
        log_ratio = (new.log_prob(y) - reference[picture, step].to(y.device))[place.to(y.device)]
        low, high = torch.log(torch.tensor([1 - self.clip_range, 1 + self.clip_range])).tolist()
        winner, loser = log_ratio.clamp(low, high).chunk(2)
        logit = self.beta * (winner - loser)
        with torch.no_grad():
            ratio = log_ratio.exp()
            won, lost = log_ratio.chunk(2)
            metrics: Metrics = {
                "implicit_acc": ((won > lost).float() + 0.5 * (won == lost).float()).mean(),
                "ratio_mean": ratio.mean(),
                "ratio_max": ratio.max(),
                "clip_fraction": ((log_ratio <= low) | (log_ratio >= high)).float().mean(),
                "approx_kl": 0.5 * log_ratio.square().mean(),
            }
        return -F.logsigmoid(logit).mean(), metrics


def preferences(scores: Tensor, groups: Tensor) -> Tensor:
    """(P, 2) pairs of one group, winner first, from ``scores`` (N, J), higher is better: the winner is nowhere worse
    and somewhere better (Pareto dominance), else it is a tie and no pair."""
    pairs = []
    for group in torch.unique(groups):
        for a, b in combinations((groups == group).nonzero().flatten().tolist(), 2):
            ahead, behind = scores[a] > scores[b], scores[a] < scores[b]
            if ahead.any() and not behind.any():
                pairs.append((a, b))
            elif behind.any() and not ahead.any():
                pairs.append((b, a))
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
