"""The loop: a kill and a resume, two processes, bad numbers, bad input; every test runs the real command."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from align.common.errors import NonFinite
from align.data.preferences import PreferencePairs
from align.families import LORA_FILE
from align.objectives.rows import Rows
from align.shapes.world import render
from align.train import main
from align.training.finite import require_finite
from tests.helpers import kill_when, launch, launch_together, lines, same, untimed, weights, write

CAPTIONS = ["two red stars", "a blue circle", "a star and a circle", "three green squares", "a black square"]


def png(rng: np.random.Generator, caption: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(render(rng, caption)).resize((16, 16)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    rows = [
        {
            "caption": CAPTIONS[k % 5],
            "jpg_0": png(rng, CAPTIONS[k % 5]),
            "jpg_1": png(rng, CAPTIONS[(k + 1) % 5]),
            "label_0": float(k % 2),
            "label_1": float(1 - k % 2),
        }
        for k in range(12)
    ]
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def paired(path: str | Path, **arguments: Any) -> dict[str, Any]:
    return {"class_path": "PreferencePairs", "init_args": {"path": str(path), **arguments}}


@pytest.fixture
def config(tiny_folders: dict[str, Path], pairs: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": str(tiny_folders["epsilon"]),
        "data": paired(pairs, cache_dir=str(pairs.parent / "cache")),
        "objective": {"class_path": "DPO", "init_args": {"beta": 100.0}},
        "output_dir": str(tmp_path / "run"),
        "lora": {"rank": 2},
        "train_batch_size": 4,
        "max_train_steps": 8,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 3,
        "checkpointing_steps": 3,
        "report_to": "none",
    }


def test_a_run_folder_is_whole_and_its_config_reruns_it(config: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(config["output_dir"])
    config["validation_data"] = paired(**config["data"]["init_args"], limit=6)
    config["samples"] = {"prompts": ["a star", "two red stars"], "num_inference_steps": 2}
    assert main(["--config", write(config), "--report_to", "tensorboard"]) == 0
    assert {p.name for p in folder.iterdir()} >= {
        "config.yaml", "run.json", "metrics.jsonl", "README.md", LORA_FILE, "samples", "checkpoint-3", "checkpoint-6"
    }  # fmt: skip
    assert [line["step"] for line in lines(folder) if "loss" in line] == list(range(1, 9))
    assert lines(folder)[0]["validation/implicit_acc"] == 0.5
    assert Image.open(folder / "samples/step-000008.png").width > 200
    assert json.loads((folder / "run.json").read_text())["versions"]["torch"].startswith(torch.__version__[:4])
    card = (folder / "README.md").read_text()
    for expected in ("base_model:", "load_lora_weights", "beta: 100.0", "seed 0", "held-out", "implicit_acc"):
        assert expected.lower() in card.lower()
    assert list(folder.rglob("events.out.tfevents*"))
    assert main(["--config", str(folder / "config.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    assert same(weights(folder), weights(tmp_path / "again"))


def test_the_command_line_wins_over_the_file(config: dict[str, Any], pairs: Path) -> None:
    """Also an argument of a class that only the file names: ``--data.path``."""
    other = str(pairs.with_name("other.parquet"))
    pq.write_table(pq.read_table(pairs), other)
    options = ["--objective.beta", "7", "--max_train_steps", "1", "--data.path", other]
    assert main(["--config", write(config), *options]) == 0
    resolved = yaml.safe_load((Path(config["output_dir"]) / "config.yaml").read_text())
    assert resolved["objective"]["init_args"]["beta"] == 7.0
    assert resolved["data"]["class_path"].endswith("PreferencePairs")
    assert resolved["data"]["init_args"]["path"] == other
    assert resolved["data"]["init_args"]["cache_dir"] == config["data"]["init_args"]["cache_dir"]
    assert resolved["max_train_steps"] == 1


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("before the first checkpoint", marks=pytest.mark.slow),
        pytest.param("between checkpoints", marks=pytest.mark.slow),
        "inside the saving of a checkpoint",
    ],
)
def test_killed_and_resumed_is_the_uninterrupted_run(config: dict[str, Any], tmp_path: Path, moment: str) -> None:
    """Bitwise, on the CPU in float32: weights and metrics."""
    config |= {"ema_decay": 0.9, "max_train_steps": 8, "lr_scheduler": "cosine"}
    assert main(["--config", write(config, output_dir=str(tmp_path / "whole"))]) == 0
    folder = tmp_path / "run"
    draft = ".checkpoint-6.*.tmp"  # exists only while the checkpoint is being written
    process = launch(["--config", write(config)], **({"HOLD_IN": draft} if "inside" in moment else {}))
    seen = {"before": "metrics.jsonl", "between": "checkpoint-3", "inside": draft}
    kill_when(process, folder, seen[moment.partition(" ")[0]])
    assert not (folder / LORA_FILE).exists()
    if "inside" in moment:
        assert list(folder.glob(draft)) and not (folder / "checkpoint-6").exists()
    assert main(["--config", write(config), "--resume_from_checkpoint", "latest"]) == 0
    assert not list(folder.glob("*.tmp"))
    assert same(weights(tmp_path / "whole"), weights(folder))
    assert untimed(tmp_path / "whole") == untimed(folder)


def test_a_half_written_checkpoint_is_never_picked(config: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(config["output_dir"])
    assert main(["--config", write(config, max_train_steps=4)]) == 0
    half = folder / ".checkpoint-9.host.1.tmp"
    half.mkdir()
    (half / "trained.safetensors").write_bytes(b"half")
    (folder / "metrics.jsonl").open("a").write('{"step": 5, "lo')
    assert main(["--config", write(config, output_dir=str(tmp_path / "whole"))]) == 0
    assert main(["--config", write(config), "--resume_from_checkpoint", "latest"]) == 0
    assert not half.exists()
    # the first run's schedule was the same: constant after warm-up
    assert same(weights(folder), weights(tmp_path / "whole"))


def test_checkpoints_total_limit(config: dict[str, Any]) -> None:
    limits = {"checkpointing_steps": 2, "checkpoints_total_limit": 2}
    assert main(["--config", write(config, **limits)]) == 0
    found = sorted(p.name for p in Path(config["output_dir"]).glob("checkpoint-*"))
    assert found == ["checkpoint-6", "checkpoint-8"]
    content = load_file(Path(config["output_dir"]) / "checkpoint-8" / "trained.safetensors")
    assert content
    assert all("lora_" in name for name in content)


@pytest.mark.parametrize("mode", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_accumulation_is_a_bigger_batch(config: dict[str, Any], tmp_path: Path, mode: str) -> None:
    found = []
    for size, accumulated in ((4, 1), (1, 4)):
        run = tmp_path / f"{size}"
        changes = {"train_batch_size": size, "gradient_accumulation_steps": accumulated, "output_dir": str(run)}
        if mode == "full":
            changes["lora"] = None
        assert main(["--config", write(config, max_train_steps=3, **changes)]) == 0
        file = run / LORA_FILE if mode == "lora" else run / "unet/diffusion_pytorch_model.safetensors"
        found.append(load_file(file))
        assert [line["loss"] for line in lines(run)][:1] == pytest.approx([0.6931472], abs=1e-6)
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=2e-5, rtol=1e-3)


def accelerate_launch(arguments: list[str], options: str) -> str:
    """``accelerate launch OPTIONS -m align.train ARGUMENTS``; what it printed."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--main_process_port", "0"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launcher, "-m", "align.train", *arguments],
        env=env,
        text=True,
        capture_output=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_accelerate_launches_it(config: dict[str, Any]) -> None:
    assert "4 x 1 accumulated x 1 processes = 4" in accelerate_launch(["--config", write(config), "--dry_run"], "--cpu")


