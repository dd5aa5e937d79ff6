"""``align.encode --engine ray``: shards of the latent cache, with captions, on the engine that scoring uses.

An actor loads the model once and writes shards itself, so that neither pixels nor latents pass through Ray; the cache
is that of one process. Where an actor dies, Ray starts another one and gives it the shard again.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from align.common.errors import DataError, UserError
from align.data.captioned import EncodedData
from align.data.dataset import Setup
from align.families import Family
from align.training.config import TrainConfig
from rewards.common.device import pick_device
from rewards.scoring.ray_engine import cluster, done_by


@dataclass
class _Share:
    """What an actor is told: the run, as if it had only these data, what they hold, and of how many shards."""

    config: TrainConfig
    data: EncodedData
    seed: int
    digest: str
    shards: int
    home: Path = field(default_factory=Path.cwd)


class _Actor:
    """Encodes one shard a call."""

    def __init__(self, share: _Share) -> None:
        self.share = share

    @cached_property
    def family(self) -> Family:
        """Made by the first call: what goes wrong is then an answer, where Ray would start a broken actor anew."""
        share = self.share
        try:
            os.chdir(share.home)
        except OSError as error:
            raise DataError(f"{platform.node()} has no {share.home}; all machines have to share it") from error
        if share.data.items().digest != share.digest:
            raise DataError(f"{platform.node()} finds other data at {share.data.path}; all machines have to share it")
        return share.config.family(torch.device(pick_device(None)))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        (number,) = batch["item"].tolist()
        try:
            setup = Setup(self.family, self.share.seed, number, self.share.shards, progress=False)
            self.share.data.encode(setup)
        except UserError as error:
            return {"shard": [number], "error": [str(error)]}
        return {"shard": [number], "error": [""]}


def encode(config: TrainConfig, data: Sequence[EncodedData], workers: int | None) -> None:
    """Write what the caches of ``data`` lack. Raises :class:`DataError` with what an actor said."""
    with cluster(workers):
        for each in data:
            seed, shards = config.seed if each is config.data else 0, each.shards
            bare = replace(each)  # a copy, without the mapped index
            told = replace(config, data=bare, validation_data=None)
            share = _Share(told, bare, seed, each.items().digest, shards)
            with tqdm(total=shards, desc=f"encode {each.what}", unit="shard") as bar:
                for _, error in done_by(_Actor, share, range(shards), workers):
                    if error:
                        raise DataError(error)
                    bar.update()
