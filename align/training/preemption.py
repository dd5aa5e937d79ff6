"""Signals by which clusters end a job: the run saves what a resumed one needs, and leaves with a status of its own."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STATUS = 75  # the exit status of a run that was told to end and can be resumed (sysexits' EX_TEMPFAIL)


class Preempted(Exception):
    """The run was told to end. Raised where nothing of the work since the last whole state is kept anyway."""


class Preemption:
    """Whether SIGTERM or SIGHUP has come. The first is remembered; a second one ends the process at once, as before."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Within, signals are heard; only the main thread of a process can hear them."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            self._forget()

    def check(self) -> None:
        """Raise :class:`Preempted` where a signal has come; to be called where work can be given up and done again.

        The handler itself raises nothing: it finds the process anywhere, also while weights are exchanged or frozen.
        """
        if self.asked:
            raise Preempted

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        self._forget()

    def _forget(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
