"""Chroma: FLUX.1-schnell without its CLIP, made to be guided again, with a mask over the text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import ChromaPipeline
from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock
from torch import Tensor, nn

from align.families.conditioning import Conditioning
from align.families.flow import Packed, pack, unpack

T5_TOKENS = 512  # ChromaPipeline's own default for max_sequence_length


class Chroma(Packed):
    """The pipeline's mask, of numbers, is a bias in attention: 1 for the prompt and one padding token, 0 for the
    others, which are attended too. So rows keep all their 512 tokens."""

    pipeline = ChromaPipeline
    token_limits = {"tokenizer": T5_TOKENS}  # noqa: RUF012  # a constant of the class
    text_mask = "number"

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        embeds, _, mask, *_ = self.pipe.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
        )
        return Conditioning({"prompt_embeds": embeds, "mask": mask})

    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        height, width = x_t.shape[-2:]
        embeds, tokens = cond["prompt_embeds"], pack(x_t)
        mask = torch.cat([cond["mask"], cond["mask"].new_ones(tokens.shape[:2])], 1)
        with self._masked_when_checkpointed(mask):
            answer = denoiser(
                hidden_states=tokens,
                timestep=t / 1000,
                encoder_hidden_states=embeds,
                txt_ids=torch.zeros(embeds.shape[1], 3, device=x_t.device, dtype=x_t.dtype),
                img_ids=self.pipe._prepare_latent_image_ids(1, height // 2, width // 2, x_t.device, x_t.dtype),
                attention_mask=mask,
                return_dict=False,
            )[0]
        return unpack(answer, height, width)

    @contextmanager
    def _masked_when_checkpointed(self, mask: Tensor) -> Iterator[None]:
        """Where gradients are checkpointed diffusers (0.42.1) calls the single blocks without the mask, which is
        another network; within, they have it, also when they are computed again."""
        network = self.denoiser
        if not network.is_gradient_checkpointing:
            yield
            return
        plain = network._gradient_checkpointing_func

        def checkpointed(block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
            alone = isinstance(block, ChromaSingleTransformerBlock)
            return plain(functools.partial(block, attention_mask=mask) if alone else block, *inputs)

        network._gradient_checkpointing_func = checkpointed
        try:
            yield
        finally:
            network._gradient_checkpointing_func = plain
