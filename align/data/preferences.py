"""Pictures and their captions as a model sees them: latents and text embeddings, encoded once and kept by
:mod:`align.data.latent_cache`. Here are preference pairs; captioned pictures are :mod:`align.data.captioned`."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from align.common.assets import locate
from align.common.errors import DataError
from align.data.dataset import Bad, Data, ItemSet, Pair, check_bad
from align.data.encoding import conds_of, latents_of, threads
from align.data.latent_cache import SHARD, Encoder, Entry, Views, header_of, index_of, keys_of, save
from align.families import Conditioning
from rewards.common.files import write_text
from rewards.data.preferences import recognise

logger = logging.getLogger(__name__)

CACHE = "~/.cache/t2i-align"


@dataclass(frozen=True)
class PairBatch:
    """B pairs: ``latents`` (B, 2, C, h, w) with the winner first, and the conditions of their captions."""

    latents: Tensor
    cond: Conditioning
    captions: list[str]
    ids: list[int]


class Encodings(ABC):
    """The cached items. Shards are memory-mapped when first used, so a batch reads only its own rows."""

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

    @abstractmethod
    def batch(self, indices: Sequence[int], variants: Sequence[int] | None = None) -> Any:
        """The items at ``indices``, each seen as its view in ``variants`` (default the first)."""

    def rows(
        self, indices: Sequence[int], variants: Sequence[int] | None = None
    ) -> tuple[Tensor, Conditioning, list[str], list[int]]:
        """What a batch is made of: latents (B, pictures, C, h, w), conditions, captions and ids."""
        entries = [self.entries[index] for index in indices]
        chosen = variants if variants is not None else [0] * len(entries)
        shards = [self._shard(self._latent_files[entry.shard])["latents"] for entry in entries]
        rows = [shard[entry.row, variant] for shard, entry, variant in zip(shards, entries, chosen, strict=True)]
        texts = [(self._shard(self._cond_files[e.caption // SHARD]), e.caption % SHARD) for e in entries]
        cond = Conditioning({name: torch.stack([shard[name][row] for shard, row in texts]) for name in texts[0][0]})
        return torch.stack(rows), cond, [self.captions[e.caption] for e in entries], [e.id for e in entries]

    def _shard(self, file: Path) -> dict[str, Tensor]:
        if file not in self._open:
            self._open[file] = load_file(file)  # maps the file, pages come when touched
        return self._open[file]


@dataclass
class Encoded(Data):
    """Pictures with captions, encoded once: what :class:`PreferencePairs` and :class:`Images` share.

    Args:
        path: a file, a folder or a hub id.
        split: the split of a hub id (default train), or of a folder that holds several.
        limit: use the first so many items.
        resolution: side of the square pictures, in pixels; default the model's own.
        center_crop: cut the square from the middle; otherwise at random.
        random_flip: mirror half of the views.
        variants: how many random views of each item are cached. A pair's two pictures share crop and flip.
        max_bad_share: stop when more of the rows than this are unusable.
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
    max_bad_share: float = 0.01
    caption_column: str | None = None
    cache_dir: str | None = None
    vae_batch: int = 8

    what: ClassVar[str]  # the items' name in messages and in the cache
    pictures: ClassVar[int]  # of an item
    opened: ClassVar[type[Encodings]]  # gives batches of ``batch_type``

    def __post_init__(self) -> None:
        self._items: tuple[str, ItemSet] | None = None
        if self.variants < 1 or self.vae_batch < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"variants, vae_batch and limit must be positive, found {self}")
        if self.variants > 1 and self.center_crop and not self.random_flip:
            raise ValueError("all variants would be the same: set center_crop: false or random_flip: true")

    @abstractmethod
    def read(self) -> ItemSet:
        """The items, before ``limit``. Raises :class:`DataError`."""

    def items(self) -> ItemSet:
        """:meth:`read`, once for each value of the settings: :meth:`check` and :meth:`prepare` share it."""
        settings = repr(self)
        if self._items is None or self._items[0] != settings:
            self._items = settings, self.read()
        return self._items[1]

    def check(self) -> None:
        self.items()

    @property
    def cache(self) -> Path:
        return Path(self.cache_dir or CACHE).expanduser()

    @property
    def report(self) -> Path:
        """Where unusable rows are listed, one JSON object a line."""
        name = hashlib.sha256(f"{self.path} {self.split}".encode()).hexdigest()[:8]
        return self.cache / f"bad-rows-{Path(self.path).stem}-{name}.jsonl"

    def prepare(
        self,
        family: Encoder,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        progress: bool = True,
        barrier: Callable[[], None] = lambda: None,
    ) -> Encodings:
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
        found = self.items()
        items = found.items[: self.limit]
        resolution = self.resolution or family.resolution
        views = Views(resolution, self.center_crop, self.random_flip, self.variants, seed)
        shape = (self.variants, self.pictures, *family.latent_shape(resolution))
        captions = list(dict.fromkeys(item.caption for item in items))
        latents_key, conds_key = keys_of(family, found, items, captions, views)
        folder, texts = self.cache / self.what / latents_key[:24], self.cache / "captions" / conds_key[:24]
        for place in (folder, texts):
            place.mkdir(parents=True, exist_ok=True)
        latent_files = [folder / f"latents-{k:05d}.safetensors" for k in range(-(-len(items) // SHARD))]
        cond_files = [texts / f"conds-{k:05d}.safetensors" for k in range(-(-len(captions) // SHARD))]

        def mine(files: list[Path], key: str) -> list[tuple[Path, slice]]:
            spans = [(file, slice(k * SHARD, (k + 1) * SHARD)) for k, file in enumerate(files)]
            return [(file, span) for file, span in spans[rank::world] if header_of(file, key) is None]

        todo_latents, todo_conds = mine(latent_files, latents_key), mine(cond_files, conds_key)
        count = sum(len(items[span]) for _, span in todo_latents) + sum(len(captions[span]) for _, span in todo_conds)
        logger.info("%s: %d %s, %d captions, cache %s", self.path, len(items), self.what, len(captions), folder)
        show = progress and rank == 0 and count > 0
        with tqdm(total=count, desc="encode", disable=not show) as bar, ThreadPoolExecutor(threads()) as pool:
            for file, span in todo_latents:
                latents, kept, lost = latents_of(family, items[span], views, self.vae_batch, shape, pool, bar.update)
                save(file, {"latents": latents}, {"key": latents_key, "kept": kept, "bad": lost})
            for file, span in todo_conds:
                save(file, conds_of(family, captions[span], bar.update), {"key": conds_key})
        barrier()
        headers = {file: header_of(file, latents_key) for file in latent_files}
        headers |= {file: header_of(file, conds_key) for file in cond_files}
        missing = [str(file) for file, header in headers.items() if header is None]
        if missing:
            raise DataError(f"{missing[0]} is not there or not whole; all processes must share cache_dir {self.cache}")
        entries, bad_rows = index_of(items, captions, [headers[file] or {} for file in latent_files])
        # every process sees the same rows here, so that all of them stop or none
        total = found.total if len(items) == len(found) else items[-1].id + 1  # rows beyond the limit do not count
        bad = sorted([*found.bad, *bad_rows], key=lambda row: row.row)
        bad = [row for row in bad if row.row < total]
        check_bad(bad, total, self.max_bad_share, self.report if rank == 0 else None)
        if not entries:
            raise DataError(f"{self.path}: none of {len(items)} {self.what} is readable")
        if rank == 0:
            index = {"key": latents_key, "layout": found.layout, "ties": found.ties, "captions": captions}
            rows = {self.what: [asdict(entry) for entry in entries], "bad": [asdict(row) for row in bad]}
            write_text(folder / "index.json", json.dumps(index | rows, ensure_ascii=False))
        return self.opened(latent_files, cond_files, entries, captions)


class EncodedPairs(Encodings):
    """The cached pairs."""

    def batch(self, indices: Sequence[int], variants: Sequence[int] | None = None) -> PairBatch:
        return PairBatch(*self.rows(indices, variants))


@dataclass
class PreferencePairs(Encoded):
    """A preference data set in any layout that :func:`read_pairs` knows, and how its pictures are cut.

    Args:
        ties: drop rows that have no winner, or stop at them (error).
        image_root: folder that relative picture paths start from; default the folder of the file that names them.
    """

    ties: Literal["drop", "error"] = "drop"
    image_root: str | None = None

    batch_type: ClassVar[type] = PairBatch
    what: ClassVar[str] = "pairs"
    pictures: ClassVar[int] = 2
    opened: ClassVar[type[Encodings]] = EncodedPairs

    def read(self) -> ItemSet:
        return read_pairs(
            self.path, self.split, self.ties, self.max_bad_share, self.report, self.caption_column, self.image_root
        )


def read_pairs(
    path: str | Path,
    split: str | None = None,
    ties: Literal["drop", "error"] = "drop",
    max_bad_share: float = 0.01,
    report: Path | None = None,
    caption_column: str | None = None,
    image_root: str | Path | None = None,
) -> ItemSet:
    """The preference pairs at ``path``: a file, a folder or a hub id, in one of its ``LAYOUTS``
    (:mod:`rewards.data.preferences`).

    Args:
        path: what to read.
        split: which split of a hub id (default ``train``) or of a folder that holds several.
        ties: leave out rows without a winner, or stop at them.
        max_bad_share: stop when more of the rows than this are unusable.
        report: JSONL file that gets a line for each unusable row.
        caption_column: the caption's name where it is not one of :data:`rewards.data.records.CAPTIONS`.
        image_root: folder that relative picture paths start from; default the folder of the file that names them.

    Raises:
        DataError: nothing at ``path``, no known layout, ties where refused, or too many bad rows.
    """
    layout, files, rows = recognise(locate(str(path)), split, caption_column, Path(image_root) if image_root else None)
    logger.info("%s: %s", path, layout)
    pairs, bad, tied, total = list[Pair](), list[Bad](), 0, 0
    for total, row in enumerate(rows, 1):
        fault = row.fault()
        if fault:
            bad.append(Bad(total - 1, row.source, fault))
        elif row.sides is None:
            if ties == "error":
                raise DataError(f"{row.source} is a tie; remove it, or drop ties with ties: drop")
            tied += 1
        else:
            pairs.append(Pair(total - 1, row.source, str(row.caption).strip(), *row.sides))
    logger.info("%s: %d pairs, %d ties left out, %d bad rows", path, len(pairs), tied, len(bad))
    check_bad(bad, total, max_bad_share, report)
    if not pairs:
        raise DataError(f"{path} ({layout}) holds no usable pair: {total} rows, {tied} ties, {len(bad)} bad")
    return ItemSet(layout, pairs, bad, tied, total, files)