@pytest.mark.parametrize(
    ("kind", "launcher"),
    [
        ("epsilon", "fork"),
        pytest.param("flow", "fork", marks=pytest.mark.slow),
        # half a minute of two cores, nearly all of it three processes' imports
        pytest.param("epsilon", "accelerate", marks=pytest.mark.slow),
    ],
)
def test_two_processes_are_one_with_twice_the_batch(
    config: dict[str, Any], tiny_folders: dict[str, Path], tmp_path: Path, kind: str, launcher: str
) -> None:
    config |= {"max_train_steps": 2, "pretrained_model_name_or_path": str(tiny_folders[kind]), "max_grad_norm": 1e9}
    held_out = config["data"]["init_args"] | {"limit": 6}
    config["validation_data"] = paired(**held_out)
    assert main(["--config", write(config, output_dir=str(tmp_path / "one"))]) == 0
    encoded = paired(**held_out | {"cache_dir": str(tmp_path / "cache")})  # by both processes, once
    file = write(config, train_batch_size=2, validation_data=encoded)
    if launcher == "accelerate":
        # its own `launch --cpu --num_processes 2` starts one process unless MPI is there; its multi-process launcher
        # (torchrun) with the CPU asked for by name is gloo
        options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
        assert "2 x 1 accumulated x 2 processes = 4" in accelerate_launch(["--config", file], options)
    else:
        assert launch_together(["--config", file]) == [0, 0]
    one, two = weights(tmp_path / "one"), weights(config["output_dir"])
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-5, rtol=1e-3)
    for name in ("loss", "validation/loss"):
        alone, together = (
            [line[name] for line in lines(folder) if name in line]
            for folder in (tmp_path / "one", config["output_dir"])
        )
        assert len(alone) == 2 and alone == pytest.approx(together, abs=1e-5)


