"""What the policy now says of the steps that a rollout has drawn."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from align.common.errors import UserError
from align.diffusion.kernels import Gaussian
from align.diffusion.process import Prediction
from align.families import Conditioning
from align.families.family import Column
from align.objectives.objective import Context
from align.sampling.sampler import Sampler, grid_of


def replay_step(
    ctx: Context, sampler: Sampler, images: Mapping[str, Column], picture: Tensor, step: Tensor
) -> tuple[Gaussian, Tensor]:
    """What the policy now says of kept step ``step`` (R,) of ``picture`` (R,): the distribution of the next state, and
    the state that was drawn there; both (R, C, h, w)."""
    family = ctx.policy.family
    latents, steps = images["latents"], images["steps"]
    assert isinstance(latents, Tensor) and isinstance(steps, Tensor)
    y = latents[picture.to(latents.device), step.to(latents.device) + 1].to(family.device)
    prediction = predict_at(ctx, sampler, images, picture, step)
    return sampler.kernel_of(family)(prediction, grid_of(family, sampler.num_inference_steps), steps[step]), y


def predict_at(
    ctx: Context, sampler: Sampler, images: Mapping[str, Column], picture: Tensor, step: Tensor
) -> Prediction:
    """What the policy now says at the state before kept step ``step`` (R,) of ``picture`` (R,)."""
    family = ctx.policy.family
    latents, prompt, steps, cond = (images[name] for name in ("latents", "prompt", "steps", "cond"))
    assert isinstance(latents, Tensor) and isinstance(prompt, Tensor) and isinstance(steps, Tensor)
    assert isinstance(cond, Conditioning)
    x = latents[picture.to(latents.device), step.to(latents.device)].to(family.device)
    t = grid_of(family, sampler.num_inference_steps).t[steps[step]].to(family.device)
    bound = cond.take(prompt[picture].to(family.device))
    return ctx.policy.predict(x, t, bound, sampler.guidance_scale_of(family))


def require_on_policy(ratio: Tensor, tolerance: float) -> None:
    """Stop when the weights that drew the pictures do not give their densities again. Costs no evaluation."""
    worst = (ratio.detach() - 1).abs().max().item()
    if not worst <= tolerance:
        raise UserError(
            f"replaying the rollout gives a likelihood ratio off 1 by {worst:.3g} (allowed {tolerance:g}): the forward "
            "pass of training is not the sampler's. Likely causes: half precision (try mixed_precision: no, or fp16 "
            "rather than bf16), dropout in the denoiser, or a compiled or fused kernel that depends on the batch size"
        )


def log_probs(
    ctx: Context, sampler: Sampler, images: Mapping[str, Column], chunk: int, reference: bool = False
) -> Tensor:
    """(N, K) log-probabilities of what was drawn, under the current weights or the reference; without gradient."""
    latents = images["latents"]
    assert isinstance(latents, Tensor)
    pictures, steps = latents.shape[0], latents.shape[1] - 1
    picture = torch.arange(pictures).repeat_interleave(steps)
    step = torch.arange(steps).repeat(pictures)
    found = []
    with torch.no_grad():
        for part in torch.arange(len(picture)).split(chunk):
            if reference:
                with ctx.policy.reference():
                    gaussian, y = replay_step(ctx, sampler, images, picture[part], step[part])
            else:
                gaussian, y = replay_step(ctx, sampler, images, picture[part], step[part])
            found.append(gaussian.log_prob(y))
    return torch.cat(found).reshape(pictures, steps)
