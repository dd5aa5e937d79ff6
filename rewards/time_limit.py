"""A reward that is given up when it does not answer in time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewards.common.background import in_background
from rewards.common.errors import RewardFailure

if TYPE_CHECKING:
    from rewards.base import Reward


class TimeLimited:
    """``reward`` with ``seconds`` for each call, in a thread of its own; what it is asked and says stays the same.

    A thread cannot be ended from outside: the one that is too slow is left to itself, and as long as it computes the
    reward refuses further calls. A process whose run failed so still ends.
    """

    def __init__(self, reward: Reward, name: str, seconds: float) -> None:
        self._reward, self._name, self._seconds = reward, name, seconds
        self._call: Future[Tensor] | None = None
        self.differentiable = bool(reward.differentiable)
        self.needs_prompt = bool(getattr(reward, "needs_prompt", True))
        self.concurrent = bool(getattr(reward, "concurrent", True))

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """What the reward says. ``RewardFailure`` where it has not said it in time."""
        grad, gpu = torch.is_grad_enabled(), torch.cuda.current_device() if torch.cuda.is_initialized() else None
        mixed = {kind: torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")}
        dtypes = {kind: torch.get_autocast_dtype(kind) for kind in mixed}

        def call() -> Tensor:
            with ExitStack() as stack:  # torch keeps all of this for each thread
                stack.enter_context(torch.set_grad_enabled(grad))
                for kind in [kind for kind, enabled in mixed.items() if enabled]:
                    stack.enter_context(torch.autocast(kind, dtypes[kind]))
                if gpu is not None:
                    stack.enter_context(torch.cuda.device(gpu))
                return self._reward.score(images=images, prompts=prompts, metadata=metadata)

        if self._call is None or self._call.done():
            self._call = in_background(call, f"reward {self._name}")
            if wait([self._call], self._seconds).done:
                return self._call.result()
        raise RewardFailure(
            f"reward {self._name!r} did not answer within {self._seconds:g} s; give it a longer 'timeout', or none"
        )
