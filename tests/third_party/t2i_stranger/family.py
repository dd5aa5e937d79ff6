"""AuraFlow: a rectified-flow MMDiT with one UMT5 text encoder, whose padding is set to zero and not masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AuraFlowPipeline
from torch import Tensor, nn

from align.diffusion.kernels import FlowSDE, Kernel
from align.diffusion.process import Grid, PredictionType
from align.families import Conditioning, Family


class AuraFlow(Family):
    """Samples on the Euler grid of the pipeline's scheduler; the network takes times from 0 (image) to 1 (noise)."""

    denoiser_name = "transformer"
    lora_targets = ("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0")

    @classmethod
    def read(cls, path: str, options: dict[str, Any]) -> AuraFlowPipeline:
        return AuraFlowPipeline.from_pretrained(path, **options)

    @property
    def prediction_type(self) -> PredictionType:
        return "flow_prediction"

    @property
    def kernel(self) -> Kernel:
        return FlowSDE(noise=0.7)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        embeds, *_ = self.pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, device=self.device)
        return Conditioning({"prompt_embeds": embeds})

    def grid(self, steps: int, height: int | None = None, width: int | None = None) -> Grid:
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(steps)
        t = torch.cat([scheduler.timesteps / scheduler.config.num_train_timesteps, torch.zeros(1)])
        return Grid(t, 1 - scheduler.sigmas, scheduler.sigmas.clone())

    def path(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t.float(), t.float()

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Logit-normal(0, 1), as Esser et al. 2024, §3.1."""
        return torch.special.ndtri(uniform.double().clamp(1e-6, 1 - 1e-6)).sigmoid().float()

    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return denoiser(x_t, encoder_hidden_states=cond["prompt_embeds"], timestep=t, return_dict=False)[0]
