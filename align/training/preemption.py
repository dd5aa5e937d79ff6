"""Signals by which clusters end a job: the run saves what a resumed one needs, and leaves with a status of its own."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rewards.common.command import STOPPED, hear

STATUS = STOPPED


class Preempted(Exception):
    """The run was told to end. Raised where nothing of the work since the last whole state is kept anyway."""


class Preemption:
    """Whether SIGTERM or SIGHUP has come. The first is remembered; a second one ends the process at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Within, signals are heard, as :func:`rewards.common.command.hear` says."""
        forget = hear(self._hear)
        try:
            yield
        finally:
            forget()

    def check(self) -> None:
        """Raise :class:`Preempted` where a signal has come; to be called where work can be given up and done again.

        The handler itself raises nothing: it finds the process anywhere, also while weights are exchanged or frozen.
        """
        if self.asked:
            raise Preempted

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        hear(signal.SIG_DFL)
