"""Rewards are named alike wherever a command takes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import rewards.agree
import rewards.score
import rewards.serve
from align.common.command import parse
from align.evaluate import Evaluate
from align.rollout import RolloutSettings
from align.training.config import TrainConfig
from pruning.settings import Compress
from rewards import RewardConfig, RewardError, RewardSum, parse_rewards

Read = Callable[[Sequence[str]], list[RewardConfig]]
EXPECTED = [RewardConfig("Shapes"), RewardConfig("JPEGCompressibility", args={"quality": 50})]
LINE = ["--reward", "Shapes", "--reward", "JPEGCompressibility:quality=50"]
ENTRIES = ["Shapes", {"name": "JPEGCompressibility", "args": {"quality": 50}}]
SETTINGS: dict[str, tuple[Any, str, list[str]]] = {  # settings, where the rewards are, what else a line has to say
    "align.train": (
        TrainConfig,
        "rewards",
        ["--data", "Prompts", "--data.path", "shapes-prompts", "--objective", "D3PO"],
    ),
    "align.rollout": (RolloutSettings, "rewards", ["--prompts", "shapes-prompts"]),
    "align.evaluate": (Evaluate, "reward", ["--tuned", "nowhere"]),
    "pruning.compress": (Compress, "reward", []),
    "pruning.compress report": (Compress, "report.reward", []),
}
COMMANDS = {
    "rewards.score": rewards.score.main,
    "rewards.agree": rewards.agree.main,
    "rewards.serve": rewards.serve.main,
}


def settings_of(command: str, line: Sequence[str]) -> tuple[list[RewardConfig], str]:
    """The rewards that a command with settings reads, and its resolved YAML."""
    settings, key, more = SETTINGS[command]
    found, resolved = parse(settings, command, None, [*more, *line])
    for name in key.split("."):
        found = getattr(found, name)
    return found, resolved


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, Sequence[str]], list[RewardConfig] | int]:
    """Runs a command of ``rewards`` up to where rewards are loaded: their configs, or the exit status before that."""
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a star", "chosen": "a.png", "rejected": "b.png"}))
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("a star")
    loaded: list[list[RewardConfig]] = []

    def stop(configs: list[RewardConfig], device: str | None = None) -> RewardSum:
        loaded.append(configs)
        raise RewardError("enough")

    monkeypatch.setattr(RewardSum, "of", stop)
    more = {
        "rewards.score": [str(tmp_path), "--output", str(tmp_path / "scores")],
        "rewards.agree": ["--pairs", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "agreement.json")],
        "rewards.serve": ["--port", "0"],
    }

    def run(command: str, line: Sequence[str]) -> list[RewardConfig] | int:
        status = COMMANDS[command]([*more[command], *line])
        return loaded.pop() if loaded else status

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_scoring_agreement_and_serving_read_every_spelling(command: str, ask: Any) -> None:
    yaml_list = yaml.safe_dump(ENTRIES, default_flow_style=True)
    for line in (LINE, ["--reward", yaml_list], ["--reward", "Shapes", "--reward", json.dumps(ENTRIES[1])]):
        assert ask(command, line) == EXPECTED


@pytest.mark.parametrize("command", SETTINGS)
def test_commands_with_settings_read_every_spelling(command: str, tmp_path: Path) -> None:
    _, key, _ = SETTINGS[command]
    *above, _ = key.split(".")
    prefix = "".join(f"{part}." for part in above)
    lines = [[word.replace("--", f"--{prefix}") for word in LINE], [f"--{key}", json.dumps(ENTRIES)]]
    for number, spelling in enumerate(("reward", "rewards")):
        file = tmp_path / f"{number}.yaml"
        content: Any = {spelling: ENTRIES}
        for part in reversed(above):
            content = {part: content}
        file.write_text(yaml.safe_dump(content))
        lines.append(["--config", str(file)])
    for line in lines:
        found, resolved = settings_of(command, line)
        assert found == EXPECTED
        (tmp_path / "resolved.yaml").write_text(resolved)
        settings, _, _ = SETTINGS[command]
        again, _ = parse(settings, command, None, ["--config", str(tmp_path / "resolved.yaml")])
        for part in key.split("."):
            again = getattr(again, part)
        assert again == EXPECTED
    (tmp_path / "one.yaml").write_text((tmp_path / "1.yaml").read_text())
    found, _ = settings_of(command, ["--config", str(tmp_path / "one.yaml"), f"--{prefix}reward", "OCR"])
    assert found == [RewardConfig("OCR")]  # the line wins over the file


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("entry", ["{name: Shapes, weight: 0.5}", "{name: Shapes, normalize: [0, 2]}"])
def test_a_weight_where_nothing_is_summed_is_refused(
    command: str, entry: str, ask: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(command, ["--reward", entry]) == 2
    assert "reward 'Shapes' has a weight or normalize" in capsys.readouterr().err


@pytest.mark.parametrize("command", SETTINGS)
def test_a_weight_is_honoured_or_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, key, _ = SETTINGS[command]
    line = [f"--{key}", "[{name: Shapes, weight: 0.5, label: half}]"]
    if command in ("align.evaluate", "pruning.compress report"):
        with pytest.raises(SystemExit) as leaving:
            settings_of(command, line)
        assert leaving.value.code == 2 and "'half' has a weight" in capsys.readouterr().err
    else:
        assert settings_of(command, line)[0] == [RewardConfig("Shapes", 0.5, label="half")]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("Shapes:mode", "no KEY=VALUE"),
        ("{nme: Shapes}", "the keys nme"),
        ("[Shapes, Shapes]", "two rewards are called 'Shapes'"),
        ("{name: Shapes, weight: high}", "expected NAME"),
        ("{name: Shapes, normalize: [1]}", r"expected (mean, std)"),
    ],
)
def test_mistakes_are_told_alike_everywhere(
    entry: str, message: str, ask: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in COMMANDS:
        assert ask(command, ["--reward", entry]) == 2
        assert message in capsys.readouterr().err
    for command, (_, key, _) in SETTINGS.items():
        with pytest.raises(SystemExit) as leaving:
            settings_of(command, [f"--{key}", entry])
        assert leaving.value.code == 2 and message in capsys.readouterr().err


def test_the_sum_is_of_weighted_and_normalized_scores() -> None:
    import torch

    configs = parse_rewards(
        ["JPEGIncompressibility", "{name: JPEGIncompressibility, label: b, weight: 2, normalize: [1, 4]}"]
    )
    total = RewardSum.of(configs)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    parts = total.components(images=images, prompts=["", ""])
    torch.testing.assert_close(parts["total"], parts["b"] + 2 * (parts["b"] - 1) / 4)
