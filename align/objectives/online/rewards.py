"""The rewards of a run: several, by name, weighted or only watched, scored beside the sampler in a worker thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from align.common.errors import UserError
from rewards import Reward, RewardConfig, RewardError, check_statistics, checked, load


class Scorer:
    """Scores pictures by every reward of a run. One worker thread: rewards keep their order and never race.

    A reward that says ``concurrent = False`` (it shares the sampler's device and memory) is scored at once instead.
    ``statistics`` are (mean, std) of the rewards that are normalised before they are summed.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float],
        statistics: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self.rewards, self.statistics = dict(rewards), dict(statistics or {})
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self._worker: ThreadPoolExecutor | None = None

    @classmethod
    def of(cls, settings: Sequence[RewardConfig]) -> Scorer:
        """Load the rewards. Raises :class:`rewards.RewardError` on an unknown name, :class:`UserError` on
        a name that comes twice."""
        labels = [setting.title for setting in settings]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise UserError(f"two rewards are called {twice[0]!r}; give one of them a label of its own")
        named = dict(zip(labels, settings, strict=True))
        statistics = {label: setting.normalize for label, setting in named.items() if setting.normalize is not None}
        for label, found in statistics.items():
            check_statistics(label, found)
        loaded = {label: load(setting.name, setting.args) for label, setting in named.items()}
        return cls(loaded, {label: setting.weight for label, setting in named.items()}, statistics)

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, Tensor]:
        """Every reward's scores by name, (B,) each, on the CPU."""
        found = {}
        for name, reward in self.rewards.items():
            try:
                found[name] = checked(reward, name, images, prompts, metadata).detach().cpu()
            except RewardError:
                raise
            except Exception as error:  # anyone's reward may raise anything; say whose it was
                raise RewardError(f"reward {name!r} failed: {type(error).__name__}: {error}") from error
        return found

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
        parts = {n: checked(self.rewards[n], n, images, prompts, metadata) for n in self.weights}
        return self.total(parts)

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        """(N,) the weighted sum that is trained on, of scores that are normalised where that is set."""
        total = 0 * next(iter(scores.values()))
        for name, weight in self.weights.items():
            mean, std = self.statistics.get(name, (0.0, 1.0))
            total = total + weight * ((scores[name] - mean) / std)
        return total
