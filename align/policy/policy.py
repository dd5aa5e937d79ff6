"""Which weights answer: the current ones, the reference, or their moving average.

What trains is one of three kinds of :mod:`align.policy.weights`: LoRA, whose reference is the same network with the
adapters off; every weight, whose reference is a frozen copy; or a module in the denoiser's stead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from align.diffusion.process import Prediction
from align.families import Conditioning, Family, Scale
from align.policy.lora import LoRA

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

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
    def usage(self, folder: str, family: Family) -> str:
        """Python that draws with what was saved in ``folder`` by a stock pipeline of ``family``, ``pipe``."""


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

    def initial(self, prompts: Sequence[str], noise: Tensor) -> Tensor:
        """Where pictures of ``prompts`` start: ``noise`` (B, C, h, w) itself, or what was learned to make of it."""
        return noise if self.trained is None else self.trained.initial(prompts, noise)

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: Scale = None) -> Prediction:
        """What the weights in force say at ``x_t`` (B, C, h, w) and ``t`` (B,), see :meth:`Family.forward`."""
        model = self.model if self.trained is None else self.denoiser
        if self.answering is not None:  # past any wrapper: its hooks expect a backward pass that never comes
            model = self.answering
        rows = len(x_t) * self.family.evaluations(guidance_scale)
        self.evaluations["trained" if torch.is_grad_enabled() else "frozen"] += rows
        return self.family.predict(x_t, t, cond, guidance_scale, model)

    def zero(self) -> Tensor:
        """0 with a gradient of 0 for every trained parameter, through the whole network at no image in particular."""
        family = self.family
        x = torch.zeros(1, *family.latent_shape(), device=family.device)
        t = family.sample_timesteps(torch.tensor([0.5])).to(family.device)
        return 0.0 * family.predict(x, t, family.uncond.to(family.device), None, self.model).raw.float().sum()

    # other weights in force
    @contextmanager
    def _answering(self, scope: AbstractContextManager[nn.Module]) -> Iterator[None]:
        with scope as network:
            self.answering = network
            try:
                yield
            finally:
                self.answering = None

    def reference(self) -> AbstractContextManager[None]:
        """Within, :meth:`predict` answers with the weights that training started from. Leave it before backward:
        gradient checkpointing recomputes with whatever adapters are then active."""
        return self._answering(self.weights.reference())

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load the LoRA in ``folder`` beside the one that trains: frozen, silent but within :meth:`adapter`."""
        self.weights.add_adapter(name, folder)

    def adapter(self, name: str) -> AbstractContextManager[None]:
        """Within, :meth:`predict` answers with the adapter ``name`` alone."""
        return self._answering(self.weights.adapter(name))

    def average_adapters(self, names: Sequence[str]) -> None:
        """Start the LoRA that trains at the mean of the adapters ``names``."""
        self.weights.average_adapters(names)

    def ema_scope(self) -> AbstractContextManager[None]:
        """Within, the trained weights are their moving average, where one is kept."""
        return self.weights.ema_scope()

    # the trained weights, see :class:`align.policy.weights.Weights`
    @property
    def ema(self) -> EMAModel | None:
        return self.weights.ema

    @property
    def ref_params(self) -> list[Tensor] | None:
        """The reference's values of the trained parameters, where it is neither the base nor a copy."""
        return self.weights.ref_params

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
