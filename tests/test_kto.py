"""Diffusion-KTO: the loss against its formula and the authors' code, the reference point, the balance; rated images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from align.common.command import parse
from align.common.errors import DataError
from align.data import captioned
from align.data.dataset import Setup, drawn, shuffled
from align.data.rated import RatedBatch, RatedImages, Resampled
from align.objectives import KTO, Context
from align.objectives.kto import KTORows
from align.policy.policy import LoRA, Policy
from align.training.config import TrainConfig
from align.training.memory import trace
from tests.helpers import gradients
from tests.pipelines import Build
from tests.test_data import Tiny, noise, quiet
from tests.test_dpo import drawn as tensors
from tests.test_policy import disturb

KINDS = ("epsilon", "v", "flow")
CAPTIONS = ["two red stars", "a star", "a blue circle left of a green square", "a red circle", "a dot", "a square"]
GOOD = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
GOLDENS = Path(__file__).parent / "goldens/upstream_objectives.json"


def batch(policy: Policy, labels: Sequence[float] = GOOD) -> RatedBatch:
    latents = torch.randn(len(labels), 4, 8, 8, generator=torch.Generator().manual_seed(11))
    captions = CAPTIONS[: len(labels)]
    with torch.no_grad():
        cond = policy.family.encode(captions)
    return RatedBatch(latents, cond, captions, list(range(len(labels))), torch.tensor(labels))


def part(whole: RatedBatch, where: slice) -> RatedBatch:
    assert whole.labels is not None
    kept = whole.latents[where], whole.cond.take(where), whole.captions[where], whole.ids[where], whole.labels[where]
    return RatedBatch(*kept)


def rolled(objective: KTO, policy: Policy, **changes: Any) -> tuple[Context, KTORows]:
    ctx = replace(Context(policy, 0, 0, range(6)), **changes)
    with torch.no_grad():
        return ctx, objective.rollout(ctx, batch(policy))


def moved(tiny: Build, kind: str, amount: float = 0.1) -> Policy:
    torch.manual_seed(0)
    policy = Policy(tiny(kind), LoRA(2))
    disturb(policy, amount)
    return policy


def errors(policy: Policy, rows: KTORows, k: int) -> tuple[float, float]:
    """Image k's error in float64, now and by the reference, from the raw outputs of the network."""
    x0, eps, t, cond = (
        rows.latents[k].double(),
        rows.eps[k].double(),
        rows.t[k : k + 1],
        rows.cond.take(slice(k, k + 1)),
    )
    alpha, sigma = (float(v) for v in policy.family.path(t))
    target = {
        "epsilon": eps,
        "v_prediction": alpha * eps - sigma * x0,
        "flow_prediction": eps - x0,
    }[policy.family.prediction_type]
    x_t = (alpha * x0 + sigma * eps)[None].float()
    with torch.no_grad():
        now = policy.predict(x_t, t, cond).raw[0].double()
        with policy.reference():
            then = policy.predict(x_t, t, cond).raw[0].double()
    return float((now - target).square().mean()), float((then - target).square().mean())


