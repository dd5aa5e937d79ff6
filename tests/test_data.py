"""Preference data: every layout is the same pairs, bad rows stop a run, and the cache encodes nothing twice."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from align.common.errors import DataError, UserError
from align.data import captioned, latent_cache, text_cache
from align.data import prompts as prompts_module
from align.data.dataset import ExampleSet, Setup, shuffled
from align.data.latent_cache import EncodedDataset
from align.data.mapped_files import MappedFiles
from align.data.preferences import PairBatch, PreferencePairs
from align.data.prompts import Prompts, PromptSet, read_prompts
from align.data.views import cut
from align.families import Conditioning
from align.objectives import DPO
from align.training.config import TrainConfig
from rewards.data.images import UnreadableError, decode
from rewards.data.tables import LazyImage
from tests.benchmarks.emoji_pairs import Pair as Drawn
from tests.benchmarks.emoji_pairs import pick_a_pic, write_layouts
from tests.pipelines import Build

COUNT = 10


class Tiny:
    """A stand-in for a family: 4x4 average pooling as the VAE, character codes as the text encoder."""

    def __init__(
        self, name: str = "tiny", dtype: torch.dtype = torch.float32, stop_after: int = 10**9, texts: str = "codes"
    ) -> None:
        self.name, self.dtype, self.stop_after, self.reader = name, dtype, stop_after, texts
        self.pictures = self.texts = 0

    resolution = 16
    pipe = SimpleNamespace(components={})  # no tokenizer
    device = torch.device("cpu")

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        height = height or self.resolution
        return (3, height // 4, (width or height) // 4)

    def to_latent(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.float32
        assert float(images.min()) >= 0
        assert float(images.max()) <= 1
        self.pictures += len(images)
        if self.pictures > self.stop_after:
            raise KeyboardInterrupt
        return torch.nn.functional.avg_pool2d(images, 4)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        assert not torch.is_grad_enabled()
        self.texts += len(prompts)
        codes = [[float(ord(letter)) for letter in prompt.ljust(8)[:8]] for prompt in prompts]
        return Conditioning(
            {"embeds": torch.tensor(codes).reshape(-1, 4, 2), "pooled": torch.tensor(codes).sum(1, True)}
        )

    def identity(self) -> Mapping[str, Mapping[str, object]]:
        return {"pictures": {"source": self.name}, "captions": {"source": self.reader}}


def png(array: np.ndarray[Any, Any], format: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, format, **options)
    return out.getvalue()


def noise(seed: int, height: int = 24, width: int = 20) -> bytes:
    return png(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def drawn() -> list[Drawn]:
    # two captions occur twice
    return [Drawn(f"thing-{index % 8}", noise(index), noise(1000 + index)) for index in range(COUNT)]


@pytest.fixture(scope="module")
def places(drawn: list[Drawn], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("layouts")
    pick_a_pic(drawn, folder / "train.parquet", seed=3)
    return {"parquet": folder / "train.parquet", **write_layouts(drawn, folder)}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(latent_cache, "SHARD", 4)
    monkeypatch.setattr(text_cache, "TEXTS", 4)
    monkeypatch.setattr(captioned, "CACHE", str(tmp_path / "default-cache"))


def read_pairs(path: Path | str, **options: Any) -> ExampleSet:
    return PreferencePairs(str(path), **options).read()


def quiet(family: Any, *shares: Any) -> Setup:
    """What a run gives its data, without a bar: ``shares`` are seed, process and number of processes."""
    return Setup(family, *shares, progress=False)


def whole(pairs: EncodedDataset, variants: Sequence[int] | None = None) -> PairBatch:
    return pairs.batch(range(len(pairs)), variants)


def same(one: PairBatch, other: PairBatch) -> bool:
    conds = all(torch.equal(one.cond[name], other.cond[name]) for name in one.cond.tensors)
    return conds and torch.equal(one.latents, other.latents) and one.captions == other.captions and one.ids == other.ids


def table(file: Path, **columns: Sequence[object]) -> Path:
    # one row group of small pages, since a reader holds a page of each column
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), file, write_batch_size=16)
    return file


def jsonl(file: Path, rows: Sequence[object]) -> Path:
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return file


# layouts
LAYOUTS = {
    "parquet": "Pick-a-Pic",
    "shards": "Pick-a-Pic",
    "saved": "Pick-a-Pic",
    "siblings": "sibling folders chosen/ rejected/",
    "imagefolder": "imagefolder (text, file_name, rejected_file_name)",
    "pairs": "pairs (prompt, chosen, rejected)",
    "hpdv2": "HPDv2 (prompt, file_path, human_preference)",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_holds_the_same_pairs(name: str, places: dict[str, Path], drawn: list[Drawn]) -> None:
    found = read_pairs(places[name])
    assert found.layout.startswith(LAYOUTS[name])
    assert [pair.caption for pair in found.items] == [pair.caption for pair in drawn]
    assert [pair.id for pair in found.items] == list(range(COUNT))
    for pair, true in zip(found.items, drawn, strict=True):
        assert pair.images[0].read().tobytes() == decode(true.chosen).tobytes()
        assert pair.images[1].read().tobytes() == decode(true.rejected).tobytes()


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_encodes_the_same(name: str, places: dict[str, Path], tmp_path: Path) -> None:
    def batch(path: Path) -> PairBatch:
        pairs = PreferencePairs(str(path), random_flip=True, center_crop=False, variants=2, cache_dir=str(tmp_path))
        return whole(pairs.prepare(quiet(Tiny(), 5)), [0, 1] * 5)

    one = batch(places[name])
    assert one.latents.shape == (COUNT, 2, 3, 4, 4)
    assert one.cond["embeds"].shape == (COUNT, 4, 2)
    assert same(one, batch(places["parquet"]))


def test_latents_are_winner_first(places: dict[str, Path], drawn: list[Drawn], tmp_path: Path) -> None:
    batch = PreferencePairs(str(places["hpdv2"]), cache_dir=str(tmp_path)).prepare(quiet(Tiny())).batch([7, 2])
    views = [cut(decode(data), 16, 0.5, 0.5, False) for data in (drawn[7].chosen, drawn[7].rejected)]
    assert torch.equal(batch.latents[0], Tiny().to_latent(torch.stack(views).float() / 255))
    assert batch.ids == [7, 2]
    assert batch.captions == ["thing 7", "thing 2"]
    assert torch.equal(batch.cond["pooled"][1], torch.tensor([float(sum(map(ord, "thing 2".ljust(8))))]))


def test_a_hub_id_is_loaded_by_datasets(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.load_from_disk(str(places["saved"]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read_pairs("owner/pairs", split="validation_unique")
    assert set(asked) == {("owner/pairs", "validation_unique")}
    assert len(found) == COUNT
    assert "hub" in found.layout


def test_a_dataset_dict_needs_its_split(places: dict[str, Path], tmp_path: Path) -> None:
    data = datasets.Dataset.load_from_disk(str(places["saved"]))
    datasets.DatasetDict({"train": data, "test": data.select(range(3))}).save_to_disk(str(tmp_path / "both"))
    assert len(read_pairs(tmp_path / "both", split="test")) == 3
    with pytest.raises(DataError, match=r"\['test', 'train'\].*split"):
        read_pairs(tmp_path / "both")


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_names_no_split_is_the_split_train(name: str, places: dict[str, Path], tmp_path: Path) -> None:
    """As ``datasets`` has it: the README's first command puts such a path into a config that says ``split: train``."""
    assert len(read_pairs(places[name], split="train")) == COUNT
    with pytest.raises(DataError, match="split"):
        read_pairs(places[name], split="validation")
    held_out = tmp_path / "test.parquet"
    held_out.symlink_to(places["parquet"])
    for place in (held_out, tmp_path):  # names a split, and another
        with pytest.raises(DataError, match="has no split 'train'"):
            read_pairs(place, split="train")


