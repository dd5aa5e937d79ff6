"""Agreement with human choices: figures are those of loops over the pairs, in every layout; mistakes are one line."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from rewards.agree import main
from rewards.agreement import accuracy, kendall, spearman
from rewards.presets import PRESETS, best_threshold, points, points_of_tie

BRIGHT, RED = "tests.test_agree.Bright", "tests.test_agree.Red"
ENDED = [f"--reward={BRIGHT}", f"--reward={RED}"]


class Bright:
    """The sum of all levels, a whole number, so that equal is equal."""

    differentiable = True

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        return (images * 255).round().sum((1, 2, 3))


class Red(Bright):
    """The red channel, which this data has in four steps, so that scores are often equal."""

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        return (images[:, 0] * 255).round().sum((1, 2))


class Nan(Bright):
    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        return torch.tensor([math.nan if prompt == "prompt 2" else 0.0 for prompt in prompts])


def picture(red: int, grey: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (5, 4), (red, grey, grey)).save(out, "PNG")
    return out.getvalue()


class World:
    """Twelve groups of three pictures of a prompt, four prompts in all; people's marks of each, some of them equal."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.prompts = [f"prompt {k % 4}" for k in range(12)]
        self.red = rng.integers(0, 4, (12, 3)) * 60
        self.grey = rng.integers(0, 256, (12, 3))
        self.marks = rng.integers(1, 4, (12, 3))
        self.ranks = [[(rng.permutation(3) + 1).tolist() for _ in range(3)] for _ in range(12)]

    def png(self, group: int, which: int) -> bytes:
        return picture(int(self.red[group, which]), int(self.grey[group, which]))

    def score(self, name: str, group: int, which: int) -> float:
        red, grey = int(self.red[group, which]), int(self.grey[group, which])
        return 20.0 * (red if name == RED else red + 2 * grey)

    def hpdv2(self, folder: Path) -> Path:
        records = []
        for group, prompt in enumerate(self.prompts):
            names = [f"{group}-{which}.png" for which in range(3)]
            for which, name in enumerate(names):
                (folder / name).write_bytes(self.png(group, which))
            said = [{"rank": ranks, "user_hash": str(k)} for k, ranks in enumerate(self.ranks[group])]
            records.append({"prompt": prompt, "image_path": names, "rank": self.marks[group].tolist()})
            records[-1] |= {"raw_annotations": said}
        file = folder / "test.json"
        file.write_text(json.dumps(records))
        return file

    def pairs(self) -> list[tuple[int, int, int]]:
        """(group, winner, loser) of every two pictures; where people's marks are equal, in order of number."""
        found = []
        for group in range(12):
            for i, j in combinations(range(3), 2):
                found.append((group, i, j) if self.marks[group, i] <= self.marks[group, j] else (group, j, i))
        return found

    def tied(self, pair: tuple[int, int, int]) -> bool:
        group, i, j = pair
        return bool(self.marks[group, i] == self.marks[group, j])

    def unanimous(self, pair: tuple[int, int, int]) -> bool:
        group, i, j = pair
        return all(ranks[i] < ranks[j] for ranks in self.ranks[group])


def run(*options: str | Path, output: Path) -> dict[str, Any]:
    assert main([*map(str, options), "--output", str(output), "--batch_size", "5"]) == 0
    return dict(json.loads(output.read_text()))


def ranks(values: np.ndarray) -> np.ndarray:
    """Equal values share the mean of their places."""
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


def share(points: Sequence[float]) -> float:
    return sum(points) / len(points)


