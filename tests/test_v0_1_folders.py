"""What version 0.1 left behind still loads and goes on as it did then: :mod:`tests.freeze` on ``tests/v0_1``."""

from __future__ import annotations

import pytest

from tests import freeze


@pytest.mark.parametrize("name", freeze.FOLDERS)
def test_a_folder_of_0_1_goes_on_as_it_did(name: str) -> None:
    assert freeze.check_folders([name]) == []


@pytest.mark.slow  # test_smoke reads every config as well
def test_every_config_says_what_it_said() -> None:
    assert freeze.check_configs() == []


def test_every_public_name_is_there() -> None:
    assert freeze.check_names() == []


@pytest.mark.slow
@pytest.mark.parametrize("name", freeze.runs())
def test_training_gives_the_losses_of_0_1(name: str) -> None:
    assert freeze.check_losses([name]) == []
