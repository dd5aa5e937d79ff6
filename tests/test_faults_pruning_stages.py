"""``pruning.compress`` in a folder that holds something already: no result of other settings passes for one of these,
stages without their input leave nothing, and a disk that cannot be written leaves nothing that is not whole."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from align import families
from align.common.errors import UserError
from align.families import LORA_FILE
from align.policy.policy import LoRA, Policy
from align.training.preemption import STATUS
from align.training.trainer import Trainer
from pruning import compress
from pruning.plan import Plan
from pruning.report import Reporting, peak
from pruning.results import Results, recipes
from pruning.settings import Compress
from rewards import RewardConfig
from rewards.common.files import locked
from tests.helpers import contents, errors

STAGES = "[analyze,plan,remove,heal,quantize,tune]"


@pytest.fixture
def config(tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("two red stars\na star\n")
    shutil.copytree(tiny_folders["flow"], "model")
    heal = {
        "objective": {
            "class_path": "pruning.distill.Heal",
            "init_args": {
                "teacher": {"path": "filled in"}, "plan_path": "filled in", "sensitivity": "none",
                "sampler": {"num_inference_steps": 1, "guidance_scale": 1},
            },
        },
        "data": {"class_path": "Prompts", "init_args": {"path": "prompts.txt"}},
        "lora": None, "rollout_batch_size": 2, "train_batch_size": 2, "max_train_steps": 1, "learning_rate": 1e-3,
        "report_to": "none",
    }  # fmt: skip
    for name in ("heal", "tune"):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(heal))
    return {
        "pretrained_model_name_or_path": "model", "output_dir": "out", "prompts": "prompts.txt",
        "num_inference_steps": 1, "guidance_scale": 1.0, "budget": {"parameters": 0.2}, "heal": "heal.yaml",
        "tune": "tune.yaml", "dtype": "float32",
    }  # fmt: skip


def run(config: dict[str, Any], *words: str, stages: str = STAGES) -> int:
    path, text = Path("compress.yaml"), yaml.safe_dump(config)
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)
    return compress.main(["--config", str(path), "--stages", stages, *words])


def times(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def remade(before: dict[str, int], after: dict[str, int]) -> set[str]:
    """The results whose weights or JSON were written again."""
    changed = {name.split("/")[0] for name in after if after[name] != before.get(name)}
    return changed & {"profile.json", "plan.json", "merged", "pruned", "healed", "int4", "int4-alone", "int4-tuned"}


def edited(path: str, **changes: Any) -> None:
    content = yaml.safe_load(Path(path).read_text())
    Path(path).write_text(yaml.safe_dump(content | changes))


def another_model(config: dict[str, Any]) -> None:
    file = Path(config["pretrained_model_name_or_path"], "transformer/diffusion_pytorch_model.safetensors")
    tensors = load_file(file)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, file, {"format": "pt"})


def lora(config: dict[str, Any]) -> None:
    policy = Policy(families.load(config["pretrained_model_name_or_path"]), LoRA(2))
    for parameter in policy.parameters():
        parameter.data.normal_(std=0.1)
    config["weights"] = "lora"
    policy.save(Path(config["weights"]))


LATE = {"int4", "int4-tuned"}
ALL = {"plan.json", "pruned", "healed", "int4-alone"} | LATE
CHANGES: dict[str, tuple[Any, str, set[str]]] = {
    "quantization": (lambda c: c.update(quantize={"double_quant": True}), "double_quant was false, is true",
                     LATE | {"int4-alone"}),
    "text encoders": (lambda c: c.update(text_encoders=False), "text_encoders was true", LATE | {"int4-alone"}),
    "the healing config": (lambda c: edited(c["heal"], learning_rate=2e-3), "heal.learning_rate was 0.001, is 0.002",
                           LATE | {"healed"}),
    "no healing": (lambda c: c.update(heal=None), 'heal was "set", is null', LATE),
    "the tuning config": (lambda c: edited(c["tune"], max_train_steps=2), "tune.max_train_steps was 1, is 2",
                          {"int4-tuned"}),
    "dtype": (lambda c: c.update(dtype="bfloat16"), 'dtype was "float32", is "bfloat16"', ALL - {"plan.json"}),
    "weights": (lora, "weights had other contents", ALL | {"profile.json", "merged"}),
    "another model": (another_model, "pretrained_model_name_or_path had other contents", ALL | {"profile.json"}),
    "prompts": (lambda c: Path(c["prompts"]).write_text("a red star\n"), "prompts had other contents",
                (ALL - {"int4-alone"}) | {"profile.json"}),
    "budget": (lambda c: c.update(budget={"parameters": 0.3}), "budget.parameters was 0.2, is 0.3",
               ALL - {"int4-alone"}),
    "blocks by hand": (lambda c: c.update(budget=None, blocks="1"), 'blocks was null, is "1"', ALL - {"int4-alone"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"folder": tmp_path_factory.mktemp("once")}


SLOW = ("quantization", "weights", "text encoders", "the healing config", "no healing")


@pytest.mark.parametrize("what", [pytest.param(w, marks=pytest.mark.slow) if w in SLOW else w for w in CHANGES])
def test_results_of_other_settings_are_refused_and_remade_on_request(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], once: dict[str, Path], what: str
) -> None:
    change, said, again = CHANGES[what]
    out = tmp_path / "out"
    if not (kept := once["folder"] / "out").is_dir():
        assert run(config) == 0
        before = times(out)
        assert run(config) == 0 and not remade(before, times(out))
        shutil.copytree(out, kept)
    else:
        shutil.copytree(kept, out)
    before, settings = times(out), (out / "config.yaml").read_text()
    change(config)
    capsys.readouterr()
    assert run(config) == 2
    (told,) = errors(capsys.readouterr().err)
    assert said in told and "overwrite_output_dir" in told
    named = {name for name in ALL | {"profile", "plan"} if re.search(rf" {name}( \(|, which follows)", told)}
    assert named == {name.removesuffix(".json") for name in again} - {"merged"}
    assert not remade(before, times(out)) and (out / "config.yaml").read_text() == settings
    if what not in SLOW:
        return  # these do for what takes its time
    assert run(config, "--overwrite_output_dir") == 0
    assert remade(before, times(out)) == again
    assert yaml.safe_load((out / "config.yaml").read_text())["overwrite_output_dir"] is True


@pytest.mark.parametrize("change", [
    {"report": {"samples_per_prompt": 2}}, {"batch_size": 3},
    *(pytest.param(change, marks=pytest.mark.slow) for change in ({"device": "cpu"}, {"blocks": " 1"})),
])  # fmt: skip
def test_what_changes_no_result_is_no_difference(
    config: dict[str, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    config |= {"budget": None, "blocks": "1", "heal": None, "tune": None}
    assert run(config, stages="[plan,remove]") == 0
    before = times(tmp_path / "out")
    for words in ((), ("--overwrite_output_dir",)):
        assert run(config | change, *words, stages="[plan,remove]") == 0
    assert not remade(before, times(tmp_path / "out"))


@pytest.mark.slow
def test_a_run_that_stopped_halfway_does_not_go_on_with_other_settings(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config |= {"budget": None, "blocks": "1", "tune": None}
    assert run(config, stages="[plan,remove,heal]") == 0
    shutil.rmtree(tmp_path / "out/healed")  # as a kill before it was saved leaves it
    edited(config["heal"], learning_rate=1e-2)
    assert run(config, stages="[heal]") == 2
    assert "healed (heal.learning_rate was" in capsys.readouterr().err
    assert run(config, "--overwrite_output_dir", stages="[heal]") == 0
    assert yaml.safe_load((tmp_path / "out/heal/config.yaml").read_text())["learning_rate"] == 1e-2


@pytest.mark.slow
def test_a_signal_while_healing_keeps_a_checkpoint_and_the_same_command_goes_on(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config |= {"budget": None, "blocks": "1", "tune": None}
    edited("heal.yaml", max_train_steps=3)
    update = Trainer.update

    def stopped(self: Trainer, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", stopped)
        assert run(config, stages="[plan,remove,heal]") == STATUS
    assert "the same command goes on" in capsys.readouterr().err
    assert (tmp_path / "out/heal/checkpoint-1").is_dir() and not (tmp_path / "out/healed").exists()
    (tmp_path / "out/.healed.host.1.tmp").mkdir()  # of a process that was killed
    assert run(config, stages="[plan,remove,heal]") == 0
    assert "resumed from" in capsys.readouterr().out
    assert (tmp_path / "out/healed").is_dir() and not list((tmp_path / "out").glob(".*.tmp"))


def test_results_without_a_record_are_refused(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config |= {"budget": None, "blocks": "1", "heal": None, "tune": None}
    assert run(config, stages="[plan,remove]") == 0
    record = tmp_path / "out/stages.json"
    for content in (None, "{", "[]", "[" * 100_000):
        record.unlink() if content is None else record.write_text(content)
        assert run(config, stages="[plan,remove]") == 2
        (told,) = errors(capsys.readouterr().err)
        assert ("settings unknown" if content is None else "stages.json") in told and "overwrite_output_dir" in told


@pytest.mark.parametrize(("stages", "said"), [
    ("[plan]", "plan needs profile"),
    ("[remove]", "remove needs plan"),
    ("[heal]", "heal needs plan; heal needs pruned"),
    ("[quantize]", "quantize needs healed"),
    ("[analyze,plan,remove,quantize]", "quantize needs healed"),
    ("[tune]", "tune needs int4"),
    ("[report]", "report needs one of"),
    ("[]", "stages is empty"),
])  # fmt: skip
def test_stages_without_what_they_need_leave_nothing(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], stages: str, said: str
) -> None:
    assert run(config, stages=stages) == 2
    (told,) = errors(capsys.readouterr().err)
    assert said in told
    assert not (tmp_path / "out").exists()


def test_healing_by_importance_needs_the_profile(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = yaml.safe_load(Path(config["heal"]).read_text())["objective"]
    objective["init_args"]["sensitivity"] = "graded"
    edited(config["heal"], objective=objective)
    config |= {"budget": None, "blocks": "1", "tune": None}
    assert run(config, stages="[plan,remove,heal]") == 2
    assert "heal needs profile" in errors(capsys.readouterr().err)[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["plan.json", pytest.param("profile.json", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "content", ["", *(pytest.param(c, marks=pytest.mark.slow) for c in ("{", "[1]")), '{"dropped": 3}']
)
def test_a_broken_plan_or_profile_is_named(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    config |= {"heal": None, "tune": None}
    assert run(config, stages="[analyze,plan]") == 0
    (tmp_path / "out" / name).write_text(content)
    before = times(tmp_path / "out")
    capsys.readouterr()
    assert run(config, stages="[remove]" if name == "plan.json" else "[analyze,plan,remove]") == 2
    (told,) = errors(capsys.readouterr().err)
    assert name in told and times(tmp_path / "out") == before


@contextmanager
def largest_file(count: int) -> Iterator[None]:
    """Within, no file may grow beyond ``count`` bytes: what a full disk says, too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "size"), [
    ("[analyze]", 100), ("[plan]", 400), ("[remove]", 60_000), ("[heal]", 60_000), ("[quantize]", 60_000),
])  # fmt: skip
def test_a_full_disk_ends_a_stage_in_a_line_and_leaves_nothing_partial(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], stages: str, size: int
) -> None:
    config |= {"tune": None}
    order = ["analyze", "plan", "remove", "heal", "quantize"]
    before = order[: order.index(stages.strip("[]"))]
    if before:
        assert run(config, stages=f"[{','.join(before)}]") == 0
    capsys.readouterr()
    Path("compress.yaml").write_text(yaml.safe_dump(config))
    with largest_file(size):
        assert run(config, stages=stages) == 2
    (told,) = errors(capsys.readouterr().err)
    assert "cannot write" in told and "too large" in told
    assert not list((tmp_path / "out").rglob("*.tmp"))
    whole = {"analyze": "profile.json", "plan": "plan.json", "remove": "pruned", "heal": "healed", "quantize": "int4"}
    assert not (tmp_path / "out" / whole[stages.strip("[]")]).exists()
    assert run(config, stages=stages) == 0  # the same command goes on
    assert (tmp_path / "out" / whole[stages.strip("[]")]).exists()


