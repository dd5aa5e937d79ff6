"""Examples encoded once: cut, through the VAE and the text encoders, kept on disk, and back as batches.

A cache folder is named by everything that its contents depend on: latents by the images, how they are cut, and the
VAE; embeddings by the captions and the text encoders. So models of one VAE, such as a model and its quantised copy,
share latents. A folder holds shards of 256 examples or captions, each whole or not there: a killed run goes on there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from align.common.errors import DataError
from align.data.dataset import Bad, Example, ExampleSet, Setup
from align.data.mapped_files import MappedFiles
from align.families import Conditioning, Family
from rewards.common.files import atomic
from rewards.data.images import UnreadableError, decode

logger = logging.getLogger(__name__)

FORMAT = 3  # raise it when the same inputs would give other files
SHARD = 256  # examples, or captions, in a file
TEXTS = 64  # captions in one call of the text encoders
DECODE = 8  # examples whose images are in memory at a time


def cut(image: Image.Image, resolution: int, x: float, y: float, flip: bool) -> Tensor:
    """A square of an RGB image as (3, H, W) uint8: the shorter edge becomes ``resolution`` (bilinear, antialiased),
    then the window at the fraction (x, y) of the free way is cut and perhaps mirrored."""
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    x0, y0 = round(x * (width - resolution)), round(y * (height - resolution))
    image = image.crop((x0, y0, x0 + resolution, y0 + resolution))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@dataclass(frozen=True)
class Views:
    """Which squares of an image are seen."""

    resolution: int
    center_crop: bool
    random_flip: bool
    variants: int
    seed: int

    def of(self, example: int) -> Iterator[tuple[float, float, bool]]:
        """(x, y, flip) of each variant: where the square lies on the free way from 0 to 1, and whether mirrored."""
        for variant in range(self.variants):
            x, y, coin = np.random.default_rng([self.seed, example, variant]).random(3)
            yield (*((0.5, 0.5) if self.center_crop else (x, y)), self.random_flip and coin < 0.5)

    def key(self) -> dict[str, object]:
        """Without randomness the seed does not matter, and runs of different seeds share a cache."""
        return asdict(self) | ({} if self.random_flip or not self.center_crop else {"seed": None})


@dataclass(frozen=True)
class EncodedBatch:
    """B examples: their latents and the conditions of their captions."""

    images: ClassVar[int]  # of an example

    latents: Tensor
    cond: Conditioning
    captions: list[str]
    ids: list[int]


class Shards:
    """Files of ``SHARD`` rows each, in a folder that is named by what they depend on."""

    def __init__(self, home: Path, stem: str, count: int, depends: dict[str, object]) -> None:
        self.count = count
        self.key = hashlib.sha256(json.dumps({"format": FORMAT} | depends, sort_keys=True).encode()).hexdigest()
        self.folder = home / self.key[:24]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.files = [self.folder / f"{stem}-{k:05d}.safetensors" for k in range(-(-count // SHARD))]
        self._tensors = MappedFiles()

    def todo(self, setup: Setup) -> list[tuple[Path, slice]]:
        """This process's share of the files that are missing, and which rows belong in each."""
        spans = [(file, slice(k * SHARD, min((k + 1) * SHARD, self.count))) for k, file in enumerate(self.files)]
        share = spans[setup.process_index :: setup.num_processes]
        return [(file, span) for file, span in share if self._header(file) is None]

    def save(self, file: Path, tensors: dict[str, Tensor], **header: object) -> None:
        """Write a shard whole or not at all; ``header`` is what it says of itself beside its key."""
        with atomic(file) as draft:
            metadata = {name: json.dumps(value) for name, value in ({"key": self.key} | header).items()}
            save_file(tensors, draft, metadata=metadata)

    def headers(self) -> list[dict[str, Any]]:
        """What every shard says of itself; :class:`DataError` where one is not there."""
        headers = {file: header for file in self.files if (header := self._header(file)) is not None}
        if missing := [file for file in self.files if file not in headers]:
            raise DataError(f"{missing[0]} is not there or not whole; all processes must share cache_dir")
        return list(headers.values())

    def rows(self, number: int) -> dict[str, Tensor]:
        """The tensors of a shard; a batch reads only its own rows of them."""
        return self._tensors[self.files[number]]

    def _header(self, file: Path) -> dict[str, Any] | None:
        """None when a shard is missing, damaged or another's, and must be made again."""
        try:
            with safe_open(file, framework="pt") as opened:
                header = {name: json.loads(text) for name, text in (opened.metadata() or {}).items()}
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            logger.warning("%s is damaged (%s) and will be encoded again", file, error)
            return None
        if header.get("key") != self.key:
            logger.warning("%s belongs to other data and will be encoded again", file)
            return None
        return header


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a kept example lies: row ``row`` of latents shard ``shard``, and its caption's number."""

    id: int
    shard: int
    row: int
    caption: int


