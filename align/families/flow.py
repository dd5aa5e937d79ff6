"""What rectified-flow families share: time from 1000 to 0, Euler's grid, the SDE step, logit-normal training times."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from align.common.errors import UserError
from align.diffusion.kernels import FlowSDE, Kernel
from align.diffusion.process import Grid, PredictionType
from align.families.family import Family
from align.families.schedules import require_flow

# both streams' attention of an MMDiT, as diffusers calls it
JOINT_ATTENTION = (
    "attn.to_k",
    "attn.to_q",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)


class Flow(Family):
    """Times are sigma times the scheduler's ``num_train_timesteps``; :meth:`call` brings them to the network's units.
    Samples on Euler's grid of the pipeline's own scheduler config, whichever scheduler it came with."""

    denoiser_name = "transformer"
    lora_targets: tuple[str, ...] = ("to_k", "to_q", "to_v", "to_out.0")

    def __init__(self, pipe: DiffusionPipeline, source: str) -> None:
        super().__init__(pipe, source)
        require_flow(source, {"_class_name": type(pipe.scheduler).__name__, **pipe.scheduler.config})
        self.scheduler = self.stock_scheduler(pipe.scheduler)

    @classmethod
    def require_supported(cls, source: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
        require_flow(source, configs.get("scheduler", {}))

    @property
    def prediction_type(self) -> PredictionType:
        return "flow_prediction"

    @property
    def kernel(self) -> Kernel:
        return FlowSDE(noise=0.7)

    @classmethod
    def stock_scheduler(cls, scheduler: SchedulerMixin) -> FlowMatchEulerDiscreteScheduler:
        """Euler of the scheduler's config. DPM++ and UniPC on a flow call the shift ``flow_shift``; noise in the steps
        is the kernel's to add."""
        options: dict[str, Any] = {"stochastic_sampling": False}
        if "flow_shift" in scheduler.config:
            options["shift"] = scheduler.config["flow_shift"]
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **options)

    def sigmas(self, steps: int) -> np.ndarray | None:
        """What the pipeline hands to its scheduler, before the shift; None where that chooses for itself."""
        return np.linspace(1.0, 1 / steps, steps)

    def mu(self, steps: int, tokens: int) -> float:
        """What a scheduler that shifts by the size of the image (``use_dynamic_shifting``) is given for so many tokens:
        linear between its config's two sizes (Esser et al. 2024, §5.3.2, as FLUX.1 has it)."""
        config = self.scheduler.config
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return float(config.base_shift + slope * (tokens - config.base_image_seq_len))

    def grid(self, steps: int, height: int | None = None, width: int | None = None) -> Grid:
        self.require_steps(steps)
        if steps == 1 and self.scheduler.config.shift_terminal:
            raise UserError(
                f"{self.source} stretches its schedule to end at sigma {self.scheduler.config.shift_terminal} "
                "(shift_terminal), which one step has no room for; take 2 steps or more"
            )
        _, h, w = self.latent_shape(height, width)
        mu = self.mu(steps, h * w // self.patch**2) if self.scheduler.config.use_dynamic_shifting else None
        sigmas = self.sigmas(steps)
        self.scheduler.set_timesteps(steps if sigmas is None else None, sigmas=sigmas, mu=mu)
        t = torch.cat([self.scheduler.timesteps, torch.zeros(1)])
        return Grid(t, 1 - self.scheduler.sigmas, self.scheduler.sigmas.clone())

    def path(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t.float() / self.scheduler.config.num_train_timesteps
        return 1 - sigma, sigma

    @property
    def shift(self) -> float:
        """s in ``sigma -> s sigma / (1 + (s - 1) sigma)`` (Esser et al. 2024, eq. 23), at the model's own size."""
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return float(config.shift)
        _, h, w = self.latent_shape()
        mu = self.mu(self.default_num_inference_steps, h * w // self.patch**2)
        return math.exp(mu) if config.time_shift_type == "exponential" else mu

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Logit-normal(0, 1), moved by :attr:`shift` (Esser et al. 2024, §3.1 and eq. 23)."""
        shift, sigma = self.shift, torch.special.ndtri(uniform.double().clamp(1e-6, 1 - 1e-6)).sigmoid()
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        return (sigma * self.scheduler.config.num_train_timesteps).float()


def pack(x: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h/2 * w/2, 4C): a token for each square of 2 by 2, in the order C, dy, dx."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """The reverse of :func:`pack`."""
    b, _, c = tokens.shape
    return tokens.reshape(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, h, w)


class Packed(Flow):
    """Families whose network sees squares of 2 by 2 as tokens and whose pipeline keeps latents so."""

    patch = 2

    @property
    def channels(self) -> int:
        return int(self.denoiser.config.in_channels) // 4

    @classmethod
    def stock_latents(cls, x: Tensor) -> Tensor:
        return pack(x)
