"""Rewards: the one that looks is exact, sums and checks keep the contract, the command survives real folders."""

from __future__ import annotations

import inspect
import io
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from align.common.command import parse as parse_settings
from align.objectives.online.rewards import RewardConfig, Scorer
from align.shapes.world import COMBINATIONS, SIZE, Body, caption, draw, outline
from align.training.config import TrainConfig
from rewards import Reward, RewardError, RewardSum, available, base, checked, load
from rewards.data.formats import natural
from rewards.models.jpeg import JPEGCompressibility, JPEGIncompressibility
from rewards.models.shape_detector import DetectedObject
from rewards.models.shapes import (
    OUTLINES,
    PALETTE,
    SHAPES,
    TASKS,
    Shapes,
    Thing,
    find,
    grade,
    judge,
    parse,
)
from rewards.score import main
from tests.benchmarks.shapes_reward import blurred, clean, confusion, measure, phrase, scene

ROOT = Path(__file__).resolve().parents[1]


def painted(*bodies: Body) -> Tensor:
    """The picture of these bodies, (3, 64, 64) float in [0, 1]."""
    return torch.from_numpy(draw(np.random.default_rng(0), list(bodies)).copy()).permute(2, 0, 1).float() / 255


def body(colour: str, shape: str, x: float, y: float, radius: float = 11.0) -> Body:
    return Body(Thing(shape, colour), x, y, radius, 0.0)


def scenes(count: int, seed: int = 0) -> tuple[Tensor, list[str]]:
    rng = np.random.default_rng(seed)
    texts = [caption(rng, TASKS[k % len(TASKS)], COMBINATIONS) for k in range(count)]
    return torch.stack([scene(rng, text)[0] for text in texts]), texts


# -- the reward that looks ---------------------------------------------------------------------------------------


def test_right_captions_pass_and_wrong_ones_fail_on_clean_renders() -> None:
    figures = measure(clean, 400, seed=11)
    assert figures["accuracy"] >= 0.995, figures
    assert set(figures["wrong_refused"]) == {"attribution", "colour", "count", "random", "relation", "shape"}
    assert min(figures["wrong_refused"].values()) >= 0.99, figures


@pytest.mark.slow
def test_blur_and_noise_do_not_matter() -> None:
    figures = measure(blurred, 300, seed=12)
    assert figures["accuracy"] >= 0.98, figures
    assert min(figures["wrong_refused"].values()) >= 0.98, figures


def test_every_combination_is_named_right() -> None:
    shapes, colours = confusion(3, seed=13)
    assert {pair for pair in shapes if pair[0] != pair[1]} == set()
    assert {pair for pair in colours if pair[0] != pair[1]} == set()
    assert sum(shapes.values()) == 3 * len(COMBINATIONS)


def test_outlines_are_what_the_world_draws() -> None:
    for shape in SHAPES:
        drawn = np.array(outline(Body(Thing(shape, "red"), 0.0, 0.0, 1.0, 0.0)))
        ideal = np.array([(r * np.cos(a), r * np.sin(a)) for r, a in OUTLINES[shape]])
        scale = np.linalg.norm(drawn[0]) / np.linalg.norm(ideal[0])  # the world shrinks circles
        np.testing.assert_allclose(drawn, ideal * scale, atol=1e-9)


def test_find_measures_in_pixels_of_the_picture() -> None:
    image = painted(body("blue", "square", 20.0, 40.0, 10.0))
    (found,) = find(image)
    assert (found.shape, found.colour) == ("square", "blue")
    assert found.fit > 0.9
    assert found.area == pytest.approx(200, rel=0.05)  # a square of circumradius r has area 2 r^2
    assert (found.x, found.y) == pytest.approx((20.0, 40.0), abs=0.3)


