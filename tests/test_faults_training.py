"""Accidents and mistakes of a training run: each ends in one line, with nothing lost, run or half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from align.policy.lora_weights import LoRAWeights
from align.train import main
from align.training.checkpoint import differences
from align.training.preemption import STATUS
from tests.helpers import contents, errors, launch, online, same, untimed, weights, write
from tests.test_train import config, pairs  # noqa: F401  fixtures


class Harm:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


TRAINED: dict[str, Path] = {}  # by its data: the run of the fixture below, trained once and copied


@pytest.fixture
def run(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:  # noqa: F811
    """A run that has got to its checkpoint at step 6 and is to go on to 8."""
    key = str(config["data"])
    if key not in TRAINED:
        TRAINED[key] = tmp_path_factory.mktemp("trained") / "run"
        assert main(["--config", write(config, max_train_steps=6, output_dir=str(TRAINED[key]))]) == 0
    shutil.copytree(TRAINED[key], config["output_dir"])
    return config | {"resume_from_checkpoint": "latest"}


# checkpoints
def test_a_checkpoint_holds_no_pickle_and_is_a_lora(run: dict[str, Any], tiny_folders: dict[str, Path]) -> None:
    folder = Path(run["output_dir"]) / "checkpoint-6"
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    stock = DiffusionPipeline.from_pretrained(tiny_folders["epsilon"])
    stock.load_lora_weights(folder)
    assert stock.get_active_adapters()


def test_a_checkpoint_of_every_weight_is_a_denoiser(config: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    """The averaged one, as the finished run's."""
    more = {"lora": None, "ema_decay": 0.5, "max_train_steps": 2, "checkpointing_steps": 2}
    assert main(["--config", write(config, **more, output_dir=str(tmp_path / "full"))]) == 0
    kept, done = (
        UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()
        for folder in (tmp_path / "full/checkpoint-2", tmp_path / "full")
    )
    raw = load_file(tmp_path / "full/checkpoint-2/trained.safetensors")
    assert all(kept[name].equal(done[name]) for name in done)
    assert any(not kept[name].equal(raw[name]) for name in raw)


