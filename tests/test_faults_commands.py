"""Settings and config files that no command can mean: each is told in one line, and nothing is written."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from tqdm import tqdm

from align import evaluate, objectives, rollout, sample
from align.bench import BenchRun
from align.common.command import parse
from align.common.errors import UserError
from align.data import Images, LabelledRollout, PreferencePairs, Prompts, RatedImages, TaskPrompts
from align.diffusion.kernels import DDIM, FlowSDE
from align.evaluate import Evaluate
from align.evaluation.rollout_writer import RolloutSettings
from align.objectives import Objective, PolicyGradient
from align.objectives.online.gate import Gate
from align.objectives.teachers import LoRATeacher, PipelineTeacher
from align.policy.policy import LoRA
from align.sample import Sample
from align.sampling.sampler import Sampler, SDEWindow
from align.training.config import Samples, TrainConfig
from align.training.preemption import Preemption
from align.training.run_folder import base_of
from pruning import compress
from pruning.distill import Heal
from pruning.settings import Compress
from rewards import RewardError, parse_rewards
from rewards.common.command import STOPPED, status
from rewards.common.files import locked, write_text
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


BOMB = "a0: &a0 [1, 2]\n" + "".join(f"a{k + 1}: &a{k + 1} [{f'*a{k}, ' * 10}]\n" for k in range(9))


@pytest.mark.parametrize(
    "text",
    [
        *("seed: " + "[" * 100_000, "seed: &a [*a]", "seed: &a {b: *a}", BOMB),
        *("seed: 2001-13-45", "seed: !!int many", "seed: !!bool many", "seed: !!timestamp now"),
    ],
    ids=["deep", "itself", "itself below", "aliases of aliases", "no day", "no number", "no truth", "no time"],
)
def test_a_config_file_ends_somewhere(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert sample.main(["--config", str(path)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and f"error: --config {path} is no YAML" in told[0]
    with pytest.raises(UserError, match="config.yaml is no YAML"):  # as that of a run
        base_of(tmp_path)
    with pytest.raises(RewardError, match="is not YAML"):
        parse_rewards("{name: Shapes, args: {" + text.replace("\n", ", ") + "}}")


def test_a_mapping_is_merged_into_others_which_override_it(tmp_path: Path) -> None:
    text = "lora: {<<: &low {rank: 4, alpha: 2.0}, alpha: 3.0}\nsamples: {<<: [{seed: 3}, {seed: 4}]}\n"
    (tmp_path / "config.yaml").write_text(DPO + text)
    config, _ = parse(TrainConfig, "align.train", None, ["--config", f"{tmp_path}/config.yaml"], leaves=False)
    assert config.lora == LoRA(4, 3.0) and config.samples.seed == 3


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


ANY = {"hinge", "noise_seed", "threshold", "threshold_best", "threshold_worst"}  # below 0 they mean something
ELSEWHERE = {"resolution", "history_min_count"}  # refused with the model, or no other than 1
MADE_OF = {
    "OPD": {"teachers": [LoRATeacher("a")]},
    "B2DiffuRL": {"update": PolicyGradient(), "first": 2},
    "LabelledRollout": {"labels": ["a"]},
    "TaskPrompts": {"tasks": {"a": "a"}},
    "Heal": {"teacher": PipelineTeacher("a"), "plan_path": "a", "sensitivity": "none"},
    "Gate": {"auxiliary": ["a"]},
}
KINDS = [getattr(objectives, name) for name in objectives.__all__]
KINDS = [kind for kind in KINDS if isinstance(kind, type) and issubclass(kind, Objective) and kind is not Objective]
KINDS += [Images, PreferencePairs, RatedImages, Prompts, TaskPrompts, LabelledRollout]
KINDS += [Heal, Gate, Sampler, SDEWindow, DDIM, FlowSDE, LoRA, Samples]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_count_or_weight_is_below_0(kind: type[Any]) -> None:
    """A window of -1 steps, a limit of -1: in every class that settings have, those of tomorrow too."""
    types, fields = get_type_hints(kind), {field.name for field in dataclasses.fields(kind)}
    given = MADE_OF.get(kind.__name__, {}) | ({"path": "a"} if "path" in fields else {})
    kind(**given)
    numbers = [name for name in fields if {int, float} & {types[name], *get_args(types[name])}]
    for name in sorted({*numbers} - ANY - ELSEWHERE):
        with pytest.raises(ValueError, match="."):
            kind(**given | {name: -1})


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("max_rollouts: x", 'key "max_rollouts": Expected int or null. Got value: x$'),
        ("lora: {targets: 3}", 'key "targets": Expected list or null. Got value: 3$'),
        (
            "objective: {class_path: AWM, init_args: {gate: {auxiliary: [a], refresh: x}}}",
            "Expected int.* Got value: x$",
        ),
    ],
)
def test_a_value_of_none_of_several_types_is_told_in_few_words(tmp_path: Path, option: str, told: str) -> None:
    kept = "".join(line for line in DPO.splitlines(True) if line.split(":")[0] != option.split(":")[0])
    (tmp_path / "config.yaml").write_text(kept + option + "\n")
    with pytest.raises(UserError, match=told):
        parse(TrainConfig, "align.train", None, ["--config", f"{tmp_path}/config.yaml"], leaves=False)


# configs as people write them
DPO = """
objective: {class_path: DPO, init_args: {beta: 200.0}}
data: {class_path: PreferencePairs, init_args: {path: pairs.jsonl}}
"""


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("num_train_epochs: 3", "max_train_steps"),
        ("lora: {r: 3}", "lora.rank"),
        ("lr: 1e-5", "learning_rate"),
        ("train_batchsize: 4", "train_batch_size"),
        ("samples: {prompt: []}", "samples.prompts"),
        ("--rank 8 --resolution 512", "lora.rank, data.resolution"),
        ("--beta_dpo 5000", "objective.beta"),
        ("--objective.betta 5000", "objective.beta"),
        ("--data.pth pairs", "data.path"),
        ("--learning-rate 1e-5", "learning_rate"),
        ("--objective B2DiffuRL --objective.sampler.guidance_scale 1", "objective.update.sampler.guidance_scale"),
        ("--objective ReNO --objective.sampler.guidance_scale 1", "objective.guidance_scale"),
    ],
)
def test_another_trainers_word_is_answered_with_ours(tmp_path: Path, words: str, meant: str) -> None:
    arguments = words.split() if words.startswith("--") else []
    (tmp_path / "config.yaml").write_text(DPO + ("" if arguments else words + "\n"))
    with pytest.raises(UserError, match=rf"; did you mean {re.escape(meant)}\?$"):
        parse(TrainConfig, "align.train", None, ["--config", f"{tmp_path}/config.yaml", *arguments], leaves=False)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("--objective NOSUCH", ".*AWM, .*DPO, .*ReNO.*"),
        ("--data Prefs", "(?!.*EncodedData).*PreferencePairs, .*RatedImages, .*"),
        ("--objective PolicyGradient --objective.sampler.kernel Ddim", ".*DDIM, .*WindowedKernel.*"),
        ("--validation_data Prefs", "(?!.*EncodedData).*PreferencePairs, .*RatedImages, .*"),
        *(
            (f"--objective {name}", "AWM, .*")
            for name in ("3", "{class_path:}", "align.objectives", "os.system", "a:b")
        ),
    ],
)
def test_a_class_that_is_none_is_answered_with_those_that_are(tmp_path: Path, words: str, names: str) -> None:
    (tmp_path / "config.yaml").write_text(DPO)
    with pytest.raises(UserError, match=rf"; there are {names}, and your own by MODULE.CLASS$"):
        parse(TrainConfig, "align.train", None, ["--config", f"{tmp_path}/config.yaml", *words.split()], leaves=False)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_config_is_read_as_it_is_meant(tmp_path: Path, encoding: str) -> None:
    """In any encoding with a mark, and with Python's words."""
    more = "lora: None\nrevision: None\nadam_epsilon: 1e-08\nrewards:\n- {name: Shapes, args: {a: 1e-5, b: None}}\n"
    (tmp_path / "config.yaml").write_text(DPO + more + "output_dir: caf\u00e9\n", encoding=encoding)
    config, _ = parse(TrainConfig, "align.train", None, ["--config", f"{tmp_path}/config.yaml"], leaves=False)
    assert (config.lora, config.revision, config.adam_epsilon) == (None, None, 1e-8)
    assert config.rewards[0].args == {"a": 1e-5, "b": None}
    assert config.output_dir == Path("caf\u00e9")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds nothing; expected settings"),
        ("- seed", "holds a list; expected settings"),
        (DPO + "learning_rate: null\n", "^learning_rate is null; give it a value, or leave it out"),
        (DPO.replace("200.0", "null"), "^objective.beta is null; give it a value, or leave it out"),
        (DPO + "lora: {rank: null}\n", "^lora.rank is null; give it a value, or leave it out"),
        (DPO + "rollout_batch_size: none\n", "; null stands for none$"),
    ],
)
def test_a_config_that_says_nothing_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=said):
        parse(TrainConfig, "align.train", None, ["--config", f"{tmp_path}/config.yaml"], leaves=False)


