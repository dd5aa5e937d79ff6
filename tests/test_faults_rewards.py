"""Rewards that misbehave, secrets, locks, and machines that give out: one line each, and nothing half-written."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from fastapi.testclient import TestClient
from PIL import Image
from safetensors import SafetensorError

from align import evaluate, rollout, sample
from align.common.command import command, dumped, parse
from align.evaluation.rollout_writer import RolloutSettings
from align.objectives.online.rewards import Scorer
from align.training.config import TrainConfig
from rewards import RewardConfig, RewardError, RewardSum, checked, load, score
from rewards.base import needs_prompt
from rewards.common import files
from rewards.common.command import status
from rewards.common.errors import RewardFailure, UserError, WriteError
from rewards.common.files import LOCK, atomic, locked, write_text
from rewards.config import parse_rewards, without_secrets
from rewards.data.formats import open_input
from rewards.serving.batching import Limits
from rewards.serving.server import application
from tests.helpers import errors
from tests.odd_rewards import Odd
from tests.reward_samples import new_clip

ROOT = Path(__file__).parents[1]
HERE = "tests.odd_rewards"
IMAGES = torch.linspace(0, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)
PROMPTS = ["a red star", "a blue circle"]


ODD = {
    "exit": r"called sys.exit\(0\)",
    "quit": r"called sys.exit\('bye'\)",
    "raise": "failed: KeyError: 'absent'",
    "raise lines": "failed: RuntimeError: first line",
    "complex": "returned torch.complex64",
    "nan": "returned nan for row 0",
    "infinite": "returned inf for row 0",
    "beyond float32": r"returned 1e\+300 for row 0",
    "column": r"returned \(2, 1\); expected a tensor of shape \(2,\)",
    "scalar": r"returned \(\); expected",
    "one more": r"returned \(3,\); expected",
    "sparse": "torch.sparse_coo; expected dense real numbers",
    "meta": "meta torch.strided; expected dense real numbers",
    "number": "returned int; expected a tensor",
    "list": "returned list; expected a tensor",
    "array": "returned ndarray; expected a tensor",
    "nothing": "returned NoneType; expected a tensor",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "images"
    made.mkdir()
    for number in range(2):
        Image.fromarray(np.full((8, 8, 3), 40 * number, np.uint8)).save(made / f"{number}.png")
    return made


def named(what: str, **more: Any) -> str:
    return json.dumps({"name": f"{HERE}.Odd", "label": "mine", "args": {"what": what}} | more)


# -- what a reward does ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ODD)
def test_what_a_reward_should_not_do_is_told_with_its_name(what: str) -> None:
    for call in (
        lambda: checked(Odd(what), "mine", IMAGES, PROMPTS),
        Scorer({"mine": Odd(what)}, {"mine": 1.0}).submit(IMAGES, PROMPTS),
        lambda: RewardSum({"mine": Odd(what)}).score(images=IMAGES, prompts=PROMPTS),
    ):
        with pytest.raises(RewardError, match=ODD[what]) as caught:
            call()
        assert "reward 'mine'" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("what", ["exit", "raise", "complex", "hang"])
def test_in_scoring_it_is_one_line_and_no_file(folder: Path, capfd: pytest.CaptureFixture[str], what: str) -> None:
    output = folder.parent / "scores.parquet"
    limit = {"timeout": 0.1} if what == "hang" else {}
    assert score.main([str(folder), "--reward", named(what, **limit), "--output", str(output)]) == 2
    told = capfd.readouterr().err
    (line,) = errors(told)
    assert "'mine'" in line and "Traceback" not in told
    assert sorted(path.name for path in folder.parent.iterdir()) == ["images"]


def test_debug_shows_where(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folder), "--reward", named("raise"), "--output", str(folder.parent / "s"), "--debug"]
    assert score.main(arguments) == 2
    told = capfd.readouterr().err
    assert "KeyError: 'absent'" in told and "Traceback" in told and len(errors(told)) == 1


@pytest.mark.parametrize("what", ["never exit", "never break"])
def test_one_that_cannot_be_made_is_told(what: str) -> None:
    with pytest.raises(RewardFailure, match="cannot be made"):
        load(f"{HERE}.Odd", {"what": what})


def test_a_module_that_breaks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in {"leaves": "import sys; sys.exit(0)", "torn": "def f(:", "divides": "1 / 0"}.items():
        (tmp_path / f"odd_{name}.py").write_text(text)
        with pytest.raises(RewardFailure, match=f"cannot load reward 'odd_{name}.R'"):
            load(f"odd_{name}.R")


@pytest.mark.parametrize("what", ["write", "write numpy", "write texts"])
def test_one_that_writes_into_what_it_gets_changes_nobody_elses(what: str) -> None:
    images, prompts, metadata = IMAGES.clone(), list(PROMPTS), [{"task": "a"}, {"task": "b"}]
    rewards = RewardSum({"writes": Odd(what), "looks": Odd()})
    scores = rewards.scores(images=images, prompts=prompts, metadata=metadata)
    assert torch.equal(scores["looks"], IMAGES.mean((1, 2, 3)))
    assert torch.equal(images, IMAGES) and prompts == PROMPTS and metadata == [{"task": "a"}, {"task": "b"}]


@pytest.mark.parametrize("what", ["elsewhere", "begin elsewhere"])
def test_one_that_goes_to_another_folder_takes_no_run_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """What a run writes by a relative path lay there from then on."""
    monkeypatch.chdir(tmp_path)
    checked(load("tests.odd_rewards.Odd", {"what": what}), "mine", IMAGES, PROMPTS)
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize(("what", "scores"), [("whole", [2.0, 8.0]), ("truth", [0.0, 1.0])])
def test_whole_numbers_and_truths_are_scores(what: str, scores: list[float]) -> None:
    given = checked(Odd(what), "mine", IMAGES, PROMPTS)
    assert given.dtype == torch.float32 and given.tolist() == scores


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [None, 60.0])
def test_a_limit_changes_nothing_of_one_that_answers(seconds: float | None) -> None:
    rewards = RewardSum.of([RewardConfig(f"{HERE}.Mode", label="m", timeout=seconds)])
    (reward,) = rewards.rewards.values()
    assert reward.differentiable and needs_prompt(reward) and not getattr(reward, "concurrent")  # noqa: B009
    images = IMAGES.clone().requires_grad_()
    value = checked(reward, "m", images, PROMPTS)
    value.sum().backward()
    assert torch.equal(images.grad, torch.full_like(IMAGES, 1 / 48))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(checked(reward, "m", IMAGES, PROMPTS), IMAGES.mean((1, 2, 3)) + 10)
    assert torch.equal(value, IMAGES.mean((1, 2, 3)) + 100)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["hang", "spin"])
def test_a_process_whose_reward_never_answers_ends(folder: Path, what: str) -> None:
    line = [sys.executable, "-m", "rewards.score", str(folder), "--reward", named(what, timeout=0.2), "--output"]
    done = subprocess.run(
        [*line, str(folder.parent / "s")], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "reward 'mine' did not answer within 0.2 s" in errors(done.stderr)[0], done.stderr
    assert not (folder.parent / "s").exists()


def test_one_that_still_computes_is_not_asked_again() -> None:
    (reward,) = RewardSum.of([RewardConfig(f"{HERE}.Odd", args={"what": "hang"}, timeout=0.1)]).rewards.values()
    for _ in range(2):
        with pytest.raises(RewardFailure, match="did not answer"):
            checked(reward, "mine", IMAGES, PROMPTS)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e12])
def test_a_limit_is_a_number_of_seconds(seconds: float) -> None:
    with pytest.raises(RewardError, match="expected seconds above 0"):
        RewardConfig("Shapes", timeout=seconds)


# -- secrets -----------------------------------------------------------------------------------------------------------

SECRET = "hunter2-and-more"


NAMES = ("token", "api_key", "hf_token", "PASSWORD", "client-secret", "Authorization", "accessToken", "aws_secret_key")


@pytest.mark.parametrize("key", NAMES)
def test_secrets_are_masked_at_any_depth(key: str) -> None:
    content = {"rewards": [{"name": "R", "args": {key: SECRET, "tokens": 5, "headers": {key: SECRET}}}]}
    masked = without_secrets(content)
    assert SECRET not in str(masked)
    assert masked["rewards"][0]["args"]["tokens"] == 5
    assert without_secrets(masked) == masked  # where one lies is no secret


def test_no_config_that_is_written_holds_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = json.dumps({"name": f"{HERE}.Odd", "args": {"token": SECRET}})
    lines = ["--config", "configs/ddpo_shapes.yaml", "--reward", reward]
    config, resolved = parse(TrainConfig, "align.train", None, lines, leaves=False)
    assert config.rewards[0].args["token"] == SECRET  # the run itself has it
    assert SECRET not in resolved and SECRET not in dumped(config)
    settings = RolloutSettings("shapes-prompts", rewards=config.rewards)
    assert SECRET not in str([one.record() for one in settings.rewards])
    (tmp_path / "config.yaml").write_text(resolved)  # which alone makes the run again, with the secret at its place
    again, same = parse(TrainConfig, "align.train", None, ["--config", str(tmp_path / "config.yaml")], leaves=False)
    assert yaml.safe_load(same) == yaml.safe_load(resolved)
    with pytest.raises(RewardError, match="T2I_ALIGN_TOKEN, which is not set"):
        RewardSum.of(again.rewards)
    monkeypatch.setenv("T2I_ALIGN_TOKEN", SECRET)
    (made,) = RewardSum.of(again.rewards).rewards.values()
    assert isinstance(made, Odd) and made.token == SECRET


def test_a_secret_comes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{SECRET}\n")
    (nested,) = parse_rewards({"name": f"{HERE}.Odd", "args": {"headers": {"Cookie": f"file:{tmp_path}/token"}}})
    assert nested.arguments() == {"headers": {"Cookie": SECRET}}
    (nested,) = parse_rewards({"name": f"{HERE}.Odd", "args": {"headers": {"Cookie": SECRET}}})
    assert SECRET not in str(nested.settings()) + str(nested.record())
    (address,) = parse_rewards({"name": f"{HERE}.Odd", "args": {"url": f"https://me:{SECRET}@host:80/v1"}})
    assert address.record()["args"] == {"url": "https://***@host:80/v1"}
    for place in (f"file:{tmp_path}/token", SECRET):
        (config,) = parse_rewards(f"{HERE}.Odd:token={place}")
        assert config.arguments()["token"] == SECRET
        assert SECRET not in str(config.settings()) + str(config.record())
    (config,) = parse_rewards(f"{HERE}.Odd:token=file:{tmp_path}/absent")
    with pytest.raises(RewardError, match="absent, which cannot be read"):
        RewardSum.of([config])


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect", "/rewards"])
def test_without_the_token_the_server_describes_nothing(path: str) -> None:
    client = TestClient(application({}, SECRET, Limits()))
    assert client.get(path).status_code in (401, 404)
    assert client.get("/rewards", headers={"Authorization": f"Bearer {SECRET}"}).status_code == 200


@pytest.mark.parametrize("url", ["http://me:hunter2@host/v1", "http://host/v1?api_key=hunter2"])
def test_no_secret_hides_in_an_address(url: str) -> None:
    for name in ("EndpointJudge", "Remote"):
        with pytest.raises(RewardError) as caught:
            load(name, {"url": url} | ({"model": "m"} if name == "EndpointJudge" else {}))
        assert "hunter2" not in str(caught.value)


# -- exit codes --------------------------------------------------------------------------------------------------------


def failing(error: BaseException) -> Any:
    def call() -> None:
        raise error

    return call


TOLD = {
    "ours": (UserError("what arrived\nwhat was expected"), "what arrived"),
    "long": (RewardError("first\n" + "a line\n" * 40), "first a line"),
    "full": (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "/data/x: No space left on device"),
    "gone": (FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/y"), "/data/y: No such file"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "/z"), "/z: Read-only file system"),
    "hub": (OSError("we could not reach\n\n\nthe hub\n" * 5), "we could not reach the hub"),
    "pipe": (BrokenPipeError(errno.EPIPE, "Broken pipe"), "nobody reads the output any more"),
    "memory": (MemoryError(), "out of memory"),
    "torch": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    "gpu": (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"), "lower the batch size"),
}


@pytest.mark.parametrize("what", TOLD)
@pytest.mark.parametrize("run", [status, command])
def test_one_exit_code_and_at_most_three_lines(what: str, run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    error, text = TOLD[what]
    assert run(failing(error), []) == 2
    told = capsys.readouterr().err
    assert text in told and told.startswith("error: ") and len(told.splitlines()) <= 3 and "Traceback" not in told
    assert run(failing(error), ["--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        status(failing(ZeroDivisionError()), [])


@pytest.mark.parametrize(
    "said",
    [
        "[/__w/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:11986. GLHF!",
        "NCCL error: remote process exited or there was a network error",
    ],
)
def test_a_process_that_lost_another_says_so_in_a_line(said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The error to be read is the other's; a traceback of the exchange would bury it."""
    assert status(failing(RuntimeError(said)), []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: process ") and "has lost another one of this run" in line


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "meta", "mps", "xla", "gpu", "cpu:x"])
def test_a_device_that_is_not_there_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if device == "cuda" and torch.version.cuda is not None:
        pytest.skip("this torch may have a GPU")
    output = folder.parent / "s"
    arguments = [str(folder), "--reward", "JPEGCompressibility", "--device", device, "--output", str(output)]
    assert score.main(arguments) == 2
    assert f"--device is {device}; expected cpu" in errors(capsys.readouterr().err)[0]
    assert not output.exists()