@pytest.mark.parametrize("human_ties", ["drop", "half"])
def test_figures_are_those_of_a_loop(human_ties: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World()
    report = run("--pairs", world.hpdv2(tmp_path), *ENDED, "--human_ties", human_ties, output=tmp_path / "a.json")
    chosen = [pair for pair in world.pairs() if not world.tied(pair)]
    ties = [pair for pair in world.pairs() if world.tied(pair)]
    assert len(ties) > 3 and report["human_ties"] == {"found": len(ties), "counted": human_ties}
    margins: dict[str, list[float]] = {}
    for name in (BRIGHT, RED):
        margins[name] = [world.score(name, g, i) - world.score(name, g, j) for g, i, j in chosen]
        points = [1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins[name]]
        agreed = [point for point, pair in zip(points, chosen, strict=True) if world.unanimous(pair)]
        counted = points + [0.5] * len(ties) if human_ties == "half" else points
        found = report["rewards"][name]
        assert (found["n"], found["accuracy"]) == (len(counted), pytest.approx(share(counted)))
        assert found["score_ties"] == sum(margin == 0 for margin in margins[name])
        assert found["margin"] == pytest.approx(share(margins[name]))
        assert (found["agreed"]["n"], found["agreed"]["accuracy"]) == (len(agreed), pytest.approx(share(agreed)))
        assert 0 < len(agreed) < len(chosen)
    assert report["rewards"][RED]["score_ties"] > 0 and report["rewards"][BRIGHT]["score_ties"] == 0
    signs = [(np.sign(a), np.sign(b)) for a, b in zip(margins[BRIGHT], margins[RED], strict=True)]
    tau = sum(a * b for a, b in signs) / (sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs)) ** 0.5
    (between,) = report["between"]
    assert between["rewards"] == [BRIGHT, RED] and between["kendall"] == pytest.approx(tau)
    seen = sorted({(group, which) for group, *both in chosen for which in both})
    scores = [np.array([world.score(name, group, which) for group, which in seen]) for name in (BRIGHT, RED)]
    assert between["spearman"] == pytest.approx(np.corrcoef(*map(ranks, scores))[0, 1])
    assert report["pictures"] == len(seen)
    shown = capsys.readouterr().out
    assert f"{report['rewards'][RED]['accuracy']:.3f} (" in shown and f"{tau:+.3f}" in shown


# Presets
def test_imagerewards_rule_counts_equal_scores_as_wrong() -> None:
    """``acc`` of its test.py, written down: pairs of different ranks, right only where strictly ordered."""
    ranking, rewards = [1, 2, 2, 4], [3.0, 3.0, 1.0, 2.0]
    right = total = 0
    margins = []
    for i, j in combinations(range(4), 2):
        if ranking[i] != ranking[j]:
            better, worse = (i, j) if ranking[i] < ranking[j] else (j, i)
            total, right = total + 1, right + (rewards[better] > rewards[worse])
            margins.append(rewards[better] - rewards[worse])
    assert points(PRESETS["imagereward"], np.array(margins)).tolist() == [0, 1, 1, 1, 0]  # 1-2 is a tie of scores
    assert points(PRESETS["imagereward"], np.array(margins)).mean() == right / total == 3 / 5


def test_pickapics_rule_is_its_codes() -> None:
    """``get_pred``, ``calc_score`` and the pick of the threshold of eval_preference_predictor.py, written down."""
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(200, 2)) * 2, rng.choice(["0", "1", "tie"], 200)
    scores[:20, 1] = scores[:20, 0]

    def official(threshold: float) -> float:
        total = 0.0
        for (a, b), label in zip(scores, labels, strict=True):
            one = 1 / (1 + math.exp(b - a))
            pred = "tie" if abs(1 - 2 * one) <= threshold else "0" if one > 0.5 else "1"
            total += 1 if label == pred else 0.5 if "tie" in (label, pred) else 0
        return total / len(labels)

    preset, margin = PRESETS["pickapic"], scores[:, 0] - scores[:, 1]
    won = np.where(labels == "0", margin, -margin)[labels != "tie"]
    ties = margin[labels == "tie"]
    thresholds = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    for threshold in thresholds:
        ours = np.concatenate([points(preset, won, threshold), points_of_tie(ties, threshold)]).mean()
        assert ours == pytest.approx(official(threshold))
    assert best_threshold(preset, won, ties) == pytest.approx(
        thresholds[int(np.argmax(list(map(official, thresholds))))]
    )


def test_presets_beside_the_published_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(2)
    report = run("--pairs", world.hpdv2(tmp_path), *ENDED, "--preset", "hpdv2", output=tmp_path / "a.json")
    by_prompt: dict[str, list[float]] = {}
    for group, i, j in world.pairs():
        if not world.tied((group, i, j)):
            margin = world.score(RED, group, i) - world.score(RED, group, j)
            by_prompt.setdefault(world.prompts[group], []).append(0.5 if margin == 0 else float(margin > 0))
    found = report["preset"]["rewards"][RED]
    assert found["accuracy"] == pytest.approx(share([share(each) for each in by_prompt.values()]))
    assert found["accuracy"] != pytest.approx(report["rewards"][RED]["accuracy"])  # that is over pairs
    assert "PickScore 79.8 %" in capsys.readouterr().out and report["preset"]["published"]["HPSv2"] == 83.3


