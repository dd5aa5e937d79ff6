"""``python -m rewards.score``: every layout, several rewards, kills, bad files, several processes, the page."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import re
import signal
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from rewards import RewardConfig, RewardError, RewardSum, load, parse_rewards
from rewards.common.errors import DataError
from rewards.data.formats import open_input
from rewards.data.images import decode_tensor as decode
from rewards.score import main
from rewards.scoring import loader
from rewards.scoring.loader import Batch, Decoder, ahead
from tests.helpers import HOSTILE, launch, texts_of

COUNT = 10
FILES = [f"{number}.png" for number in range(COUNT)]
PROMPTS = [f"picture {number}" for number in range(COUNT)]


class Length:
    """Mean brightness plus the prompt's length: wrong where a picture meets another one's prompt. Slow when told."""

    differentiable = False

    def __init__(self, pause: float = 0.0, scale: float = 1.0) -> None:
        self.pause, self.scale = pause, scale

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        time.sleep(self.pause)
        return self.scale * images.mean((1, 2, 3)) + torch.tensor([float(sum(map(ord, text))) for text in prompts])


class Tagged(Length):
    """The number that the row's metadata holds under ``tag``."""

    needs_prompt = False

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        assert metadata is not None
        return torch.tensor([float(row["tag"]) for row in metadata])


class Nan(Length):
    """NaN for one prompt."""

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        return torch.tensor([float("nan") if text == PROMPTS[7] else 0.0 for text in prompts])


REWARD = "tests.test_score.Length"


def encoded(number: int) -> bytes:
    """A picture as PNG bytes; three sizes, so that batches of one size are not the order of the files."""
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (8 + number % 3, 12, 3), dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def expected() -> list[float]:
    """What the reward says when it is called with one picture at a time."""
    return [
        load(REWARD).score(images=decode(encoded(n))[None].float() / 255, prompts=[PROMPTS[n]]).item()
        for n in range(COUNT)
    ]


def lay(root: Path, layout: str) -> str:
    """The ten pictures in a layout; returns what the command is given."""
    root.mkdir(parents=True, exist_ok=True)
    rows = [
        {"file_name": file, "text": text, "tag": n} for n, (file, text) in enumerate(zip(FILES, PROMPTS, strict=True))
    ]
    if layout in ("sidecar", "imagefolder", "jsonl", "csv"):
        below = root / "train" if layout == "imagefolder" else root
        below.mkdir(exist_ok=True)
        for number, file in enumerate(FILES):
            (below / file).write_bytes(encoded(number))
            if layout == "sidecar":
                (below / file).with_suffix(".txt").write_text(PROMPTS[number])
        if layout == "csv":
            (root / "list.csv").write_text("path,prompt\n" + "".join(f"{r['file_name']},{r['text']}\n" for r in rows))
            return str(root / "list.csv")
        if layout in ("imagefolder", "jsonl"):
            table = below / ("metadata.jsonl" if layout == "imagefolder" else "list.jsonl")
            table.write_text("".join(json.dumps(row) + "\n" for row in rows))
            return str(root if layout == "imagefolder" else table)
        return str(root)
    if layout == "tar":
        for shard, numbers in enumerate((range(6), range(6, COUNT))):
            with tarfile.open(root / f"{shard:03d}.tar", "w") as archive:
                for number in numbers:
                    record = {"caption": PROMPTS[number], "tag": number}
                    sidecar = (".json", json.dumps(record).encode()) if shard else (".txt", PROMPTS[number].encode())
                    for suffix, data in ((".png", encoded(number)), sidecar):
                        member = tarfile.TarInfo(f"part/{number}{suffix}")
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
        return str(root)
    cells: list[Any] = [encoded(n) for n in range(COUNT)]
    if layout in ("struct", "saved"):
        cells = [{"bytes": cell, "path": None} for cell in cells]
    table = pa.table({"image": cells, "caption": PROMPTS, "tag": list(range(COUNT)), "other": [b"not read"] * COUNT})
    if layout == "saved":
        from datasets import Dataset, Features, Value
        from datasets import Image as Encoded

        features = Features({"image": Encoded(), "caption": Value("string"), "tag": Value("int64")})
        Dataset.from_dict(table.drop(["other"]).to_pydict(), features=features).save_to_disk(root / "saved")
        return str(root / "saved")
    if layout == "parquet":
        pq.write_table(table, root / "data.parquet", row_group_size=3)
        return str(root / "data.parquet")
    pq.write_table(table[:4], root / "train-00000.parquet")
    pq.write_table(table[4:], root / "train-00001.parquet")
    return str(root)


