"""Base against tuned, from the command down to the figures."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from align import families
from align.common.errors import UserError
from align.evaluate import main
from align.evaluation import intervals, pictures
from align.evaluation.compare import Comparison, compare
from align.evaluation.intervals import bootstrap
from align.evaluation.pictures import METADATA, Drawing, PictureFolder, Wanted, noise_seed
from align.families import LORA_FILE
from align.policy.policy import LoRA, Policy
from align.sampling import generate
from rewards.common.device import Launched
from rewards.common.page import Table
from rewards.data.formats import open_input
from rewards.data.images import decode_tensor
from tests.helpers import HOSTILE, launch_together, texts_of
from tests.pipelines import Build
from tests.test_policy import disturb


def test_win_rate_counts_ties_as_half_and_clusters_by_prompt() -> None:
    scores = {
        "base": {"r": np.array([0.0, 0.0, 1.0, 1.0])},
        "tuned": {"r": np.array([1.0, 0.0, 1.0, 0.0])},
    }
    report = compare(scores, ["x", "y"], samples=2, decides="r")
    entry = report["rewards"]["r"]
    assert report["win_rate"] == 0.5  # win, tie; tie, loss
    assert entry["win_rate_ci"] == [0.25, 0.75]  # only two prompts, with rates 0.75 and 0.25, to draw from
    assert entry["tasks"]["x"] == {"base": 0.0, "tuned": 0.5}
    assert (entry["base_overall"], entry["tuned_overall"]) == (0.5, 0.5)
    assert (entry["base_mean"], entry["tuned_median"]) == (0.5, 0.5)


def test_overall_is_the_mean_over_tasks() -> None:
    base = {"r": np.array([1.0, 0.0, 0.0, 0.0])}
    report = compare({"base": base, "tuned": base}, ["x", "y", "y", "y"], samples=1, decides="r")
    assert report["rewards"]["r"]["base_overall"] == 0.5
    assert report["rewards"]["r"]["base_mean"] == 0.25


def test_bootstrap_interval_covers_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for k in range(300):
        low, high = bootstrap((rng.random(100) < 0.6).astype(float), None, 500, k)
        hits += low <= 0.6 <= high
    assert 0.91 <= hits / 300 <= 0.98


@pytest.mark.parametrize("count", [1, 133, 1001])
def test_a_bootstrap_in_pieces_is_that_of_one(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, of odd numbers too (an index is half a word of the generator); no piece is larger than it may be."""
    values, tasks = np.random.default_rng(1).normal(size=count), [f"{k % 3}" for k in range(count)]
    whole = [bootstrap(values, kind, resamples=777) for kind in (None, tasks)]
    monkeypatch.setattr(intervals, "PIECE", 2003)
    assert [bootstrap(values, kind, resamples=777) for kind in (None, tasks)] == whole


def test_pictures_do_not_depend_on_the_batch(tiny: Build) -> None:
    family, prompts = tiny("flow"), ["two red stars", "a star", "a red circle"]
    one = generate.sample_images(family.predict, family, prompts, [3, 4, 5], 3, 2.0, batch_size=1)
    all_ = generate.sample_images(family.predict, family, prompts, [3, 4, 5], 3, 2.0, batch_size=3)
    torch.testing.assert_close(one, all_, atol=1e-5, rtol=1e-5)
    assert one.shape == (3, 3, 16, 16)


@pytest.fixture
def tuned(tiny_folders: dict[str, Path], tmp_path: Path) -> Path:
    policy = Policy(families.load(str(tiny_folders["epsilon"])), LoRA(2))
    disturb(policy, 0.1)
    policy.save(tmp_path)
    (tmp_path / "config.yaml").write_text(f"pretrained_model_name_or_path: {tiny_folders['epsilon']}\n")
    (tmp_path / "README.md").write_text("# a card\n")
    return tmp_path


def evaluate(tuned: Path, *more: str) -> int:
    few = ["--max_prompts", "6", "--num_inference_steps", "2", "--samples_per_prompt", "2", "--batch_size", "4"]
    return main(["--tuned", str(tuned), *few, *more])


