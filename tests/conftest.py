"""Fixtures of all tests. What takes seconds to import is imported where tests are collected and run, which is not in
the process that hands them out to pytest's workers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.pipelines import Build

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the processes that tests start: pytest runs one on every core


def pytest_collectstart() -> None:
    import rewards  # first of all: it makes torchvision importable beside a CPU torch

    assert rewards
    import torch

    # networks this small are faster on one thread, and the subprocesses that tests compare with bit by bit use one too
    torch.set_num_threads(1)


@pytest.fixture
def tiny() -> Build:
    from tests import pipelines

    return pipelines.tiny


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny pipelines saved as folders that stock diffusers loads, by kind."""
    from tests import pipelines

    return pipelines.folders(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """accelerate keeps its first configuration for the life of a process; every test is a process of its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
