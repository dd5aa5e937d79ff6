"""Every ``configs/*_smoke.yaml`` runs as it stands, on the shipped pipelines, and leaves weights that moved; every
other training config parses as it stands, those of QLoRA in :mod:`tests.test_memory`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from align.common.command import parse
from align.families import LORA_FILE
from align.policy.initial_noise import NOISE_FILE
from align.train import main
from align.training.config import TrainConfig

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*_smoke.yaml"))
OTHERS = sorted(
    path
    for path in set(FOLDER.glob("*.yaml")) - set(CONFIGS)
    if not path.stem.startswith(("compress", "evaluate", "qlora"))
)
WRITTEN = {LORA_FILE: "lora_B", NOISE_FILE: "mean"}  # what a run leaves, and which of its tensors begin at zero


@pytest.mark.slow  # every objective has a run by command in its own tests
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_smoke_config_runs(config: Path, tmp_path: Path) -> None:
    assert main(["--config", str(config), "--output_dir", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["rollout"] for line in lines if "rollout" in line] == [1, 2]
    assert any("loss" in line for line in lines)
    written, part = next((n, p) for n, p in WRITTEN.items() if (tmp_path / n).is_file())
    assert any(value.any() for name, value in load_file(tmp_path / written).items() if part in name)


@pytest.mark.parametrize("config", OTHERS, ids=lambda path: path.stem)
def test_training_config_parses(config: Path) -> None:
    settings, _ = parse(TrainConfig, "x", None, ["--config", str(config)])
    assert settings.objective is not None
