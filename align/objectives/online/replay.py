"""What the policy now says of the steps that a rollout has sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from align.common.errors import UserError
from align.diffusion.kernels import DDIM, Gaussian, std_of
from align.diffusion.process import Prediction, Reduction, append_dims, reduce_dims, upload
from align.families import Family
from align.objectives.objective import Context
from align.sampling.sampler import Sampler, grid_of
from align.sampling.trajectory import Trajectories

StepNormalisation = Literal["none", "guard", "noise"]


def replay_step(
    ctx: Context, sampler: Sampler, trajectories: Trajectories, image: Tensor, step: Tensor
) -> tuple[Gaussian, Tensor]:
    """What the policy now says of kept step ``step`` (R,) of ``image`` (R,): the distribution of the next state, and
    the state that was drawn there; both (R, C, h, w)."""
    family, latents = ctx.policy.family, trajectories.latents
    y = upload(_states(latents, image, step + 1), family.device)
    prediction = predict_at(ctx, sampler, trajectories, image, step)
    i = trajectories.kept_steps[step]
    return sampler.kernel_of(family)(prediction, grid_of(family, sampler.num_inference_steps, latents), i), y


def predict_at(ctx: Context, sampler: Sampler, trajectories: Trajectories, image: Tensor, step: Tensor) -> Prediction:
    """What the policy now says at the state before kept step ``step`` (R,) of ``image`` (R,)."""
    family, latents = ctx.policy.family, trajectories.latents
    x = upload(_states(latents, image, step), family.device)
    grid = grid_of(family, sampler.num_inference_steps, latents)
    t = upload(grid.t[trajectories.kept_steps[step]], family.device)
    return ctx.policy.predict(x, t, trajectories.cond_of(image), sampler.guidance_scale_of(family))


def _states(latents: Tensor, image: Tensor, step: Tensor) -> Tensor:
    return latents[upload(image, latents.device), upload(step, latents.device)]


def step_lengths(family: Family, sampler: Sampler, trajectories: Trajectories, step: Tensor) -> Tensor:
    """(R,) |dt| of the kept steps ``step`` (R,), in units of sigma."""
    sigma = grid_of(family, sampler.num_inference_steps, trajectories.latents).sigma
    i = trajectories.kept_steps[step]
    return (sigma[i] - sigma[i + 1]).abs()


def step_weights(
    ctx: Context,
    sampler: Sampler,
    trajectories: Trajectories,
    _image: Tensor,
    step: Tensor,
    normalisation: StepNormalisation,
    among: Sequence[int],
) -> Tensor:
    """(R,) what the loss of the kept steps ``step`` (R,) is multiplied by: 1; GRPO-Guard's ``1 / |dt|``; or, by their
    ``noise``, the step's std over the mean std of the steps ``among`` that have any (TempFlow-GRPO).

    The paper's dt is by how much the noiseless step moves with the network's answer. So it is here on any schedule: on
    SD's, sigma hardly changes at the noisy end, and its difference there would weigh steps up to 70 times as much."""
    family = ctx.policy.family
    if normalisation == "none":
        return torch.ones(len(step), device=family.device)
    grid, kernel = grid_of(family, sampler.num_inference_steps, trajectories.latents), sampler.kernel_of(family)
    if normalisation == "guard":
        i, zero = trajectories.kept_steps[step], torch.zeros(len(step), 1, 1, 1, dtype=grid.sigma.dtype)
        answer = Prediction(zero + 1, zero, grid.alpha[i], grid.sigma[i], family.prediction_type)
        return upload(1 / DDIM()(answer, grid, i).mean.abs().flatten(), family.device)
    std = torch.stack([std_of(kernel, grid, i, family.prediction_type) for i in range(len(grid))])
    trained = std[list(among)]
    return upload(std[trajectories.kept_steps[step]] / trained[trained > 0].mean(), family.device)


def log_ratios(
    new: Gaussian, y: Tensor, trajectories: Trajectories, image: Tensor, step: Tensor, guard: bool, reduction: Reduction
) -> Tensor:
    """(R,) log of the likelihood that the kept steps ``new`` give ``y`` over that by which it was drawn; with ``guard``
    GRPO-Guard's (eq. 8-10), freed of its bias and scaled by the step's std; ``reduction`` as of the plain one."""
    if guard:
        mean = upload(trajectories.means_at(image, step), y.device)
        return reduce_dims((new.mean - mean) * (y - mean) / append_dims(new.std, y), reduction)
    log_ratio = new.log_prob(y, "mean") - upload(trajectories.log_probs_at(image, step), y.device)
    return log_ratio * y[0].numel() if reduction == "sum" else log_ratio


