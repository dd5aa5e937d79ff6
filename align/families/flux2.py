"""FLUX.2: dev, which takes the guidance scale as an input, and klein, guided or distilled; one network and VAE."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn

from align.families.conditioning import Conditioning
from align.families.family import GuidanceKind
from align.families.flow import Flow


class Flux2(Flow):
    """A latent is what the pipeline's ``latents`` are: squares of 2 by 2 of the autoencoder's, normalized by its batch
    norm, (4C, h/2, w/2)."""

    pipeline = Flux2Pipeline
    token_limits = {"tokenizer": 512}  # noqa: RUF012  # both pipelines' own default for max_sequence_length
    lora_targets: tuple[str, ...] = (
        "to_k",
        "to_q",
        "to_v",
        "to_out.0",
        "add_k_proj",
        "add_q_proj",
        "add_v_proj",
        "to_add_out",
        "to_qkv_mlp_proj",
    )

    def __init__(self, pipe: Flux2Pipeline | Flux2KleinPipeline, source: str) -> None:
        super().__init__(pipe, source)
        # a single block's output has the name that in a double block is a list of layers: named in full
        single = range(self.denoiser.config.num_single_layers)
        self.lora_targets = (*self.lora_targets, *(f"single_transformer_blocks.{i}.attn.to_out" for i in single))

    @property
    def guidance_kind(self) -> GuidanceKind:
        return "embedded" if self.denoiser.config.guidance_embeds else "classifier-free"

    @property
    def cell(self) -> int:
        return 2 * int(self.pipe.vae_scale_factor)

    def mu(self, steps: int, tokens: int) -> float:
        return compute_empirical_mu(tokens, steps)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning({"prompt_embeds": self.pipe.encode_prompt(list(prompts), device=self.device)[0]})

    def statistics(self) -> tuple[Tensor, Tensor]:
        norm, eps = self.pipe.vae.bn, self.pipe.vae.config.batch_norm_eps
        return norm.running_mean[:, None, None], 1 / (norm.running_var + eps).sqrt()[:, None, None]

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return self.pipe._patchify_latents(super().encode_pixels(pixels))

    def decode_pixels(self, z: Tensor) -> Tensor:
        return super().decode_pixels(self.pipe._unpatchify_latents(z))

    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        embeds = cond["prompt_embeds"]
        answer = denoiser(
            hidden_states=x_t.flatten(2).transpose(1, 2),
            timestep=t / 1000,
            guidance=cond.tensors.get("guidance"),
            encoder_hidden_states=embeds,
            txt_ids=self.pipe._prepare_text_ids(embeds[:1]).to(x_t.device),
            img_ids=self.pipe._prepare_latent_ids(x_t[:1]).to(x_t.device),
            return_dict=False,
        )[0]
        return answer.transpose(1, 2).reshape(x_t.shape)


class Flux2Klein(Flux2):
    pipeline = Flux2KleinPipeline

    @property
    def guidance_kind(self) -> GuidanceKind:
        return "none" if self.pipe.config.is_distilled else "classifier-free"

    def few_steps(self) -> int | None:
        return 4 if self.pipe.config.is_distilled else None