def scores(folder: Path, column: str = REWARD) -> list[float]:
    return [
        value for path in sorted(folder.glob("scores-*.parquet")) for value in pq.read_table(path)[column].to_pylist()
    ]


def files(folder: Path) -> list[str]:
    return [
        name for path in sorted(folder.glob("scores-*.parquet")) for name in pq.read_table(path)["file"].to_pylist()
    ]


LAYOUTS = ["sidecar", "imagefolder", "jsonl", "csv", "parquet", "struct", "tar", "saved"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_rewards_own_scores(tmp_path: Path, layout: str) -> None:
    source = lay(tmp_path / "in", layout)
    out = tmp_path / "out"
    options = ["--output", str(out), "--batch_size", "2", "--shard_size", "4", "--threads", "2"]
    assert main([source, "--reward", REWARD, "--reward", "JPEGCompressibility:quality=50", *options]) == 0
    assert scores(out) == pytest.approx(expected(), abs=1e-4)
    assert len(set(files(out))) == COUNT
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"scores-0000{n}.parquet" for n in range(3)),
        "summary.json",
    ]
    pictures = [decode(encoded(n))[None].float() / 255 for n in range(COUNT)]
    jpeg = [load("JPEGCompressibility", {"quality": 50}).score(images=image, prompts=[""]).item() for image in pictures]
    assert scores(out, "JPEGCompressibility") == pytest.approx(jpeg)
    figures = json.loads((out / "summary.json").read_text())["rewards"][REWARD]
    assert figures["count"] == COUNT
    assert figures["mean"] == pytest.approx(np.mean(scores(out))) and figures["std"] == pytest.approx(
        np.std(scores(out))
    )
    assert figures["quantiles"]["0.25"] == pytest.approx(np.quantile(scores(out), 0.25))


@pytest.mark.parametrize("layout", ["imagefolder", "jsonl", "struct", "saved"])
def test_metadata_goes_with_its_picture(tmp_path: Path, layout: str) -> None:
    source = lay(tmp_path / "in", layout)
    name = "tests.test_score.Tagged"
    assert main([source, "--reward", name, "--output", str(tmp_path / "out"), "--batch_size", "3"]) == 0
    assert scores(tmp_path / "out", name) == list(range(COUNT))


