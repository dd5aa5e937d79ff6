"""Captioned pictures: every layout gives the same batches; the embedded world's own scenes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from align.common.errors import DataError
from align.data.captioned import ImageBatch, Images
from align.shapes.scenes import Rendered, Scenes
from align.shapes.world import HELD_OUT
from rewards.models.shapes import judge, parse
from tests.test_data import Tiny, noise, quiet

COUNT = 7
CAPTIONS = [f"thing {number % 3}" for number in range(COUNT)]
PICTURES = [noise(number) for number in range(COUNT)]


def folder(place: Path, sidecars: bool) -> Path:
    place.mkdir()
    for number, data in enumerate(PICTURES):
        (place / f"{number}.png").write_bytes(data)
        if sidecars:
            (place / f"{number}.txt").write_text(CAPTIONS[number])
    if not sidecars:
        lines = [json.dumps({"file_name": f"{number}.png", "text": CAPTIONS[number]}) for number in range(COUNT)]
        (place / "metadata.jsonl").write_text("\n".join(lines))
    return place


def parquet(place: Path) -> Path:
    table = pa.table({"caption": CAPTIONS, "image": [{"bytes": data, "path": None} for data in PICTURES]})
    pq.write_table(table, place, row_group_size=3)
    return place


def tar(place: Path) -> Path:
    with tarfile.open(place, "w") as archive:
        for number, data in enumerate(PICTURES):
            for suffix, content in (("png", data), ("txt", CAPTIONS[number].encode())):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return place


def saved(place: Path) -> Path:
    from datasets import Dataset, Features, Value
    from datasets import Image as Encoded

    rows = {"caption": CAPTIONS, "image": [{"bytes": data, "path": None} for data in PICTURES]}
    Dataset.from_dict(rows, features=Features(caption=Value("string"), image=Encoded())).save_to_disk(str(place))
    return place


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("images")
    return {
        "metadata": folder(place / "metadata", sidecars=False),
        "sidecars": folder(place / "sidecars", sidecars=True),
        "parquet": parquet(place / "images.parquet"),
        "tar": tar(place / "images.tar"),
        "saved": saved(place / "saved"),
    }


def encoded(path: Path, cache: Path, **options: int) -> ImageBatch:
    found = Images(str(path), cache_dir=str(cache), **options).prepare(quiet(Tiny()))
    batch = found.batch(range(len(found)))
    assert isinstance(batch, ImageBatch)
    return batch


@pytest.mark.parametrize("name", ["metadata", "sidecars", "parquet", "tar", "saved"])
def test_every_layout_gives_the_same_batches(name: str, layouts: dict[str, Path], tmp_path: Path) -> None:
    batch = encoded(layouts[name], tmp_path)
    pixels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in PICTURES]
    squares = [torch.from_numpy(p.astype(np.float32) / 255).permute(2, 0, 1) for p in pixels]
    assert batch.captions == CAPTIONS and batch.ids == list(range(COUNT))
    assert batch.latents.shape == (COUNT, 3, 4, 4)
    # 20 x 24 pixels are scaled to 16 x 19 and cut: the mean survives that
    for row, square in zip(batch.latents, squares, strict=True):
        assert abs(row.mean() - square.mean()) < 0.02
    again = encoded(layouts["metadata"], tmp_path / "other")
    assert torch.equal(batch.latents, again.latents)
    assert torch.equal(batch.cond["embeds"], again.cond["embeds"])


def test_a_path_may_be_relative(layouts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(layouts["metadata"].parent)
    batch = encoded(Path("metadata"), tmp_path)
    assert torch.equal(batch.latents, encoded(layouts["metadata"], tmp_path / "other").latents)


def test_pictures_in_larger_files_cost_one_pass(layouts: dict[str, Path]) -> None:
    items = Images(str(layouts["tar"])).read().items
    assert [item.images[0].data() for item in items] == PICTURES
    assert items[2].images[0].data() == PICTURES[2], "and going back is possible"
    stream = items[0].images[0].table.cells()  # type: ignore[attr-defined]
    asked: list[int] = []
    rows = stream.source.rows
    object.__setattr__(stream.source, "rows", lambda wanted: asked.append(1) or rows(wanted))
    for item in items:
        item.images[0].data()
    assert len(asked) == 1


def test_rows_without_a_caption_or_a_picture_are_named(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(PICTURES[1])
    rows = [{"image": "1.png", "text": "good"}, {"image": "1.png", "text": " "}, {"image": "gone.png", "text": "x"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"2 of 3 rows are unusable(.|\n)*no caption(.|\n)*no such file"):
        Images(str(path), cache_dir=str(tmp_path)).check()
    kept = Images(str(path), max_bad_share=0.7, cache_dir=str(tmp_path)).read()
    assert [item.caption for item in kept.items] == ["good"]
    with pytest.raises(DataError, match="no file or folder"):
        Images(str(tmp_path / "nowhere")).check()


def test_scenes_are_what_their_captions_say_and_named_by_their_seed(tmp_path: Path) -> None:
    found = Scenes(limit=60).read()
    assert len(found) == 60 and len({parse(item.caption).task for item in found.items}) == 6
    for item in found.items:
        picture = Image.open(io.BytesIO(item.images[0].data()))
        strict, _ = judge(item.caption, torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
        assert strict == 1
        pairs = {(thing.colour, thing.shape) for thing in parse(item.caption).things}
        assert not pairs & HELD_OUT, "the held-out combinations stay unseen"
    assert Rendered(3, "0").data() == Rendered(3, "0").data() != Rendered(3, "1").data()
    batch = Scenes(limit=4, cache_dir=str(tmp_path)).prepare(quiet(Tiny())).batch([2, 0])
    assert batch.captions == [found.items[2].caption, found.items[0].caption]