@pytest.mark.parametrize("size", [48, 128, 256])
def test_other_sizes_and_their_thresholds(size: int) -> None:
    images, texts = scenes(24, seed=3)
    resized = torch.nn.functional.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    assert Shapes("strict").score(images=resized, prompts=texts).mean() >= (0.9 if size < SIZE else 1.0)
    first, other = find(images[0])[0], find(resized[0])[0]
    assert (other.x, other.y) == pytest.approx((first.x * size / SIZE, first.y * size / SIZE), abs=0.02 * size)


def test_a_wide_picture() -> None:
    wide = torch.cat([painted(body("red", "star", 30, 30)), painted(body("blue", "circle", 30, 30))], dim=2)
    assert judge("a red star left of a blue circle", wide) == (1.0, 1.0)


def test_touching_objects_of_different_colour_separate() -> None:
    image = painted(body("red", "square", 22, 32, 12), body("blue", "circle", 40, 32, 11))
    assert {(f.shape, f.colour) for f in find(image)} == {("square", "red"), ("circle", "blue")}


def test_strangers_are_unknown_and_dirt_is_nothing() -> None:
    upside_down = painted(body("green", "triangle", 32, 32, 14)).flip(1)
    (found,) = find(upside_down)
    assert (found.shape, found.colour) == ("unknown", "green")
    grey = torch.ones(3, 64, 64)
    grey[:, 20:40, 20:40] = 0.6
    assert [(f.shape, f.colour) for f in find(grey)] == [("square", "unknown")]
    specks = torch.ones(3, 64, 64)
    specks[:, 10:14, 10:14] = 0.0
    assert find(specks) == []
    assert find(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.9) == []


def test_nothing_else_may_be_there() -> None:
    star, circle = body("red", "star", 18, 18), body("blue", "circle", 46, 46)
    assert judge("a red star", painted(star)) == (1.0, 1.0)
    assert judge("a red star", painted(star, circle)) == (0.0, 0.5)
    assert judge("a red star", torch.ones(3, 64, 64)) == (0.0, 0.0)


def test_partial_credit_in_numbers() -> None:
    star, circle = body("red", "star", 16, 20), body("blue", "circle", 46, 20)
    both = painted(star, circle)
    assert judge("a red star left of a blue circle", both) == (1.0, 1.0)
    assert judge("a red star right of a blue circle", both) == (0.0, 0.5)  # the relation is half
    assert judge("a red star left of a green circle", both) == (0.0, 0.75)  # one colour of two things
    assert judge("a blue star and a red circle", both) == (0.0, 0.5)  # colours swapped
    assert judge("a star and a circle", both) == (1.0, 1.0)
    assert judge("two red stars", painted(star)) == (0.0, 0.25)  # half of the mean, half of the count
    assert judge("a red star left of a blue circle", painted(star)) == (0.0, 0.125)


def test_graded_is_monotone() -> None:
    """Losing a shape or a colour, or gaining a stranger that is not asked for, never raises the grade."""
    rng = np.random.default_rng(5)
    names, colours = [*SHAPES, "unknown"], [*PALETTE, "unknown"]
    stranger = DetectedObject("unknown", "unknown", 5.0, 5.0, 50.0, 0.3)
    for number in range(600):
        spec = parse(caption(rng, TASKS[number % len(TASKS)], COMBINATIONS))
        places = rng.uniform(8, 56, (int(rng.integers(0, 6)), 2)).tolist()
        found = [DetectedObject(str(rng.choice(names)), str(rng.choice(colours)), x, y, 100.0, 0.9) for x, y in places]
        asked = spec.things[: len(found)]  # half of the time, what is asked for is among what is seen
        if number % 2:
            found[: len(asked)] = [
                replace(f, shape=thing.shape, colour=thing.colour or f.colour)
                for f, thing in zip(found, asked, strict=False)
            ]
        score = grade(spec, found)
        assert 0 <= score <= 1
        assert grade(spec, found[::-1]) == pytest.approx(score)  # the order of what is seen does not matter
        for k, one in enumerate(found):
            for worse in (replace(one, shape="unknown"), replace(one, colour="unknown")):
                assert grade(spec, [*found[:k], worse, *found[k + 1 :]]) <= score + 1e-9
        if number % 2 and len(found) == len(spec.things) and spec.relation is None:
            assert score == pytest.approx(1.0)
        if len(found) >= len(spec.things):
            assert grade(spec, [*found, stranger]) < score or score == 0


