"""Qwen-Image: an MMDiT on one frame of a video autoencoder, text from Qwen2.5-VL, guidance that keeps its length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import QwenImagePipeline
from torch import Tensor, nn

from align.families.conditioning import Conditioning
from align.families.flow import Packed, pack, unpack

TOKENS = 512  # QwenImagePipeline's own default for max_sequence_length
EMPTY = " "  # what its authors give for no prompt


class QwenImage(Packed):
    """Guidance is true classifier-free guidance, which the pipeline does only beside a negative prompt."""

    pipeline = QwenImagePipeline
    guidance_argument = "true_cfg_scale"
    token_limits = {"tokenizer": TOKENS}  # noqa: RUF012  # a constant of the class
    text_mask = "bool"

    def __init__(self, pipe: QwenImagePipeline, source: str) -> None:
        super().__init__(pipe, source)
        last = f"transformer_blocks.{len(self.denoiser.transformer_blocks) - 1}"
        self.idle = (f"{last}.attn.to_add_out.", f"{last}.txt_mlp.")  # of the text stream, which nothing reads after it

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        embeds, mask = self.pipe.encode_prompt(list(prompts), device=self.device, max_sequence_length=TOKENS)
        if mask is None:  # how the pipeline says that no row is shorter
            mask = torch.ones(embeds.shape[:2], device=embeds.device)
        return Conditioning({"prompt_embeds": embeds, "mask": mask.bool()})

    def unconditional(self) -> Conditioning:
        return self.encode([EMPTY])

    def stock_arguments(self, steps: int, guidance_scale: float) -> dict[str, Any]:
        return super().stock_arguments(steps, guidance_scale) | {"negative_prompt": EMPTY}

    def guide(self, free: Tensor, bound: Tensor, guidance_scale: float) -> Tensor:
        """Mixed, and each token brought to the length of the conditional one."""
        mixed, bound = pack(super().guide(free, bound, guidance_scale)), pack(bound)
        length = bound.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True)
        return unpack(mixed * length, *free.shape[-2:])

    def statistics(self) -> tuple[Tensor, Tensor]:
        config = self.pipe.vae.config
        return torch.tensor(config.latents_mean)[:, None, None], 1 / torch.tensor(config.latents_std)[:, None, None]

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return self.pipe.vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]

    def decode_pixels(self, z: Tensor) -> Tensor:
        return self.pipe.vae.decode(z[:, :, None]).sample[:, :, 0]

    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        height, width = x_t.shape[-2:]
        longest = int(cond["mask"].sum(1).max())
        mask = cond["mask"][:, :longest]
        answer = denoiser(
            hidden_states=pack(x_t),
            timestep=t / 1000,
            encoder_hidden_states=cond["prompt_embeds"][:, :longest],
            encoder_hidden_states_mask=None if mask.all() else mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
            return_dict=False,
        )[0]
        return unpack(answer, height, width)