def test_w_l_folders_and_csv_and_hpdv3_and_columns(places: dict[str, Path], drawn: list[Drawn], tmp_path: Path) -> None:
    for old, new in (("chosen", "w"), ("rejected", "l")):
        (tmp_path / "kohya").mkdir(exist_ok=True)
        (tmp_path / "kohya" / new).symlink_to(places["siblings"] / old)
    csv = tmp_path / "metadata.csv"
    csv.write_text("chosen_file_name,rejected_file_name,text\n00000.png,rejected/00000.png,thing 0\n")
    hpdv3 = [{"prompt": "thing 0", "path1": "00000.png", "path2": "rejected/00000.png", "confidence": None}]
    (tmp_path / "v3.json").write_text(json.dumps(hpdv3))
    columns: dict[str, list[object]] = {
        "chosen": [drawn[0].chosen],
        "rejected": [drawn[0].rejected],
        "prompt": ["thing 0"],
    }
    readings = [
        read_pairs(tmp_path / "kohya"),
        read_pairs(csv, image_root=str(places["imagefolder"])),
        read_pairs(tmp_path / "v3.json", image_root=str(places["imagefolder"])),
        read_pairs(table(tmp_path / "columns.parquet", **columns)),
    ]
    for found in readings:
        assert (found[0].caption, found[0].images[0].data()) == ("thing 0", drawn[0].chosen)
        assert found[0].images[1].data() == drawn[0].rejected