def test_relation_credit_grows_with_the_offset() -> None:
    spec = parse("a red star above a blue circle")
    circle = DetectedObject("circle", "blue", 30.0, 40.0, 100.0, 0.9)
    offsets = (-10.0, 0.0, 1.0, 2.0, 4.0, 20.0)
    values = [grade(spec, [DetectedObject("star", "red", 30.0, 40.0 - dy, 100.0, 0.9), circle]) for dy in offsets]
    assert values == pytest.approx([0.5, 0.5, 0.625, 0.75, 1.0, 1.0])


def test_phrase_inverts_parse() -> None:
    rng = np.random.default_rng(2)
    for number in range(120):
        spec = parse(caption(rng, TASKS[number % len(TASKS)], COMBINATIONS))
        assert parse(phrase(spec)) == spec


def test_shapes_modes_and_errors() -> None:
    images, texts = scenes(12)
    strict, graded = (Shapes(mode).score(images=images, prompts=texts[::-1]) for mode in ("strict", "graded"))
    assert strict.dtype == graded.dtype == torch.float32
    assert torch.equal(strict == 1, graded == 1)
    with pytest.raises(ValueError, match="mode is 'soft'"):
        Shapes("soft")  # type: ignore[arg-type]
    with pytest.raises(RewardError, match=r"row 1: .*'a dog'") as caught:
        Shapes().score(images=images[:2], prompts=["a star", "a dog"])
    assert caught.value.row == 1


# -- the contract ------------------------------------------------------------------------------------------------


@dataclass
class Fixed:
    """Answers what it was told to, plus the mean of the image so that gradients flow."""

    values: Sequence[float]
    differentiable: bool = True

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float64) + 0 * images.mean()


def test_reward_sum_components_and_weights() -> None:
    total = RewardSum({"a": Fixed([1.0, 2.0]), "b": Fixed([10.0, 20.0])}, {"b": 0.5})
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    parts = total.components(images=images, prompts=["x", "y"])
    assert list(parts) == ["a", "b", "total"]
    assert parts["b"].tolist() == [10.0, 20.0] and parts["total"].tolist() == [6.0, 12.0]
    assert all(part.dtype == torch.float32 for part in parts.values())
    assert torch.equal(total.score(images=images, prompts=["x", "y"]), parts["total"])
    parts["total"].sum().backward()
    assert images.grad is not None
    assert isinstance(total, Reward) and total.differentiable
    assert not RewardSum({"a": Fixed([1.0]), "b": Shapes()}).differentiable


class Mean(Fixed):
    """The mean level of each image."""

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        return images.mean((1, 2, 3))


def test_reward_sum_normalizes_what_is_summed_and_keeps_what_was_said() -> None:
    images, prompts = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)), [""] * 5
    values, mean = [3.0, 1.0, 4.0, 1.0, 5.0], images.double().mean((1, 2, 3))
    parts_of: dict[str, Reward] = {"fixed": Fixed(values), "mean": Mean([]), "plain": Fixed(values)}
    total = RewardSum(parts_of, {"mean": -2.0, "plain": 0.5}, {"mean": (0.5, 0.1), "fixed": "batch"})
    parts = total.components(images=images, prompts=prompts)
    expected = (np.array(values) - np.mean(values)) / np.std(values) - 2 * (mean.numpy() - 0.5) / 0.1
    assert parts["total"].tolist() == pytest.approx((expected + 0.5 * np.array(values)).tolist(), abs=1e-5)
    assert parts["fixed"].tolist() == parts["plain"].tolist() == values
    assert parts["mean"].tolist() == pytest.approx(mean.tolist(), abs=1e-6)


