"""Files as strangers have them: texts, images, names and labels are read as what they are, or refused in one line."""

from __future__ import annotations

import base64
import csv
import io
import json
import logging
import os
import re
import tarfile
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from align.data import captioned, latent_cache
from align.data.captioned import Images
from align.data.preferences import PreferencePairs
from align.data.prompts import read_prompts
from rewards import agree
from rewards.common.errors import DataError
from rewards.data.formats import open_input
from rewards.data.images import ImageRow, UnreadableError, decode
from rewards.data.preferences import recognise
from rewards.data.records import read_objects
from rewards.models.preprocess import square
from tests.test_data import noise, read_pairs, table

CAPTION = "a café,\u2028two\x85cats\fand a dog"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(captioned, "CACHE", str(tmp_path / "default-cache"))


def rows_of(place: Path, **options: Any) -> list[ImageRow]:
    return [row for row in open_input(str(place), **options).rows(lambda number: True) if row]


def images(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(noise(number))
    return folder


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and len(text) < 600, text[:2000]
    return text


# texts
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.json", "p.csv", "p.tsv", "P.CSV"])
def test_every_encoding_with_a_mark_gives_the_same_prompts(tmp_path: Path, encoding: str, end: str, name: str) -> None:
    wanted = [CAPTION, "a red star"]
    quoted = [f'"{text}"' for text in wanted]
    lines = {
        ".txt": wanted,
        ".jsonl": [json.dumps({"prompt": text}, ensure_ascii=False) for text in wanted],
        ".json": [json.dumps(wanted, ensure_ascii=False)],
        ".csv": ["prompt", *quoted],
        ".tsv": ["id\tprompt", *(f"1\t{text}" for text in quoted)],
    }[Path(name.lower()).suffix]
    mark = "\ufeff" if encoding[-3:] in ("-le", "-be") else ""
    (tmp_path / name).write_bytes((mark + end.join(lines) + end).encode(encoding))
    assert read_prompts(tmp_path / name) == wanted


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", "prompt;seed\na cat, black;1\na dog;2\n"),  # Excel where the comma is the decimal's
        ("p.csv", "sep=;\r\nprompt;seed\r\na cat, black;1\r\na dog;2\r\n"),
        ("p.csv", "prompt\tseed\na cat, black\t1\na dog\t2\n"),
        ("p.csv", '\nprompt,seed,,\n"a cat, black",1,,\n,,,\na dog,2,,\n,,,\n'),  # columns and rows that were cleared
        ("p.tsv", "Prompt\tSeed\na cat, black\t1\na dog\t2\n"),
        ("p.jsonl", '{\n  "prompt": "a cat, black"\n}\n{\n  "prompt": "a dog"\n}\n'),  # jq's
        ("p.txt", "[a cat|a dog], black\na dog\n"),
    ],
)
def test_a_table_is_read_as_its_program_wrote_it(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    first = "[a cat|a dog], black" if name == "p.txt" else "a cat, black"
    assert read_prompts(tmp_path / name) == [first, "a dog"]


def test_a_long_list_is_looked_through_once(tmp_path: Path) -> None:
    rows = [{"prompt": "a cat on a mat " * 20, "image_path": [f"{k}/a.png", f"{k}/b.png"]} for k in range(20_000)]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    began = time.process_time()
    assert len(read_objects(tmp_path / "p.json")) == 20_000
    assert time.process_time() - began < 10  # 0.2 s; each row against the whole text took 10 minutes


def test_files_joined_with_their_marks_have_none(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffa cat\n\ufeffa dog\n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text('{"prompt": "\\ufeffa cat"}\n\ufeff{"prompt": "a dog"}\n', encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == read_prompts(tmp_path / "p.jsonl") == ["a cat", "a dog"]


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "cp1252": ("p.txt", b"a cat\na caf\xe9\n", r"p\.txt:2 is not UTF-8 \(byte 0xe9\); save the file as UTF-8"),
    "cp1252 in JSON lines": ("p.jsonl", b'{"prompt": "a caf\xe9"}', r"p\.jsonl:1 is not UTF-8"),
    "UTF-16 without its mark": ("p.txt", "a cat".encode("utf-16-le"), "holds NUL"),
    "half of UTF-16": ("p.txt", b"\xff\xfea\0\n\0\x00\xd8", r"p\.txt:2 is not UTF-16"),
    "parquet": ("p.txt", b"PAR1 and so on PAR1", "is a parquet file"),
    "zip": ("p.csv", b"PK\x03\x04 xlsx", "is a zip or Office file"),
    "png": ("p", b"\x89PNG\r\n", "is an image"),
    "NUL": ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\0"}', r"p\.jsonl:2 holds NUL"),
    "JSON lines under another name": ("p.txt", b'{"prompt": "a cat"}\n{"prompt": "b"}\n', "holds JSON lines; name it"),
    "old Mac": ("p.txt", b"a cat\ra dog\r", r"p\.txt:1 has a carriage return inside"),
    "unquoted comma": (
        "p.csv",
        b"id,prompt\n1,a cat\n2,a cat, black\n",
        r"p\.csv:3: 3 fields for the 2 columns id, pr",
    ),
    "open quote": ("p.csv", b'id,prompt\n1,"a cat\n2,b\n3,c\n', r"p\.csv:2 is not CSV: unexpected end of data"),
    "twice a column": ("p.csv", b"prompt,prompt\na,b\n", "names the column 'prompt' twice"),
    "large field": ("p.csv", b"prompt\na\n" + b"x" * 200_000, r"p\.csv:3 is not CSV: field larger than"),
    "large prompt": ("p.jsonl", json.dumps({"prompt": "x" * 10**6}).encode(), r"p\.jsonl:1: a caption of 1000000 char"),
    "large line": ("p.txt", b"a\n" + b"x" * 10**6, r"p\.txt:2: a caption of 1000000 characters"),
    "deep": ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", r"p\.jsonl:2: nested deep"),
    "rather deep": ("p.jsonl", b'{"prompt": "a", "x": ' + b"[" * 90 + b"]" * 90 + b"}", r"p\.jsonl:1: nested deeper"),
    "deep list": ("p.json", b"[" * 5000 + b"]" * 5000, r"p\.json is not a JSON list: nested deeper"),
    "huge integer": (
        "p.jsonl",
        b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
        r"p\.jsonl:1: an integer of 5000 digits",
    ),
    "huge integer in a list": ("p.json", b'[{"prompt": "a", "n": ' + b"9" * 500 + b"}]", "an integer of 500 digits"),
    "lone surrogate": ("p.jsonl", b'{"prompt": "a \\ud800"}', r"p\.jsonl:1: a text with the lone surrogate \\ud800"),
    "surrogate in a list": ("p.json", b'["a", "b \\udfff"]', r"p\.json\[1\]: a text with the lone surrogate \\udfff"),
    "NUL in JSON": ("p.jsonl", b'{"prompt": "a", "path": "b\\u0000c"}', r"p\.jsonl:1: a text with NUL in it"),
    "pointer of Git LFS": (
        "p.txt",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "git lfs pull",
    ),
    "RTF": ("p.txt", b"{\\rtf1\\ansi\n\\f0 a cat}\n", "is an RTF document"),
    "HTML": ("p.jsonl", b"\n<!DOCTYPE html>\n<html>404</html>", "is an HTML page"),
    "YAML": ("p.yaml", b"- a cat\n- a dog\n", "is YAML; expected one text a line"),
    "JSON under another name": ("p.txt", b'[\n"a cat",\n"a dog"\n]\n', "holds JSON; name it .json"),
    "old Excel": ("p.csv", b"\xd0\xcf\x11\xe0\0\0", r"p\.csv:1 holds NUL"),
    "old Mac's table": ("p.csv", b"prompt,seed\ra cat,1\r", r"p\.csv:1 has a carriage return inside"),
    "no JSON": ("p.jsonl", b'{"prompt": "a"}\n{"prompt', r"p\.jsonl:2: not a JSON object: Unterminated"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_text_that_would_be_read_wrongly_is_refused_in_a_line(tmp_path: Path, kind: str) -> None:
    name, content, message = REFUSED[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as stopped:
        read_prompts(tmp_path / name)
    assert name in one_line(stopped.value)
    if name != "p":  # the same where it lies beside images, and as a list of them
        folder = images(tmp_path / "images", "a.png")
        with pytest.raises(DataError) as stopped:
            open_input(str(folder), prompts=str(tmp_path / name))
        one_line(stopped.value)


def test_good_json_is_not_refused(tmp_path: Path) -> None:
    row = {"prompt": "\U0001f600 \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "id": 2**128}
    row["tags"] = [[{"a": [1]}] for _ in range(100)]
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    assert [value for _, value in read_objects(tmp_path / "p.jsonl")] == [row]


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    "reader",
    [
        lambda path: read_prompts(path),
        lambda path: read_pairs(path),
        lambda path: open_input(str(path)),
        lambda path: open_input(str(images(path.parent / "x", "a.png")), prompts=str(path)),
        lambda path: decode(path),
        lambda path: Images(str(path)).check(),
    ],
)
@pytest.mark.parametrize("name", ["p.jsonl", "/dev/zero"])
def test_a_pipe_or_a_device_ends_at_once(tmp_path: Path, reader: Callable[[Path], object], name: str) -> None:
    path = Path(name) if name.startswith("/") else fifo(tmp_path / name)
    with pytest.raises(DataError) as stopped:
        reader(path)
    one_line(stopped.value)


def test_marks_and_system_files_beside_images_are_no_captions(tmp_path: Path) -> None:
    folder = images(tmp_path / "f", "a.png", "b.png")
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text("\ufeffa cat\n", encoding="utf-8")
        (folder / f"._{name}.txt").write_bytes(b"\0\5\26\7")
        (folder / f"._{name}.png").write_bytes(b"\0\5\26\7")
    assert [(row.file, row.prompt) for row in rows_of(folder)] == [("a.png", "a cat"), ("b.png", "a cat")]
    assert [item.caption for item in Images(str(folder)).read().items] == ["a cat", "a cat"]
    (folder / "b.txt").write_bytes(b"a caf\xe9")
    with pytest.raises(DataError, match=r"b\.txt:1 is not UTF-8"):
        open_input(str(folder))


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_marks_in_metadata(tmp_path: Path, name: str) -> None:
    folder = images(tmp_path / "f", "a.png")
    text = '{"file_name": "a.png", "text": "a cat"}' if name.endswith("l") else "file_name,text\r\na.png,a cat\r\n"
    (folder / name).write_text("\ufeff" + text, encoding="utf-8", newline="")
    (folder / f"._{name}").write_bytes(b"\0\5\26\7")
    assert [(row.file, row.prompt) for row in rows_of(folder)] == [("a.png", "a cat")]


def test_a_text_that_is_not_utf_8_in_parquet_is_named(tmp_path: Path) -> None:
    bad = pa.array([b"a cat", b"a caf\xe9"]).view(pa.binary()).cast(pa.binary())
    captions = pa.Array.from_buffers(pa.string(), 2, bad.buffers())
    columns = {"caption": captions, "chosen": [noise(0)] * 2, "rejected": [noise(1)] * 2}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet row 1: 'caption' is not UTF-8"):
        read_pairs(tmp_path / "a.parquet")


# folders of images
SUFFIXES = [
    *("a.png", "b.JPG", "c.JPEG", "d.WebP", "e.bmp", "f.gif", "g.tif", "h.jfif", "i.avif", "j.tiff", "k.ppm", "l.jpe")
]


def test_every_suffix_is_read_and_what_is_left_out_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = images(tmp_path / "f", *SUFFIXES)
    for name in ("x.heic", "y.psd", "z.HEIC", "notes.md", "a.txt"):
        (folder / name).write_bytes(b"x")
    for name in (
        "._a.png",
        "__MACOSX/._a.png",
        "__MACOSX/b.png",
        ".ipynb_checkpoints/a.png",
        ".DS_Store",
        "@eaDir/a.jpg",
    ):
        images(folder, name)
    assert [row.file for row in rows_of(folder)] == SUFFIXES
    assert [record.message for record in caplog.records if "left out" in record.message] == [
        f"{folder}: {len(SUFFIXES)} files are read; left out are 2 .heic, 1 .psd"
    ]


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    for name in ("x.heic", "y.heic"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match="no images .*, which holds 2 .heic"):
        open_input(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"no archive" * 99])
def test_what_is_no_archive_is_told_in_a_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match="a.tar is not a whole tar file: ReadError.*; make it anew") as stopped:
        rows_of(tmp_path / "a.tar")
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("name", ["empty.jsonl", "other.jsonl", "a.doc", "folder"])
def test_what_holds_no_pairs_is_told_in_a_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "other.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "a.doc").touch()
    with pytest.raises(DataError, match="expected .* python -m pydoc rewards.data.preferences") as stopped:
        read_pairs(tmp_path / name)
    assert "\n" not in str(stopped.value)


def test_system_files_in_an_archive_are_no_rows(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("./a.png", "__MACOSX/._a.png", "__MACOSX/a.png", ".ipynb_checkpoints/a.png"):
            member = tarfile.TarInfo(name)
            member.size = len(noise(0))
            archive.addfile(member, io.BytesIO(noise(0)))
    assert [row.file for row in rows_of(tmp_path / "a.tar")] == ["a.tar/./a.png"]


def test_siblings_and_shards_of_system_files_are_skipped(tmp_path: Path) -> None:
    folder = images(tmp_path / "f", "chosen/a.png", "rejected/a.png", "chosen/._a.png", "rejected/._a.png")
    (folder / "chosen/a.txt").write_text("\ufeffa cat", encoding="utf-8")
    (folder / "chosen/._a.txt").write_bytes(b"\0\5")
    pairs = read_pairs(folder)
    assert [item.caption for item in pairs.items] == ["a cat"] and pairs.total == 1
    table(tmp_path / "a.parquet", caption=["a"], chosen=[noise(0)], rejected=[noise(1)])
    (tmp_path / "._a.parquet").write_bytes(b"\0\5")
    assert len(read_pairs(tmp_path)) == 1


def code(number: int) -> str:
    return base64.b64encode(noise(number)).decode()


CELLS: dict[str, Callable[[int], object]] = {
    "struct": lambda k: {"bytes": noise(k), "path": None},
    "base64": code,
    "data URL": lambda k: "data:image/png;base64," + code(k),
    "numbers": lambda k: list(noise(k)),
    "list of one": lambda k: [{"bytes": noise(k), "path": None}],
    "path": lambda k: f"imgs/{k}.png",
    "back-slashes": lambda k: f"imgs\\{k}.png",
}


IN_JSON = ("base64", "data URL", "path", "back-slashes")


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [*((kind, ".parquet") for kind in CELLS), *((kind, end) for kind in IN_JSON for end in (".jsonl", ".json"))],
)
def test_an_image_in_any_cell_is_the_same(tmp_path: Path, kind: str, suffix: str) -> None:
    images(tmp_path, "imgs/0.png", "imgs/1.png")
    cells = [CELLS[kind](k) for k in range(2)]
    rows = [{"prompt": "a cat", "image": cell} for cell in cells]
    pair = [{"prompt": "a cat", "chosen": cells[0], "rejected": cells[1]}]
    for name, content in (("rows", rows), ("pairs", pair)):
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(content), tmp_path / f"{name}.parquet")
        else:
            (tmp_path / f"{name}{suffix}").write_text(json.dumps(content) if suffix == ".json" else lines(content))
    scored = rows_of(tmp_path / f"rows{suffix}")
    assert [row.read().tolist() for row in scored] == [decoded(k) for k in range(2)]
    assert all(len(row.file) < 100 and code(0) not in json.dumps(row.metadata, default=str) for row in scored)
    (example,) = read_pairs(tmp_path / f"pairs{suffix}").items
    assert [image.data() for image in example.images] == [noise(0), noise(1)]
    (trained, _) = Images(str(tmp_path / f"rows{suffix}")).read().items
    assert trained.images[0].data() == noise(0)


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def decoded(number: int) -> list[Any]:
    return np.asarray(Image.open(io.BytesIO(noise(number)))).transpose(2, 0, 1).tolist()


@pytest.mark.parametrize("high", [1, 100, 255, 70_000])
def test_integers_whose_scale_no_file_tells_are_refused(high: int) -> None:
    out = io.BytesIO()
    Image.fromarray(np.array([[0, high]], dtype=np.int32)).save(out, "TIFF")
    said = "; expected 0 to 65535" if high > 65535 else ", which may be all of 8 bits or the darkest of 16; save them"
    with pytest.raises(UnreadableError, match=f"integer pixels from 0 to {high}{said}"):
        decode(out.getvalue())


def test_links_to_folders_are_counted_and_links_to_nowhere_are_unreadable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = images(tmp_path / "f", "a.png")
    (folder / "more").symlink_to(images(tmp_path / "g", "b.png"))
    (folder / "z.png").symlink_to(tmp_path / "gone.png")
    rows = rows_of(folder)
    assert [row.file for row in rows] == ["a.png", "z.png"]
    assert "left out are 1 link to a folder" in caplog.text
    with pytest.raises(UnreadableError, match="cannot be opened"):
        rows[1].read()


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("https://example.com/0.png", "is a URL, which is not fetched"),
        (code(0)[:-301] + "!" + code(0), "neither a path nor an image in base64"),
        ("data:image/png;base64,%%%" + code(0), "neither a path nor an image in base64"),
        ("x/" * 5000, "neither a path nor an image in base64"),
        (["a.png", "b.png"], "found list"),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_cell_that_is_no_image_is_refused_without_being_printed(
    tmp_path: Path, cell: object, message: str, suffix: str
) -> None:
    images(tmp_path, "ok.png")
    row = {"prompt": "a cat", "chosen": cell, "rejected": cell}
    file = tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        file.write_text(lines([row]))
    else:
        pq.write_table(pa.Table.from_pylist([row]), file)
    command = ["--pairs", str(file), "--reward", "JPEGCompressibility", "--output", str(tmp_path / "o.json")]
    pairs = PreferencePairs(str(file))
    reasons = []
    try:
        (item,) = pairs.read().items
        item.images[0].data()
    except DataError as error:
        reasons.append(str(error))
    reasons += [pairs.report.read_text() if pairs.report.is_file() else ""]
    assert agree.main(command) == 2
    assert re.search(message, reasons[0] + reasons[1])
    assert all(len(reason) < 1200 for reason in reasons)


def test_a_long_banner_costs_what_its_square_does() -> None:
    sizes = []
    original = torch.where

    def where(*arguments: Any) -> torch.Tensor:
        result = original(*arguments)
        sizes.append(result.numel())
        return result

    banner = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 30, 4000), dtype=np.uint8)) / 255
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "where", where)
        for picture in (banner, banner.mT):
            assert square(picture, 224, "transformers").shape == (1, 3, 224, 224)
    assert max(sizes) < 2**20  # of 30 million for all of the resized banner


