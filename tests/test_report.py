"""The page of runs: whole, without a request, bounded, and true of runs that go on, were killed, or are of 0.1."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

from align.common.errors import UserError
from align.evaluation.curve_chart import number, tick
from align.evaluation.curves import BUCKETS, Curve, Position
from align.evaluation.gallery import cut_grid, save_grid, to_pil
from align.evaluation.panels import COUNTERS
from align.evaluation.run_page import FRAMES, run_page
from align.evaluation.run_record import State, read_run
from align.evaluation.ticks import ticks
from align.report import main, named, report

V0_1 = Path(__file__).parent / "v0_1"
NOW = 2_000_000_000.0
CONFIG = """
objective: {class_path: align.objectives.PolicyGradient, init_args: {clip_range: 0.1, sampler: {guidance_scale: 1.0}}}
pretrained_model_name_or_path: shapes-sd3
rewards:
- {name: Shapes, weight: 1.0, label: null}
- {name: Shapes, weight: 0.0, label: strict}
max_train_steps: 4
learning_rate: 0.001
samples: {prompts: [%s]}
"""
LOGGED = json.loads((V0_1 / "losses.json").read_text())["runs"]


def lines(count: int = 4) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"step": 0, "time": NOW - 100, "validation/Shapes": 0.5, "validation/strict": 0.25}]
    for step in range(1, count + 1):
        rows.append({"step": step, "time": NOW - 100 + step, "loss": 1 / step, "grad_norm": 0.5, "clip_fraction": 0.0})
        rows[-1] |= {"rollout": step, "rollout/pictures": 8.0, "rollout/reward/Shapes": step / 10}
        rows[-1] |= {"rollout/reward/strict": 0.1, "evaluations/trained": 5 * step, "evaluations/frozen": 7 * step}
    return rows


def make_run(
    folder: Path,
    metrics: Sequence[Mapping[str, Any]],
    prompts: Sequence[str] = ("two red stars", "a green circle"),
    grids: Sequence[int] = (),
    finished: bool = True,
    config: str = CONFIG,
) -> Path:
    """A run folder as ``align.train`` leaves it."""
    folder.mkdir(parents=True)
    quoted = ", ".join(json.dumps(prompt) for prompt in prompts)
    (folder / "config.yaml").write_text(config % quoted if "%s" in config else config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    for step in grids:
        images = torch.full((len(prompts), 3, 64, 64), (step % 10) / 10)
        save_grid(images, prompts, folder / f"samples/step-{step:06d}.png")
    if finished:
        (folder / "pytorch_lora_weights.safetensors").touch()
        os.utime(folder / "pytorch_lora_weights.safetensors", (NOW, NOW))
    return folder


def page_of(*runs: Path, now: float = NOW) -> str:
    return run_page([read_run(run.name, run, now, 12) for run in runs], now).html()


def evaluated(run: Path, keeps_pictures: bool = True) -> Path:
    """An evaluation of two prompts, two pictures each, beside ``run``."""
    folder = run / "evaluation"
    models, rewards = ["base", "tuned"], {"base_mean": 0.4, "tuned_mean": 0.6}
    rewards |= {"win_rate": 0.75, "win_rate_ci": [0.5, 0.9]} if keeps_pictures else {"win_rate": 0.75}
    scores = {"models": models, "rewards": {"Shapes": rewards}, "samples_per_prompt": 2, "win_rate": 0.75}
    folder.mkdir()
    (folder / "scores.json").write_text(json.dumps(scores))
    rows = [
        {"prompt": p, "seed": k, "base/Shapes": 0.25, "tuned/Shapes": 0.875}
        for p in ("a <i> star", "b")
        for k in (0, 1)
    ]
    if keeps_pictures:
        (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for model in models:
            (folder / "images" / model).mkdir(parents=True)
            for k in range(4):
                Image.new("RGB", (64, 64), "red").save(folder / f"images/{model}/{k:05d}.png")
    else:
        Image.new("RGB", (300, 200), "blue").save(folder / "gallery.png")
    return run


# reading
@pytest.mark.parametrize("name", sorted(LOGGED))
def test_all_that_an_objective_logs_is_on_the_page(name: str, tmp_path: Path) -> None:
    rows = LOGGED[name]
    text = page_of(make_run(tmp_path / "run", [{"time": NOW, **row} for row in rows]))
    keys = {re.sub("^held_out/", "validation/", key) for row in rows for key in row} - {"time", *COUNTERS}
    shown = set(re.findall("<code>([^<]+)</code>", text))
    drawn_beside = {f"validation/{key.removeprefix('rollout/reward/')}" for key in shown}
    total = {"rollout/reward/total"}  # with one reward of weight 1 it is that reward
    assert keys - shown - drawn_beside <= total
    assert shown <= keys


def test_a_run_of_0_1_is_read(tmp_path: Path) -> None:
    run = shutil.copytree(V0_1 / "folders/run/run", tmp_path / "old")
    record = read_run("old", run, NOW, 4)
    assert record.metrics.lines == 3 and record.planned == 4 and record.objective == "PolicyGradient"
    assert record.metrics.at == Position(3, 12, 80)
    assert record.settings["objective.scale_rewards"] == "batch"  # 0.1 wrote spread: global
    text = page_of(run)
    assert text.count("<polyline") >= 3 * 6 and "network evaluations" in text
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("max_rollouts: null", "max_rollouts: 4"))
    (card,) = run_page([read_run("old", run, NOW, 4)], NOW).cards
    assert ("rollouts", "3 of 4") in card.facts and card.share == 0.75


def test_a_torn_line_is_no_fault_and_a_broken_one_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", lines(), finished=False)
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole + '{"step": 5, "los')
    assert (read_run("run", run, NOW, 4).metrics.lines, read_run("run", run, NOW, 4).metrics.unread) == (5, 0)
    (run / "metrics.jsonl").write_text('nonsense\n[1]\n{"step": "x"}\n' + whole + "[" * 100_000 + "\n")
    metrics = read_run("run", run, NOW, 4).metrics
    assert (metrics.lines, metrics.unread) == (5, 4)
    assert "4 of metrics.jsonl, left out" in page_of(run)


def test_values_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    rows = [*lines(), {"step": 5, "loss": float("nan")}, {"step": 6, "loss": 10**400}, {"step": 7, "loss": True}]
    rows += [{"step": 8, "loss": 1e308, "time": float("nan")}, {"step": 8, "loss": -1e308}, {"step": 1e308, "loss": 1}]
    rows += [{"step": 9, "tiny": 5e-324, "half \ud800": 1.0}]  # a sum, a range, a ratio of such are none
    run = make_run(tmp_path / "run", rows)
    curve = read_run("run", run, NOW, 4).metrics.curves["loss"]
    assert len(curve.buckets) == 4 and curve.broken == 4
    assert "4 not finite, left out" in page_of(run) and main([str(run)]) == 0


def test_steps_that_were_taken_again_replace_the_first_ones(tmp_path: Path) -> None:
    """A log of a run that went on from step 2, as other tools leave it: ours forget before they go on."""
    again = [row | {"loss": 5.0} for row in lines() if row["step"] > 2]
    metrics = read_run("run", make_run(tmp_path / "run", [*lines(), *again]), NOW, 4).metrics
    assert [bucket.mean for bucket in metrics.curves["loss"].buckets] == [1, 0.5, 5, 5]
    assert metrics.at == Position(4, 32, 48)


def test_a_long_curve_keeps_its_extremes_in_little_memory() -> None:
    curve = Curve()
    for step in range(20_000):
        curve.add(Position(step), 1000.0 if step == 7777 else -5.0 if step == 8888 else float(step % 2))
    assert BUCKETS <= len(curve.buckets) <= 2 * BUCKETS
    assert sum(bucket.count for bucket in curve.buckets) == 20_000
    assert sum(bucket.total for bucket in curve.buckets) == 10_000 + 999 - 5
    assert max(bucket.high for bucket in curve.buckets) == 1000 and min(bucket.low for bucket in curve.buckets) == -5
    assert {bucket.count for bucket in curve.buckets[:-1]} == {curve.size}
    ends = [(bucket.first.updates, bucket.last.updates) for bucket in curve.buckets]
    assert ends[0][0] == 0 and ends[-1][1] == 19_999 and all(a[1] + 1 == b[0] for a, b in pairwise(ends))


@pytest.mark.parametrize(
    ("lock", "finished", "age", "state"),
    [
        (None, True, 0, State.FINISHED),
        (None, False, 0, State.INTERRUPTED),
        (None, True, -500, State.INTERRUPTED),  # weights of an earlier end; the run went on after it
        ("process {own} on {node} since today", False, 0, State.RUNNING),
        ("process 2147483646 on {node} since today", True, 0, State.INTERRUPTED),
        ("process 1 on elsewhere since today", False, 0, State.RUNNING),
        ("process 1 on elsewhere since today", False, 10_000, State.INTERRUPTED),
    ],
)
def test_how_a_run_stands(lock: str | None, finished: bool, age: float, state: State, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", lines(), finished=finished)
    if finished and age < 0:
        os.utime(run / "pytorch_lora_weights.safetensors", (NOW + age, NOW + age))
    if lock is not None:
        (run / ".lock").write_text(lock.format(own=os.getpid(), node=platform.node()))
    assert read_run("run", run, NOW + max(age, 0), 4).state is state
    assert f">{state.value}</span>" in page_of(run, now=NOW + max(age, 0))


def test_a_run_without_a_line_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [], finished=False)
    (run / "metrics.jsonl").unlink()
    (run / ".lock").write_text(f"process {os.getpid()} on {platform.node()} since today")
    text = page_of(run)
    assert "none yet" in text and "still going" in text and "<polyline" not in text


# the page
def test_the_page_is_one_file_that_asks_nobody_and_is_always_the_same(tmp_path: Path) -> None:
    runs = [evaluated(make_run(tmp_path / name, lines(), grids=(0, 4))) for name in ("a", "b")]
    text = page_of(*runs)
    assert text == page_of(*runs) == page_of(*runs, now=NOW + 1e6)  # nothing of a finished run depends on the time
    assert all(source.startswith("data:image/jpeg;base64,") for source in re.findall(r'src="([^"]*)"', text))
    assert not re.search(r"<link|<iframe|@import|url\(|href=", text)
    assert "default-src 'none'; img-src data:" in text and "script-src 'sha256-" in text
    running = runs[0]
    (running / ".lock").write_text("process 1 on elsewhere since today")
    assert page_of(running) != page_of(running, now=NOW + 500)  # one that goes on says since when it is silent


def test_text_of_others_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    row = lines()[1] | {f"rollout/reward/{evil}": 1.0, f"{evil}": 2.0}
    run = evaluated(make_run(tmp_path / 'a"><b>', [*lines(), row | {"step": 5}], prompts=(evil,), grids=(0,)))
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + json.dumps({"x": evil})[1:-1] + "\n")
    text = page_of(run)
    assert text.count("<script>") == 1 and "alert(&#34;x&#34;)" in text
    assert "a <i> star" not in text and "a &lt;i&gt; star" in text and 'a"><b>' not in text


def test_pictures_are_bounded(tmp_path: Path) -> None:
    prompts = [f"prompt {k}" for k in range(12)]
    run = make_run(tmp_path / "run", lines(), prompts=prompts, grids=range(0, 120, 3))
    page = run_page([read_run("run", run, NOW, 12)], NOW)
    assert len(page.strips[0].frames) == FRAMES and (page.steps[0], page.steps[-1]) == (0, 117)
    assert all(len(frame.tiles) == 8 for frame in page.strips[0].frames)
    many = run_page([read_run(str(k), run, NOW, 12) for k in range(8)], NOW)
    assert sum(len(frame.tiles) for strip in many.strips for frame in strip.frames) <= 480


def test_a_picture_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    run = evaluated(make_run(tmp_path / "run", lines(), grids=(0, 2, 4)))
    (run / "samples/step-000002.png").write_bytes(b"no image")
    (run / "evaluation/images/tuned/00000.png").write_bytes(b"no image")
    text = page_of(run)
    assert "1 grids cannot be read" in text and text.count('alt="tuned"') == 1 and text.count('alt="base"') == 2


def test_a_grid_is_cut_as_it_was_made(tmp_path: Path) -> None:
    for count in (1, 3, 6):
        images = torch.rand(count, 3, 130, 130)
        save_grid(images, ["x"] * count, tmp_path / "grid.png")
        with Image.open(tmp_path / "grid.png") as sheet:
            cut = cut_grid(sheet, count)
            assert cut is not None and cut_grid(sheet, count + 4) is None and cut_grid(sheet, 0) is None
        assert all(not ImageChops.difference(a, to_pil(b)).getbbox() for a, b in zip(cut, images, strict=True))


def test_before_and_after(tmp_path: Path) -> None:
    text = page_of(evaluated(make_run(tmp_path / "run", lines())))
    assert "0.750 (0.500–0.900)" in text and "<b>0.875</b>" in text and text.count("<article>") == 2
    old = page_of(evaluated(make_run(tmp_path / "old", lines()), keeps_pictures=False))
    assert "0.750" in old and "the pictures of both, side by side" in old


def test_runs_side_by_side(tmp_path: Path) -> None:
    first = make_run(tmp_path / "x/run", lines(), grids=(0, 4))
    second = make_run(tmp_path / "y/run", LOGGED["dpo_shapes.yaml"], config=CONFIG.replace("0.001", "0.01"))
    assert list(named([str(first), str(second)])) == ["x/run", "y/run"]
    assert list(named([f"one={first}", str(second)])) == ["one", "y/run"]
    report([f"one={first}", str(second)], tmp_path / "page.html", NOW)
    text = (tmp_path / "page.html").read_text()
    assert re.search(r">learning_rate</th><td>0.001</td><td>0.01</td>", text)
    assert ">max_train_steps</th>" not in text  # the same in both
    loss = re.search(r"<code>loss</code>", text)
    assert loss and {"one", "y/run", "y/run, held out"} <= set(re.findall('data-name="([^"]+)"', text))
    assert "Not known against pictures" in text  # what only the run on pairs has logged


def test_the_command_writes_beside_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", lines())
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{tmp}/nowhere"], "is no folder; expected the run folder"),
        (["{tmp}"], "is no run folder .no config.yaml.; give the runs below it: .*good"),
        (["{tmp}/broken"], "config.yaml is no YAML"),
        (["{tmp}/empty"], "holds nothing; expected settings"),
        (["{tmp}/good", "{tmp}/./good"], "is given twice"),
        (["{tmp}/good"] * 9, "9 runs are more than a page can tell apart; give at most 8"),
        (["a={tmp}/good", "a={tmp}/empty"], "two runs are named a"),
        (["{tmp}/good", "--output", "{tmp}"], "--output is the folder"),
    ],
)
def test_bad_input_is_told_in_a_line(
    words: Sequence[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "good", lines())
    (tmp_path / "good/run.json").write_text("{}")
    make_run(tmp_path / "broken", lines(), config="a: [")
    make_run(tmp_path / "empty", lines(), config="# nothing")
    assert main([word.format(tmp=tmp_path) for word in words]) == 2
    told = capsys.readouterr().err
    assert re.search(said, told) and told.count("\n") == 1


def test_nine_records_are_refused(tmp_path: Path) -> None:
    record = read_run("run", make_run(tmp_path / "run", lines()), NOW, 4)
    with pytest.raises(UserError, match="at most 8"):
        run_page([record] * 9, NOW)


def test_axes_have_round_ticks_that_can_be_told_apart() -> None:
    for low, high in ((0, 1), (0.9999, 1.0001), (-3e-9, 5e-9), (0, 24), (1e4, 1.002e4), (-0.2, 0.15), (0, 3.1e6)):
        marks, step = ticks(low, high, 4)
        texts = [tick(mark, step) for mark in marks]
        assert 2 <= len(marks) <= 5 and len(set(texts)) == len(texts), texts
        assert all(low - step / 1e3 <= mark <= high + step / 1e3 for mark in marks) and max(map(len, texts)) <= 8
    assert [number(v) for v in (0.0, 0.01234, -1.5, 3000.4, 24_300, 1.2e-7)] == [
        "0",
        "0.0123",
        "−1.5",
        "3,000",
        "24.3k",
        "1.20e-7",
    ]


ARGUMENTS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
ARGUMENTS += " --disable-component-update --disable-sync"


@pytest.mark.browser
def test_in_a_browser(tmp_path: Path) -> None:
    """Offline, at a phone's width: nothing is asked for, nothing fails, and what can be moved moves."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on the path")
    first = evaluated(make_run(tmp_path / "a", lines(), grids=(0, 2, 4)))
    second = make_run(tmp_path / "b", LOGGED["dpo_shapes.yaml"])
    page_file = report([str(first), str(second)], tmp_path / "page.html", NOW)
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=chromium, args=ARGUMENTS.split())
        page = browser.new_context(viewport={"width": 360, "height": 740}, offline=True).new_page()
        faults: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        shown = page.locator(".tiles:visible")
        assert shown.get_attribute("data-step") == "4"
        page.locator("input[type=range]").focus()
        page.keyboard.press("ArrowLeft")
        assert shown.get_attribute("data-step") == "2" and page.locator(".time output").inner_text() == "update 2"
        plot = page.locator(".panel:has(code:text-is('loss')) .plot:visible")
        assert plot.locator("svg").get_attribute("data-axis") == "updates"
        page.locator("label", has_text="pictures").first.click()
        assert plot.locator("svg").get_attribute("data-axis") == "pictures"
        plot.locator("svg").hover(position={"x": 200, "y": 60})
        assert re.match(r"pictures: \d+\s+a \d", plot.locator(".tip").inner_text())
        page.locator("label.r0").click()  # the only run that has pictures goes
        assert not plot.locator("g.run").first.is_visible()
        assert all(url.startswith(("file:", "data:")) for url in asked) and not faults
        browser.close()
