"""Fixtures of all tests. What takes seconds to import is imported where tests are collected and run, which is not in
the process that hands them out to pytest's workers."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.pipelines import Build

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the processes that tests start: pytest runs one on every core


def pytest_collectstart() -> None:
    gc.disable()  # until all is imported, which leaves no garbage worth a fifth of the time
    import rewards  # first of all: it makes torchvision importable beside a CPU torch

    assert rewards
    import torch

    from align.common import bitsandbytes_shim

    bitsandbytes_shim.ensure()
    # networks this small are faster on one thread, and the subprocesses that tests compare with bit by bit use one too
    torch.set_num_threads(1)


def pytest_collection_finish(session: pytest.Session) -> None:
    """The half a million objects of the libraries are no garbage: no collection looks through them again."""
    gc.freeze()
    if hasattr(session.config, "workerinput"):
        _fork_the_server()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.freeze()  # at its end pytest collects five times


def _fork_the_server() -> None:
    """Processes that tests start are forked from one of multiprocessing's, which imports everything anew; in a worker
    of pytest that one is itself a fork of the worker, made before any test has run and any thread of one. What these
    processes print is seen where a file's tests run without workers."""
    from multiprocessing import forkserver, util

    def fork(path: bytes, arguments: list[str], passed: list[int]) -> int:
        if pid := os.fork():
            return pid
        try:
            for fd in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
            for last, following in pairwise([2, *sorted(fd for fd in passed if fd > 2), 65536]):
                os.closerange(last + 1, following)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            exec(arguments[-1])  # "from multiprocessing.forkserver import main; main(..)"
        finally:
            os._exit(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(util, "spawnv_passfds", fork)
        forkserver.ensure_running()


@pytest.fixture
def tiny() -> Build:
    from tests import pipelines

    return pipelines.tiny


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny pipelines saved as folders that stock diffusers loads, by kind."""
    from tests import pipelines

    return pipelines.folders(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(autouse=True, scope="session")
def each_folder_read_once() -> Iterator[None]:
    """The suite loads a few tiny folders a thousand times, at a tenth of a second each."""
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    from tests import mould

    with mould.each_folder_read_once(ModelMixin), mould.each_folder_read_once(PreTrainedModel):
        yield


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """accelerate keeps its first configuration for the life of a process; every test is a process of its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
