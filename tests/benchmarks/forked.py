"""Our commands in processes of their own, forked from one that has the imports done: a hundred starts in a minute.

The target is the real ``main`` of the command; only what ``python -m`` would do before it is skipped.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from pathlib import Path

import torch

from tests.helpers import launch

IMPORTED = (  # by the first process; also what the commands import when they come to need it
    "rewards",  # first of all: it makes torchvision importable beside a CPU torch
    "align.train", "align.training.trainer", "align.sample", "align.evaluate", "align.bench", "align.rollout",
    "pruning.compress", "pruning.quantize", "rewards.score", "rewards.agree", "tests.pipelines",
    "tests.benchmarks.fault_cases", "bitsandbytes", "datasets", "matplotlib.pyplot", "scipy.stats",
)  # fmt: skip


def serve() -> None:
    """Start the process that the others are forked from."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    get_context("forkserver").set_forkserver_preload([*IMPORTED])
    forkserver.ensure_running()
    first = launch([], nothing)  # it waits for the imports, so that no measured one does
    first.join()


def nothing(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """What the first process does."""


def command(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """What a process does: ``arguments`` are a module and its command line. In its ``environment``, ``ERRORS`` is a
    file or fifo for stderr and ``FOLDER`` where it runs, with ``home`` in it; ``FILE_SIZE`` is the largest file that it
    may write, in bytes; with ``PIPE`` nobody reads its stdout, and with ``PLAIN`` modes of files bind root too."""
    os.environ.update(environment | {"HOME": f"{environment['FOLDER']}/home"})
    os.dup2(os.open(environment["ERRORS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    reading, writing = os.pipe()
    os.dup2(writing if "PIPE" in environment else os.open(os.devnull, os.O_WRONLY), 1)
    os.close(reading)
    os.close(writing)
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    os.chdir(environment["FOLDER"])
    sys.path.insert(0, environment["FOLDER"])  # as `python -m` has it
    torch.set_num_threads(1)
    if "FILE_SIZE" in environment:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(environment["FILE_SIZE"]),) * 2)
    if "PLAIN" in environment:
        give_up_capabilities()
    main = importlib.import_module(arguments[0]).main
    status = main(list(arguments[1:]))
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout, status = io.StringIO(), 120  # what Python makes of it
    sys.exit(status)


def give_up_capabilities() -> None:
    """Take from root what lets it pass over modes of files (``man capset``); nothing changes for others."""
    version_3 = 0x20080522
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset((ctypes.c_uint32 * 2)(version_3, 0), (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")


class Started:
    """A command that runs. Of multiprocessing's processes any thread may read how any of them ended, and only the first
    one gets an answer, so they are asked one at a time."""

    _lock = threading.Lock()

    def __init__(self, arguments: Sequence[str], folder: Path, errors: Path, **environment: str) -> None:
        """:func:`command` in ``folder``, its stderr in ``errors``."""
        with self._lock:
            self._process = launch(arguments, command, FOLDER=str(folder), ERRORS=str(errors), **environment)

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        with self._lock:
            return self._process.exitcode

    @property
    def pid(self) -> int:
        """Its number."""
        assert self._process.pid is not None  # it has been started
        return self._process.pid

    def signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, patience: float) -> int | None:
        """The exit status, if there is one after ``patience`` seconds."""
        end = time.monotonic() + patience
        while (status := self.status) is None and time.monotonic() < end:
            time.sleep(0.005)
        return status

    def kill(self) -> None:
        """End it, if it still runs."""
        while self.status is None:
            self.signal(signal.SIGKILL)
            self.wait(1.0)


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status, None where it had to be killed; stderr; the seconds that it took."""

    status: int | None
    errors: str
    seconds: float


def run(arguments: Sequence[str], folder: Path, patience: float, **environment: str) -> Ended:
    """The command, waited for, ``patience`` seconds at most. Its stderr is read by a fifo, which no limit on the size
    of files can silence."""
    begin, text, status = time.monotonic(), b"", None
    with tempfile.TemporaryDirectory() as place:
        fifo = Path(place) / "stderr"
        os.mkfifo(fifo)
        end = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        process = Started(arguments, folder, fifo, **environment)
        while status is None and time.monotonic() - begin < patience:
            status = process.wait(0.05)
            with contextlib.suppress(BlockingIOError):
                while part := os.read(end, 2**16):
                    text += part
        process.kill()
        os.close(end)
    return Ended(status, text.decode(errors="replace"), time.monotonic() - begin)