def test_pickapic_scores_ties_too_and_its_threshold_comes_from_the_validation_set(tmp_path: Path) -> None:
    world, names = World(3), ("caption", "jpg_0", "jpg_1", "label_0")
    for split, pairs in {"validation": world.pairs()[:18], "test": world.pairs()[18:]}.items():
        cells = [
            (world.prompts[g], world.png(g, i), world.png(g, j), 0.5 if world.tied((g, i, j)) else 1.0)
            for g, i, j in pairs
        ]
        pq.write_table(
            pa.table(dict(zip(names, map(list, zip(*cells, strict=True)), strict=True))), tmp_path / f"{split}.parquet"
        )
    options = ["--pairs", tmp_path / "test.parquet", *ENDED, "--preset", "pickapic"]
    report = run(*options, "--validation", tmp_path / "validation.parquet", output=tmp_path / "a.json")
    test = world.pairs()[18:]
    for name in (BRIGHT, RED):
        found = report["preset"]["rewards"][name]
        counted = []
        for group, i, j in test:
            margin = world.score(name, group, i) - world.score(name, group, j)
            alike = math.tanh(abs(margin) / 2) <= found["threshold"]
            tied = world.tied((group, i, j))
            counted.append(1.0 if tied and alike else 0.5 if tied or alike else float(margin > 0))
        assert found["n"] == len(test) and found["accuracy"] == pytest.approx(share(counted))
    assert main([*map(str, options[:-1]), "hpdv2", "--validation", "x"]) == 2


def test_each_picture_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    plain = Image.open
    file = World().hpdv2(tmp_path)

    def counted(source: Any, *arguments: Any, **options: Any) -> Image.Image:
        opened.append(source)
        return plain(source, *arguments, **options)

    monkeypatch.setattr(Image, "open", counted)
    report = run("--pairs", file, *ENDED, output=tmp_path / "a.json")
    assert report["pictures"] == len(opened) == len(set(opened)) == 36


def test_every_layout_gives_the_same(tmp_path: Path) -> None:
    world = World(1)
    chosen = [pair for pair in world.pairs() if not world.tied(pair)]
    votes = [[3, 0] if world.unanimous(pair) else [2, 1] for pair in chosen]
    (tmp_path / "chosen").mkdir()
    (tmp_path / "rejected").mkdir()
    columns: dict[str, list[Any]] = {name: [] for name in ("caption", "jpg_0", "jpg_1", "label_0", "votes")}
    lines = []
    for k, ((group, i, j), (more, fewer)) in enumerate(zip(chosen, votes, strict=True)):
        prompt, winner, loser = world.prompts[group], world.png(group, i), world.png(group, j)
        for name, data in {f"chosen/{k:02d}.png": winner, f"rejected/{k:02d}.png": loser}.items():
            (tmp_path / name).write_bytes(data)
        (tmp_path / f"chosen/{k:02d}.txt").write_text(prompt)
        names = {"chosen": f"chosen/{k:02d}.png", "rejected": f"rejected/{k:02d}.png"}
        lines.append({"prompt": prompt, **names, "votes": [more, fewer]})
        first = k % 3 == 0
        cells = (prompt, winner, loser, 1.0, [more, fewer]) if first else (prompt, loser, winner, 0.0, [fewer, more])
        for name, cell in zip(columns, cells, strict=True):
            columns[name].append(cell)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "parquet/train.parquet", row_group_size=7)
    (tmp_path / "folders").mkdir()
    for side in ("chosen", "rejected"):
        (tmp_path / "folders" / side).symlink_to(tmp_path / side)
    places = {"pairs": "pairs.jsonl", "Pick-a-Pic": "parquet", "sibling folders": "folders"}
    reports = {name: run("--pairs", tmp_path / p, *ENDED, output=tmp_path / "a.json") for name, p in places.items()}
    for name, report in reports.items():
        assert report["layout"].startswith(name)
        if name == "sibling folders":  # where nobody's votes are known
            assert report["rewards"][RED].pop("agreed") is report["rewards"][BRIGHT].pop("agreed") is None
    agreed = [reports["pairs"]["rewards"][name].pop("agreed") for name in (BRIGHT, RED)]
    assert agreed == [reports["Pick-a-Pic"]["rewards"][name].pop("agreed") for name in (BRIGHT, RED)]
    assert agreed[0]["n"] == sum(map(world.unanimous, chosen)) > 0
    for key in ("rewards", "between", "pairs", "prompts"):
        assert reports["pairs"][key] == reports["Pick-a-Pic"][key] == reports["sibling folders"][key], key
    loose = run("--pairs", tmp_path / "pairs.jsonl", *ENDED, "--agreement", "0.6", output=tmp_path / "a.json")
    assert loose["rewards"][RED]["agreed"]["n"] == len(chosen)