@pytest.mark.parametrize(("height", "width"), [(9, 700), (700, 9), (300, 40), (31, 33), (224, 500), (1, 64), (2000, 3)])
def test_a_square_is_pils_resize_and_crop(height: int, width: int) -> None:
    levels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    side, short = 32, min(height, width)
    size = (int(side * width / short), int(side * height / short))
    image = Image.fromarray(levels)
    if height > width:  # Pillow 13 turns the order of the passes for some tall pictures: one pass each
        image = image.resize((size[0], height), Image.Resampling.BICUBIC)
    resized = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    top, left = ((extent - side) // 2 for extent in (size[1], size[0]))
    ours = square(torch.from_numpy(levels).permute(2, 0, 1)[None] / 255, side, "transformers") * 255
    theirs = resized[top : top + side, left : left + side]
    assert np.array_equal(ours[0].permute(1, 2, 0).round().byte().numpy(), theirs)


# names
NAMES = {
    "back-slash": "d\\sub dir\\c.png",
    "decomposed": unicodedata.normalize("NFD", "d/sub dir/ä ö.png"),
    "composed": unicodedata.normalize("NFC", "d/sub dir/é.png"),
    "decomposed folder": unicodedata.normalize("NFD", "d/ü/x.png"),
    "space after a comma": " d/x.png ",
}
THERE = {
    "back-slash": "d/sub dir/c.png",
    "decomposed": unicodedata.normalize("NFC", "d/sub dir/ä ö.png"),
    "composed": unicodedata.normalize("NFD", "d/sub dir/é.png"),
    "decomposed folder": unicodedata.normalize("NFC", "d/ü/x.png"),
    "space after a comma": "d/x.png",
}


@pytest.mark.parametrize("kind", NAMES)
def test_a_name_in_another_spelling_is_found(tmp_path: Path, kind: str) -> None:
    images(tmp_path, THERE[kind], "d/other.png")
    rows = [{"prompt": "a cat", "chosen": NAMES[kind], "rejected": "d/other.png"}]
    (tmp_path / "pairs.jsonl").write_text(lines(rows))
    (pair,) = read_pairs(tmp_path / "pairs.jsonl").items
    assert pair.images[0].data() == noise(0)
    (tmp_path / "rows.jsonl").write_text(lines([{"prompt": "a cat", "image": NAMES[kind]}]))
    assert rows_of(tmp_path / "rows.jsonl")[0].read().tolist() == decoded(0)
    (tmp_path / "metadata.jsonl").write_text(lines([{"file_name": NAMES[kind], "text": "a cat"}]))
    prompts = {row.file: row.prompt for row in rows_of(tmp_path)}
    assert prompts == {THERE[kind]: "a cat", "d/other.png": None}


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("d/c.PNG", "d/c.png"),
        ("D/C.png", "d/c.png"),
        ("d/c.jpg", "d/c.png"),
        ("d/c", "d/c.png"),
        ("/home/x/data/d/c.png", "d/c.png"),
        ("C:\\Users\\x\\d\\c.png", "d/c.png"),
        ("elsewhere/c.png", None),
    ],
)
def test_a_name_that_is_not_there_is_answered_with_the_nearest(tmp_path: Path, name: str, nearest: str | None) -> None:
    images(tmp_path, "d/c.png", "d/other.png")
    (tmp_path / "pairs.jsonl").write_text(lines([{"prompt": "a cat", "chosen": name, "rejected": "d/other.png"}]))
    wanted = f"no such file: .*; the nearest that is there is {tmp_path / nearest}" if nearest else "no such file: "
    with pytest.raises(DataError, match=wanted):
        read_pairs(tmp_path / "pairs.jsonl")