def test_a_ranked_record_gives_every_pair(tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(noise(index))
    record = {"prompt": "p", "image_path": ["0.png", "1.png", "2.png"], "rank": [2, 1, 2]}
    (tmp_path / "test.json").write_text(json.dumps([record]))
    found = read_pairs(tmp_path, split="test")
    assert [(pair.id, pair.images[0].file.name, pair.images[1].file.name) for pair in found.items] == [
        (0, "1.png", "0.png"),
        (2, "1.png", "2.png"),
    ]
    assert found.ties == 1
    assert found.total == 3


def test_ties_are_dropped_and_counted_or_refused(tmp_path: Path) -> None:
    one, two = [noise(1)] * 3, [noise(2)] * 3
    file = table(tmp_path / "a.parquet", caption=["a", "b", "c"], jpg_0=one, jpg_1=two, label_0=[0.0, 0.5, 1.0])
    found = read_pairs(file)
    assert [(pair.id, pair.images[0].column) for pair in found.items] == [(0, "jpg_1"), (2, "jpg_0")]
    assert found.ties == 1
    with pytest.raises(DataError, match="row 1 is a tie"):
        read_pairs(file, ties="error")


def test_the_winners_share_of_the_votes_comes_with_each_pair(tmp_path: Path) -> None:
    """Of Pick-a-Pic's soft labels, where they are to be votes; of a column votes, for the first and the second image;
    of HPDv2's raw annotations."""
    for k in range(4):
        (tmp_path / f"{k}.png").write_bytes(noise(k))
    sides = {"jpg_0": "0.png", "jpg_1": "1.png"}
    rows = [{"caption": f"c{k}", **sides, "label_0": share} for k, share in enumerate([1, 0.75, 0.25, 0.5])]
    soft = tmp_path / "soft.jsonl"
    soft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="label_0 is the soft label 0.75"):
        read_pairs(soft)
    read = read_pairs(soft, soft_labels="votes")
    assert [(item.label, item.images[0].file.name) for item in read.items] == [
        (None, "0.png"),
        (0.75, "0.png"),
        (0.75, "1.png"),
    ]
    assert read.ties == 1
    counted = tmp_path / "votes.jsonl"
    rows = [{"caption": "a", **sides, "label_0": 0, "votes": [1, 3]}, {"caption": "b", **sides, "label_0": 1}]
    counted.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferencePairs(str(counted), cache_dir=str(tmp_path / "cache"))
    assert data.labelled and [item.label for item in data.items().items] == [0.75, None]
    batch = whole(data.prepare(quiet(Tiny())))
    assert batch.labels is not None
    assert batch.labels[0] == 0.75 and bool(batch.labels[1].isnan())
    (tmp_path / "plain.jsonl").write_text(json.dumps({"caption": "a", **sides, "label_0": 0}) + "\n")
    plain = PreferencePairs(str(tmp_path / "plain.jsonl"))
    assert not plain.labelled
    TrainConfig(plain, DPO()).check()
    TrainConfig(data, DPO(votes="weight")).check()
    with pytest.raises(UserError, match="DPO uses votes, and no row of .*plain.jsonl has any; expected a column votes"):
        TrainConfig(plain, DPO(votes="weight")).check()
    ranked = {"prompt": "a", "image_path": ["0.png", "1.png", "2.png"], "rank": [1, 2, 3]}
    ranked["raw_annotations"] = [{"rank": [1, 2, 3]}, {"rank": [2, 1, 3]}, {"rank": [1, 3, 2]}]
    (tmp_path / "hpd.json").write_text(json.dumps([ranked]))
    assert [item.label for item in read_pairs(tmp_path / "hpd.json").items] == [2 / 3, 1.0, 2 / 3]