def test_a_lora_of_another_model_leaves_nothing(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora(config)
    file = Path(config["weights"], LORA_FILE)
    save_file({k.replace("transformer_blocks", "layers"): t for k, t in load_file(file).items()}, file)
    assert run(config) == 2
    assert "another model" in errors(capsys.readouterr().err)[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_memory_that_cannot_be_measured_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model_index.json and no config.json in .*report.memory: false") as error:
        peak(str(tmp_path / "nowhere"), Reporting())
    assert "\n" not in str(error.value)


def test_one_compresses_into_a_folder_at_a_time(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path / "out"):
        assert run(config, stages="[analyze]") == 2
    assert "is written by process" in errors(capsys.readouterr().err)[0]
    assert not (tmp_path / "out").exists()


def test_a_pipelines_own_folder_is_not_written_into(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    before = contents("model")
    assert run(config | {"output_dir": "model"}) == 2
    assert "model is a pipeline's own folder" in errors(capsys.readouterr().err)[0]
    assert contents("model") == before


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("change", [
    *({"budget": {name: value}} for name in ("parameters", "bytes", "latency") for value in (NAN, INF, -1.0, 0.0)),
    {"budget": {"parameters": 0.2, "bits": NAN}}, {"budget": {"parameters": 1e30}}, {"budget": {"bytes": 1.0}},
    {"budget": {"latency": 1.5}},
    *({"budget": None, "blocks": text} for text in ("1-99", "9" * 5000, "-1", "2-1", "1.5", "nan", "")),
    *({"num_inference_steps": value} for value in (0, -3, 5000)),
    *({"guidance_scale": value} for value in (NAN, INF, -1.0, 1e30)),
    {"calibration_prompts": 0}, {"batch_size": 0}, {"batch_size": -1}, {"seed": -1}, {"seed": 2**64},
    *({"report": {name: value}} for name, value in (
        ("repeats", 0), ("samples_per_prompt", 0), ("guidance_scale", NAN), ("seed", -1), ("prompts", "nowhere.txt"),
    )),
], ids=lambda change: str(change)[:60])  # fmt: skip
def test_impossible_numbers_are_refused_before_anything_is_written(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    config |= {"heal": None, "tune": None} | change
    assert run(config, stages="[analyze,plan,remove,report]" if "report" in change else "[analyze,plan]") == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(told) < 500
    assert not (tmp_path / "out").exists()


FEW = (("output_weight", INF), ("proportion_empty_prompts", -1.0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, marks=[] if value is NAN or (name, value) in FEW else pytest.mark.slow)
        for name in ("output_weight", "feature_weight", "task_weight", "proportion_empty_prompts")
        for value in (NAN, INF, -1.0)
    ],
)
def test_impossible_weights_of_healing_are_refused(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: float
) -> None:
    objective = yaml.safe_load(Path(config["heal"]).read_text())["objective"]
    objective["init_args"][name] = value
    edited(config["heal"], objective=objective)
    assert run(config, stages="[analyze,plan,remove,heal]") == 2
    assert "heal: " in errors(capsys.readouterr().err)[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [0.0, pytest.param(0.7, marks=pytest.mark.slow)])
def test_calibration_at_or_below_guidance_1_is_the_prompted_model(
    config: dict[str, Any], tmp_path: Path, scale: float
) -> None:
    units = {}
    for guidance in (1.0, scale, 3.0):
        changed = config | {"guidance_scale": guidance, "output_dir": str(guidance), "heal": None}
        assert run(changed | {"tune": None, "num_inference_steps": 2}, stages="[analyze,plan]") == 0
        units[guidance] = json.loads((tmp_path / str(guidance) / "profile.json").read_text())["units"]
    assert units[scale] == units[1.0] != units[3.0]
    assert Plan.load(tmp_path / str(scale) / "plan.json").dropped
    assert torch.isfinite(torch.tensor([unit["mse"] for unit in units[scale].values()])).all()


def test_a_profile_is_of_the_rewards_files_and_tells_no_secret(config: dict[str, Any]) -> None:
    Path("head").write_text("one")
    reward = RewardConfig("tests.helpers.Bright", args={"file": "head", "api_key": "hidden"})
    settings = Compress(reward=[reward], **{k: v for k, v in config.items() if k not in ("heal", "tune", "budget")})
    before = recipes(settings, [])["profile"]
    assert "hidden" not in str(before)
    older = {name: value for name, value in before.items() if name != "files of rewards"}
    older["reward"] = [before["reward"][0] | {"timeout": 9.0}]
    Path("profile.json").touch()
    for made, knows in ((before, True), (older, False)):  # of this version, and of an earlier one
        Path("head").write_text("one")
        Path("stages.json").write_text(json.dumps({"profile": made}))
        assert Results(Path(), {"profile": before}).stale() == {}
        Path("head").write_text("another")
        assert bool(Results(Path(), recipes(settings, [])).stale()) == knows