def test_metadata_that_names_other_files_than_there_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = images(tmp_path / "f", "a.png", "b.png", "c.png")
    rows = [{"file_name": "a.png", "text": "a cat"}, {"file_name": "B.PNG", "text": "a dog"}]
    (folder / "metadata.jsonl").write_text(lines(rows))
    found = rows_of(folder)
    assert [(row.file, row.prompt) for row in found] == [
        ("a.png", "a cat"), ("b.png", None), ("c.png", None), ("B.PNG", "a dog"),
    ]  # fmt: skip
    assert "2 of 3 images have no prompt, the first is b.png" in caplog.messages[-1]
    with pytest.raises(UnreadableError, match=r"no such file: .*B\.PNG; the nearest that is there is .*b\.png"):
        found[3].read()


@pytest.mark.parametrize(
    ("files", "texts"),
    [
        ({"a.caption": "a cat", "B.TXT": "a dog"}, {"a.png": "a cat", "B.PNG": "a dog"}),  # kohya's default; Windows
        ({"Metadata.csv": "file_name;text\nB.PNG;a dog\na.png;a cat\n"}, {"a.png": "a cat", "B.PNG": "a dog"}),
        ({"metadata.jsonl": '{"image": "B.PNG", "text": "a dog"}'}, {"a.png": None, "B.PNG": "a dog"}),
        ({"metadata.csv": "file_name, text\n a.png, a cat\n"}, {"a.png": " a cat", "B.PNG": None}),
        ({"a-masklabel.png": "", "$RECYCLE.BIN/c.png": ""}, {"a.png": None, "B.PNG": None}),
    ],
)
def test_a_folder_of_another_program(tmp_path: Path, files: dict[str, str], texts: dict[str, str | None]) -> None:
    folder = images(tmp_path / "f", "a.png", "B.PNG")
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    assert {row.file: row.prompt for row in rows_of(folder)} == texts


