"""What scoring leaves on disk: whole shards of scores that say what they are of, and lists of bad files."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards import RewardError
from rewards.common.files import atomic, reached, write_text
from rewards.data.hub_files import address
from rewards.data.images import ImageRow, ImageSource, digest_of

if TYPE_CHECKING:
    import pyarrow as pa

BadRows = dict[int, dict[str, Any]]  # row number -> {"row", "file", "error"}


@dataclass(frozen=True)
class ScoreShards:
    """The whole shards in ``folder``. Each carries ``settings``, its bad files and, where that is kept, what tells its
    pictures from others within, so it is there with these or not at all."""

    folder: Path
    settings: dict[str, Any]
    keep_pictures: bool = False  # what tells them from others under the same names, for require_same

    def path(self, number: int) -> Path:
        return self.folder / f"scores-{number:05d}.parquet"

    def whole(self) -> set[int]:
        stems = (path.stem.removeprefix("scores-") for path in self.folder.glob("scores-*.parquet"))
        return {int(stem) for stem in stems if stem.isdigit()}

    def bad(self, numbers: Iterable[int]) -> BadRows:
        """The unreadable files of these shards. ``RewardError`` names the settings that one was not written with."""
        return {entry["row"]: entry for number in numbers for entry in self._bad(number)}

    def require_same(self, source: ImageSource) -> None:
        """``RewardError`` where a file with a picture of ``source`` was changed since it was scored: it is younger than
        the shard, or of another size. One that could not be read may be put right."""
        about = {number: self._about(number) for number in sorted(self.whole())}
        kept = {number: pictures for number, (_, _, pictures) in about.items() if pictures}
        size, unread = self.settings["shard_size"], {entry["row"] for _, bad, _ in about.values() for entry in bad}
        rows: dict[int, list[ImageRow]] = {number: [] for number in kept}
        wanted = itertools.islice(
            source.rows(lambda row: row // size in kept and row not in unread),
            min((max(kept, default=-1) + 1) * size, self.settings["limit"] or sys.maxsize),
        )
        for number, row in enumerate(wanted):
            if row is not None and (source.listed or isinstance(row.image, Path)):
                rows[number // size].append(row)
        for number, pictures in kept.items():
            try:
                scored = os.stat(self.path(number)).st_mtime_ns
                same = digest_of(rows[number]) == pictures and _newest(rows[number]) <= scored
            except (OSError, ValueError):
                same = False
            if not same:
                raise RewardError(
                    f"{self.path(number)} has scores of pictures that were changed since, among rows {number * size} "
                    f"to {(number + 1) * size - 1}; delete it to score them again, `touch` it where they are "
                    "only copies, or give another --output"
                )

    def _about(self, number: int) -> tuple[dict[str, Any], list[dict[str, Any]], str | None]:
        import pyarrow.parquet as pq

        path = self.path(number)
        try:
            metadata = pq.read_schema(path).metadata
            settings, bad = (json.loads(metadata[key]) for key in (b"t2i-align.settings", b"t2i-align.bad"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RewardError(f"{path} is no shard of this command; give another --output") from error
        pictures = metadata.get(b"t2i-align.pictures")
        return settings, bad, pictures and pictures.decode()

    def _bad(self, number: int) -> list[dict[str, Any]]:
        settings, bad, _ = self._about(number)
        before, now = _flat(settings), _flat(self.settings)
        if changed := [key for key in sorted(before | now) if before.get(key) != now.get(key)]:
            words = "; ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in changed)
            raise RewardError(
                f"{self.folder} holds scores of other settings ({words}); give another --output or delete it"
            )
        return bad

    def read(self, number: int) -> pa.Table:
        import pyarrow.parquet as pq

        return pq.read_table(self.path(number)).replace_schema_metadata()

    def done(self, retry_bad: bool) -> set[int]:
        """The shards to leave as they are; with ``retry_bad``, those that have unreadable files are not among them."""
        return {number for number in self.whole() if not (retry_bad and self._bad(number))}

    def write(self, number: int, table: pa.Table, bad: BadRows, rows: Sequence[ImageRow] = ()) -> None:
        """``rows`` are those of ``table``, of which pictures lie in files of their own or are known beforehand."""
        import pyarrow.parquet as pq

        entries = [bad[row] for row in sorted(bad)]
        texts = {"t2i-align.settings": json.dumps(self.settings), "t2i-align.bad": json.dumps(entries)}
        if self.keep_pictures and any(row.image is not None for row in rows):
            texts["t2i-align.pictures"] = digest_of(rows)
        with atomic(self.path(number)) as draft:
            pq.write_table(table.replace_schema_metadata(texts), draft)
            if (newest := _newest(rows)) > os.stat(draft).st_mtime_ns:  # by another machine's clock, or a camera's
                os.utime(draft, ns=(newest, newest))


def _newest(rows: Iterable[ImageRow]) -> int:
    """When the last of the rows' pictures was written that are files of this machine."""
    files = (row.image for row in rows if isinstance(row.image, Path) and not address(row.image))
    return max((os.stat(file).st_mtime_ns for file in files), default=0)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: json.dumps(value)}
    return flat


def write_bad(path: Path, bad: BadRows) -> None:
    """One JSON object a line; nothing bad, no file, so that none is left from an earlier run."""
    if bad:
        write_text(path, "".join(json.dumps(bad[row]) + "\n" for row in sorted(bad)))
    else:
        path.unlink(missing_ok=True)


def wait_for(shards: ScoreShards, count: int, patience: float) -> None:
    """Until shards 0 .. count - 1 are there. ``RewardError`` where none has been added for ``patience`` seconds, of
    which there are none where no other process writes."""
    asked = set(range(count))
    if not reached(lambda: len(asked & shards.whole()), count, patience):
        missing = asked - shards.whole()
        first, others = shards.path(min(missing)), " of other processes" if patience else ""
        how = f"not come within {patience:g} s" if patience else f"gone from {first.parent}"
        raise RewardError(
            f"{len(missing)} shards{others}, the first {first.name}, have {how}; "
            "run the command again to score what is missing"
        )
