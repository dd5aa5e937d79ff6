"""The noises that FIND has drawn, with what they were worth, and those of them that are trained on again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from align.objectives.rows import Rows

ReplayBy = Literal["newest", "reward"]


@dataclass(frozen=True)
class NoiseSamples:
    """M noises of prompts, oldest first.

    Attributes:
        index: (M,) the number of each one's prompt.
        noise: (M, C, h, w).
        reward: (M,) of the image that it became.
        rollout: (M,) in which it was drawn.
        text: (M, D) its prompt as the value network sees it; None without one.
    """

    index: Tensor
    noise: Tensor
    reward: Tensor
    rollout: Tensor
    text: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    def columns(self) -> dict[str, Tensor]:
        """The tensors by name, as a checkpoint keeps them."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: tensor for name, tensor in values.items() if tensor is not None}

    def texts(self, row: Tensor, count: int) -> Tensor:
        """(P, D) the text of each of ``count`` prompts, of which sample k is of prompt ``row[k]``."""
        if self.text is None:
            raise ValueError("these samples were kept without their prompts")
        return torch.stack([self.text[row == k][0] for k in range(count)])

    def take(self, index: Tensor) -> NoiseSamples:
        """Those that ``index`` selects: numbers, or a mask."""
        return NoiseSamples(**{name: column[index] for name, column in self.columns().items()})

    def then(self, later: NoiseSamples) -> NoiseSamples:
        """These, and ``later`` ones behind them."""
        newer = later.columns()
        return NoiseSamples(**{name: torch.cat([column, newer[name]]) for name, column in self.columns().items()})


@dataclass(frozen=True, kw_only=True)
class FINDRows(Rows):
    """R noises (R, C, h, w) of the prompts ``index`` (R,): their density (R,) when this iteration began, their
    calibrated reward and reward (R,), and the rollout (R,) that drew them."""

    index: Tensor
    noise: Tensor
    log_prob: Tensor
    advantage: Tensor
    reward: Tensor
    rollout: Tensor


class NoiseMemory:
    """At most ``size`` noises of each prompt: the ``newest``, or those of the best ``reward``, of equals the older."""

    def __init__(self, size: int, by: ReplayBy) -> None:
        if size < 0:
            raise ValueError(f"replay must be at least 0, got {size}")
        self.size, self.by = size, by
        self.samples: NoiseSamples | None = None

    def recall(self, fresh: NoiseSamples) -> NoiseSamples:
        """The remembered noises of the prompts of ``fresh``, then ``fresh``, which are remembered from now on."""
        everything = fresh if self.samples is None else self.samples.then(fresh)
        if self.size:
            self.samples = everything.take(self._kept(everything))
        return everything.take(torch.isin(everything.index, fresh.index))

    def _kept(self, samples: NoiseSamples) -> Tensor:
        """(M,) which of ``samples`` to remember."""
        kept = torch.zeros(len(samples), dtype=torch.bool)
        for prompt in samples.index.unique():
            members = (samples.index == prompt).nonzero().flatten()
            if self.by == "reward":
                best = samples.reward[members].sort(descending=True, stable=True).indices[: self.size]
                kept[members[best]] = True
            else:
                kept[members[-self.size :]] = True
        return kept

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, flat."""
        columns = self.samples.columns() if self.samples is not None else {}
        return {f"memory.{name}": column for name, column in columns.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        columns = {k.removeprefix("memory."): v for k, v in state.items() if k.startswith("memory.")}
        self.samples = NoiseSamples(**columns) if columns else None