def test_a_name_that_is_not_utf_8_is_a_bad_row_that_can_be_written_down(tmp_path: Path) -> None:
    for side in ("chosen", "rejected"):
        images(tmp_path / "f" / side, "a.png")
        os.rename(tmp_path / "f" / side / "a.png", os.fsencode(tmp_path / "f" / side) + b"/caf\xe9.png")
    (tmp_path / "f/chosen/x.txt").write_text("a cat")
    bad = rows_of(tmp_path / "f/chosen")[0]
    (pair,) = [row for row in recognise(str(tmp_path / "f"), None, None, None).rows if "caf" in row.source]
    for name, problem in ((bad.file, bad.problem), (pair.source, pair.problem)):
        assert "caf\\xe9" in name and "is not UTF-8; rename it" in problem
        name.encode()


@pytest.mark.parametrize("column", ["image", "path", "file_name"])
@pytest.mark.parametrize("below", ["", "f/", "file://"])
def test_prompts_that_name_their_images_are_not_taken_in_order(tmp_path: Path, column: str, below: str) -> None:
    folder = images(tmp_path / "f", "1.png", "2.png", "10.png")
    below = f"file://{folder}/" if below == "file://" else below
    rows = [{column: f"{below}{number}.png", "prompt": str(number)} for number in (10, 2, 1)]
    (tmp_path / "p.jsonl").write_text(lines(rows))
    found = rows_of(folder, prompts=str(tmp_path / "p.jsonl"))
    assert [(row.file, row.prompt) for row in found] == [("1.png", "1"), ("2.png", "2"), ("10.png", "10")]