def test_a_nan_stops_the_run_and_names_step_rows_and_checkpoint(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config |= {"checkpointing_steps": 1, "learning_rate": 1e30, "max_grad_norm": 1e30, "lr_warmup_steps": 0}
    assert main(["--config", write(config)]) == 2
    error = capsys.readouterr().err
    message = next(line for line in error.splitlines() if line.startswith("error:"))
    assert "at step 2, rows" in message
    assert "last good checkpoint:" in message
    assert "checkpoint-1" in message


@pytest.mark.parametrize(("of_items", "told"), [(False, "rows 70, 71;"), (True, "rows 70, 73;")])
def test_the_rows_of_a_nan_are_items_whatever_the_objective_counts(of_items: bool, told: str) -> None:
    class Counted(Rows):
        pass

    Counted.of_items = of_items
    values, losses = {"loss": math.nan, "grad_norm": 1.0}, [torch.tensor(math.nan), torch.tensor(0.1)]
    chunks = [Counted(image=torch.tensor([0, 3])), Counted(image=torch.tensor([2]))]
    with pytest.raises(NonFinite, match=told):
        require_finite(values, losses, chunks, [70, 71, 72, 73], 2, 1, None, None)


def test_scale_lr(config: dict[str, Any]) -> None:
    changes = {"scale_lr": True, "gradient_accumulation_steps": 3, "max_train_steps": 1, "lr_warmup_steps": 0}
    assert main(["--config", write(config, **changes)]) == 0
    assert lines(config["output_dir"])[0]["lr"] == pytest.approx(1e-3 * 4 * 3)


def test_dry_run_prints_the_plan_and_writes_nothing(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", write(config, gradient_accumulation_steps=3), "--dry_run"]) == 0
    out = capsys.readouterr().out
    for expected in ("4 x 3 accumulated x 1 processes = 12", "24 trained + 24 frozen", "trainable", "MiB", "D=256"):
        assert expected in out
    assert not Path(config["output_dir"]).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], "learning_rat"),
        (["--objective.betta", "1"], "betta"),
        (["--objective", "Nothing"], "Nothing"),
        (["--train_batch_size", "many"], "train_batch_size"),
        (["--objective.beta", "-5"], "beta must be positive, got -5.0"),
        (["--lora.rank", "0"], "rank must be at least 1"),
        (["--samples.num_inference_steps", "0"], "samples: num_inference_steps must be at least 1"),
    ],
)
def test_wrong_keys_and_types_are_one_line(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    file = write(config)
    assert main(["--config", file, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.count("\n") == 0, error


@pytest.mark.parametrize("content", [b"objective:\n\tclass_path: DPO\n", b"\xff\xfe", b"[1, 2]", b""])
def test_a_config_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    (tmp_path / "broken.yaml").write_bytes(content)
    assert main(["--config", str(tmp_path / "broken.yaml")]) == 2
    error = capsys.readouterr().err.strip()
    assert "config" in error
    assert error.count("\n") == 0, error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained_model_name_or_path": "./nowhere"}, "no model_index.json"),
        ({"data": paired("./nowhere.parquet")}, "nowhere.parquet"),
        (
            {"data": {"class_path": "Prompts", "init_args": {"path": "shapes-prompts"}}},
            "DPO trains on PairBatch, but data",
        ),
        ({"train_batch_size": 0}, "train_batch_size must be at least 1"),
        ({"resume_from_checkpoint": "checkpoint-77"}, "not a checkpoint folder; use 'latest' or one of [] in"),
        ({"lr_scheduler": "slow"}, "unknown lr_scheduler 'slow'; known are linear, cosine"),
        ({"seed": -1}, "seed must lie between"),
        ({"ema_decay": 1.0}, "ema_decay must be at least 0 and below 1"),
        ({"checkpointing_steps": -1}, "checkpointing_steps must be at least 0"),
        ({"max_grad_norm": 0}, "max_grad_norm must be positive"),
        ({"lora": {"targets": ["to_nowhere"]}}, "The family's own are to_k"),
    ],
)
def test_mistakes_are_one_clear_line(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert main(["--config", write(config, **changes)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert message in error[0]
    assert not (Path(config["output_dir"]) / LORA_FILE).exists()


def test_corrupt_pictures_stop_the_run_before_training(
    config: dict[str, Any], pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pq.read_table(pairs).to_pylist()
    rows[3]["jpg_0"] = b"not a picture"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "bad.parquet")
    assert main(["--config", write(config, data=paired(tmp_path / "bad.parquet", cache_dir=str(tmp_path)))]) == 2
    assert "1 of 12" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_found_out_before_the_data_is_encoded(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreferencePairs, "prepare", lambda *_: pytest.fail("encoded for nothing"))
    (tmp_path / "file").touch()
    assert main(["--config", write(config), "--output_dir", str(tmp_path / "file" / "run")]) == 2
    assert "cannot write into" in capsys.readouterr().err
    (Path(config["output_dir"]) / "checkpoint-3").mkdir(parents=True)
    assert main(["--config", write(config)]) == 2
    assert "holds checkpoint-3 of an earlier run" in capsys.readouterr().err


def test_an_earlier_run_is_not_overwritten(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", write(config, max_train_steps=3)]) == 0
    assert main(["--config", write(config, max_train_steps=3)]) == 2
    assert "holds checkpoint-3 of an earlier run" in capsys.readouterr().err


OTHER = """
from dataclasses import dataclass
from align.objectives.dpo import DPO

@dataclass
class Other(DPO):
    beta: float = 0.5
    extra: int = 1
"""


def test_another_class_on_the_line_does_not_inherit_arguments(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third party's objective is one file and its import path; the file's beta of 100 was DPO's."""
    (tmp_path / "theirs.py").write_text(OTHER)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["--config", write(config), "--objective", "theirs.Other", "--max_train_steps", "1"]) == 0
    resolved = yaml.safe_load((Path(config["output_dir"]) / "config.yaml").read_text())
    assert resolved["objective"]["class_path"] == "theirs.Other"
    assert resolved["objective"]["init_args"]["beta"] == 0.5


@pytest.mark.parametrize("precision", ["bf16"])
@pytest.mark.parametrize("kind", ["epsilon", pytest.param("flow", marks=pytest.mark.slow)])
def test_mixed_precision_trains_float32_adapters(
    config: dict[str, Any], tiny_folders: dict[str, Path], precision: str, kind: str
) -> None:
    config["pretrained_model_name_or_path"] = str(tiny_folders[kind])
    assert (
        main(["--config", write(config, mixed_precision=precision, gradient_checkpointing=True, max_train_steps=3)])
        == 0
    )
    assert all(v.dtype == torch.float32 for v in weights(config["output_dir"]).values())
    assert lines(config["output_dir"])[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
