"""Which weights answer: the current ones, the reference, or their moving average.

LoRA trains adapters on the frozen denoiser and its reference is the same network with the adapters off: no second
model. Full fine-tuning keeps a frozen copy. Saves what stock diffusers loads.
"""

from __future__ import annotations

import copy
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from align.common.errors import UserError
from align.diffusion.process import Prediction
from align.families import LORA_FILE, Conditioning, Family


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on the denoiser. ``alpha`` defaults to ``rank``, ``targets`` to the family's attention."""

    rank: int = 8
    alpha: float | None = None
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or (self.alpha is not None and self.alpha <= 0):
            raise ValueError(f"lora: rank must be at least 1 and alpha positive, got {self.rank} and {self.alpha}")


class Trained(nn.Module, ABC):
    """What an objective trains in the denoiser's stead, such as a distribution of initial noise."""

    @abstractmethod
    def initial(self, prompts: Sequence[str], noise: Tensor) -> Tensor:
        """The latents (B, C, h, w) that pictures of ``prompts`` start from, given standard normal ``noise``."""

    @abstractmethod
    def after_step(self) -> None:
        """Called after every optimiser step, to go back within bounds."""

    @abstractmethod
    def save(self, folder: Path) -> Path:
        """Write what was trained into ``folder``; returns the file."""

    @abstractmethod
    def card(self, pipeline: str) -> str:
        """Python that loads what was saved into the stock ``pipeline`` class."""