@pytest.mark.parametrize("kind", ["epsilon", pytest.param("v", marks=pytest.mark.slow), "flow"])
def test_is_the_paper_in_float64(tiny: Build, kind: str) -> None:
    policy = moved(tiny, kind)
    objective = KTO(beta=40.0, desirable_weight=1.5, undesirable_weight=0.5, proportion_empty_prompts=0.0)
    ctx, rows = rolled(objective, policy)
    loss, metrics = objective.loss(ctx, rows)
    pairs = np.array([errors(policy, rows, k) for k in range(6)])
    gain = pairs[:, 1] - pairs[:, 0]
    z = max(0.0, gain.mean())
    good = np.array(GOOD)
    h = 1 / (1 + np.exp(-(2 * good - 1) * 40.0 * (gain - z)))
    wanted = (np.where(good == 1, 1.5, 0.5) * (1 - h)).mean()
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert metrics["reference_point"].item() == pytest.approx(z, abs=1e-6)
    assert metrics["delta_good"].item() == pytest.approx(-gain[good == 1].mean(), abs=1e-6)
    assert metrics["delta_bad"].item() == pytest.approx(-gain[good == 0].mean(), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_is_the_authors_code(seed: int) -> None:
    """What train_kto_sd_v1.5.py of jacklishufan/diffusion-kto gave for these errors: goldens/make_objectives.py."""
    wanted = json.loads(GOLDENS.read_text())["thumbs"][seed]
    winner, loser, then = (x.detach() for x in tensors(seed))
    error, ref = torch.cat([winner, loser]).square().mean(1) - 0.05 * (seed - 1), then.square().mean(1)

    class Given(KTO):
        def errors(self, ctx: Context, rows: KTORows) -> Tensor:
            return error

    objective = Given(beta=20.0, desirable_weight=1.5, undesirable_weight=0.5)
    good, z = torch.tensor(GOOD).double(), max(0.0, float((ref - error).mean()))
    assert z == pytest.approx(wanted["z"], abs=1e-12)
    rows: Any = KTORows(
        image=torch.arange(6), latents=ref, cond=None, eps=ref, t=ref, good=good,  # type: ignore[arg-type]
        weight=objective.weights(good, good), ref_error=ref, reference_point=z, good_share=0.5,
    )  # fmt: skip
    loss, _ = objective.loss(Context(None, 0, 0, range(6)), rows)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(wanted["loss"], rel=1e-6)


def test_the_goldens_have_reference_points_on_both_sides_of_the_clip() -> None:
    points = [case["z"] for case in json.loads(GOLDENS.read_text())["thumbs"]]
    assert min(points) == 0 < max(points)


@pytest.mark.parametrize("kind", KINDS)
def test_starts_at_half_the_weight_and_pulls_good_images_and_pushes_bad_ones(tiny: Build, kind: str) -> None:
    """At the reference g = z = 0: the loss is w / 2, its gradient +-w beta / 4 of each image's denoising gradient."""
    policy = Policy(tiny(kind), LoRA(2))
    objective = KTO(beta=2.0, desirable_weight=1.2, undesirable_weight=0.6, proportion_empty_prompts=0.0)
    ctx, rows = rolled(objective, policy)
    loss, metrics = objective.loss(ctx, rows)
    assert loss.item() == pytest.approx(0.45, abs=1e-5) and metrics["reference_point"] == pytest.approx(0, abs=1e-6)
    found = gradients(policy, loss)
    signed = torch.tensor([1.2 if good else -0.6 for good in GOOD]) * 2.0 / 4
    wanted = gradients(policy, (signed * objective.errors(ctx, rows)).mean())
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    assert wanted.norm() > 1e-4


@pytest.mark.parametrize("good", [0.0, 1.0])
def test_the_sign_of_the_slope_in_an_images_error(good: float) -> None:
    error = torch.tensor([0.3, 0.5], dtype=torch.float64, requires_grad=True)

    class Given(KTO):
        def errors(self, ctx: Context, rows: KTORows) -> Tensor:
            return error

    like, ref = torch.full((2,), good).double(), torch.tensor([0.4, 0.4]).double()
    rows: Any = KTORows(
        image=torch.arange(2), latents=ref, cond=None, eps=ref, t=ref, good=like, weight=torch.ones(2).double(),
        ref_error=ref, reference_point=0.02, good_share=good,
    )  # type: ignore[arg-type]  # fmt: skip
    loss, _ = Given(beta=7.0).loss(Context(None, 0, 0, range(2)), rows)  # type: ignore[arg-type]
    (slope,) = torch.autograd.grad(loss, error)
    sign = 2 * good - 1
    h = torch.sigmoid(sign * 7.0 * (ref - error.detach() - 0.02))
    torch.testing.assert_close(slope, sign * 7.0 * h * (1 - h) / 2)
    assert bool((slope.sign() == sign).all())


def test_the_reference_point_has_no_gradient_and_is_never_below_0(tiny: Build) -> None:
    policy = moved(tiny, "flow")
    objective = KTO(beta=40.0, proportion_empty_prompts=0.0)
    ctx, rows = rolled(objective, policy)
    assert isinstance(rows.reference_point, float)
    better = replace(rows, ref_error=rows.ref_error + 1.0)
    with torch.no_grad():
        gain = (rows.ref_error - objective.errors(ctx, rows)).mean().item()
    assert rows.reference_point == pytest.approx(max(0.0, gain), abs=1e-6)
    held = gradients(policy, objective.loss(ctx, replace(better, reference_point=1.0))[0])
    wanted = gradients(policy, objective.loss(ctx, replace(rows, reference_point=0.0))[0])
    torch.testing.assert_close(held, wanted, rtol=1e-3, atol=1e-6)  # a constant that both g and z have falls out
    assert KTO(reference_point="zero").cost(policy.family, None).frozen == 1
    _, zero = rolled(replace(objective, reference_point="zero"), policy)
    assert zero.reference_point == 0


def test_balance_makes_both_classes_weigh_the_same() -> None:
    labels = torch.tensor([1.0, 1.0, 1.0, 0.0])
    weights = KTO(balance=True).weights(labels, labels)
    assert weights[:3].sum() == pytest.approx(2) and weights[3] == pytest.approx(2)
    weights = KTO(balance=True, desirable_weight=1.0, undesirable_weight=0.5).weights(labels, labels)
    assert weights[:3].sum() == pytest.approx(2 * float(weights[3]))
    alone = torch.ones(3)
    assert KTO(balance=True).weights(alone, alone).tolist() == [1, 1, 1]  # nothing to balance with
    assert KTO(desirable_weight=2.0).weights(labels, labels).tolist() == [2, 2, 2, 1]


def test_neither_chunks_nor_processes_change_the_loss(tiny: Build) -> None:
    policy = moved(tiny, "epsilon")
    objective = KTO(beta=60.0, balance=True, desirable_weight=1.3)
    ctx, rows = rolled(objective, policy)
    whole, metrics = objective.loss(ctx, rows)
    _, small = rolled(objective, policy, chunk=2)
    assert small.reference_point == pytest.approx(rows.reference_point, abs=1e-6)
    parts = [objective.loss(ctx, chunk) for chunk in small.chunks(2)]
    assert whole.item() == pytest.approx(sum(loss.item() for loss, _ in parts) / 3, rel=1e-5)
    for name, value in metrics.items():
        assert value.item() == pytest.approx(sum(m[name].item() for _, m in parts) / 3, rel=1e-4, abs=1e-6)
    everyone = batch(policy)
    with torch.no_grad():
        gains = rows.ref_error - objective.errors(ctx, rows)
    split = []
    for where in (slice(0, 2), slice(2, 6)):

        def gather(tensor: Tensor, where: slice = where) -> Tensor:
            known = (
                {2: gains, 4: gains}[len(tensor)]
                if tensor.is_floating_point() and tensor.max() != 1
                else everyone.labels
            )
            assert known is not None
            torch.testing.assert_close(tensor, known[where].to(tensor), atol=1e-5, rtol=1e-3)
            return known

        own = replace(ctx, sample_indices=range(6)[where], gather=gather)
        with torch.no_grad():
            table = objective.rollout(own, part(everyone, where))
        assert torch.equal(table.eps, rows.eps[where]) and torch.equal(table.t, rows.t[where])
        split.append(objective.loss(own, table)[0].item() * len(table))
    assert whole.item() == pytest.approx(sum(split) / 6, rel=1e-5)


def test_what_an_image_costs(tiny: Build) -> None:
    policy, seen = Policy(tiny("epsilon"), LoRA(2)), []
    objective = KTO()
    assert policy.family.uncond is not None
    data = batch(policy)
    policy.denoiser.register_forward_pre_hook(lambda m, args: seen.append((len(args[0]), torch.is_grad_enabled())))
    ctx = Context(policy, 0, 0, range(6), chunk=4)
    with torch.no_grad():
        rows = objective.rollout(ctx, data)
    objective.loss(ctx, rows)
    assert sorted(seen) == [(2, False), (2, False), (4, False), (4, False), (6, True)]
    cost = objective.cost(policy.family, None)
    assert (cost.trained, cost.frozen) == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"undesirable_weight": -1.0}, "at least 0"),
        ({"desirable_weight": 0.0, "undesirable_weight": 0.0}, "trains nothing"),
        ({"proportion_empty_prompts": 2.0}, "must be a share"),
    ],
)
def test_bad_hyper_parameters_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KTO(**arguments)


