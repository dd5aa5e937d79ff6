"""Benches from the command down to the figures: prompts in the bench's own layout, a stand-in scorer, the report."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.bench import main
from align.common.errors import UserError
from align.evaluation import bench_spec as benches
from align.evaluation import pictures
from align.evaluation.bar_chart import Panel, Value, chart
from align.evaluation.bench_cost import Pace
from align.evaluation.bench_prompts import read_rows
from align.evaluation.bench_report import write_geneval
from align.evaluation.bench_spec import load_spec
from align.evaluation.compare import compare, overall
from align.evaluation.intervals import task_intervals
from align.evaluation.pictures import PictureFolder, Wanted
from align.evaluation.ticks import ticks
from rewards.common.files import locked
from tests.bench_files import write_all

PARTI = (
    "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tx\n"
    "two red stars\tArts\tBasic\t\na star\tArts\tQuantity\t\n"
)
GENEVAL = [
    {"tag": "counting", "include": [{"class": "star", "count": 2}], "prompt": "two red stars"},
    {"tag": "counting", "include": [{"class": "star", "count": 1}], "prompt": "a star"},
    {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": "a red circle"},
]


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """Prompts in each bench's layout."""
    (tmp_path / "PartiPrompts.tsv").write_text(PARTI)
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GENEVAL))
    (tmp_path / "benchmark").mkdir()
    for style in ("anime", "photo"):
        (tmp_path / f"benchmark/{style}.json").write_text(json.dumps([f"a {style} star", f"two {style} circles"]))
    rows = [{"prompt": text, "gen_image_path": "", "metadata": {}} for text in ("a star", "a fox")]
    (tmp_path / "sdpo.json").write_text(json.dumps(rows))
    (tmp_path / "drawbench.csv").write_text("Prompts,Category\nA red colored car.,Colors\na star,Counting\n")
    return {
        "partiprompts": tmp_path / "PartiPrompts.tsv",
        "geneval-owlv2": tmp_path / "evaluation_metadata.jsonl",
        "hpsv2": tmp_path / "benchmark",
        "drawbench": tmp_path / "drawbench.csv",
        **write_all(tmp_path),
    } | dict.fromkeys(("sdpo-parti", "sdpo-papv2", "sdpo-hpsv2"), tmp_path / "sdpo.json")


def run(name: str, model: Path, prompts: Path | None, output: Path, *more: str) -> int:
    """One step, 16 pixels."""
    small = ["--num_inference_steps", "1", "--resolution", "16", "--output_dir", str(output), "--batch_size", "2"]
    return main([name, "--models", str(model), *(["--prompts", str(prompts)] if prompts else []), *small, *more])


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("dpg", "geneval-owlv2", "hpsv2", "oneig-alignment", "t2i-compbench", "drawbench")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in benches.names()
        if name != "shapes"
    ],
)
def test_a_bench_from_its_layout_to_its_report(
    name: str,
    places: dict[str, Path],
    tiny_folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scorer = "tests.odd_rewards.Counts" if name == "geneval-owlv2" else "tests.odd_rewards.Letters"
    assert run(name, tiny_folders["flow"], places[name], tmp_path / "out", "--reward", scorer) == 0
    report = json.loads((tmp_path / "out/bench.json").read_text())
    rows, _ = read_rows(load_spec(name), str(places[name]))
    assert report["prompts"] == len(rows) and report["differences"]
    entry = report["rewards"][scorer]
    column = load_spec(name).task_column
    if name == "geneval-owlv2":
        assert entry["tasks"] == {"counting": {"flow": 1.5}, "colors": {"flow": 1.0}}
        assert entry["flow_overall"] == 1.25  # the mean over tasks, not over images
    else:
        assert entry["flow_mean"] == pytest.approx(np.mean([len(row["prompt"]) for row in rows]))
        assert ("tasks" in entry) is (column is not None)
    page = (tmp_path / "out/bench.md").read_text()
    assert all(row.source in page for row in load_spec(name).published)
    assert "not the bench's: num_inference_steps 1" in page and "guidance" in page
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bench"] == name


def test_what_is_killed_goes_on_without_a_changed_byte(
    tiny_folders: dict[str, Path], places: dict[str, Path], tmp_path: Path
) -> None:
    arguments = ("partiprompts", tiny_folders["epsilon"], places["partiprompts"])
    reward = ("--reward", "tests.odd_rewards.Letters", "--seed", "3")
    assert run(*arguments, tmp_path / "whole", *reward) == 0
    assert run(*arguments, tmp_path / "cut", *reward) == 0
    for path in (tmp_path / "cut").iterdir():  # as after a kill in the second batch
        if path.name != "images":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "cut/images/epsilon/00002.png").unlink()
    assert run(*arguments, tmp_path / "cut", *reward) == 0
    for file in (f for f in (tmp_path / "whole").rglob("*") if f.suffix in (".png", ".parquet", ".md")):
        assert (tmp_path / "cut" / file.relative_to(tmp_path / "whole")).read_bytes() == file.read_bytes(), file


