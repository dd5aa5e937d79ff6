"""Data at size: an index instead of reading rows again, text embeddings at their own length, in 8 bits, or not kept."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from align import families
from align.common.errors import DataError
from align.data import Images, PreferencePairs, equal_keys, latent_cache, text_cache
from align.data.dataset import shuffled
from align.data.mapped_files import MappedFiles
from align.data.packed import pack, unpack
from align.families import Conditioning
from rewards.data.tables import ParquetTable
from rewards.data.verdicts import contradicted
from tests.test_data import Tiny, jsonl, noise, quiet, same, whole

COUNT = 10


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_cache, "SHARD", 4)
    monkeypatch.setattr(text_cache, "TEXTS", 3)


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    columns = {
        "caption": [f"thing {index % 8}" for index in range(COUNT)],
        "jpg_0": [noise(index) for index in range(COUNT)],
        "jpg_1": [noise(1000 + index) for index in range(COUNT)],
        "label_0": [float(index % 2) for index in range(COUNT)],
    }
    pq.write_table(pa.table(columns), tmp_path / "train.parquet", row_group_size=3)
    return tmp_path / "train.parquet"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The columns that were read of parquet files, and ``record`` for each row with its images."""
    asked: list[str] = []
    values, record = ParquetTable.values, ParquetTable.record

    def told_values(self: ParquetTable, name: str) -> Iterator[Any]:
        asked.append(name)
        return values(self, name)

    def told_record(self: ParquetTable, row: int) -> dict[str, Any]:
        asked.append("record")
        return record(self, row)

    monkeypatch.setattr(ParquetTable, "values", told_values)
    monkeypatch.setattr(ParquetTable, "record", told_record)
    return asked


# the index
def test_a_second_start_reads_no_row(parquet: Path, tmp_path: Path, reads: list[str]) -> None:
    first = PreferencePairs(str(parquet), cache_dir=str(tmp_path / "c"))
    one = whole(first.prepare(quiet(Tiny())))
    assert "caption" in reads and "record" in reads
    reads.clear()
    two = whole(PreferencePairs(str(parquet), cache_dir=str(tmp_path / "c")).prepare(quiet(family := Tiny())))
    assert same(one, two) and not reads and not family.pictures
    PreferencePairs(str(parquet), cache_dir=str(tmp_path / "c"), limit=4, random_flip=True).check()
    assert not reads, "views and limits are no matter of the rows"
    PreferencePairs(str(parquet), cache_dir=str(tmp_path / "c"), ties="error").check()
    assert "caption" in reads


def test_examples_come_back_as_they_were_read(parquet: Path, tmp_path: Path) -> None:
    pairs = PreferencePairs(str(parquet), cache_dir=str(tmp_path / "c"))
    made, found = pairs.read(), pairs.read()
    for one, other in zip(made.items, found.items, strict=True):
        assert (one.id, one.source, one.caption) == (other.id, other.source, other.caption)
        assert [image.data() for image in one.images] == [image.data() for image in other.images]
    assert [item.caption for item in found.items[2:4]] == ["thing 2", "thing 3"] and found[-1].id == COUNT - 1
    captions = list(dict.fromkeys(item.caption for item in found.items))
    assert [found[int(k)].caption for k in found.firsts] == captions
    assert [captions[k] for k in found.numbers] == [item.caption for item in found.items]


def test_an_index_follows_the_file(parquet: Path, tmp_path: Path) -> None:
    def count() -> int:
        return len(PreferencePairs(str(parquet), cache_dir=str(tmp_path / "c")).read())

    assert count() == COUNT
    pq.write_table(pq.read_table(parquet).slice(0, 7), parquet)
    assert count() == 7
    next((tmp_path / "c/index").glob("*/numbers.int32")).write_bytes(b"half")
    assert count() == 7


