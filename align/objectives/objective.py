"""What an objective is, and what it is given.

An objective is a dataclass whose fields are its hyper-parameters. It says what it ``needs`` and what a sample costs
(``cost``), makes rows without a gradient (``rollout``), and gives the ``loss`` of some of them. What only some
objectives can do is a base class that they add: :class:`KeepsState`, :class:`TrainsModule`,
:class:`ScalesLearningRates`, :class:`Prepares`. None inherits from another, or asks which model it trains.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from align.common import rng
from align.common.resolution import Resolution
from align.objectives.rows import Rows
from align.policy.policy import Policy, Trained

if TYPE_CHECKING:
    from align.data.dataset import Data
    from align.families import Family
    from align.objectives.online.rewards import Scorer
    from align.sampling.diversity import Features

Metrics = dict[str, Tensor]
Reference = Literal["base", "start"]  # the pipeline as it came, or with the weights that the run starts from


@dataclass(frozen=True)
class Context:
    """What the loop hands to an objective at one update.

    ``sample_indices`` are the places of this process's samples (pairs, images) in the global batch of this step, so
    that every process draws the numbers that a single process would have drawn for the same samples. ``gather`` joins a
    tensor (B, ...) over all processes in their order, on the CPU. ``on_policy`` says that the weights are still those
    which made the rollout: a ratio must be 1 within ``tolerance``; ``checks`` keeps the question, else it is asked now.
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
    features: Features | None = None  # of images, to measure their diversity by
    progress: Callable[[int], object] | None = None
    checks: list[Callable[[], object]] | None = None
    resolution: Resolution = None  # of the images
    chunk: int = 32  # rows that pass through the network at once

    @property
    def rewards(self) -> Scorer:
        """The scorer of a run that has rewards. Raises RuntimeError where there is none."""
        if self.scorer is None:
            raise RuntimeError("this objective learns from rewards, and the context has none")
        return self.scorer

    def generators(self, purpose: str) -> list[torch.Generator]:
        """One generator for each sample of the local batch, keyed by (seed, purpose, step, position)."""
        return [rng.generator(self.seed, purpose, self.step, position) for position in self.sample_indices]

    def local(self, values: Tensor) -> Tensor:
        """This process's part of ``values`` (N, ...), one for each sample of all processes."""
        return values[self.sample_indices[0] : self.sample_indices[-1] + 1]


@dataclass(frozen=True)
class Needs:
    """What an objective has to be given.

    Attributes:
        batch_types: the kinds of batch that ``rollout`` takes.
        reference: whether :meth:`align.policy.policy.Policy.reference` will be used.
        rewards: whether it learns from scores: of images that it samples where it is ``online``, else of the data's.
        group_size: samples that are made of one item of the data: images of a prompt.
        whole_groups: all images of a prompt have to be sampled by one process.
        online: samples images of its own where the data is prompts.
    """

    batch_types: tuple[type, ...]
    reference: bool = True
    rewards: bool = False
    group_size: int = 1
    whole_groups: bool = False
    online: bool = False
    labels: bool = False  # uses what people said of each item


@dataclass(frozen=True)
class Cost:
    """What one sample (a pair, an image) costs and what a user should know; printed by ``--dry_run`` and at the
    start. ``rows`` is None where the rollout decides it."""

    trained: int  # network evaluations with a backward pass, per sample
    frozen: int  # network evaluations without one, per sample
    rows: int | None = 1  # rows to train on, per sample
    notes: Mapping[str, str] = field(default_factory=dict)
    sampling: int = 0  # how many of ``frozen`` fall away where the data has images already


class Objective(ABC):
    """The interface of every paper's file in this package."""

    around_packed = False  # without a LoRA, of a pipeline in 4 bit, trains what is not packed

    @property
    def reference(self) -> Reference:
        """What the reference is; objectives that have one make it a setting."""
        return "base"

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What it has to be given, at its present settings."""

    @abstractmethod
    def cost(self, family: Family, resolution: Resolution) -> Cost:
        """What a sample costs, and notes about hyper-parameters at this latent size."""

    @abstractmethod
    def rollout(self, ctx: Context, batch: Any) -> Rows:
        """Rows to train on from one batch of one of ``needs.batch_types``; called under ``no_grad``."""

    @abstractmethod
    def loss(self, ctx: Context, rows: Any) -> tuple[Tensor, Metrics]:
        """The mean loss over ``rows``, and detached metrics, means over ``rows`` too but for those named ``.._max``."""


class KeepsState(ABC):
    """An objective that remembers something from rollout to rollout."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a resumed run has to be given back: tensors by name, and what JSON can hold."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave."""


class TrainsModule(ABC):
    """An objective that trains a module of its own, and no weight of the denoiser."""

    @abstractmethod
    def trains(self, family: Family, data: Data) -> Trained:
        """What is trained in the denoiser's stead."""


class ScalesLearningRates(ABC):
    """An objective that trains some weights faster than others."""

    @abstractmethod
    def lr_scale(self, name: str) -> float:
        """The factor of the learning rate for the denoiser's parameter ``name``; 0 freezes it."""


class Prepares(ABC):
    """An objective that loads more than the policy, or refuses what it cannot train."""

    @abstractmethod
    def prepare(self, policy: Policy, scorer: Scorer | None) -> None:
        """Called once, before a checkpoint is restored."""