def test_parquet_is_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    blobs = [rng.bytes(20_000) for _ in range(400)]
    labels = [1.0] * 400
    file = table(tmp_path / "a.parquet", caption=["x"] * 400, jpg_0=blobs, jpg_1=blobs[::-1], label_0=labels)
    before = pa.total_allocated_bytes()
    found = read_pairs(file)
    for index in (0, 1, 399, 5, 200):
        assert found[index].images[0].data() == blobs[index]
        assert found[index].images[1].data() == blobs[399 - index]
        assert pa.total_allocated_bytes() - before < 8_000_000  # of 16 MB


@pytest.mark.parametrize("column", ["caption", "label_0"])
def test_a_damaged_column_is_of_its_file(tmp_path: Path, column: str) -> None:
    """pyarrow names none, and not the cache that was being written is at fault."""
    rows = {"caption": ["a star"] * 3, "jpg_0": [noise(1)] * 3, "jpg_1": [noise(2)] * 3, "label_0": [1.0] * 3}
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table(rows), file, use_dictionary=False)
    group = pq.read_metadata(file).row_group(0)
    (place,) = (c.data_page_offset for c in map(group.column, range(4)) if c.path_in_schema == column)
    data = bytearray(file.read_bytes())
    data[place : place + 20] = b"\xff" * 20
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"^\S+/a.parquet is damaged near row 0: "):
        PreferencePairs(str(file), cache_dir=str(tmp_path / "cache")).check()


# errors
def test_a_missing_path_and_an_unknown_layout_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        read_pairs(tmp_path / "nothing")
    with pytest.raises(DataError, match="no file or folder"):
        read_pairs("data/nothing.jsonl")
    (tmp_path / "notes.md").write_text("hello")
    for path in (tmp_path, tmp_path / "notes.md"):
        with pytest.raises(DataError, match=r"notes\.md.*Pick-a-Pic.*sibling folders"):
            read_pairs(path)
    with pytest.raises(DataError, match=r"\['picture', 'words'\]"):
        read_pairs(jsonl(tmp_path / "a.jsonl", [{"picture": "a", "words": "b"}]))
    with pytest.raises(DataError, match="caption_column 'words'"):
        read_pairs(
            jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}]), caption_column="words"
        )
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="not parquet"):
        read_pairs(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="no split"):
        read_pairs(tmp_path / "a.jsonl", split="test")


