"""The stop rule: what it calls hacking, that a run ends by it with a status of its own and its last good checkpoint,
and that a resumed run ends at the same rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from align.common.errors import UserError
from align.train import main
from align.training.stop import STATUS, StopRule, Watch
from tests.helpers import Bright, errors, online, untimed, write


def watched(rule: StopRule, *rollouts: tuple[float, float]) -> Watch:
    watch = Watch(rule)
    for up, down in rollouts:
        add(watch, up, down)
    return watch


def add(watch: Watch, up: float, down: float) -> None:
    """A rollout that gives an update, and measures both in one of the two ways there are."""
    watch.see({"loss": 1.0, "rollout/reward/up": up, "reward/down": down - 1, "rollout/reward/other": 0.0})
    watch.see({"loss": 1.0, "reward/down": down + 1})
    watch.close()


def test_a_rise_beside_a_fall_is_the_reason() -> None:
    rule = StopRule("up", {"down": 0.125}, window=2)
    start = [(0.0, 1.0), (0.25, 0.75)]  # means 0.125 and 0.875
    assert watched(rule, *start, (1.0, 0.1)).verdict is None  # not before 2 x window
    assert watched(rule, *start, (1.0, 1.0), (1.0, 0.5)).verdict == (
        "stopped at rollout 4: up has risen from 0.125 to 1 while down has fallen from 0.875 to 0.75 (means of the "
        "first and the last 2 rollouts)"
    )
    assert watched(rule, *start, (1.0, 1.0), (1.0, 0.51)).verdict is None  # not by the amount
    assert watched(rule, *start, (0.125, 0.1), (0.125, 0.1)).verdict is None  # all got worse: that is no hack
    both = StopRule("up", {"other": 1.0, "down": 0.125}, window=2)  # any of them will do
    assert "while down has fallen" in (watched(both, *start, (1.0, 0.0), (1.0, 0.0)).verdict or "")
    assert Watch(None).verdict is None


def test_a_checkpoint_is_good_until_half_is_lost() -> None:
    watch = watched(StopRule("up", {"down": 0.125}, window=1), (0.0, 1.0), (1.0, 0.95))
    assert watch.saved(1)["good"] == 1
    add(watch, 1.0, 0.9375)
    assert watch.saved(2)["good"] == 1 and watch.verdict is None
    early = watched(StopRule("up", {"down": 0.125}, window=2), (0.0, 1.0), (0.0, 1.0), (1.0, 0.5))
    assert early.saved(3)["good"] is None and early.verdict is None  # too early to stop, not to see that half is lost
    other = Watch(watch.rule)
    other.load_state(watch.saved(2))
    for one in (watch, other):
        add(one, 1.0, 0.875)
    assert watch.verdict == other.verdict is not None and other.good == 1
    with pytest.raises(UserError, match="does not know how size began; it has watched down, up"):
        Watch(StopRule("up", {"size": 1.0})).load_state(watch.saved(3))
    watch.see({"rollout/reward/up": 0.0})
    with pytest.raises(UserError, match="do not measure down"):
        watch.close()


class Dark(Bright):
    """What falls where pictures get brighter."""

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        return -images.mean((1, 2, 3))


def hacked(pipeline: Path, folder: Path, by: float) -> dict[str, Any]:
    """A run that learns to draw bright pictures, and may not lose that much darkness."""
    sampler = {"num_inference_steps": 2, "guidance_scale": 1.0}
    config = online(pipeline, folder, "AWM", sampler=sampler, images_per_prompt=4)
    config["rewards"].append({"name": "tests.test_stop.Dark", "label": "dark", "weight": 0.0})
    config["stop"] = {"rises": "bright", "falls": {"dark": by}, "window": 2}
    changes = {"max_train_steps": 40, "learning_rate": 0.1, "checkpointing_steps": 1, "checkpoints_total_limit": 1}
    return config | changes | {"train_batch_size": 24, "data": {"class_path": "Prompts", "init_args": PROMPTS}}


PROMPTS = {"path": "shapes-prompts", "limit": 3}


def test_a_run_stops_and_keeps_its_last_good_checkpoint(
    tiny_folders: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    config = hacked(tiny_folders["flow"], tmp_path, 0.003)
    assert main(["--config", write(config)]) == STATUS == 3
    told = capsys.readouterr().err
    run, seen = Path(config["output_dir"]), untimed(config["output_dir"])
    last = seen[-1]["rollout"]
    assert f"stopped at rollout {last}: bright has risen" in told and last < 40
    kept = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert len(kept) == 2 and kept[1].name == f"checkpoint-{last}" and f"last good checkpoint: {kept[0]}" in told
    assert not (run / "pytorch_lora_weights.safetensors").exists()
    # half of the way, and on: the same end
    other = config | {"output_dir": str(tmp_path / "other")}
    assert main(["--config", write(other, max_train_steps=3)]) == 0
    assert main(["--config", write(other), "--resume_from_checkpoint", "latest"]) == STATUS
    assert [line for line in untimed(other["output_dir"]) if "rollout" in line] == seen
    # who does not mind goes on
    assert (
        main(["--config", write(config, stop=None, max_train_steps=last + 1), "--resume_from_checkpoint", "latest"])
        == 0
    )
    assert torch.isfinite(torch.tensor(untimed(run)[-1]["loss"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stop": {"rises": "light", "falls": {"dark": 0.1}}},
            "there is no 'light' to look at; there are bright, dark",
        ),
        ({"stop": {"rises": "bright", "falls": {"bright": 0.1}}}, "cannot rise and fall at once"),
        ({"stop": {"rises": "bright", "falls": {}}}, "falls name amounts above 0, got 5 and {}"),
        ({"stop": {"rises": "bright", "falls": {"dark": -1.0}}}, "falls name amounts above 0"),
        ({"checkpointing_steps": 0}, "set checkpointing_steps above 0"),
    ],
)
def test_rules_that_cannot_speak_are_refused(
    tiny_folders: dict[str, Path], tmp_path: Path, capsys: Any, changes: dict[str, Any], message: str
) -> None:
    assert main(["--config", write(hacked(tiny_folders["flow"], tmp_path, 0.1), **changes)]) == 2
    (error,) = errors(capsys.readouterr().err)
    assert message in error
