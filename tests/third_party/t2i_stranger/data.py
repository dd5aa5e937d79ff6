"""Rankings as preference pairs: a folder for each prompt, with ``prompt.txt`` and images named by their place."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from align.common.errors import DataError
from align.data.dataset import Bad, ItemSet, Pair, check_bad
from align.data.preferences import Encoded, EncodedPairs, Encodings, PairBatch
from rewards.data.tables import LazyImage


@dataclass
class RankedFolders(Encoded):
    """``PATH/ANY_NAME/{prompt.txt, 1.png, 2.png, ..}``, the best image first: every two of a folder are a pair."""

    batch_type: ClassVar[type] = PairBatch
    what: ClassVar[str] = "pairs"
    pictures: ClassVar[int] = 2
    opened: ClassVar[type[Encodings]] = EncodedPairs

    def read(self) -> ItemSet:
        pairs, bad, total = list[Pair](), list[Bad](), 0
        for folder in sorted(file.parent for file in Path(self.path).glob("*/prompt.txt")):
            caption = (folder / "prompt.txt").read_text(encoding="utf-8").strip()
            ranked = sorted((file for file in folder.glob("*.png") if file.stem.isdecimal()), key=lambda f: int(f.stem))
            for chosen, rejected in itertools.combinations(map(LazyImage, ranked), 2):
                source = f"{folder.name}/{chosen.file.name} over {rejected.file.name}"
                if caption:
                    pairs.append(Pair(total, source, caption, chosen, rejected))
                else:
                    bad.append(Bad(total, source, "prompt.txt is empty"))
                total += 1
        check_bad(bad, total, self.max_bad_share, self.report)
        if not pairs:
            raise DataError(f"{self.path} holds no ranking; expected folders with prompt.txt, 1.png, 2.png, ..")
        return ItemSet("ranked folders", pairs, bad, 0, total, [])