def test_shards_are_the_whole(
    tiny_folders: dict[str, Path], places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a process of its own, which the first one's lock does not stop, and the first waits for the others."""
    monkeypatch.setattr(pictures, "PATIENCE", 0.5)
    arguments = ("partiprompts", tiny_folders["epsilon"], places["partiprompts"])
    reward = ("--reward", "tests.odd_rewards.Letters")
    assert run(*arguments, tmp_path / "whole", *reward) == 0
    shares = tmp_path / "shares"
    assert run(*arguments, shares, *reward, "--shard", "1/2") == 2  # the other's pictures do not come
    with locked(shares):
        assert run(*arguments, shares, *reward, "--shard", "2/2") == 0
    assert not (shares / "bench.json").exists()
    assert run(*arguments, shares, *reward, "--shard", "1/2") == 0
    for file in (tmp_path / "whole/images").rglob("*.png"):
        assert (shares / file.relative_to(tmp_path / "whole")).read_bytes() == file.read_bytes()
    reports = [json.loads((folder / "bench.json").read_text())["rewards"] for folder in (tmp_path / "whole", shares)]
    assert reports[0] == reports[1]


def test_a_model_that_gets_nothing_right_is_no_fault_of_the_scorer(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    assert run("shapes", tiny_folders["flow"], None, tmp_path / "out", "--max_prompts", "4") == 0
    report = json.loads((tmp_path / "out/bench.json").read_text())
    assert report["rewards"]["Shapes (strict)"]["flow_mean"] == 0


def test_a_scorer_that_does_not_heed_what_it_is_told_is_caught(
    tiny_folders: dict[str, Path], places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("geneval-owlv2", tiny_folders["flow"], places["geneval-owlv2"], tmp_path / "out")
    assert run(*arguments, "--reward", "JPEGCompressibility") == 2
    assert "gives 3 pictures the same scores whatever metadata they come with" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # nothing was drawn for it


def test_the_official_file_is_known_by_its_size_and_hash(places: dict[str, Path], tmp_path: Path) -> None:
    spec = load_spec("partiprompts")
    rows, told = read_rows(spec, str(places["partiprompts"]))
    assert [row["prompt"] for row in rows] == ["bond", "two red stars", "a star"]
    assert rows[2] == {"prompt": "a star", "Category": "Arts", "Challenge": "Quantity", "Note": ""}
    assert told == ["3 prompts, 1632 in the bench", f"the prompt file has {len(PARTI)} bytes, the official one 123107"]
    (tmp_path / "same-size.txt").write_text("word\n" * 24621 + "x\n")
    assert read_rows(spec, str(tmp_path / "same-size.txt"))[1][1:] == [
        "the prompt file has another SHA-256 than the official one"
    ]


def test_genevals_layout_is_what_its_scorer_reads(tmp_path: Path) -> None:
    """``evaluate_images.py`` asks for numbered folders with metadata.jsonl and samples; ``summary_scores.py`` groups
    ``correct`` by ``tag`` and ``metadata``."""
    wanted = [
        Wanted(str(row["prompt"]), k, {k: v for k, v in row.items() if k != "prompt"})
        for row in GENEVAL
        for k in (0, 1)
    ]
    folder = PictureFolder(tmp_path / "images", wanted, 4)
    folder.path.mkdir()
    for number in range(6):
        folder.file(number).write_bytes(b"picture %d" % number)
    write_geneval(tmp_path / "geneval", folder, {"r": np.array([1.0, 0, 1, 1, 0, 0])}, 2)
    assert sorted(path.name for path in (tmp_path / "geneval").iterdir()) == [
        "00000",
        "00001",
        "00002",
        "results.jsonl",
    ]
    assert json.loads((tmp_path / "geneval/00002/metadata.jsonl").read_text()) == GENEVAL[2]
    assert (tmp_path / "geneval/00001/samples/0001.png").read_bytes() == b"picture 3"
    lines = [json.loads(line) for line in (tmp_path / "geneval/results.jsonl").read_text().splitlines()]
    groups: dict[str, list[bool]] = {}
    for line in lines:
        assert json.loads(line["metadata"])["prompt"] == line["prompt"] and os.path.isfile(line["filename"])
        groups.setdefault(line["tag"], []).append(line["correct"])
    assert {tag: np.mean(values) for tag, values in groups.items()} == {"counting": 0.75, "colors": 0.0}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nothing"], "there is no bench 'nothing'; known are dpg, drawbench"),
        (["partiprompts"], "say which models"),
        (["sdpo-papv2", "--models", "shapes-sd"], "give its prompts, prompts/papv2.json"),
        (["shapes", "--models", "shapes-sd", "--shard", "9/8"], "expected i/n"),
        (["shapes", "--models", "shapes-sd", "--batch_size", "0"], "batch_size must be at least 1"),
        (["shapes", "--models", "nowhere/lora.safetensors"], "nowhere/lora.safetensors"),
        (["hpsv2", "--models", "shapes-sd", "--prompts", "nowhere"], "there is no nowhere"),
    ],
)
def test_mistakes_are_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and told in error[0]


def test_the_list_and_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == set(benches.names())
    assert main(["shapes", "--models", "[shapes-sd,shapes-sd3]", "--dry_run"]) == 0
    told = capsys.readouterr().out
    assert "240 prompts x 2 = 480 pictures of each of 2 models" in told and "protocol: as the bench has it" in told


def test_a_plan_with_its_time(
    tiny_folders: dict[str, Path], places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluations without weights; with ``measure`` the time, of a batch that is drawn and scored."""
    words = ("partiprompts", tiny_folders["epsilon"], places["partiprompts"], tmp_path / "out", "--dry_run")
    assert run(*words, "--guidance_scale", "4", "--reward", "tests.odd_rewards.Letters") == 0
    told = capsys.readouterr().out
    assert "epsilon: 3 pictures, 6 network evaluations, 2 a picture" in told and "by one process" not in told
    assert run(*words, "--guidance_scale", "1", "--measure", "--reward", "tests.odd_rewards.Letters") == 0
    told = capsys.readouterr().out
    assert "epsilon: 3 pictures, 3 network evaluations, 1 a picture" in told
    assert re.search(
        r"epsilon: \S+ s a picture to draw and \S+ s to score, measured on 2 on cpu: about 0 min \d+ s", told
    )
    assert not (tmp_path / "out").exists()
    assert Pace(2.0, 0.5, 4).told(3000, "cpu").endswith("measured on 4 on cpu: about 2 h 5 min by one process")


def test_the_chart_says_what_the_figures_do() -> None:
    """A bar of twice the value is twice as long; scores far from 0 are points on an axis of their own."""
    rows = {"all": {"a": Value(0.25, 0.25, 0.25)}, "one": {"a": Value(0.5, 0.5, 0.5)}}
    pixels = np.asarray(chart([Panel("share", rows)], "t").convert("RGB"))
    blue = (pixels == np.array([0x00, 0x72, 0xB2])).all(2)
    lengths = [int(line.sum()) for line in blue if line.sum() > 20]
    short, long = min(lengths), max(lengths)
    assert long / short == pytest.approx(2, rel=0.02)
    assert Panel("share", rows).axis[2] and Panel("share", rows).axis[0] == 0
    far = Panel("PickScore", {"all": {"a": Value(22.0, 21.9, 22.1), "b": Value(21.5, 21.4, 21.6)}})
    low, high, bars = far.axis
    assert not bars and 21.3 < low < 21.4 and 22.1 < high < 22.2
    assert Panel("ImageReward", {"all": {"a": Value(-0.2, -0.4, 0.1)}}).axis[2]
    assert ticks(0.0, 1.0, 5)[0] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(21.38, 22.12, 5)[0] == pytest.approx([21.4, 21.6, 21.8, 22.0])
    chart([Panel("same", {"all": {"a": Value(0.0, 0.0, 0.0)}})], "nothing but zeros")


def test_means_are_over_tasks_or_over_prompts() -> None:
    scores = {"a": {"r": np.array([1.0, 0, 0, 0])}}
    entries = [compare(scores, ["x", "y", "y", "y"], 1, "r", mean)["rewards"]["r"] for mean in ("tasks", "prompts")]
    assert [overall(entry, "a") for entry in entries] == [0.5, 0.25]
    assert entries[0]["tasks"] == entries[1]["tasks"] == {"x": {"a": 1.0}, "y": {"a": 0.0}}
    assert task_intervals({"a": scores["a"]["r"]}, ["x", "y", "y", "y"], 1) == {"x": {"a": (1, 1)}, "y": {"a": (0, 0)}}


def test_a_file_of_tabs_may_have_quotes_that_are_its_own(tmp_path: Path) -> None:
    """PartiPrompts.tsv has one line that begins with a quoted word, which CSV does not allow."""
    text = PARTI + '"GIGGLE" as graffiti\tArts\tBasic\t\na "fox"\tArts\tBasic\tn\n'
    (tmp_path / "PartiPrompts.tsv").write_text(text)
    rows, _ = read_rows(load_spec("partiprompts"), str(tmp_path / "PartiPrompts.tsv"))
    assert [row["prompt"] for row in rows][-2:] == ['"GIGGLE" as graffiti', 'a "fox"'] and rows[-1]["Note"] == "n"
    (tmp_path / "quoted.tsv").write_text('Prompt\tNote\n"a ""fox"""\t"x\ty"\n')
    rows, _ = read_rows(load_spec("partiprompts"), str(tmp_path / "quoted.tsv"))
    assert rows == [{"prompt": 'a "fox"', "Note": "x\ty"}]


def test_a_bench_of_ones_own(tmp_path: Path) -> None:
    spec: dict[str, Any] = {
        "title": "Mine", "about": "Mine.", "reward": ["Shapes"], "canary": "prompt", "protocol": {},
        "prompts": {"where": "here", "licence": "CC0", "column": "prompt"},
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(json.dumps(spec))
    assert load_spec(str(tmp_path / "mine.yaml")).name == "mine"
    wrong = {
        "canaries": {"canaries": 1}, "expected a list of rewards": {"reward": "Shapes"},
        "expected prompt or": {"canary": "x"}, "mean is 'median'": {"mean": "median"},
        "protocol has 'two'": {"protocol": {"num_inference_steps": "two"}}, "scale has": {"scale": {"r": "ten"}},
        "expected at least 1": {"protocol": {"samples_per_prompt": 0}},
        "published has 'high'": {"published": [{"model": "m", "reward": "r", "value": "high", "source": "s"}]},
    }  # fmt: skip
    for told, change in wrong.items():
        (tmp_path / "mine.yaml").write_text(json.dumps(spec | change))
        with pytest.raises(UserError, match=told):
            load_spec(str(tmp_path / "mine.yaml"))