def test_heldout_pairs_are_never_mixed_in(drawn: list[Drawn], tmp_path: Path) -> None:
    pick_a_pic(drawn, tmp_path / "train.parquet", seed=0)
    pick_a_pic(drawn[:2], tmp_path / "heldout.parquet", seed=0)
    with pytest.raises(DataError, match=r"heldout.*train.*say which"):
        read_pairs(tmp_path)
    assert len(read_pairs(tmp_path, split="heldout")) == 2
    with pytest.raises(DataError, match="no split 'test'"):
        read_pairs(tmp_path, split="test")


def test_bad_rows_are_reported_and_stop_a_run(tmp_path: Path) -> None:
    for index in range(2):
        (tmp_path / f"{index}.png").write_bytes(noise(index))
    good = {"text": "fine", "chosen": "0.png", "rejected": "1.png"}
    rows = [good, good | {"text": " "}, "{broken\n", good | {"chosen": "gone.png"}, {"text": "x", "chosen": "0.png"}]
    file = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"4 of 5 rows are unusable, listed in .*bad-rows-a-.*[\s\S]*empty caption"):
        read_pairs(file)
    lines = [json.loads(line) for line in PreferencePairs(str(file)).report.read_text().splitlines()]
    assert [line["row"] for line in lines] == [1, 2, 3, 4]
    assert lines[1]["source"].endswith("a.jsonl:3")
    wanted = ("empty caption", "not a JSON object", "no such file", "must be paths")
    assert all(want in line["reason"] for want, line in zip(wanted, lines, strict=True))
    assert [pair.id for pair in read_pairs(file, max_bad_share=0.8).items] == [0]
    label = table(tmp_path / "a.parquet", caption=["a"], jpg_0=[b""], jpg_1=[b""], label_0=[float("nan")])
    with pytest.raises(DataError, match="label_0 is nan"):
        read_pairs(label)


def test_pictures_that_cannot_be_read_are_found_before_training(tmp_path: Path) -> None:
    one = [noise(0), noise(0)[:400], noise(0), b"no picture", noise(0), noise(0)]
    two = [noise(1), noise(1), noise(0), noise(1), noise(2), None]
    captions = ["first", "cut off", "twins", "text", "last", "null"]
    file = table(tmp_path / "a.parquet", caption=captions, jpg_0=one, jpg_1=two, label_0=[1.0] * 6)
    strict = PreferencePairs(str(file), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="4 of 6 rows are unusable"):
        strict.prepare(quiet(Tiny()))
    lines = [json.loads(line) for line in strict.report.read_text().splitlines()]
    assert [line["row"] for line in lines] == [1, 2, 3, 5]
    assert "jpg_0: not a readable image" in lines[0]["reason"]
    assert "the same" in lines[1]["reason"]
    assert "found nothing" in lines[3]["reason"]
    family = Tiny()
    kept = PreferencePairs(str(file), max_bad_share=0.7, cache_dir=str(tmp_path / "cache")).prepare(quiet(family))
    assert kept.ids == [0, 4]
    assert kept.batch([1]).captions == ["last"]
    assert family.pictures == family.texts == 0, "a repaired setting must not encode again"


def test_latents_must_be_finite(places: dict[str, Path], tmp_path: Path) -> None:
    class Overflowing(Tiny):
        def to_latent(self, images: Tensor) -> Tensor:
            return super().to_latent(images) / 0

    with pytest.raises(DataError, match="not finite"):
        PreferencePairs(str(places["parquet"]), cache_dir=str(tmp_path)).prepare(quiet(Overflowing()))


# cache
def test_nothing_is_encoded_twice(places: dict[str, Path], tmp_path: Path) -> None:
    pairs = PreferencePairs(str(places["pairs"]), cache_dir=str(tmp_path))
    first, second = Tiny(), Tiny()
    one = whole(pairs.prepare(quiet(first, 1)))
    two = whole(pairs.prepare(quiet(second, 2)))
    assert (first.pictures, first.texts) == (2 * COUNT, 8)
    assert (second.pictures, second.texts) == (0, 0), "without randomness the seed does not matter"
    assert same(one, two)