def test_only_batch_statistics_make_a_score_depend_on_its_batch() -> None:
    images = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))

    def alone_and_together(how: Any) -> tuple[list[float], list[float]]:
        reward = RewardSum({"mean": Mean([])}, None, {"mean": how})
        alone = [reward.score(images=image[None], prompts=[""]).item() for image in images]
        return alone, reward.score(images=images, prompts=[""] * 4).tolist()

    alone, together = alone_and_together((0.4, 0.05))
    assert alone == pytest.approx(together, abs=1e-5)
    alone, together = alone_and_together("batch")
    assert alone == [0.0] * 4 and (np.mean(together), np.std(together)) == pytest.approx((0, 1), abs=1e-5)
    same = RewardSum({"x": Fixed([0.1] * 7)}, None, {"x": "batch"})
    assert same.score(images=torch.rand(7, 3, 2, 2), prompts=[""] * 7).tolist() == [0.0] * 7


def test_batch_statistics_keep_the_gradient() -> None:
    images = torch.rand(3, 3, 2, 2, generator=torch.Generator().manual_seed(2)).requires_grad_()
    reward = RewardSum({"mean": Mean([])}, None, {"mean": "batch"})
    reward.score(images=images, prompts=[""] * 3)[0].backward()
    assert images.grad is not None
    step = torch.full_like(images, 1e-2) * torch.tensor([1.0, -1.0, 0.5]).view(3, 1, 1, 1)
    with torch.no_grad():
        up, down = (reward.score(images=images + sign * step, prompts=[""] * 3)[0] for sign in (1, -1))
    assert float((up - down) / 2) == pytest.approx(float((images.grad * step).sum()), rel=0.05)


@pytest.mark.parametrize(
    "statistics", [(0.0, 0.0), (0.0, -1.0), (math.nan, 1.0), (1.0,), (0.0, math.inf), "rank", "ab"]
)
def test_statistics_that_cannot_be_are_named(statistics: Any) -> None:
    with pytest.raises(RewardError, match=r"reward 'a' is to be normalized by .*; expected \(mean, std\)"):
        RewardSum({"a": Fixed([1.0])}, None, {"a": statistics})
    if not isinstance(statistics, str):
        with pytest.raises(RewardError, match="reward 'light' is to be normalized by"):
            Scorer.of([RewardConfig("tests.helpers.Bright", label="light", normalize=list(statistics))])


def test_a_runs_rewards_are_normalized_alike() -> None:
    scorer = Scorer.of(
        [
            RewardConfig("JPEGIncompressibility", 2.0, normalize=[3.0, 0.5]),
            RewardConfig("JPEGCompressibility", -1.0, label="small"),
            RewardConfig("Shapes", 0.0, label="watched", normalize=[9.0, 9.0]),
        ]
    )
    images, texts = scenes(3)
    scores = scorer.score(images, texts)
    expected = 2 * (scores["JPEGIncompressibility"] - 3) / 0.5 - scores["small"]
    torch.testing.assert_close(scorer.total(scores), expected)
    torch.testing.assert_close(scorer.differentiable_total(images, texts), expected)
    both = {"JPEGIncompressibility": load("JPEGIncompressibility"), "small": load("JPEGCompressibility")}
    total = RewardSum(both, {"JPEGIncompressibility": 2.0, "small": -1.0}, {"JPEGIncompressibility": (3.0, 0.5)})
    torch.testing.assert_close(total.score(images=images, prompts=texts), expected)


