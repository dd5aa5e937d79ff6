"""Settings and config files that no command can mean: each is told in one line, and nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align import evaluate, rollout, sample
from pruning import compress
from rewards import RewardError, parse_rewards
from tests.helpers import errors


@pytest.mark.parametrize("resolution", ["0", "-16"])
@pytest.mark.parametrize("command", [sample, evaluate, rollout], ids=lambda module: module.__name__)
def test_a_picture_has_a_side(
    command: Any, resolution: str, tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a star\n")
    model = "--base" if command is evaluate else "--pretrained_model_name_or_path"
    words = [f"--prompts={tmp_path}/prompts.txt", f"{model}={tiny_folders['epsilon']}", f"--output_dir={tmp_path}/out"]
    words += [f"--tuned={tiny_folders['epsilon']}"] if command is evaluate else []
    assert command.main([*words, f"--resolution={resolution}"]) == 2
    assert errors(capsys.readouterr().err) == [f"error: resolution must be at least 1, got {resolution}"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [sample, evaluate], ids=lambda module: module.__name__)
def test_a_schedule_has_no_more_steps_than_training_times(
    command: Any, tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a star\n")
    model = "--base" if command is evaluate else "--pretrained_model_name_or_path"
    words = [f"--prompts={tmp_path}/prompts.txt", f"{model}={tiny_folders['epsilon']}", f"--output_dir={tmp_path}/out"]
    words += [f"--tuned={tiny_folders['epsilon']}"] if command is evaluate else []
    assert command.main([*words, "--num_inference_steps=5000"]) == 2
    (told,) = errors(capsys.readouterr().err)
    assert "num_inference_steps must lie between 1 and 1000" in told and told.endswith("got 5000")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", ["0", "-1"])
def test_a_rollout_has_prompts(limit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a star\n")
    words = [f"--prompts={tmp_path}/prompts.txt", f"--output_dir={tmp_path}/out", f"--limit={limit}"]
    assert rollout.main(words) == 2
    assert errors(capsys.readouterr().err) == [f"error: limit must be at least 1, got {limit}"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["seed: " + "[" * 100_000, "seed: &a [*a]"], ids=["deep", "itself"])
def test_a_config_file_ends_somewhere(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert sample.main(["--config", str(tmp_path / "config.yaml")]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "error: --config is no YAML" in told[0]


def test_compress_knows_its_device(
    tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a star\n")
    words = [f"--prompts={tmp_path}/prompts.txt", f"--pretrained_model_name_or_path={tiny_folders['flow']}"]
    words += [f"--output_dir={tmp_path}/out", "--blocks=1", "--stages=[plan]", "--device=toaster"]
    assert compress.main(words) == 2
    (told,) = errors(capsys.readouterr().err)
    assert "--device is toaster" in told


@pytest.mark.parametrize("given", [3, {"name": "Shapes", "weight": float("nan")}, {"name": "Shapes", "weight": 1e999}])
def test_rewards_are_named_and_weigh_something(given: Any) -> None:
    with pytest.raises(RewardError, match="rewards are 3|weight is (nan|inf); expected a finite number"):
        parse_rewards(given)
