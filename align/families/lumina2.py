"""Lumina-Image 2.0: one stream of Gemma 2's text and the image, time from 0 to 1, the velocity the other way round."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import Lumina2Pipeline
from torch import Tensor, nn

from align.families.conditioning import Conditioning
from align.families.flow import Flow


class Lumina2(Flow):
    pipeline = Lumina2Pipeline
    patch = 2
    token_limits = {"tokenizer": 256}  # noqa: RUF012  # Lumina2Pipeline's own default for max_sequence_length
    text_mask = "bool"

    def mu(self, steps: int, tokens: int) -> float:
        return super().mu(steps, self.channels)  # the pipeline takes a dimension of its latents for their number

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        embeds, mask, *_ = self.pipe.encode_prompt(list(prompts), False, device=self.device)
        return Conditioning({"prompt_embeds": embeds, "mask": mask})

    def unconditional(self) -> Conditioning:
        *_, embeds, mask = self.pipe.encode_prompt([""], True, device=self.device)  # without the system prompt
        return Conditioning({"prompt_embeds": embeds, "mask": mask})

    def guide(self, free: Tensor, bound: Tensor, guidance_scale: float) -> Tensor:
        """Mixed, and each row of latent cells brought to the length of the conditional one, as the pipeline has it."""
        mixed = super().guide(free, bound, guidance_scale)
        return mixed * (bound.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))

    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        answer = denoiser(
            hidden_states=x_t,
            timestep=1 - t / 1000,
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_attention_mask=cond["mask"],
            return_dict=False,
        )[0]
        return -answer