@pytest.mark.parametrize("patience", ["nan", "-1"])
def test_patience_is_a_number_of_seconds(folder: Path, patience: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder.parent / "s"
    words = [str(folder), "--reward", "JPEGCompressibility", "--output", str(output), f"--patience={patience}"]
    assert score.main(words) == 2
    assert errors(capsys.readouterr().err)[0].startswith("error: --patience is ")
    assert not output.exists()


@pytest.mark.parametrize("name", ["rewards.score", "rewards.agree", "rewards.serve"])
def test_a_wrong_option_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = __import__(name, fromlist=["main"])
    assert module.main(["--reward", "Shapes", "--nonsense"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["true", "exec 1>/dev/full"])
def test_an_output_that_takes_nothing_is_one_line(folder: Path, reader: str) -> None:
    score_it = f"{sys.executable} -m rewards.score {folder} --reward JPEGCompressibility --output {folder.parent}/s"
    line = f"{score_it} | true" if reader == "true" else f"{reader}; {score_it}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done
    (told,) = errors(done.stderr)
    assert "are whole" in told and "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert (folder.parent / "s/summary.json").is_file()


# -- one folder, two processes -----------------------------------------------------------------------------------------


def hold(folder: Path, ready: Any) -> None:
    with locked(folder):
        ready.set()
        time.sleep(60)


@pytest.fixture
def held(tmp_path: Path) -> Any:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "out", ready), daemon=True)
    process.start()
    assert ready.wait(30)
    yield process
    process.kill()
    process.join()


