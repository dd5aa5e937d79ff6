"""What an objective is, and what it is given.

An objective is a dataclass whose fields are its hyper-parameters, with ``rollout`` (make a table of rows, no gradient)
and ``loss`` (one forward's worth of rows). Objectives do not inherit from one another and never ask which model they
train. A third party's objective is one file of theirs, named by its import path in the config.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from align.common import rng
from align.objectives.rows import Rows
from align.policy.policy import Policy, Trained

if TYPE_CHECKING:
    from align.data.dataset import Data
    from align.families import Family
    from align.objectives.online.rewards import Scorer
    from align.sampling.diversity import Features

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Context:
    """What the loop hands to an objective at one update.

    ``sample_indices`` are the places of this process's samples (pairs, images) in the global batch of this step, so
    that every process draws the numbers that a single process would have drawn for the same samples. ``gather`` joins a
    tensor (B, ...) over all processes in their order, on the CPU. ``on_policy`` says that the weights are still those
    which made the rollout: a likelihood ratio must then be 1 within ``tolerance``.
    """

    policy: Policy
    seed: int
    step: int
    sample_indices: Sequence[int]
    scorer: Scorer | None = None
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor.cpu()
    gather_text: Callable[[list[str]], list[str]] = lambda texts: texts
    on_policy: bool = False
    tolerance: float = 1e-3
    features: Features | None = None  # of pictures, to measure their diversity by
    progress: Callable[[int], object] | None = None
    resolution: int | None = None  # pixels a side of the pictures; None is the model's own

    def generators(self, purpose: str) -> list[torch.Generator]:
        """One generator for each sample of the local batch, keyed by (seed, purpose, step, position)."""
        return [rng.generator(self.seed, purpose, self.step, position) for position in self.sample_indices]


@dataclass(frozen=True)
class Plan:
    """What one sample (a pair, a picture) costs and what a user should know; printed by ``--dry_run`` and at the
    start. ``rows`` is None where the rollout decides it."""

    trained: int  # network evaluations with a backward pass, per sample
    frozen: int  # network evaluations without one, per sample
    rows: int | None = 1  # rows of the table, per sample
    notes: Mapping[str, str] = field(default_factory=dict)
    drawing: int = 0  # how many of ``frozen`` fall away where the data has pictures already


class Objective(ABC):
    """The interface of every file in this package. It carries no code but what an objective without a group and
    without a memory would say."""

    batch_types: ClassVar[tuple[type, ...]]
    online: ClassVar[bool] = False  # draws pictures of its own
    scored: ClassVar[bool] = True  # learns, if it draws pictures, from their scores
    whole_groups: ClassVar[bool] = False  # all pictures of a prompt have to be drawn by one process
    around_packed: ClassVar[bool] = False  # without a LoRA, of a pipeline in 4 bit, trains what is not packed

    @property
    def needs_reference(self) -> bool:
        """Whether :meth:`align.policy.policy.Policy.reference` will be used."""
        return True

    @property
    def reference(self) -> str:
        """What the reference is: ``base``, or ``start``, the weights that the run starts from."""
        return "base"

    @property
    def group(self) -> int:
        """Samples that are made of one item of the data: pictures of a prompt."""
        return 1

    def trains(self, family: Family, data: Data) -> Trained | None:
        """What is trained in the denoiser's stead; None trains the denoiser."""
        return None

    def prepare(self, policy: Policy, scorer: Scorer | None) -> None:  # noqa: B027  most have nothing to do
        """Called once, before a checkpoint is restored: to load what else the objective needs, or to refuse."""

    def lr_scale(self, name: str) -> float:
        """The factor of the learning rate for the denoiser's parameter ``name``; 0 freezes it."""
        return 1.0

    @abstractmethod
    def plan(self, family: Family, resolution: int | None) -> Plan:
        """What a sample costs, and notes about hyper-parameters at this latent size."""

    @abstractmethod
    def rollout(self, ctx: Context, batch: Any) -> Rows:
        """Rows to train on from one batch of one of ``batch_types``; called under ``no_grad``."""

    @abstractmethod
    def loss(self, ctx: Context, rows: Rows) -> tuple[Tensor, Metrics]:
        """The mean loss over ``rows`` and detached scalar metrics, each a mean over ``rows`` as well, but for those
        whose name ends in ``_max``."""

    def state(self) -> dict[str, Any]:
        """What a resumed run has to be given back: tensors by name, and what JSON can hold."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but the checkpoint has {sorted(state)}")