class EncodedDataset:
    """The cached examples, as batches of ``batch_type``."""

    def __init__(
        self, batch_type: type[EncodedBatch], latents: Shards, conds: Shards, entries: list[Entry], captions: list[str]
    ) -> None:
        self.batch_type, self.entries, self.captions = batch_type, entries, captions
        self.latents, self.conds = latents, conds
        self.ids = [entry.id for entry in entries]

    def __len__(self) -> int:
        return len(self.entries)

    def batch(self, indices: Sequence[int], variants: Sequence[int] | None = None) -> Any:
        """The examples at ``indices``, each seen as its view in ``variants`` (default the first)."""
        entries = [self.entries[index] for index in indices]
        views = zip(entries, variants or [0] * len(entries), strict=True)
        latents = torch.stack([self.latents.rows(e.shard)["latents"][e.row, variant] for e, variant in views])
        texts = [(self.conds.rows(e.caption // SHARD), e.caption % SHARD) for e in entries]
        cond = Conditioning.cat([Conditioning(shard).take(slice(row, row + 1)) for shard, row in texts])
        latents = latents[:, 0] if self.batch_type.images == 1 else latents
        return self.batch_type(latents, cond, [self.captions[e.caption] for e in entries], [e.id for e in entries])


class LatentCache:
    """``items`` of ``found``, as ``views`` of their images, on disk below ``home``: latents in its folder ``name``,
    embeddings in ``captions``."""

    def __init__(
        self, home: Path, name: str, source: ExampleSet, items: Sequence[Example], views: Views, setup: Setup
    ) -> None:
        self.name, self.items, self.views, self.setup = name, items, views, setup
        self.captions = list(dict.fromkeys(item.caption for item in items))
        model = setup.family.identity()
        files = sorted({*source.files, *(image.file for item in items for image in item.images)})
        number = {file: index for index, file in enumerate(files)}
        images: dict[str, object] = {
            "dtype": str(setup.family.dtype),
            "layout": source.layout,
            "files": [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
            "items": [[i.id, *([number[image.file], image.row, image.column] for image in i.images)] for i in items],
            "views": views.key(),
            "model": dict(model["pictures"]),
        }
        texts = {"dtype": images["dtype"], "captions": self.captions, "model": dict(model["captions"])}
        self.latents = Shards(home / name, "latents", len(items), images)
        self.conds = Shards(home / "captions", "conds", len(self.captions), texts)

    def encode(self, vae_batch: int) -> None:
        """Write what is missing, with the other processes."""
        setup, latents, conds = self.setup, self.latents.todo(self.setup), self.conds.todo(self.setup)
        count = sum(span.stop - span.start for _, span in [*latents, *conds])
        logger.info("%d %s, %d captions: %s", len(self.items), self.name, len(self.captions), self.latents.folder)
        show = setup.progress and setup.process_index == 0 and count > 0
        threads = min(8, os.cpu_count() or 1)
        with tqdm(total=count, desc="encode", disable=not show) as bar, ThreadPoolExecutor(threads) as pool:
            for file, span in latents:
                tensor, kept, bad = self._latents(self.items[span], vae_batch, pool, bar.update)
                self.latents.save(file, {"latents": tensor}, kept=kept, bad=bad)
            for file, span in conds:
                self.conds.save(file, _conds(setup.family, self.captions[span], bar.update))
        setup.wait_for_everyone()

    def open(self, batch_type: type[EncodedBatch]) -> tuple[EncodedDataset, list[Bad]]:
        """The whole cache, and the rows that encoding found unusable; every process sees the same."""
        number = {caption: index for index, caption in enumerate(self.captions)}
        self.conds.headers()
        entries, bad = list[Entry](), list[Bad]()
        for shard, header in enumerate(self.latents.headers()):
            items = self.items[shard * SHARD : (shard + 1) * SHARD]
            kept = [items[place] for place in header["kept"]]
            entries += [Entry(item.id, shard, row, number[item.caption]) for row, item in enumerate(kept)]
            bad += [Bad(items[place].id, items[place].source, reason) for place, reason in header["bad"]]
        return EncodedDataset(batch_type, self.latents, self.conds, entries, self.captions), bad

    def _latents(
        self, items: Sequence[Example], vae_batch: int, pool: Executor, done: Callable[[int], object]
    ) -> tuple[Tensor, list[int], list[tuple[int, str]]]:
        """Latents (n, variants, images, C, h, w) of the readable ``items``, their places there, the others' faults."""
        family, images = self.setup.family, len(self.items[0].images)
        shape = (self.views.variants, images, *family.latent_shape(self.views.resolution))
        latents, kept, bad = [torch.empty(0, *shape)], list[int](), list[tuple[int, str]]()
        for start in range(0, len(items), DECODE):
            part = items[start : start + DECODE]
            # bytes in order, by one thread, as tables are read forward; decoding in parallel
            views = list(pool.map(self._see, part, [_bytes(item) for item in part]))
            good = {start + k: view for k, view in enumerate(views) if isinstance(view, Tensor)}
            kept += good
            bad += [(start + k, view) for k, view in enumerate(views) if isinstance(view, str)]
            if good:
                pixels = torch.stack([*good.values()]).flatten(0, 2).split(vae_batch)
                with torch.no_grad():
                    encoded = torch.cat([family.to_latent(part.float() / 255) for part in pixels]).cpu()
                if encoded.shape[1:] != shape[2:]:
                    raise DataError(
                        f"expected latents of shape {shape[2:]} (C, h, w), the VAE gave {encoded.shape[1:]}"
                    )
                latents.append(encoded.reshape(len(good), *shape))
            done(len(part))
        tensor = torch.cat(latents)
        if wrong := (~tensor.isfinite()).flatten(1).any(1).nonzero().flatten().tolist():
            raise DataError(
                f"the VAE's latents of {items[kept[wrong[0]]].source} are not finite; SDXL's own VAE overflows in "
                "float16: use float32 or bfloat16, or madebyollin/sdxl-vae-fp16-fix"
            )
        return tensor.to(family.dtype if family.dtype.itemsize == 2 else torch.float32), kept, bad

    def _see(self, item: Example, data: list[bytes] | str) -> Tensor | str:
        """The example's views (variants, images, 3, H, W) uint8, or why there are none."""
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
        views = self.views.of(item.id)
        return torch.stack([torch.stack([cut(i, self.views.resolution, *view) for i in images]) for view in views])


def _bytes(item: Example) -> list[bytes] | str:
    """The images' bytes, or why they cannot be had."""
    codes = []
    for image in item.images:
        try:
            codes.append(image.data())
        except UnreadableError as error:
            return f"{image}: {error}"
    return codes


def _conds(family: Family, captions: Sequence[str], done: Callable[[int], object]) -> dict[str, Tensor]:
    parts = []
    for start in range(0, len(captions), TEXTS):
        with torch.no_grad():
            parts.append(family.encode(captions[start : start + TEXTS]))
        done(len(parts[-1]))
    return {name: tensor.cpu().contiguous() for name, tensor in Conditioning.cat(parts).tensors.items()}
