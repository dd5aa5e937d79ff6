"""Pictures that models draw while people choose between those that are there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from align.common.errors import UserError
from align.evaluation.pictures import Drawing, PictureFolder
from align.families import Family
from rewards.common.device import Launched
from rewards.common.errors import one_line

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """Drawing is to end."""


class Background:
    """Draws each model's pictures in a thread of its own, side by side, so that the first items are whole soon. Models
    are loaded one after another, since libraries' loading is no work for two threads. ``fault`` says in words what
    went wrong, empty where nothing did. A process that ends while they compute is aborted: :meth:`stop` them first."""

    def __init__(self, models: Mapping[str, Callable[[], Family]], pictures: Mapping[str, PictureFolder]) -> None:
        self.models, self.pictures, self.fault = models, pictures, ""
        self._stopped, self._thread = threading.Event(), threading.Thread()

    def start(self, drawing: Drawing) -> threading.Thread:
        """Begin; the thread that is returned ends when all is drawn."""
        self._thread = threading.Thread(target=self._all, args=(drawing,), name="drawing", daemon=True)
        self._thread.start()
        return self._thread

    def stop(self, patience: float = 30.0) -> None:
        """Have it end after the step at hand, and wait for that so many seconds. What is drawn stays."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join(patience)

    def _all(self, drawing: Drawing) -> None:
        threads = []
        for name, load in self.models.items():
            if self._stopped.is_set():
                break
            try:
                family = load()
            except Exception as error:
                self._fail(name, error)
                continue
            threads.append(threading.Thread(target=self._one, args=(name, family, drawing), name=name, daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join()

    def _one(self, name: str, family: Family, drawing: Drawing) -> None:
        predict = family.predict

        def until_stopped(*state: Any, **how: Any) -> Any:
            if self._stopped.is_set():
                raise Stopped
            return predict(*state, **how)

        family.predict = until_stopped  # type: ignore[method-assign]
        try:
            self.pictures[name].draw(family, drawing, Launched(0, 0, 1), name)
        except Stopped:
            pass
        except Exception as error:
            self._fail(name, error)

    def _fail(self, name: str, error: Exception) -> None:
        self.fault = f"{name} cannot draw: {one_line(error)}"
        logger.error(self.fault, exc_info=None if isinstance(error, UserError) else error)
