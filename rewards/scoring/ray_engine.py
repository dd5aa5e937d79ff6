"""``python -m rewards.score --engine ray``: the same scorer on a Ray cluster, a shard of the output per item of work.

Ray Data hands the numbers of the missing shards to a pool of actors. An actor opens the input and loads the rewards
once, then scores shard after shard and writes them itself, so that pictures and scores never pass through Ray, and the
output is the local engine's. Where an actor dies, Ray starts another one and gives it the shard again. What is whole
when the command begins is not scored again, whichever engine wrote it.

It differs in one thing: each actor stops at its own share of ``--max_bad``, and the command at all of them together
once a shard is done, so the shard that goes over the limit can be among those written.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
import ray.data
from tqdm import tqdm

from rewards import RewardError
from rewards.common.errors import UserError
from rewards.config import RewardConfig
from rewards.data.formats import open_input
from rewards.data.images import ImageSource
from rewards.scoring.engine import ScoringEngine, open_scorer, refuse_too_many
from rewards.scoring.loader import shard_sizes
from rewards.scoring.output import BadRows, ScoreShards

STORE = 100 * 2**20  # bytes of Ray's object store; only numbers of shards pass through it


def score_there(
    arguments: argparse.Namespace,
    source: ImageSource,
    named: Sequence[RewardConfig],
    shards: ScoreShards,
    bad_file: Path,
) -> int:
    """Score and write the shards that are not there yet; returns the number of rows of the whole input.

    ``RewardError`` as from :meth:`ScoringEngine.run`, and where an actor finds another input than ``source``.
    """
    total = source.total
    if total is None:  # an actor has to be told which shards there are
        total = sum(1 for _ in source.rows(lambda row: False))
    sizes = dict(enumerate(shard_sizes(total, arguments.limit, arguments.shard_size)))
    done = shards.done(arguments.retry_bad)
    bad = shards.bad(done)
    missing = [number for number in sizes if number not in done]
    rows, ready = sum(sizes.values()), sum(size for number, size in sizes.items() if number in done)
    if not missing:
        return rows
    share = _Scoring(
        arguments=arguments, identity=source.identity, named=named, shards=shards, bad_file=bad_file, bad=bad
    )
    with tqdm(total=rows, initial=ready, desc="scoring", unit="image") as bar, cluster(arguments.workers):
        for number, error in done_by(_Scorer, share, missing, arguments.workers, arguments.device):
            if error:
                raise RewardError(error)
            bad |= shards.bad([number])
            refuse_too_many(bad, arguments.max_bad, bad_file)
            bar.update(sizes[number])
    return rows


@dataclass(kw_only=True)
class Share:
    """What an actor is told; ``home`` is the folder from which paths are given."""

    home: Path = field(default_factory=Path.cwd)


Told = TypeVar("Told", bound=Share)


class Actor(ABC, Generic[Told]):
    """Does the work of one shard a call."""

    def __init__(self, share: Told) -> None:
        self.share = share

    @abstractmethod
    def do(self, number: int) -> None:
        """Write shard ``number``. What this needs it makes itself, once: what goes wrong is then an answer, where Ray
        would start a broken actor anew. Raises ``UserError``, which is the answer."""

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        (number,) = batch["item"].tolist()
        try:
            _go(self.share.home)
            self.do(number)
        except UserError as error:
            return {"shard": [number], "error": [str(error)]}
        return {"shard": [number], "error": [""]}


def _go(home: Path) -> None:
    try:
        os.chdir(home)
    except OSError as error:
        raise UserError(f"{platform.node()} has no {home}; all machines have to share it") from error


@dataclass(kw_only=True)
class _Scoring(Share):
    arguments: argparse.Namespace
    identity: Mapping[str, Any]
    named: Sequence[RewardConfig]
    shards: ScoreShards
    bad_file: Path
    bad: BadRows


class _Scorer(Actor[_Scoring]):
    @cached_property
    def engine(self) -> ScoringEngine:
        share, given = self.share, self.share.arguments
        source = open_input(given.source, given.prompts, given.caption_column, given.image_column, given.split)
        if source.identity != share.identity:
            raise RewardError(
                f"{platform.node()} finds other images in {given.source}; every machine has to share them"
            )
        return open_scorer(given, source, share.named, share.shards, share.bad_file)

    def do(self, number: int) -> None:
        self.engine.run({number}.__contains__, self.share.bad, end=(number + 1) * self.share.arguments.shard_size)


def done_by(
    actor: type[Actor[Told]], share: Told, missing: Sequence[int], workers: int | None, device: str | None = None
) -> Iterator[tuple[int, str]]:
    """Every missing shard as it is done, with what went wrong, if anything. ``actor(share)`` is made in each of
    ``workers`` processes, by default one for each GPU, and called with the number of a shard."""
    gpus = 0 if device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    workers = workers or max(gpus, 1)
    dataset = ray.data.from_items(list(missing), override_num_blocks=len(missing)).map_batches(
        actor,
        batch_size=None,  # a block, which is one shard
        fn_constructor_args=(share,),
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(missing)), max_tasks_in_flight_per_actor=1),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )
    dataset.context.enable_progress_bars = False
    dataset.context.execution_no_progress_timeout_s = -1  # a shard may take a large judge as long as it likes
    for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
        yield from zip(batch["shard"].tolist(), batch["error"].tolist(), strict=True)


@contextmanager
def cluster(workers: int | None) -> Iterator[None]:
    """The Ray that this process is joined to, or the one that ``RAY_ADDRESS`` names, or a new one on this machine."""
    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns of bars being off, as they are
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a local Ray tells nobody
        cores = max(workers or 1, os.cpu_count() or 1)
        ray.init(
            "local",
            num_cpus=cores,
            object_store_memory=STORE,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    try:
        yield
    finally:
        ray.shutdown()
