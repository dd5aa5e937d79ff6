"""Direct Group Preference Optimization (Luo et al. 2025, arXiv 2510.08425): Diffusion-DPO for whole groups, whose
images are weighted by their advantage A instead of being winners and losers; no noise in the sampler, no policy
gradient.

The G images of a prompt are drawn by whatever sampler and noised again, all to the same level by the same noise. With
e_i the denoising error of image i there, of the policy and of the reference, and d_i = e_i - e_ref,i,

    w = sigmoid(beta / G  sum_i A_i d_i)      loss = w / G  sum_i A_i e_i

whose gradient, w being held, is 1 / beta of that of -log sigmoid(-beta / G sum_i A_i d_i), the likelihood of the
group's preferences. As in the authors' code (Luo-Yihong/DGPO, 01ceb4b), an image whose ratio exp(e_old - e_theta) to
the weights that drew has gone beyond ``clip_range`` in its advantage's direction has no gradient. Since w needs all
of a group, a row is a group at one noise level: G trained and, of the weights that drew and of the reference, at most
2 G frozen evaluations.

The authors' defaults: 16 images, ``beta`` 100, ``clip_range`` 1e-2, ``kl_weight`` 0.02, drawn with guidance, trained
without; without guidance ``anchor: old`` with ``beta`` 2000 and ``clip_range`` 1e-5, ``kl_weight`` 1e-3. Theirs draws
noise levels once a rollout for all groups, ours for each group.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from align.data.prompts import PromptBatch
from align.diffusion.process import upload
from align.families import Family, Resolution
from align.objectives.losses import denoising_error, outside_clip
from align.objectives.objective import Context, Cost, Metrics, Needs, Objective, Prepares, Reference
from align.objectives.online.advantages import ScaleRewards
from align.objectives.online.forward_process import ForwardProcess, NoisedRows, Old, Timesteps, distance, predict_noised
from align.objectives.online.rewards import Scorer
from align.objectives.rows import SHARED, Rows
from align.policy.policy import Policy
from align.sampling.sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class GroupRows(Rows):
    """R groups at a noise level; ``image`` counts the groups of this process."""

    of_items = True
    members: Tensor  # (R, G) the rows of ``noised``
    noised: NoisedRows = field(metadata=SHARED)


def group_loss(error: Tensor, reference: Tensor, advantage: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The losses (R,) of groups, whose images have errors, errors of the reference and advantages (R, G), and their
    weights w (R,), which have no gradient."""
    weight = torch.sigmoid(beta * (advantage * (error - reference)).mean(1)).detach()
    return weight * (advantage * error).mean(1), weight


@dataclass
class DGPO(Objective, Prepares):
    """Group preferences on images that the policy draws.

    Args:
        sampler: how images are drawn; without a kernel the deterministic sampler. Training is without guidance.
        images_per_prompt: the G images of each prompt in a rollout, which one process draws; ``train_batch_size``
            counts groups, G evaluations each.
        draws_per_image: noise levels at which each group is trained on (official: 4).
        beta: how sharply a group's weight answers to its preferences (official: 10 to 100, with ``anchor: old`` 2000
            to 5000).
        clip_range: of the ratio to the weights that drew (official: 1e-5 to 1e-2).
        anchor: what the errors are compared with: the ``reference``, or the weights that drew (``old``).
        scale_rewards: what a reward's distance from its group's mean is divided by: the std of the ``group`` or of all
            (``batch``), or nothing (``none``).
        adv_clip_max: advantages are cut to this size.
        old: drawn by, and clipped against, the ``current`` weights, or their moving ``average``.
        timesteps: noise levels as in ``training``, or so many different steps of the ``sampler``.
        kl_weight: of the mean square of v_theta - v_ref.
        reference: ``base``, or ``start``, the ``initial_weights`` of this run.
    """

    sampler: Sampler = field(default_factory=Sampler)
    images_per_prompt: int = 16
    draws_per_image: int = 2
    beta: float = 100.0
    clip_range: float = 1e-2
    anchor: Literal["reference", "old"] = "reference"
    scale_rewards: ScaleRewards = "group"
    adv_clip_max: float = 5.0
    old: Old = "current"
    timesteps: Timesteps = "training"
    kl_weight: float = 0.0
    reference: Reference = "base"

    def __post_init__(self) -> None:
        if self.beta <= 0 or self.clip_range <= 0 or self.kl_weight < 0:
            raise ValueError("beta and clip_range must be positive, kl_weight at least 0")
        self._forward.check(self.kl_weight)

    @property
    def _forward(self) -> ForwardProcess:
        drawn = self.sampler, self.images_per_prompt, self.draws_per_image
        process = ForwardProcess(*drawn, self.scale_rewards, self.adv_clip_max, self.old, self.timesteps)
        return replace(process, shared_noise=True, drop_ties=True)

    @property
    def needs(self) -> Needs:
        reference, size = self.kl_weight > 0 or self.anchor == "reference", self.images_per_prompt
        return Needs((PromptBatch,), reference, rewards=True, group_size=size, whole_groups=True, online=True)

    def prepare(self, policy: Policy, scorer: Scorer | None) -> None:
        self._forward.require(policy, scorer)

    def cost(self, family: Family, resolution: Resolution) -> Cost:
        cost = self._forward.cost(family, self.needs.reference)
        told = f"a group of {self.images_per_prompt} at a noise level, {self.images_per_prompt} trained evaluations"
        return replace(cost, rows=None, notes={**cost.notes, "row": told})

    def rollout(self, ctx: Context, batch: PromptBatch) -> GroupRows:
        noised = self._forward.rows(ctx, batch, self.needs.reference)
        size, draws = self.images_per_prompt, self.draws_per_image
        members = torch.arange(len(noised)).reshape(-1, size, draws).mT.reshape(-1, size)
        group = torch.arange(len(members)) // draws
        return GroupRows(image=group, members=members, noised=noised, metrics=noised.metrics)

    def loss(self, ctx: Context, rows: GroupRows) -> tuple[Tensor, Metrics]:
        part = rows.noised.take(rows.members.flatten())
        new, x0, eps = predict_noised(ctx, part)

        def error_of(answer: Tensor) -> Tensor:
            answers = replace(new, raw=upload(answer, new.x_t.device))
            return denoising_error(answers, x0, eps).reshape(rows.members.shape)

        advantage = upload(part.row_advantage, new.x_t.device).reshape(rows.members.shape)
        error, old = error_of(new.raw), error_of(part.old)
        anchored = old if self.anchor == "old" or part.reference is None else error_of(part.reference)
        ratio = (old - error).detach().exp()
        clipped = outside_clip(ratio, advantage, self.clip_range)
        losses, weight = group_loss(torch.where(clipped, error.detach(), error), anchored, advantage, self.beta)
        loss = losses.mean()
        metrics = {
            "preference": 1 - weight.mean(),  # the likelihood of the groups' preferences
            "error": error.mean(),
            "clip_fraction": clipped.float().mean(),
            "ratio_max": ratio.max(),
            "moved": distance(new, part.old).mean(),
        }
        if self.kl_weight and part.reference is not None:
            metrics["kl_reference"] = distance(new, part.reference).mean()
            loss = loss + self.kl_weight * metrics["kl_reference"]
        return loss, {name: value.detach() for name, value in metrics.items()}
