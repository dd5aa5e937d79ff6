"""tests/third_party is somebody else's package: it adds a family, an objective, a reward and a data format, and runs by
our commands. It is on the path and has its entry points, as an installed one; nothing of ours knows of it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from align import families
from align.families import LORA_FILE
from align.testing import CHECKS, FamilyCase
from tests.helpers import launch

ROOT = Path(__file__).parents[1]
THEIRS = ROOT / "tests/third_party"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The places on the path of their package, and of what an installation says of it; written by setuptools."""
    site = tmp_path_factory.mktemp("site")
    script = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "dist_info", "--output-dir"]
    subprocess.run([*script, str(site)], cwd=THEIRS, check=True)
    return [str(site), str(THEIRS)]


@pytest.fixture
def theirs(installed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for place in installed:
        monkeypatch.syspath_prepend(place)


@pytest.fixture(scope="module")
def pipeline(installed: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(THEIRS))
        from t2i_stranger.tiny import save_tiny

        return save_tiny(tmp_path_factory.mktemp("auraflow"))


@pytest.fixture(scope="module")
def rankings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts of three ranked images, the further back the greyer: six pairs."""
    folder, rng = tmp_path_factory.mktemp("rankings"), np.random.default_rng(0)
    for name, prompt in {"a": "a red circle", "b": "two blue stars"}.items():
        (folder / name).mkdir()
        (folder / name / "prompt.txt").write_text(f"{prompt}\n")
        pixels = rng.integers(0, 256, (16, 16, 3)).astype(float)
        for place in (1, 2, 3):
            grey = pixels.mean(2, keepdims=True) + (pixels - pixels.mean(2, keepdims=True)) / place
            Image.fromarray(grey.astype(np.uint8)).save(folder / name / f"{place}.png")
    return folder


def command(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """What a process does in which their package is installed: ``arguments`` are a module and its command line."""
    sys.path[:0] = environment["INSTALLED"].split(os.pathsep)
    torch.set_num_threads(1)
    sys.exit(importlib.import_module(arguments[0]).main(arguments[1:]))


def run(module: str, arguments: Sequence[str], path: Sequence[str]) -> int | None:
    process = launch([module, *arguments], command, INSTALLED=os.pathsep.join(path))
    process.join(120)
    return process.exitcode


# these take longest, and are seen to hold of our own families
SLOW = ("check_saved_weights", "check_reference", "check_gradient_checkpointing")


@pytest.mark.parametrize(
    "check", [pytest.param(c, marks=pytest.mark.slow) if c.__name__ in SLOW else c for c in CHECKS]
)
def test_their_family_passes_our_checks(theirs: None, pipeline: Path, check: Callable[[FamilyCase], None]) -> None:
    check(FamilyCase(pipeline, disturbance=0.3))


def test_an_installed_package_adds_a_family(
    theirs: None, pipeline: Path, monkeypatch: pytest.MonkeyPatch, installed: list[str]
) -> None:
    assert families.find(str(pipeline)).__module__ == "t2i_stranger.family"
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in installed])
    with pytest.raises(families.Unsupported, match="is a AuraFlowPipeline; supported pipelines: StableDiffusion"):
        families.find(str(pipeline))


def test_a_run_of_their_config_trains_their_family(
    installed: list[str], pipeline: Path, rankings: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    options = [f"--pretrained_model_name_or_path={pipeline}", f"--data.path={rankings}", f"--output_dir={folder}"]
    options.append(f"--data.cache_dir={tmp_path / 'cache'}")
    assert run("align.train", ["--config", str(THEIRS / "config.yaml"), *options], installed) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3]
    assert all(1 < line["weight_max"] < 2 for line in trained)  # of the more colourful of a pair
    assert all(line["rollout/reward/colorfulness"] > 10 for line in trained)
    assert any(bool(tensor.any()) for name, tensor in load_file(folder / LORA_FILE).items() if "lora_B" in name)
    assert "class_path: t2i_stranger.objective.RewardWeightedRegression" in (folder / "config.yaml").read_text()


def test_their_reward_scores_by_our_command(installed: list[str], rankings: Path, tmp_path: Path) -> None:
    """The figure of Hasler & Süsstrunk's formula, computed here from the file."""
    table = tmp_path / "scores.parquet"
    reward = "{name: t2i_stranger.reward.Colorfulness, label: colorfulness, args: {scale: 2}}"
    assert run("rewards.score", [str(rankings / "a"), "--reward", reward, "--output", str(table)], installed) == 0
    scores = pq.read_table(table).to_pydict()
    assert [Path(file).name for file in scores["file"]] == ["1.png", "2.png", "3.png"]
    for name, score in zip((1, 2, 3), scores["colorfulness"], strict=True):
        red, green, blue = np.asarray(Image.open(rankings / "a" / f"{name}.png"), dtype=float).reshape(-1, 3).T
        rg, yb = red - green, (red + green) / 2 - blue
        figure = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
        assert score == pytest.approx(2 * figure, rel=1e-5)


def test_equal_rewards_are_plain_regression_and_far_ones_choose(theirs: None) -> None:
    """Of their objective: the weights of a pair, w = 2 softmax(r / temperature)."""
    from t2i_stranger.objective import pair_weights

    assert torch.equal(pair_weights(torch.tensor([3.0, 3.0]), 1.0), torch.ones(2))
    torch.testing.assert_close(pair_weights(torch.tensor([90.0, 0.0, 0.0, 90.0]), 1.0), torch.tensor([2.0, 0, 0, 2.0]))
    ratio = pair_weights(torch.tensor([1.0, 0.0]), 2.0)
    assert (ratio[0] / ratio[1]).log().item() == pytest.approx(0.5, rel=1e-5) and ratio.sum().item() == pytest.approx(2)


def test_mistakes_in_their_settings_and_data_are_one_line(
    theirs: None, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from align.train import main

    config = ["--config", str(THEIRS / "config.yaml"), f"--pretrained_model_name_or_path={pipeline}"]
    assert main([*config, "--objective.temperature", "0"]) == 2
    assert "temperature must be positive, got 0.0" in capsys.readouterr().err
    assert main([*config, f"--data.path={tmp_path}"]) == 2
    assert f"{tmp_path} (ranked folders) holds no usable pairs" in capsys.readouterr().err
    assert main([*config, "--rewards=[]"]) == 2
    assert "RewardWeightedRegression learns from rewards: set rewards" in capsys.readouterr().err