def test_an_interrupted_run_goes_on_where_it_was(places: dict[str, Path], tmp_path: Path) -> None:
    pairs = PreferencePairs(str(places["pairs"]), cache_dir=str(tmp_path / "a"))
    with pytest.raises(KeyboardInterrupt):
        pairs.prepare(quiet(Tiny(stop_after=10)))
    assert len(list(tmp_path.glob("a/pairs/*/latents-*.safetensors"))) == 1
    family = Tiny()
    resumed = whole(pairs.prepare(quiet(family)))
    assert family.pictures == 2 * (COUNT - 4)
    fresh = PreferencePairs(str(places["pairs"]), cache_dir=str(tmp_path / "b")).prepare(quiet(Tiny()))
    assert same(resumed, whole(fresh))


def test_damaged_and_foreign_files_are_made_again(places: dict[str, Path], tmp_path: Path) -> None:
    pairs = PreferencePairs(str(places["pairs"]), cache_dir=str(tmp_path))
    before = whole(pairs.prepare(quiet(Tiny())))
    other = PreferencePairs(str(places["pairs"]), limit=4, cache_dir=str(tmp_path)).prepare(quiet(Tiny()))
    assert len(other) == 4
    folder = next(file.parent for file in tmp_path.glob("pairs/*/latents-00001.safetensors"))
    small = next(f.parent for f in tmp_path.glob("pairs/*/latents-00000.safetensors") if f.parent != folder)
    (folder / "latents-00000.safetensors").write_bytes((small / "latents-00000.safetensors").read_bytes())
    cut_off = folder / "latents-00001.safetensors"
    cut_off.write_bytes(cut_off.read_bytes()[:-8])
    next(tmp_path.glob("captions/*/conds-00001.safetensors")).unlink()
    (folder / "latents-00002.safetensors.1.tmp").write_bytes(b"left by a killed run")
    family = Tiny()
    assert same(before, whole(pairs.prepare(quiet(family))))
    assert (family.pictures, family.texts) == (2 * (4 + 4), 4)


def test_what_an_encoding_depends_on_makes_another_cache(drawn: list[Drawn], tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    pick_a_pic(drawn, file, seed=0)

    def work(family: Tiny, seed: int = 0, **options: Any) -> tuple[int, int]:
        PreferencePairs(str(file), cache_dir=str(tmp_path / "c"), **options).prepare(quiet(family, seed))
        return family.pictures, family.texts

    crop, pictures, captions = {"center_crop": False}, 2 * COUNT, 8
    assert work(Tiny()) == (pictures, captions)
    assert work(Tiny()) == (0, 0)
    assert work(Tiny("another VAE")) == (pictures, 0)
    assert work(Tiny(texts="another text encoder")) == (0, captions)
    assert work(Tiny(), resolution=8) == (pictures, 0)
    assert work(Tiny(dtype=torch.bfloat16)) == (pictures, captions)
    assert work(Tiny(), **crop) == (pictures, 0)
    assert work(Tiny(), seed=1, **crop) == (pictures, 0)
    assert work(Tiny(), seed=1, **crop) == (0, 0)
    pick_a_pic(drawn[::-1], file, seed=0)
    assert work(Tiny()) == (pictures, captions)


def test_half_precision_models_have_half_precision_caches(places: dict[str, Path], tmp_path: Path) -> None:
    pairs = PreferencePairs(str(places["pairs"]), cache_dir=str(tmp_path))
    assert whole(pairs.prepare(quiet(Tiny(dtype=torch.bfloat16)))).latents.dtype == torch.bfloat16
    assert whole(pairs.prepare(quiet(Tiny()))).latents.dtype == torch.float32


def test_ranks_share_the_work(places: dict[str, Path], tmp_path: Path) -> None:
    meet = threading.Barrier(2)
    families, results = [Tiny(), Tiny()], dict[int, PairBatch]()

    def wait() -> None:
        meet.wait(30)

    def run(rank: int) -> None:
        pairs = PreferencePairs(str(places["parquet"]), cache_dir=str(tmp_path / "two"))
        ready = pairs.prepare(Setup(families[rank], 0, rank, 2, False, wait))  # type: ignore[arg-type]
        results[rank] = whole(ready)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = PreferencePairs(str(places["parquet"]), cache_dir=str(tmp_path / "one")).prepare(quiet(Tiny()))
    assert same(results[0], whole(alone))
    assert same(results[1], whole(alone))
    assert [family.pictures for family in families] == [2 * 4, 2 * (4 + 2)]
    assert sum(family.texts for family in families) == 8


# views
def test_a_pair_shares_crop_and_flip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (16, 40, 3), dtype=np.uint8) for _ in range(6)]
    columns: dict[str, list[object]] = {"jpg_0": [png(a) for a in arrays], "jpg_1": [png(255 - a) for a in arrays]}
    file = table(tmp_path / "a.parquet", caption=["x"] * 6, **columns, label_0=[1.0] * 6)
    pairs = PreferencePairs(
        str(file), center_crop=False, random_flip=True, variants=4, cache_dir=str(tmp_path / "cache")
    )
    ready = pairs.prepare(quiet(Tiny()))
    views = torch.stack([whole(ready, [variant] * 6).latents for variant in range(4)])
    torch.testing.assert_close(views[:, :, 0] + views[:, :, 1], torch.ones_like(views[:, :, 0]))
    assert len({tuple(view[0].flatten().tolist()) for view in views[:, 0]}) == 4, "the variants are different views"


