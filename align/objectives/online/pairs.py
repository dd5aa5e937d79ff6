"""Which image of a prompt is preferred to which: pairs (P, 2) of image numbers, winner first."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor


def preferences(scores: Tensor, groups: Tensor) -> Tensor:
    """(P, 2) pairs of one group, winner first, from ``scores`` (N, J), higher is better: the winner is nowhere worse
    and somewhere better (Pareto dominance), else it is a tie and no pair."""
    pairs = []
    for group in torch.unique(groups):
        for a, b in combinations((groups == group).nonzero().flatten().tolist(), 2):
            better, worse = scores[a] > scores[b], scores[a] < scores[b]
            if better.any() and not worse.any():
                pairs.append((a, b))
            elif worse.any() and not better.any():
                pairs.append((b, a))
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)


def best_over_worst(scores: Tensor, groups: Tensor, chosen: Tensor) -> Tensor:
    """(P, 2) the best over the worst of each group, by ``scores`` (N,), where both are ``chosen`` (N,) and differ."""
    pairs = []
    for group in torch.unique(groups):
        members = ((groups == group) & chosen).nonzero().flatten()
        if len(members) > 1:
            best, worst = members[scores[members].argmax()], members[scores[members].argmin()]
            if scores[best] > scores[worst]:
                pairs.append((int(best), int(worst)))
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
