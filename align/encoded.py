"""Preference pairs as a model sees them: latents and text embeddings, encoded once and kept by :mod:`align.cache`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from align.cache import SHARD, Encoder, Entry, Views, header_of, index_of, key_of, save
from align.data import Data, Pair, PairSet, check_bad, read_pairs
from align.errors import DataError
from align.families import Cond
from align.files import write
from align.pictures import UnreadableError, decode

logger = logging.getLogger(__name__)

TEXTS = 64  # captions in one call of the text encoders
DECODE = 8  # pairs whose pictures are in memory at a time
CACHE = "~/.cache/t2i-align"


@dataclass(frozen=True)
class PairBatch:
    """B pairs: ``latents`` (B, 2, C, h, w) with the winner first, and the conditions of their captions."""

    latents: Tensor
    cond: Cond
    captions: list[str]
    ids: list[int]


@dataclass
class PreferencePairs(Data):
    """A preference data set and how its pictures are cut.

    Args:
        path: a file, a folder or a hub id in any layout that :func:`align.data.read_pairs` knows.
        split: the split of a hub id (default train), or of a folder that holds several.
        limit: use the first so many pairs.
        resolution: side of the square pictures, in pixels; default the model's own.
        center_crop: cut the square from the middle; otherwise at random.
        random_flip: mirror half of the views.
        variants: how many random views of each pair are cached. A pair's two pictures share crop and flip.
        ties: drop rows that have no winner, or stop at them (error).
        max_bad_share: stop when more of the rows than this are unusable.
        image_root: folder that relative picture paths start from; default the folder of the file that names them.
        caption_column: the caption's name, where it is not caption, prompt or text.
        cache_dir: where the encodings are kept; default ``~/.cache/t2i-align``. All ranks must see the same folder.
        vae_batch: pictures in one call of the VAE.
    """

    path: str
    split: str | None = None
    limit: int | None = None
    resolution: int | None = None
    center_crop: bool = True
    random_flip: bool = False
    variants: int = 1
    ties: Literal["drop", "error"] = "drop"
    max_bad_share: float = 0.01
    image_root: str | None = None
    caption_column: str | None = None
    cache_dir: str | None = None
    vae_batch: int = 8

    batch_type: ClassVar[type] = PairBatch

    def check(self) -> None:
        self.read()

    def __post_init__(self) -> None:
        if self.variants < 1 or self.vae_batch < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"variants, vae_batch and limit must be positive, found {self}")
        if self.variants > 1 and self.center_crop and not self.random_flip:
            raise ValueError("all variants would be the same: set center_crop: false or random_flip: true")

    @property
    def cache(self) -> Path:
        return Path(self.cache_dir or CACHE).expanduser()

    @property
    def report(self) -> Path:
        """Where unusable rows are listed, one JSON object a line."""
        name = hashlib.sha256(f"{self.path} {self.split}".encode()).hexdigest()[:8]
        return self.cache / f"bad-rows-{Path(self.path).stem}-{name}.jsonl"

    def read(self) -> PairSet:
        """The pairs, before ``limit``. Raises :class:`align.errors.DataError`."""
        return read_pairs(
            self.path, self.split, self.ties, self.max_bad_share, self.report, self.caption_column, self.image_root
        )

    def prepare(
        self,
        family: Encoder,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        progress: bool = True,
        barrier: Callable[[], None] = lambda: None,
    ) -> EncodedPairs:
        """Encode what the cache lacks, check every row, and open the cache.

        Args:
            family: encodes pictures and captions.
            seed: of the random crops and flips.
            rank: this process encodes every ``world``-th shard, from the ``rank``-th.
            world: how many processes share the work.
            progress: show a bar.
            barrier: waits until all processes are there, for ``world`` > 1.

        Raises:
            DataError: the data set is unusable, or its latents are not finite.
        """
        found = self.read()
        pairs = found.pairs[: self.limit]
        resolution = self.resolution or family.resolution
        views = Views(resolution, self.center_crop, self.random_flip, self.variants, seed)
        shape = (self.variants, 2, *family.latent_shape(resolution))
        captions = list(dict.fromkeys(pair.caption for pair in pairs))
        key = key_of(family, found, pairs, views)
        folder = self.cache / "pairs" / key[:24]
        folder.mkdir(parents=True, exist_ok=True)
        latent_files = [folder / f"latents-{k:05d}.safetensors" for k in range(-(-len(pairs) // SHARD))]
        cond_files = [folder / f"conds-{k:05d}.safetensors" for k in range(-(-len(captions) // SHARD))]

        def mine(files: list[Path]) -> list[tuple[Path, slice]]:
            spans = [(file, slice(k * SHARD, (k + 1) * SHARD)) for k, file in enumerate(files)]
            return [(file, span) for file, span in spans[rank::world] if header_of(file, key) is None]

        todo_latents, todo_conds = mine(latent_files), mine(cond_files)
        count = sum(len(pairs[span]) for _, span in todo_latents) + sum(len(captions[span]) for _, span in todo_conds)
        logger.info("%s: %d pairs, %d captions, cache %s", self.path, len(pairs), len(captions), folder)
        show = progress and rank == 0 and count > 0
        with tqdm(total=count, desc="encode", disable=not show) as bar, ThreadPoolExecutor(_threads()) as pool:
            for file, span in todo_latents:
                latents, kept, lost = _latents(family, pairs[span], views, self.vae_batch, shape, pool, bar.update)
                save(file, {"latents": latents}, {"key": key, "kept": kept, "bad": lost})
            for file, span in todo_conds:
                save(file, _conds(family, captions[span], bar.update), {"key": key})
        barrier()
        headers = {file: header_of(file, key) for file in (*latent_files, *cond_files)}
        missing = [str(file) for file, header in headers.items() if header is None]
        if missing:
            raise DataError(f"{missing[0]} is not there or not whole; all processes must share cache_dir {self.cache}")
        entries, bad_rows = index_of(pairs, captions, [headers[file] or {} for file in latent_files])
        # every process sees the same rows here, so that all of them stop or none
        total = found.total if len(pairs) == len(found) else pairs[-1].id + 1  # rows beyond the limit do not count
        bad = sorted([*found.bad, *bad_rows], key=lambda row: row.row)
        bad = [row for row in bad if row.row < total]
        check_bad(bad, total, self.max_bad_share, self.report if rank == 0 else None)
        if not entries:
            raise DataError(f"{self.path}: none of {len(pairs)} pairs has two readable pictures")
        if rank == 0:
            index = {"key": key, "layout": found.layout, "ties": found.ties, "captions": captions}
            rows = {"pairs": [asdict(entry) for entry in entries], "bad": [asdict(row) for row in bad]}
            write(folder / "index.json", json.dumps(index | rows, ensure_ascii=False))
        return EncodedPairs(latent_files, cond_files, entries, captions)


def cut(image: Image.Image, resolution: int, x: float, y: float, flip: bool) -> Tensor:
    """A square of an RGB picture as (3, H, W) uint8: the shorter edge becomes ``resolution`` (bilinear, antialiased),
    then the window at the fraction (x, y) of the free way is cut and perhaps mirrored."""
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round(x * (width - resolution)), round(y * (height - resolution))
    image = image.crop((left, top, left + resolution, top + resolution))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class EncodedPairs:
    """The cached pairs. Shards are memory-mapped when first used, so a batch reads only its own rows."""

    def __init__(
        self, latent_files: Sequence[Path], cond_files: Sequence[Path], entries: Sequence[Entry], captions: list[str]
    ) -> None:
        self.entries = entries
        self.ids = [entry.id for entry in entries]
        self.captions = captions
        self._latent_files, self._cond_files = latent_files, cond_files
        self._open: dict[Path, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def batch(self, indices: Sequence[int], variants: Sequence[int] | None = None) -> PairBatch:
        """The pairs at ``indices``, each seen as its view in ``variants`` (default the first)."""
        entries = [self.entries[index] for index in indices]
        chosen = variants if variants is not None else [0] * len(entries)
        shards = [self._shard(self._latent_files[entry.shard])["latents"] for entry in entries]
        rows = [shard[entry.row, variant] for shard, entry, variant in zip(shards, entries, chosen, strict=True)]
        texts = [(self._shard(self._cond_files[e.caption // SHARD]), e.caption % SHARD) for e in entries]
        cond = Cond({name: torch.stack([shard[name][row] for shard, row in texts]) for name in texts[0][0]})
        return PairBatch(torch.stack(rows), cond, [self.captions[e.caption] for e in entries], [e.id for e in entries])

    def _shard(self, file: Path) -> dict[str, Tensor]:
        if file not in self._open:
            self._open[file] = load_file(file)  # maps the file, pages come when touched
        return self._open[file]


def _latents(
    family: Encoder,
    pairs: Sequence[Pair],
    views: Views,
    vae_batch: int,
    shape: tuple[int, ...],
    pool: Executor,
    done: Callable[[int], object],
) -> tuple[Tensor, list[int], list[tuple[int, str]]]:
    """Latents (n, variants, 2, C, h, w) of the readable pairs, their places in ``pairs``, and the others' faults."""
    latents, kept, bad = list[Tensor](), list[int](), list[tuple[int, str]]()
    for start in range(0, len(pairs), DECODE):
        some = pairs[start : start + DECODE]
        # bytes in order, by one thread, as tables are read forward; decoding in parallel
        seen = list(pool.map(lambda pair, data: _see(pair, data, views), some, [_bytes(pair) for pair in some]))
        good = [view for view in seen if isinstance(view, Tensor)]
        kept += [start + k for k, view in enumerate(seen) if isinstance(view, Tensor)]
        bad += [(start + k, view) for k, view in enumerate(seen) if isinstance(view, str)]
        if good:
            images = torch.stack(good).flatten(0, 2)
            with torch.no_grad():
                parts = [family.to_latent(part.float() / 255) for part in torch.split(images, vae_batch)]
            whole = torch.cat(parts)
            latents.append(whole.reshape(len(good), *shape[:2], *whole.shape[1:]).cpu())
        done(len(some))
    found = torch.cat(latents) if latents else torch.empty(0, *shape)
    if found.shape[1:] != shape:
        raise DataError(f"expected latents of shape {shape} (variants, 2, C, h, w), the VAE gave {found.shape[1:]}")
    wrong = (~found.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if wrong:
        raise DataError(
            f"the VAE's latents of {pairs[kept[wrong[0]]].source} are not finite; SDXL's own VAE overflows in float16: "
            "use float32 or bfloat16, or madebyollin/sdxl-vae-fp16-fix"
        )
    half = family.dtype in (torch.float16, torch.bfloat16)
    return found.to(family.dtype if half else torch.float32), kept, bad


def _bytes(pair: Pair) -> list[bytes] | str:
    """The two pictures' bytes, or why they cannot be had."""
    found = []
    for picture in (pair.chosen, pair.rejected):
        try:
            found.append(picture.data())
        except UnreadableError as error:
            return f"{picture}: {error}"
    return found


def _see(pair: Pair, data: list[bytes] | str, views: Views) -> Tensor | str:
    """The pair's views (variants, 2, 3, H, W) uint8, or why there are none."""
    if isinstance(data, str):
        return data
    images = []
    for picture, code in zip((pair.chosen, pair.rejected), data, strict=True):
        try:
            images.append(decode(code))
        except UnreadableError as error:
            return f"{picture}: {error}"
    if data[0] == data[1] or (images[0].size == images[1].size and images[0].tobytes() == images[1].tobytes()):
        return "both pictures are the same"
    return torch.stack(
        [torch.stack([cut(image, views.resolution, *view) for image in images]) for view in views.of(pair.id)]
    )


def _conds(family: Encoder, captions: Sequence[str], done: Callable[[int], object]) -> dict[str, Tensor]:
    parts = []
    for start in range(0, len(captions), TEXTS):
        with torch.no_grad():
            parts.append(family.encode(captions[start : start + TEXTS]))
        done(len(parts[-1]))
    return {name: tensor.cpu().contiguous() for name, tensor in Cond.cat(parts).tensors.items()}


def _threads() -> int:
    return min(8, os.cpu_count() or 1)
