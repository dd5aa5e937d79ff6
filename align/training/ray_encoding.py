"""``align.encode --engine ray``: shards of the latent cache, with captions, on the engine that scoring uses.

An actor loads the model once and writes shards itself, so that neither pixels nor latents pass through Ray; the cache
is that of one process. Where an actor dies, Ray starts another one and gives it the shard again.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from tqdm import tqdm

from align.common.errors import DataError
from align.data.captioned import EncodedData
from align.data.dataset import Setup
from align.families import Family
from align.training.config import TrainConfig
from rewards.common.device import pick_device
from rewards.scoring.ray_engine import Actor, Share, cluster, done_by


@dataclass(kw_only=True)
class _Encoding(Share):
    """The run, as if it had only these data, what they hold, and of how many shards."""

    config: TrainConfig
    data: EncodedData
    seed: int
    digest: str
    shards: int


class _Encoder(Actor[_Encoding]):
    @cached_property
    def family(self) -> Family:
        share = self.share
        if share.data.items().digest != share.digest:
            raise DataError(f"{platform.node()} finds other data at {share.data.path}; all machines have to share it")
        return share.config.family(torch.device(pick_device(None)))

    def do(self, number: int) -> None:
        setup = Setup(self.family, self.share.seed, number, self.share.shards, progress=False)
        self.share.data.encode(setup)


def encode(config: TrainConfig, data: Sequence[tuple[EncodedData, int]], workers: int | None) -> None:
    """Write what the caches of ``data``, a seed each, lack. Raises :class:`DataError` with what an actor said."""
    with cluster(workers):
        for each, seed in data:
            bare, shards = replace(each), each.shards  # a copy, without the mapped index
            told = replace(config, data=bare, validation_data=None)
            share = _Encoding(config=told, data=bare, seed=seed, digest=each.items().digest, shards=shards)
            with tqdm(total=shards, desc=f"encode {each.what}", unit="shard") as bar:
                for _, error in done_by(_Encoder, share, range(shards), workers):
                    if error:
                        raise DataError(error)
                    bar.update()
