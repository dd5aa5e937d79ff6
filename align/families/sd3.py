"""Stable Diffusion 3 and 3.5 (medium, large, turbo): a rectified-flow MMDiT, two CLIP text encoders, T5 optional."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from align.common.errors import UserError
from align.families.conditioning import Conditioning
from align.families.flow import JOINT_ATTENTION, Flow
from align.families.parts import require_latents

T5_TOKENS = 256  # StableDiffusion3Pipeline's own default for max_sequence_length


class SD3(Flow):
    """Without T5 the pipeline feeds 256 zero tokens, which stay identical through every block. One of them, counted
    256 times in the softmax (:class:`RepeatedTokenAttention`), gives the same output at a fraction of the cost.
    A T5 whose last norm is zero (a folder saved without T5 does not reload in diffusers) counts as absent."""

    pipeline = StableDiffusion3Pipeline
    patch = 2
    token_limits = {"tokenizer_3": T5_TOKENS}  # noqa: RUF012  # a constant of the class
    lora_targets = JOINT_ATTENTION

    def __init__(self, pipe: StableDiffusion3Pipeline, source: str) -> None:
        super().__init__(pipe, source)
        self.text_tokens = T5_TOKENS
        t5 = pipe.text_encoder_3
        if t5 is None or not t5.encoder.final_layer_norm.weight.any():
            self.text_tokens = 1
            pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
            for block in pipe.transformer.transformer_blocks:
                block.attn.set_processor(RepeatedTokenAttention(T5_TOKENS))

    @classmethod
    def require_supported(cls, source: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
        super().require_supported(source, configs)
        require_latents(source, "transformer", configs.get("transformer", {}), configs.get("vae", {}))

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        shape, most = super().latent_shape(height, width), self.denoiser.config.pos_embed_max_size
        if max(shape[1:]) > self.patch * most:
            raise UserError(
                f"resolution: a side of at most {self.patch * most * self.cell} pixels, which this model knows"
            )
        return shape

    def sigmas(self, steps: int) -> None:
        return None  # the pipeline leaves them to its scheduler

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_tokens,
        )
        return Conditioning({"prompt_embeds": embeds, "pooled": pooled})

    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return denoiser(
            hidden_states=x_t,
            timestep=t,
            encoder_hidden_states=cond["prompt_embeds"],
            pooled_projections=cond["pooled"],
            return_dict=False,
        )[0]


class RepeatedTokenAttention:
    """Joint attention in which the last context token stands for ``count`` identical ones.

    Softmax over ``count`` equal keys with equal values is softmax over one key whose logit is raised by ln(count).
    """

    def __init__(self, count: int) -> None:
        self.raise_by = math.log(count)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        def heads(x: Tensor, norm: nn.Module | None) -> Tensor:
            x = x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            return norm(x) if norm is not None else x

        image, text = hidden_states, encoder_hidden_states
        query = torch.cat([heads(attn.to_q(image), attn.norm_q), heads(attn.add_q_proj(text), attn.norm_added_q)], 2)
        key = torch.cat([heads(attn.to_k(image), attn.norm_k), heads(attn.add_k_proj(text), attn.norm_added_k)], 2)
        value = torch.cat([heads(attn.to_v(image), None), heads(attn.add_v_proj(text), None)], 2)
        bias = torch.zeros(1, 1, 1, key.shape[2], dtype=query.dtype, device=query.device)
        bias[..., -1] = self.raise_by
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        mixed = mixed.transpose(1, 2).flatten(2).to(query.dtype)
        image, text = mixed.split([image.shape[1], text.shape[1]], dim=1)
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](image)), text
