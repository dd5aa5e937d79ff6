"""What of a policy trains, each kind with its own reference, moving average, checkpoint and file: LoRA beside a frozen
denoiser, all weights of the denoiser, or a module in the denoiser's stead. :class:`align.policy.policy.Policy` has one.
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from align.common.errors import UserError
from align.families import Family
from align.families.parts import require_finite_module
from align.policy.sharding import Sharding, is_sharded, let_go, part, skeleton, whole
from rewards.common.files import atomic

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from peft.tuners.tuners_utils import BaseTunerLayer

    from align.policy.policy import Trained

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"  # as diffusers names it


class Weights(ABC):
    """The parameters that train, float32 whatever the frozen rest is in, and what else can be put in their place."""

    kind: str  # in a word, for people
    ref_params: list[Tensor] | None = None  # a reference that is neither the network without LoRA nor a second network
    frozen: nn.Module | None = None  # the second network that is the reference
    layers: Sequence[BaseTunerLayer] = ()  # that have adapters

    def __init__(self, family: Family, module: nn.Module) -> None:
        self.family = family
        self.module = module  # has the parameters that train
        self.ema: EMAModel | None = None
        self._decay = 0.0
        self._factors: dict[nn.Parameter, float] = {}

    def parameters(self) -> list[nn.Parameter]:
        """Those that train, in a fixed order."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def start(self, ema_decay: float) -> None:
        """To be called when the first weights are in place."""
        self._decay, self._factors = ema_decay, dict.fromkeys(self.parameters(), 1.0)
        self.ema = EMAModel(self.parameters(), decay=ema_decay) if ema_decay else None

    def upcast(self) -> None:
        for parameter in self.parameters():
            parameter.data = parameter.data.float()

    def set_lr_scales(self, lr_scale: Callable[[str], float]) -> None:
        """Give every trained parameter its factor of the learning rate, by its name; 0 freezes it for good."""
        before = self.parameters()
        factors = {p: lr_scale(name) for name, p in self.module.named_parameters() if p.requires_grad}
        for parameter, factor in factors.items():
            parameter.requires_grad_(factor > 0)
        if not any(factors.values()):
            raise UserError("every parameter is frozen: the objective's settings leave nothing to train")
        self._factors = {parameter: factor for parameter, factor in factors.items() if factor}
        if self.ref_params is not None:  # has the places of those that train; what is frozen is its own reference
            self.ref_params = [r for r, p in zip(self.ref_params, before, strict=True) if p.requires_grad]
        if self.ema is not None:
            self.ema = EMAModel(self.parameters(), decay=self._decay)

    def groups(self) -> dict[float, list[nn.Parameter]]:
        """The trained parameters by their factor of the learning rate."""
        found: dict[float, list[nn.Parameter]] = {}
        for parameter, factor in self._factors.items():
            found.setdefault(factor, []).append(parameter)
        return found

    # divided among processes
    @property
    def sharded(self) -> bool:
        """Whether every process holds a part; then all have to call :meth:`state` and :meth:`save` together, which only
        the first fills and writes."""
        return is_sharded(self.module)

    @property
    def networks(self) -> list[nn.Module]:
        """Those that are divided: the one that trains, and the frozen one that is the reference."""
        return [self.module] if self.frozen is None else [self.module, self.frozen]

    def shard(self, sharding: Sharding) -> None:
        """Leave every process its part of :attr:`networks`. To be called before the first pass through them and before
        :meth:`set_lr_scales`."""
        for network in self.networks:
            sharding.shard(network)

    def let_go(self) -> None:
        """Leave this process with its part alone, see :func:`align.policy.sharding.let_go`."""
        let_go(self.module)

    @property
    def writes(self) -> bool:
        """Whether this process is the one that :meth:`save` writes in, of those that call it."""
        return not self.sharded or torch.distributed.get_rank() == 0

    def swap(self) -> None:
        """Exchange the trained weights and :attr:`ref_params`."""
        raise RuntimeError(f"{self.kind} has no reference that takes the place of what trains")

    # what answers in their place
    @abstractmethod
    def reference(self) -> AbstractContextManager[nn.Module]:
        """Within, the network that is given says what the reference says."""

    def add_adapter(self, name: str, folder: Path) -> None:
        raise UserError(f"the adapter {name!r} in {folder} needs a LoRA that trains beside it; set lora")

    def adapter(self, name: str) -> AbstractContextManager[nn.Module]:
        raise UserError(f"there is no adapter {name!r}; set lora")

    @contextmanager
    def ema_scope(self) -> Iterator[None]:
        """Within, the trained weights are their moving average, where one is kept."""
        if self.ema is None:
            yield
            return
        self.let_go()
        parameters = self.parameters()
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        torch.clear_autocast_cache()
        try:
            yield
        finally:
            self.let_go()
            self.ema.restore(parameters)
            torch.clear_autocast_cache()

    def after_step(self) -> None:
        """To be called after every optimiser step."""
        if self.ema is not None:
            self.ema.step(self.parameters())

    def average_adapters(self, names: Sequence[str]) -> None:
        raise UserError(f"the average of the adapters {', '.join(names)} needs a LoRA that trains; set lora")

    # checkpoints
    def named(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """:meth:`named` on the CPU, whole."""
        return whole(self.named())

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave; every name has to be there and no other."""
        named = self.named()
        if named.keys() != state.keys():
            raise ValueError(
                f"checkpoint and policy differ in {len(named.keys() ^ state.keys())} parameters, for example "
                f"{sorted(named.keys() ^ state.keys())[0]!r}; was it written with another rank, target list or model?"
            )
        if wrong := [name for name, tensor in named.items() if tensor.shape != state[name].shape]:
            raise ValueError(
                f"checkpoint and policy differ in the shape of {len(wrong)} parameters: {wrong[0]!r} is "
                f"{tuple(state[wrong[0]].shape)}, expected {tuple(named[wrong[0]].shape)}"
            )
        for name, parameter in named.items():
            parameter.copy_(part(state[name], parameter))

    # what stock diffusers loads
    @abstractmethod
    def save(self, folder: Path) -> Path:
        """Write the (averaged) weights, whole or not at all, and return what was written."""


class FullWeights(Weights):
    """Every weight of the denoiser; the reference is a frozen copy of what stood there, which ``reference=False``
    spares. With ``anchored`` the copy is of the weights that the run began with, else of the pipeline's own."""

    kind = "full"

    def __init__(
        self, family: Family, initial: Path | None, anchored: bool, reference: bool, around_packed: bool
    ) -> None:
        super().__init__(family, family.denoiser)
        self.denoiser = family.denoiser
        if initial is not None and anchored:
            self._take(initial)
        if not around_packed and not all(p.is_floating_point() for p in self.denoiser.parameters()):
            raise UserError(
                f"the {family.denoiser_name} of {family.source!r} has weights in 4 bit, which cannot be trained "
                "themselves; set lora, which trains beside them, or start from the pipeline before it was quantised"
            )
        self.frozen = copy.deepcopy(self.denoiser).requires_grad_(False) if reference else None
        for parameter in self.denoiser.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self.upcast()
        if initial is not None and not anchored:
            self._take(initial)
        self._skeleton: ModelMixin | None = None  # of a denoiser that is divided, to save it with

    def shard(self, sharding: Sharding) -> None:
        self._skeleton = skeleton(self.denoiser)
        super().shard(sharding)

    def _take(self, folder: Path) -> None:
        """Put in what :meth:`write` wrote, in one file or in shards. Raises :class:`UserError`."""
        where = folder / self.family.denoiser_name
        index = where / f"{WEIGHTS_FILE}.index.json"
        try:
            names = (
                sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [WEIGHTS_FILE]
            )
            state = {key: tensor for name in names for key, tensor in load_file(where / Path(name).name).items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise UserError(f"initial_weights: expected the folder of a {self.kind} run; {where}: {error}") from error
        wanted = {key: tensor.shape for key, tensor in self.denoiser.state_dict().items()}
        if wrong := sorted(
            key for key in wanted.keys() | state.keys() if wanted.get(key) != getattr(state.get(key), "shape", None)
        ):
            raise UserError(
                f"initial_weights: {where} is of another model than {self.family.source!r}: {len(wrong)} tensors are "
                f"missing, unknown or of another size, for example {wrong[0]}"
            )
        self.denoiser.load_state_dict(state)
        require_finite_module(self.denoiser, f"initial_weights: {where}")

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        if self.frozen is None:
            raise RuntimeError("this policy was built without a reference (reference=False)")
        yield self.frozen

    def save(self, folder: Path) -> Path:
        """``unet/`` or ``transformer/``, for ``from_pretrained(folder, subfolder=...)``."""
        target = folder / self.family.denoiser_name
        with self.ema_scope():
            plain = self._plain()
            if self.writes:
                with atomic(target) as draft:
                    plain.save_pretrained(draft)
        return target

    def _plain(self) -> ModelMixin:
        """The denoiser as one process has it; where it is divided, the first process alone."""
        if self._skeleton is None:
            return self.denoiser
        state = whole(self.denoiser.state_dict())
        if self.writes:
            self._skeleton.load_state_dict(state, assign=True)
        return self._skeleton


class ModuleWeights(Weights):
    """A module of the objective's own; every weight of the pipeline stays as it is, and there is no reference."""

    kind = "initial noise"

    def __init__(self, family: Family, trained: Trained, initial: Path | None) -> None:
        super().__init__(family, trained)
        self.trained = trained
        if initial is not None:
            raise UserError("initial_weights: this objective trains no weight of the model; merge them into it first")
        family.denoiser.requires_grad_(False)
        trained.to(family.device)
        self.upcast()

    def shard(self, sharding: Sharding) -> None:
        raise UserError(
            f"FSDP divides the denoiser's weights, and this objective trains {self.kind} beside them; launch with "
            "configs/accelerate/ddp.yaml"
        )

    def reference(self) -> AbstractContextManager[nn.Module]:
        raise RuntimeError("this policy was built without a reference (reference=False)")

    def after_step(self) -> None:
        self.trained.after_step()
        super().after_step()

    def named(self) -> dict[str, Tensor]:
        return super().named() | dict(self.trained.named_buffers())

    def save(self, folder: Path) -> Path:
        with self.ema_scope():
            return self.trained.save(folder)