def test_the_interval_is_over_prompts() -> None:
    rng = np.random.default_rng(3)
    points, prompts = rng.integers(0, 3, 60) / 2, [f"p{k % 20}" for k in range(60)]
    found = accuracy(points, prompts)
    groups = [[point for point, prompt in zip(points, prompts, strict=True) if prompt == f"p{k}"] for k in range(20)]
    drawn = []
    for _ in range(4000):
        taken = [point for k in rng.integers(20, size=20) for point in groups[k]]
        drawn.append(share(taken))
    assert found["interval"] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)
    # saying everything twenty times over makes nothing surer
    assert accuracy(np.tile(points, 20), prompts * 20)["interval"] == pytest.approx(found["interval"], abs=1e-12)
    assert accuracy(points, prompts) == found
    alone = accuracy(np.tile(points, 20), [str(k) for k in range(1200)])["interval"]
    assert alone[1] - alone[0] < 0.5 * (found["interval"][1] - found["interval"][0])


def test_rank_correlations() -> None:
    rng = np.random.default_rng(4)
    one, other = rng.integers(0, 6, (2, 40)).astype(float)

    assert spearman(one, other) == pytest.approx(np.corrcoef(ranks(one), ranks(other))[0, 1])
    assert spearman(one, np.ones(40)) is None
    assert kendall(one - 2.5, 2.5 - one) == -1
    assert kendall(one, np.zeros(40)) is None


def test_what_cannot_be_used_stops_or_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World()
    file = world.hpdv2(tmp_path)
    (tmp_path / "3-1.png").write_bytes(world.png(3, 1)[:45])
    records = json.loads(file.read_text())
    file.write_text(json.dumps([*records, {"prompt": "p", "image_path": ["0-0.png", "none.png"], "rank": [1, 2]}]))
    command = ["--pairs", str(file), f"--reward={BRIGHT}"]
    assert main([*command, "--output", str(tmp_path / "a.json")]) == 2
    assert "none.png" in one_line(capsys)
    assert main([*command, "--output", str(tmp_path / "a.json"), "--max_bad", "1"]) == 2
    assert "3-1.png" in one_line(capsys) and not (tmp_path / "a.json").exists()
    report = run(*command, "--max_bad", "2", output=tmp_path / "a.json")
    left = [pair for pair in world.pairs() if not world.tied(pair) and not (pair[0] == 3 and 1 in pair[1:])]
    assert report["pairs"] == report["rewards"][BRIGHT]["n"] == len(left)
    assert [Path(entry["source"].partition("[")[0]).name for entry in report["bad"]] == ["test.json", "3-1.png"]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of stderr, after the bar if there was one; it must be the only one with words."""
    line = capsys.readouterr().err.rpartition("\r")[2].strip().rpartition("\n")[2]
    assert line.startswith("error: "), line
    return line


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = World().hpdv2(tmp_path)
    tied = tmp_path / "tied.json"
    tied.write_text(json.dumps([{"prompt": "p", "image_path": ["0-0.png", "0-1.png"], "rank": [1, 1]}]))
    good = ["--pairs", str(file), f"--reward={BRIGHT}"]
    mistakes = {
        ("--pairs", str(tmp_path / "none"), "--reward=Shapes"): "no file or folder",
        ("--pairs", str(tied), "--reward=Shapes"): "no pair with a winner: 1 ties, 0 bad",
        ("--pairs", str(file), "--reward=Beauty"): "unknown reward 'Beauty'",
        ("--pairs", str(file), "--reward=tests.test_agree.Nan"): "2-0.png: reward 'tests.test_agree.Nan' returned nan",
        (*good, "--agreement", "0.4"): "--agreement is 0.4",
        (*good, "--batch_size", "0"): "--batch_size is 0",
        (*good, "--split", "test"): "has no split 'test'",
        (*good, "--output", str(tmp_path)): "expected the name of a file",
    }
    for command, message in mistakes.items():
        assert main(["--output", str(tmp_path / "a.json"), *command]) == 2
        assert message in one_line(capsys)
    assert not (tmp_path / "a.json").exists()