def test_an_image_with_two_texts_in_the_tables_of_its_folder_is_refused(tmp_path: Path) -> None:
    folder = images(tmp_path / "f", "a.png")
    (folder / "metadata.jsonl").write_text(lines([{"file_name": "a.png", "text": text} for text in ("a cat", "a cat")]))
    assert [row.prompt for row in rows_of(folder)] == ["a cat"]
    (folder / "metadata.csv").write_text("file_name,text\na.png,a dog\n")
    with pytest.raises(DataError, match="another text for a.png than a row before it"):
        rows_of(folder)


def test_a_split_that_is_a_folder_is_that_folder(tmp_path: Path) -> None:
    folder = images(tmp_path / "f", "train/a.png", "test/b.png")
    for split, name in (("train", "a"), ("test", "b")):
        (folder / split / f"{name}.txt").write_text(name)
        assert [row.prompt for row in rows_of(folder, split=split)] == [name]
    assert [item.caption for item in Images(str(folder), split="train").read().items] == ["a"]


@pytest.mark.parametrize("high", [1.0001, 4.0])
def test_floats_between_the_two_conventions_are_refused(tmp_path: Path, high: float) -> None:
    """They would be black."""
    Image.fromarray(np.linspace(0, high, 64, dtype="f4").reshape(8, 8)).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableError, match="float pixels up to .*clip or rescale them"):
        decode(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_exif_that_is_none_turns_nothing(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4), "red").save(buffer, kind, exif=b"garbage", quality=95)
    assert decode(buffer.getvalue()).size == (8, 4)


