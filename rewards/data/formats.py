"""The layouts people keep pictures and prompts in, each read into an :class:`~rewards.data.images.Input`.

Nothing is decoded, unpacked to disk or unpickled here.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards import RewardError
from rewards.data.images import Input, Row

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PROMPTS = ("prompt", "caption", "text")
IMAGES = ("image", "picture", "jpg", "png", "webp", "file_name", "image_path", "file_path", "path", "file")
METADATA = ("metadata.jsonl", "metadata.csv")
_BROKEN_TAR = (tarfile.TarError, OSError, EOFError, zlib.error)


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


def folder(
    place: Path, images: Sequence[str], files: Sequence[str], prompts: str | None, prompt_column: str | None
) -> Input:
    """The ``images`` below ``place``; prompts from the file named, or from what lies among its ``files``."""
    texts = _folder_prompts(place, images, files, Path(prompts) if prompts else None, prompt_column)
    rows = [Row(file, texts.get(file, (None,))[0], place / file, *texts.get(file, ())[1:]) for file in images]
    return _listed("folder", rows)


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


def records(path: Path, prompt_column: str | None, image_column: str | None) -> Input:
    """A .jsonl or .csv file with the path of an image, relative to it, in every row."""
    rows = []
    for number, record in _numbered(path):
        image, prompt = _columns(f"{path}, row {number}", list(record), prompt_column, image_column)
        if not isinstance(record[image], str):
            raise RewardError(f"{path}, row {number}: {image!r} is {record[image]!r}; expected the path of an image")
        text = _text(path, number, record, prompt) if prompt else None
        rows.append(Row(record[image], text, path.parent / record[image], record))
    if not rows:
        raise RewardError(f"{path} has no rows; expected one per image")
    return _listed("records", rows)


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


def parquet(home: Path, files: Sequence[Path], prompt_column: str | None, image_column: str | None) -> Input:
    """The rows of parquet ``files`` below ``home``; row groups of which nothing is wanted are not read."""
    import pyarrow.parquet as pq

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


def saved(place: Path, split: str | None, prompt_column: str | None, image_column: str | None) -> Input:
    """What ``datasets`` wrote with ``save_to_disk``."""
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(place))
    splits = dict(found) if isinstance(found, DatasetDict) else {str(found.split or "train"): found}
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        raise RewardError(f"{place} holds the splits {', '.join(sorted(map(str, splits)))}; name one with --split")
    return _dataset(f"{place.name}/{split}", place, splits[split], prompt_column, image_column)


def hub(name: str, split: str | None, prompt_column: str | None, image_column: str | None) -> Input:
    """A data set of the hub, by default its split train."""
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
def tars(home: Path, files: Sequence[Path], prompt_column: str | None, image_column: str | None) -> Input:
    """webdataset archives below ``home``. How many rows one holds is known once it was read to its end; from then on
    it is passed over where none of them is wanted."""
    counts: dict[Path, int] = {}

    def rows(wanted: Callable[[int], bool]) -> Iterator[Row | None]:
        start = 0
        for tar in files:
            if tar not in counts or any(map(wanted, range(start, start + counts[tar]))):
                counts[tar] = yield from _one(tar, start, wanted)
            else:
                yield from itertools.repeat(None, counts[tar])
            start += counts[tar]

    def _one(tar: Path, start: int, wanted: Callable[[int], bool]) -> Generator[Row | None, None, int]:
        count = 0
        try:
            for stem, members in itertools.groupby(_members(tar), key=lambda one: one[0]):
                if wanted(start + count):
                    name = f"{tar.relative_to(home).as_posix()}/{stem}"
                    yield _sample(name, {suffix: read() for _, suffix, read in members}, prompt_column, image_column)
                else:
                    yield None
                count += 1
        except _BROKEN_TAR as error:
            raise RewardError(f"{tar} is not a whole tar file: {error}; make it anew, or take it away") from error
        return count

    sizes = [[tar.relative_to(home).as_posix(), tar.stat().st_size] for tar in files]
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
    with tarfile.open(path, mode="r:*", tarinfo=_Strict) as archive:
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
