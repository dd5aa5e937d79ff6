"""Stable Diffusion 3 and 3.5 (medium, large, turbo): a rectified-flow MMDiT, two CLIP text encoders, T5 optional."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor, nn
from torch.nn import functional as F

from align.common.errors import UserError
from align.diffusion.kernels import FlowSDE, Kernel
from align.diffusion.process import Grid, PredictionType
from align.families.conditioning import Conditioning
from align.families.family import Family, Unsupported
from align.families.parts import require_latents

T5_TOKENS = 256  # StableDiffusion3Pipeline's own default for max_sequence_length


class SD3(Family):
    """Without T5 the pipeline feeds 256 zero tokens, which stay identical through every block. One of them, counted
    256 times in the softmax (:class:`RepeatedTokenAttention`), gives the same output at a fraction of the cost.
    A T5 whose last norm is zero (a folder saved without T5 does not reload in diffusers) counts as absent."""

    denoiser_name = "transformer"
    token_limits = {"tokenizer_3": T5_TOKENS}  # noqa: RUF012  # a constant of the class
    lora_targets = (
        "attn.to_k",
        "attn.to_q",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )

    def __init__(self, pipe: StableDiffusion3Pipeline, source: str) -> None:
        super().__init__(pipe, source)
        _require_flow(source, {"_class_name": type(pipe.scheduler).__name__, **pipe.scheduler.config})
        self.scheduler = self.stock_scheduler(pipe.scheduler)
        self.text_tokens = T5_TOKENS
        t5 = pipe.text_encoder_3
        if t5 is None or not t5.encoder.final_layer_norm.weight.any():
            self.text_tokens = 1
            pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
            for block in pipe.transformer.transformer_blocks:
                block.attn.set_processor(RepeatedTokenAttention(T5_TOKENS))

    @classmethod
    def read(cls, path: str, options: dict[str, Any]) -> StableDiffusion3Pipeline:
        return StableDiffusion3Pipeline.from_pretrained(path, **options)

    @classmethod
    def require_supported(cls, source: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
        _require_flow(source, configs.get("scheduler", {}))
        require_latents(source, "transformer", configs.get("transformer", {}), configs.get("vae", {}))

    @property
    def prediction_type(self) -> PredictionType:
        return "flow_prediction"

    @property
    def scheduler_name(self) -> str:
        return type(self.scheduler).__name__

    @classmethod
    def stock_scheduler(cls, scheduler: SchedulerMixin) -> FlowMatchEulerDiscreteScheduler:
        """Euler of the scheduler's config. DPM++ and UniPC on a flow call the shift ``flow_shift``; noise in the steps
        is the kernel's to add."""
        options: dict[str, Any] = {"stochastic_sampling": False}
        if "flow_shift" in scheduler.config:
            options["shift"] = scheduler.config["flow_shift"]
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **options)

    @property
    def kernel(self) -> Kernel:
        return FlowSDE(noise=0.7)

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

    @property
    def _mu(self) -> float | None:
        """What a scheduler that shifts by the size of the picture is given, as the stock pipeline computes it."""
        config, side = self.scheduler.config, self.denoiser.config.sample_size // self.denoiser.config.patch_size
        if not config.use_dynamic_shifting:
            return None
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return calculate_shift(side**2, *(config[name] for name in names))

    @property
    def shift(self) -> float:
        """s in ``sigma -> s sigma / (1 + (s - 1) sigma)`` (Esser et al. 2024, eq. 23)."""
        if self._mu is None:
            return self.scheduler.config.shift
        return math.exp(self._mu) if self.scheduler.config.time_shift_type == "exponential" else self._mu

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        if resolution not in (None, self.resolution) and self._mu is not None:
            raise UserError(
                f"{self.source} shifts its noise by the size of the picture (use_dynamic_shifting) and is run at its "
                f"own {self.resolution} pixels only, not at {resolution}; for others set use_dynamic_shifting to false "
                "and a shift in its scheduler_config.json"
            )
        return super().latent_shape(resolution)

    def grid(self, steps: int) -> Grid:
        self.require_steps(steps)
        self.scheduler.set_timesteps(steps, mu=self._mu)
        t = torch.cat([self.scheduler.timesteps, torch.zeros(1)])
        return Grid(t, 1 - self.scheduler.sigmas, self.scheduler.sigmas.clone())

    def path(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t.float() / self.scheduler.config.num_train_timesteps
        return 1 - sigma, sigma

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Logit-normal(0, 1), moved by the scheduler's shift (Esser et al. 2024, §3.1 and eq. 23)."""
        sigma = torch.special.ndtri(uniform.double().clamp(1e-6, 1 - 1e-6)).sigmoid()
        sigma = self.shift * sigma / (1 + (self.shift - 1) * sigma)
        return (sigma * self.scheduler.config.num_train_timesteps).float()

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


def _require_flow(source: str, config: Mapping[str, Any]) -> None:
    """Raise :class:`Unsupported` for a scheduler config that is of no rectified flow from noise to data."""
    name = str(config.get("_class_name", "FlowMatch"))
    flow = name.startswith("FlowMatch") or config.get("use_flow_sigmas") or "flow_shift" in config
    if not flow or config.get("prediction_type", "flow_prediction") != "flow_prediction" or config.get("invert_sigmas"):
        raise Unsupported(
            f"{source}: {name} with prediction_type {config.get('prediction_type')} is no schedule of a rectified "
            "flow; save the pipeline with FlowMatchEulerDiscreteScheduler"
        )
    shift = config.get("flow_shift", config.get("shift", 1.0))
    if not isinstance(shift, int | float) or shift <= 0:
        raise Unsupported(f"{source}: scheduler/scheduler_config.json has shift {shift}; expected a positive number")