@pytest.mark.parametrize("settings", [TrainConfig, Evaluate, Sample, RolloutSettings, BenchRun, Compress])
def test_a_path_may_be_a_text(settings: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    needed = {
        TrainConfig: {"data": None, "objective": None},
        RolloutSettings: {"prompts": "p.txt"},
        Evaluate: {"tuned": "a"},
    }.get(settings, {})
    assert settings(output_dir="~/runs", **needed).output_dir == tmp_path / "runs"


# signals
@pytest.fixture
def _handlers_of_a_process_of_its_own() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("_handlers_of_a_process_of_its_own")
def test_any_command_that_is_told_to_end_says_so_and_leaves_nothing_half(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    signal.signal(number, signal.SIG_DFL)

    def work() -> None:
        with locked(tmp_path / "out"):
            write_text(tmp_path / "out/whole", "")
            os.kill(os.getpid(), number)
            write_text(tmp_path / "out/never", "")

    assert status(work, []) == STOPPED
    assert capsys.readouterr().err == f"stopped by {number.name}; the files that were written are whole (status 75)\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]
    assert signal.getsignal(number) is signal.SIG_DFL  # a second one ends the process at once


@pytest.mark.usefixtures("_handlers_of_a_process_of_its_own")
def test_a_signal_that_nohup_has_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    preemption = Preemption()
    with preemption.heard():
        assert status(lambda: os.kill(os.getpid(), signal.SIGHUP), []) == 0
        os.kill(os.getpid(), signal.SIGHUP)
    assert not preemption.asked and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_process_without_stdout_and_stderr_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    assert status(lambda: [None for _ in tqdm(range(3))], []) == 0