def test_the_command_writes_scores_gallery_and_card(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewards = ["--reward", "[JPEGCompressibility,Shapes]"]
    assert evaluate(tuned, *rewards) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(last) == {"strict_base", "strict_tuned", "win_rate", "win_rate_ci", "gallery"}
    assert Path(last["gallery"]).read_text().count("<article>") == 6
    report = json.loads((tuned / "evaluation/scores.json").read_text())
    assert report["win_rate"] == report["rewards"]["JPEGCompressibility"]["win_rate"] == last["win_rate"]
    assert report["prompts"] == 6
    rows = [json.loads(line) for line in (tuned / "evaluation/images.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert len({row["seed"] for row in rows}) == 12
    means = np.mean([row["tuned/JPEGCompressibility"] for row in rows])
    assert report["rewards"]["JPEGCompressibility"]["tuned_mean"] == pytest.approx(means)
    assert Image.open(tuned / "evaluation/gallery.png").width > 400
    assert evaluate(tuned, *rewards) == 0
    card = (tuned / "README.md").read_text()
    assert card.startswith("# a card")
    assert card.count("base against tuned") == 1


def test_a_difference_is_paired_and_over_tasks() -> None:
    """Two tasks of unlike size: the mean over tasks, and an interval of what prompts differ in, not of their level."""
    rng = np.random.default_rng(0)
    level = rng.normal(size=60) * 100
    scores = {"base": {"r": level}, "a": {"r": level + 1}, "b": {"r": level + np.repeat([0.0, 3.0], [50, 10])}}
    entry = compare(scores, ["x"] * 50 + ["y"] * 10, 1, "r")["rewards"]["r"]
    assert entry["a_difference"] == pytest.approx(1) and np.ptp(entry["a_difference_ci"]) < 1e-9
    assert entry["b_difference"] == pytest.approx(1.5)  # (0 + 3) / 2
    assert np.ptp(entry["base_ci"]) > 10


# pictures on disk
def folder(path: Path, prompts: list[str], settings: Comparison) -> PictureFolder:
    return PictureFolder(path, settings.wanted([{"prompt": text} for text in prompts]), settings.batch_size)


PROMPTS = ["a star", "two red stars", "a red circle", "a blue square", "a"]
FEW = Drawing(2, 2.0)


def test_noise_is_named_by_prompt_and_number(tiny: Build, tmp_path: Path) -> None:
    """Another order, a subset and other batches draw the same pictures; another seed or number draws others."""
    family, settings = tiny("flow"), Comparison(samples_per_prompt=2, batch_size=3)
    whole = folder(tmp_path / "whole", PROMPTS, settings)
    whole.draw(family, FEW, Launched(), "")
    part = folder(tmp_path / "part", [PROMPTS[3], PROMPTS[0]], Comparison(samples_per_prompt=1, batch_size=2))
    part.draw(family, FEW, Launched(), "")
    assert (part[0] - whole[6]).abs().max() <= 1 / 255 and (part[1] - whole[0]).abs().max() <= 1 / 255
    seeds = {noise_seed(text, k, seed) for text in PROMPTS for k in range(3) for seed in (0, 1)}
    assert len(seeds) == 30 and all(0 <= seed < 2**63 for seed in seeds)
    old = Comparison(samples_per_prompt=2, noise="index", seed=7).wanted([{"prompt": text} for text in PROMPTS])
    assert [one.seed for one in old] == list(range(7, 17))


def test_what_a_kill_left_out_is_drawn_again_to_the_byte(tiny: Build, tmp_path: Path) -> None:
    family, settings = tiny("epsilon"), Comparison(batch_size=2)
    drawn = folder(tmp_path / "p", PROMPTS, settings)
    drawn.draw(family, FEW, Launched(), "")
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in drawn.path.iterdir()}
    drawn.file(2).unlink()
    again = folder(tmp_path / "p", PROMPTS, settings)
    again.draw(family, FEW, Launched(), "")
    after = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in again.path.iterdir()}
    assert {name: data for name, (data, _) in before.items()} == {name: data for name, (data, _) in after.items()}
    assert {name for name in before if before[name][1] != after[name][1]} == {"00002.png", "00003.png"}  # its batch
    lines = [json.loads(line) for line in (again.path / METADATA).read_text().splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS and lines[1]["seed"] == noise_seed(PROMPTS[1], 0, 1000)
    again.draw(family, Drawing(3, 2.0), Launched(), "")
    assert all((again.path / name).read_bytes() != data for name, (data, _) in before.items() if name != METADATA)


@pytest.mark.parametrize("order", [(0, 1), pytest.param((1, 0), marks=pytest.mark.slow)])
def test_two_processes_draw_what_one_does(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[int, int]
) -> None:
    family, other = (families.load(str(tiny_folders["epsilon"])) for _ in range(2))
    settings = Comparison(batch_size=2)
    one = folder(tmp_path / "one", PROMPTS, settings)
    one.draw(family, FEW, Launched(), "")
    monkeypatch.setattr(pictures, "PATIENCE", 20)
    with ThreadPoolExecutor(2) as pool:
        shares = [folder(tmp_path / "two", PROMPTS, settings) for _ in range(2)]
        ends = [pool.submit(shares[k].draw, (family, other)[k], FEW, Launched(k, k, 2), "") for k in order]
        for end in ends:
            end.result(timeout=60)
    assert [f.read_bytes() for f in sorted((tmp_path / "two").iterdir())] == [
        f.read_bytes() for f in sorted((tmp_path / "one").iterdir())
    ]


def other_process(arguments: list[str], environment: dict[str, str]) -> None:
    """``align.evaluate`` as accelerate's launcher starts it."""
    os.environ.update(environment)
    sys.exit(main(arguments))


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_genevals_metadata_whatever_the_order_subset_or_processes(
    tiny_folders: dict[str, Path], tmp_path: Path, world: int
) -> None:
    """Of two processes that run the command, to the byte; in another order and of a part of the prompts, to the last
    bit; and the reward is told each prompt's metadata."""
    rows = [
        {"tag": "counting", "include": [{"class": "star", "count": k + 2}], "prompt": text}
        for k, text in enumerate(PROMPTS)
    ]

    def run(name: str, some: list[dict[str, Any]], world: int = 1) -> tuple[list[Path], dict[str, Any]]:
        prompts = tmp_path / f"{name}.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in some))
        options = ["--tuned", str(tiny_folders["flow"]), "--base", str(tiny_folders["epsilon"]), "--batch_size", "2"]
        options += ["--output_dir", str(tmp_path / name), "--num_inference_steps", "1", "--samples_per_prompt", "2"]
        options += ["--prompts", str(prompts), "--task_column", "tag", "--reward", "[tests.odd_rewards.Counts]"]
        if world == 1:
            assert main(options) == 0
        else:
            assert launch_together(options, world, other_process) == [0] * world
        found = json.loads((tmp_path / name / "scores.json").read_text())["rewards"]["tests.odd_rewards.Counts"]
        return sorted((tmp_path / name / "images/tuned").glob("*.png")), found

    one, entry = run("one", rows)
    assert len(one) == 10 and entry["tuned_mean"] == np.mean([2, 3, 4, 5, 6])
    if world > 1:
        several, entry = run("several", rows, world)
        assert [file.read_bytes() for file in several] == [file.read_bytes() for file in one]
        assert entry["tuned_mean"] == 4
    part, entry = run("part", [rows[3], rows[1]])
    assert entry["tuned_mean"] == (5 + 3) / 2
    whole = [decode_tensor(one[k]).short() for k in (6, 7, 2, 3)]
    for file, expected in zip(part, whole, strict=True):
        assert (decode_tensor(file).short() - expected).abs().max() <= 1


def test_a_folder_that_is_somebodys_is_left_alone(tiny: Build, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="was not drawn by this command"):
        PictureFolder(tmp_path / "mine", [Wanted("a star", 0, {})], 1).draw(tiny("epsilon"), FEW, Launched(), "")


@pytest.mark.parametrize("same", [True, False])
def test_a_folder_of_an_earlier_version_is_gone_on_with(tiny: Build, tmp_path: Path, same: bool) -> None:
    family = tiny("epsilon")
    folder = PictureFolder(tmp_path / "drawn", [Wanted("a star", 0, {})], 1, judged=True)
    folder.draw(family, FEW, Launched(), "")
    told = folder.record | {
        "weights": {name: folder.record["contents"][name] for name in ("unet", "text_encoder", "vae")}
    }
    del told["contents"]
    if not same:
        told["weights"]["unet"] = told["weights"]["vae"]
    (folder.path / pictures.RECORD).write_text(json.dumps(told, indent=2) + "\n")
    with contextlib.nullcontext() if same else pytest.raises(UserError, match="people have judged them"):
        folder.draw(family, FEW, Launched(), "")


@pytest.mark.parametrize("lost", ["folder", "picture"])
def test_pictures_that_vanish_midway_are_told(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    folder = PictureFolder(tmp_path / "drawn", [Wanted("a star", seed, {}) for seed in range(3)], 1)
    save = pictures.save_png

    def vanishing(image: Image.Image, path: Path) -> None:
        save(image, path)
        if path.name == "00001.png":
            shutil.rmtree(folder.path) if lost == "folder" else path.unlink()

    monkeypatch.setattr(pictures, "save_png", vanishing)
    with pytest.raises(UserError, match="moved, deleted or changed while it was drawn"):
        folder.draw(tiny("epsilon"), FEW, Launched(), "")
    assert folder.path.exists() == (lost == "picture")
    monkeypatch.setattr(pictures, "save_png", save)
    folder.draw(tiny("epsilon"), FEW, Launched(), "")
    assert all(folder.file(number).is_file() for number in range(3))


def test_several_models_and_what_a_prompt_file_says(
    tuned: Path, tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GenEval's metadata reaches the reward; a LoRA file and a whole pipeline stand beside the run."""
    rows = [
        {"tag": "counting", "include": [{"class": "star", "count": 2}], "prompt": "two red stars"},
        {"tag": "colors", "include": [{"class": "circle", "count": 5}], "prompt": "a red circle"},
    ]
    prompts = tmp_path / "evaluation_metadata.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = [str(tuned), str(tuned / LORA_FILE), str(tiny_folders["flow"])]
    options = ["--tuned", json.dumps(models), "--output_dir", str(tmp_path / "out"), "--num_inference_steps", "1"]
    options += ["--prompts", str(prompts), "--task_column", "tag", "--reward", "[tests.odd_rewards.Counts]"]
    assert main(options) == 0
    report = json.loads((tmp_path / "out/scores.json").read_text())
    assert report["models"] == ["base", tuned.name, "pytorch_lora_weights", "flow"]
    entry = report["rewards"]["tests.odd_rewards.Counts"]
    assert entry["tasks"] == {
        "counting": dict.fromkeys(report["models"], 2),
        "colors": dict.fromkeys(report["models"], 5),
    }
    same = [(tmp_path / "out/images" / name / "00000.png").read_bytes() for name in report["models"]]
    assert same[1] == same[2] != same[0] and same[3] not in same[:3]
    assert f"{tuned.name}, win rate" in capsys.readouterr().out
    assert open_input(str(tmp_path / "out/images/flow")).listed[1].metadata["include"] == rows[1]["include"]


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_an_untrained_lora_wins_exactly_half(tuned: Path, precision: str) -> None:
    weights = {name: torch.zeros_like(value) for name, value in load_file(tuned / LORA_FILE).items()}
    save_file(weights, tuned / LORA_FILE)
    assert evaluate(tuned, "--reward", "[JPEGCompressibility]", "--mixed_precision", precision) == 0
    report = json.loads((tuned / "evaluation/scores.json").read_text())
    assert (report["win_rate"], report["win_rate_ci"]) == (0.5, [0.5, 0.5])


def test_prompt_files(tuned: Path) -> None:
    (tuned / "prompts.txt").write_text("a star\ntwo red stars\n")
    assert evaluate(tuned, "--prompts", str(tuned / "prompts.txt"), "--reward", "[JPEGCompressibility]") == 0
    assert json.loads((tuned / "evaluation/scores.json").read_text())["prompts"] == 2


def test_hostile_prompts_are_text_on_the_page_and_in_the_card(tuned: Path, tmp_path: Path) -> None:
    rows = [{"prompt": text, "task": text} for text in HOSTILE]
    (tuned / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / HOSTILE[1].replace("/", "_")
    options = ["--prompts", str(tuned / "prompts.jsonl"), "--reward", "[JPEGCompressibility]"]
    assert evaluate(tuned, *options, "--output_dir", str(output)) == 0
    shown = texts_of((output / "gallery.html").read_text())
    assert all(text in shown for text in HOSTILE)
    assert all(f"JPEGCompressibility: {text}" in shown for text in HOSTILE)
    card = (tuned / "README.md").read_text()
    assert not re.search(r"(?<!\\)(<script|<img|\[a star)", card)
    table = [line for line in card.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {6} and len(table) == 2 + 1 + len(HOSTILE) + 1


def test_a_table_reads_as_its_cells_do() -> None:
    text = Table(("", "a|b"), [[r"one \ two_", "`x` | <b>*y*</b>"], ["[z](javascript:0)"]]).markdown()
    assert text.splitlines() == [
        r"|  | a\|b |",
        "|---|---|",
        r"| one \\ two\_ | \`x\` \| \<b\>\*y\*\</b\> |",
        r"| \[z\](javascript:0) |  |",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward", "[Nothing]"], "Nothing"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--base", "./nowhere"], "no model_index.json"),
        (["--num_inference_steps", "0"], "steps must be at least 1"),
        (["--samples_per_prompt", "1", "--diversity_features", "./nowhere"], "give samples_per_prompt of at least 2"),
        (["--diversity_features", "./nowhere"], "'./nowhere' is no vision model"),
        (["--samples_per_prompt", "0"], "samples_per_prompt must be at least 1"),
    ],
)
def test_mistakes_are_one_line(
    tuned: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert evaluate(tuned, *arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert message in error[0] and not (tuned / "evaluation").exists()


@pytest.mark.parametrize("mistake", ["nothing tuned in", "cannot write into"])
def test_nothing_is_drawn_for_nothing(
    tuned: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    monkeypatch.setattr(pictures, "draw", lambda *_: pytest.fail("drawn for nothing"))
    if mistake == "nothing tuned in":
        (tuned / LORA_FILE).unlink()
    else:
        (tuned / "evaluation").touch()
    assert evaluate(tuned) == 2
    assert mistake in capsys.readouterr().err


def test_a_folder_that_is_no_run_asks_for_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(tmp_path) == 2
    assert "--base MODEL" in capsys.readouterr().err
