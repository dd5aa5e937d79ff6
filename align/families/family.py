"""A family hides diffusers: text encoders, VAE scaling, packing, guidance, sizes, precision.

Objectives see only :class:`Family` and :class:`Conditioning`. Pictures are (B, 3, H, W) float in [0, 1] everywhere.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from align.common.errors import UserError
from align.diffusion.kernels import Kernel
from align.diffusion.process import Grid, Prediction, PredictionType, upcast, upload
from align.families.conditioning import Conditioning
from align.families.decoding import in_parts
from align.families.folder import Unsupported, recommendations
from align.families.identity import identity

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

GuidanceKind = Literal["classifier-free", "embedded", "none"]
Scale = float | None  # of guidance; None is a model in training


class Family(ABC):
    """One model family over a loaded diffusers pipeline. Subclasses fill in the abstract methods and the constants."""

    pipeline: ClassVar[type[DiffusionPipeline]]
    read_options: ClassVar[dict[str, Any]] = {}  # of ``from_pretrained``, beside those that every pipeline has
    denoiser_name: ClassVar[str]  # the pipeline's own attribute, also the prefix of its LoRA keys
    lora_targets: tuple[str, ...]
    idle: tuple[str, ...] = ()  # modules of the denoiser whose output goes nowhere, and which so have no gradient
    token_limits: ClassVar[Mapping[str, int]] = {}  # by tokenizer, where the pipeline takes fewer tokens than that does
    text_tokens: int = 0  # of a second encoder, whose embeddings follow those of the first
    text_mask: ClassVar[Literal["bool", "number"] | None] = None  # the type of ``mask`` in the conditions
    unguided_scale: ClassVar[float] = 1.0  # up to this guidance scale the stock pipeline asks once, with the prompt
    guidance_argument: ClassVar[str] = "guidance_scale"  # of the stock pipeline's ``__call__``
    decode_batch_size: int | None = None  # latents that the autoencoder decodes at once; None is all
    patch: ClassVar[int] = 1  # latent cells along the side of a token; a side of a latent is a multiple of it

    def __init__(self, pipe: DiffusionPipeline, source: str) -> None:
        self.pipe, self.source, self._recommended = pipe, source, recommendations(source)
        self._uncond: Conditioning | None = None
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        pipe.set_progress_bar_config(disable=True)

    # what differs between families
    @classmethod
    def read(cls, path: str, options: dict[str, Any]) -> DiffusionPipeline:
        """The family's pipeline from a folder or hub id; ``options`` are diffusers' ``from_pretrained`` ones."""
        return cls.pipeline.from_pretrained(path, **options | cls.read_options)

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
    def grid(self, steps: int, height: int | None = None, width: int | None = None) -> Grid:
        """The sampling schedule that the pipeline itself would use for an image of that size (:meth:`latent_shape`)."""

    @abstractmethod
    def path(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at times ``t`` of shape (B,), in the network's units."""

    @abstractmethod
    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Training times from uniform numbers in [0, 1), shape (B,): the family's own training distribution."""

    @abstractmethod
    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """One plain evaluation of ``denoiser``."""

    @property
    def guidance_kind(self) -> GuidanceKind:
        """``classifier-free``: a prediction with the prompt and one without are mixed; ``embedded``: the network takes
        the scale as an input, which :meth:`call` finds, (B,), in the conditions as ``guidance``; ``none``: neither."""
        return "classifier-free"

    def guide(self, free: Tensor, bound: Tensor, guidance_scale: float) -> Tensor:
        """The prediction without and with the prompt, mixed (Ho & Salimans 2022, in diffusers' scale)."""
        return free + guidance_scale * (bound - free)

    def unconditional(self) -> Conditioning:
        """What stands for no prompt, a batch of one: by default the empty prompt."""
        return self.encode([""])

    def few_steps(self) -> int | None:
        """In how many steps, unguided, a distilled model draws; None of others. By default its name tells."""
        paths = (self.source, *(str(part.config.get("_name_or_path", "")) for part in (self.pipe, self.denoiser)))
        names = " ".join(Path(path).name.lower() for path in paths)  # a folder above may be called anything
        return 4 if re.search("turbo|lightning|schnell|hyper-?sd", names) else None

    def statistics(self) -> tuple[float | Tensor, float | Tensor]:
        """Shift and scale of the autoencoder, latent = (z - shift) * scale: numbers, or (C, 1, 1)."""
        config = self.pipe.vae.config
        return config.get("shift_factor") or 0.0, config.scaling_factor

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """The autoencoder's z, the posterior's mean, of pixels (B, 3, H, W) in [-1, 1]."""
        encoded = self.pipe.vae.encode(pixels)
        # AutoencoderDC's and AutoencoderTiny's have no posterior
        plain = next((encoded[name] for name in ("latent", "latents") if name in encoded), None)
        return encoded.latent_dist.mode() if plain is None else plain

    def decode_pixels(self, z: Tensor) -> Tensor:
        return self.pipe.vae.decode(z).sample

    @classmethod
    def stock_latents(cls, x: Tensor) -> Tensor:
        """Latents (B, C, h, w) in the form in which the stock pipeline takes and gives them."""
        return x

    def stock_arguments(self, steps: int, guidance_scale: float) -> dict[str, Any]:
        """With these, beside prompt, size and latents, the stock pipeline draws what we draw."""
        return {"num_inference_steps": steps, self.guidance_argument: guidance_scale}

    # what they share
    @property
    def denoiser(self) -> ModelMixin:
        return getattr(self.pipe, self.denoiser_name)

    @property
    def device(self) -> torch.device:
        places = [next(part.parameters()).device for part in (self.denoiser, self.pipe.vae)]  # one may wait on the CPU
        return next((place for place in places if place.type != "cpu"), places[0])

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the frozen parts; an autoencoder that overflows in it has its own."""
        return next(self.pipe.text_encoder.parameters()).dtype

    def autocast(self) -> torch.autocast:
        """In which a denoiser of half-precision weights takes the float32 states of the process; none for float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @cached_property
    def default_guidance_scale(self) -> float:
        """The guidance scale that the folder recommends, else the one its pipeline class uses by default; of a few-step
        model without classifier-free guidance none."""
        plain = self.few_steps() is not None and self.guidance_kind != "embedded"
        default = self.unguided_scale if plain else self._stock(self.guidance_argument)
        return self._recommended.get("guidance_scale", float(default))

    @cached_property
    def default_num_inference_steps(self) -> int:
        """The number of sampler steps that the folder recommends, else :meth:`few_steps`, else the pipeline class's."""
        default = self.few_steps() or self._stock("num_inference_steps")
        return int(self._recommended.get("num_inference_steps", default))

    def _stock(self, argument: str) -> float:
        """The default of the stock pipeline's ``__call__``."""
        return inspect.signature(type(self.pipe).__call__).parameters[argument].default

    @property
    def scheduler_name(self) -> str:
        """The diffusers scheduler that :meth:`grid` and a deterministic step are; the pipeline may have another."""
        return type(self.stock_scheduler(self.pipe.scheduler)).__name__

    @classmethod
    def stock_scheduler(cls, scheduler: SchedulerMixin) -> SchedulerMixin:
        """The diffusers scheduler by which a stock pipeline that came with ``scheduler`` draws what we draw."""
        return scheduler

    @property
    def resolution(self) -> int:
        """The side, in pixels, of the square picture that the model was trained on. Raises :class:`Unsupported`."""
        side = self.denoiser.config.get("sample_size", getattr(self.pipe, "default_sample_size", 128))
        if not isinstance(side, int) or side < 1:
            raise Unsupported(f"{self.source}: sample_size in {self.denoiser_name}/config.json is {side}, no side")
        return int(self._recommended.get("resolution", side * self.pipe.vae_scale_factor))

    @property
    def channels(self) -> int:
        """Of a latent."""
        return int(self.denoiser.config.in_channels)

    @property
    def cell(self) -> int:
        """Pixels along the side of a latent's cell."""
        return int(self.pipe.vae_scale_factor)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of one latent for a picture of ``height`` by ``width`` pixels, square without a width, and of the
        model's own size without either. Raises :class:`UserError` for a side that the model cannot draw."""
        step, sides = self.cell * self.patch, (height or self.resolution, width or height or self.resolution)
        for side in sides:
            if side % step:
                near = max(1, round(side / step)) * step
                raise UserError(f"resolution: {side} is no multiple of {step}; the nearest is {near}")
        return (self.channels, *(side // self.cell for side in sides))  # type: ignore[return-value]

    def evaluations(self, guidance_scale: Scale) -> int:
        """Network evaluations of one prediction. At or below :attr:`unguided_scale` stock diffusers asks once, with the
        prompt: 0 is what few-step models such as SD-Turbo and SD3.5-turbo are called with."""
        guided = self.guidance_kind == "classifier-free" and guidance_scale is not None
        return 2 if guided and guidance_scale > self.unguided_scale else 1  # type: ignore[operator]

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Conditioning,
        guidance_scale: Scale = None,
        denoiser: nn.Module | None = None,
    ) -> Tensor:
        """The raw network output at ``x_t`` (B, C, h, w) and ``t`` (B,). Classifier-free guidance sends unconditional
        and conditional rows through the network as one batch of 2B. ``guidance_scale`` None, as in training, asks once,
        where the scale is embedded with the pipeline's default."""
        denoiser = denoiser if denoiser is not None else self.denoiser
        if self.guidance_kind == "embedded":
            scale = self.default_guidance_scale if guidance_scale is None else guidance_scale
            cond = Conditioning(cond.tensors | {"guidance": torch.full((len(x_t),), scale, device=x_t.device)})
        if guidance_scale is None or self.evaluations(guidance_scale) == 1:
            return self.call(denoiser, x_t, t, cond)
        both = Conditioning.cat([self.uncond.expand(len(x_t)), cond])
        # mixed in float32 whatever network answers: the policy's wrapper gives float32, a bare reference need not
        free, bound = upcast(self.call(denoiser, x_t.repeat(2, 1, 1, 1), t.repeat(2), both)).chunk(2)
        return self.guide(free, bound, guidance_scale)

    def predict(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Conditioning,
        guidance_scale: Scale = None,
        denoiser: nn.Module | None = None,
    ) -> Prediction:
        """:meth:`forward`'s answer with the coordinates to read it in."""
        alpha, sigma = self.path(t)
        return Prediction(self.forward(x_t, t, cond, guidance_scale, denoiser), x_t, alpha, sigma, self.prediction_type)

    @property
    def uncond(self) -> Conditioning:
        """:meth:`unconditional`, encoded once."""
        if self._uncond is None:
            # as every other prompt is encoded, whoever asks first: a T5 keeps some layers in float32 for a reason
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                self._uncond = self.unconditional()
        return self._uncond

    def drop_prompts(self, cond: Conditioning, empty: Tensor) -> Conditioning:
        """``cond`` on this device, without its prompt in the rows where ``empty`` (B,) is true."""
        cond = cond.to(self.device)
        if not empty.any():
            return cond
        null = Conditioning({name: self.uncond[name].to(tensor) for name, tensor in cond.tensors.items()})
        rows = torch.arange(1, len(cond) + 1).masked_fill(empty.cpu(), 0)
        return Conditioning.cat([null, cond]).take(upload(rows, self.device))

    def to_latent(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] to latents: the posterior's mean, in the denoiser's scale, float32."""
        shift, scale = self._statistics()
        with torch.autocast(self.device.type, enabled=False):  # one in float32 is so because it overflows in less
            z = self.encode_pixels((images * 2 - 1).to(self.device, self.pipe.vae.dtype))
        return (z.float() - shift) * scale

    def to_image(self, x0: Tensor) -> Tensor:
        """Latents to pictures (B, 3, H, W) in [0, 1], float32; differentiable; without a gradient in parts that fit."""
        shift, scale = self._statistics()
        with torch.autocast(self.device.type, enabled=False):
            pixels = in_parts(self, (x0.to(self.device) / scale + shift).to(self.pipe.vae.dtype))
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def _statistics(self) -> list[float | Tensor]:
        return [p.to(self.device).float() if isinstance(p, Tensor) else p for p in self.statistics()]

    def identity(self) -> Mapping[str, Mapping[str, object]]:
        """What cached latents of ``pictures`` and embeddings of ``captions`` depend on, wherever the pipeline lies."""
        return identity(self)