def test_cutting() -> None:
    image = Image.fromarray(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3))  # 6 wide, 4 high
    plain = cut(image, 4, 0.5, 0.5, False)
    assert torch.equal(plain, torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, :, 1:5])
    assert torch.equal(cut(image, 4, 0.5, 0.5, True), plain.flip(2))
    assert torch.equal(cut(image, 4, 1.0, 0.0, False), torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, :, 2:])
    for width, height in ((333, 17), (17, 333), (1, 9), (511, 512)):
        assert cut(Image.new("RGB", (width, height)), 16, 0.3, 1.0, False).shape == (3, 16, 16)


def test_variants_that_would_be_equal_are_refused() -> None:
    with pytest.raises(ValueError, match="center_crop"):
        PreferencePairs("x", variants=2)
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        PreferencePairs("x", limit=0)


# pictures
def test_pictures_become_upright_rgb() -> None:
    grey = np.array([[0, 257 * 100], [65535, 257 * 200]], dtype=np.uint16)
    assert np.asarray(decode(png(grey)))[..., 0].tolist() == [[0, 100], [255, 200]]
    clear = np.zeros((2, 2, 4), dtype=np.uint8)
    clear[0, 0] = (10, 20, 30, 255)
    shown = np.asarray(decode(png(clear)))
    assert shown[0, 0].tolist() == [10, 20, 30]
    assert shown[1, 1].tolist() == [255, 255, 255]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    assert decode(png(np.zeros((4, 9, 3), dtype=np.uint8), "JPEG", exif=exif)).size == (4, 9)
    palette = io.BytesIO()
    Image.fromarray(clear[..., :3]).quantize(4).save(palette, "GIF")
    assert decode(palette.getvalue()).mode == "RGB"
    for data in (b"", b"text", noise(0)[:200]):
        with pytest.raises(UnreadableError):
            decode(data)
    with pytest.raises(UnreadableError, match="cannot be opened"):
        LazyImage(Path("/nowhere/a.png")).read()