def test_the_holder_is_named_and_a_dead_ones_lock_is_taken_over(tmp_path: Path, held: Any) -> None:
    folder = tmp_path / "out"
    with (
        pytest.raises(UserError, match=rf"is written by process {held.pid} on \S+ since .*; wait for it"),
        locked(folder),
    ):
        pass
    os.kill(held.pid, signal.SIGKILL)
    held.join()
    assert (folder / LOCK).is_file()  # what the dead one left
    with locked(folder):
        assert f"process {os.getpid()} " in (folder / LOCK).read_text()
        write_text(folder / "result", "whole")
    assert [path.name for path in folder.iterdir()] == ["result"]


@pytest.mark.parametrize("name", ["score", "sample", "rollout", "evaluate"])
def test_every_command_leaves_a_folder_that_is_written_alone(
    tiny_folders: dict[str, Path], folder: Path, held: Any, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    output, model = str(folder.parent / "out"), str(tiny_folders["epsilon"])
    (folder.parent / "p.txt").write_text("a red star\n")
    prompts, drawn = str(folder.parent / "p.txt"), ["--num_inference_steps", "2", "--output_dir", output]
    base = ["--pretrained_model_name_or_path", model]
    line = {
        "score": [str(folder), "--reward", "JPEGCompressibility", "--output", output],
        "sample": ["--prompts", prompts, *base, *drawn],
        "rollout": ["--prompts", prompts, *base, "--output_dir", output],
        "evaluate": ["--tuned", model, "--base", model, "--prompts", prompts, *drawn],
    }[name]
    module = {"score": score, "sample": sample, "rollout": rollout, "evaluate": evaluate}[name]
    assert module.main(line) == 2
    (told,) = errors(capsys.readouterr().err)
    assert f"is written by process {held.pid}" in told
    assert [path.name for path in (folder.parent / "out").iterdir()] == [LOCK]


def test_a_process_does_not_lock_twice(tmp_path: Path) -> None:
    with locked(tmp_path / "a"), locked(tmp_path / "b"):
        with pytest.raises(UserError, match=f"process {os.getpid()}"), locked(tmp_path / "a"):
            pass
        assert (tmp_path / "a" / LOCK).is_file()
        with pytest.raises(UserError), locked(tmp_path / "." / "b"):
            pass
    assert not any(tmp_path.iterdir())  # both were made here, and nothing came into them


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    assert tmp_path.is_dir() and not any(tmp_path.iterdir())


def test_of_one_launch_the_first_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with locked(tmp_path):
            pass
        assert (tmp_path / LOCK).is_file()


def test_where_the_system_cannot_lock_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", unsupported)
    with locked(tmp_path):
        pass
    assert "cannot be locked (No locks available)" in caplog.text


# -- the machine runs out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EFBIG, "File too large"), "File too large"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "I/O error: No space left"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/elsewhere"), "/elsewhere"),
    ],
)
def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path, error: Exception, reason: str) -> None:
    target = tmp_path / "kept"
    target.write_text("before")
    with pytest.raises(WriteError) as caught, atomic(target) as draft:
        draft.write_text("half")
        raise error
    assert str(target) in str(caught.value) and reason in str(caught.value)
    assert target.read_text() == "before" and [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_file_in_the_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot write .*file/x"):
        write_text(tmp_path / "file" / "x", "text")


@pytest.mark.slow
def test_a_full_disk_says_what_scoring_kept_and_the_same_command_goes_on(folder: Path) -> None:
    for number in range(2, 600):
        os.link(folder / "0.png", folder / f"{number}.png")
    output = folder.parent / "scores"
    line = [str(folder), "--reward", "JPEGCompressibility", "--shard_size", "300", "--output", str(output)]
    limited = (
        "import resource, sys; from rewards.score import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, *line], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    (told,) = errors(done.stderr)
    assert f"cannot write {output}/scores-00000.parquet" in told and "0 whole shards are in" in told
    assert not output.exists()
    assert score.main(line) == 0
    assert sum(pq.read_table(path).num_rows for path in output.glob("*.parquet")) == 600


def test_a_folder_that_vanishes_while_it_is_scored_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = score.score_here

    def emptied(scorer: Any, *others: Any) -> int:
        rows = whole(scorer, *others)
        for path in scorer.shards.folder.iterdir():
            path.unlink()
        scorer.shards.folder.rmdir()
        return rows

    monkeypatch.setattr(score, "score_here", emptied)
    started = time.monotonic()
    output = str(folder.parent / "s")
    assert score.main([str(folder), "--reward", "JPEGCompressibility", "--output", output]) == 2
    assert "scores-00000.parquet, have gone from" in errors(capsys.readouterr().err)[0]
    assert time.monotonic() - started < 20  # nobody else writes: there is nothing to wait for


# -- results of other settings -----------------------------------------------------------------------------------------


def test_scores_of_another_model_at_the_same_place_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights.safetensors").write_bytes(b"one")
    reward = f"{HERE}.Odd:model={tmp_path}/model"
    line = [str(folder), "--reward", reward, "--output", str(tmp_path / "s")]
    assert score.main(line) == score.main(line) == 0
    (tmp_path / "model/weights.safetensors").write_bytes(b"other")
    assert score.main(line) == 2
    assert "holds scores of other settings" in errors(capsys.readouterr().err)[0]


# -- what is drawn can be scored ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", ["JPEGCompressibility", "Shapes"])
def test_what_sample_leaves_is_scored_as_it_lies(
    tiny_folders: dict[str, Path], tmp_path: Path, reward: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_folders["epsilon"])
    drawn = ["--images_per_prompt", "2", "--num_inference_steps", "2", "--output_dir", str(tmp_path / "s")]
    (tmp_path / "p.txt").write_text("two red stars\n<b>a & b</b>\n" if reward != "Shapes" else "two red stars\n")
    assert sample.main(["--prompts", str(tmp_path / "p.txt"), "--pretrained_model_name_or_path", model, *drawn]) == 0
    count = 4 if reward != "Shapes" else 2
    assert score.main([str(tmp_path / "s"), "--reward", reward, "--output", str(tmp_path / "o.parquet")]) == 0
    table = pq.read_table(tmp_path / "o.parquet")
    assert table["file"].to_pylist() == [f"{k:05d}.png" for k in range(count)]
    page = (tmp_path / "s/gallery.html").read_text()
    assert page.count("<img") == count and "<b>a" not in page


def test_what_evaluate_leaves_is_scored_without_its_gallery(tmp_path: Path) -> None:
    for name in ("gallery.png", "images/base/00000.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    assert len(open_input(str(tmp_path)).listed) == 2  # somebody's own
    (tmp_path / "gallery.html").write_text("")
    assert [row.file for row in open_input(str(tmp_path)).listed] == ["images/base/00000.png"]


def test_what_rollout_leaves_is_scored_without_its_contact_sheets(tmp_path: Path) -> None:
    for name in ("contact-sheet-00000.png", "images/00000.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    line = {"image": "images/00000.png", "trajectory": "00000", "prompt": "two red stars", "scores": {}}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "rollout.json").write_text("{}")
    source = open_input(str(tmp_path))
    assert [(row.file, row.prompt) for row in source.listed] == [("images/00000.png", "two red stars")]


# captions as a scorer's text encoder reads them
def test_captions_that_a_scorer_cuts_are_told_once(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new_clip(tmp_path / "clip")
    for picture in folder.glob("*.png"):
        picture.with_suffix(".txt").write_text("a fox and a cat " * 40)
    command = [str(folder), "--reward", f"CLIPScore:model={tmp_path / 'clip'}", "--batch_size", "1"]
    assert score.main([*command, "--output", str(tmp_path / "scores.parquet")]) == 0
    said = capsys.readouterr().err
    assert said.count("CLIPScore reads 77 tokens of a caption, and cuts longer ones") == 1, said


def test_a_scorer_without_tokenizer_files_is_refused(tmp_path: Path) -> None:
    """transformers makes a tokenizer that knows its special tokens alone: every prompt would score alike."""
    new_clip(tmp_path / "clip")
    for file in ("tokenizer.json", "vocab.json", "merges.txt"):
        (tmp_path / "clip" / file).unlink(missing_ok=True)
    with pytest.raises(RewardError, match="CLIPScore: .*its tokenizer has no vocabulary, files such as tokenizer.json"):
        load("CLIPScore", {"model": str(tmp_path / "clip"), "device": "cpu"})
