"""What the formulas of several objectives are made of; each is (R,) or (B,), one number a row."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from align.diffusion.kernels import DDIM, Kernel, Step
from align.diffusion.process import Grid, Prediction, Reduction, append_dims, reduce_dims, upcast
from align.families import Family, Resolution, sides

TargetSpace = Literal["native", "epsilon"]
PreferenceLoss = Literal["sigmoid", "ipo", "hinge"]
Form = Literal["ode", "sde"]
Normalize = Literal["paper", "code", "velocity"]


def denoising_gap(prediction: Prediction, x0: Tensor, eps: Tensor, target_space: TargetSpace = "native") -> Tensor:
    """(R, ...) what the network predicts less its target (``native``), or the same of the noise that this implies."""
    gap = upcast(prediction.raw) - prediction.target(x0, eps)
    if target_space == "epsilon" and prediction.prediction_type != "epsilon":
        gap = append_dims(prediction.alpha, gap) * gap  # eps - eps_hat = alpha (v - v_hat), for v and flow alike
    return gap


def denoising_error(
    prediction: Prediction, x0: Tensor, eps: Tensor, target_space: TargetSpace = "native", reduction: Reduction = "mean"
) -> Tensor:
    """(R,) squared error of what the network predicts (``native``), or of the noise that this implies."""
    return reduce_dims(denoising_gap(prediction, x0, eps, target_space).square(), reduction)


def adaptive_error(prediction: Prediction, x0: Tensor, _eps: Tensor) -> Tensor:
    """(R,) mean square of ``x0_hat - x0`` over its own mean size, which has no gradient (DiffusionNFT, eq. 12)."""
    gap = prediction.x0 - x0
    return reduce_dims(gap.square(), "mean") / reduce_dims(gap.detach().abs(), "mean").clamp(min=1e-5)


def beta_note(beta: float, reduction: Reduction, family: Family, resolution: Resolution) -> str:
    """``beta`` of an error under ``reduction``, and what it is under the other one."""
    size = math.prod(family.latent_shape(*sides(resolution)))
    other, value = ("sum", beta / size) if reduction == "mean" else ("mean", beta * size)
    return f"{beta:g} ({reduction} over D={size}) = {value:g} as a {other}"


def preference_loss(
    logit: Tensor, loss_type: PreferenceLoss, beta: float, label_smoothing: float | Tensor = 0.0
) -> Tensor:
    """(R,) loss from the implicit reward margin ``logit`` (R,) of winner over loser, with s = ``label_smoothing``:

    sigmoid: -(1 - s) log sigmoid(m) - s log sigmoid(-m)      ipo: (m / beta - 1 / (2 beta))^2      hinge: max(0, 1 - m)
    """
    if loss_type == "ipo":
        return (logit / beta - 1 / (2 * beta)).square()
    if loss_type == "hinge":
        return F.relu(1 - logit)
    return -(1 - label_smoothing) * F.logsigmoid(logit) - label_smoothing * F.logsigmoid(-logit)


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """(R,) ``max(-A rho, -A clip(rho, 1 - c, 1 + c))`` of ratios and advantages (R,) (PPO, Schulman et al. 2017)."""
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


def outside_clip(ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """(R,) whether a row's ratio has gone so far in its advantage's direction that it has no gradient."""
    outside = torch.where(advantage > 0, ratio > 1 + clip_range, ratio < 1 - clip_range)
    return outside & (advantage != 0)


def clip_fraction(ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """The share of rows that are :func:`outside_clip`."""
    return outside_clip(ratio, advantage, clip_range).float().mean()


def masked_surrogate(ratio: Tensor, advantage: Tensor, kl: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """(R,) ``-A rho``, or 0 without a gradient where the KL (R,) between the old step and the new has reached
    ``threshold`` and the advantage pushes further away (Flow-DPPO, arXiv 2606.11025); and the share of these rows."""
    outward = torch.where(advantage > 0, ratio > 1, ratio < 1) & (advantage != 0)
    masked = outward & (kl >= threshold)
    return torch.where(masked, 0.0, -advantage * ratio), masked.float().mean()


def ratio_metrics(log_ratio: Tensor) -> dict[str, Tensor]:
    """How far the policy has gone from the weights that a likelihood ratio (R,) is to."""
    log_ratio = log_ratio.detach()
    ratio = log_ratio.exp()
    return {"approx_kl": 0.5 * log_ratio.square().mean(), "ratio_mean": ratio.mean(), "ratio_max": ratio.max()}


def divergence(
    student: Prediction, teacher: Prediction, kernel: Kernel, grid: Grid, i: Step, form: Form, normalize: Normalize
) -> Tensor:
    """(B,) how far two predictions at one state are apart at step ``i``, in float32.

    With ``form`` ``sde`` it is the KL of the kernel's two steps, ``|m_S - m_T|^2 / (2 s^2)``; with ``ode`` it is
    ``|m_S - m_T|^2 / 2`` of the deterministic ones.
    ``paper`` sums over the latent. ``code`` is what DiffusionOPD's, Flow-OPD's and Flow-GRPO's code computes: the mean
    over the latent and, with ``sde``, a variance without the step's length, so ``code`` · d / |dt| = ``paper`` there.
    ``velocity`` is the mean square of what the networks differ by, without any weight (DanceOPD).
    """
    if normalize == "velocity":
        return reduce_dims((student.raw.float() - teacher.raw.float()).square(), "mean")
    reduction: Reduction = "sum" if normalize == "paper" else "mean"
    if form == "ode":
        gap = DDIM()(student, grid, i).mean - DDIM()(teacher, grid, i).mean
        return 0.5 * reduce_dims(gap.square(), reduction)
    kl = kernel(student, grid, i).kl(kernel(teacher, grid, i), reduction)
    if normalize == "paper":
        return kl
    step = torch.as_tensor(i, device=grid.sigma.device)
    return kl * (grid.sigma[step] - grid.sigma[step + 1]).abs().to(kl.device)