@pytest.mark.parametrize(
    "file",
    [
        *("optimizer.bin", "random_states_0.pkl"),
        *(pytest.param(file, marks=pytest.mark.slow) for file in ("custom_checkpoint_0.pkl", "scaler.pt")),
    ],
)
def test_a_hostile_checkpoint_runs_nothing(
    run: dict[str, Any], file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that pretends to be of version 0.1, whose optimizer was a torch file."""
    folder = Path(run["output_dir"]) / "checkpoint-6"
    torch.save({"state": Harm(tmp_path / "harm")}, folder / file)
    if file in ("optimizer.bin", "custom_checkpoint_0.pkl"):
        if file != "optimizer.bin":
            state = {"state": {}, "param_groups": []}
            torch.save(state, folder / "optimizer.bin")
        (folder / "optimizer.safetensors").unlink()
        assert main(["--config", write(run, resume_from_checkpoint="checkpoint-6")]) == 2
        assert "checkpoint-6 does not fit this run" in capsys.readouterr().err
    else:
        assert main(["--config", write(run)]) == 0
    assert not (tmp_path / "harm").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil(path: Path, value: float) -> None:
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = value
    save_file(tensors, path)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "no state": lambda folder: (folder / "state.json").unlink(),
    "state cut": lambda folder: cut(folder / "state.json"),
    "state a list": lambda folder: (folder / "state.json").write_text("[]"),
    "state deep": lambda folder: (folder / "state.json").write_text("[" * 100_000),
    "step a word": lambda folder: (folder / "state.json").write_text('{"step": "six", "rollouts": 6}'),
    "step negative": lambda folder: (folder / "state.json").write_text('{"step": -1, "rollouts": 6}'),
    "step a fraction": lambda folder: (folder / "state.json").write_text('{"step": 1.5, "rollouts": 6}'),
    "no weights": lambda folder: (folder / "trained.safetensors").unlink(),
    "weights empty": lambda folder: (folder / "trained.safetensors").write_bytes(b""),
    "weights cut": lambda folder: cut(folder / "trained.safetensors"),
    "weights garbage": lambda folder: (folder / "trained.safetensors").write_bytes(os.urandom(512)),
    "no moments": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "settings a word": lambda folder: rewrite(folder / "state.json", settings="mine"),
    "settings of the stop rule none": lambda folder: rewrite(folder / "state.json", stop=None),
    "evaluations a word": lambda folder: rewrite(folder / "state.json", evaluations={"trained": "x", "frozen": 1}),
    "weights not a number": lambda folder: spoil(folder / "trained.safetensors", float("nan")),
    "moments not a number": lambda folder: spoil(folder / "optimizer.safetensors", float("nan")),
    "moments infinite": lambda folder: spoil(folder / "optimizer.safetensors", float("inf")),
    "moments cut": lambda folder: cut(folder / "optimizer.safetensors"),
}


QUICK = ("no state", "weights cut", "weights not a number")


@pytest.mark.parametrize("damage", [d if d in QUICK else pytest.param(d, marks=pytest.mark.slow) for d in DAMAGE])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(
    run: dict[str, Any], damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGE[damage](Path(run["output_dir"]) / "checkpoint-6")
    before = contents(run["output_dir"])
    assert main(["--config", write(run, resume_from_checkpoint="checkpoint-6")]) == 2
    assert len(errors(capsys.readouterr().err)) == 1
    assert contents(run["output_dir"]) == before
    assert main(["--config", write(run, max_train_steps=3)]) == 0
    heard = capsys.readouterr()
    assert "checkpoint-6 is no whole checkpoint" in heard.err and "checkpoint-3 at step 3" in heard.out


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"scheduler": {"last_epoch": "x", "lr_lambdas": [None]}},
            "does not fit this run: scheduler.last_epoch is 'x'",
        ),
        ({"scheduler": {"base_lrs": [1, 2], "lr_lambdas": [None]}}, "base_lrs is [1, 2], and 1 values in this run"),
        ({"optimizer": {"groups": [{"lr": float("nan")}], "numbers": {}}}, "optimizer.0.lr is nan, and"),
        ({"stop": {"history": {"bright": 3}}}, "stop: the checkpoint's history is {'bright': 3}; expected numbers"),
    ],
)
def test_numbers_of_another_kind_do_not_fit(
    run: dict[str, Any], changes: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first step, at which torch finds out."""
    rewrite(Path(run["output_dir"]) / "checkpoint-6/state.json", **changes)
    before = contents(run["output_dir"])
    assert main(["--config", write(run)]) == 2
    (line,) = errors(capsys.readouterr().err)
    assert told in line and contents(run["output_dir"]) == before


def test_what_is_no_line_of_metrics_is_dropped_by_a_resumed_run(run: dict[str, Any]) -> None:
    path = Path(run["output_dir"]) / "metrics.jsonl"
    path.write_bytes(b'\xff\n3\n{"loss": 1}\n' + path.read_bytes() + b'{"step": 6, "lo')
    assert main(["--config", write(run)]) == 0
    assert [line["step"] for line in untimed(run["output_dir"])] == list(range(1, 9))


@pytest.mark.parametrize("file", ["trained", "optimizer"])
def test_tensors_of_another_shape_do_not_fit(
    run: dict[str, Any], file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(run["output_dir"]) / f"checkpoint-6/{file}.safetensors"
    tensors = load_file(path)
    save_file({name: tensor[:1].contiguous() if tensor.ndim else tensor for name, tensor in tensors.items()}, path)
    before = contents(run["output_dir"])
    assert main(["--config", write(run)]) == 2
    assert "checkpoint-6 does not fit this run" in capsys.readouterr().err
    assert contents(run["output_dir"]) == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        pytest.param({"seed": 1}, "seed: 1, was 0", marks=pytest.mark.slow),
        (
            {"learning_rate": 1e-4, "lora": {"rank": 2, "alpha": 4.0}},
            "learning_rate: 0.0001, was 0.001; lora.alpha: 4.0",
        ),
        ({"objective": {"class_path": "DPO", "init_args": {"beta": 5.0}}}, "objective.init_args.beta: 5.0, was 100.0"),
        ({"train_batch_size": 2}, "rows of an update: 2, was 4"),
        ({"mixed_precision": "bf16"}, "mixed_precision: bf16, was no"),
        pytest.param(
            *({"lr_scheduler": "cosine", "adam_beta1": 0.5}, "adam_beta1: 0.5, was 0.9; lr_scheduler: cosine, was"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_another_run_is_not_resumed(
    run: dict[str, Any], changes: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All differences at once, before anything is written."""
    before = (Path(run["output_dir"]) / "config.yaml").read_text()
    assert main(["--config", write(run, **changes)]) == 2
    assert told in capsys.readouterr().err
    assert (Path(run["output_dir"]) / "config.yaml").read_text() == before


def test_data_that_was_replaced_is_not_gone_on_with(run: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """One caption is another's; the same file with another time is the same data."""
    source = Path(run["data"]["init_args"]["path"])
    before, rows = source.read_bytes(), pq.read_table(source).to_pylist()
    try:
        rows[7]["caption"] = rows[8]["caption"]
        pq.write_table(pa.Table.from_pylist(rows), source)
        assert main(["--config", write(run)]) == 2
        assert "contents of data: 12 examples" in capsys.readouterr().err
    finally:
        source.write_bytes(before)
    assert main(["--config", write(run)]) == 0


def test_a_model_that_was_replaced_is_not_gone_on_with(
    run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A LoRA is of the weights below it; a folder of the same name may hold others today."""
    folder = tmp_path / "model"
    shutil.copytree(run["pretrained_model_name_or_path"], folder)
    run |= {"pretrained_model_name_or_path": str(folder), "overwrite_output_dir": True}
    assert main(["--config", write(run, resume_from_checkpoint=None, max_train_steps=1, checkpointing_steps=1)]) == 0
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path)
    settings = folder / "scheduler/scheduler_config.json"
    settings.write_text(settings.read_text().replace("0.02", "0.03"))
    capsys.readouterr()
    assert main(["--config", write(run)]) == 2
    told = capsys.readouterr().err
    assert "contents of the model.unet" in told and "model.scheduler" in told and "vae" not in told


def test_a_setting_that_a_run_did_not_know_had_its_default() -> None:
    before, now = {"seed": 0}, {"seed": 0, "quantize": None, "vae_slicing": True, "compile": False}
    assert differences(before, now) == []
    assert differences(before, now | {"quantize": "nf4"}) == ["quantize: nf4, was None"]


def test_what_does_not_matter_may_change(run: dict[str, Any]) -> None:
    changes = {
        "offload_idle": True,
        "vae_slicing": True,
        "logging_steps": 2,
        "gradient_checkpointing": True,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    assert main(["--config", write(run, **changes)]) == 0


# what is there
def test_nothing_of_another_run_is_replaced_unasked(
    config: dict[str, Any],  # noqa: F811
    tiny_folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config |= {"max_train_steps": 1, "checkpointing_steps": 0}
    assert main(["--config", write(config)]) == 0
    first = weights(config["output_dir"])
    assert main(["--config", write(config, seed=1)]) == 2
    assert "overwrite_output_dir: true" in capsys.readouterr().err
    assert same(weights(config["output_dir"]), first)
    assert main(["--config", write(config, seed=1, overwrite_output_dir=True)]) == 0
    assert not same(weights(config["output_dir"]), first)
    model = tmp_path / "model"
    DiffusionPipeline.from_pretrained(tiny_folders["epsilon"]).save_pretrained(model)
    before = (model / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    own = {"pretrained_model_name_or_path": str(model), "output_dir": str(model), "lora": None}
    for overwrite in (False, True):
        assert main(["--config", write(config, **own, overwrite_output_dir=overwrite)]) == 2
        assert "is a pipeline's own folder" in capsys.readouterr().err
    assert (model / "unet/diffusion_pytorch_model.safetensors").read_bytes() == before


def test_what_no_run_has_written_is_not_replaced_unasked(
    config: dict[str, Any],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The folder of somebody's data set, with its card."""
    card = Path(config["output_dir"]) / "README.md"
    card.parent.mkdir()
    card.write_text("my data")
    config |= {"max_train_steps": 1, "checkpointing_steps": 0}
    assert main(["--config", write(config)]) == 2
    assert "README.md, and no run has written it" in capsys.readouterr().err
    assert [path.name for path in card.parent.iterdir()] == ["README.md"] and card.read_text() == "my data"


# signals
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_run_that_is_told_to_end_saves_and_goes_on_as_if_nothing_was(
    config: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    number: int,
) -> None:
    config |= {"max_train_steps": 24, "checkpointing_steps": 0, "ema_decay": 0.9, "lr_scheduler": "cosine"}
    assert main(["--config", write(config, output_dir=str(tmp_path / "whole"))]) == 0
    process = launch(["--config", write(config)])
    while not (Path(config["output_dir"]) / "metrics.jsonl").exists():
        time.sleep(0.01)
    os.kill(process.pid or 0, number)
    process.join(60)
    assert process.exitcode == STATUS
    left = sorted(path.name for path in Path(config["output_dir"]).glob("*checkpoint*"))
    assert len(left) == 1 and left[0] != "checkpoint-24" and not list(Path(config["output_dir"]).glob(".*.tmp"))
    assert main(["--config", write(config, resume_from_checkpoint="latest")]) == 0
    assert same(weights(config["output_dir"]), weights(tmp_path / "whole"))
    assert untimed(config["output_dir"]) == untimed(tmp_path / "whole")


def test_a_rollout_that_is_given_up_is_drawn_again(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """DDPO's statistics of a prompt must not count its pictures twice."""
    arguments = {"sampler": {"num_inference_steps": 3, "guidance_scale": 1.0}, "images_per_prompt": 2}
    config = online(tiny_folders["epsilon"], tmp_path, "PolicyGradient", **arguments, advantage="history")  # noqa: F811
    config |= {"max_train_steps": 3, "checkpointing_steps": 0, "train_batch_size": 18}
    assert main(["--config", write(config, output_dir=str(tmp_path / "whole"))]) == 0
    process = launch(["--config", write(config)])
    while not (Path(config["output_dir"]) / "metrics.jsonl").exists():
        time.sleep(0.005)
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(60)
    assert process.exitcode in (STATUS, 0)
    assert main(["--config", write(config, resume_from_checkpoint="latest", overwrite_output_dir=True)]) == 0
    assert same(weights(config["output_dir"]), weights(tmp_path / "whole"))


# runs that never end, and what accelerate was told
@pytest.mark.parametrize("objective", ["D3PO", pytest.param("PolicyGradient", marks=pytest.mark.slow)])
def test_a_reward_that_tells_nothing_apart_stops_the_run(
    tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    arguments = {"sampler": {"num_inference_steps": 1, "guidance_scale": 1.0}, "images_per_prompt": 2}
    config = online(tiny_folders["epsilon"], tmp_path, objective, **arguments)  # noqa: F811
    config |= {"rewards": [{"name": "tests.helpers.Flat"}], "train_batch_size": 6}
    assert main(["--config", write(config)]) == 2
    assert "20 rollouts in a row gave nothing to train on" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["nan", "flat"])
def test_a_reward_that_ends_a_run_leaves_what_came_before(
    tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    arguments = {"sampler": {"num_inference_steps": 1, "guidance_scale": 1.0}, "images_per_prompt": 2}
    settings = online(tiny_folders["epsilon"], tmp_path, "PolicyGradient", **arguments)
    settings |= {"train_batch_size": 6, "max_train_steps": 3, "checkpointing_steps": 0}
    tired = [{"name": "tests.odd_rewards.Tired", "args": {"what": what}}]
    assert main(["--config", write(settings, rewards=tired)]) == 2
    told = capsys.readouterr()
    assert "nan" in told.err or "20 rollouts in a row" in told.err
    (saved,) = Path(settings["output_dir"]).glob("checkpoint-*")
    assert f"saved {saved}\n" in told.out
    resumed = write(settings, rewards=tired, resume_from_checkpoint="latest", max_train_steps=int(saved.name[11:]))
    assert main(["--config", resumed]) == 0


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "compile: true in the settings"),
        ("ACCELERATE_USE_FSDP", "true", "configured for FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "configured for DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "configured for Megatron-LM"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps 4, this run for 1; set"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed precision 'fp8'"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "fp16 has no gradients to scale on a CPU"),
    ],
)
def test_what_accelerate_is_configured_for_and_we_do_not_do_is_said(
    config: dict[str, Any],  # noqa: F811
    name: str,
    value: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    assert main(["--config", write(config)]) == 2
    assert told in capsys.readouterr().err and not Path(config["output_dir"]).exists()


def test_accelerates_precision_runs_unless_ours_is_given(
    config: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also one run after another in one process, as in a notebook."""
    config |= {"max_train_steps": 1, "checkpointing_steps": 0}
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    losses = {}
    for given, said in (("auto", "bf16, as accelerate is configured"), ("no", "no, not accelerate's bf16")):
        folder = tmp_path / given
        assert main(["--config", write(config, mixed_precision=given, output_dir=str(folder))]) == 0
        assert f"mixed precision          {said}" in capsys.readouterr().out
        losses[given] = untimed(folder)[0]["grad_norm"]
    assert losses["auto"] != losses["no"]
    assert "mixed_precision: 'bf16'" in (tmp_path / "auto/config.yaml").read_text()


@pytest.mark.parametrize("targets", [["to_q", "typo"], ["typo"], [], ["down_blocks"]])
def test_every_lora_target_has_to_be_a_layer(
    config: dict[str, Any],  # noqa: F811
    targets: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--config", write(config, lora={"rank": 2, "targets": targets})]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "lora" in said and not (Path(config["output_dir"]) / "config.yaml").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--learning_rate", ".nan"], "learning_rate must be a finite number"),
        (["--objective.beta", ".inf"], "beta must be a finite number"),
        (["--stop", "{rises: a, falls: {b: .nan}}"], "must be a finite number, got nan"),
        (["--learning_rate", "-1"], "learning_rate must be positive"),
        (["--adam_beta2", "1.0"], "adam_beta2 must be at least 0 and below 1"),
        (["--adam_epsilon", "0"], "adam_epsilon must be positive"),
        (["--seed", str(2**70)], "of at most 63 bits"),
        (["--seed", "-1"], "seed must lie between"),
        (["--lora.rank", "1000000"], "more than the width of any layer"),
        (["--data.resolution", "17"], "resolution: 17 is no multiple of 2; the nearest is 16"),
        (["--data.resolution", "0"], "resolution"),
        (["--objective", "D3PO", "--objective.sampler.num_inference_steps", "5000"], "between 1 and 1000, got 5000"),
    ],
)
def test_impossible_numbers_are_refused_before_anything_is_written(
    config: dict[str, Any],  # noqa: F811
    options: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, error = main(["--config", write(config), *options]), capsys.readouterr().err
    assert status == 2 and told in error, error
    assert not Path(config["output_dir"]).exists()


def test_a_key_that_comes_twice_is_an_error_and_home_is_home(
    config: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = Path(write(config))
    path.write_text(path.read_text() + "\nlearning_rate: 2.0\n")
    assert main(["--config", str(path)]) == 2
    assert "'learning_rate' comes twice" in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["--config", write(config, max_train_steps=1), "--output_dir=~/there"]) == 0
    assert (tmp_path / "there/config.yaml").is_file()
    config["output_dir"] = "~/again"
    other = tmp_path / "again.yaml"
    other.write_text(path.read_text().replace("\nlearning_rate: 2.0\n", "").replace(str(tmp_path / "run"), "~/again"))
    assert main(["--config", str(other), "--max_train_steps", "1"]) == 0 and (tmp_path / "again").is_dir()


def test_one_trains_into_a_folder_at_a_time(
    config: dict[str, Any],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    process = launch(["--config", write(config, max_train_steps=2000)])
    while not (Path(config["output_dir"]) / "metrics.jsonl").exists():
        time.sleep(0.02)
    assert main(["--config", write(config, overwrite_output_dir=True)]) == 2
    assert f"process {process.pid} on" in capsys.readouterr().err
    process.kill()
    process.join(30)
    assert main(["--config", write(config, resume_from_checkpoint="latest", max_train_steps=2000, dry_run=True)]) == 0


@pytest.mark.slow
def test_a_signal_in_the_midst_of_exchanging_weights_leaves_a_whole_checkpoint(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds adapters that are switched off and frozen, for the reference to be asked."""
    arguments = {"sampler": {"num_inference_steps": 2, "guidance_scale": 1.0}, "images_per_prompt": 2}
    settings = online(tiny_folders["epsilon"], tmp_path, "D3PO", **arguments)
    settings |= {"train_batch_size": 12, "max_train_steps": 2, "checkpointing_steps": 0}
    assert main(["--config", write(settings, output_dir=str(tmp_path / "whole"))]) == 0
    switch, calls = LoRAWeights._switch, list[bool]()

    def signalled(self: LoRAWeights, on: bool) -> None:
        if not calls:
            self.layers[0]._disable_adapters = True
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(on)
        switch(self, on)

    monkeypatch.setattr(LoRAWeights, "_switch", signalled)
    assert main(["--config", write(settings)]) == STATUS and calls[0] is False
    assert main(["--config", write(settings, resume_from_checkpoint="latest")]) == 0
    assert same(weights(settings["output_dir"]), weights(tmp_path / "whole"))


def test_a_schedule_that_needs_rules_is_refused(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert main(["--config", write(config | {"lr_scheduler": "piecewise_constant"}), "--dry_run"]) == 2
    assert "unknown lr_scheduler 'piecewise_constant'; known are linear, " in capsys.readouterr().err
