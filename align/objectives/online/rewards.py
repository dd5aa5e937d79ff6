"""The rewards of a run: several, by name, weighted or only watched, scored beside the sampler in a worker thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, Literal

from torch import Tensor

from align.common.errors import UserError
from rewards import Reward, RewardConfig, RewardSum, checked
from rewards.common.background import in_background


class Scorer:
    """Scores pictures by every reward of a run: a :class:`rewards.RewardSum` in one thread at a time, so that
    rewards keep their order and never race.

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
        self._before: Future[dict[str, Tensor]] | None = None

    @classmethod
    def of(cls, settings: Sequence[RewardConfig]) -> Scorer:
        """Load the rewards. Raises :class:`rewards.RewardError` on an unknown name, or a label that comes twice."""
        total = RewardSum.of(settings)
        return cls(total.rewards, total.weights or {}, total.normalize)

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, Tensor]:
        """Every reward's scores by name, (B,) each, on the CPU."""
        return {n: checked(r, n, images, prompts, metadata).detach().cpu() for n, r in self.rewards.items()}

    def submit(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Callable[[], dict[str, Tensor]]:
        """Begin to score; the function that comes back waits for the scores, and raises what the reward raised."""
        if not all(getattr(reward, "concurrent", True) for reward in self.rewards.values()):
            done = self.score(images, prompts, metadata)
            return lambda: done
        before = self._before

        def score() -> dict[str, Tensor]:
            if before is not None:
                wait([before])
            return self.score(images, prompts, metadata)

        self._before = in_background(score, "reward")
        return self._before.result

    @property
    def without_gradient(self) -> list[str]:
        """Those that are trained on and not differentiable."""
        return [name for name in self.weights if not self.rewards[name].differentiable]

    def differentiable_scores(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, Tensor]:
        """Every reward's scores by name, (B,) each: with the gradient to ``images`` of those that are trained on.
        Raises :class:`UserError` where one of these has none, whatever it declares."""
        seen = {name: images if name in self.weights else images.detach() for name in self.rewards}
        scores = {n: checked(r, n, seen[n], prompts, metadata) for n, r in self.rewards.items()}
        if blind := [n for n in self.weights if images.requires_grad and not scores[n].requires_grad]:
            raise UserError(f"{', '.join(blind)}: differentiable is true, but the score has no gradient to the image")
        return scores

    def differentiable_total(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """(B,) the weighted sum with the gradient to ``images``, for rewards that have one."""
        return self.total({n: checked(self.rewards[n], n, images, prompts, metadata) for n in self.weights})

    def normalized(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``scores``, (N,) each, normalized where that is set."""
        return self._sum.normalized(scores)

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        """(N,) the weighted sum that is trained on, of scores that are normalized where that is set."""
        return self._sum.total(scores)
