"""What an objective is, and what it is given.

An objective is a dataclass whose fields are its hyper-parameters, with ``rollout`` (make a table of rows, no gradient)
and ``loss`` (one forward's worth of rows). Objectives do not inherit from one another and never ask which model they
train. A third party's objective is one file of theirs, named by its import path in the config.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from align import draws
from align.policy import Policy
from align.table import Table

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Context:
    """What the loop hands to an objective at one update.

    ``positions`` are the batch's places in the global batch of this step, so that every process draws the numbers
    that a single process would have drawn for the same samples.
    """

    policy: Policy
    seed: int
    step: int
    positions: Sequence[int]

    def generators(self, purpose: str) -> list[torch.Generator]:
        """One generator for each sample of the local batch, keyed by (seed, purpose, step, position)."""
        return [draws.generator(self.seed, purpose, self.step, position) for position in self.positions]


@dataclass(frozen=True)
class Plan:
    """What one item of a batch costs and what a user should know; printed by ``--dry_run`` and at the start."""

    trained: int  # network evaluations with a backward pass, per item
    frozen: int  # network evaluations without one, per item
    notes: Mapping[str, str] = field(default_factory=dict)


class Objective(ABC):
    """The interface of every file in this package; it carries no code, so there is nothing to inherit."""

    needs_reference: ClassVar[bool]
    batch_type: ClassVar[type]

    @abstractmethod
    def plan(self, latent_shape: tuple[int, int, int]) -> Plan:
        """Evaluations per item, and notes about hyper-parameters at this latent size."""

    @abstractmethod
    def rollout(self, ctx: Context, batch: Any) -> Table:
        """Rows to train on from one batch of ``batch_type``; called under ``no_grad``."""

    @abstractmethod
    def loss(self, ctx: Context, rows: Table) -> tuple[Tensor, Metrics]:
        """The mean loss over ``rows`` and detached scalar metrics, each a mean over ``rows`` as well."""