def test_limit_columns_and_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = lay(tmp_path / "in", "parquet")
    rewards = ["--reward", REWARD, "--reward", f"{{name: {REWARD}, label: twice, args: {{scale: 2}}}}"]
    out = tmp_path / "out"
    assert main([source, *rewards, "--output", str(out), "--limit", "5", "--shard_size", "2"]) == 0
    assert scores(out) == pytest.approx(expected()[:5], abs=1e-4)
    letters = [float(sum(map(ord, text))) for text in PROMPTS[:5]]
    doubled = [2 * (value - base) + base for value, base in zip(expected()[:5], letters, strict=True)]
    assert scores(out, "twice") == pytest.approx(doubled, abs=1e-4)
    for option, message in {
        ("--image_column", "photo"): "expected for the image 'photo'",
        ("--prompt_column", "words"): "expected for the prompt 'words'",
        ("--split", "test"): "has no splits",
        ("--prompts", "x.txt"): "--prompts is for a folder of images",
        ("--device", "warp"): "--device is warp",
        ("--shard_size", "0"): "--shard_size is 0",
    }.items():
        assert main([source, "--reward", REWARD, "--output", str(tmp_path / "no"), *option]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_rewards_are_named_in_two_ways() -> None:
    assert parse_rewards(["A", "B:url=http://host:80,n=2,x=1.5"]) == [
        RewardConfig("A"),
        RewardConfig("B", args={"url": "http://host:80", "n": 2, "x": 1.5}),
    ]
    (one,) = parse_rewards(["{name: A, label: a, args: {token: secret, n: 1}}"])
    assert one == RewardConfig("A", args={"token": "secret", "n": 1}, label="a")
    assert "secret" not in str(one.settings()) and one.settings()["args"] == {"n": 1}
    for texts, message in {
        ("A:n",): "no KEY=VALUE",
        ("A:n=1,n=2",): "no KEY=VALUE",
        ("A:n=[",): "not YAML",
        ("{name: A, wait: 2}",): "keys name, wait",
        ("{label: A}",): "expected NAME",
        ("A", "A"): "two rewards are called 'A'",
        ("{name: A, label: file}",): "cannot be called 'file'",
    }.items():
        with pytest.raises(RewardError, match=message):
            parse_rewards(texts)
    with pytest.raises(RewardError, match="quality is 0"):
        RewardSum.of(parse_rewards(["JPEGCompressibility:quality=0"]), "cpu")


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.exit(main(list(arguments)))


@pytest.mark.parametrize("layout", ["sidecar", "tar"])
def test_killed_and_resumed_is_the_uninterrupted_run(tmp_path: Path, layout: str) -> None:
    source = lay(tmp_path / "in", layout)
    options = ["--shard_size", "2", "--batch_size", "2"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main([source, "--reward", REWARD, "--output", str(whole), *options]) == 0
    slow = [source, "--reward", f"{{name: {REWARD}, args: {{pause: 0.05}}}}", "--output", str(out), *options]
    times: dict[str, int] = {}
    for shards in (1, 3):
        process = launch(slow, run)
        deadline = time.monotonic() + 60
        while len(list(out.glob("scores-*.parquet"))) < shards:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        for path in out.glob("scores-*.parquet"):  # what was whole before is not written again
            assert times.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    assert len(times) < 5
    assert not (out / "summary.json").exists()
    assert main(slow) == 0
    assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in times.items())
    assert files(out) == files(whole) and scores(out) == scores(whole)
    first, second = (json.loads((folder / "summary.json").read_text())["rewards"] for folder in (whole, out))
    assert first == second


@pytest.mark.slow
def test_every_picture_is_there_once_after_kills_at_random_moments(tmp_path: Path) -> None:
    """The small version of ``tests/benchmarks/scoring.py``: 300 pictures, three kills."""
    count, moments = 300, random.Random(0)
    prompts = [f"picture {number}" for number in range(count)]
    table = pa.table({"image": [encoded(number) for number in range(count)], "caption": prompts})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=7)
    options = [str(tmp_path / "in.parquet"), "--shard_size", "6", "--batch_size", "4"]
    assert main([*options, "--reward", REWARD, "--output", str(tmp_path / "whole")]) == 0
    out = tmp_path / "out"
    slow = [*options, "--reward", f"{{name: {REWARD}, args: {{pause: 0.01}}}}", "--output", str(out)]
    for kill in range(3):
        before, process = len(files(out)), launch(slow, run)
        deadline = time.monotonic() + 60
        while len(files(out)) == before:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"it ended before kill {kill}"
    assert before < len(files(out)) < count
    assert main(slow) == 0
    assert sorted(files(out)) == sorted(f"in.parquet#{number}" for number in range(count))
    assert files(out) == files(tmp_path / "whole") and scores(out) == scores(tmp_path / "whole")
    assert not list(out.glob(".*"))  # nor is anything left of the killed processes


