"""The rewards of a run: several, by name, weighted or only watched, scored beside the sampler in a worker thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

from torch import Tensor

from rewards import Reward, RewardConfig, RewardError, RewardSum, checked


class Scorer:
    """Scores pictures by every reward of a run: a :class:`rewards.RewardSum` with one worker thread, so that rewards
    keep their order and never race.

    A reward that says ``concurrent = False`` (it shares the sampler's device and memory) is scored at once instead.
    One without a weight is only watched; ``normalize`` is that of the sum.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float],
        normalize: Mapping[str, tuple[float, float] | Literal["batch"]] | None = None,
    ) -> None:
        self._sum = RewardSum(dict(rewards), {name: weights.get(name, 0.0) for name in rewards}, dict(normalize or {}))
        self.rewards = self._sum.rewards
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self._worker: ThreadPoolExecutor | None = None

    @classmethod
    def of(cls, settings: Sequence[RewardConfig]) -> Scorer:
        """Load the rewards. Raises :class:`rewards.RewardError` on an unknown name, or a label that comes twice."""
        total = RewardSum.of(settings)
        return cls(total.rewards, total.weights or {}, total.normalize)

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, Tensor]:
        """Every reward's scores by name, (B,) each, on the CPU."""
        scores = {}
        for name, reward in self.rewards.items():
            try:
                scores[name] = checked(reward, name, images, prompts, metadata).detach().cpu()
            except RewardError:
                raise
            except Exception as error:  # anyone's reward may raise anything; say whose it was
                raise RewardError(f"reward {name!r} failed: {type(error).__name__}: {error}") from error
        return scores

    def submit(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Callable[[], dict[str, Tensor]]:
        """Begin to score; the function that comes back waits for the scores, and raises what the reward raised."""
        if not all(getattr(reward, "concurrent", True) for reward in self.rewards.values()):
            done = self.score(images, prompts, metadata)
            return lambda: done
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="reward")
        future: Future[dict[str, Tensor]] = self._worker.submit(self.score, images, prompts, metadata)
        return future.result

    def differentiable_total(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """(B,) the weighted sum with the gradient to ``images``, for rewards that have one."""
        return self.total({n: checked(self.rewards[n], n, images, prompts, metadata) for n in self.weights})

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        """(N,) the weighted sum that is trained on, of scores that are normalized where that is set."""
        return self._sum.total(scores)
