"""The stop rule: training ends by itself when the trained reward rises while what is only watched falls."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from align.common.errors import UserError
from rewards.common.errors import shortened

STATUS = 3  # the exit status of a run that its stop rule has ended
SPACES = ("diversity/latents", "diversity/pixels", "diversity/features")


class Stopped(Exception):
    """The stop rule has ended the run; says why, and which checkpoint is the last good one."""


@dataclass
class StopRule:
    """When a policy is taken to hack its reward: by means over ``window`` rollouts, the first ones and the last ones.

    Training stops after the first rollout at which the last mean of ``rises`` is above its first one and that of any of
    ``falls`` is below its first one by at least its amount; not before ``2 * window`` rollouts. A rollout's pictures
    are those that it has drawn, before its own updates. A checkpoint is good where no mean of ``falls`` has lost half
    of its amount, from the first rollouts on; the last good one is never deleted.

    Args:
        rises: the label of the reward that is trained on.
        falls: how much each watched one may lose, in its own units: rewards by label (those of weight 0), or the
            diversity of a rollout (``diversity/pixels``, ``diversity/latents``, ``diversity/features``).
        window: rollouts in a mean.
    """

    rises: str
    falls: dict[str, float] = field(default_factory=dict)
    window: int = 5

    def check(self, labels: Collection[str], draws: bool, saves: bool) -> None:
        """Raise :class:`UserError` for a rule that could never speak, or would name no checkpoint."""
        if not draws:
            raise UserError(
                "stop compares the rewards of rollouts, and this objective draws no pictures; set stop: null"
            )
        if not saves:
            raise UserError("stop names the last good checkpoint: set checkpointing_steps above 0")
        if self.window < 1 or not self.falls or min(self.falls.values()) <= 0:
            raise UserError(
                f"stop: window must be at least 1 and falls name amounts above 0, got {self.window} and {self.falls}"
            )
        if self.rises in self.falls:
            raise UserError(f"stop: {self.rises} cannot rise and fall at once; falls names what is only watched")
        known = sorted({*labels, *SPACES})
        for name in (self.rises, *self.falls):
            if name not in known:
                raise UserError(f"stop: there is no {name!r} to look at; there are {', '.join(known)}")


class Watch:
    """What the rollouts of a run have measured of a rule's quantities, the same in all processes; without a rule
    nothing."""

    def __init__(self, rule: StopRule | None) -> None:
        self.rule = rule
        self.history: dict[str, list[float]] = {name: [] for name in (rule.rises, *rule.falls)} if rule else {}
        self._seen: dict[str, list[float]] = {name: [] for name in self.history}  # in the rollout at hand
        self.good: int | None = None  # the step of the last good checkpoint

    def see(self, metrics: Mapping[str, float]) -> None:
        """What the log says of one more update of a rollout: what the rollout measured, or the update itself did."""
        for name in self.history:
            key = name if name in SPACES else f"reward/{name}"
            self._seen[name] += [float(metrics[k]) for k in (f"rollout/{key}", key) if k in metrics]

    def close(self) -> None:
        """The rollout is over; one that gave no rows has told nothing. Raises :class:`UserError` where it did not
        measure what the rule asks for."""
        seen, self._seen = self._seen, {name: [] for name in self.history}
        if not any(seen.values()):
            return
        if missing := [name for name, values in seen.items() if not values]:
            raise UserError(f"stop: rollouts of this run do not measure {', '.join(missing)}; take another in falls")
        for name, values in seen.items():
            self.history[name].append(fmean(values))

    def change(self, name: str) -> tuple[float, float]:
        """The first mean of ``name`` and the last."""
        values, window = self.history[name], self.rule.window if self.rule else 1
        return fmean(values[:window]), fmean(values[-window:])

    def fallen(self, share: float = 1.0) -> list[str]:
        """What has lost at least this share of what it may, as far as that can be told yet."""
        if self.rule is None or not self.history[self.rule.rises]:
            return []
        lost = {name: first - last for name in self.rule.falls for first, last in [self.change(name)]}
        return [name for name, amount in self.rule.falls.items() if lost[name] >= share * amount]

    @property
    def verdict(self) -> str | None:
        """Why to stop; None where there is no reason."""
        fallen = self.fallen()
        if self.rule is None or not fallen or len(self.history[self.rule.rises]) < 2 * self.rule.window:
            return None
        first, last = self.change(self.rule.rises)
        if last <= first:
            return None
        losses = [f"{name} has fallen from {a:.4g} to {b:.4g}" for name in fallen for a, b in [self.change(name)]]
        return (
            f"stopped at rollout {len(self.history[self.rule.rises])}: {self.rule.rises} has risen from {first:.4g} to "
            f"{last:.4g} while {', '.join(losses)} (means of the first and the last {self.rule.window} rollouts)"
        )

    def require_honest(self, folder: Path) -> Path:
        """``folder``. Raises :class:`Stopped` where there is a reason to stop, which names the last good checkpoint."""
        if self.verdict:
            good = folder / f"checkpoint-{self.good}" if self.good is not None else "none"
            raise Stopped(f"{self.verdict}; last good checkpoint: {good}")
        return folder

    def saved(self, step: int) -> dict[str, Any]:
        """What the checkpoint of ``step``, which is being written, has to give back to a resumed run."""
        if not self.fallen(0.5):
            self.good = step
        return {"history": {name: list(values) for name, values in self.history.items()}, "good": self.good}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`saved` gave. Raises :class:`UserError` where the run has not watched what it is to."""
        history, good = state.get("history", {}), state.get("good")
        try:
            kept = {name: [float(value) for value in values] for name, values in history.items()}
        except (AttributeError, TypeError, ValueError) as error:
            said = shortened(str(history))
            raise UserError(f"stop: the checkpoint's history is {said}; expected numbers by name") from error
        if missing := sorted(self.history.keys() - kept.keys()):
            raise UserError(
                f"stop: the checkpoint does not know how {', '.join(missing)} began; it has watched "
                f"{', '.join(sorted(kept)) or 'nothing'}. Name these, or set stop: null"
            )
        self.history = {name: kept[name] for name in self.history}
        self.good = good if self.rule and isinstance(good, int) else None