def test_other_settings_are_refused_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(lay(tmp_path / "in", "sidecar"))
    command = [str(source), "--reward", REWARD, "--output", str(tmp_path / "out")]
    assert main(command) == 0
    assert main([*command, "--batch_size", "3"]) == 0  # changes no score
    before = scores(tmp_path / "out")
    for more, message in {
        ("--limit", "3"): "limit was null, is 3",
        ("--shard_size", "5"): "shard_size was 1024, is 5",
        ("--reward", "JPEGCompressibility"): "rewards.JPEGCompressibility.name was None",
    }.items():
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err
    (source / "3.txt").write_text("another prompt")
    assert main(command) == 2
    assert "input.digest was" in capsys.readouterr().err
    assert scores(tmp_path / "out") == before


def test_pictures_from_a_clock_that_is_ahead_are_known_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(lay(tmp_path / "in", "sidecar"))
    command = [str(source), "--reward", REWARD, "--output", str(tmp_path / "out"), "--shard_size", "4"]
    os.utime(source / "5.png", (time.time() + 1e6,) * 2)
    assert main(command) == main(command) == 0
    os.utime(source / "5.png", (time.time() + 2e6,) * 2)
    assert main(command) == 2
    assert "`touch` it where they are only copies" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["sidecar", "tar", "parquet of paths"])
def test_other_pictures_under_the_same_names_are_not_taken_for_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    source = Path(lay(tmp_path / "in", "tar" if layout == "tar" else "sidecar"))
    command = [str(source), "--reward", REWARD, "--output", str(tmp_path / "out"), "--shard_size", "4"]
    if layout == "parquet of paths":
        rows = [{"image": str(source / name), "prompt": "a star"} for name in FILES]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "paths.parquet")
        command[0] = str(tmp_path / "paths.parquet")
    assert main(command) == main(command) == 0
    before = scores(tmp_path / "out")
    archives = [source] if source.is_file() else list(source.glob("*.tar"))
    for copied in [*archives, *source.glob("*.png")]:
        os.utime(copied, (1, 1))
    assert main(command) == 0  # what was copied to this machine, say
    if layout == "tar":
        content = archives[-1].read_bytes()
        archives[-1].write_bytes(content.replace(b"IEND", b"IEN."))
    else:
        old = encoded(5)
        (source / "5.png").write_bytes(encoded(7).ljust(len(old), b"\0"))
    assert main(command) == 2
    told = "input.files was" if layout == "tar" else "scores-00001.parquet has scores of pictures that were changed"
    assert told in capsys.readouterr().err and scores(tmp_path / "out") == before
    if layout != "tar":
        (tmp_path / "out/scores-00001.parquet").unlink()
        assert main(command) == 0
        assert scores(tmp_path / "out")[5] != before[5]


def test_bad_files_are_listed_and_too_many_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = Path(lay(tmp_path / "in", "sidecar")), tmp_path / "out"
    (source / "2.png").write_bytes(b"no picture")
    (source / "6.png").write_bytes(encoded(6)[:60])
    command = [str(source), "--reward", REWARD, "--output", str(out), "--shard_size", "4"]
    assert main([*command, "--max_bad", "1"]) == 2
    assert "2 images cannot be read, the last 6.png" in capsys.readouterr().err
    listed = [json.loads(line) for line in (out / "bad.jsonl").read_text().splitlines()]
    assert [entry["file"] for entry in listed] == ["2.png", "6.png"]
    assert "cannot identify" in listed[0]["error"] and listed[1]["error"]
    assert len(list(out.glob("scores-*.parquet"))) == 1  # the first shard, with one bad file, is whole and stays
    assert main(command) == 1
    assert main([*command, "--skip_errors"]) == 0
    assert files(out) == [file for n, file in enumerate(FILES) if n not in (2, 6)]
    assert scores(out) == pytest.approx([value for n, value in enumerate(expected()) if n not in (2, 6)], abs=1e-4)
    assert [entry["row"] for entry in json.loads((out / "summary.json").read_text())["bad"]] == [2, 6]
    for number in (2, 6):
        (source / f"{number}.png").write_bytes(encoded(number))
    untouched = (out / "scores-00002.parquet").stat().st_mtime_ns
    assert main([*command, "--retry_bad"]) == 0
    assert files(out) == FILES and not (out / "bad.jsonl").exists()
    assert (out / "scores-00002.parquet").stat().st_mtime_ns == untouched


