"""Text encoders and autoencoder on the CPU while nobody asks them, so that the denoiser has the device to itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DiffusionPipeline
from torch import nn

Move = Callable[[nn.Module, torch.device], object]


def _to(module: nn.Module, device: torch.device) -> None:
    module.to(device)


class Resting:
    """Every network of ``pipe`` but ``denoiser`` waits on the CPU. Called, it goes to ``device``; when the denoiser is
    called next, it goes back. As diffusers' ``enable_model_cpu_offload``, but that the denoiser, which trains, stays.
    """

    def __init__(
        self, pipe: DiffusionPipeline, denoiser: nn.Module, device: torch.device | str, move: Move = _to
    ) -> None:
        self.device, self.move = torch.device(device), move
        self._awake: list[nn.Module] = []
        for part in pipe.components.values():
            if isinstance(part, nn.Module) and part is not denoiser:
                move(part, torch.device("cpu"))
                add_hook_to_module(part, _Wakes(self))  # also of a VAE's encode and decode, which no hook of torch sees
        move(denoiser, self.device)
        denoiser.register_forward_pre_hook(lambda *_: self.rest())

    def wake(self, module: nn.Module) -> None:
        """Have ``module`` on the device."""
        if module not in self._awake:
            self._awake.append(module)
            self.move(module, self.device)

    def rest(self) -> None:
        """Have all of them on the CPU."""
        while self._awake:
            self.move(self._awake.pop(), torch.device("cpu"))


class _Wakes(ModelHook):
    def __init__(self, resting: Resting) -> None:
        super().__init__()
        self.resting = resting
        self.execution_device = resting.device  # diffusers asks for it

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.resting.wake(module)
        return args, kwargs


def place_around(pipe: DiffusionPipeline, denoiser: nn.Module, device: torch.device, offload_idle: bool) -> None:
    """Every network of ``pipe`` on ``device``, or resting, but ``denoiser``, which stays where it is."""

    def move(part: nn.Module, to: torch.device) -> None:
        if part is not denoiser:
            part.to(to)

    if offload_idle:
        Resting(pipe, denoiser, device, move)
    else:
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                move(part, device)