def test_an_index_follows_images_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in range(4):
        (tmp_path / f"images/{name}.png").write_bytes(noise(name))
    rows = [{"prompt": "a", "chosen": f"../images/{k}.png", "rejected": f"../images/{k + 1}.png"} for k in range(4)]
    (tmp_path / "rows").mkdir()
    jsonl(tmp_path / "rows/pairs.jsonl", rows)

    def read() -> tuple[int, str]:
        pairs = PreferencePairs(str(tmp_path / "rows"), cache_dir=str(tmp_path / "c"), max_bad_share=0.5).read()
        return len(pairs), pairs.digest

    before = read()
    assert before[0] == 3 and read() == before
    (tmp_path / "images/4.png").write_bytes(noise(4))  # what a row lacked
    after = read()
    assert after[0] == 4 and after == read()
    os.utime(tmp_path / "images/2.png", (1, 1))
    assert read()[0] == 4 and read()[1] != after[1]
    (tmp_path / "images/2.png").unlink()
    assert read()[0] == 2


def test_captioned_images_have_an_index_too(tmp_path: Path, reads: list[str]) -> None:
    columns = {"image": [noise(k) for k in range(5)], "caption": [f"thing {k}" for k in range(5)]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    one = whole(Images(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "c")).prepare(quiet(Tiny())))
    reads.clear()
    two = whole(Images(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "c")).prepare(quiet(Tiny())))
    assert same(one, two) and not reads


def test_equal_keys_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    monkeypatch.setattr(equal_keys, "PART", 16)
    keys = rng.integers(0, 9, (200, 2)).astype(np.uint64)
    rows = [tuple(row) for row in keys.tolist()]
    first = equal_keys.first_equal(keys, tmp_path / "first")
    assert first.tolist() == [rows.index(row) for row in rows]
    equal_keys.number_distinct(first, tmp_path / "firsts", tmp_path / "numbers")
    distinct = list(dict.fromkeys(rows))
    assert [rows[k] for k in equal_keys.mapped(tmp_path / "firsts", np.int32)] == distinct
    assert [distinct[k] for k in equal_keys.mapped(tmp_path / "numbers", np.int32)] == rows
    assert not len(equal_keys.first_equal(keys[:0], tmp_path / "none"))


def test_contradictions_are_counted_as_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    monkeypatch.setattr(equal_keys, "PART", 16)
    images = rng.integers(0, 7, (60, 2))
    images = images[images[:, 0] != images[:, 1]]
    pairs = np.sort(images, 1).astype(np.uint64)
    first = equal_keys.first_equal(pairs, tmp_path / "first")
    expected = contradicted((a, b) for a, b in images.tolist())
    assert equal_keys.contradictions(first, images[:, 0] < images[:, 1]) == expected > 0


def test_an_epoch_is_the_permutation_it_was() -> None:
    assert shuffled(1001, 1001, 7, 3) == np.random.default_rng([7, 3]).permutation(1001).tolist()


def test_mapped_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    monkeypatch.setattr("align.data.mapped_files.MAPPED", 2)
    for k in range(4):
        save_file({"x": torch.full((3,), float(k))}, tmp_path / f"{k}.safetensors")
    files = MappedFiles()
    assert [files[tmp_path / f"{k}.safetensors"]["x"][0].item() for k in (0, 1, 2, 3, 0)] == [0, 1, 2, 3, 0]
    assert len(files._mapped) == 2


# texts
def conditions(dtype: torch.dtype) -> Conditioning:
    """Three prompts as families give them: a narrow encoder beside a wide one, padding that is zeros, a mask, a -0."""
    torch.manual_seed(0)
    embeds = torch.randn(3, 9, 8)
    embeds[:, :4, 5:] = 0
    for row, length in enumerate((9, 6, 4)):
        embeds[row, length:] = 0
    embeds[0, 0, -1] = -0.0
    mask = torch.arange(9) < torch.tensor([[9], [6], [4]])
    return Conditioning({"prompt_embeds": embeds.to(dtype), "pooled": torch.randn(3, 5).to(dtype), "mask": mask})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_dropped_and_put_back_bit_for_bit(dtype: torch.dtype) -> None:
    cond = conditions(dtype)
    tensors = pack(cond)
    assert len(tensors["prompt_embeds:values"]) == 3 * 4 * 5 + (5 + 2) * 8 + 3  # the token of -0.0 is whole
    for row in range(3):
        back = unpack(tensors, row)
        for name, tensor in cond.tensors.items():
            assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor[row : row + 1])
            assert torch.equal(torch.signbit(back[name].float()), torch.signbit(tensor[row : row + 1].float()))


