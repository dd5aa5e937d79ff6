"""The pictures that a model draws of given prompts, kept as files: drawn once, batch by batch, by any number of
processes, and whole after any kill.

| in the folder | holds |
|---|---|
| ``00000.png``, .. | the pictures, in the order of what was asked for |
| ``metadata.jsonl`` | a line each: ``file_name``, ``prompt``, ``seed``, and what the prompt file says of the prompt |
| ``drawn.json`` | what the pictures depend on: model, sampler, prompts |

``python -m rewards.score FOLDER`` scores them again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from align.common.errors import UserError
from align.common.resolution import Resolution, sides
from align.evaluation.gallery import save_png, to_pil
from align.families import Family
from align.families.identity import draws
from align.sampling.generate import draw
from rewards.common.device import Launched
from rewards.common.files import discard, reached, write_text
from rewards.data.images import ImageRow, ImageSource, decode_tensor

logger = logging.getLogger(__name__)

RECORD, METADATA = "drawn.json", "metadata.jsonl"
PATIENCE = 1800  # seconds to wait for another process's next picture


def noise_seed(prompt: str, sample: int, seed: int) -> int:
    """The seed of picture ``sample`` of ``prompt``: the first 8 bytes of BLAKE2b of the three, as JSON, without the
    highest bit. The noise is named by what is drawn, so that subsets, order and sharding of a list change no picture.
    """
    text = json.dumps([prompt, sample, seed], ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def folder_name(name: str, others: Sequence[str]) -> str:
    """``name`` as a folder may be called, and as none of ``others`` is: letters, digits and ``._+-``."""
    safe = re.sub(r"[^\w.+-]+", "_", name).strip("._") or "model"
    return safe if safe not in others else next(n for k in itertools.count(2) if (n := f"{safe}-{k}") not in others)


@dataclass(frozen=True)
class Wanted:
    """A picture to draw: of ``prompt``, from ``manual_seed(seed)``; ``metadata`` is what else rewards read of it."""

    prompt: str
    seed: int
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn; None is the pipeline's own."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    resolution: Resolution = None

    def resolved(self, family: Family) -> dict[str, Any]:
        """What every number that is measured on the pictures depends on, in words and numbers."""
        steps, scale = self.num_inference_steps, self.guidance_scale
        _, rows, columns = family.latent_shape(*sides(self.resolution))
        return {
            "pipeline": type(family.pipe).__name__,
            "sampler": family.prediction_type,
            "num_inference_steps": family.default_num_inference_steps if steps is None else steps,
            "guidance_scale": family.default_guidance_scale if scale is None else scale,
            "resolution": self.resolution,
            "latents": [rows, columns],
            "dtype": str(family.dtype).removeprefix("torch."),
        }


class PictureFolder:
    """``wanted`` as ``family`` draws them, in ``path``. What is there of the same pictures stays; others' go, unless
    people have ``judged`` them.

    A batch is always made of the same pictures, so that one drawn again after a kill is the same to the byte.
    """

    def __init__(self, path: Path, wanted: Sequence[Wanted], batch_size: int, judged: bool = False) -> None:
        self.path, self.wanted, self.judged = path, wanted, judged
        self.batches = [slice(k, min(k + batch_size, len(wanted))) for k in range(0, len(wanted), batch_size)]
        self.record: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, number: int) -> Tensor:
        """(3, H, W) in [0, 1]."""
        return decode_tensor(self.file(number)).float().div_(255)

    def split(self, size: int) -> Iterator[Tensor]:
        """All of them, (at most ``size``, 3, H, W) at a time."""
        for start in range(0, len(self), size):
            yield torch.stack([self[number] for number in range(start, min(start + size, len(self)))])

    def file(self, number: int) -> Path:
        return self.path / f"{number:05d}.png"

    def source(self) -> ImageSource:
        """The pictures as scoring reads them."""
        rows = [
            ImageRow(self.file(k).name, one.prompt, self.file(k), one.metadata) for k, one in enumerate(self.wanted)
        ]
        identity = {"layout": "drawn", "digest": hashlib.sha256(json.dumps(self.record).encode()).hexdigest()}
        return ImageSource(
            identity, len(rows), lambda wanted: (row if wanted(n) else None for n, row in enumerate(rows)), rows
        )

    def draw(self, family: Family, drawing: Drawing, launched: Launched, progress: str) -> None:
        """Draw what is missing; the first process returns when all is there. Raises :class:`UserError` where another
        one does not deliver."""
        self.record = drawing.resolved(family) | {
            "contents": draws(family),
            "pictures": hashlib.sha256(json.dumps([asdict(one) for one in self.wanted]).encode()).hexdigest(),
        }
        # what no grid has is refused before anything is written
        family.grid(self.record["num_inference_steps"], *sides(drawing.resolution))
        self._start(launched)
        mine = self.batches[launched.rank :: launched.world]
        todo = [part for part in mine if not self._whole(part)]
        texts = [[one.prompt for one in self.wanted[part]] for part in todo]
        seeds = [[one.seed for one in self.wanted[part]] for part in todo]
        settings = drawing.num_inference_steps, drawing.guidance_scale, drawing.resolution
        count = sum(part.stop - part.start for part in mine)
        done = count - sum(map(len, texts))
        with tqdm(total=count, initial=done, desc=progress, unit="image", disable=launched.rank > 0) as bar:
            for part, images in zip(todo, draw(family.predict, family, texts, seeds, *settings), strict=True):
                self._require_kept([])  # or the rest would lie in a folder that nobody knows
                for number, image in zip(range(part.start, part.stop), images, strict=True):
                    save_png(to_pil(image), self.file(number))
                bar.update(len(images))
        if not launched.rank:
            self._require_kept(self.batches if launched.world == 1 else [])
            self._wait(lambda: sum(self._whole(part) for part in self.batches), len(self.batches), "pictures")

    def _whole(self, part: slice) -> bool:
        return all(self.file(number).is_file() for number in range(part.start, part.stop))

    def _require_kept(self, drawn: Sequence[slice]) -> None:
        if not (self._same() and all(map(self._whole, drawn))):
            raise UserError(
                f"{self.path} was moved, deleted or changed while it was drawn; remove what is left of it and run the "
                "command again"
            )

    def _record_text(self) -> str:
        return json.dumps(self.record, indent=2) + "\n"

    def _same(self) -> bool:
        here = json.loads(self._record_text())
        try:
            there: Any = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
            if "weights" in there:  # of an earlier version, which told no more of the contents
                there["contents"] = here["contents"] | there.pop("weights")
        except (OSError, ValueError, TypeError, AttributeError):
            return False
        return bool(there == here)

    def _start(self, launched: Launched) -> None:
        """The record of these pictures in place of any other's, whose pictures go."""
        path = self.path / RECORD
        if launched.rank:
            if not self._same():  # which may take as long as somebody takes to start it
                logger.warning("%s: waiting for the first process or shard, up to %d s", self.path, PATIENCE)
            self._wait(self._same, 1, RECORD)
        elif not self._same():
            if self.path.exists():
                if not path.is_file():
                    raise UserError(f"{self.path} is there and was not drawn by this command; give another output_dir")
                if self.judged:
                    raise UserError(
                        f"{self.path} holds pictures of another model or other settings, and people have judged them; "
                        "give another --output"
                    )
                logger.warning("%s holds pictures of another model or other settings; they are drawn again", self.path)
                discard(self.path)
            rows = [
                {**one.metadata, "file_name": self.file(k).name, "prompt": one.prompt, "seed": one.seed}
                for k, one in enumerate(self.wanted)
            ]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(self.path / METADATA, lines)
            write_text(path, self._record_text())

    def _wait(self, count: Callable[[], int], wanted: int, what: str) -> None:
        """Until ``count()`` is ``wanted``; :class:`UserError` where it stands still."""
        if not reached(count, wanted, PATIENCE, pause=0.2):
            raise UserError(
                f"{self.path}: the {what} of another process have not come within {PATIENCE} s; "
                "run the command again to draw what is missing"
            )