# the data
@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(captioned, "CACHE", str(tmp_path / "cache"))


def thumbs(folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    for k in range(len(rows)):
        (folder / f"{k}.png").write_bytes(noise(k))
    lines = [{"image": f"{k}.png", "prompt": f"thing {k}"} | row for k, row in enumerate(rows)]
    (folder / "thumbs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "thumbs.jsonl")


def test_thumbs_of_every_spelling(tmp_path: Path) -> None:
    said = [True, False, 1, 0, "good", "Bad", "up", "down", "true", None, "", {"choices": ["good"]}]
    read = RatedImages(thumbs(tmp_path, [{"label": value} for value in said])).read()
    assert [item.label for item in read.items] == [1, 0, 1, 0, 1, 0, 1, 0, 1, 1]
    assert read.unlabelled == 2
    path = thumbs(tmp_path, [{"good": True}, {"good": False}])
    data = RatedImages(path)
    loaded: RatedBatch = data.prepare(quiet(Tiny())).batch([0, 1])
    assert loaded.labels is not None and loaded.labels.tolist() == [1, 0] and loaded.latents.ndim == 4
    assert [item.label for item in RatedImages(path, label_column="good").read().items] == [1, 0]


@pytest.mark.parametrize(("said", "kind"), [(["up", 1], "good"), ([0, "bad"], "bad"), ([1, 0], None)])
def test_images_of_one_kind_alone_are_said(
    said: list[Any], kind: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    RatedImages(thumbs(tmp_path, [{"label": value} for value in said])).check()
    assert ("all images are" in caplog.text) == (kind is not None) and (kind is None or f"are {kind};" in caplog.text)


def test_thumbs_that_are_taken_for_pairs_are_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="pairs is true, which is for pairs; false reads images with a label"):
        RatedImages(thumbs(tmp_path, [{"label": 1}]), pairs=True).read()


def test_a_threshold_splits_scores(tmp_path: Path) -> None:
    path = thumbs(tmp_path, [{"score": 0.2}, {"score": 0.5}, {"score": 0.9, "PickScore": 20}])
    assert [item.label for item in RatedImages(path, threshold=0.5).read().items] == [0, 1, 1]
    with pytest.raises(DataError, match="expected a column PickScore, found image, prompt, score"):
        RatedImages(path, threshold=21.0, score_column="PickScore").read()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "maybe"}, "label is 'maybe'; expected true or false, 1 or 0, good or bad, up or down"),
        ({"label": 0.7}, "label is 0.7; expected"),
        ({"other": 1}, "expected a column label or good, found image, prompt, other"),
    ],
)
def test_what_is_neither_good_nor_bad_is_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        RatedImages(thumbs(tmp_path, [row])).read()


