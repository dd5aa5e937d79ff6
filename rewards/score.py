"""Score pictures: ``python -m rewards.score images/ --reward Shapes --output scores``.

Input, ``SOURCE``, is a folder of images, with prompts from ``--prompts``, from ``metadata.jsonl`` / ``metadata.csv``
(``file_name`` and ``caption``, ``prompt`` or ``text``) or from a ``.txt`` file beside each image; a ``.jsonl`` or
``.csv`` file of image paths; a parquet file or a folder of them; webdataset ``.tar`` files; a ``save_to_disk`` folder;
or the hub id of a data set.

Output is a folder of parquet shards in the order of the input (``scores-00000.parquet``, with the columns ``file``,
``prompt`` and one per reward), ``summary.json``, and ``bad.jsonl`` where images could not be read; or, for an
``--output`` that ends in ``.parquet``, that one table. A shard is written when it is whole, so a run that was killed
goes on where it was when the same command is given again. With ``accelerate launch -m rewards.score`` every process
scores shards of its own. ``--engine ray`` hands them to ``--workers`` processes of the Ray cluster that ``RAY_ADDRESS``
names, or of a Ray that is started on this machine; input and output then lie where every machine finds them under the
same name.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tqdm import tqdm

from rewards.common.command import OldName, add_reading_options, check_at_least, exit_status, new_parser, status
from rewards.common.device import Launched
from rewards.common.errors import RewardError, WriteError
from rewards.common.files import atomic, locked, sweep, write_text
from rewards.config import parse_rewards
from rewards.data.formats import open_input
from rewards.data.images import ImageSource
from rewards.scoring.engine import ScoringEngine, open_scorer
from rewards.scoring.gallery import gallery
from rewards.scoring.loader import shard_sizes
from rewards.scoring.output import BadRows, ScoreShards, wait_for, write_bad

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def score_here(scorer: ScoringEngine, retry_bad: bool, rank: int = 0, world: int = 1) -> int:
    """Every ``world``-th shard, in this process; returns the number of rows of the whole input."""
    shards = scorer.shards
    done = shards.done(retry_bad)
    bad = shards.bad(done)
    total, ready = scorer.decoder.source.total, 0
    if total is not None:
        every = enumerate(shard_sizes(total, scorer.decoder.limit, scorer.decoder.shard_size))
        sizes = {n: size for n, size in every if n % world == rank}
        total, ready = sum(sizes.values()), sum(size for n, size in sizes.items() if n in done)
    with tqdm(total=total, initial=ready, desc="scoring", unit="image", disable=rank > 0) as bar:
        return scorer.run(lambda shard: shard % world == rank and shard not in done, bad, bar.update)


# What is told about the scores
def summarise(shards: ScoreShards, count: int, rewards: Sequence[str], bad: BadRows) -> dict[str, Any]:
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


# The command
def run(arguments: argparse.Namespace) -> int:
    """The command; ``RewardError`` where the user has something to put right."""
    output = Path(arguments.output)
    single = output.suffix == ".parquet"
    if (single and output.is_dir()) or (not single and (output.is_file() or (output.suffix and not output.is_dir()))):
        raise RewardError(f"--output is {output}; expected a file name that ends in .parquet, or a folder's name")
    least = {"batch_size": 1, "shard_size": 1, "threads": 1, "workers": 1, "max_bad": 0, "limit": 1, "gallery": 1}
    check_at_least(arguments, **least, patience=0)
    launched = Launched.here()
    rank, world = launched.rank, launched.world
    named = parse_rewards(arguments.reward, weighted=False)
    labels = [one.title for one in named]
    source = open_input(
        arguments.source, arguments.prompts, arguments.caption_column, arguments.image_column, arguments.split
    )
    if source.identity["layout"] == "parquet" and output.resolve().is_relative_to(Path(arguments.source).resolve()):
        raise RewardError(f"--output {output} lies within the parquet folder that is read; expected another place")
    if arguments.retry_bad and world > 1:
        raise RewardError(f"--retry_bad with {world} processes; expected one: it is for the few that were bad")
    if arguments.engine == "ray" and world > 1:
        raise RewardError(f"--engine ray with {world} processes; expected one: Ray starts --workers of its own")
    if arguments.engine != "ray" and arguments.workers is not None:
        raise RewardError("--workers is for --engine ray; see --threads, or accelerate launch")
    settings = {
        "input": source.identity,
        "rewards": {one.title: one.settings() for one in named},
        "limit": arguments.limit,
        "shard_size": arguments.shard_size,
    }
    folder = output.with_name(f".{output.name}.parts") if single else output
    shards = ScoreShards(folder, settings, keep_pictures=True)
    shards.bad(shards.whole())  # refuses other settings
    shards.require_same(source)
    bad_file = output.with_name(f"{output.name}.errors.jsonl") if single else output / "bad.jsonl"
    with locked(shards.folder, passing=single):
        try:
            if arguments.engine == "ray":
                rows = _ray().score_there(arguments, source, named, shards, bad_file)
            else:
                scorer = open_scorer(arguments, source, named, shards, bad_file, launched.local)
                rows = score_here(scorer, arguments.retry_bad, rank, world)
            if rank:
                return 0
            if rows == 0:
                raise RewardError(f"{arguments.source} holds no rows; expected at least one image")
            count = -(-rows // arguments.shard_size)
            wait_for(shards, count, arguments.patience if world > 1 else 0)
            return _finish(arguments, shards, count, source, labels, bad_file)
        except WriteError as error:
            whole = len(shards.whole())
            raise WriteError(
                f"{error}; {whole} whole shards are in {shards.folder}, the same command goes on"
            ) from error


def _finish(
    arguments: argparse.Namespace,
    shards: ScoreShards,
    count: int,
    source: ImageSource,
    labels: Sequence[str],
    bad_file: Path,
) -> int:
    """All shards are there: the list of bad files, the gallery, the summary, and the table if there is to be one."""
    sweep(shards.folder, "scores-*")
    output = Path(arguments.output)
    single = shards.folder != output
    bad = shards.bad(range(count))
    write_bad(bad_file, bad)
    summary = summarise(shards, count, labels, bad)
    if not summary["rewards"]:
        if single:
            _clear(shards)
        raise RewardError(f"none of the {len(bad)} images can be read; the reasons are in {bad_file}")
    if arguments.gallery is not None:
        text = gallery(shards, count, source, labels, bad, arguments.gallery)
        write_text(output.with_suffix(".html") if single else output / "gallery.html", text)
    if single:
        _merge(shards, count, output)
    else:
        write_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    for name, figures in summary["rewards"].items():
        print(f"{name}: mean {figures['mean']:.4f} over {figures['count']} images")
    if bad:
        images = len(bad) + summary["rewards"][labels[0]]["count"]
        print(f"{len(bad)} of {images} images cannot be read, see {bad_file}", file=sys.stderr)
    return 1 if bad and not arguments.skip_errors else 0


def _merge(shards: ScoreShards, count: int, output: Path) -> None:
    """The shards as one table, in their stead."""
    import pyarrow.parquet as pq

    with atomic(output) as draft, pq.ParquetWriter(draft, shards.read(0).schema) as writer:
        for number in range(count):
            writer.write_table(shards.read(number))
    _clear(shards)


def _clear(shards: ScoreShards) -> None:
    for path in shards.folder.glob("scores-*.parquet"):
        path.unlink()
    sweep(shards.folder, "scores-*")


def _ray() -> ModuleType:
    try:
        return importlib.import_module("rewards.scoring.ray_engine")
    except ImportError as error:
        raise RewardError(f"--engine ray needs {error.name}: pip install 't2i-align[ray]'") from error


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 where images could not be read, 2 where the user has something to put right."""
    parser = new_parser("rewards.score", __doc__)
    add_reading_options(parser, max_bad=100)
    parser.add_argument("source", metavar="SOURCE", help="folder, .jsonl, .csv, .parquet, .tar, or hub id")
    parser.add_argument(
        "--output", default="scores.parquet", help="a .parquet file, or a folder (default: %(default)s)"
    )
    parser.add_argument("--prompts", help=".jsonl or .csv (file_name, text), or .txt with one prompt per image")
    parser.add_argument("--prompt_column", dest="caption_column", action=OldName, help=argparse.SUPPRESS)
    parser.add_argument("--image_column", help="default: the first usual name that is there; for .tar, the suffix")
    parser.add_argument("--shard_size", type=int, default=1024, help="rows in a shard (default: %(default)s)")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: on a cluster of machines")
    parser.add_argument("--workers", type=int, help="processes that Ray starts (default: one per GPU, or one)")
    parser.add_argument("--retry_bad", action="store_true", help="score shards that list unreadable images again")
    parser.add_argument("--skip_errors", action="store_true", help="exit with 0 even if images cannot be read")
    parser.add_argument("--gallery", type=int, nargs="?", const=50, metavar="N", help="write a page: N best, N worst")
    parser.add_argument("--patience", type=float, default=1800, help="seconds to wait for other processes' next shard")
    arguments = parser.parse_args(argv)
    return status(lambda: run(arguments), argv)


if __name__ == "__main__":
    sys.exit(main())