class Policy:
    """A family's denoiser made trainable.

    ``lora=None`` trains every weight of the denoiser. The parameters that train are float32 whatever the frozen rest
    is in. ``reference=False`` spares full fine-tuning its frozen copy where the objective never asks for it. With
    ``trained``, that module trains and every weight of the pipeline stays as it is. With ``around_packed``,
    ``lora=None`` trains of a denoiser in 4 bit what is not packed; such a one is refused otherwise.
    ``initial`` is a folder of :meth:`save` to start from; with ``anchored`` the reference is what stands there
    (D3PO's last round) rather than the pipeline without it.
    """

    def __init__(
        self,
        family: Family,
        lora: LoRA | None = LoRA(),
        reference: bool = True,
        ema_decay: float = 0.0,
        gradient_checkpointing: bool = False,
        initial: Path | None = None,
        anchored: bool = False,
        trained: Trained | None = None,
        around_packed: bool = False,
    ) -> None:
        self.family = family
        self.lora = lora if trained is None else None
        self.denoiser = family.denoiser
        self.trained = trained
        self.model: nn.Module = self.denoiser if trained is None else trained  # accelerate's wrapper takes this place
        self._copy: nn.Module | None = None
        self.adapters: list[BaseTunerLayer] = []
        self._off = False
        self.evaluations = {"trained": 0, "frozen": 0}  # rows that went through the network, with and without gradient
        self.ref_params: list[Tensor] | None = None
        if initial is not None and not lora and anchored:
            self._take(initial)  # before the frozen copy is made
        if trained is not None:
            if initial is not None:
                raise UserError(
                    "initial_weights: this objective trains no weight of the model; merge them into it first"
                )
            self.denoiser.requires_grad_(False)
            trained.to(family.device)
        elif lora:
            config = LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha if lora.alpha is not None else lora.rank,
                target_modules=lora.targets or list(family.lora_targets),
                init_lora_weights="gaussian",
            )
            try:
                self.denoiser.add_adapter(config)
            except ValueError as error:  # peft's for targets that fit nothing
                own = ", ".join(family.lora_targets)
                raise UserError(f"lora.targets: {error} The family's own are {own}") from error
            self.adapters = self._layers()
        else:
            if not around_packed and not all(p.is_floating_point() for p in self.denoiser.parameters()):
                raise UserError(
                    f"the {family.denoiser_name} of {family.source!r} has weights in 4 bit, which cannot be trained "
                    "themselves; set lora, which trains beside them, or start from the pipeline before it was quantised"
                )
            if reference:
                self._copy = copy.deepcopy(self.denoiser).requires_grad_(False)
            for parameter in self.denoiser.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
        for parameter in self.parameters():
            parameter.data = parameter.data.float()
        if initial is not None and (lora or not anchored):
            self._take(initial)
        if initial is not None and lora and anchored and reference:
            self.ref_params = [p.detach().clone() for p in self.parameters()]
        if gradient_checkpointing and trained is None:
            self.denoiser.enable_gradient_checkpointing()
        self._decay, self._factors = ema_decay, dict.fromkeys(self.parameters(), 1.0)
        self.ema = EMAModel(self.parameters(), decay=ema_decay) if ema_decay else None

    @torch.no_grad()
    def _take(self, folder: Path) -> None:
        """Put in the weights that :meth:`save` wrote to ``folder``. Raises :class:`UserError`."""
        name = self.family.denoiser_name
        path = folder / LORA_FILE if self.lora else folder / name / "diffusion_pytorch_model.safetensors"
        if not path.is_file():
            raise UserError(
                f"initial_weights: no {path}; expected the folder of a {'LoRA' if self.lora else 'full'} run"
            )
        found = load_file(path)
        if self.lora:
            layers = {k.removeprefix(f"{name}."): v for k, v in found.items()}
            layers = convert_unet_state_dict_to_peft(layers)
            own = get_peft_model_state_dict(self.denoiser)
            if {k: v.shape for k, v in layers.items()} != {k: v.shape for k, v in own.items()}:
                raise UserError(
                    f"initial_weights: the LoRA in {path} does not fit rank {self.lora.rank} on "
                    f"{len(self.adapters)} layers; set lora.rank and lora.targets as they were in that run"
                )
            set_peft_model_state_dict(self.denoiser, layers)
        else:
            self.denoiser.load_state_dict(found)

    @property
    def _network(self) -> nn.Module:
        """What has the parameters that train."""
        return self.denoiser if self.trained is None else self.trained

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that train, in a fixed order."""
        return [p for p in self._network.parameters() if p.requires_grad]

    def set_lr_scales(self, lr_scale: Callable[[str], float]) -> None:
        """Give every trained parameter its factor of the learning rate, by its name; 0 freezes it for good."""
        factors = {p: lr_scale(name) for name, p in self._network.named_parameters() if p.requires_grad}
        for parameter, factor in factors.items():
            parameter.requires_grad_(factor > 0)
        if not any(factors.values()):
            raise UserError("every parameter is frozen: the objective's settings leave nothing to train")
        self._factors = {parameter: factor for parameter, factor in factors.items() if factor}
        if self.ema is not None:
            self.ema = EMAModel(self.parameters(), decay=self._decay)

    def groups(self) -> dict[float, list[nn.Parameter]]:
        """The trained parameters by their factor of the learning rate."""
        found: dict[float, list[nn.Parameter]] = {}
        for parameter, factor in self._factors.items():
            found.setdefault(factor, []).append(parameter)
        return found

    def initial(self, prompts: Sequence[str], noise: Tensor) -> Tensor:
        """Where pictures of ``prompts`` start: ``noise`` (B, C, h, w) itself, or what was learned to make of it."""
        return noise if self.trained is None else self.trained.initial(prompts, noise)

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float = 1.0) -> Prediction:
        """What the weights in force say at ``x_t`` (B, C, h, w) and ``t`` (B,)."""
        model = self.model if self.trained is None else self.denoiser
        if self._off:  # past any wrapper: its hooks expect a backward pass that never comes
            model = self._copy if self._copy is not None else self.denoiser
        rows = len(x_t) * (1 if guidance_scale == 1.0 else 2)
        self.evaluations["trained" if torch.is_grad_enabled() else "frozen"] += rows
        return self.family.predict(x_t, t, cond, guidance_scale, model)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within, :meth:`predict` answers with the weights that training started from. Leave it before backward:
        gradient checkpointing recomputes with whatever adapters are then active."""
        if not self.lora and self._copy is None:
            raise RuntimeError("this policy was built without a reference (reference=False)")
        self._off = True
        try:
            if self.ref_params is not None:
                self._swap()
            else:
                self._switch(False)
            yield
        finally:
            if self.ref_params is not None:
                self._swap()
            else:
                self._switch(True)
            self._off = False

    def _layers(self) -> list[BaseTunerLayer]:
        return [module for module in self.denoiser.modules() if isinstance(module, BaseTunerLayer)]

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load the LoRA in ``folder`` beside the one that trains: frozen, silent but within :meth:`adapter`."""
        own = {id(p) for p in self.parameters()}
        self.family.pipe.load_lora_weights(str(folder), adapter_name=name)
        self.adapters = self._layers()
        for layer in self.adapters:
            layer.set_adapter("default")
        for parameter in self.denoiser.parameters():
            parameter.requires_grad_(id(parameter) in own)

    @contextmanager
    def adapter(self, name: str) -> Iterator[None]:
        """Within, :meth:`predict` answers with the adapter ``name`` alone."""
        flags = [(p, p.requires_grad) for p in self.denoiser.parameters()]
        self._off = True
        try:
            for layer in self.adapters:
                layer.set_adapter(name)
            yield
        finally:
            for layer in self.adapters:
                layer.set_adapter("default")
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            self._off = False

    def _swap(self) -> None:
        """Exchange the trained weights and the reference, without a copy."""
        assert self.ref_params is not None
        for k, parameter in enumerate(self.parameters()):
            parameter.data, self.ref_params[k] = self.ref_params[k], parameter.data
        torch.clear_autocast_cache()  # it would answer with the half-precision copies of the weights that were there

    def _switch(self, on: bool) -> None:
        # peft freezes adapters when it turns them off; turning them on again must give every flag back
        flags = [(p, p.requires_grad) for layer in self.adapters for p in layer.parameters()] if not on else []
        for layer in self.adapters:
            layer.enable_adapters(on)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    @contextmanager
    def ema_scope(self) -> Iterator[None]:
        """Within, the trained weights are their moving average, where one is kept."""
        if self.ema is None:
            yield
            return
        parameters = self.parameters()
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        torch.clear_autocast_cache()
        try:
            yield
        finally:
            self.ema.restore(parameters)
            torch.clear_autocast_cache()

    def after_step(self) -> None:
        """To be called after every optimiser step."""
        if self.trained is not None:
            self.trained.after_step()
        if self.ema is not None:
            self.ema.step(self.parameters())

    def state(self) -> dict[str, Tensor]:
        """The trained parameters by name, on the CPU; of a module of the objective's own, its buffers too."""
        found: dict[str, Tensor] = {name: p for name, p in self._network.named_parameters() if p.requires_grad}
        if self.trained is not None:
            found |= dict(self.trained.named_buffers())
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave; every name has to be there and no other."""
        mine: dict[str, Tensor] = {name: p for name, p in self._network.named_parameters() if p.requires_grad}
        if self.trained is not None:
            mine |= dict(self.trained.named_buffers())
        if mine.keys() != state.keys():
            raise ValueError(
                f"checkpoint and policy differ in {len(mine.keys() ^ state.keys())} parameters, for example "
                f"{sorted(mine.keys() ^ state.keys())[0]!r}; was it written with another rank, target list or model?"
            )
        for name, parameter in mine.items():
            parameter.copy_(state[name])

    def save(self, folder: Path) -> Path:
        """Write the (averaged) weights as stock diffusers reads them and return what was written.

        LoRA: ``pytorch_lora_weights.safetensors`` with rank and alpha in its metadata, for ``load_lora_weights``.
        Full: ``unet/`` or ``transformer/``, for ``from_pretrained(folder, subfolder=...)``.
        """
        if self.trained is not None:
            with self.ema_scope():
                return self.trained.save(folder)
        name = self.family.denoiser_name
        temporary = folder / ".saving"
        shutil.rmtree(temporary, ignore_errors=True)
        with self.ema_scope():
            if self.lora:
                layers = {k: v.detach().cpu() for k, v in get_peft_model_state_dict(self.denoiser).items()}
                type(self.family.pipe).save_lora_weights(
                    temporary,
                    **{
                        f"{name}_lora_layers": layers,
                        f"{name}_lora_adapter_metadata": self.denoiser.peft_config["default"].to_dict(),
                    },
                )
                written = LORA_FILE
            else:
                self.denoiser.save_pretrained(temporary / name)
                written = name
        target = folder / written
        if target.is_dir():
            shutil.rmtree(target)
        (temporary / written).replace(target)
        shutil.rmtree(temporary)
        return target
