"""What the commands of this package are given: rewards by name, and pictures in the layouts people keep them in.

Nothing is decoded here before somebody asks, nothing is unpacked to disk, and nothing is unpickled.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image, ImageOps
from torch import Tensor, nn

from rewards import Reward, RewardError, load

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TARS = (".tar", ".tar.gz", ".tgz")
PROMPTS = ("prompt", "caption", "text")
IMAGES = ("image", "picture", "jpg", "png", "webp", "file_name", "image_path", "file_path", "path", "file")
METADATA = ("metadata.jsonl", "metadata.csv")
LAYOUTS = (
    "a folder of images, a .parquet file or folder of them, .jsonl or .csv, webdataset .tar files, "
    "a save_to_disk folder, or a hub id owner/name"
)
# what Pillow raises on damaged files
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_BROKEN_TAR = (tarfile.TarError, OSError, EOFError, zlib.error)


# Rewards
@dataclass(frozen=True)
class Named:
    """One reward as the user named it; ``args`` are its own."""

    label: str
    name: str
    args: dict[str, Any]

    def settings(self) -> dict[str, Any]:
        """What may be written down: a token authorises, it changes no score."""
        return {"name": self.name, "args": {key: value for key, value in self.args.items() if key != "token"}}


def parse_rewards(texts: Sequence[str]) -> list[Named]:
    """``NAME``, ``NAME:KEY=VALUE,KEY=VALUE``, or the YAML of a training run: ``{name: .., label: .., args: {..}}``.

    A VALUE is a YAML scalar without commas. ``RewardError`` where one is neither, or where two have the same label.
    """
    found = [_parse_reward(text) for text in texts]
    labels = [one.label for one in found]
    for label in labels:
        if labels.count(label) > 1:
            raise RewardError(
                f"two rewards are called {label!r}; give one a label: '{{name: .., label: .., args: ..}}'"
            )
        if label in ("file", "prompt"):
            raise RewardError(f"a reward cannot be called {label!r}, which is another column; give another label")
    return found


def _parse_reward(text: str) -> Named:
    expected = "expected NAME, NAME:KEY=VALUE,KEY=VALUE or '{name: NAME, label: LABEL, args: {KEY: VALUE}}'"
    try:
        if not text.lstrip().startswith("{"):
            name, _, rest = text.partition(":")
            args = {}
            for item in rest.split(",") if rest else []:
                key, equals, value = item.partition("=")
                if not equals or not key.isidentifier() or key in args:
                    raise RewardError(f"--reward {text}: {item!r} is no KEY=VALUE of its own; {expected}")
                args[key] = yaml.safe_load(value)
            return Named(name, name, args)
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RewardError(f"--reward {text} is not YAML ({' '.join(str(error).split())}); {expected}") from error
    if set(given) - {"name", "label", "args"}:
        raise RewardError(f"--reward {text} has the keys {', '.join(map(str, given))}; {expected}")
    name, args = given.get("name"), given.get("args", {})
    label = given.get("label", name)
    if not (isinstance(name, str) and isinstance(label, str) and label and isinstance(args, dict)):
        raise RewardError(f"--reward {text}: {expected}")
    return Named(label, name, args)


def load_rewards(named: Sequence[Named], device: str) -> dict[str, Reward]:
    """The rewards by label, networks on ``device``. ``RewardError`` says which one cannot be had, and why."""
    found = {}
    for one in named:
        try:
            reward = load(one.name, one.args)
        except RewardError:
            raise
        except (ValueError, TypeError) as error:  # what constructors say to a wrong argument
            raise RewardError(f"reward {one.label!r}: {error}") from error
        if isinstance(reward, nn.Module):
            reward.to(device)
        found[one.label] = reward
    return found


def pick_device(wanted: str | None, local: int = 0) -> str:
    """``wanted``, or GPU number ``local``, or the CPU; a GPU becomes the one that "cuda" means. ``RewardError`` where
    there is no such device."""
    try:
        device = torch.device(wanted or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            torch.cuda.set_device(local if device.index is None else device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RewardError(f"--device is {wanted}; expected cpu, cuda, cuda:0, ... ({reason})") from error
    return str(device)


# Pictures
@dataclass(frozen=True)
class Row:
    """One picture to score: where it lies, or its encoded bytes. One with a ``problem`` cannot be read."""

    file: str
    prompt: str | None = None
    picture: Path | bytes | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""

    def read(self) -> Tensor:
        """:func:`decode` of its picture; ``OSError`` also where there is a ``problem``."""
        if self.problem or self.picture is None:
            raise OSError(self.problem or "there is no picture in this row")
        return decode(self.picture)


@dataclass(frozen=True)
class Input:
    """Rows in a fixed order.

    ``rows(wanted)`` gives one item per row, the row where ``wanted(number)`` and None elsewhere, so that skipping is
    cheap. ``identity`` is JSON and the same for the same rows. ``total`` is None where only reading tells;
    ``listed`` holds the rows where all of them are known beforehand.
    """

    identity: dict[str, Any]
    total: int | None
    rows: Callable[[Callable[[int], bool]], Iterator[Row | None]]
    listed: Sequence[Row] = ()


def decode(picture: Path | bytes, formats: tuple[str, ...] | None = None, max_pixels: int | None = None) -> Tensor:
    """One upright picture on white: (3, H, W) uint8. ``OSError`` where it cannot be read, or is not among Pillow's
    ``formats``, or has more than ``max_pixels``, which is looked at before any pixel is decoded."""
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture, formats=formats) as opened:
            if max_pixels is not None and opened.width * opened.height > max_pixels:
                raise OSError(f"{opened.width} x {opened.height} pixels; at most {max_pixels} are taken")
            if opened.mode.startswith(("I", "F")):  # PIL would clip these to white without a word
                raise OSError(f"{opened.mode} pixels; expected 8 bits a channel")
            image = ImageOps.exif_transpose(opened).convert("RGBA")
    except OSError:
        raise
    except _BROKEN as error:
        raise OSError(str(error)) from error
    white = Image.new("RGBA", image.size, "white")
    pixels = np.array(Image.alpha_composite(white, image).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def natural(text: str) -> list[tuple[bool, int, str]]:
    """Sort key under which ``2.png`` comes before ``10.png``, and both before ``a.png``."""
    parts = re.findall(r"[0-9]+|[^0-9]+", text)
    return [(False, int(part), "") if part.isdigit() else (True, 0, part.lower()) for part in parts]


def open_input(
    source: str,
    prompts: str | None = None,
    prompt_column: str | None = None,
    image_column: str | None = None,
    split: str | None = None,
) -> Input:
    """Find out which layout ``source`` has. In a folder that has several, images go before tar files and parquet.

    ``prompts`` names a file for a folder of images; the columns default to the first of :data:`PROMPTS` and
    :data:`IMAGES` that is there. ``RewardError`` says what arrived and what is understood.
    """
    place = Path(source).expanduser()
    if place.is_file():
        if place.suffix in (".jsonl", ".csv"):
            found = _listed("records", _records(place, prompt_column, image_column))
        elif place.suffix == ".parquet":
            found = _parquet(place.parent, [place], prompt_column, image_column)
        elif place.name.endswith(TARS):
            found = _tars(place.parent, [place], prompt_column, image_column)
        else:
            raise RewardError(f"{place} is no input that is understood; expected {LAYOUTS}")
    elif (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file():
        return _saved(place, split, prompt_column, image_column)  # the one, with the hub, that has splits
    elif place.is_dir():
        files = sorted((path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()), key=natural)
        images = [file for file in files if file.lower().endswith(SUFFIXES)]
        tars = [place / file for file in files if file.endswith(TARS)]
        shards = [place / file for file in files if file.endswith(".parquet")]
        if images:
            texts = _folder_prompts(place, images, files, Path(prompts) if prompts else None, prompt_column)
            rows = [Row(file, texts.get(file, (None,))[0], place / file, *texts.get(file, ())[1:]) for file in images]
            found = _listed("folder", rows)
        elif tars:
            found = _tars(place, tars, prompt_column, image_column)
        elif shards:
            found = _parquet(place, shards, prompt_column, image_column)
        else:
            raise RewardError(f"no images ({', '.join(SUFFIXES)}) in {place}; expected {LAYOUTS}")
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        return _hub(source, split, prompt_column, image_column)
    else:
        raise RewardError(f"no such folder or file: {place}; expected {LAYOUTS}")
    if split is not None:
        raise RewardError(f"{place} has no splits, but --split {split} is given; leave it out")
    if prompts is not None and found.identity["layout"] != "folder":
        raise RewardError(f"--prompts is for a folder of images; {place} brings its own, see --prompt_column")
    return found


# Rows that are all known beforehand: folders and lists of records.
def _listed(layout: str, rows: Sequence[Row]) -> Input:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.file, row.prompt, row.metadata], default=str, sort_keys=True).encode())
    return Input(
        {"layout": layout, "rows": len(rows), "digest": digest.hexdigest()},
        len(rows),
        lambda wanted: (row if wanted(number) else None for number, row in enumerate(rows)),
        rows,
    )


Text = tuple[str, Mapping[str, Any]]  # a prompt and the record that it comes from


def _folder_prompts(
    folder: Path, images: Sequence[str], files: Sequence[str], source: Path | None, column: str | None
) -> dict[str, Text]:
    """Prompt and record of each image that has them; ``source`` is what the user named, if anything."""
    if source is None:
        if tables := [file for file in files if Path(file).name in METADATA]:  # imagefolder: names are relative to each
            pairs = [_by_name(folder / table, Path(table).parent, column) for table in tables]
            return {file: text for found in pairs for file, text in found.items()}
        sidecars = {file: (folder / file).with_suffix(".txt") for file in images}
        return {file: (path.read_text("utf-8").strip(), {}) for file, path in sidecars.items() if path.is_file()}
    if not source.is_file():
        raise RewardError(f"no such prompts file: {source}")
    if source.suffix.lower() == ".txt":
        texts: list[Text] = [(line.strip(), {}) for line in source.read_text("utf-8").splitlines() if line.strip()]
    elif all("file_name" in record for record in _parse(source)):
        return _by_name(source, Path(), column)
    else:
        texts = [(_text(source, number, record, column), record) for number, record in _numbered(source)]
    if len(texts) != len(images):
        raise RewardError(
            f"{source} has {len(texts)} prompts for {len(images)} images; expected one per image, in order"
        )
    return dict(zip(images, texts, strict=True))


def _by_name(path: Path, below: Path, column: str | None) -> dict[str, Text]:
    found = {}
    for number, record in _numbered(path):
        if not isinstance(record.get("file_name"), str):
            raise RewardError(f"{path}, row {number} has no string 'file_name'; it has {_keys(record)}")
        found[(below / record["file_name"]).as_posix()] = (_text(path, number, record, column), record)
    return found


def _records(path: Path, prompt_column: str | None, image_column: str | None) -> list[Row]:
    rows = []
    for number, record in _numbered(path):
        image, prompt = _columns(f"{path}, row {number}", list(record), prompt_column, image_column)
        if not isinstance(record[image], str):
            raise RewardError(f"{path}, row {number}: {image!r} is {record[image]!r}; expected the path of an image")
        text = _text(path, number, record, prompt) if prompt else None
        rows.append(Row(record[image], text, path.parent / record[image], record))
    if not rows:
        raise RewardError(f"{path} has no rows; expected one per image")
    return rows


def _numbered(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    return enumerate(_parse(path), start=1)


def _parse(path: Path) -> list[Mapping[str, Any]]:
    if path.suffix.lower() == ".csv":
        with path.open(newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise RewardError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise RewardError(f"{path}, line {number} is not a JSON object")
            rows.append(row)
    return rows


def _keys(record: Mapping[str, Any]) -> str:
    return ", ".join(map(str, record)) or "nothing"


def _text(path: Path, number: int, row: Mapping[str, Any], column: str | None) -> str:
    name = column or next((name for name in PROMPTS if name in row), "text")
    if not isinstance(row.get(name), str):
        raise RewardError(f"{path}, row {number} has no string {name!r}; it has {_keys(row)}")
    return str(row[name])


# Tables: parquet, and what `datasets` reads.
def _columns(where: str, names: Sequence[str], prompt: str | None, image: str | None) -> tuple[str, str | None]:
    """The columns of image and prompt; the latter None where there is none and nobody named one."""
    images = [name for name in ((image,) if image else IMAGES) if name in names]
    texts = [name for name in ((prompt,) if prompt else PROMPTS) if name in names]
    if not images:
        wanted = f"{image!r}" if image else f"one of {', '.join(IMAGES)}; name it with --image_column"
        raise RewardError(f"{where} has the columns {', '.join(names)}; expected for the image {wanted}")
    if prompt and not texts:
        raise RewardError(f"{where} has the columns {', '.join(names)}; expected for the prompt {prompt!r}")
    return images[0], texts[0] if texts else None


def _cell(name: str, home: Path, record: dict[str, Any], image: str, prompt: str | None) -> Row:
    cell, text = record.pop(image), record.get(prompt) if prompt else None
    if isinstance(cell, dict):  # the Image type of `datasets`
        cell = cell.get("bytes") if cell.get("bytes") is not None else cell.get("path")
    picture = home / cell if isinstance(cell, str) else cell
    if picture is not None and not isinstance(picture, (bytes, Path)):
        return Row(name, problem=f"column {image!r} holds {type(cell).__name__}; expected bytes or a path")
    if text is not None and not isinstance(text, str):
        return Row(name, problem=f"column {prompt!r} holds {type(text).__name__}; expected a string")
    return Row(name, text, picture, record)


def _small(schema: pa.Schema, image: str) -> list[str]:
    """The image and every column without bytes in it: another picture would be read for nothing."""
    return [column.name for column in schema if column.name == image or "binary" not in str(column.type)]


def _parquet(home: Path, files: Sequence[Path], prompt_column: str | None, image_column: str | None) -> Input:
    try:
        schemas = [pq.read_schema(file) for file in files]
        counts = [pq.read_metadata(file).num_rows for file in files]
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise RewardError(f"{home} has a file that is not parquet: {error}") from error
    common = [name for name in schemas[0].names if all(name in schema.names for schema in schemas)]
    image, prompt = _columns(str(files[0]), common, prompt_column, image_column)
    columns = [name for name in _small(schemas[0], image) if name in common]

    def rows(wanted: Callable[[int], bool]) -> Iterator[Row | None]:
        start = 0
        for file, count in zip(files, counts, strict=True):
            try:
                for number, row in enumerate(_file(file, start, wanted)):
                    name = f"{file.relative_to(home).as_posix()}#{number}"
                    yield None if row is None else _cell(name, file.parent, row, image, prompt)
            except ValueError as error:
                raise RewardError(f"{file} is damaged: {error}") from error
            start += count

    def _file(file: Path, start: int, wanted: Callable[[int], bool]) -> Iterator[dict[str, Any] | None]:
        with pq.ParquetFile(file, memory_map=True) as opened:
            for group in range(opened.num_row_groups):
                numbers = range(start, start + opened.metadata.row_group(group).num_rows)
                start = numbers.stop
                if not any(map(wanted, numbers)):
                    yield from itertools.repeat(None, len(numbers))
                    continue
                batches = opened.iter_batches(32, row_groups=[group], columns=columns)
                cells = (cell for batch in batches for cell in batch.to_pylist())
                yield from (cell if wanted(number) else None for number, cell in zip(numbers, cells, strict=True))

    sizes = [
        [file.relative_to(home).as_posix(), count, file.stat().st_size]
        for file, count in zip(files, counts, strict=True)
    ]
    identity = {"layout": "parquet", "files": sizes, "image_column": image, "prompt_column": prompt}
    return Input(identity, sum(counts), rows)


def _saved(folder: Path, split: str | None, prompt_column: str | None, image_column: str | None) -> Input:
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(folder))
    splits = dict(found) if isinstance(found, DatasetDict) else {str(found.split or "train"): found}
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        raise RewardError(f"{folder} holds the splits {', '.join(sorted(map(str, splits)))}; name one with --split")
    return _dataset(f"{folder.name}/{split}", folder, splits[split], prompt_column, image_column)


def _hub(name: str, split: str | None, prompt_column: str | None, image_column: str | None) -> Input:
    from datasets import load_dataset

    split = split or "train"
    try:
        found = load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # not found, no network, no such split, needs code to run
        reason = " ".join(str(error).split())
        raise RewardError(
            f"{name} is no file or folder here, nor a hub data set with split {split}: {reason}"
        ) from error
    return _dataset(f"{name}/{split}", Path(), found, prompt_column, image_column)


def _dataset(name: str, home: Path, found: Any, prompt_column: str | None, image_column: str | None) -> Input:
    from datasets import Image as Encoded

    image, prompt = _columns(name, found.column_names, prompt_column, image_column)
    table = found.select_columns(_small(found.features.arrow_schema, image))
    if isinstance(found.features[image], Encoded):
        table = table.cast_column(image, Encoded(decode=False))

    def rows(wanted: Callable[[int], bool]) -> Iterator[Row | None]:
        for number in range(len(table)):
            yield _cell(f"{name}#{number}", home, dict(table[number]), image, prompt) if wanted(number) else None

    identity = {"layout": "datasets", "name": name, "rows": len(table), "fingerprint": found._fingerprint}
    return Input(identity | {"image_column": image, "prompt_column": prompt}, len(table), rows)


# webdataset: consecutive members of one stem are one row.
def _tars(home: Path, tars: Sequence[Path], prompt_column: str | None, image_column: str | None) -> Input:
    def rows(wanted: Callable[[int], bool]) -> Iterator[Row | None]:
        count = itertools.count()
        for tar in tars:
            name = tar.relative_to(home).as_posix()
            try:
                for stem, members in itertools.groupby(_members(tar), key=lambda one: one[0]):
                    if wanted(next(count)):
                        parts = {suffix: read() for _, suffix, read in members}
                        yield _sample(f"{name}/{stem}", parts, prompt_column, image_column)
                    else:
                        yield None
            except _BROKEN_TAR as error:
                raise RewardError(f"{tar} is not a whole tar file: {error}; make it anew, or take it away") from error

    sizes = [[tar.relative_to(home).as_posix(), tar.stat().st_size] for tar in tars]
    identity = {"layout": "webdataset", "files": sizes, "image_column": image_column, "prompt_column": prompt_column}
    return Input(identity, None, rows)


class _Strict(tarfile.TarInfo):
    """tarfile takes the place where a file was cut off or is damaged for its end; the true end is a block of zeros."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Strict:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"it breaks off or is damaged ({error})") from error