def test_the_home_begins_image_root_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    images(tmp_path / "mine", "a.png", "b.png")
    (tmp_path / "p.jsonl").write_text(lines([{"prompt": "c", "chosen": "a.png", "rejected": "b.png"}]))
    assert len(read_pairs(tmp_path / "p.jsonl", image_root="~/mine")) == 1


@pytest.mark.parametrize("cell", [{"bytes": None, "path": "a.png"}, ["a.png"]])
def test_an_image_as_datasets_writes_it_into_json(tmp_path: Path, cell: object) -> None:
    images(tmp_path, "a.png")
    (tmp_path / "r.jsonl").write_text(lines([{"image": cell, "prompt": "a cat"}]))
    (row,) = rows_of(tmp_path / "r.jsonl")
    assert row.prompt == "a cat" and row.read().tolist() == decoded(0)


# preferences
def pick(tmp_path: Path, **columns: list[object]) -> Path:
    count = len(columns["label_0"])
    whole = {"caption": [f"c{k}" for k in range(count)], "jpg_0": [noise(2 * k) for k in range(count)]}
    whole["jpg_1"] = [noise(2 * k + 1) for k in range(count)]
    return table(tmp_path / "a.parquet", **whole, **columns)


def test_rows_that_nobody_labelled_are_no_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = pick(
        tmp_path, label_0=[1.0, 0.0, 0.0, 0.5, 1.0], label_1=[0.0, 1.0, 0.0, 0.5, 0.0],
        has_label=[True, True, False, True, True], are_different=[True, True, True, True, False],
    )  # fmt: skip
    found = read_pairs(file)
    assert [(pair.id, pair.images[0].column) for pair in found.items] == [(0, "jpg_0"), (1, "jpg_1")]
    assert (found.ties, found.unlabelled, len(found.bad), found.total) == (1, 2, 0, 5)
    output = tmp_path / "o.json"
    assert agree.main(["--pairs", str(file), "--reward", "JPEGCompressibility", "--output", str(output)]) == 0
    assert json.loads(output.read_text())["unlabelled"] == 2
    assert "2 pairs" in (told := capsys.readouterr().out) and "2 rows that nobody labelled" in told


@pytest.mark.parametrize("flag", [{"has_label": False}, {"are_different": "f"}])
@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "a.png", "rejected": "b.png"},
        {"images": ["a.png", "b.png"], "ranking": [1, 2]},
        {"image_path": "a.png", "prompt_id": "p", "rank": 1},
    ],
)
def test_in_no_layout_is_what_nobody_labelled_a_pair(tmp_path: Path, row: dict[str, Any], flag: dict[str, Any]) -> None:
    images(tmp_path, "a.png", "b.png")
    (tmp_path / "p.jsonl").write_text(lines([row | flag | {"prompt": "c"}]))
    (pair,) = recognise(str(tmp_path / "p.jsonl"), None, None, None).rows
    assert pair.unlabelled == f"{next(iter(flag))} is false" and pair.sides is None


def test_a_tie_beside_a_winners_column_is_a_tie(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png")
    rows = [{"prompt": "c", "chosen": "a.png", "rejected": "b.png", "label": label} for label in ("tie", "a", "a dog")]
    (tmp_path / "p.jsonl").write_text(lines(rows))
    assert [row.sides is None for row in recognise(str(tmp_path / "p.jsonl"), None, None, None).rows] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    "row", [{"images": ["a.png", "b.png"], "ranking": [1, -1]}, {"image_path": "a.png", "rank": -1}]
)
def test_a_rank_below_0_is_none(tmp_path: Path, row: dict[str, Any]) -> None:
    """It stands where nobody ranked, and would be the best."""
    images(tmp_path, "a.png", "b.png")
    (tmp_path / "p.jsonl").write_text(lines([row | {"prompt": "c"}]))
    with pytest.raises(DataError, match=r"expected .*rank.*, 1 the best"):
        read_pairs(tmp_path / "p.jsonl")


