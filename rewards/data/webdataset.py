"""webdataset archives: consecutive members of one stem are one row. Nothing is unpacked to disk."""

from __future__ import annotations

import itertools
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path

from rewards.common.errors import DataError
from rewards.data.hub_files import file_state
from rewards.data.images import IMAGE_SUFFIXES, ImageRow, ImageSource
from rewards.data.paths import is_hidden
from rewards.data.records import caption_of
from rewards.data.text import clean, decode_text, parse_json

_BROKEN_TAR = (tarfile.TarError, OSError, EOFError, zlib.error)


def tars(home: Path, files: Sequence[Path], prompt_column: str | None, image_column: str | None) -> ImageSource:
    """webdataset archives below ``home``. How many rows one holds is known once it was read to its end; from then on
    it is passed over where none of them is wanted."""
    counts: dict[Path, int] = {}

    def rows(wanted: Callable[[int], bool]) -> Iterator[ImageRow | None]:
        start = 0
        for tar in files:
            if tar not in counts or any(map(wanted, range(start, start + counts[tar]))):
                counts[tar] = yield from _one(tar, start, wanted)
            else:
                yield from itertools.repeat(None, counts[tar])
            start += counts[tar]

    def _one(tar: Path, start: int, wanted: Callable[[int], bool]) -> Generator[ImageRow | None, None, int]:
        count = 0
        try:
            for stem, members in itertools.groupby(_members(tar), key=lambda one: one[0]):
                if wanted(start + count):
                    name = f"{tar.relative_to(home).as_posix()}/{stem}"
                    parts = {suffix: read() for _, suffix, read in members}
                    yield _sample(tar, name, parts, prompt_column, image_column)
                else:
                    yield None
                count += 1
        except _BROKEN_TAR as error:
            told = str(error).splitlines()[-1].removeprefix("- method tar: ")  # of all that it tried
            raise DataError(f"{tar} is not a whole tar file: {told}; make it anew, or take it away") from error
        return count

    states = [[tar.relative_to(home).as_posix(), *file_state(tar)] for tar in files]
    identity = {"layout": "webdataset", "files": states, "image_column": image_column, "prompt_column": prompt_column}
    return ImageSource(identity, None, rows)


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
            if member.isfile() and stem and not is_hidden(member.name.removeprefix("./")):

                def read(member: tarfile.TarInfo = member) -> bytes:
                    stream = archive.extractfile(member)
                    return stream.read() if stream else b""

                yield folder + slash + stem, suffix.lower(), read
            archive.members = []  # type: ignore[attr-defined]  # or tarfile would remember all of a large file


def _sample(
    tar: Path, name: str, parts: Mapping[str, bytes], prompt_column: str | None, image_column: str | None
) -> ImageRow:
    images = [part for part in parts if (part == image_column if image_column else f".{part}".endswith(IMAGE_SUFFIXES))]
    if len(images) != 1:
        wanted = f".{image_column}" if image_column else "image"
        return ImageRow(name, problem=f"expected one {wanted}; its files are {', '.join(f'.{part}' for part in parts)}")
    try:
        metadata = parse_json(decode_text(parts["json"], f"{name}.json")) if "json" in parts else {}
        text = clean(decode_text(parts["txt"], f"{name}.txt")) if "txt" in parts and not prompt_column else None
    except ValueError as error:  # not JSON, not UTF-8
        return ImageRow(name, problem=f"its text cannot be read: {error}")
    if not isinstance(metadata, dict):
        return ImageRow(name, problem="its .json is not an object")
    if text is None:
        text = caption_of({key: value for key, value in metadata.items() if isinstance(value, str)}, prompt_column, tar)
    return ImageRow(f"{name}.{images[0]}", text, parts[images[0]], metadata)
