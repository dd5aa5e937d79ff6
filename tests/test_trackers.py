"""Trackers: which there are, what goes to each, and a W&B run that goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.tracking import AimTracker, ClearMLTracker, MLflowTracker, SwanLabTracker, WandBTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from align.common.errors import UserError
from align.train import main
from align.training import trackers
from rewards.common.files import reached
from tests.helpers import errors, lines, online, write


@pytest.fixture
def config(tiny_folders: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    sampler = {"num_inference_steps": 2, "guidance_scale": 2.0}
    return online(tiny_folders["flow"], tmp_path, "PolicyGradient", sampler=sampler, images_per_prompt=2) | {
        "max_train_steps": 2, "checkpointing_steps": 2, "report_to": ["tensorboard", "wandb"],
        "validation_data": {"class_path": "Prompts", "init_args": {"path": "shapes-prompts", "limit": 2}},
        "samples": {"prompts": ["a star", "two red stars"], "num_inference_steps": 1},
    }  # fmt: skip


def figures(folder: Path) -> set[str]:
    return {key for line in lines(folder) for key in line} - {"step", "time"}


def test_every_figure_and_the_pictures_go_to_each_tracker_and_a_resumed_run_goes_on(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="W&B is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    assert main(["--config", write(config)]) == 0
    known = figures(folder)
    assert {"loss", "validation/bright"} <= known and any("diversity" in name for name in known)
    (events,) = folder.glob("t2i-align/events.out.tfevents*")
    board = EventAccumulator(str(events))
    board.Reload()
    assert known <= set(board.Tags()["scalars"]) and any(tag.startswith("samples") for tag in board.Tags()["images"])
    number = json.loads((folder / trackers.KEPT).read_text())["wandb"]
    (records,) = folder.glob(f"wandb/offline-run-*/run-{number}.wandb")
    assert reached(lambda: sum(name.encode() in records.read_bytes() for name in known), len(known), patience=20)
    assert b"objective.init_args.images_per_prompt" in records.read_bytes()
    assert len(list(records.parent.glob("files/media/images/samples_0_*.png"))) == 2
    again = write(config, max_train_steps=3, report_to="wandb")
    assert main(["--config", again, "--resume_from_checkpoint", "latest"]) == 0
    assert {path.name for path in folder.glob("wandb/offline-run-*/*.wandb")} == {f"run-{number}.wandb"}


def test_a_run_that_begins_anew_is_another_wandb_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="W&B is not installed")

    def number(resumed: bool) -> str:
        arguments: dict[str, Any] = {}
        project = SimpleNamespace(logging_dir=None)
        accelerator: Any = SimpleNamespace(
            project_configuration=project,
            is_main_process=True,
            trackers=[],
            init_trackers=lambda _project, init_kwargs: arguments.update(init_kwargs["wandb"]),
        )
        trackers.start(accelerator, "wandb", tmp_path, {}, resumed)
        assert arguments["resume"] == "allow" and arguments["dir"] == str(tmp_path)
        return str(arguments["id"])

    first = number(False)
    assert number(True) == first != number(False)


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("mlflow", "mlflow is not installed; here are tensorboard"),
        ("[tensorboard,comet_ml]", "comet_ml is not installed"),
        ("tensorbored", "tensorbored is no tracker"),
        ("[tensorboard,none]", "none is no tracker to add to others"),
        ("[all,tensorboard]", "all is no tracker to add to others"),
    ],
)
def test_a_tracker_that_is_not_there_is_one_line(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], named: str, expected: str
) -> None:
    assert main(["--config", write(config), "--report_to", named]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and expected in errors(said)[0]
    assert not (tmp_path / "run").exists()


def test_several_are_named_in_a_list_or_by_commas() -> None:
    assert trackers.chosen("tensorboard") == trackers.chosen(["tensorboard", "tensorboard"]) == ["tensorboard"]
    assert trackers.chosen("none") == trackers.chosen([]) == []
    assert "tensorboard" in trackers.chosen("all")
    pytest.importorskip("wandb", reason="W&B is not installed")
    assert trackers.chosen("wandb, tensorboard") == ["wandb", "tensorboard"]


def test_wandb_without_a_key_is_one_line_before_anything_begins(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="W&B is not installed")

    def login() -> bool:
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "login", login)
    assert main(["--config", write(config)]) == 2
    (line,) = errors(capsys.readouterr().err)
    assert "No API key configured" in line and "WANDB_MODE=offline" in line
    assert not (tmp_path / "run").exists()


def heard(name: str) -> SimpleNamespace:
    calls: list[Any] = []
    return SimpleNamespace(name=name, calls=calls, log_images=lambda values, step: calls.append((values, step)))


def test_pictures_go_as_each_tracker_takes_them() -> None:
    """A list a name where accelerate's tracker makes pictures of a list's items, a picture a name where it hands its
    value on; those without pictures are passed by."""
    lists, single = [heard(kind.name) for kind in (WandBTracker, SwanLabTracker)], heard(ClearMLTracker.name)
    aim, none = heard(AimTracker.name), SimpleNamespace(name=MLflowTracker.name)
    accelerator: Any = SimpleNamespace(trackers=[*lists, single, aim, none])
    trackers.log_images(accelerator, "samples", torch.rand(2, 3, 4, 4), 7)
    for tracker in lists:
        ((values, step),) = tracker.calls
        assert step == 7 and [type(value) for value in values["samples"]] == [Image.Image] * 2
    for tracker in (single, aim):
        ((values, step),) = tracker.calls
        assert step == 7 and list(values) == ["samples/0", "samples/1"]
        assert all(isinstance(value, Image.Image) for value in values.values())


def test_a_tracker_that_does_not_open_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_arguments: Any, **_named: Any) -> None:
        raise ConnectionError("no\nserver")

    project = SimpleNamespace(logging_dir=str(tmp_path))
    accelerator: Any = SimpleNamespace(project_configuration=project, is_main_process=True, init_trackers=refuse)
    with pytest.raises(UserError, match="tensorboard cannot be opened: ConnectionError: no server"):
        trackers.start(accelerator, "tensorboard", tmp_path, {}, False)


def test_settings_are_plain_values_by_dotted_names() -> None:
    settings = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": {}, "f": True}
    assert trackers.flat(settings) == {"a.b": 1, "a.c": "[1, 2]", "d": None, "e": "{}", "f": True}
