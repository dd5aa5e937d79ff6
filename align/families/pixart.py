"""PixArt-Sigma: an epsilon DiT on SD's schedule with T5; it predicts a variance too, which nobody uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import PixArtSigmaPipeline
from torch import Tensor, nn

from align.families.conditioning import Conditioning
from align.families.family import GuidanceKind
from align.families.schedules import require_schedule
from align.families.sd import SD


class PixArtSigma(SD):
    """Full fine-tuning only: diffusers' PixArt transformer takes no LoRA."""

    pipeline = PixArtSigmaPipeline
    read_options = {}  # noqa: RUF012  # a constant of the class
    denoiser_name = "transformer"
    lora_targets = ()
    patch = 2
    token_limits = {"tokenizer": 300}  # noqa: RUF012  # PixArtSigmaPipeline's own default for max_sequence_length
    text_mask = "bool"

    @classmethod
    def require_supported(cls, source: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
        require_schedule(source, configs.get("scheduler", {}))

    @property
    def guidance_kind(self) -> GuidanceKind:
        return "classifier-free"

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        embeds, mask, *_ = self.pipe.encode_prompt(list(prompts), False, device=self.device)
        return Conditioning({"prompt_embeds": embeds, "mask": mask})

    def stock_arguments(self, steps: int, guidance_scale: float) -> dict[str, Any]:
        return super().stock_arguments(steps, guidance_scale) | {"use_resolution_binning": False}

    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        answer = denoiser(
            x_t,
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_attention_mask=cond["mask"],
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return answer[:, : self.channels]
