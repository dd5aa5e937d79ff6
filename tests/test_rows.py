"""Rows of a rollout: taken, shuffled by image and cut into chunks, with what images share left whole."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from align.objectives.rows import SHARED, Rows


@dataclass(frozen=True, kw_only=True)
class ToyRows(Rows):
    t: Tensor
    advantage: Tensor = field(metadata=SHARED)


def toy() -> ToyRows:
    return ToyRows(image=torch.tensor([0, 0, 0, 1, 1, 2]), t=torch.arange(6), advantage=torch.tensor([1.0, 2.0, 3.0]))


def test_what_images_share_is_not_cut() -> None:
    part = toy().take(torch.tensor([5, 3]))
    assert part.t.tolist() == [5, 3] and part.image.tolist() == [2, 1]
    assert part.advantage.tolist() == [1, 2, 3]
    assert part.advantage[part.image].tolist() == [3, 2]


def test_chunks_cover_every_row_once() -> None:
    chunks = list(toy().chunks(4))
    assert [len(c) for c in chunks] == [4, 2]
    assert torch.cat([c.t for c in chunks]).tolist() == list(range(6))


def test_shuffle_keeps_an_image_together() -> None:
    orders = set()
    for seed in range(20):
        mixed = toy().shuffled(torch.Generator().manual_seed(seed))
        assert sorted(mixed.t.tolist()) == list(range(6))
        order = mixed.image.tolist()
        assert [order[k] for k in range(6) if k == 0 or order[k] != order[k - 1]] == list(dict.fromkeys(order))
        assert torch.equal(mixed.advantage[mixed.image], mixed.image + 1.0)
        orders.add(tuple(dict.fromkeys(order)))
    assert len(orders) == 6


def test_wrong_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="6 rows"):
        ToyRows(image=torch.zeros(6, dtype=torch.long), t=torch.arange(5), advantage=torch.ones(1))