def _members(path: Path) -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """Stem, suffix (without its dot) and reader of each plain file; a reader works until the next one is asked for."""
    with tarfile.open(path, mode="r|*", tarinfo=_Strict) as archive:
        while (member := archive.next()) is not None:
            folder, slash, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if member.isfile() and stem:

                def read(member: tarfile.TarInfo = member) -> bytes:
                    stream = archive.extractfile(member)
                    return stream.read() if stream else b""

                yield folder + slash + stem, suffix.lower(), read
            archive.members = []  # type: ignore[attr-defined]  # or tarfile would remember all of a large file


def _sample(name: str, parts: Mapping[str, bytes], prompt_column: str | None, image_column: str | None) -> Row:
    pictures = [part for part in parts if (part == image_column if image_column else f".{part}".endswith(SUFFIXES))]
    if len(pictures) != 1:
        wanted = f".{image_column}" if image_column else "picture"
        return Row(name, problem=f"expected one {wanted}; its files are {', '.join(f'.{part}' for part in parts)}")
    try:
        metadata = json.loads(parts.get("json", b"{}"))
        text = parts["txt"].decode().strip() if "txt" in parts and not prompt_column else None
    except ValueError as error:  # not JSON, not UTF-8
        return Row(name, problem=f"its text cannot be read: {error}")
    if not isinstance(metadata, dict):
        return Row(name, problem="its .json is not an object")
    for column in (prompt_column,) if prompt_column else PROMPTS:
        if text is None and isinstance(metadata.get(column), str):
            text = metadata[column]
    return Row(f"{name}.{pictures[0]}", text, parts[pictures[0]], metadata)
