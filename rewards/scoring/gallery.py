"""The page with the best and the worst images, by the scores that were written."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from rewards.common.page import Card, Figure, Page
from rewards.data.images import ImageSource
from rewards.scoring.output import BadRows, ScoreShards


def gallery(
    shards: ScoreShards, count: int, source: ImageSource, rewards: Sequence[str], bad: BadRows, size: int
) -> str:
    """The HTML of the ``size`` best and, of the others, the ``size`` worst images by the first reward."""
    import pyarrow as pa

    order = rewards[0]
    table = pa.concat_tables([shards.read(n) for n in range(count)])
    numbers = [n for n in range(table.num_rows + len(bad)) if n not in bad]
    ranked = np.argsort(-table[order].to_numpy(), kind="stable").tolist()
    parts = {"best": ranked[:size], "worst": ranked[size:][-size:][::-1]}
    wanted = {numbers[place]: place for places in parts.values() for place in places}
    shown = {}
    for number, row in enumerate(itertools.islice(source.rows(wanted.__contains__), max(wanted) + 1)):
        if row is not None:
            cells = {name: column[0] for name, column in table.slice(wanted[number], 1).to_pydict().items()}
            image = Image.fromarray(row.read().permute(1, 2, 0).numpy())
            scores = {name: cells[name] for name in rewards}
            shown[wanted[number]] = Figure(image, cells["file"], scores, cells["prompt"] or "")
    cards = [Card(f"{len(places)} {name}", [shown[k] for k in places]) for name, places in parts.items() if places]
    return Page(f"{table.num_rows} images by {order}", cards=cards).html()
