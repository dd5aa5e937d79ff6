from __future__ import annotations

import pytest
import torch

from align.families import Conditioning
from align.objectives.rows import Rows


def table() -> Rows:
    image = torch.tensor([0, 0, 0, 1, 1, 2])
    rows = {"t": torch.arange(6)}
    images = {"advantage": torch.tensor([1.0, 2.0, 3.0]), "cond": Conditioning({"e": torch.arange(3)[:, None]})}
    return Rows(rows, images, image)


def test_image_columns_are_looked_up_per_row() -> None:
    assert table().tensor("advantage").tolist() == [1, 1, 1, 2, 2, 3]
    assert table().cond()["e"].flatten().tolist() == [0, 0, 0, 1, 1, 2]


def test_chunks_cover_every_row_once() -> None:
    chunks = list(table().chunks(4))
    assert [len(c) for c in chunks] == [4, 2]
    assert torch.cat([c.tensor("t") for c in chunks]).tolist() == list(range(6))


def test_shuffle_keeps_an_image_together() -> None:
    seen = set()
    for seed in range(20):
        mixed = table().shuffled(torch.Generator().manual_seed(seed))
        assert sorted(mixed.tensor("t").tolist()) == list(range(6))
        order = mixed.image.tolist()
        assert [order[k] for k in range(6) if k == 0 or order[k] != order[k - 1]] == list(dict.fromkeys(order))
        assert torch.equal(mixed.tensor("advantage"), mixed.image + 1.0)
        seen.add(tuple(dict.fromkeys(order)))
    assert len(seen) == 6


def test_wrong_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="6 rows"):
        Rows({"t": torch.arange(5)}, {}, torch.zeros(6, dtype=torch.long))
    with pytest.raises(ValueError, match="both per row and per image"):
        Rows({"t": torch.arange(1)}, {"t": torch.arange(1)}, torch.zeros(1, dtype=torch.long))
