"""Images of other aspect ratios than one: buckets of sizes, batches of one bucket, pictures drawn at any size."""

from __future__ import annotations

import io
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from align.common.errors import UserError
from align.common.resolution import sides
from align.data import Images, PreferencePairs, latent_cache
from align.data.dataset import batches, drawn, shuffled
from align.data.latent_cache import EncodedDataset
from align.data.views import Views, buckets_of, cut
from align.families import Family
from align.families.sdxl import SDXL
from align.objectives import Context
from align.objectives.dpo import DPO
from align.policy.policy import LoRA, Policy
from align.sample import main as sample_main
from align.sampling.generate import sample_images
from align.sampling.loop import initial_noise
from align.testing import FamilyCase
from align.train import main
from align.training.validation import validation_metrics
from tests import tiny_families
from tests.helpers import Bright, same, untimed, weights, write
from tests.pipelines import Build
from tests.test_data import Tiny, quiet

# height and width of each pair's images: portraits, squares, landscapes; not in order, and not equally many
SIZES = [(30, 18), (16, 16), (20, 30), (36, 20), (16, 17), (20, 20), (26, 40), (48, 30), (16, 16), (21, 20)]
BUCKETS = ["16x16", "12x20", "20x12"]  # width x height


def png(seed: int, height: int, width: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("buckets") / "pairs.parquet"
    columns = {
        "caption": [f"a {['red', 'blue', 'green'][k % 3]} star" for k in range(len(SIZES))],
        "chosen": [png(k, *size) for k, size in enumerate(SIZES)],
        "rejected": [png(100 + k, *size) for k, size in enumerate(SIZES)],
    }
    pq.write_table(pa.table(columns), file)
    return file


def encoded(pairs: Path, family: Any, cache: Path, **settings: Any) -> EncodedDataset:
    settings = {"resolution": 16, "aspect_ratio_buckets": BUCKETS} | settings
    return PreferencePairs(str(pairs), cache_dir=str(cache), **settings).prepare(quiet(family))


# sizes
def test_a_size_is_a_side_or_width_by_height() -> None:
    assert sides(1024) == sides("1024") == (1024, 1024) and sides(None) == (None, None)
    assert sides("768x1344") == sides("768 x 1344") == (1344, 768)
    for wrong in ("768*1344", "wide", "768x", "0x768"):
        with pytest.raises(UserError, match="resolution"):
            sides(wrong)


def test_buckets_of_a_million_pixels_are_those_of_sdxl() -> None:
    found = buckets_of((1024, 1024), True, 64)
    assert found[0] == (1024, 1024) and len(found) == len(set(found))
    assert all(h * w <= 1024**2 and h % 64 == w % 64 == 0 for h, w in found)
    assert all((w, h) in found for h, w in found)
    # of SDXL's list, those nearest to a square; further from it that has sizes of fewer pixels than there could be
    assert {(1152, 896), (896, 1152), (1216, 832), (1344, 768), (768, 1344), (640, 1536)} <= {*found}
    assert buckets_of((16, 24), False, 64) == ((16, 24),)
    assert buckets_of((16, 16), ["16x16", "12x20"], 64) == ((16, 16), (20, 12))
    with pytest.raises(UserError, match="take smaller steps"):
        buckets_of((64, 64), True, 64)
    with pytest.raises(UserError, match="is empty"):
        buckets_of((64, 64), [], 64)


def test_steps_between_buckets_that_a_model_cannot_draw_are_refused(pairs: Path, tmp_path: Path, tiny: Build) -> None:
    family = tiny("epsilon")
    with pytest.raises(ValueError, match="bucket_reso_steps must be at least 1, got 0"):
        PreferencePairs(str(pairs), bucket_reso_steps=0)
    with pytest.raises(UserError, match=f"5 is no multiple of {family.cell}; the nearest is"):
        PreferencePairs(str(pairs), bucket_reso_steps=5, aspect_ratio_buckets=True).sizes(family)


def test_an_image_goes_where_its_aspect_ratio_is_nearest() -> None:
    views = Views(buckets_of((1024, 1024), True, 64), True, False, 1, 0)

    def of(*sizes: tuple[int, int]) -> tuple[int, int]:
        return views.sizes[views.bucket([Image.new("RGB", size) for size in sizes])]

    assert of((768, 1344)) == of((76, 134)) == (1344, 768)
    assert of((1024, 1024)) == of((2000, 1000), (1000, 2000)) == (1024, 1024)
    ratios = [math.log(w / h) for h, w in views.sizes]
    assert of((1000, 700)) == views.sizes[int(np.abs(np.array(ratios) - math.log(1000 / 700)).argmin())]


def test_a_cut_covers_its_size_and_keeps_the_aspect_ratio() -> None:
    # a vertical gradient: rows are equal, columns tell where the cut was
    image = Image.fromarray(np.repeat(np.arange(200, dtype=np.uint8)[:, None, None], 100, 1).repeat(3, 2))
    assert cut(image, (96, 64), 0.5, 0.5, False).shape == (3, 96, 64)
    top, bottom = cut(image, (96, 64), 0.5, 0.0, False), cut(image, (96, 64), 0.5, 1.0, False)
    assert top[0, 0, 0] < 3 and bottom[0, -1, 0] > 196
    assert torch.equal(cut(image, 50, 0.3, 0.3, True), cut(image, (50, 50), 0.3, 0.3, True))


# the order
class Two:
    """Seven items in two buckets."""

    buckets = ([0, 2, 3, 5, 6], [1, 4])

    def __len__(self) -> int:
        return 7

    def batch(self, indices: Any, variants: Any = None) -> None: ...


@pytest.mark.parametrize("size", [1, 3, 4])
def test_every_item_is_drawn_equally_often_and_no_step_has_a_history(size: int) -> None:
    steps = [drawn(Two(), size, 5, step) for step in range(14)]
    assert all(len(step) == size and any({*step} <= {*bucket} for bucket in Two.buckets) for step in steps)
    for cycle in (steps[:7], steps[7:]):
        assert Counter(item for step in cycle for item in step) == dict.fromkeys(range(7), size)
    assert [drawn(Two(), size, 5, step) for step in reversed(range(14))] == steps[::-1]
    assert [drawn(Two(), size, 6, step) for step in range(14)] != steps
    assert sorted(item for batch in batches(Two(), 2) for item in batch) == [*range(7)]
    assert all(any({*batch} <= {*bucket} for bucket in Two.buckets) for batch in batches(Two(), 2))


def test_one_bucket_is_the_order_that_it_was(pairs: Path, tmp_path: Path) -> None:
    data = encoded(pairs, Tiny(), tmp_path, aspect_ratio_buckets=False)
    assert [drawn(data, 3, 1, step) for step in range(9)] == [shuffled(len(data), 3, 1, step) for step in range(9)]


# the cache
def test_both_images_of_a_pair_are_cut_to_its_bucket(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_cache, "SHARD", 4)
    data = encoded(pairs, Tiny(), tmp_path)
    shapes = {item: data.batch([item]).latents.shape[-2:] for item in range(len(data))}
    expected = [(5, 3) if h > w * 1.3 else (3, 5) if w > h * 1.3 else (4, 4) for h, w in SIZES]
    assert [tuple(shapes[item]) for item in range(len(data))] == expected
    assert sorted(map(len, data.buckets)) == sorted(Counter(expected).values())
    source = PreferencePairs(str(pairs), cache_dir=str(tmp_path)).read()
    for item, (h, w) in enumerate(expected):  # each row is its own pair, wherever it lies in a shard
        both = [cut(image.read(), (4 * h, 4 * w), 0.5, 0.5, False) for image in source[item].images]  # type: ignore[attr-defined]
        assert torch.equal(data.batch([item]).latents[0], Tiny().to_latent(torch.stack(both).float() / 255))
    batch = data.batch(data.buckets[1].tolist())  # type: ignore[union-attr]
    assert batch.latents.shape[:2] == (len(data.buckets[1]), 2)


def test_captioned_images_have_buckets_too(pairs: Path, tmp_path: Path) -> None:
    table = pq.read_table(pairs).select(["caption", "chosen"]).rename_columns(["caption", "image"])
    pq.write_table(table, tmp_path / "images.parquet")
    images = Images(str(tmp_path / "images.parquet"), cache_dir=str(tmp_path), aspect_ratio_buckets=BUCKETS)
    data = images.prepare(quiet(Tiny()))
    assert {tuple(data.batch([k]).latents.shape[-2:]) for k in range(len(data))} == {(4, 4), (5, 3), (3, 5)}
    one = Images(str(tmp_path / "images.parquet"), cache_dir=str(tmp_path), resolution="12x20").prepare(quiet(Tiny()))
    assert one.batch(range(len(one))).latents.shape == (len(SIZES), 3, 5, 3)


# the network
def family_of(kind: str, tiny: Build) -> Family:
    return SDXL(tiny_families.sdxl(), "tiny-sdxl") if kind == "sdxl" else tiny(kind)


@pytest.mark.parametrize("kind", [pytest.param("epsilon", marks=pytest.mark.slow), "sdxl", "flow"])
def test_a_bucketed_batch_costs_what_its_rows_do(kind: str, tiny: Build, pairs: Path, tmp_path: Path) -> None:
    """At its own size, with SDXL's sizes as conditions; and so with the means that validation reports."""
    family = family_of(kind, tiny)
    step = family.cell * family.patch * (2 if kind == "epsilon" else 1) * (2 if kind == "sdxl" else 1)
    sizes = [(4 * step, 4 * step), (6 * step, 2 * step), (2 * step, 6 * step)]  # height, width
    data = encoded(pairs, family, tmp_path, aspect_ratio_buckets=[f"{w}x{h}" for h, w in sizes])
    policy, objective = Policy(family, LoRA(2)), DPO(beta=100.0, proportion_empty_prompts=0.0)
    for parameter in policy.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    heard: list[tuple[Tensor, Any]] = []

    def hear(module: Any, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        heard.append((x, kwargs.get("added_cond_kwargs")))

    policy.denoiser.register_forward_pre_hook(hear, with_kwargs=True)
    portraits = 0
    for bucket in data.buckets:
        items = [int(item) for item in bucket[:2]]
        losses = []
        for index in (items, *([item] for item in items)):
            ctx = Context(policy, 0, 0, index)
            loss, _ = objective.loss(ctx, objective.rollout(ctx, data.batch(index)))
            losses.append(loss.item())
        assert losses[0] == pytest.approx(sum(losses[1:]) / len(items), rel=1e-5, abs=1e-6)
    for x, added in heard:
        size = tuple(side * family.cell for side in x.shape[-2:])
        assert size in sizes
        portraits += size == sizes[1]
        if kind == "sdxl":
            assert added["time_ids"][0].tolist() == [*size, 0, 0, *size]
    assert portraits and (kind != "sdxl" or heard[0][1] is not None)
    if kind == "flow":  # a mean over items of every size
        before = policy.evaluations["trained"]
        whole = validation_metrics(objective, policy, data, 3)["loss"]
        once = policy.evaluations["trained"] - before
        parts = [validation_metrics(objective, policy, data, 3, rank, 2)["loss"] for rank in range(2)]
        assert whole == pytest.approx(sum(parts)) and min(parts) > 0  # shared by processes, each pair seen by one
        assert policy.evaluations["trained"] - before == 2 * once
        assert whole == pytest.approx(validation_metrics(objective, policy, data, 1)["loss"], rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["epsilon", "sdxl", "flow"])
def test_pictures_of_any_size_are_the_stock_pipelines(kind: str, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny_folders[kind] if kind in tiny_folders else tiny_families.save(kind, tmp_path / kind)
    case = FamilyCase(folder, prompts=("a red star", "two blue circles"), num_inference_steps=3)
    family = case.load()
    height, width = 6 * 2 * family.cell, 4 * 2 * family.cell
    seeds, scale = [3, 4], case.guidance_scale
    ours = sample_images(family.predict, family, case.prompts, seeds, 3, scale, resolution=f"{width}x{height}")
    assert ours.shape == (2, 3, height, width)
    x = initial_noise(family.latent_shape(height, width), seeds)
    case.close(ours, case.draw(family, case.load_stock(family), x, scale, "pt"), "images")


# the commands
def settings(folder: Path, pairs: Path, tmp_path: Path) -> dict[str, Any]:
    arguments = {"path": str(pairs), "cache_dir": str(tmp_path / "cache"), "aspect_ratio_buckets": BUCKETS}
    data = {"class_path": "PreferencePairs", "init_args": arguments}
    return {
        "pretrained_model_name_or_path": str(folder),
        "data": data,
        "validation_data": data,
        "objective": {"class_path": "DPO", "init_args": {"beta": 100.0}},
        "output_dir": str(tmp_path / "run"),
        "lora": {"rank": 2},
        "train_batch_size": 4,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "report_to": "none",
    }


@pytest.mark.slow
def test_a_run_over_buckets_resumes_at_any_step(tiny_folders: dict[str, Path], pairs: Path, tmp_path: Path) -> None:
    config = settings(tiny_folders["flow"], pairs, tmp_path)
    assert main(["--config", write(config)]) == 0
    half = config | {"output_dir": str(tmp_path / "half")}
    assert main(["--config", write(half), "--max_train_steps", "2"]) == 0
    assert main(["--config", write(half), "--resume_from_checkpoint", "latest"]) == 0
    assert same(weights(tmp_path / "run"), weights(tmp_path / "half"))
    kept = [line["loss"] for line in untimed(tmp_path / "run") if "loss" in line]
    assert kept == [line["loss"] for line in untimed(tmp_path / "half") if "loss" in line] and len(kept) == 4


def test_rollouts_are_drawn_at_the_size_of_the_prompts(
    tiny_folders: dict[str, Path], pairs: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a red star\ntwo blue circles\n")
    config = settings(tiny_folders["flow"], pairs, tmp_path) | {
        "data": {"class_path": "Prompts", "init_args": {"path": str(tmp_path / "prompts.txt"), "resolution": "16x24"}},
        "validation_data": None,
        "objective": {
            "class_path": "PolicyGradient",
            "init_args": {"images_per_prompt": 2, "sampler": {"num_inference_steps": 2}},
        },
        "rewards": [{"name": "tests.test_buckets.Tall"}],
        "rollout_batch_size": 2,
        "train_batch_size": 4,
        "max_train_steps": 1,
        "checkpointing_steps": 0,
    }
    assert main(["--config", write(config)]) == 0
    assert Tall.seen == {(24, 16)}
    words = [
        "--pretrained_model_name_or_path",
        str(tiny_folders["flow"]),
        "--prompts",
        "a star",
        "--resolution",
        "16x24",
    ]
    assert sample_main([*words, "--num_inference_steps", "2", "--output_dir", str(tmp_path / "out")]) == 0
    assert {Image.open(file).size for file in tmp_path.glob("out/*.png")} >= {(16, 24)}


class Tall(Bright):
    """A reward that looks at sizes."""

    seen: set[tuple[int, int]] = set()  # noqa: RUF012

    def score(self, *, images: Tensor, prompts: Any, metadata: Any = None) -> Tensor:
        self.seen.add((images.shape[-2], images.shape[-1]))
        return super().score(images=images, prompts=prompts, metadata=metadata)
