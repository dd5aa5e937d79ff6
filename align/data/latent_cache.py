"""Examples encoded once: cut, through the VAE and the text encoders, kept on disk, and back as batches.

A cache folder is named by everything that its contents depend on: latents by the images, how they are cut, and the
VAE; embeddings by the captions and the text encoders. So models of one VAE, such as a model and its quantised copy,
share latents. A folder holds shards of 256 examples or 64 captions, each whole or not there: a killed run goes on.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from align.common.errors import DataError
from align.data.dataset import Bad, Example, ExampleSet, Setup
from align.data.equal_keys import Numbers
from align.data.packed import Storage
from align.data.shards import Shards
from align.data.text_cache import TEXTS, Captions, Embeddings, EncodedOnDisk, EncodedWhenAsked, TextCache
from align.data.views import Views, cut
from align.families import Conditioning, Family, Truncated
from rewards.data.images import UnreadableError, decode

logger = logging.getLogger(__name__)

SHARD = 256  # examples in a file
DECODE = 8  # examples whose images are in memory at a time


@dataclass(frozen=True)
class EncodedBatch:
    """B examples: their latents, the conditions of their captions, and what people said of them, ``labels`` (B,), nan
    where nobody did."""

    images: ClassVar[int]  # of an example

    latents: Tensor
    cond: Conditioning
    captions: list[str]
    ids: list[int]
    labels: Tensor | None = None


# where a readable example lies: its place among all, its bucket, and its row among those of both its shard and bucket
LIES = np.dtype([("place", np.uint32), ("bucket", np.uint16), ("row", np.uint16)])
Lies = np.ndarray[Any, np.dtype[np.void]]


class EncodedDataset:
    """The cached examples, as batches of ``batch_type``; in memory is where the latents lie, eight bytes an example."""

    def __init__(
        self, batch_type: type[EncodedBatch], latents: Shards, texts: Embeddings, examples: ExampleSet, lies: Lies
    ) -> None:
        self.batch_type, self.latents, self.texts, self.examples, self.lies = batch_type, latents, texts, examples, lies
        present = np.flatnonzero(np.bincount(lies["bucket"])).tolist()
        # the examples of each size, of which alone a batch can be made
        self.buckets: list[Sequence[int] | Numbers] = [range(len(lies))]
        if len(present) > 1:
            self.buckets = [np.flatnonzero(lies["bucket"] == bucket).astype(np.int32) for bucket in present]

    def __len__(self) -> int:
        return len(self.lies)

    @property
    def fingerprint(self) -> str:
        return f"{len(self)} examples {self.examples.content_digest[:16]}"

    @property
    def ids(self) -> list[int]:
        return [self.examples.items[place].id for place in self.lies["place"].tolist()]

    def batch(self, indices: Sequence[int], variants: Sequence[int] | None = None) -> Any:
        """The examples at ``indices``, all of one bucket, each seen as its view in ``variants`` (default the first)."""
        lies = self.lies[list(indices)].tolist()
        places = [place for place, _, _ in lies]
        latents = torch.stack(
            [
                self.latents.tensors(place // self.latents.size)[_name(bucket)][row, variant]
                for (place, bucket, row), variant in zip(lies, variants or [0] * len(lies), strict=True)
            ]
        )
        items = [self.examples.items[place] for place in places]
        cond = self.texts.take(self.examples.numbers[places].tolist())
        latents = latents[:, 0] if self.batch_type.images == 1 else latents
        labels = torch.tensor([math.nan if item.label is None else item.label for item in items])
        return self.batch_type(latents, cond, [item.caption for item in items], [item.id for item in items], labels)


class LatentCache:
    """The first ``count`` of ``examples``, as ``views`` of their images, on disk below ``home``: latents in its folder
    ``name``, embeddings in ``captions``, or where ``text_cache`` says."""

    def __init__(
        self,
        home: Path,
        name: str,
        examples: ExampleSet,
        count: int,
        views: Views,
        setup: Setup,
        text_cache: TextCache = "disk",
        storage: Storage = "model",
    ) -> None:
        self.home, self.name, self.examples, self.views, self.setup = home, name, examples, views, setup
        self.captions = Captions(examples, count)
        images: dict[str, object] = {
            "dtype": str(setup.family.dtype),
            "examples": [examples.digest, count],
            "views": views.key(),
            "model": dict(setup.family.identity()["pictures"]),
        }
        self.latents = Shards(home / name, "latents", count, SHARD, images)
        each = views.variants, len(examples.items[0].images)
        self.shapes = [(*each, *setup.family.latent_shape(*size)) for size in views.sizes]
        self.texts = (
            EncodedOnDisk(home, setup, self.captions, storage)
            if text_cache == "disk"
            else EncodedWhenAsked(setup.family, self.captions, text_cache == "memory", storage)
        )

    def encode(self, vae_batch: int) -> None:
        """Write what is missing, with the other processes."""
        setup, latents, todo = self.setup, self.latents, self.latents.todo(self.setup)
        texts = self.texts if isinstance(self.texts, EncodedOnDisk) else None
        spans = [latents.span(number) for number in todo]
        spans += [texts.shards.span(number) for number in texts.todo] if texts else []
        count = sum(span.stop - span.start for span in spans)
        show = setup.progress and setup.process_index == 0 and count > 0
        if setup.process_index == 0 and count:
            self._announce(texts)
        threads = min(8, os.cpu_count() or 1)
        with tqdm(total=count, desc="encode", disable=not show) as bar, ThreadPoolExecutor(threads) as pool:
            for number in todo:
                items = self.examples.items[latents.span(number)]
                tensors, kept, bad = self._latents(items, vae_batch, pool, bar.update)
                latents.save(number, tensors, kept=kept, bad=bad)
            if texts:
                texts.write(bar.update)
        setup.wait_for_everyone()

    def _announce(self, texts: EncodedOnDisk | None) -> None:
        """Say what the whole cache takes; :class:`DataError` where the disk does not hold what is missing of it."""
        largest = max(map(math.prod, self.shapes))
        latents = self.latents.count * largest * _stored(self.setup.family).itemsize
        words = len(self.captions) * texts.row_bytes if texts else 0.0
        told = f"{self.latents.count} {self.name}: {_size(latents)} of latents"
        told += f", {_size(words)} of text for {len(self.captions)} captions" if words else ""
        logger.info("%s", self.latents.folder)
        if self.setup.progress:
            print(f"cache: {told}, in {self.home}", file=sys.stderr)
        folders = [self.latents.folder, *([texts.shards.folder] if texts else [])]
        there = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
        free = shutil.disk_usage(self.home).free
        if latents + words - there > free:
            raise DataError(
                f"the cache would take {told}, but {self.home} has {_size(free)} left; name another cache_dir, or "
                "store fewer texts: text_cache_dtype: float8, text_cache: memory or none"
            )

    def open(self, batch_type: type[EncodedBatch]) -> tuple[EncodedDataset, list[Bad]]:
        """The whole cache, and the rows that encoding found unusable; every process sees the same."""
        if isinstance(self.texts, EncodedOnDisk):
            self.texts.open()
        else:
            parts = range(0, len(self.captions), TEXTS)
            texts = ([self.captions[k] for k in range(n, min(n + TEXTS, len(self.captions)))] for n in parts)
            cut = (Truncated.among(self.setup.family, part) for part in texts)
            sum(cut, Truncated()).tell(len(self.captions))
        lies, count, bad = np.empty(self.latents.count, LIES), 0, list[Bad]()
        for shard in range(self.latents.number):
            header, first = self.latents.require(shard), shard * self.latents.size
            rows = [0] * len(self.shapes)
            for place, bucket in header["kept"]:
                lies[count] = first + place, bucket, rows[bucket]
                rows[bucket] += 1
                count += 1
            for place, reason in header["bad"]:
                item = self.examples.items[first + place]
                bad.append(Bad(item.id, item.source, reason))
        return EncodedDataset(batch_type, self.latents, self.texts, self.examples, lies[:count]), bad

    def _latents(
        self, items: Sequence[Example], vae_batch: int, pool: Executor, done: Callable[[int], object]
    ) -> tuple[dict[str, Tensor], list[tuple[int, int]], list[tuple[int, str]]]:
        """By bucket, latents (n, variants, images, C, h, w) of the readable ``items``; their places and buckets; the
        others' faults."""
        family = self.setup.family
        latents: list[list[Tensor]] = [[] for _ in self.shapes]
        kept, bad = list[tuple[int, int]](), list[tuple[int, str]]()
        for start in range(0, len(items), DECODE):
            part = items[start : start + DECODE]
            # bytes in order, by one thread, as tables are read forward; decoding in parallel
            seen = list(pool.map(self._see, part, [_bytes(item) for item in part]))
            bad += [(start + k, fault) for k, fault in enumerate(seen) if isinstance(fault, str)]
            kept += [(start + k, found[0]) for k, found in enumerate(seen) if not isinstance(found, str)]
            for bucket, shape in enumerate(self.shapes):
                good = [found[1] for found in seen if not isinstance(found, str) and found[0] == bucket]
                if not good:
                    continue
                pixels = torch.stack(good).flatten(0, 2).split(vae_batch)
                with torch.no_grad():
                    encoded = torch.cat([family.to_latent(some.float() / 255) for some in pixels]).cpu()
                if encoded.shape[1:] != shape[2:]:
                    raise DataError(
                        f"expected latents of shape {shape[2:]} (C, h, w), the VAE gave {encoded.shape[1:]}"
                    )
                latents[bucket].append(encoded.reshape(len(good), *shape))
            done(len(part))
        tensors = {_name(bucket): torch.cat(of) for bucket, of in enumerate(latents) if of}
        for name, tensor in tensors.items():
            if wrong := (~tensor.isfinite()).flatten(1).any(1).nonzero().flatten().tolist():
                places = [place for place, bucket in kept if _name(bucket) == name]
                raise DataError(
                    f"the VAE's latents of {items[places[wrong[0]]].source} are not finite; SDXL's own VAE overflows "
                    "in float16: use float32 or bfloat16, or madebyollin/sdxl-vae-fp16-fix"
                )
        return {name: tensor.to(_stored(family)) for name, tensor in tensors.items()}, kept, bad

    def _see(self, item: Example, data: list[bytes] | str) -> tuple[int, Tensor] | str:
        """The example's bucket and views (variants, images, 3, H, W) uint8, or why there are none."""
        if isinstance(data, str):
            return data
        images = []
        for image, code in zip(item.images, data, strict=True):
            try:
                images.append(decode(code))
            except UnreadableError as error:
                return f"{image}: {error}"
        if len(images) > 1 and (
            data[0] == data[1] or (images[0].size == images[1].size and images[0].tobytes() == images[1].tobytes())
        ):
            return "both images are the same"
        bucket, views = self.views.bucket(images), self.views.of(item.id)
        size = self.views.sizes[bucket]
        return bucket, torch.stack([torch.stack([cut(image, size, *view) for image in images]) for view in views])


def _bytes(item: Example) -> list[bytes] | str:
    """The images' bytes, or why they cannot be had."""
    codes = []
    for image in item.images:
        try:
            codes.append(image.data())
        except UnreadableError as error:
            return f"{image}: {error}"
    return codes


def _name(bucket: int) -> str:
    """Of the tensor that holds a bucket's latents in a shard."""
    return f"latents.{bucket}"


def _stored(family: Family) -> torch.dtype:
    """What latents are kept in."""
    return family.dtype if family.dtype.itemsize == 2 else torch.float32


def _size(count: float) -> str:
    power = next((k for k in (4, 3, 2, 1) if count >= 1000**k), 0)
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