@pytest.mark.parametrize("spell", [json.dumps, str])
def test_lists_in_a_csv(tmp_path: Path, spell: Callable[[object], str]) -> None:
    images(tmp_path, "0.png", "1.png", "2.png")
    with open(tmp_path / "r.csv", "w", newline="") as file:
        row = {"prompt": "p0", "generations": spell(["0.png", "1.png", "2.png"]), "ranking": spell([2, 1, 3])}
        csv.DictWriter(file, row).writerows([dict(zip(row, row, strict=True)), row])
    assert won(read_pairs(tmp_path / "r.csv")) == RANKED


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((0.0, 0.0), "label_0 is 0 and label_1 0.0, which do not add up to 1"),
        ((1.0, 1.0), "do not add up to 1"),
        ((0.5, 0.0), "do not add up to 1"),
        ((1.0, float("nan")), "do not add up to 1"),
        ((0.7, 0.3), "label_0 is the soft label 0.7; expected 1, 0 or 0.5"),
        ((2.0, -1.0), "label_0 is 2.0, expected 1, 0 or 0.5"),
    ],
)
def test_labels_that_say_no_winner_are_refused(tmp_path: Path, labels: tuple[float, float], message: str) -> None:
    file = pick(tmp_path, label_0=[1.0, labels[0]], label_1=[0.0, labels[1]])
    with pytest.raises(DataError, match=f"1 of 2 rows are unusable[^\n]*\n.*row 1.*{message}"):
        read_pairs(file)


