"""A family hides diffusers: text encoders, VAE scaling, packing, guidance batching, precision.

Objectives see only :class:`Family` and :class:`Conditioning`. Pictures are (B, 3, H, W) float in [0, 1] everywhere.
:func:`load` finds the right family from a pipeline folder's ``model_index.json``.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from align.common.assets import locate
from align.common.errors import UserError
from align.common.renames import upgrade
from align.diffusion.kernels import Kernel
from align.diffusion.process import Grid, Prediction, PredictionType, append_dims, upcast
from align.families.conditioning import Conditioning

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

LORA_FILE = "pytorch_lora_weights.safetensors"
SAMPLING_FILE = "sampling.json"  # a folder may say which guidance and steps its pipeline was made for


class Unsupported(UserError):
    """A model folder that is missing, or of a pipeline class without a family."""


class Family(ABC):
    """One model family over a loaded diffusers pipeline. Subclasses fill in the abstract methods and the constants."""

    denoiser_name: ClassVar[str]  # the pipeline's own attribute, also the prefix of its LoRA keys
    lora_targets: ClassVar[tuple[str, ...]]
    token_limits: ClassVar[Mapping[str, int]] = {}  # by tokenizer, where the pipeline takes fewer tokens than that does

    def __init__(self, pipe: DiffusionPipeline, source: str) -> None:
        self.pipe = pipe
        self.source = source
        self._uncond: Conditioning | None = None
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        pipe.set_progress_bar_config(disable=True)

    # what differs between families
    @classmethod
    @abstractmethod
    def read(cls, path: str, options: dict[str, Any]) -> DiffusionPipeline:
        """The family's pipeline from a folder or hub id; ``options`` are diffusers' ``from_pretrained`` ones."""

    @classmethod  # noqa: B027  # a family may refuse nothing
    def require_supported(cls, source: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise :class:`Unsupported` for a pipeline of the right class that this family does not run, by the config
        files of its parts, before a weight is read."""

    @property
    @abstractmethod
    def prediction_type(self) -> PredictionType:
        """The coordinate of the network's output."""

    @property
    @abstractmethod
    def kernel(self) -> Kernel:
        """The stochastic reverse step that policy gradients on this family use by default."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Text to conditions; gradients reach the text encoders unless the caller forbids it."""

    def require_steps(self, steps: int) -> None:
        """Raise :class:`UserError` for more than the scheduler's training times."""
        if not 1 <= steps <= (most := self.pipe.scheduler.config.num_train_timesteps):
            raise UserError(f"num_inference_steps must lie between 1 and {most} for {self.source}, got {steps}")

    @abstractmethod
    def grid(self, steps: int) -> Grid:
        """The sampling schedule that the pipeline itself would use."""

    @abstractmethod
    def path(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at times ``t`` of shape (B,), in the network's units."""

    @abstractmethod
    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Training times from uniform numbers in [0, 1), shape (B,): the family's own training distribution."""

    @abstractmethod
    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """One plain evaluation of ``denoiser``."""

    # what they share
    @property
    def denoiser(self) -> ModelMixin:
        return getattr(self.pipe, self.denoiser_name)

    @property
    def device(self) -> torch.device:
        return next(self.pipe.vae.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the frozen parts."""
        return next(self.pipe.vae.parameters()).dtype

    def autocast(self) -> torch.autocast:
        """In which a denoiser of half-precision weights takes the float32 states of the process; none for float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def default_guidance_scale(self) -> float:
        """The guidance scale that the folder recommends, else the one its pipeline class uses by default."""
        return float(self._recommended("guidance_scale"))

    @property
    def default_num_inference_steps(self) -> int:
        """The number of sampler steps that the folder recommends, else the pipeline class's default."""
        return int(self._recommended("num_inference_steps"))

    def _recommended(self, name: str) -> float:
        path = Path(locate(self.source)) / SAMPLING_FILE
        default = inspect.signature(type(self.pipe).__call__).parameters[name].default
        try:
            recommended = upgrade(json.loads(path.read_text())) if path.is_file() else {}
            value = float(recommended.get(name, default))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise Unsupported(f"{path} is no JSON object of numbers: {error}") from error
        if not math.isfinite(value) or value < (1 if name == "num_inference_steps" else 0):
            raise Unsupported(f"{path}: {name} is {value}; expected a guidance scale of at least 0 and a step or more")
        return value

    @property
    def scheduler_name(self) -> str:
        """The diffusers scheduler that :meth:`grid` and a deterministic step are; the pipeline may have another."""
        return type(self.pipe.scheduler).__name__

    @classmethod
    def stock_scheduler(cls, scheduler: SchedulerMixin) -> SchedulerMixin:
        """The diffusers scheduler by which a stock pipeline that came with ``scheduler`` draws what we draw."""
        return scheduler

    @property
    def resolution(self) -> int:
        """The side, in pixels, of the square picture that the model was trained on. Raises :class:`Unsupported`."""
        side = self.denoiser.config.sample_size
        if not isinstance(side, int) or side < 1:
            raise Unsupported(
                f"{self.source}: {self.denoiser_name}/config.json has sample_size {side}; expected the side of a "
                "square latent"
            )
        return side * self.pipe.vae_scale_factor

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of one latent for a square picture of ``resolution`` pixels."""
        side = resolution or self.resolution
        if side % self.pipe.vae_scale_factor:
            step = self.pipe.vae_scale_factor
            raise UserError(
                f"resolution: {side} is no multiple of {step}; the nearest is {max(1, round(side / step)) * step}"
            )
        side //= self.pipe.vae_scale_factor
        return (self.denoiser.config.in_channels, side, side)

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network takes the guidance scale as an input, as distilled ones do; it is then asked once, and
        :meth:`call` finds the scale, (B,), in the conditions as ``guidance``."""
        return False

    def evaluations(self, guidance_scale: float) -> int:
        """Network evaluations of one prediction. At or below 1 stock diffusers asks once, with the prompt: 0 is what
        few-step models such as SD-Turbo and SD3.5-turbo are called with."""
        return 2 if guidance_scale > 1.0 and not self.embeds_guidance else 1

    def forward(
        self, x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float = 1.0, denoiser: nn.Module | None = None
    ) -> Tensor:
        """The raw network output at ``x_t`` (B, C, h, w) and ``t`` (B,), guided (Ho & Salimans 2022) when
        ``guidance_scale`` is above 1: unconditional and conditional rows go through the network as one batch of 2B."""
        denoiser = denoiser if denoiser is not None else self.denoiser
        if self.embeds_guidance:
            cond = Conditioning(cond.tensors | {"guidance": torch.full((len(x_t),), guidance_scale, device=x_t.device)})
        if self.evaluations(guidance_scale) == 1:
            return self.call(denoiser, x_t, t, cond)
        both = Conditioning.cat([self.uncond.expand(len(x_t)), cond])
        # mixed in float32 whatever network answers: the policy's wrapper gives float32, a bare reference need not
        free, bound = upcast(self.call(denoiser, x_t.repeat(2, 1, 1, 1), t.repeat(2), both)).chunk(2)
        return free + guidance_scale * (bound - free)

    def predict(
        self, x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float = 1.0, denoiser: nn.Module | None = None
    ) -> Prediction:
        """:meth:`forward`'s answer with the coordinates to read it in."""
        alpha, sigma = self.path(t)
        return Prediction(self.forward(x_t, t, cond, guidance_scale, denoiser), x_t, alpha, sigma, self.prediction_type)

    @property
    def uncond(self) -> Conditioning:
        """The empty prompt's conditions, a batch of one; encoded once."""
        if self._uncond is None:
            # as every other prompt is encoded, whoever asks first: a T5 keeps some layers in float32 for a reason
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                self._uncond = self.encode([""])
        return self._uncond

    def drop_prompts(self, cond: Conditioning, empty: Tensor) -> Conditioning:
        """``cond`` on this device, with the empty prompt's in the rows where ``empty`` (B,) is true."""
        cond = cond.to(self.device)
        if not empty.any():
            return cond
        null, mask = self.uncond, empty.to(self.device)
        return Conditioning({k: torch.where(append_dims(mask, v), null[k].to(v), v) for k, v in cond.tensors.items()})

    @property
    def _scaling(self) -> tuple[float, float]:
        """The VAE's shift and scale; only some classes have a shift."""
        config = self.pipe.vae.config
        return config.get("shift_factor") or 0.0, config.scaling_factor

    def to_latent(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] to latents: the posterior's mean, in the denoiser's scale, float32."""
        vae, (shift, scale) = self.pipe.vae, self._scaling
        encoded = vae.encode((images * 2 - 1).to(vae.device, vae.dtype))
        mean = encoded["latents"] if "latents" in encoded else encoded.latent_dist.mode()  # AutoencoderTiny's, others'
        return (mean.float() - shift) * scale

    def to_image(self, x0: Tensor) -> Tensor:
        """Latents to pictures (B, 3, H, W) in [0, 1], float32; differentiable."""
        vae, (shift, scale) = self.pipe.vae, self._scaling
        latents = x0 / scale + shift
        return (vae.decode(latents.to(vae.device, vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    def identity(self) -> Mapping[str, Mapping[str, object]]:
        """What cached latents of ``pictures`` and embeddings of ``captions`` depend on: the VAE, and all but it and the
        denoiser. Where the pipeline lies does not matter."""
        from transformers import PreTrainedTokenizerBase

        parts = {name: part for name, part in self.pipe.components.items() if name != self.denoiser_name}
        weights = {
            name: [type(part).__name__, sum(p.numel() for p in part.parameters()), _fingerprint(part)]
            for name, part in parts.items()
            if isinstance(part, nn.Module)
        }
        tokenizers = {
            name: [part.model_max_length, _digest(sorted(part.get_vocab().items()))]
            for name, part in parts.items()
            if isinstance(part, PreTrainedTokenizerBase)
        }
        scaling = [self.pipe.vae.config.scaling_factor, self.pipe.vae.config.get("shift_factor")]
        family, vae = {"family": type(self).__name__}, weights.pop("vae")
        return {
            "pictures": family | {"vae": vae, "scaling": scaling},
            "captions": family | {"weights": weights, "tokenizers": tokenizers},
        }


def _digest(value: object) -> str:
    return hashlib.sha256(str(value).encode()).hexdigest()


def _fingerprint(module: nn.Module) -> str:
    """Of about 1,024 numbers of each parameter, evenly spaced: training changes them, while in a sum it cancels out."""
    sampled = [p.detach().flatten()[:: max(1, p.numel() // 1024)].float().cpu() for p in module.parameters()]
    return hashlib.sha256(torch.cat(sampled).numpy().tobytes()).hexdigest()
