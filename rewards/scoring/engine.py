"""Scoring itself, whichever engine hands out the shards: rewards over batches, whole shards to disk."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rewards.base import RewardSum, needs_prompt
from rewards.common.device import pick_device
from rewards.common.errors import RewardError
from rewards.config import RewardConfig
from rewards.data.images import ImageRow, ImageSource
from rewards.scoring.loader import BadImage, Batch, Decoder, Work, ahead
from rewards.scoring.output import BadRows, ScoreShards, write_bad

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class ScoringEngine:
    """Rewards on a device, the input that they score, and the shards that they write."""

    decoder: Decoder
    rewards: RewardSum
    shards: ScoreShards
    bad_file: Path
    max_bad: int
    device: str

    def run(
        self,
        wanted: Callable[[int], bool],
        bad: BadRows,
        progress: Callable[[int], object] = lambda images: None,
        end: int | None = None,
    ) -> int:
        """Score and write the shards whose number is ``wanted``; returns how many rows were passed, up to ``end``.

        ``bad``, the unreadable images that are known, grows; ``progress`` hears how many images were dealt with.
        ``RewardError`` where a reward fails, and where ``bad`` passes ``max_bad``: then ``bad_file`` lists it.
        """

        def ready(item: Work) -> Work:
            return item.on(self.device) if isinstance(item, Batch) else item

        rows: dict[int, ImageRow] = {}
        scores: dict[str, dict[int, float]] = {name: {} for name in self.rewards.rewards}
        new_bad: BadRows = {}
        # one thread decodes and batches, another brings the next batch to the device, both while the rewards compute
        for item in ahead(map(ready, ahead(self.decoder.work(wanted, end), 4)), 1):
            if isinstance(item, Batch):
                for name, values in score_batch(self.rewards, item).items():
                    scores[name].update(zip(item.rows, values, strict=True))
                rows |= item.rows
                progress(len(item.rows))
            elif isinstance(item, BadImage):
                new_bad[item.row] = {"row": item.row, "file": item.file, "error": item.error}
                progress(1)
                refuse_too_many(bad | new_bad, self.max_bad, self.bad_file)
            elif item.shard is not None:
                known = self.decoder.source.listed or rows
                self.shards.write(item.shard, _table(rows, scores), new_bad, [known[n] for n in sorted(rows)])
                bad |= new_bad
                new_bad, rows, scores = {}, {}, {name: {} for name in scores}
            else:
                return item.rows
        raise AssertionError("the last item of the work is its end")


def open_scorer(
    arguments: argparse.Namespace,
    source: ImageSource,
    named: Sequence[RewardConfig],
    shards: ScoreShards,
    bad_file: Path,
    local: int = 0,
) -> ScoringEngine:
    """As the command's ``arguments`` say, on GPU number ``local`` unless they name a device."""
    device = pick_device(arguments.device, local)
    rewards = RewardSum.of(named, device)
    require_prompts(source.listed[: arguments.limit], rewards)
    decoder = Decoder(source, arguments.limit, arguments.shard_size, arguments.batch_size, arguments.threads)
    return ScoringEngine(decoder, rewards, shards, bad_file, arguments.max_bad, device)


def score_batch(rewards: RewardSum, batch: Batch) -> dict[str, list[float]]:
    """Scores by reward, in the batch's order. ``RewardError`` names the reward and the file."""
    rows = list(batch.rows.values())
    require_prompts(rows, rewards)
    prompts = [row.prompt or "" for row in rows]
    metadata = [row.metadata for row in rows] if any(row.metadata for row in rows) else None
    try:
        with torch.no_grad():
            scores = rewards.scores(images=batch.images, prompts=prompts, metadata=metadata)
    except RewardError as error:
        where = f"the batch that begins with {rows[0].file}" if error.row is None else rows[error.row].file
        raise RewardError(f"{where}: {error}") from error
    return {name: values.tolist() for name, values in scores.items()}


def require_prompts(rows: Sequence[ImageRow], rewards: RewardSum) -> None:
    """``RewardError`` where a row has no prompt, and a reward reads it."""
    bare = [row.file for row in rows if not row.prompt]
    readers = ", ".join(name for name, reward in rewards.rewards.items() if needs_prompt(reward))
    if bare and readers:
        raise RewardError(
            f"{readers} needs prompts, but {len(bare)} of {len(rows)} images have none: {', '.join(bare[:5])}"
            f"{', …' if len(bare) > 5 else ''}; give --prompts, metadata.jsonl or .txt files, or see --caption_column"
        )


def refuse_too_many(bad: BadRows, allowed: int, bad_file: Path) -> None:
    """``RewardError`` where more than ``allowed`` images cannot be read; then ``bad_file`` lists them."""
    if len(bad) > allowed:
        write_bad(bad_file, bad)
        last = list(bad.values())[-1]
        raise RewardError(
            f"{len(bad)} images cannot be read, the last {last['file']}: {last['error']}; the reasons are in "
            f"{bad_file}; allow more with --max_bad (now {allowed}), or put them right and --retry_bad"
        )


def _table(rows: Mapping[int, ImageRow], scores: Mapping[str, Mapping[int, float]]) -> pa.Table:
    import pyarrow as pa

    order = sorted(rows)
    columns: dict[str, pa.Array] = {
        "file": pa.array([rows[n].file for n in order], pa.string()),
        "prompt": pa.array([rows[n].prompt for n in order], pa.string()),
    }
    return pa.table(columns | {k: pa.array([v[n] for n in order], pa.float32()) for k, v in scores.items()})