@pytest.mark.parametrize("label", ["1", "1.0", " 1 ", 1, True])
def test_a_label_may_be_a_text(tmp_path: Path, label: object) -> None:
    images(tmp_path, "a.png", "b.png")
    (tmp_path / "p.jsonl").write_text(lines([{"caption": "c", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": label}]))
    assert read_pairs(tmp_path / "p.jsonl")[0].images[0].file.name == "a.png"


def won(pairs: Any) -> list[tuple[str, str, str]]:
    return [(item.caption, *(str(image.file.name) for image in item.images)) for item in pairs.items]


RANKED = [("p0", "1.png", "0.png"), ("p0", "0.png", "2.png"), ("p0", "1.png", "2.png")]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("images_name", "mark", "value"),
    [
        ("generations", "ranking", [2, 1, 3]),
        ("file_path", "human_preference", [0.5, 0.9, 0.1]),
        ("image_path", "rank", [2.0, 1.0, 3.0]),
        ("image_path", "rank", ["2", "1", "3"]),
        ("images", "best", 1),
        ("images", "best", "1.png"),
    ],
)
def test_rankings_in_a_row(tmp_path: Path, suffix: str, images_name: str, mark: str, value: Any) -> None:
    images(tmp_path, "0.png", "1.png", "2.png")
    rows = [{"prompt": "p0", images_name: ["0.png", "1.png", "2.png"], mark: value}]
    write(tmp_path / f"r{suffix}", rows)
    wanted = [pair for pair in RANKED if mark != "best" or pair[1] == "1.png"]
    assert won(read_pairs(tmp_path / f"r{suffix}")) == wanted


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".csv":
        names = list(rows[0])
        text = [",".join(names), *(",".join(str(row[name]) for name in names) for row in rows)]
        file.write_text("\n".join(text) + "\n")
    else:
        file.write_text(json.dumps(rows) if file.suffix == ".json" else lines(rows))


def test_lists_of_images_inside_parquet(tmp_path: Path) -> None:
    row = {"prompt": "p0", "images": [noise(0), noise(1), noise(2)], "best": 2}
    write(tmp_path / "r.parquet", [row])
    found = read_pairs(tmp_path / "r.parquet")
    assert [[image.data() for image in pair.images] for pair in found.items] == [
        [noise(2), noise(0)], [noise(2), noise(1)],
    ]  # fmt: skip
    assert found[0].images[0].column == "images[2]"


@pytest.mark.parametrize("best", [3, -1, 1.5, True, None, "x.png"])
def test_a_best_that_is_none_of_the_list_is_bad(tmp_path: Path, best: object) -> None:
    images(tmp_path, "0.png", "1.png", "2.png")
    write(tmp_path / "r.json", [{"prompt": "p0", "images": ["0.png", "1.png", "2.png"], "best": best}])
    with pytest.raises(DataError, match="3 images with best"):
        read_pairs(tmp_path / "r.json")


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("grouped", [True, False])
def test_one_row_an_image(tmp_path: Path, suffix: str, grouped: bool) -> None:
    images(tmp_path, "0.png", "1.png", "2.png", "3.png", "4.png")
    marks = [("p0", 2), ("p0", 1), ("p0", 3), ("p1", 1), ("p1", 1)]
    rows = [{"image_path": f"{k}.png", "prompt": text, "rank": rank} for k, (text, rank) in enumerate(marks)]
    rows = [{"prompt_id": row["prompt"], **row} if grouped else row for row in rows]
    write(tmp_path / f"db{suffix}", rows)
    found = read_pairs(tmp_path / f"db{suffix}")
    assert won(found) == RANKED and found.ties == 1
    choices = agree.read(str(tmp_path / f"db{suffix}"), None, None, None, None)
    assert len(choices.choices) == 3 and len(choices.ties) == 1


def test_one_row_an_image_inside_parquet(tmp_path: Path) -> None:
    rows = [{"image": noise(k), "image_path": f"gone/{k}.webp", "prompt": "p", "rank": k} for k in (2, 1)]
    write(tmp_path / "db.parquet", rows)
    (pair,) = read_pairs(tmp_path / "db.parquet").items
    assert [image.data() for image in pair.images] == [noise(1), noise(2)]


@pytest.mark.parametrize(
    ("columns", "label", "first"),
    [
        (("image0", "image1"), 0, True),
        (("image0", "image1"), 1, False),
        (("image0", "image1"), "1", False),
        (("image0", "image1"), "image0", True),
        (("image_0", "image_1"), 0, True),
        (("image0", "image1"), "tie", None),
        (("image0", "image1"), 0.5, None),
        (("image_a", "image_b"), "A", True),
        (("image_a", "image_b"), " right ", False),
        (("image0", "image1"), "Image 1", False),
        (("image_a", "image_b"), "b.png", False),
        (("image_a", "image_b"), "\u201cA\u201d", True),
        (("image_a", "image_b"), "model_b", False),
        (("image_a", "image_b"), "The left one is better", True),
        (("image_a", "image_b"), "tie (bothbad)", None),
        (("image_a", "image_b"), "both bad", None),
    ],
)
def test_two_columns_and_a_label(tmp_path: Path, columns: tuple[str, str], label: object, first: bool | None) -> None:
    images(tmp_path, "a.png", "b.png")
    row = dict(zip(columns, ("a.png", "b.png"), strict=True)) | {"caption": "c", "label": label}
    sure = dict(zip(columns, ("a.png", "b.png"), strict=True)) | {"caption": "d", "label": "tie"}
    write(tmp_path / "m.json", [row, sure, {**row, "caption": "e", "label": columns[0]}])
    found = read_pairs(tmp_path / "m.json")
    wanted = {True: [("c", "a.png", "b.png")], False: [("c", "b.png", "a.png")], None: []}[first]
    assert won(found) == [*wanted, ("e", "a.png", "b.png")]


@pytest.mark.parametrize(
    ("columns", "label"),
    [
        (("image0", "image1"), 2),
        (("image0", "image1"), 0.7),
        (("image_a", "image_b"), 1),
        (("image_a", "image_b"), "perhaps"),
        (("image_a", "image_b"), "!a"),
        (("image_a", "image_b"), "A=B"),
    ],
)
def test_a_label_that_could_mean_either_is_refused(tmp_path: Path, columns: tuple[str, str], label: object) -> None:
    images(tmp_path, "a.png", "b.png")
    write(tmp_path / "m.json", [dict(zip(columns, ("a.png", "b.png"), strict=True)) | {"caption": "c", "label": label}])
    with pytest.raises(DataError, match="label is .*; expected"):
        read_pairs(tmp_path / "m.json")


def test_pairs_with_both_winners_are_counted_and_stop_where_they_are_most(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    images(tmp_path, *(f"{k}.png" for k in range(10)))
    rows = [{"prompt": f"p{k}", "chosen": f"{k}.png", "rejected": f"{k + 1}.png"} for k in range(8)]
    other = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    write(tmp_path / "some.jsonl", [*rows, *other[:2]])
    write(tmp_path / "all.jsonl", [*rows, *other])
    assert len(read_pairs(tmp_path / "some.jsonl")) == 10
    assert "4 of 10 pairs are there with the other winner too" in caplog.text
    command = ["--pairs", str(tmp_path / "some.jsonl"), "--reward", "JPEGCompressibility"]
    assert agree.main([*command, "--output", str(tmp_path / "agreement.json")]) == 0
    assert "4 of these pairs are there with the other winner too" in capsys.readouterr().out
    with pytest.raises(DataError, match="16 of 16 pairs .* max_contradicted_share = 0.5"):
        read_pairs(tmp_path / "all.jsonl")
    assert len(read_pairs(tmp_path / "all.jsonl", max_contradicted_share=1.0)) == 16
    write(tmp_path / "same.jsonl", [*rows, rows[0] | {"rejected": "0.png"}])
    with pytest.raises(DataError, match="both images are the same"):
        read_pairs(tmp_path / "same.jsonl")


def test_a_field_too_many_is_a_bad_row_of_pairs(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png")
    (tmp_path / "p.csv").write_text("chosen,rejected,prompt\na.png,b.png,a cat\na.png,b.png,a cat, black\n")
    with pytest.raises(DataError, match=r"p\.csv:3: 4 fields for the 3 columns|row 1, .*p\.csv:3: 4 fields"):
        read_pairs(tmp_path / "p.csv")


def test_the_cache_tells_images_of_a_list_apart(tmp_path: Path) -> None:
    """Two images of one cell of parquet differ by their column."""
    write(tmp_path / "r.parquet", [{"prompt": "p", "images": [noise(0), noise(1)], "best": 1}])
    (pair,) = read_pairs(tmp_path / "r.parquet").items
    assert len({(image.file, image.row, image.column) for image in pair.images}) == 2
    assert latent_cache._bytes(pair) == [noise(1), noise(0)]


def test_nothing_is_logged_for_a_clean_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = images(tmp_path / "f", "a.png", "b.JPG")
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text("a cat")
    caplog.set_level(logging.WARNING)
    assert len(rows_of(folder)) == 2 and not caplog.messages