def test_float8_is_near_and_half_as_large() -> None:
    cond = Conditioning(
        {"prompt_embeds": torch.randn(2, 16, 256).bfloat16() * torch.logspace(-3, 3, 16)[:, None].bfloat16()}
    )
    exact, small = pack(cond), pack(cond, "float8")
    assert small["prompt_embeds:values"].nbytes * 2 == exact["prompt_embeds:values"].nbytes
    back = unpack(small, 1)["prompt_embeds"].float()
    wanted = cond["prompt_embeds"][1:].float()
    assert back.shape == wanted.shape and unpack(small, 1)["prompt_embeds"].dtype == torch.bfloat16
    largest = wanted.abs().amax(-1, keepdim=True)
    # half a unit of three bits of mantissa, or of the smallest subnormal; and bfloat16's own
    assert ((back - wanted).abs() <= wanted.abs() * (2**-4 + 2**-8) + largest / 448 * 2**-10).all()


@pytest.mark.parametrize("how", ["memory", "none"])
def test_texts_need_no_disk(how: Any, parquet: Path, tmp_path: Path) -> None:
    disk = whole(PreferencePairs(str(parquet), cache_dir=str(tmp_path / "c")).prepare(quiet(Tiny())))
    family = Tiny()
    pairs = PreferencePairs(str(parquet), cache_dir=str(tmp_path / "d"), text_cache=how).prepare(quiet(family))
    assert not family.texts and not list(tmp_path.glob("d/captions/*/*"))
    assert same(disk, whole(pairs)) and family.texts == 8
    assert same(disk, whole(pairs)) and family.texts == (8 if how == "memory" else 16)


def test_another_storage_is_another_cache(parquet: Path, tmp_path: Path) -> None:
    for storage, count in (("model", 8), ("float8", 8), ("float8", 0)):
        family = Tiny(dtype=torch.bfloat16)
        PreferencePairs(str(parquet), cache_dir=str(tmp_path), text_cache_dtype=storage).prepare(quiet(family))
        assert family.texts == count


def test_the_size_is_told_before_it_is_written(
    parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, setup = PreferencePairs(str(parquet), cache_dir=str(tmp_path / "c")), quiet(Tiny())
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(DataError, match=r"would take 10 pairs: 3.84 kB of latents, .* for 8 captions.* 100 bytes left"):
        pairs.prepare(setup)
    assert not list(tmp_path.glob("c/*/*/*.safetensors"))
    monkeypatch.undo()
    pairs.prepare(type(setup)(Tiny(), progress=True))
    assert "cache: 10 pairs: 3.84 kB of latents" in capsys.readouterr().err


def test_cut_captions_are_told_from_the_cache(
    parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(families.captions, "truncated", lambda family, texts: [t for t in texts if t >= "thing 6"])
    monkeypatch.setattr(families.captions, "token_limits", lambda family: {"tokenizer": 77})
    for _ in range(2):
        PreferencePairs(str(parquet), cache_dir=str(tmp_path)).prepare(quiet(Tiny()))
        assert "2 of 8 captions are longer than the 77 tokens" in capsys.readouterr().err


def test_a_killed_run_goes_on_with_its_texts(parquet: Path, tmp_path: Path) -> None:
    class Killed(Tiny):
        def encode(self, prompts: Any) -> Conditioning:
            if self.texts >= 3:
                raise KeyboardInterrupt
            return super().encode(prompts)

    pairs = PreferencePairs(str(parquet), cache_dir=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        pairs.prepare(quiet(Killed()))
    pairs.prepare(quiet(family := Tiny()))
    assert (family.pictures, family.texts) == (0, 5)
    assert json.loads(next(tmp_path.glob("index/*/about.json")).read_text())["total"] == COUNT
