"""Sampling and decoding as something to differentiate: what is kept of them, and what is computed again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from align.diffusion.process import Prediction, reduce_dims
from align.families import Conditioning
from align.policy.policy import Policy


def recomputed(policy: Policy, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, of which nothing but ``x`` is kept for the backward pass; what it asks ``policy`` is counted
    once. Bit for bit what it is without."""
    scopes = lambda: (nullcontext(), policy.recomputing())  # noqa: E731
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False, context_fn=scopes)


def decoded(policy: Policy, x0: Tensor, batch_size: int | None) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] of latents, ``batch_size`` at once and again in the backward pass; None decodes all
    and keeps what that takes."""
    if batch_size is None:
        return policy.family.to_image(x0)
    return torch.cat([recomputed(policy, policy.family.to_image, part) for part in x0.split(batch_size)])


@dataclass
class TrainedPredictor:
    """:meth:`Policy.predict` as :func:`align.sampling.loop.sample` asks it, where there is a gradient:

    with ``stop_input_gradient`` the network is asked about the state's value alone, so that its gradient passes from
    step to step by the sampler's arithmetic; with ``checkpoint`` its activations are computed again in the backward
    pass; with ``against_reference`` ``moved`` collects mean |v_theta - v_ref|^2, (B,) a step, of states and v_ref as
    they are.
    """

    policy: Policy
    stop_input_gradient: bool = False
    checkpoint: bool = False
    against_reference: bool = False
    moved: list[Tensor] = field(default_factory=list)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float) -> Prediction:
        policy, family, trains = self.policy, self.policy.family, torch.is_grad_enabled()

        def raw(x: Tensor) -> Tensor:
            return policy.predict(x, t, cond, guidance_scale).raw

        x = x_t.detach() if self.stop_input_gradient else x_t
        answer = recomputed(policy, raw, x) if trains and self.checkpoint else raw(x)
        if trains and self.against_reference:
            with torch.no_grad(), policy.reference():
                reference = raw(x.detach())
            self.moved.append(reduce_dims((answer.float() - reference.float()).square(), "mean"))
        return Prediction(answer, x_t, *family.path(t), family.prediction_type)
