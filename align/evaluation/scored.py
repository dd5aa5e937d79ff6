"""The scores of kept pictures, by the engine of ``rewards.score``: shard by shard, and found again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from align.evaluation.pictures import PATIENCE, PictureFolder
from rewards import RewardConfig, RewardSum
from rewards.common.device import Launched
from rewards.common.files import discard
from rewards.score import score_here
from rewards.scoring.engine import ScoringEngine
from rewards.scoring.loader import Decoder
from rewards.scoring.output import ScoreShards, wait_for

SHARD = 256  # pictures that are scored between two writes


def score_pictures(
    pictures: PictureFolder,
    rewards: RewardSum,
    configs: Sequence[RewardConfig],
    folder: Path,
    batch_size: int,
    device: str,
    launched: Launched,
) -> dict[str, np.ndarray]:
    """Every reward's scores (N,) of ``pictures``, which the first process gets when all have scored their share.

    They are kept below ``folder``, under a name that says what they depend on: pictures and ``configs``, of which
    ``rewards`` were made. Scores of pictures or rewards that are no longer asked for go.
    """
    source = pictures.source()
    depends = {"input": source.identity, "rewards": {one.title: one.settings() for one in configs}, "shard": SHARD}
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()[:12]
    shards = ScoreShards(folder / f"{pictures.path.name}-{digest}", depends)
    decoder = Decoder(source, None, SHARD, batch_size, threads=2)
    engine = ScoringEngine(decoder, rewards, shards, shards.folder / "bad.jsonl", 0, device)
    count = -(-score_here(engine, False, launched.rank, launched.world) // SHARD)
    if launched.rank:
        return {}
    wait_for(shards, count, PATIENCE if launched.world > 1 else 0)
    for other in folder.glob(f"{pictures.path.name}-{'[0-9a-f]' * 12}"):
        if other != shards.folder:
            discard(other)
    parts = [shards.read(number) for number in range(count)]
    return {name: np.concatenate([part[name].to_numpy() for part in parts]).astype(float) for name in rewards.rewards}
