"""SANA 1 and 1.5: a linear-attention DiT on a deep-compression autoencoder, text from Gemma 2."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
from diffusers import SanaPipeline
from torch import Tensor, nn

from align.families.conditioning import Conditioning
from align.families.flow import Flow


class Sana(Flow):
    """Drawn by Euler's steps from sigma 1 with the pipeline's shift, whose own two-step solver is no single kernel."""

    pipeline = SanaPipeline
    token_limits = {"tokenizer": 300}  # noqa: RUF012  # SanaPipeline's own default for max_sequence_length
    text_mask = "bool"

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
        return self._encode(prompts, instruction)

    def unconditional(self) -> Conditioning:
        return self._encode([""], None)  # the pipeline puts no instruction before a negative prompt

    def _encode(self, prompts: Sequence[str], instruction: list[str] | None) -> Conditioning:
        embeds, mask, *_ = self.pipe.encode_prompt(
            list(prompts), False, device=self.device, complex_human_instruction=instruction
        )
        return Conditioning({"prompt_embeds": embeds, "mask": mask})

    def stock_arguments(self, steps: int, guidance_scale: float) -> dict[str, Any]:
        own = {"sigmas": np.linspace(1.0, 1 / steps, steps).tolist(), "use_resolution_binning": False}
        return super().stock_arguments(steps, guidance_scale) | own

    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        answer = denoiser(
            x_t,
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_attention_mask=cond["mask"],
            timestep=t * self.denoiser.config.timestep_scale,
            return_dict=False,
        )[0]
        return answer[:, : self.channels]  # some give a variance too
