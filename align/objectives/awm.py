"""Advantage Weighted Matching (Xue et al. 2025, arXiv 2509.25050): the policy gradient with the pretraining loss in
the likelihood's place.

Pictures are drawn by whatever sampler and noised again. With e the denoising error of a row, the mean square of what
the network should have said less what it says, and A the advantage of its picture in its prompt's group,

    l = -w(e, t)      rho = exp(l_theta - l_old)      loss = max(-A rho, -A clip(rho, 1 - c, 1 + c))

Before the first update rho is 1, and the gradient that of A w(e_theta, t): matching, weighted by advantage. One row
costs one trained and one frozen evaluation; there is no stored trajectory and no noise in the sampler.

The authors' code (scxue/advantage_weighted_matching, be51372) differs from these defaults, and configs/awm_sd35.yaml
sets what it does: ``weighting: ghuber``, ``clip_range`` 1, advantages by the std of all, cut to 5 and divided by that
(``loss_scale`` 0.2), ``kl_weight`` 1e-4 to 3e-3 to the base, ``old_weight`` 1, ``timesteps: sampler`` with 6 of its
steps. Its second KL is to an average of the weights with a decay of min(0.3, 0.001 k), ours to those that drew
(``old``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from align.data.prompts import PromptBatch
from align.diffusion.process import upload
from align.families import Family, Resolution
from align.objectives.losses import clip_fraction, clipped_surrogate, denoising_error, ratio_metrics
from align.objectives.objective import Context, Cost, Metrics, Needs, Objective, Prepares, Reference
from align.objectives.online.advantages import ScaleRewards
from align.objectives.online.forward_process import (
    ForwardProcess,
    NoisedRows,
    Old,
    Timesteps,
    distance,
    distance_to_reference,
    predict_noised,
)
from align.objectives.online.gate import Gate
from align.objectives.online.replay import require_on_policy
from align.objectives.online.rewards import Scorer
from align.policy.policy import Policy
from align.sampling.sampler import Sampler

Weighting = Literal["uniform", "t", "huber", "ghuber"]
_FLOOR = 1e-10  # under which an error has no root: the authors'


def matching_loss(error: Tensor, sigma: Tensor, weighting: Weighting, power: float = 0.25) -> Tensor:
    """(R,) w of the denoising errors (R,) at noise levels ``sigma`` (R,), the coefficient of the noise (a flow's t):

    uniform: e      t: sigma e      huber: sigma e^(1/2)      ghuber: sigma e^p / p
    """
    if weighting == "uniform":
        return error
    if weighting == "t":
        return error * sigma
    if weighting == "huber":
        return ((error + _FLOOR).sqrt() - _FLOOR**0.5) * sigma
    return ((error + _FLOOR).pow(power) - _FLOOR**power) * sigma / power


@dataclass
class AWM(Objective, Prepares):
    """Denoising of images that the policy draws, weighted by their advantage.

    Args:
        sampler: how images are drawn; without a kernel the deterministic sampler. Training is without guidance; a
            network that takes the scale as an input trains at the one that it drew with.
        images_per_prompt: images of each prompt in a rollout, over all processes (paper: 24).
        draws_per_image: noise levels at which each image is trained on (official: 6).
        clip_range: of the ratio (official: 1).
        weighting: of the denoising error: ``uniform``, by the noise level (``t``), or its root (``huber``, ``ghuber``).
        ghuber_power: the p of ``ghuber``.
        scale_rewards: what a reward's distance from its group's mean is divided by: the std of the ``group`` or of all
            (``batch``), or nothing (``none``).
        adv_clip_max: advantages are cut to this size.
        old: drawn by, and compared with, the ``current`` weights, or their moving ``average``.
        timesteps: noise levels as in ``training``, or so many different steps of the ``sampler``.
        loss_scale: of the loss but for the distances; Adam hardly feels it, gradient clipping and these do.
        kl_weight: of the mean square of v_theta - v_ref.
        old_weight: of the mean square of v_theta - v_old.
        gate: which images ``kl_weight`` holds (GARDO, arXiv 2512.24138); null holds all.
        reference: ``base``, or ``start``, the ``initial_weights`` of this run.
    """

    sampler: Sampler = field(default_factory=Sampler)
    images_per_prompt: int = 8
    draws_per_image: int = 2
    clip_range: float = 1.0
    weighting: Weighting = "uniform"
    ghuber_power: float = 0.25
    scale_rewards: ScaleRewards = "group"
    adv_clip_max: float = 5.0
    old: Old = "current"
    timesteps: Timesteps = "training"
    loss_scale: float = 1.0
    kl_weight: float = 0.0
    old_weight: float = 0.0
    gate: Gate | None = None
    reference: Reference = "base"

    def __post_init__(self) -> None:
        if min(self.clip_range, self.ghuber_power, self.loss_scale) <= 0 or min(self.kl_weight, self.old_weight) < 0:
            raise ValueError(
                "clip_range, ghuber_power and loss_scale must be positive, kl_weight and old_weight at least 0"
            )
        self._forward.check(self.kl_weight)

    @property
    def _forward(self) -> ForwardProcess:
        drawn = self.sampler, self.images_per_prompt, self.draws_per_image
        process = ForwardProcess(*drawn, self.scale_rewards, self.adv_clip_max, self.old, self.timesteps, self.gate)
        return replace(process, drop_ties=True)

    @property
    def needs(self) -> Needs:
        group_size = self.images_per_prompt
        return Needs((PromptBatch,), self.kl_weight > 0, rewards=True, group_size=group_size, online=True)

    def prepare(self, policy: Policy, scorer: Scorer | None) -> None:
        self._forward.require(policy, scorer)

    def cost(self, family: Family, resolution: Resolution) -> Cost:
        return self._forward.cost(family, self.needs.reference)

    def rollout(self, ctx: Context, batch: PromptBatch) -> NoisedRows:
        return self._forward.rows(ctx, batch, self.needs.reference)

    def loss(self, ctx: Context, rows: NoisedRows) -> tuple[Tensor, Metrics]:
        new, x0, eps = predict_noised(ctx, rows)
        device = new.x_t.device
        advantage, old = upload(rows.row_advantage, device), upload(rows.old, device)
        error, before = (denoising_error(one, x0, eps) for one in (new, replace(new, raw=old)))
        l_new, l_old = (-matching_loss(e, new.sigma, self.weighting, self.ghuber_power) for e in (error, before))
        log_ratio = l_new - l_old
        ratio = log_ratio.exp()
        if ctx.on_policy and self.old == "current":
            require_on_policy(ctx, ratio)
        loss = self.loss_scale * clipped_surrogate(ratio, advantage, self.clip_range).mean()
        metrics = ratio_metrics(log_ratio) | {"error": error.mean().detach(), "moved": distance(new, old).mean()}
        if self.old_weight:
            loss = loss + self.old_weight * metrics["moved"]
        if rows.reference is not None:
            metrics["kl_reference"] = distance_to_reference(new, rows)
            loss = loss + self.kl_weight * metrics["kl_reference"]
        metrics["clip_fraction"] = clip_fraction(ratio, advantage, self.clip_range)
        return loss, {name: value.detach() for name, value in metrics.items()}
