"""DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117): policy improvement on the forward process, without likelihoods.

Pictures are drawn by whatever sampler, noised again, and told apart by their rewards r in [0, 1]. With the answer v_old
of the weights that drew them and v the true target at x_t,

    v+ = v_old + beta (v_theta - v_old)      v- = v_old - beta (v_theta - v_old)
    loss = r |v+ - v|^2 + (1 - r) |v- - v|^2

which at beta 1 pulls towards good pictures, pushes from bad ones, and ties to v_old by beta^2 |v_theta - v_old|^2. No
step of the sampler has to be stochastic or kept; one row costs one trained and one frozen evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from align.common import rng
from align.data.prompts import PromptBatch
from align.diffusion.kernels import DDIM
from align.diffusion.process import Prediction, add_noise, reduce_dims
from align.families import Conditioning, Family
from align.objectives.objective import Context, Metrics, Objective, Plan
from align.objectives.online.advantages import ScaleRewards, group_advantages, zero_std_mask
from align.objectives.online.collect import draw
from align.objectives.rows import Rows
from align.sampling.sampler import Sampler


@dataclass
class NFT(Objective):
    """Negative-aware fine-tuning on pictures that the policy draws.

    Args:
        sampler: how pictures are drawn; without a kernel the deterministic sampler. Training is without guidance, as
            in the paper, which also draws without (``guidance: 1``).
        images_per_prompt: pictures of each prompt in a rollout, over all processes (paper: 24).
        draws_per_image: noise levels at which each picture is trained on.
        beta: strength of the implicit positive and negative policies (paper: 1, or 0.1).
        scale_rewards: what a reward's distance from its group's mean is divided by: the std of the ``group`` or of all
            (``batch``).
        adv_clip_max: that quotient is cut to this size, which becomes r = 0 or 1 (paper: 1; its code: 5).
        weighting: ``adaptive`` squares errors of x0 over their own mean size (paper, eq. 12), ``native`` those of the
            network's output.
        old: drawn by, and tied to, the ``current`` weights at the rollout, or their moving ``average`` (``ema_decay``;
            the paper's soft update).
    """

    sampler: Sampler = field(default_factory=Sampler)
    images_per_prompt: int = 8
    draws_per_image: int = 2
    beta: float = 1.0
    scale_rewards: ScaleRewards = "group"
    adv_clip_max: float = 2.0
    weighting: Literal["adaptive", "native"] = "native"
    old: Literal["current", "average"] = "current"

    batch_types: ClassVar[tuple[type, ...]] = (PromptBatch,)
    online: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.images_per_prompt < 2 or self.draws_per_image < 1:
            raise ValueError("images_per_prompt must be at least 2 and draws_per_image at least 1")
        if self.beta <= 0 or self.adv_clip_max <= 0:
            raise ValueError("beta and adv_clip_max must be positive")

    @property
    def needs_reference(self) -> bool:
        return False

    @property
    def group(self) -> int:
        return self.images_per_prompt

    def plan(self, family: Family, resolution: int | None) -> Plan:
        rows, each = self.draws_per_image, self.sampler.evaluations(family)
        notes = {
            "sampler": f"{self.sampler.num_inference_steps} steps of {self.sampler.kernel or DDIM()}, guidance "
            f"{self.sampler.guidance_scale_of(family):g}"
        }
        return Plan(rows, self.sampler.num_inference_steps * each + rows, rows, notes)

    def rollout(self, ctx: Context, batch: PromptBatch) -> Rows:
        if self.old == "average":
            with ctx.policy.ema_scope():
                return self._rollout(ctx, batch)
        return self._rollout(ctx, batch)

    def _rollout(self, ctx: Context, batch: PromptBatch) -> Rows:
        assert ctx.scorer is not None
        family, count = ctx.policy.family, self.draws_per_image
        last = self.sampler.num_inference_steps - 1
        stochastic = None if self.sampler.kernel else ()
        drawn = draw(ctx, self.sampler, batch, self.group, [last], stochastic, likelihood=False)
        latents = drawn.columns["latents"]
        assert isinstance(latents, Tensor)
        total, groups = (
            ctx.scorer.total({n: ctx.gather(v).double() for n, v in drawn.scores.items()}),
            ctx.gather(drawn.groups),
        )
        all_of = group_advantages(total, groups, self.scale_rewards)
        mine = all_of[ctx.sample_indices[0] : ctx.sample_indices[-1] + 1].float()
        generators = ctx.generators("nft")
        t = family.sample_timesteps(rng.strata(generators, count).flatten())
        eps = rng.normal((count, *latents.shape[2:]), generators).flatten(0, 1)
        image = torch.arange(len(mine)).repeat_interleave(count)
        shared = {
            "x0": latents[:, -1].cpu().float(),
            "cond": drawn.columns["cond"],
            "prompt": drawn.columns["prompt"],
            "good": 0.5 + 0.5 * (mine / self.adv_clip_max).clamp(-1, 1),
        }
        table = Rows({"t": t, "eps": eps}, shared, image)
        old = torch.cat(
            [self._answer(ctx, rows)[0].raw.float().cpu() for rows in table.chunks(self.sampler.batch_size)]
        )
        metrics = drawn.metrics | {
            "reward/total": total.mean().item(),
            "zero_std_share": zero_std_mask(total, groups).double().mean().item(),
        }
        return Rows({"t": t, "eps": eps, "old": old}, shared, image, metrics)

    def _answer(self, ctx: Context, rows: Rows) -> tuple[Prediction, Mapping[str, Tensor]]:
        """What the policy says of the rows, and their x0 and eps."""
        family = ctx.policy.family
        x0, eps, t = (rows.tensor(name).to(family.device) for name in ("x0", "eps", "t"))
        bound = rows.images["cond"]
        assert isinstance(bound, Conditioning)
        cond = bound.take(rows.tensor("prompt").to(family.device))
        return ctx.policy.predict(add_noise(x0, eps, *family.path(t)), t, cond), {"x0": x0, "eps": eps}

    def loss(self, ctx: Context, rows: Rows) -> tuple[Tensor, Metrics]:
        new, clean = self._answer(ctx, rows)
        old, good = rows.tensor("old").to(new.x_t.device), rows.tensor("good").to(new.x_t.device)
        step = self.beta * (new.raw.float() - old)
        positive = self._error(replace(new, raw=old + step), **clean)
        negative = self._error(replace(new, raw=old - step), **clean)
        moved = reduce_dims((new.raw.float() - old).square(), "mean").detach()
        return (good * positive + (1 - good) * negative).mean(), {
            "error_positive": positive.mean().detach(),
            "error_negative": negative.mean().detach(),
            "moved": moved.mean(),
        }

    def _error(self, prediction: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
        """(R,) squared error in the chosen weighting."""
        if self.weighting == "native":
            return reduce_dims((prediction.raw.float() - prediction.target(x0, eps)).square(), "mean")
        gap = prediction.x0 - x0
        return reduce_dims(gap.square(), "mean") / reduce_dims(gap.detach().abs(), "mean").clamp(min=1e-5)
