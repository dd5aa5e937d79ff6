"""A learned distribution of initial noise, one for each prompt: what FIND trains, and the file that carries it.

z ~ N(mean, diag(std^2)) of latent shape, in the N(0, I) space in which every sampler of ours starts and which a stock
pipeline's argument ``latents`` expects (SD itself multiplies it by its scheduler's ``init_noise_sigma``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from align.common import rng
from align.common.errors import UserError
from align.common.resolution import Resolution, sides
from align.diffusion.process import Reduction, reduce_dims
from align.families import Family, stock_latents, stock_scheduler
from align.policy.policy import Trained
from rewards.common.files import atomic

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

NOISE_FILE = "find.safetensors"
FLOOR = 1e-4  # the least standard deviation
LARGEST = 0.995  # the root mean square of a mean beside which a typical noise still has some spread


def log_prob(z: Tensor, mean: Tensor, log_std: Tensor, reduction: Reduction = "mean") -> Tensor:
    """(B,) log-density of ``z`` (B, C, h, w) under N(mean, exp(log_std)^2), a mean (FIND) or the sum over C, h, w."""
    scaled = (z - mean) * torch.exp(-log_std)
    return reduce_dims(-0.5 * scaled.square() - log_std - 0.5 * math.log(2 * math.pi), reduction)


def kl(mean: Tensor, log_std: Tensor, reduction: Reduction = "mean") -> Tensor:
    """(B,) KL(N(mean, std^2) || N(0, 1)) in nats, a mean over the latent (nats a dimension) or the sum."""
    return reduce_dims(0.5 * (torch.exp(2 * log_std) + mean.square() - 1) - log_std, reduction)


class InitialNoise(Trained):
    """Mean and log standard deviation of the initial noise of P prompts, (P, C, h, w); at first those of N(0, I)."""

    def __init__(
        self,
        prompts: Sequence[str],
        shape: tuple[int, int, int],
        source: str,
        scheduler: str,
        budget: float | None = None,
        typical: bool = False,
    ) -> None:
        super().__init__()
        if twice := [p for k, p in enumerate(prompts) if p in prompts[:k]]:
            raise UserError(f"the prompt {twice[0]!r} comes twice; each prompt has one distribution of noise")
        self.prompts, self.shape, self.source, self.scheduler = list(prompts), shape, source, scheduler
        self.budget, self.typical = budget, typical
        # the name is what checkpoints of version 0.1 have
        self.left = nn.ParameterDict({name: torch.zeros(len(prompts), *shape) for name in ("mean", "log_std")})

    def forward(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log std, each (B, C, h, w), of the prompts numbered ``index`` (B,)."""
        return self.left["mean"][index], self.left["log_std"][index].clamp(min=math.log(FLOOR))

    @torch.no_grad()
    def detached(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`forward` on the CPU, without a gradient."""
        mean, log_std = self(index.to(self.left["mean"].device))
        return mean.cpu().float(), log_std.cpu().float()

    def describe(self, index: Tensor) -> dict[str, float]:
        """How far the distributions of the prompts ``index`` are from N(0, I): means over prompts."""
        mean, log_std = self.detached(index)
        return {"kl": kl(mean, log_std).mean().item(), "std": log_std.exp().mean().item()}

    def all(self) -> tuple[Tensor, Tensor]:
        """:meth:`forward` of every prompt."""
        return self(torch.arange(len(self.prompts), device=self.left["mean"].device))

    @torch.no_grad()
    def after_step(self) -> None:
        """Back within bounds. With ``typical`` the standard deviations are scaled so that ``mean^2 + std^2`` is 1 over
        the latent, which keeps the norm of z where that of N(0, I) is. Beyond the budget of KL, in nats a dimension,
        both parameters are drawn in by the factor that bisection finds (InitNO projects too, Guo et al. 2024)."""
        if not self.typical and self.budget is None:
            return
        mean, log_std = (part.cpu() for part in self.all())
        square = mean.square().mean((1, 2, 3), keepdim=True)
        low, high = torch.zeros_like(square), torch.ones_like(square)
        if self.typical:
            high = (LARGEST / square.sqrt().clamp(min=1e-12)).clamp(max=1.0)
        factor = high
        for _ in range(30):
            over = self._beyond(mean, log_std, factor)
            low, high = torch.where(over, low, factor), torch.where(over, factor, high)
            if torch.equal(low, high):
                break  # the bound was kept from the start
            factor = (low + high) / 2
        factor = low
        for parameter in self.left.values():
            parameter.mul_(factor.to(parameter))
        if self.typical:
            self.left["log_std"].add_(self._shift(mean, log_std, factor).to(self.left["log_std"]))

    def _beyond(self, mean: Tensor, log_std: Tensor, factor: Tensor) -> Tensor:
        """(P, 1, 1, 1) whether the means scaled by ``factor`` leave the budget."""
        std = factor * log_std + (self._shift(mean, log_std, factor) if self.typical else 0.0)
        if self.budget is None:
            return torch.zeros_like(factor, dtype=torch.bool)
        return (kl(factor * mean, std) > self.budget)[:, None, None, None]

    @staticmethod
    def _shift(mean: Tensor, log_std: Tensor, factor: Tensor) -> Tensor:
        """(P, 1, 1, 1) what is to be added to the log standard deviations for z to have the norm of N(0, I)."""
        left = 1 - (factor * mean).square().mean((1, 2, 3), keepdim=True)
        return 0.5 * (left / (2 * factor * log_std).exp().mean((1, 2, 3), keepdim=True)).log()

    def number(self, prompt: str) -> int:
        """The place of ``prompt``. Raises :class:`UserError` naming the prompts there are."""
        if prompt not in self.prompts:
            known = ", ".join(map(repr, self.prompts[:5])) + (", …" if len(self.prompts) > 5 else "")
            raise UserError(
                f"no noise was learned for {prompt!r}, only for {known}; train it, or sample without --noise"
            )
        return self.prompts.index(prompt)

    @torch.no_grad()
    def initial(self, prompts: Sequence[str], noise: Tensor) -> Tensor:
        """``noise`` (B, C, h, w), standard normal, moved to the distributions of the prompts that have one."""
        known = [k for k, prompt in enumerate(prompts) if prompt in self.prompts]
        if not known:
            return noise
        moved = noise.clone()
        device = self.left["mean"].device
        mean, log_std = self(torch.tensor([self.prompts.index(prompts[k]) for k in known], device=device))
        moved[known] = (mean.to(noise) + log_std.exp().to(noise) * noise[known]).to(noise)
        return moved

    def save(self, folder: Path) -> Path:
        """Write ``find.safetensors``: ``mean`` and ``std`` (P, C, h, w), with prompts, model, shape and scheduler as
        metadata."""
        with torch.no_grad():
            mean, log_std = (part.detach().cpu().float().contiguous() for part in self.all())
        return write(folder / NOISE_FILE, self, mean, log_std.exp())

    @classmethod
    def load(cls, path: Path | str) -> InitialNoise:
        """What :meth:`save` wrote. Raises :class:`UserError` for any other file."""
        path = Path(path)
        path = path / NOISE_FILE if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"no noise at {path}; expected the {NOISE_FILE} of a FIND run, or its folder")
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("format") != "t2i-align initial noise":
                    raise UserError(f"{path} is no {NOISE_FILE}: its metadata does not say so; was it written by FIND?")
                mean, std = file.get_tensor("mean").float(), file.get_tensor("std").float()
            shape, prompts = json.loads(about["shape"]), json.loads(about["prompts"])
            model, scheduler = about["model"], about["scheduler"]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is no safetensors file ({error}); expected a FIND run's {NOISE_FILE}") from error
        except (KeyError, RecursionError, json.JSONDecodeError) as error:
            raise UserError(f"{path}: its metadata are not as FIND wrote them ({error}); train it anew") from error
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(f"{path}: the prompts in its metadata are no list of texts")
        expected = [len(prompts), *shape] if isinstance(shape, list) else shape
        if not list(mean.shape) == list(std.shape) == expected:
            raise UserError(
                f"{path}: mean {tuple(mean.shape)} and std {tuple(std.shape)} are not of its prompts and "
                f"shape, {expected}"
            )
        if not bool(mean.isfinite().all() and std.isfinite().all() and (std >= 0).all()):
            raise UserError(f"{path} has NaN, infinite or negative numbers; was it saved after training diverged?")
        found = cls(prompts, tuple(shape), model, scheduler)
        found.left["mean"].data, found.left["log_std"].data = mean, std.clamp(min=FLOOR).log()
        return found

    def check(self, family: Family, resolution: Resolution = None) -> None:
        """Raise :class:`UserError` where this noise was learned for another model, shape or scheduler."""
        wrong = []
        if family.source != self.source:
            wrong.append(f"model {self.source!r}, not {family.source!r}")
        if family.latent_shape(*sides(resolution)) != self.shape:
            wrong.append(f"latents of {self.shape}, not {family.latent_shape(*sides(resolution))}")
        if family.scheduler_name != self.scheduler:
            wrong.append(f"scheduler {self.scheduler}, not {family.scheduler_name}")
        if wrong:
            raise UserError(f"this noise was learned for {'; '.join(wrong)}: noise does not carry over, learn it anew")

    def usage(self, family: Family) -> str:
        prompt, steps = repr(self.prompts[0]), family.default_num_inference_steps
        height, width = (side * family.cell for side in self.shape[1:])
        arguments = {"height": height, "width": width} | family.stock_arguments(steps, family.default_guidance_scale)
        more = "".join(f", {name}={value!r}" for name, value in arguments.items())
        return f"""from align.policy.initial_noise import InitialNoise

pipe.scheduler = families.stock_scheduler(pipe)
noise = InitialNoise.load(weights)
pipe(prompt={prompt}, latents=noise.latents(pipe, {prompt}, seeds=[0]){more}).images[0].save("0.png")"""

    def latents(self, pipe: DiffusionPipeline, prompt: str, seeds: Sequence[int]) -> Tensor:
        """Drawn for ``prompt``, one for each seed, for the argument ``latents`` of a stock diffusers pipeline."""
        self.number(prompt)
        noise = rng.normal(self.shape, [torch.Generator().manual_seed(seed) for seed in seeds])
        ours, theirs = stock_scheduler(pipe), pipe.scheduler
        differing = (key for key, value in ours.config.items() if key[0] != "_" and theirs.config.get(key) != value)
        wrong = [f"{key} {theirs.config.get(key)}" for key in differing]
        if type(ours) is not type(theirs) or type(ours).__name__ != self.scheduler or wrong:
            raise UserError(
                f"this noise was learned for scheduler {self.scheduler}, the pipeline has {type(theirs).__name__} "
                f"({', '.join(wrong)}): set pipe.scheduler = align.families.stock_scheduler(pipe)"
            )
        return stock_latents(pipe, self.initial([prompt] * len(seeds), noise))


def write(path: Path, noise: InitialNoise, mean: Tensor, std: Tensor) -> Path:
    """Write the file that :meth:`InitialNoise.load` reads, whole or not at all."""
    about = {
        "format": "t2i-align initial noise",
        "model": noise.source,
        "scheduler": noise.scheduler,
        "shape": json.dumps(list(noise.shape)),
        "prompts": json.dumps(noise.prompts),
    }
    with atomic(path) as draft:
        save_file({"mean": mean, "std": std}, draft, about)
    return path
