"""Rankings as preference pairs: a folder for each prompt, with ``prompt.txt`` and images named by their place."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from align.data.captioned import EncodedData
from align.data.dataset import Bad, Example, Rows
from align.data.preferences import PairBatch
from rewards.data.tables import LazyImage


@dataclass
class RankedFolders(EncodedData):
    """``PATH/ANY_NAME/{prompt.txt, 1.png, 2.png, ..}``, the best image first: every two of a folder are a pair."""

    batch_type = PairBatch
    what = "pairs"

    def rows(self) -> Rows:
        return "ranked folders", [], self._pairs(sorted(Path(self.path).glob("*/prompt.txt")))

    def _pairs(self, prompts: list[Path]) -> Iterator[Example | Bad]:
        count = itertools.count()
        for prompt in prompts:
            caption = prompt.read_text(encoding="utf-8").strip()
            ranked = sorted((f for f in prompt.parent.glob("*.png") if f.stem.isdecimal()), key=lambda f: int(f.stem))
            for chosen, rejected in itertools.combinations(map(LazyImage, ranked), 2):
                number, source = next(count), f"{prompt.parent.name}/{chosen.file.name} over {rejected.file.name}"
                if caption:
                    yield Example(number, source, caption, (chosen, rejected))
                else:
                    yield Bad(number, source, "prompt.txt is empty")
