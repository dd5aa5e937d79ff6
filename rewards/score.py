"""Score pictures: ``python -m rewards.score images/ --reward Shapes --output scores``.

Input, ``SOURCE``, is a folder of images, with prompts from ``--prompts``, from ``metadata.jsonl`` / ``metadata.csv``
(``file_name`` and ``prompt``, ``caption`` or ``text``) or from a ``.txt`` file beside each image; a ``.jsonl`` or
``.csv`` file of image paths; a parquet file or a folder of them; webdataset ``.tar`` files; a ``save_to_disk`` folder;
or the hub id of a data set.

Output is a folder of parquet shards in the order of the input (``scores-00000.parquet``, with the columns ``file``,
``prompt`` and one per reward), ``summary.json``, and ``bad.jsonl`` where images could not be read; or, for an
``--output`` that ends in ``.parquet``, that one table. A shard is written when it is whole, so a run that was killed
goes on where it was when the same command is given again. With ``accelerate launch -m rewards.score`` every process
scores shards of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from tqdm import tqdm

from rewards import Reward, RewardError, available, checked, needs_prompt
from rewards.gallery import Shown, page
from rewards.inputs import Input, Row, load_rewards, open_input, parse_rewards, pick_device

T = TypeVar("T")
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
Bad = dict[int, dict[str, Any]]  # row number -> {"row", "file", "error"}


# What is on disk
@dataclass(frozen=True)
class Shards:
    """The whole shards in ``folder``. Each carries ``settings`` and its bad files within, so it is there with both or
    not at all."""

    folder: Path
    settings: dict[str, Any]

    def path(self, number: int) -> Path:
        return self.folder / f"scores-{number:05d}.parquet"

    def whole(self) -> set[int]:
        stems = (path.stem.removeprefix("scores-") for path in self.folder.glob("scores-*.parquet"))
        return {int(stem) for stem in stems if stem.isdigit()}

    def bad(self, number: int) -> Bad:
        """Its unreadable files. ``RewardError`` names the settings that a shard was not written with."""
        path = self.path(number)
        try:
            metadata = pq.read_schema(path).metadata
            settings, bad = (json.loads(metadata[key]) for key in (b"t2i-align.settings", b"t2i-align.bad"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RewardError(f"{path} is no shard of this command; give another --output") from error
        before, now = _flat(settings), _flat(self.settings)
        if changed := [key for key in sorted(before | now) if before.get(key) != now.get(key)]:
            words = "; ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in changed)
            raise RewardError(
                f"{self.folder} holds scores of other settings ({words}); give another --output or delete it"
            )
        return {entry["row"]: entry for entry in bad}

    def read(self, number: int) -> pa.Table:
        return pq.read_table(self.path(number)).replace_schema_metadata()

    def write(self, number: int, table: pa.Table, bad: Bad) -> None:
        entries = [bad[row] for row in sorted(bad)]
        texts = {"t2i-align.settings": json.dumps(self.settings), "t2i-align.bad": json.dumps(entries)}
        path = self.path(number)
        draft = path.with_name(f".{path.name}.tmp")
        pq.write_table(table.replace_schema_metadata(texts), draft)
        draft.replace(path)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: json.dumps(value)}
    return found


def write(path: Path, text: str) -> None:
    """A whole file or none."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    draft.write_text(text, "utf-8")
    draft.replace(path)


def write_bad(path: Path, bad: Bad) -> None:
    """One JSON object a line; nothing bad, no file, so that none is left from an earlier run."""
    if bad:
        write(path, "".join(json.dumps(bad[row]) + "\n" for row in sorted(bad)))
    else:
        path.unlink(missing_ok=True)


# From rows to batches, ahead of the rewards
@dataclass(frozen=True)
class Batch:
    """Readable pictures of one size, (B, 3, H, W) uint8, by row number."""

    rows: dict[int, Row]
    images: Tensor


@dataclass(frozen=True)
class Unreadable:
    row: int
    file: str
    error: str


@dataclass(frozen=True)
class Finished:
    """Shard ``shard`` has no further batch; without a shard, the input ended after ``rows``."""

    rows: int
    shard: int | None = None


