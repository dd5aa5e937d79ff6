"""DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117): policy improvement on the forward process, without likelihoods.

Pictures are drawn by whatever sampler, noised again, and told apart by their rewards r in [0, 1]. With the answer v_old
of the weights that drew them and v the true target at x_t,

    v+ = v_old + beta (v_theta - v_old)      v- = v_old - beta (v_theta - v_old)
    loss = r |v+ - v|^2 + (1 - r) |v- - v|^2

which at beta 1 pulls towards good images, pushes from bad ones, and ties to v_old by beta^2 |v_theta - v_old|^2. One
row costs one trained and one frozen evaluation.

The authors' code (NVlabs/DiffusionNFT) differs from these defaults, and configs/nft_sd35.yaml sets what it does:
``loss_scale`` adv_clip_max / beta, ``adv_clip_max`` 5, ``scale_rewards: batch``, ``weighting: adaptive``, ``kl_weight``
1e-4, ``timesteps: sampler`` with 9 of its 10 steps. Its v_old is an average whose decay grows, min(0.001 k, 0.5) at
update k, ours ``ema_decay``; it draws by DPM-Solver-2, we by Euler's (DDIM's) steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from align.data.prompts import PromptBatch
from align.families import Family, Resolution
from align.objectives.losses import adaptive_error, denoising_error
from align.objectives.objective import Context, Cost, Metrics, Needs, Objective, Prepares, Reference
from align.objectives.online.advantages import ScaleRewards
from align.objectives.online.forward_process import (
    ForwardProcess,
    NoisedRows,
    Old,
    Timesteps,
    distance_to_reference,
    predict_noised,
)
from align.objectives.online.gate import Gate
from align.objectives.online.rewards import Scorer
from align.policy.policy import Policy
from align.sampling.sampler import Sampler


@dataclass
class NFT(Objective, Prepares):
    """Negative-aware fine-tuning on images that the policy draws.

    Args:
        sampler: how images are drawn; without a kernel the deterministic sampler. Training is without guidance, as
            in the paper, which also draws without (``guidance: 1``); a network that takes the scale as an input trains
            at the one that it drew with.
        images_per_prompt: images of each prompt in a rollout, over all processes (paper: 24).
        draws_per_image: noise levels at which each image is trained on.
        beta: strength of the implicit positive and negative policies (paper: 1, or 0.1).
        scale_rewards: what a reward's distance from its group's mean is divided by: the std of the ``group`` or of all
            (``batch``).
        adv_clip_max: that quotient is cut to this size, which becomes r = 0 or 1 (paper: 1; its code: 5).
        weighting: squared errors ``native`` to the network, or ``adaptive``: of x0 over their size (paper, eq. 12).
        old: drawn by, and tied to, the ``current`` weights, or their moving ``average`` (the paper's soft update).
        timesteps: noise levels as in ``training``, or so many different steps of the ``sampler``.
        loss_scale: of the loss; Adam hardly feels it, gradient clipping and ``kl_weight`` do.
        kl_weight: of the mean square of v_theta - v_ref.
        gate: which images ``kl_weight`` holds (GARDO, arXiv 2512.24138); null holds all.
        reference: ``base``, or ``start``, the ``initial_weights`` of this run.
    """

    sampler: Sampler = field(default_factory=Sampler)
    images_per_prompt: int = 8
    draws_per_image: int = 2
    beta: float = 1.0
    scale_rewards: ScaleRewards = "group"
    adv_clip_max: float = 2.0
    weighting: Literal["adaptive", "native"] = "native"
    old: Old = "current"
    timesteps: Timesteps = "training"
    loss_scale: float = 1.0
    kl_weight: float = 0.0
    gate: Gate | None = None
    reference: Reference = "base"

    def __post_init__(self) -> None:
        if min(self.beta, self.loss_scale) <= 0 or self.kl_weight < 0:
            raise ValueError("beta and loss_scale must be positive, kl_weight at least 0")
        self._forward.check(self.kl_weight)

    @property
    def _forward(self) -> ForwardProcess:
        drawn = self.sampler, self.images_per_prompt, self.draws_per_image
        return ForwardProcess(*drawn, self.scale_rewards, self.adv_clip_max, self.old, self.timesteps, self.gate)

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

    def good(self, rows: NoisedRows) -> Tensor:
        """(R,) r in [0, 1] of each row's image."""
        return 0.5 + 0.5 * (rows.row_advantage / self.adv_clip_max).clamp(-1, 1)

    def loss(self, ctx: Context, rows: NoisedRows) -> tuple[Tensor, Metrics]:
        new, x0, eps = predict_noised(ctx, rows)
        old, good = rows.old.to(new.x_t.device), self.good(rows).to(new.x_t.device)
        step = self.beta * (new.raw.float() - old)
        error = denoising_error if self.weighting == "native" else adaptive_error
        positive, negative = (error(replace(new, raw=old + way * step), x0, eps) for way in (1, -1))
        loss = self.loss_scale * (good * positive + (1 - good) * negative).mean()
        metrics = {"error_positive": positive.mean().detach(), "error_negative": negative.mean().detach()}
        if rows.reference is not None:
            kl = distance_to_reference(new, rows)
            loss, metrics["kl_reference"] = loss + self.kl_weight * kl, kl.detach()
        return loss, metrics | {"moved": (new.raw.float() - old).square().mean().detach()}
