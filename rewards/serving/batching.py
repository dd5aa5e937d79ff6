"""Many calls, one reward: the images of all calls that wait are scored together, in a thread of the reward's own."""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rewards import Reward, RewardError, checked


@dataclass(frozen=True)
class Limits:
    """What a server takes at most.

    Args:
        max_body: bytes of a call.
        max_pixels: of all images of a call together.
        max_batch: images of a call.
        max_waiting: images that wait for one reward; with more, calls are told to try again.
        max_connections: calls that are read or answered at one time.
        read_timeout: seconds within which the head of a call must have arrived, and then again its body.
        score_timeout: seconds that a call may wait for its scores.
        batch_size: images that a reward is given at once.
        linger: seconds to wait for further calls that fill a batch.
    """

    max_body: int = 2**26
    max_pixels: int = 2**26
    max_batch: int = 64
    max_waiting: int = 1024
    max_connections: int = 128
    read_timeout: float = 30.0
    score_timeout: float = 100.0
    batch_size: int = 32
    linger: float = 0.005

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if value < 0 or (value == 0 and one.name != "linger"):
                raise RewardError(f"{one.name} is {value}; expected more than 0")
        if self.max_waiting < self.max_batch:
            raise RewardError(f"max_waiting {self.max_waiting} is below max_batch {self.max_batch}: some never fit")


class Busy(RuntimeError):
    """Too much is waiting for a reward; try again later."""


@dataclass(frozen=True)
class Call:
    """Images (3, H, W) of any sizes, uint8 or float32 in [0, 1]; a prompt and a metadata row for each; and the scores
    to come, which are the reward's exception where it raised one."""

    images: Sequence[Tensor]
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, Any] | None]
    scores: Future[list[float]] = field(default_factory=Future)


class Batcher:
    """One thread that gives a reward the images of all waiting calls, ``batch_size`` at a time."""

    def __init__(self, name: str, reward: Reward, limits: Limits, device: str) -> None:
        self.name, self.reward, self.limits, self.device = name, reward, limits, device
        self.waiting = 0
        self._calls: deque[Call] = deque()
        self._changed = threading.Condition()
        self._open = True
        threading.Thread(target=self._work, name=f"reward {name}", daemon=True).start()

    def submit(self, call: Call) -> None:
        """Begin to score. :class:`Busy` where too much is waiting."""
        with self._changed:
            if not self._open or self.waiting + len(call.images) > self.limits.max_waiting:
                state = f"{self.waiting} images are waiting for it" if self._open else "the server is stopping"
                raise Busy(f"reward {self.name!r} is busy: {state}; try again")
            self.waiting += len(call.images)
            self._calls.append(call)
            self._changed.notify()

    def close(self) -> None:
        """Take no further call; those that wait are still scored."""
        with self._changed:
            self._open = False
            self._changed.notify()

    def _work(self) -> None:
        while calls := self._take():
            self._answer([call for call in calls if call.scores.set_running_or_notify_cancel()])

    def _take(self) -> list[Call]:
        """The next calls that fit one batch, at least one; none when closed."""
        taken: list[Call] = []
        with self._changed:
            self._changed.wait_for(lambda: self._calls or not self._open)
            room = self.limits.batch_size
            self._changed.wait_for(lambda: self.waiting >= room or not self._open, self.limits.linger)
            while self._calls and (not taken or len(self._calls[0].images) <= room):
                taken.append(self._calls.popleft())
                room -= len(taken[-1].images)
                self.waiting -= len(taken[-1].images)
        return taken

    def _answer(self, calls: Sequence[Call]) -> None:
        if not calls:
            return
        try:
            scores = self._score(calls)
        except Exception as error:  # anyone's reward may raise anything; only the call to blame may suffer from it
            if len(calls) > 1:
                for call in calls:
                    self._answer([call])
            else:
                calls[0].scores.set_exception(error)
            return
        for call in calls:
            call.scores.set_result(scores[: len(call.images)])
            del scores[: len(call.images)]

    def _score(self, calls: Sequence[Call]) -> list[float]:
        """Scores of all images of the calls, one after the other; pictures of one size go together."""
        items = [item for call in calls for item in zip(call.images, call.prompts, call.metadata, strict=True)]
        alike: dict[tuple[Any, ...], list[int]] = {}
        for number, (image, _, record) in enumerate(items):
            alike.setdefault((*image.shape, image.dtype, record is None), []).append(number)
        scores = [0.0] * len(items)
        for numbers in alike.values():
            for start in range(0, len(numbers), self.limits.batch_size):
                chunk = numbers[start : start + self.limits.batch_size]
                images = torch.stack([items[n][0] for n in chunk]).to(self.device)
                if images.dtype == torch.uint8:
                    images = images.float() / 255
                records = [record for n in chunk if (record := items[n][2]) is not None]
                try:
                    with torch.no_grad():
                        values = checked(self.reward, self.name, images, [items[n][1] for n in chunk], records or None)
                except RewardError as error:
                    error.row = None if error.row is None else chunk[error.row]
                    raise
                for number, value in zip(chunk, values.tolist(), strict=True):
                    scores[number] = value
        return scores