def test_reward_sum_refuses_bad_names() -> None:
    with pytest.raises(RewardError, match=r"weights for \['c'\]"):
        RewardSum({"a": Fixed([1.0])}, {"c": 1.0})
    with pytest.raises(RewardError, match=r"normalize for \['c'\]"):
        RewardSum({"a": Fixed([1.0])}, None, {"c": "batch"})
    with pytest.raises(RewardError, match="total"):
        RewardSum({"total": Fixed([1.0])})
    with pytest.raises(RewardError, match="no rewards"):
        RewardSum({})


def test_nonsense_answers_stop_with_the_rewards_name() -> None:
    images = torch.rand(2, 3, 8, 8)
    total = RewardSum({"fine": Fixed([0.0, 0.0]), "broken": Fixed([1.0, float("nan")])})
    with pytest.raises(RewardError, match=r"'broken' returned nan for row 1 \(prompt 'y'\)") as caught:
        total.score(images=images, prompts=["x", "y"])
    assert caught.value.row == 1
    with pytest.raises(RewardError, match=r"'short' returned \(3,\); expected a tensor of shape \(2,\)"):
        checked(Fixed([1.0, 2.0, 3.0]), "short", images, ["x", "y"])


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (torch.rand(2, 3, 8, 8) * 255, ["x", "y"], r"values from .* in row 0; expected \[0, 1\]"),
        (torch.rand(2, 3, 8, 8) * 2 - 1, ["x", "y"], r"expected \[0, 1\]"),
        (torch.full((1, 3, 8, 8), float("nan")), ["x"], "nan to nan in row 0"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["x", "y"], "divide by 255"),
        (torch.rand(3, 8, 8), ["x"], r"\(3, 8, 8\); expected \(B, 3, H, W\)"),
        (torch.rand(0, 3, 8, 8), [], "B > 0"),
        (torch.rand(2, 3, 8, 8), ["x"], "1 prompts for 2 images"),
        (torch.rand(2, 3, 8, 8), "xy", "one string for 2 images"),
    ],
)
def test_bad_input_is_named(images: Tensor, prompts: Sequence[str], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        checked(Fixed([1.0, 2.0]), "any", images, prompts)


def test_as_many_metadata_rows_as_images() -> None:
    with pytest.raises(RewardError, match="reward 'any' got 1 metadata rows for 2 images"):
        checked(Fixed([1.0, 2.0]), "any", torch.rand(2, 3, 8, 8), ["x", "y"], [{}])


@pytest.mark.parametrize(
    "config", [pytest.param("ddpo_smoke", marks=pytest.mark.slow), "flow_grpo_smoke", "dpo_shapes"]
)
def test_policy_gradient_and_dpo_take_every_reward_by_name(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings parse and pass their check, and the run's scorer has the class behind each name."""
    wanted = [{"name": name, "weight": 0.5, "normalize": [1.0, 2.0]} for name in available()]
    arguments = ["--config", str(ROOT / f"configs/{config}.yaml"), "--rewards", json.dumps(wanted)]
    if config == "dpo_shapes":  # held-out prompts, whose pictures are scored while it trains
        arguments += ["--validation_data", "Prompts", "--validation_data.path", "shapes-prompts-heldout"]
    settings, text = parse_settings(TrainConfig, "align.train", None, arguments)
    settings.check()
    assert [(r.name, r.weight, r.normalize) for r in settings.rewards] == [(n, 0.5, [1.0, 2.0]) for n in available()]
    assert [entry["name"] for entry in yaml.safe_load(text)["rewards"]] == available()
    for path in base.BUILT_IN.values():  # their weights are elsewhere
        monkeypatch.setattr(f"{path}.__init__", lambda self: None)
    scorer = settings.scorer()
    assert scorer is not None
    for name, reward in scorer.rewards.items():
        assert f"{type(reward).__module__}.{type(reward).__name__}" == base.BUILT_IN[name]
        arguments_of = inspect.signature(type(reward).score).parameters
        assert {"images", "prompts", "metadata"} <= set(arguments_of)
    assert list(scorer.rewards) == available()


def test_load() -> None:
    assert load("Shapes") == Shapes()
    assert load("rewards.models.jpeg.JPEGCompressibility", {"quality": 50}) == JPEGCompressibility(50)
    assert {"Shapes", "JPEGCompressibility", "JPEGIncompressibility"} <= set(available())
    assert all(isinstance(load(name), Reward) for name in ("Shapes", "JPEGCompressibility"))
    with pytest.raises(RewardError, match=r"unknown reward 'Pick'; known are .*Shapes"):
        load("Pick")
    with pytest.raises(RewardError, match="No module named 'nowhere'"):
        load("nowhere.Nothing")
    with pytest.raises(RewardError, match=r"unexpected keyword argument 'qualty'.*quality"):
        load("JPEGCompressibility", {"qualty": 3})
    with pytest.raises(RewardError, match="reward 'JPEGCompressibility': .*quality is 500"):
        load("JPEGCompressibility", {"quality": 500})
    with pytest.raises(RewardError, match="is no reward"):
        load("collections.OrderedDict")


def test_import_is_light_and_repairs_torchvision(tmp_path: Path) -> None:
    """Beside a CPU torch, a torchvision that dies for want of its compiled operators imports after all."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from torchvision import _meta_registrations\n")
    (package / "_meta_registrations.py").write_text(
        "import torch\n@torch.library.register_fake('torchvision::nms')\ndef nms(dets, scores, iou): return dets\n"
    )
    code = (
        "import sys, torch; torch.version.cuda = None; import rewards; import torchvision; "
        "print(torch.ops.torchvision.qnms, torch.ops.torchvision.nms, [m for m in ('transformers', 'scipy', 'cv2', "
        "'rapidocr', 'onnxruntime') if m in sys.modules])"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torchvision.qnms", "torchvision.nms", "[]"]


# -- JPEG --------------------------------------------------------------------------------------------------------


def test_jpeg_is_the_size_of_the_file() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3), dtype=np.uint8)
    sizes = []
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255  # uint8 survives the way to float and back
    expected = torch.tensor(sizes)
    assert torch.equal(JPEGIncompressibility().score(images=images, prompts=["", ""]), expected)
    assert torch.equal(JPEGCompressibility().score(images=images, prompts=["", ""]), -expected / 500)
    assert JPEGIncompressibility(quality=30).score(images=images, prompts=["", ""]).lt(expected).all()
    with pytest.raises(ValueError, match="quality is 0"):
        JPEGCompressibility(quality=0)


# -- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of two sizes in two folders, without prompts: 2.png, 10.png and sub/3.webp."""
    pictures = tmp_path / "pictures"
    (pictures / "sub").mkdir(parents=True)
    images, _ = scenes(3)
    for name, image, size in zip(("2.png", "10.png", "sub/3.webp"), images, (64, 64, 96), strict=True):
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        picture.resize((size, size), Image.Resampling.BICUBIC).save(pictures / name, lossless=True)
    return pictures


def captions_of(folder: Path) -> list[str]:
    return scenes(3)[1]


def test_natural_order() -> None:
    assert sorted(["a10.png", "a2.png", "2/b.png", "B1.png", "10.png"], key=natural) == [
        "2/b.png",
        "10.png",
        "a2.png",
        "a10.png",
        "B1.png",
    ]


@pytest.mark.parametrize("layout", ["jsonl", "csv", "sidecar", "txt", "option"])
def test_score_command_with_prompts_in_every_layout(
    folder: Path, tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files, texts = ["2.png", "10.png", "sub/3.webp"], captions_of(folder)
    rows = "".join(json.dumps({"file_name": f, "text": t}) + "\n" for f, t in zip(files, texts, strict=True))
    options: list[str] = []
    if layout == "jsonl":
        (folder / "metadata.jsonl").write_text(rows)
    elif layout == "csv":
        (folder / "metadata.csv").write_text(
            "file_name,text\n" + "".join(f'{f},"{t}"\n' for f, t in zip(files, texts, strict=True))
        )
    elif layout == "sidecar":
        for file, text in zip(files, texts, strict=True):
            (folder / file).with_suffix(".txt").write_text(text + "\n")
    else:
        prompts = tmp_path / f"prompts.{'txt' if layout == 'txt' else 'jsonl'}"
        prompts.write_text("\n".join(texts) if layout == "txt" else rows)
        options = ["--prompts", str(prompts)]
    output = tmp_path / "new" / "scores.parquet"
    command = [str(folder), "--reward", "Shapes", "--reward", "JPEGCompressibility", "--output", str(output)]
    assert main([*command, "--batch_size", "2", *options]) == 0
    table = pq.read_table(output).to_pydict()
    assert list(table) == ["file", "prompt", "Shapes", "JPEGCompressibility"]
    assert table["file"] == files and table["prompt"] == texts and table["Shapes"] == [1.0, 1.0, 1.0]
    assert "Shapes: mean 1.0000 over 3 images" in capsys.readouterr().out
    assert [path.name for path in output.parent.iterdir()] == ["scores.parquet"]  # nothing temporary is left


def test_score_command_needs_no_prompt_for_jpeg(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.parquet"
    assert main([str(folder), "--reward", "JPEGIncompressibility", "--output", str(output)]) == 0
    assert pq.read_table(output)["prompt"].to_pylist() == [None, None, None]


def test_score_command_lists_corrupt_images(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "1.png").write_bytes(b"this is no picture")
    whole = (folder / "2.png").read_bytes()
    (folder / "4.png").write_bytes(whole[: len(whole) // 2])
    output = tmp_path / "scores.parquet"
    errors = tmp_path / "scores.parquet.errors.jsonl"
    command = [str(folder), "--reward", "JPEGCompressibility", "--output", str(output)]
    assert main(command) == 1
    assert main([*command, "--skip_errors"]) == 0
    assert "2 of 5 images cannot be read" in capsys.readouterr().err
    assert [json.loads(line)["file"] for line in errors.read_text().splitlines()] == ["1.png", "4.png"]
    assert pq.read_table(output)["file"].to_pylist() == ["2.png", "10.png", "sub/3.webp"]
    (folder / "1.png").unlink()
    (folder / "4.png").unlink()
    assert main(command) == 0
    assert not errors.exists()


def test_user_mistakes_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "2.txt").write_text("a red star")
    (folder / "10.txt").write_text("a dog on the moon")
    short = tmp_path / "short.txt"
    short.write_text("a star\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"file_name": "2.png", "text": "a star"}\n{"file_name": \n')
    output = str(tmp_path / "scores.parquet")
    mistakes = {
        (str(tmp_path / "none"), "--reward", "Shapes"): "no such folder",
        (str(empty), "--reward", "Shapes"): "no images",
        (str(folder), "--reward", "Beauty"): "unknown reward 'Beauty'; known are",
        (str(folder), "--reward", "Shapes"): "1 of 3 images have none: sub/3.webp;",
        (str(folder), "--reward", "Shapes", "--prompts", str(short)): "1 prompts for 3 images",
        (str(folder), "--reward", "Shapes", "--prompts", str(broken)): "broken.jsonl:2: not a JSON object",
        (str(folder), "--reward", "Shapes", "--batch_size", "0"): "--batch_size is 0",
    }
    for command, message in mistakes.items():
        assert main([*command, "--output", output]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    (folder / "sub/3.txt").write_text("a star")
    assert main([str(folder), "--reward", "Shapes", "--output", output]) == 2
    assert "error: 10.png: Shapes: row 1: not a caption" in capsys.readouterr().err
    assert main([str(folder), "--reward", "JPEGCompressibility", "--output", str(tmp_path / "scores.csv")]) == 2
    assert not Path(output).exists()