@pytest.mark.parametrize(
    "arguments",
    [{"pairs": True, "threshold": 1.0}, {"threshold": 1.0, "label_column": "x"}, {"positive_ratio": 1.0}],
)
def test_settings_that_contradict_one_another_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="leave threshold|give one of them|between 0 and 1"):
        RatedImages("x", **arguments)


def test_the_images_of_pairs_are_good_and_bad(tmp_path: Path) -> None:
    for k in range(4):
        Image.new("RGB", (16, 16), (60 * k, 0, 0)).save(tmp_path / f"{k}.png")
    rows = [
        {"caption": "a", "jpg_0": "0.png", "jpg_1": "1.png", "label_0": 0},
        {"caption": "b", "jpg_0": "0.png", "jpg_1": "2.png", "label_0": 0.5},
        {"caption": "c", "jpg_0": "2.png", "jpg_1": "3.png", "label_0": 1},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = RatedImages(str(tmp_path / "pairs.jsonl"), pairs=True).read()
    found = [(item.id, item.caption, item.images[0].file.name, item.label) for item in read.items]
    assert found == [(0, "a", "1.png", 1), (1, "a", "0.png", 0), (4, "c", "2.png", 1), (5, "c", "3.png", 0)]
    assert (read.total, read.ties) == (6, 2)


@pytest.mark.parametrize(("ratio", "goods"), [(0.8, 24), (0.5, 6), (0.25, 2)])
def test_a_positive_ratio_repeats_the_class_that_is_short(ratio: float, goods: int, tmp_path: Path) -> None:
    """Two good images and six bad ones: each comes at least once, and an epoch has good ones in the ratio."""
    path = thumbs(tmp_path, [{"label": k < 2} for k in range(8)])
    data = RatedImages(path, positive_ratio=ratio).prepare(quiet(Tiny()))
    assert isinstance(data, Resampled)
    epoch = data.batch(drawn(data, len(data), 0, 0))
    assert epoch.labels.sum() == goods and epoch.labels.mean() == pytest.approx(ratio)
    assert set(epoch.ids) == set(range(8))
    assert shuffled(len(data), 4, 0, 3) == drawn(data, 4, 0, 3)
    with pytest.raises(DataError, match="all images are good; leave positive_ratio out"):
        RatedImages(thumbs(tmp_path, [{"label": 1}] * 3), positive_ratio=0.5).prepare(Setup(Tiny(), progress=False))  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_config_runs_and_its_peak_is_traced() -> None:
    path = Path(__file__).parents[1] / "configs/kto_shapes.yaml"
    settings, _ = parse(TrainConfig, "x", None, ["--config", str(path)])
    settings.check()
    assert [phase.name for phase in trace(settings).phases][-2:] == ["rollout", "update"]
