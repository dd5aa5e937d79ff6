"""Stable Diffusion 1.x and 2.x: an epsilon or v U-Net on a variance-preserving schedule, one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, SchedulerMixin, StableDiffusionPipeline
from torch import Tensor, nn

from align.common.errors import UserError
from align.diffusion.kernels import DDIM, Kernel
from align.diffusion.process import Grid, PredictionType, upload
from align.families.conditioning import Conditioning
from align.families.family import Family, GuidanceKind
from align.families.folder import Unsupported
from align.families.parts import require_latents
from align.families.schedules import require_schedule


class SD(Family):
    """Samples on the DDIM grid of the pipeline's own scheduler config, whichever scheduler it came with."""

    pipeline: ClassVar[type[DiffusionPipeline]] = StableDiffusionPipeline
    # the safety checker costs 1.2 GB and would black out what a reward should see
    read_options: ClassVar[dict[str, Any]] = {"safety_checker": None, "requires_safety_checker": False}
    denoiser_name = "unet"
    lora_targets: tuple[str, ...] = ("to_k", "to_q", "to_v", "to_out.0")

    def __init__(self, pipe: DiffusionPipeline, source: str) -> None:
        super().__init__(pipe, source)
        require_schedule(source, {"_class_name": type(pipe.scheduler).__name__, **pipe.scheduler.config})
        self.scheduler = self.stock_scheduler(pipe.scheduler)
        cumprod = self.scheduler.alphas_cumprod
        if not bool(((cumprod >= 0) & (cumprod <= 1)).all() and (cumprod.diff() <= 0).all() and cumprod[0] > 0):
            raise Unsupported(f"{source}: scheduler/scheduler_config.json has betas that are no schedule of noise")

    @classmethod
    def require_supported(cls, source: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
        require_schedule(source, configs.get("scheduler", {}))
        unet, vae, text = (configs.get(part, {}) for part in ("unet", "vae", "text_encoder"))
        require_latents(source, "unet", unet, vae)
        if "hidden_size" in text and text["hidden_size"] != unet.get("cross_attention_dim", text["hidden_size"]):
            raise Unsupported(
                f"{source}: the unet expects prompts of {unet['cross_attention_dim']} channels and the text encoder "
                f"gives {text['hidden_size']}; one of them is another model's"
            )

    @classmethod
    def stock_scheduler(cls, scheduler: SchedulerMixin) -> DDIMScheduler:
        """DDIM of the scheduler's config. Clipping to [-1, 1] is for pixels. Of times that are spaced up to both ends
        (``linspace``, the default of Euler and DPM++) stock DDIM steps to others than it asks at: SD's published
        spacing stands in. So it does, by one time in 1,000, where ``trailing`` steps do not divide their number."""
        options: dict[str, Any] = {"clip_sample": False, "thresholding": False}
        if scheduler.config.get("timestep_spacing") == "linspace":
            options |= {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
        return DDIMScheduler.from_config(scheduler.config, **options)

    @property
    def prediction_type(self) -> PredictionType:
        return self.scheduler.config.prediction_type

    @property
    def kernel(self) -> Kernel:
        return DDIM(eta=1.0)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        embeds, _ = self.pipe.encode_prompt(list(prompts), self.device, 1, False)
        return Conditioning({"prompt_embeds": embeds})

    def grid(self, steps: int, height: int | None = None, width: int | None = None) -> Grid:
        self.require_steps(steps)
        self.scheduler.set_timesteps(steps)
        t, most = self.scheduler.timesteps, self.scheduler.config.num_train_timesteps
        if t.max() >= most:  # the steps' offset leads beyond the last training time
            raise UserError(f"num_inference_steps: {steps} is too many for the spacing of {self.source}; take fewer")
        last = t[-1:] - most // steps  # where diffusers' DDIM lands
        cumprod = torch.cat([self.scheduler.alphas_cumprod[t], self._cumprod(last)])
        if self.prediction_type == "epsilon" and not cumprod[0]:
            raise UserError(
                f"{self.source} predicts epsilon, which says nothing of the image where its schedule begins, in pure "
                "noise (rescale_betas_zero_snr and timestep_spacing trailing): set one of them as the model was trained"
            )
        return Grid(torch.cat([t, last.clamp(min=0)]).float(), cumprod.sqrt(), (1 - cumprod).sqrt())

    def _cumprod(self, t: Tensor) -> Tensor:
        beyond = self.scheduler.final_alpha_cumprod
        return torch.where(t < 0, beyond, self.scheduler.alphas_cumprod[t.clamp(min=0)])

    def path(self, t: Tensor) -> tuple[Tensor, Tensor]:
        cumprod = upload(self.scheduler.alphas_cumprod, t.device)[t.long()]
        return cumprod.sqrt(), (1 - cumprod).sqrt()

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Uniform over the training timesteps, as DDPM and Diffusion-DPO draw them."""
        return (uniform * self.scheduler.config.num_train_timesteps).floor()

    def few_steps(self) -> int | None:
        """Stability's Turbo models tell themselves by Euler's scheduler and times spaced from the end."""
        config = self.pipe.scheduler.config
        turbo = type(self.pipe.scheduler).__name__.startswith("Euler") and config.timestep_spacing == "trailing"
        return 4 if turbo and self.prediction_type == "epsilon" else super().few_steps()

    @property
    def guidance_kind(self) -> GuidanceKind:
        # latent consistency models (arXiv 2310.04378) embed the scale
        return "classifier-free" if self.denoiser.config.time_cond_proj_dim is None else "embedded"

    def guidance_embedding(self, x_t: Tensor, cond: Conditioning) -> Tensor | None:
        """What a network that takes the guidance scale as an input is given for it; None for others."""
        if self.guidance_kind != "embedded":
            return None
        size = self.denoiser.config.time_cond_proj_dim
        return self.pipe.get_guidance_scale_embedding(cond["guidance"] - 1, size, x_t.dtype)

    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return denoiser(
            x_t,
            t,
            encoder_hidden_states=cond["prompt_embeds"],
            timestep_cond=self.guidance_embedding(x_t, cond),
            return_dict=False,
        )[0]
