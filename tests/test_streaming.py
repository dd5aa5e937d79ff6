"""``streaming`` of hub data sets: rows in `datasets`' order, pictures read once and never kept, from a stand-in hub."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfFileSystem, constants

from align.common.errors import DataError
from align.data import Images, PreferencePairs, RatedImages, latent_cache, text_cache
from rewards.data.hub_files import _hub_footers, hub_files
from tests.stand_in_hub import Hub, Repo, running
from tests.test_data import Tiny, noise, quiet, same

COUNT, EACH = 12, 4  # rows, and rows of a file, of two row groups


def picture(seed: int) -> bytes:
    """About 77 kB; of a parquet file the last 64 kB come with its footer."""
    return noise(seed, 160, 160)


PICTURES = [len(picture(index)) + len(picture(1000 + index)) for index in range(COUNT)]


def part(rows: range) -> bytes:
    columns = {
        "caption": [f"thing {index % 8}" for index in rows],
        "jpg_0": [picture(index) for index in rows],
        "jpg_1": [picture(1000 + index) for index in rows],
        "label_0": [float(index % 2) for index in rows],
    }
    pq.write_table(pa.table(columns), file := io.BytesIO(), row_group_size=2, compression="none")
    return file.getvalue()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    starts = range(0, COUNT, EACH)
    return {f"data/train-{n:05d}-of-00003.parquet": part(range(s, s + EACH)) for n, s in enumerate(starts)}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, bytes]) -> Iterator[Hub]:
    monkeypatch.setattr(latent_cache, "SHARD", 3)
    monkeypatch.setattr(text_cache, "TEXTS", 3)
    with running() as hub:
        for name, value in {
            "ENDPOINT": hub.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.address)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.address)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_reads")
        hub.repos["them/pairs"] = Repo(files=files)
        again()
        yield hub


def pairs(tmp_path: Path, **settings: Any) -> PreferencePairs:
    return PreferencePairs("them/pairs", streaming=True, cache_dir=str(tmp_path / "cache"), **settings)


def again() -> None:
    """As another process begins."""
    HfFileSystem.clear_instance_cache()
    hub_files.cache_clear()
    _hub_footers.cache_clear()


def downloads(hub: Hub) -> int:
    return hub.asked("GET /datasets/.*parquet")


def test_a_stream_is_what_a_copy_of_it_is(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    """Rows, latents and contents are those of the downloaded files, in the order of ``datasets``; pictures come once,
    and not before they are encoded; nothing of them is on disk."""
    for name, content in files.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    copy = PreferencePairs(str(tmp_path / "copy"), cache_dir=str(tmp_path / "other")).prepare(quiet(Tiny()))
    (tmp_path / "copy").rename(tmp_path / "copied")
    data = pairs(tmp_path)
    data.check()
    assert 0 < hub.sent < sum(PICTURES) / 2, "captions and labels alone, and what the files say of themselves"
    sent = hub.sent
    streamed = data.prepare(quiet(Tiny()))
    assert sum(PICTURES) < hub.sent - sent < 1.2 * sum(PICTURES) + sent
    assert len(streamed) == COUNT and streamed.fingerprint == copy.fingerprint
    assert same(streamed.batch(range(COUNT)), copy.batch(range(COUNT)))
    rows = datasets.load_dataset("them/pairs", split="train", streaming=True)
    assert [row["caption"] for row in rows] == streamed.batch(range(COUNT)).captions
    for folder in ("cache", "hub-cache", "datasets-cache"):
        kept = [file for file in (tmp_path / folder).rglob("*") if file.is_file()]
        assert not [file for file in kept if b"\x89PNG" in file.read_bytes()]
    again()
    fetched = downloads(hub)
    assert len(pairs(tmp_path).prepare(quiet(Tiny()))) == COUNT
    assert downloads(hub) == fetched, "a start that has all encoded asks for no file"


def test_a_limit_reads_no_further(hub: Hub, tmp_path: Path) -> None:
    data = pairs(tmp_path, limit=3)
    assert len(data.prepare(quiet(Tiny()))) == 3
    assert hub.asked("GET /datasets/.*train-00001") == hub.asked("GET /datasets/.*train-00002") == 1, "the footers"
    assert data.items().total == 3
    assert len(pairs(tmp_path, limit=5).prepare(quiet(Tiny()))) == 5


def test_a_killed_run_and_each_process_read_their_own_rows(hub: Hub, tmp_path: Path) -> None:
    """Shards of three rows, row groups of two: what is begun in the middle costs a row group, and no row before it."""
    pairs(tmp_path).check()
    sent = hub.sent
    with pytest.raises(KeyboardInterrupt):
        pairs(tmp_path, vae_batch=2).prepare(quiet(Tiny(stop_after=14)))
    assert hub.sent > sent
    again()
    sent, family = hub.sent, Tiny()
    streamed = pairs(tmp_path, vae_batch=2).prepare(quiet(family))
    assert family.pictures == 2 * (COUNT - 6)
    assert hub.sent - sent < sum(PICTURES[6:]) + sum(PICTURES) / 4
    assert len(streamed) == COUNT
    again()
    pairs(tmp_path).check()
    sent = hub.sent
    second = quiet(Tiny("other"), 0, 1, 2)
    with pytest.raises(DataError, match="all processes must share"):  # the first has not come
        pairs(tmp_path).prepare(second)
    assert sum(PICTURES[6:]) < hub.sent - sent < sum(PICTURES[6:]) + sum(PICTURES) / 4


def test_a_file_that_stops_coming_is_one_line_and_the_next_start_goes_on(hub: Hub, tmp_path: Path) -> None:
    data, family = pairs(tmp_path), Tiny()
    data.check()
    hub.fails = {"GET .*train-00002": 403}
    with pytest.raises(
        DataError, match=r"^hf://datasets/them/pairs@\w+/data/train-00002\S+ cannot be read: 403.*goes on"
    ):
        data.prepare(quiet(family))
    again()
    with pytest.raises(DataError, match=r"^hf://datasets/them/pairs@\w+/data cannot be read: 403.*00002.*goes on"):
        pairs(tmp_path).prepare(quiet(Tiny()))
    hub.fails.clear()
    rest = Tiny()
    assert len(pairs(tmp_path).prepare(quiet(rest))) == COUNT
    assert family.pictures >= 2 * 6 and rest.pictures == 2 * (COUNT - 6)


def test_a_network_that_is_gone_is_one_line(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """httpx's errors of connections are no ``OSError``; each asks anew."""
    data = pairs(tmp_path)
    data.check()
    for module, name in ((constants, "ENDPOINT"), (huggingface_hub.hf_api.api, "endpoint")):
        monkeypatch.setattr(module, name, "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    for _ in range(2):
        with pytest.raises(DataError, match=r"train-00000\S+ cannot be read: ConnectError.*the next start goes on"):
            data.prepare(quiet(Tiny()))
    _hub_footers.cache_clear()
    with pytest.raises(DataError, match=r"/data cannot be read: ConnectError.*the next start goes on"):
        pairs(tmp_path / "other").check()


def test_images_and_members_of_pairs_stream_too(hub: Hub, tmp_path: Path) -> None:
    where: dict[str, Any] = {"cache_dir": str(tmp_path / "cache"), "streaming": True}
    images = Images("them/pairs", image_column="jpg_1", limit=5, **where).prepare(quiet(Tiny()))
    assert len(images) == 5
    winners = pairs(tmp_path).prepare(quiet(Tiny())).batch([0, 2])  # label_0 is 0: jpg_1 won
    assert (images.batch([0, 2]).latents == winners.latents[:, 0]).all()
    rated = RatedImages("them/pairs", pairs=True, limit=4, **where).prepare(quiet(Tiny()))
    assert (rated.batch([0, 1, 2, 3]).latents.unflatten(0, (2, 2))[:, 0] == pairs(tmp_path).prepare(
        quiet(Tiny())).batch([0, 1]).latents[:, 0]).all()  # fmt: skip


def test_what_cannot_be_streamed_is_refused(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="them/pairs has no split 'test'; it has train"):
        pairs(tmp_path, split="test").check()
    hub.repos["them/pairs"].files = {"data/train.parquet": b"no parquet"}
    again()
    with pytest.raises(DataError, match="data cannot be read: Parquet magic bytes .* it is damaged there$"):
        pairs(tmp_path).check()
    hub.repos["them/pairs"].files = {"train.jsonl": b'{"caption": "a"}\n'}
    again()
    with pytest.raises(DataError, match="no data set of parquet files, which streaming needs; leave streaming out"):
        pairs(tmp_path).check()
    with pytest.raises(DataError, match="them/nothing is no file or folder here, nor a data set of the hub"):
        PreferencePairs("them/nothing", streaming=True, cache_dir=str(tmp_path)).check()
    with pytest.raises(DataError, match="there is no file or folder"):
        Images(str(tmp_path / "nowhere"), streaming=True, cache_dir=str(tmp_path)).check()
