"""Stable Diffusion XL, its Turbo and fine-tunes: SD's U-Net with two CLIP text encoders and the size of the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from align.families.conditioning import Conditioning
from align.families.folder import Unsupported
from align.families.parts import require_latents
from align.families.schedules import require_schedule
from align.families.sd import SD


class SDXL(SD):
    """The network is told that the image was taken whole and at the size in which it is drawn."""

    pipeline = StableDiffusionXLPipeline
    read_options = {"add_watermarker": False}  # noqa: RUF012  # a constant of the class

    def __init__(self, pipe: StableDiffusionXLPipeline, source: str) -> None:
        super().__init__(pipe, source)
        if pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast:
            pipe.vae.to(torch.float32)  # SDXL's own overflows in float16

    @classmethod
    def require_supported(cls, source: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
        scheduler, unet = (configs.get(part, {}) for part in ("scheduler", "unet"))
        if str(scheduler.get("_class_name", "")).startswith("EDM"):
            raise Unsupported(
                f"{source}: {scheduler['_class_name']} is EDM's own coordinates (Playground 2.5), which no kernel here "
                "has; supported are SDXL models of epsilon or v prediction"
            )
        require_schedule(source, scheduler)
        if missing := [part for part in ("text_encoder", "text_encoder_2") if part not in configs]:
            raise Unsupported(f"{source} has no {missing[0]}; SDXL's base model reads prompts by both of its encoders")
        require_latents(source, "unet", unet, configs.get("vae", {}))

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        return Conditioning({"prompt_embeds": embeds, "pooled": pooled})

    def unconditional(self) -> Conditioning:
        """Zeros, where the pipeline says so (``force_zeros_for_empty_prompt``), and else the empty prompt."""
        empty = super().unconditional()
        if not self.pipe.config.force_zeros_for_empty_prompt:
            return empty
        return Conditioning({name: torch.zeros_like(tensor) for name, tensor in empty.tensors.items()})

    def statistics(self) -> tuple[float | Tensor, float | Tensor]:
        config = self.pipe.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return super().statistics()
        return torch.tensor(mean)[:, None, None], config.scaling_factor / torch.tensor(std)[:, None, None]

    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        height, width = (side * self.cell for side in x_t.shape[-2:])
        # as the pipeline has them: original size, top left corner of the cut, size that is drawn
        sizes = torch.tensor([height, width, 0, 0, height, width], device=x_t.device, dtype=cond["pooled"].dtype)
        return denoiser(
            x_t,
            t,
            encoder_hidden_states=cond["prompt_embeds"],
            timestep_cond=self.guidance_embedding(x_t, cond),
            added_cond_kwargs={"text_embeds": cond["pooled"], "time_ids": sizes.expand(len(x_t), 6)},
            return_dict=False,
        )[0]
