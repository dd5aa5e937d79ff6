"""FLUX.1: dev, which takes the guidance scale as an input, and schnell, which knows none; T5 and a pooled CLIP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from align.families.conditioning import Conditioning
from align.families.family import GuidanceKind
from align.families.flow import JOINT_ATTENTION, Packed, pack, unpack

T5_TOKENS = 512  # FluxPipeline's own default for max_sequence_length


class Flux(Packed):
    """Padding is part of the model: T5's 512 tokens are attended without a mask."""

    pipeline = FluxPipeline
    token_limits = {"tokenizer_2": T5_TOKENS}  # noqa: RUF012  # a constant of the class
    lora_targets = JOINT_ATTENTION

    @property
    def guidance_kind(self) -> GuidanceKind:
        return "embedded" if self.denoiser.config.guidance_embeds else "none"

    def few_steps(self) -> int | None:
        return None if self.denoiser.config.guidance_embeds else 4

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        embeds, pooled, _ = self.pipe.encode_prompt(list(prompts), None, self.device, max_sequence_length=T5_TOKENS)
        return Conditioning({"prompt_embeds": embeds, "pooled": pooled})

    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        height, width = x_t.shape[-2:]
        embeds = cond["prompt_embeds"]
        answer = denoiser(
            hidden_states=pack(x_t),
            timestep=t / 1000,
            guidance=cond.tensors.get("guidance"),
            pooled_projections=cond["pooled"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x_t.device, dtype=x_t.dtype),
            img_ids=self.pipe._prepare_latent_image_ids(1, height // 2, width // 2, x_t.device, x_t.dtype),
            return_dict=False,
        )[0]
        return unpack(answer, height, width)
