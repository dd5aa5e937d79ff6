"""What version 0.1 called otherwise still loads, and says the new name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from align.common.command import dumped, parse
from align.common.renames import CLASSES, upgrade, upgrade_arguments
from align.data.preferences import PreferencePairs
from align.data.prompts import Prompts
from align.diffusion.kernels import DDIM
from align.objectives import D3PO, PolicyGradient
from align.policy.lora import LoRA
from align.sampling.sampler import Sampler, SDEWindow
from align.training.config import TrainConfig

OLD = {
    "data": {"class_path": "align.data.Prompts", "init_args": {"path": "shapes-prompts"}},
    "objective": {
        "class_path": "align.objectives.policy_gradient.PolicyGradient",
        "init_args": {
            "sampler": {"steps": 3, "guidance": 2.0, "kernel": {"class_path": "align.process.DDIM"}},
            "spread": "global",
        },
    },
    "rollout_batch_size": 2,
    "samples": {"prompts": ["a star"], "steps": 4, "guidance": 1.5},
}


def test_a_config_of_0_1_gives_what_todays_names_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(OLD))
    config, resolved = parse(TrainConfig, "align.train", None, ["--config", str(tmp_path / "old.yaml")])
    told = capsys.readouterr().err
    assert isinstance(config.objective, PolicyGradient)
    assert (config.objective.sampler.num_inference_steps, config.objective.sampler.guidance_scale) == (3, 2.0)
    assert config.objective.scale_rewards == "batch"
    assert (config.samples.num_inference_steps, config.samples.guidance_scale) == (4, 1.5)
    for line in ("sampler.steps is now num_inference_steps", "samples.guidance is now guidance_scale", "batch"):
        assert line in told
    (tmp_path / "new.yaml").write_text(resolved)
    again, _ = parse(TrainConfig, "align.train", None, ["--config", str(tmp_path / "new.yaml")])
    assert again == config
    assert "warning" not in capsys.readouterr().err


def test_a_command_line_of_0_1(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--data", "align.data.Prompts", "--data.path=shapes-prompts", "--objective=D3PO", "--samples.steps", "7"]
    line += ["--objective.sampler.guidance=3.5", "--objective.reference", "round_start"]
    config, _ = parse(TrainConfig, "align.train", None, line)
    assert isinstance(config.objective, D3PO)
    assert (config.objective.sampler.guidance_scale, config.objective.reference) == (3.5, "start")
    assert config.samples.num_inference_steps == 7
    assert "--samples.steps is now --samples.num_inference_steps" in capsys.readouterr().err


def test_lists_and_mappings_of_0_1_on_a_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--data=align.data.Prompts", "--data.path=shapes-prompts", "--objective=D3PO", "--samples", "{steps: 7}"]
    config, _ = parse(TrainConfig, "align.train", None, [*line, "--samples.prompts=[a star]"])
    assert (config.samples.num_inference_steps, config.samples.prompts) == (7, ["a star"])
    assert "samples.steps is now num_inference_steps" in capsys.readouterr().err
    told: list[str] = []
    assert upgrade_arguments(["--stages", "[plan, quantise]", "--prompts=[a, b"], told)[1:] == [
        '["plan", "quantize"]',
        "--prompts=[a, b",
    ]
    assert told == ["stages: quantise is now quantize"]


@pytest.mark.parametrize("text", ["[" * 5000, "[2001-99-99]", "[1, 2", "{a: 1, a: 2}", f"[{'9' * 6000}]"], ids=range(5))
def test_what_is_no_list_is_left_to_the_parser(text: str) -> None:
    assert upgrade_arguments(["--rewards", text], []) == ["--rewards", text]


def test_every_class_that_moved_is_where_the_table_says() -> None:
    for new in CLASSES.values():
        module, _, name = new.rpartition(".")
        assert name in vars(__import__(module, fromlist=[name]))
    assert upgrade("align.encoded.PreferencePairs").endswith(PreferencePairs.__qualname__)


def test_both_names_are_an_error_not_a_guess(tmp_path: Path) -> None:
    both = OLD | {"samples": {"steps": 4, "num_inference_steps": 5}}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(both))
    with pytest.raises(SystemExit):
        parse(TrainConfig, "align.train", None, ["--config", str(tmp_path / "both.yaml")])


def test_settings_made_in_python_come_back_from_their_file(tmp_path: Path) -> None:
    objective = PolicyGradient(Sampler(3, 2.0, DDIM(eta=0.5)), window=SDEWindow(1), scale_rewards="batch")
    config = TrainConfig(Prompts("shapes-prompts"), objective, rollout_batch_size=2, output_dir=tmp_path, lora=LoRA(4))
    (tmp_path / "made.yaml").write_text(dumped(config))
    again, _ = parse(TrainConfig, "align.train", None, ["--config", str(tmp_path / "made.yaml")])
    assert again == config