# prompts and order
def test_prompts(tmp_path: Path) -> None:
    wanted = ["a red star", "zwei Kreise, groß"]
    (tmp_path / "a.txt").write_text("\ufeffa red star\r\n\n zwei Kreise, groß \n", encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(wanted))
    jsonl(tmp_path / "a.jsonl", [{"prompt": words} for words in wanted])
    for name in ("a.txt", "a.json", "a.jsonl"):
        assert read_prompts(tmp_path / name) == wanted
        assert Prompts(str(tmp_path / name)).read() == [{"prompt": words} for words in wanted]
        assert len(Prompts(str(tmp_path / name), limit=1).read()) == 1
    told = jsonl(tmp_path / "c.jsonl", [{"prompt": " a star ", "count": 3}])
    assert Prompts(str(told)).read() == [{"prompt": "a star", "count": 3}]
    with pytest.raises(DataError, match=r"b\.jsonl:2.*prompt"):
        read_prompts(jsonl(tmp_path / "b.jsonl", [{"prompt": "a"}, {"tag": 1}]))
    with pytest.raises(DataError, match="no prompt file"):
        read_prompts(tmp_path / "gone.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.txt")


@pytest.mark.parametrize(("count", "size"), [(10, 3), (7, 7), (3, 8), (1, 2), (100, 32)])
def test_each_epoch_is_a_permutation_and_steps_have_no_history(count: int, size: int) -> None:
    steps = range(3 * count)
    backwards = {step: shuffled(count, size, 4, step) for step in reversed(steps)}
    drawn = [index for step in steps for index in backwards[step]]
    epochs = [drawn[k : k + count] for k in range(0, len(drawn) - count + 1, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert backwards[2] == shuffled(count, size, 4, 2)
    if count == 100:
        assert epochs[0] != epochs[1]
        assert shuffled(count, size, 5, 0) != backwards[0]
    with pytest.raises(ValueError, match="cannot draw"):
        shuffled(0, 4, 0, 0)


def test_check_and_prepare_read_the_data_set_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = PreferencePairs("shapes-preferences", split="train")
    reads, read = [], PreferencePairs.read
    monkeypatch.setattr(PreferencePairs, "read", lambda self: reads.append(self.path) or read(self))
    data.check()
    assert data.items() is data.items() and len(reads) == 1
    data.path = "shapes-preferences-sd3"
    data.check()
    assert reads == ["shapes-preferences", "shapes-preferences-sd3"]


def test_prompts_are_remembered_within_bounds(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    family = tiny("epsilon")
    asked: list[str] = []
    encode = family.encode
    monkeypatch.setattr(family, "encode", lambda prompts: asked.extend(prompts) or encode(prompts))
    found = PromptSet(family, [])
    one = found.encode(["a star"])
    monkeypatch.setattr(prompts_module, "REMEMBERED", 2 * one.nbytes)
    for text in ("a circle", "a star", "a square", "a star", "a circle"):  # the square drives out the circle
        assert torch.equal(found.encode([text])["prompt_embeds"], encode([text])["prompt_embeds"])
    assert asked == ["a star", "a circle", "a square", "a circle"]
    few = PromptSet(family, [], remember=1)
    asked.clear()
    few.encode(["a star", "a circle", "a star"])
    assert asked == ["a star", "a circle", "a star"]


def test_a_file_that_is_cut_while_it_is_mapped_is_an_error(tmp_path: Path) -> None:
    save_file({"latents": torch.arange(100_000.0)}, tmp_path / "shard.safetensors")
    files = MappedFiles()
    assert files[tmp_path / "shard.safetensors"]["latents"][7] == 7
    os.truncate(tmp_path / "shard.safetensors", 2000)
    with pytest.raises(DataError, match="was cut while it was read"):
        files[tmp_path / "shard.safetensors"]
    save_file({"latents": torch.arange(9.0)}, tmp_path / "other.safetensors")
    assert files[tmp_path / "other.safetensors"]["latents"][7] == 7
    (tmp_path / "other.safetensors").unlink()
    assert files[tmp_path / "other.safetensors"]["latents"][7] == 7
