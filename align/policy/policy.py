"""Which weights answer: the current ones, the reference, or their moving average.

What trains is one of three kinds of :mod:`align.policy.weights`: LoRA, whose reference is the same network with the
adapters off; every weight, whose reference is a frozen copy; or a module in the denoiser's stead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from align.common.errors import UserError
from align.diffusion.process import Prediction
from align.families import Conditioning, Family, Scale
from align.policy.lora import LoRA

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

    from align.policy.sharding import Lockstep, Sharding
    from align.policy.weights import Weights


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
    def usage(self, family: Family) -> str:
        """Python that draws by ``pipe``, a stock pipeline of ``family``, with what the folder ``weights`` holds."""


class Policy:
    """A family's denoiser made trainable.

    ``lora=None`` trains every weight of the denoiser. The parameters that train are float32 whatever the frozen rest
    is in. ``reference=False`` spares full fine-tuning its frozen copy where the objective never asks for it. With
    ``trained``, that module trains and every weight of the pipeline stays as it is. With ``around_packed``,
    ``lora=None`` trains of a denoiser in 4 bit what is not packed; such a one is refused otherwise.
    ``compiled`` hands the blocks that the denoiser repeats to ``torch.compile``, the reference's too.
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
        compiled: bool = False,
    ) -> None:
        from align.policy.compiled import compile_blocks
        from align.policy.lora_weights import LoRAWeights  # peft and diffusers: seconds to import
        from align.policy.weights import FullWeights, ModuleWeights

        self.family = family
        self.lora = lora if trained is None else None
        self.denoiser = family.denoiser
        self.trained = trained
        self.weights: Weights
        if trained is not None:
            self.weights = ModuleWeights(family, trained, initial)
        elif lora is not None:
            self.weights = LoRAWeights(family, lora, initial, anchored, reference)
        else:
            self.weights = FullWeights(family, initial, anchored, reference, around_packed)
        for network in (self.denoiser, self.weights.frozen) if compiled else ():
            if network is not None:
                compile_blocks(network)
        if gradient_checkpointing and trained is None:
            self.denoiser.enable_gradient_checkpointing()
        self.weights.start(ema_decay)
        self.model: nn.Module = self.weights.module  # accelerate's wrapper takes this place
        self.answering: nn.Module | None = None  # what answers in place of the trained weights
        self.evaluations = {"trained": 0, "frozen": 0}  # rows that went through the network, with and without gradient
        self.lockstep: Lockstep | None = None  # where processes share the weights
        self.shards = 1  # processes that each hold a part
        self._blind = False  # what trains was last asked without a gradient
        self._number = 0  # what a lockstep calls those in force: 1 where a reference has weights of its own

    def initial(self, prompts: Sequence[str], noise: Tensor) -> Tensor:
        """Where pictures of ``prompts`` start: ``noise`` (B, C, h, w) itself, or what was learned to make of it."""
        return noise if self.trained is None else self.trained.initial(prompts, noise)

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: Scale = None) -> Prediction:
        """What the weights in force say at ``x_t`` (B, C, h, w) and ``t`` (B,), see :meth:`Family.forward`.

        Only what is to be differentiated goes through accelerate's wrapper: its hooks expect a backward pass, and it
        exchanges buffers with the other processes, which may draw less."""
        trains = torch.is_grad_enabled()
        model = self.model if self.trained is None and trains else self.denoiser
        if self.answering is not None:
            model = self.answering
        else:
            if trains and self._blind:  # torch before 2.11 goes on with autocast's copies, which have no gradient
                torch.clear_autocast_cache()
            self._blind = not trains
        if self.lockstep is not None:
            self.lockstep.forward(self._number)
        rows = len(x_t) * self.family.evaluations(guidance_scale)
        self.evaluations["trained" if trains else "frozen"] += rows
        return self.family.predict(x_t, t, cond, guidance_scale, model)

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Within, :meth:`predict` says again, for a checkpoint in the backward pass, what it has said: not counted, and
        past accelerate's wrapper, whose hooks take a second call for another pass."""
        before, counts = self.answering, dict(self.evaluations)
        self.answering = before if before is not None else self.denoiser
        try:
            yield
        finally:
            self.answering = before
            self.evaluations |= counts

    def zero(self) -> Tensor:
        """0 with a gradient of 0 for every trained parameter, through the whole network at no image in particular."""
        return self._nothing(self.model)

    def _nothing(self, model: nn.Module) -> Tensor:
        family = self.family
        x = torch.zeros(1, *family.latent_shape(), device=family.device)
        t = family.sample_timesteps(torch.tensor([0.5])).to(family.device)
        return 0.0 * family.predict(x, t, family.uncond.to(family.device), None, model).raw.float().sum()

    # several processes
    def shard(self, sharding: Sharding) -> None:
        """Leave every process its part of the denoiser and of a frozen reference (FSDP2). All then pass through them
        together, see :class:`align.policy.sharding.Lockstep`. To be called after :meth:`add_adapter` and before
        :meth:`set_lr_scales`. Raises :class:`UserError` where no weight of the denoiser trains."""
        from align.policy.sharding import Lockstep, exchange_over_gloo

        self.weights.shard(sharding)
        self.model, self.shards = self.weights.module, sharding.world
        self.lockstep = Lockstep([partial(self._help, number) for number in (0, 1)], exchange_over_gloo())

    def _help(self, number: int) -> Tensor:
        """A pass for other processes, through what trains (0) or other weights (1), whichever are in force here: what
        is gathered are the parts of all."""
        weights = self.weights
        turned = number != self._number and weights.ref_params is not None
        if turned:
            weights.swap()
        try:
            return self._nothing(weights.frozen if number and weights.frozen is not None else weights.module)
        finally:
            if turned:
                weights.swap()

    @property
    def sharded(self) -> bool:
        return self.lockstep is not None

    def absent(self) -> Tensor:
        """The loss of a process without rows: :meth:`zero`, so that the others need not wait; where they share weights,
        nothing, since :meth:`joined` waits for them."""
        return self.zero() if self.lockstep is None else torch.zeros((), device=self.family.device)

    def joined(self, loss: Tensor) -> Tensor:
        """``loss`` with what this process has passed through the network for others; to be called before backward."""
        return loss if self.lockstep is None else self.lockstep.backward(loss)

    def settle(self) -> None:
        """To be called before processes exchange anything: wait for those that still pass through shared weights."""
        if self.lockstep is not None:
            self.lockstep.settle()
            self.weights.let_go()

    # other weights in force
    @contextmanager
    def _answering(self, scope: AbstractContextManager[nn.Module], number: int = 0) -> Iterator[None]:
        with scope as network:
            self.answering, self._number = network, number
            try:
                yield
            finally:
                self.answering, self._number = None, 0

    def reference(self) -> AbstractContextManager[None]:
        """Within, :meth:`predict` answers with the weights that training started from. Leave it before backward:
        gradient checkpointing recomputes with whatever adapters are then active."""
        own = self.weights.frozen is not None or self.weights.ref_params is not None
        return self._answering(self.weights.reference(), int(own))

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load the LoRA in ``folder`` beside the one that trains: frozen, silent but within :meth:`adapter`."""
        self.weights.add_adapter(name, folder)

    def adapter(self, name: str) -> AbstractContextManager[None]:
        """Within, :meth:`predict` answers with the adapter ``name`` alone."""
        return self._answering(self.weights.adapter(name))

    def average_adapters(self, names: Sequence[str]) -> None:
        """Start the LoRA that trains at the mean of the adapters ``names``."""
        self.weights.average_adapters(names)

    @contextmanager
    def ema_scope(self) -> Iterator[None]:
        """Within, the trained weights are their moving average, where one is kept. Processes that share the weights go
        in and out together."""
        self.settle()
        with self.weights.ema_scope():
            yield
            self.settle()

    # the trained weights, see :class:`align.policy.weights.Weights`
    @property
    def ema(self) -> EMAModel | None:
        return self.weights.ema

    @property
    def ref_params(self) -> list[Tensor] | None:
        """The reference's values of the trained parameters, where it is neither the base nor a copy."""
        return self.weights.ref_params

    def anchor(self) -> None:
        """The reference is from now on a copy of the trained parameters, which :meth:`move_reference` moves. Raises
        :class:`UserError` without a LoRA."""
        if self.lora is None:
            raise UserError("only the reference of a LoRA can be moved; set lora")
        if self.weights.ref_params is None:
            self.weights.ref_params = [p.detach().clone() for p in self.parameters()]

    def move_reference(self) -> None:
        """The reference becomes what the trained parameters are now; after :meth:`anchor`."""
        assert self.ref_params is not None
        for kept, parameter in zip(self.ref_params, self.parameters(), strict=True):
            kept.copy_(parameter.detach())

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that train, in a fixed order."""
        return self.weights.parameters()

    def set_lr_scales(self, lr_scale: Callable[[str], float]) -> None:
        """Give every trained parameter its factor of the learning rate, by its name; 0 freezes it for good, as what has
        no gradient (:attr:`Family.idle`), for which several processes would wait."""
        self.weights.set_lr_scales(lambda name: 0.0 if name.startswith(self.family.idle) else lr_scale(name))

    def groups(self) -> dict[float, list[nn.Parameter]]:
        """The trained parameters by their factor of the learning rate."""
        return self.weights.groups()

    def after_step(self) -> None:
        """To be called after every optimiser step."""
        self.weights.after_step()

    def state(self) -> dict[str, Tensor]:
        """The trained parameters by name, on the CPU; of a module of the objective's own, its buffers too."""
        return self.weights.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave; every name has to be there and no other."""
        self.weights.load_state(state)

    def save(self, folder: Path) -> Path:
        """Write the (averaged) weights as stock diffusers reads them and return what was written.

        LoRA: ``pytorch_lora_weights.safetensors`` with rank and alpha in its metadata, for ``load_lora_weights``.
        Full: ``unet/`` or ``transformer/``, for ``from_pretrained(folder, subfolder=...)``.
        """
        return self.weights.save(folder)
