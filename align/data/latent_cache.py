"""The cache of encodings on disk.

A cache folder is named by everything that its contents depend on: latents by the pictures, how they are cut, and the
VAE; embeddings by the captions and the text encoders. So models of one VAE, such as a model and its quantised copy,
share latents. A folder holds shards of 256 items (pairs, or captioned pictures) or captions, written whole or not at
all, so that an interrupted run goes on at the first shard that is missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from align.data.dataset import Bad, Item, ItemSet
from align.families import Conditioning
from rewards.common.files import atomic

logger = logging.getLogger(__name__)

FORMAT = 2  # raise it when the same inputs would give other files
SHARD = 256  # items, or captions, in a file


class Encoder(Protocol):
    """What encoding needs of an :class:`align.families.Family`."""

    @property
    def resolution(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]: ...
    def to_latent(self, images: Tensor) -> Tensor: ...
    def encode(self, prompts: Sequence[str]) -> Conditioning: ...
    def identity(self) -> Mapping[str, Mapping[str, object]]: ...


@dataclass(frozen=True)
class Views:
    """Which squares of a picture are seen."""

    resolution: int
    center_crop: bool
    random_flip: bool
    variants: int
    seed: int

    def of(self, pair: int) -> Iterator[tuple[float, float, bool]]:
        """(x, y, flip) of each variant: where the square lies on the free way from 0 to 1, and whether mirrored."""
        for variant in range(self.variants):
            x, y, coin = np.random.default_rng([self.seed, pair, variant]).random(3)
            middle = self.center_crop
            yield (0.5, 0.5, self.random_flip and coin < 0.5) if middle else (x, y, self.random_flip and coin < 0.5)

    def key(self) -> dict[str, object]:
        """Without randomness the seed does not matter, and runs of different seeds share a cache."""
        return asdict(self) | ({} if self.random_flip or not self.center_crop else {"seed": None})


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a kept item lies: row ``row`` of latents shard ``shard``, and its caption's number."""

    id: int
    shard: int
    row: int
    caption: int


def keys_of(
    family: Encoder, found: ItemSet, items: Sequence[Item], captions: Sequence[str], views: Views
) -> tuple[str, str]:
    """What latents depend on (the pictures, the files they come from, the views, the VAE), and what embeddings do (the
    captions, the tokenizers, the text encoders)."""
    files = sorted({*found.files, *(picture.file for item in items for picture in item.pictures)})
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    number = {file: index for index, file in enumerate(files)}
    parts = [[item.id, *([number[side.file], side.row, side.column] for side in item.pictures)] for item in items]
    seen = {"layout": found.layout, "files": stats, "items": parts, "views": views.key()}
    model, common = family.identity(), {"format": FORMAT, "dtype": str(family.dtype)}
    whole = (seen | {"model": dict(model["pictures"])}, {"captions": captions, "model": dict(model["captions"])})
    latents, embeddings = (json.dumps(common | what, sort_keys=True) for what in whole)
    return hashlib.sha256(latents.encode()).hexdigest(), hashlib.sha256(embeddings.encode()).hexdigest()


def save(file: Path, tensors: dict[str, Tensor], header: dict[str, object]) -> None:
    """Write a shard whole or not at all; ``header`` is what it says of itself."""
    with atomic(file) as draft:
        save_file(tensors, draft, metadata={name: json.dumps(value) for name, value in header.items()})


def header_of(file: Path, key: str) -> dict[str, Any] | None:
    """What a shard says of itself; None when it is missing, damaged or another's, and must be made again."""
    try:
        with safe_open(file, framework="pt") as opened:
            header = {name: json.loads(text) for name, text in (opened.metadata() or {}).items()}
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        logger.warning("%s is damaged (%s) and will be encoded again", file, error)
        return None
    if header.get("key") != key:
        logger.warning("%s belongs to other data and will be encoded again", file)
        return None
    return header


def index_of(
    items: Sequence[Item], captions: Sequence[str], headers: Sequence[dict[str, Any]]
) -> tuple[list[Entry], list[Bad]]:
    """Where each kept item lies, and the rows that encoding found unusable."""
    number = {caption: index for index, caption in enumerate(captions)}
    entries, bad = [], []
    for shard, header in enumerate(headers):
        for row, place in enumerate(header["kept"]):
            item = items[shard * SHARD + place]
            entries.append(Entry(item.id, shard, row, number[item.caption]))
        for place, reason in header["bad"]:
            item = items[shard * SHARD + place]
            bad.append(Bad(item.id, item.source, reason))
    return entries, bad