def drawn_kl(new: Gaussian, trajectories: Trajectories, image: Tensor, step: Tensor, reduction: Reduction) -> Tensor:
    """(R,) KL between the kept steps ``new`` and those that drew the images; has no gradient."""
    mean = upload(trajectories.means_at(image, step), new.mean.device)
    return new.kl(Gaussian(mean, new.std), reduction).detach()


def reference_kl(
    ctx: Context,
    sampler: Sampler,
    trajectories: Trajectories,
    image: Tensor,
    step: Tensor,
    new: Gaussian,
    reduction: Reduction,
    exact: bool,
) -> Tensor:
    """(R,) KL of the steps ``new`` from the reference's. Where not ``exact``, as Flow-GRPO's code has it: the step's
    length left out of the variance."""
    with torch.no_grad(), ctx.policy.reference():
        reference, y = replay_step(ctx, sampler, trajectories, image, step)
    kl = new.kl(reference, reduction)
    return kl if exact else kl * upload(step_lengths(ctx.policy.family, sampler, trajectories, step), y.device)


def require_on_policy(ctx: Context, ratio: Tensor) -> None:
    """Stop when the weights that sampled the images do not give their densities again: at once, or where ``ctx`` says
    so before the optimizer steps, so that no chunk of rows waits for a GPU. Costs no evaluation."""
    worst = (ratio.detach() - 1).abs().max()
    if ctx.checks is None:
        _require_near(worst, ctx.tolerance)
    else:
        ctx.checks.append(partial(_require_near, worst, ctx.tolerance))


def _require_near(worst: Tensor, tolerance: float) -> None:
    if not worst.item() <= tolerance:
        raise UserError(
            f"replaying the rollout gives a likelihood ratio off 1 by {worst:.3g} (allowed {tolerance:g}): the forward "
            "pass of training is not the sampler's. Likely causes: half precision (try mixed_precision: no, or fp16 "
            "rather than bf16), dropout in the denoiser, or a compiled or fused kernel that depends on the batch size"
        )


def log_probs(
    ctx: Context, sampler: Sampler, trajectories: Trajectories, chunk: int, reference: bool = False
) -> Tensor:
    """(N, K) log-probabilities of what was drawn, under the current weights or the reference; without gradient."""
    images, steps = trajectories.latents.shape[0], trajectories.latents.shape[1] - 1
    image = torch.arange(images).repeat_interleave(steps)
    step = torch.arange(steps).repeat(images)
    chunks = []
    with torch.no_grad():
        for part in torch.arange(len(image)).split(chunk):
            if reference:
                with ctx.policy.reference():
                    gaussian, y = replay_step(ctx, sampler, trajectories, image[part], step[part])
            else:
                gaussian, y = replay_step(ctx, sampler, trajectories, image[part], step[part])
            chunks.append(gaussian.log_prob(y))
    return torch.cat(chunks).reshape(images, steps)


class ReferenceLogProbs:
    """What the reference gives trajectories; it is asked once in a run about those that have a name. A checkpoint keeps
    these: another batch would give them again but for the last bits."""

    def __init__(self) -> None:
        self._by_name: dict[str, Tensor] = {}

    def state(self) -> dict[str, Any]:
        if not self._by_name:
            return {}
        return {"names": list(self._by_name), "log_probs": torch.stack(list(self._by_name.values()))}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._by_name = dict(zip(state["names"], state["log_probs"], strict=True)) if state else {}

    def __call__(
        self, ctx: Context, sampler: Sampler, trajectories: Trajectories, chunk: int, names: Sequence[str] | None = None
    ) -> Tensor:
        """(N, K) log-probabilities, asked for ``chunk`` rows at once."""
        if names is None:
            if not len(trajectories):
                return torch.empty(0, 0)
            return log_probs(ctx, sampler, trajectories, chunk, reference=True)
        new = [k for k, name in enumerate(names) if name not in self._by_name]
        if new:
            rows = log_probs(ctx, sampler, trajectories.take(torch.tensor(new)), chunk, reference=True)
            self._by_name |= {names[k]: row.cpu() for k, row in zip(new, rows, strict=True)}
        return torch.stack([self._by_name[name] for name in names]) if names else torch.empty(0, 0)