Work = Batch | Unreadable | Finished


@dataclass
class Decoder:
    """Reads and decodes ``workers`` pictures at a time and batches them; no batch reaches over the end of a shard."""

    source: Input
    limit: int | None
    shard_size: int
    batch_size: int
    workers: int

    def work(self, rank: int, world: int, done: set[int]) -> Iterator[Work]:
        """Every ``world``-th shard, less those that are done."""
        seen = 0

        def wanted(row: int) -> bool:
            shard = row // self.shard_size
            return shard % world == rank and shard not in done and (self.limit is None or row < self.limit)

        def chosen() -> Iterator[tuple[int, Row]]:
            nonlocal seen
            for number, row in enumerate(itertools.islice(self.source.rows(wanted), self.limit)):
                seen = number + 1
                if row is not None:
                    yield number, row

        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool:
            decoded = self._decoded(chosen(), pool)
            for shard, pictures in itertools.groupby(decoded, key=lambda one: one[0] // self.shard_size):
                yield from self._batches(pictures)
                yield Finished(seen, shard)
        yield Finished(seen)

    def extent(self, rank: int, world: int, done: set[int]) -> tuple[int | None, int]:
        """How many pictures fall to this process, as far as that is known, and how many of them are done."""
        if (total := self.source.total) is None:
            return None, 0
        total = min(total, self.limit or total)
        starts = {n: n * self.shard_size for n in range(rank, -(-total // self.shard_size), world)}
        sizes = {n: min(self.shard_size, total - start) for n, start in starts.items()}
        return sum(sizes.values()), sum(size for n, size in sizes.items() if n in done)

    def _decoded(
        self, rows: Iterator[tuple[int, Row]], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[int, Row, Future[Tensor]]]:
        waiting: deque[tuple[int, Row, Future[Tensor]]] = deque()
        for number, row in rows:
            # only the future keeps the encoded bytes, and only until they are decoded
            waiting.append((number, replace(row, picture=None), pool.submit(row.read)))
            if len(waiting) >= self.batch_size + self.workers:
                yield waiting.popleft()
        yield from waiting

    def _batches(self, pictures: Iterator[tuple[int, Row, Future[Tensor]]]) -> Iterator[Work]:
        waiting: dict[tuple[int, ...], dict[int, tuple[Row, Tensor]]] = {}
        for number, row, future in pictures:
            try:
                image = future.result()
            except OSError as error:
                yield Unreadable(number, row.file, str(error))
                continue
            waiting.setdefault(tuple(image.shape), {})[number] = (row, image)
            # Where every image has a size of its own no batch fills up: then the fullest leaves, to bound the memory.
            crowded = sum(map(len, waiting.values())) >= 4 * self.batch_size
            fullest = max(waiting, key=lambda size: len(waiting[size]))
            if crowded or len(waiting[fullest]) == self.batch_size:
                yield _batch(waiting.pop(fullest))
        yield from map(_batch, waiting.values())


def _batch(waiting: Mapping[int, tuple[Row, Tensor]]) -> Batch:
    return Batch({n: row for n, (row, _) in waiting.items()}, torch.stack([image for _, image in waiting.values()]))


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, made in a thread that runs at most ``depth`` ahead; what it raises is raised here."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        waiting = deque(thread.submit(next, items, None) for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not None:
                waiting.append(thread.submit(next, items, None))
                yield item
        finally:
            for future in waiting:
                future.cancel()


# Scoring
def score_batch(rewards: Mapping[str, Reward], batch: Batch, device: str) -> dict[str, list[float]]:
    """Scores by reward, in the batch's order. ``RewardError`` names the reward and the file."""
    rows = list(batch.rows.values())
    bare = next((row.file for row in rows if not row.prompt), None)
    if bare is not None and (reading := [name for name, reward in rewards.items() if needs_prompt(reward)]):
        raise RewardError(f"{', '.join(reading)} needs prompts, but {bare} has none; see --prompt_column")
    images, prompts = batch.images.to(device).float() / 255, [row.prompt or "" for row in rows]
    metadata = [row.metadata for row in rows] if any(row.metadata for row in rows) else None
    found = {}
    for name, reward in rewards.items():
        try:
            with torch.no_grad():
                found[name] = checked(reward, name, images, prompts, metadata).tolist()
        except RewardError as error:
            where = f"the batch that begins with {rows[0].file}" if error.row is None else rows[error.row].file
            raise RewardError(f"{where}: {error}") from error
    return found


def score_shards(
    decoder: Decoder,
    rewards: Mapping[str, Reward],
    shards: Shards,
    bad_file: Path,
    max_bad: int,
    retry_bad: bool,
    device: str,
    rank: int = 0,
    world: int = 1,
) -> int:
    """Score and write what is not there yet of this process's shards; returns the number of rows of the whole input.

    ``RewardError`` where a reward fails, where shards of other settings are there, or where more than ``max_bad``
    images cannot be read: then ``bad_file`` lists them. With ``retry_bad``, shards with bad images are scored again.
    """
    done = {number for number in shards.whole() if not (retry_bad and shards.bad(number))}
    bad = {row: entry for number in done for row, entry in shards.bad(number).items()}
    shards.folder.mkdir(parents=True, exist_ok=True)
    rows: dict[int, Row] = {}
    scores: dict[str, dict[int, float]] = {name: {} for name in rewards}
    mine: Bad = {}
    total, ready = decoder.extent(rank, world, done)
    with tqdm(total=total, initial=ready, desc="scoring", unit="image", disable=rank > 0) as bar:
        for item in ahead(decoder.work(rank, world, done), 4):
            if isinstance(item, Batch):
                for name, values in score_batch(rewards, item, device).items():
                    scores[name].update(zip(item.rows, values, strict=True))
                rows |= item.rows
                bar.update(len(item.rows))
            elif isinstance(item, Unreadable):
                mine[item.row] = {"row": item.row, "file": item.file, "error": item.error}
                bar.update()
                if len(bad | mine) > max_bad:
                    write_bad(bad_file, bad | mine)
                    raise RewardError(
                        f"{len(bad | mine)} images cannot be read, the last {item.file}: {item.error}; the reasons are "
                        f"in {bad_file}; allow more with --max_bad (now {max_bad}), or put them right and --retry_bad"
                    )
            elif item.shard is not None:
                shards.write(item.shard, _table(rows, scores), mine)
                bad, mine, rows, scores = bad | mine, {}, {}, {name: {} for name in rewards}
            else:
                return item.rows
    raise AssertionError("the last item of the work is its end")


def _table(rows: Mapping[int, Row], scores: Mapping[str, Mapping[int, float]]) -> pa.Table:
    order = sorted(rows)
    columns: dict[str, pa.Array] = {
        "file": pa.array([rows[n].file for n in order], pa.string()),
        "prompt": pa.array([rows[n].prompt for n in order], pa.string()),
    }
    return pa.table(columns | {k: pa.array([v[n] for n in order], pa.float32()) for k, v in scores.items()})


def wait_for(shards: Shards, count: int, patience: float) -> None:
    """Until shards 0 .. count - 1 are there. ``RewardError`` where none has been added for ``patience`` seconds."""
    missing, since = set(range(count)) - shards.whole(), time.monotonic()
    while missing:
        time.sleep(0.05)
        left = missing - shards.whole()
        if left != missing:
            missing, since = left, time.monotonic()
        elif time.monotonic() - since > patience:
            raise RewardError(
                f"{len(missing)} shards of other processes, the first {shards.path(min(missing)).name}, have not come "
                f"within {patience:g} s; run the command again to score what is missing"
            )


# What is told about the scores
def summarise(shards: Shards, count: int, rewards: Sequence[str], bad: Bad) -> dict[str, Any]:
    """What ``summary.json`` holds: of every reward the count, mean, standard deviation (of the scores themselves, over
    n) and :data:`QUANTILES`; and the bad files."""
    figures = {}
    for name in rewards:
        values = np.concatenate([shards.read(n)[name].to_numpy() for n in range(count)]).astype(np.float64)
        if len(values):
            quantiles = {f"{q:g}": float(v) for q, v in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}
            spread = {"mean": float(values.mean()), "std": float(values.std()), "quantiles": quantiles}
            figures[name] = {"count": len(values), **spread}
    return {"rewards": figures, "bad": [bad[row] for row in sorted(bad)], "settings": shards.settings}


def gallery(shards: Shards, count: int, source: Input, rewards: Sequence[str], bad: Bad, size: int) -> str:
    """The page with the ``size`` best and, of the others, the ``size`` worst pictures by the first reward."""
    order = rewards[0]
    table = pa.concat_tables([shards.read(n) for n in range(count)])
    numbers = [n for n in range(table.num_rows + len(bad)) if n not in bad]
    ranked = np.argsort(-table[order].to_numpy(), kind="stable").tolist()
    parts = {"best": ranked[:size], "worst": ranked[size:][-size:][::-1]}
    wanted = {numbers[place]: place for places in parts.values() for place in places}
    shown = {}
    for number, row in enumerate(itertools.islice(source.rows(wanted.__contains__), max(wanted) + 1)):
        if row is not None:
            cells = {name: column[0] for name, column in table.slice(wanted[number], 1).to_pydict().items()}
            scores = {name: cells[name] for name in rewards}
            shown[wanted[number]] = Shown(cells["file"], cells["prompt"], scores, row.read())
    return page(
        f"{table.num_rows} images by {order}",
        {f"{len(places)} {name}": [shown[place] for place in places] for name, places in parts.items() if places},
    )


# The command
def run(arguments: argparse.Namespace) -> int:
    """The command; ``RewardError`` where the user has something to put right."""
    output = Path(arguments.output)
    single = output.suffix == ".parquet"
    if (single and output.is_dir()) or (not single and (output.is_file() or (output.suffix and not output.is_dir()))):
        raise RewardError(f"--output is {output}; expected a file name that ends in .parquet, or a folder's name")
    for name, least in (
        ("batch_size", 1),
        ("shard_size", 1),
        ("workers", 1),
        ("max_bad", 0),
        ("limit", 1),
        ("gallery", 1),
    ):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise RewardError(f"--{name} is {value}; expected at least {least}")
    rank, local, world = (_environment(*pair) for pair in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    named = parse_rewards(arguments.reward)
    labels = [one.label for one in named]
    source = open_input(
        arguments.source, arguments.prompts, arguments.prompt_column, arguments.image_column, arguments.split
    )
    if source.identity["layout"] == "parquet" and output.resolve().is_relative_to(Path(arguments.source).resolve()):
        raise RewardError(f"--output {output} lies within the parquet folder that is read; expected another place")
    if arguments.retry_bad and world > 1:
        raise RewardError(f"--retry_bad with {world} processes; expected one: it is for the few that were bad")
    settings = {
        "input": source.identity,
        "rewards": {one.label: one.settings() for one in named},
        "limit": arguments.limit,
        "shard_size": arguments.shard_size,
    }
    shards = Shards(output.with_name(f".{output.name}.parts") if single else output, settings)
    for number in shards.whole():
        shards.bad(number)  # refuses other settings
    device = pick_device(arguments.device, local)
    rewards = load_rewards(named, device)
    _check_prompts(source.listed[: arguments.limit], rewards)
    decoder = Decoder(source, arguments.limit, arguments.shard_size, arguments.batch_size, arguments.workers)
    bad_file = output.with_name(f"{output.name}.errors.jsonl") if single else output / "bad.jsonl"
    rows = score_shards(decoder, rewards, shards, bad_file, arguments.max_bad, arguments.retry_bad, device, rank, world)
    if rank:
        return 0
    if rows == 0:
        raise RewardError(f"{arguments.source} holds no rows; expected at least one image")
    count = -(-rows // arguments.shard_size)
    wait_for(shards, count, arguments.patience)
    return _finish(arguments, shards, count, source, labels, bad_file)


def _finish(
    arguments: argparse.Namespace, shards: Shards, count: int, source: Input, labels: Sequence[str], bad_file: Path
) -> int:
    """All shards are there: the list of bad files, the gallery, the summary, and the table if there is to be one."""
    output = Path(arguments.output)
    single = shards.folder != output
    bad = {row: entry for number in range(count) for row, entry in shards.bad(number).items()}
    write_bad(bad_file, bad)
    summary = summarise(shards, count, labels, bad)
    if not summary["rewards"]:
        if single:
            _clear(shards)
        raise RewardError(f"none of the {len(bad)} images can be read; the reasons are in {bad_file}")
    if arguments.gallery is not None:
        text = gallery(shards, count, source, labels, bad, arguments.gallery)
        write(output.with_suffix(".html") if single else output / "gallery.html", text)
    if single:
        _merge(shards, count, output)
    else:
        write(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    for name, figures in summary["rewards"].items():
        print(f"{name}: mean {figures['mean']:.4f} over {figures['count']} images")
    if bad:
        images = len(bad) + summary["rewards"][labels[0]]["count"]
        print(f"{len(bad)} of {images} images cannot be read, see {bad_file}", file=sys.stderr)
    return 1 if bad and not arguments.skip_errors else 0


def _merge(shards: Shards, count: int, output: Path) -> None:
    """The shards as one table, and then without their folder."""
    draft = output.with_name(f".{output.name}.tmp")
    with pq.ParquetWriter(draft, shards.read(0).schema) as writer:
        for number in range(count):
            writer.write_table(shards.read(number))
    draft.replace(output)
    _clear(shards)


def _clear(shards: Shards) -> None:
    for path in [*shards.folder.glob("scores-*.parquet"), *shards.folder.glob(".scores-*.tmp")]:
        path.unlink()
    shards.folder.rmdir()


def _check_prompts(rows: Sequence[Row], rewards: Mapping[str, Reward]) -> None:
    bare = [row.file for row in rows if not row.prompt]
    if bare and (reading := [name for name, reward in rewards.items() if needs_prompt(reward)]):
        raise RewardError(
            f"{', '.join(reading)} needs prompts, but {len(bare)} of {len(rows)} images have none: "
            f"{', '.join(bare[:5])}{', …' if len(bare) > 5 else ''}; give --prompts, metadata.jsonl or .txt files"
        )


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise RewardError(f"the environment variable {name} is {text!r}; expected a number, as accelerate sets it")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 where images could not be read, 2 where the user has something to put right."""
    parser = argparse.ArgumentParser(
        prog="python -m rewards.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="folder, .jsonl, .csv, .parquet, .tar, or hub id")
    parser.add_argument(
        "--reward",
        action="append",
        required=True,
        metavar="NAME[:KEY=VALUE,...]",
        help=f"may come several times; {', '.join(available())}, or package.module.Class; with a label: "
        "'{name: NAME, label: LABEL, args: {KEY: VALUE}}'",
    )
    parser.add_argument(
        "--output", default="scores.parquet", help="a .parquet file, or a folder (default: %(default)s)"
    )
    parser.add_argument("--prompts", help=".jsonl or .csv (file_name, text), or .txt with one prompt per image")
    parser.add_argument("--prompt_column", help="default: the first of prompt, caption, text that is there")
    parser.add_argument("--image_column", help="default: the first usual name that is there; for .tar, the suffix")
    parser.add_argument("--split", help="of a save_to_disk folder or hub id")
    parser.add_argument("--limit", type=int, help="score the first LIMIT rows only")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--shard_size", type=int, default=1024, help="rows in a shard (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="threads that decode")
    parser.add_argument("--device", help="default: this process's GPU, or the CPU")
    parser.add_argument(
        "--max_bad", type=int, default=100, help="stop at more unreadable images (default: %(default)s)"
    )
    parser.add_argument("--retry_bad", action="store_true", help="score shards that list unreadable images again")
    parser.add_argument("--skip_errors", action="store_true", help="exit with 0 even if images cannot be read")
    parser.add_argument("--gallery", type=int, nargs="?", const=50, metavar="N", help="write a page: N best, N worst")
    parser.add_argument("--patience", type=float, default=1800, help="seconds to wait for other processes' next shard")
    try:
        return run(parser.parse_args(argv))
    except RewardError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