def test_a_torn_tar_and_odd_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "in"
    root.mkdir()
    with tarfile.open(root / "a.tar.gz", "w:gz") as archive:
        for name, data in {"0.txt": b"alone", "1.png": encoded(1), "1.json": b"[]", "2.png": encoded(2)}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("3.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    command = [str(root), "--reward", "JPEGCompressibility", "--output", str(tmp_path / "out")]
    assert main([*command, "--skip_errors"]) == 0
    assert files(tmp_path / "out") == ["a.tar.gz/2.png"]
    reasons = [json.loads(line)["error"] for line in (tmp_path / "out/bad.jsonl").read_text().splitlines()]
    assert reasons == ["expected one image; its files are .txt", "its .json is not an object"]
    whole = (root / "a.tar.gz").read_bytes()
    (root / "a.tar.gz").write_bytes(whole[: len(whole) // 2])
    assert main([*command[:-1], str(tmp_path / "torn")]) == 2
    assert "a.tar.gz is not a whole tar file" in capsys.readouterr().err


def test_a_nan_names_reward_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = lay(tmp_path / "in", "sidecar")
    assert main([source, "--reward", "tests.test_score.Nan", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "error: 7.png: reward 'tests.test_score.Nan' returned nan" in error
    assert scores(tmp_path / "out", "tests.test_score.Nan") == []


def test_a_prompt_that_is_missing_in_a_stream_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"image": [encoded(0), encoded(3)], "text": ["there", None]}), tmp_path / "in.parquet")
    assert main([str(tmp_path / "in.parquet"), "--reward", REWARD, "--output", str(tmp_path / "out")]) == 2
    assert f"{REWARD} needs prompts, but 1 of 2 images have none: in.parquet#1" in capsys.readouterr().err


def test_processes_share_the_shards_and_the_first_one_sums_up(tmp_path: Path) -> None:
    source = lay(tmp_path / "in", "tar")
    for output in ("out", "one.parquet"):
        command = [source, "--reward", REWARD, "--output", str(tmp_path / output), "--shard_size", "2"]
        ranks = [launch(command, run, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [0, 0]
    assert scores(tmp_path / "out") == pytest.approx(expected(), abs=1e-4)
    assert json.loads((tmp_path / "out/summary.json").read_text())["rewards"][REWARD]["count"] == COUNT
    assert pq.read_table(tmp_path / "one.parquet")[REWARD].to_pylist() == scores(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "one.parquet", "out"]


def test_one_process_of_two_scores_its_half_and_the_other_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = lay(tmp_path / "in", "sidecar"), tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    command = [source, "--reward", REWARD, "--output", str(out), "--shard_size", "2", "--patience", "0.1"]
    assert main(command) == 2
    assert "2 shards of other processes, the first scores-00001.parquet" in capsys.readouterr().err
    assert [path.stem[-1] for path in sorted(out.glob("scores-*.parquet"))] == ["0", "2", "4"]
    assert not (out / "summary.json").exists()
    monkeypatch.setenv("RANK", "zero")
    assert main(command) == 2


@pytest.mark.parametrize("layout", ["sidecar", "tar"])
def test_gallery_shows_best_and_worst(tmp_path: Path, layout: str) -> None:
    source, out = lay(tmp_path / "in", layout), tmp_path / "out"
    if layout == "sidecar":
        (tmp_path / "in/4.png").write_bytes(b"bad")  # so that a place in the table is not the number of the row
        (tmp_path / "in/9.txt").write_text("<b>picture 9</b>")
    command = [source, "--reward", REWARD, "--output", str(out), "--gallery", "3", "--skip_errors", "--shard_size", "4"]
    assert main(command) == 0
    page = (out / "gallery.html").read_text()
    order = sorted(zip(scores(out), files(out), strict=True), reverse=True)
    places = [page.index(f'alt="{file}"') for _, file in [*order[:3], *order[:-4:-1]]]
    assert places == sorted(places)
    shown = re.findall(r'src="data:image/jpeg;base64,([^"]*)" alt="[^"]*?(\d+).png"', page)
    assert len(shown) == page.count("<img") == 6
    for data, number in shown:  # the picture itself, told by its height
        assert Image.open(io.BytesIO(base64.b64decode(data))).height == 8 + int(number) % 3
    assert "<b>picture" not in page and ("&lt;b&gt;picture 9" in page) == (layout == "sidecar")


def test_hostile_captions_and_names_are_text_on_the_page(tmp_path: Path) -> None:
    names = [f"{k}{text.replace('/', '_')}" for k, text in enumerate(HOSTILE)]
    (tmp_path / "in").mkdir()
    for k, (name, text) in enumerate(zip(names, HOSTILE, strict=True)):
        (tmp_path / "in" / f"{name}.png").write_bytes(encoded(k))
        (tmp_path / "in" / f"{name}.txt").write_text(text)
    out = tmp_path / "out"
    assert main([str(tmp_path / "in"), "--reward", REWARD, "--output", str(out), "--gallery", "4"]) == 0
    shown = texts_of((out / "gallery.html").read_text())
    assert all(shown.count(text) == 1 for text in HOSTILE)
    assert all(shown.count(f"{name}.png") == 2 for name in names)  # what is seen, and where no image can be


def test_sizes_that_fill_no_batch_leave_before_memory_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_input(lay(tmp_path / "in", "sidecar"))

    def batches() -> list[list[int]]:
        work = Decoder(source, None, COUNT, 4, 1).work(lambda shard: True)
        return [sorted(item.rows) for item in work if isinstance(item, Batch)]

    assert batches() == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]  # of a size each, as one becomes full or the end comes
    monkeypatch.setattr(loader, "WAITING", 4 * 8 * 12 * 3)
    assert batches() == [[0, 3], [1, 4], [2, 5], [6, 9], [7], [8]]


def test_ahead_passes_items_and_errors_on() -> None:
    assert list(ahead(iter(range(9)), 3)) == list(range(9))

    def broken() -> Any:
        yield 1
        raise RewardError("from the other thread")

    items = ahead(broken(), 3)
    assert next(items) == 1
    with pytest.raises(RewardError, match="from the other thread"):
        next(items)


def test_decoding_goes_on_while_the_reward_computes(tmp_path: Path) -> None:
    """When the reward sees the first batch for a while, later pictures are decoded already: a file that is broken in
    the meantime is scored all the same."""
    source = Path(lay(tmp_path / "in", "sidecar"))
    Breaker.file = source / "4.png"
    options = ["--output", str(tmp_path / "out"), "--batch_size", "1", "--threads", "2"]
    command = [str(source), "--reward", "tests.test_score.Breaker", *options]
    assert main(command) == 0
    assert files(tmp_path / "out") == FILES


class Breaker(Length):
    """Waits, and then spoils ``file``."""

    file = Path()

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        if prompts == [PROMPTS[0]]:
            time.sleep(0.3)
            self.file.write_bytes(b"spoiled")
        return torch.zeros(len(prompts))


def test_what_is_not_an_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no table")
    (tmp_path / "a.txt").write_text("no input")
    (tmp_path / "b.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "c.jsonl").write_text("")
    for name, message in {
        "a.parquet": "not parquet",
        "a.txt": "no input that is understood",
        "b.jsonl": "b.jsonl:1 has the columns prompt",
        "c.jsonl": "no rows",
        "none": "no such folder or file",
    }.items():
        with pytest.raises(DataError, match=message):
            open_input(str(tmp_path / name))
