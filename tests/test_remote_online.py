"""``Remote`` in the online loop: a reward behind a server trains as the same reward does in the run's own process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from align.train import main
from rewards import RewardSum, load
from rewards.models.shapes import Shapes
from tests.helpers import errors, online, same, untimed, weights, write
from tests.test_serve import served


class Darkest:
    """The least value of a picture, which depends on no order of summation: bit for bit what arrived."""

    differentiable: ClassVar[bool] = False

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        return images.flatten(1).amin(1)


class Sour:
    """Scores the first call, and refuses to score another."""

    differentiable: ClassVar[bool] = False

    def __init__(self) -> None:
        self.calls = 0

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise ZeroDivisionError("the judge is out to lunch")
        return torch.arange(len(images)).float()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    both = RewardSum({"shapes": Shapes(), "small": load("JPEGCompressibility")}, {"small": 0.5})
    with served({"Shapes": Shapes(), "both": both, "darkest": Darkest(), "sour": Sour()}) as (_, address):
        yield address


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """Two rollouts of the embedded world: two prompts, two pictures each, of whose steps one is trained."""
    settings = {"sampler": {"num_inference_steps": 4, "guidance_scale": 3.0}, "window": {"size": 1}}
    config = online(Path("shapes-sd"), tmp_path, "PolicyGradient", images_per_prompt=2, **settings)
    return config | {"rollout_batch_size": 2, "train_batch_size": 4, "max_train_steps": 2}


def remote(url: str, reward: str, **changes: Any) -> dict[str, Any]:
    return {"name": "Remote", "label": reward, "args": {"url": url, "reward": reward, "retries": 0}} | changes


def test_a_run_with_remote_rewards_is_the_run_with_the_rewards(
    config: dict[str, Any], tmp_path: Path, url: str
) -> None:
    """Bitwise: metrics and weights. The pictures are no 8-bit files; made so, ``Darkest`` would show it."""
    small = {"name": "JPEGCompressibility", "label": "small", "weight": 0.5}
    runs = {
        "here": [{"name": "Shapes"}, small, {"name": f"{__name__}.Darkest", "label": "darkest"}],
        "there": [remote(url, "Shapes"), small, remote(url, "darkest"), remote(url, "both", weight=0.0)],
    }
    for name, rewards in runs.items():
        assert main(["--config", write(config, rewards=rewards, output_dir=str(tmp_path / name))]) == 0
    here, there = untimed(tmp_path / "here"), untimed(tmp_path / "there")
    for line in there:  # a RewardSum behind a server, only watched
        total = line["rollout/reward/Shapes"] + 0.5 * line["rollout/reward/small"]
        assert line.pop("rollout/reward/both") == pytest.approx(total, abs=1e-6)
    assert here == there
    assert same(weights(tmp_path / "here"), weights(tmp_path / "there"))
    assert len({line["rollout/reward/Shapes"] for line in here}) == 2  # it says something about the pictures


def test_a_remote_reward_that_fails_stops_the_run(
    config: dict[str, Any], url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", write(config, rewards=[remote(url, "sour", label="taste")])]) == 2
    (error,) = errors(capsys.readouterr().err)
    assert f"reward 'sour' at {url} answered 500" in error
    assert "ZeroDivisionError: the judge is out to lunch" in error
    assert len(untimed(config["output_dir"])) == 1  # the first rollout was trained on, and nothing made up for the next


def test_a_server_that_is_not_there_stops_the_run_before_it_begins(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", write(config, rewards=[remote("http://127.0.0.1:9", "Shapes")])]) == 2
    (error,) = errors(capsys.readouterr().err)
    assert "http://127.0.0.1:9 failed 1 times, last with ConnectionRefusedError" in error
