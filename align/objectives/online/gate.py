"""Against hacking a reward: GARDO (He et al. 2025, arXiv 2512.24138), whose KL holds back only what is in doubt.

An image is in doubt as far as the reward that trains ranks it higher, among those of the rollout, than auxiliary
rewards do, which are not trained on:

    u_i = rank_i(r) - mean over auxiliary rewards of rank_i(r_aux)      rank: the share of images that i beats

The ``share`` of images with the largest u > 0 is held to the reference, the rest is free of it. The reference is
moved to the weights from time to time, or it would hold back all progress in the end. And among the images of a
prompt a good one is worth more where it is unlike the others: A > 0 is multiplied by its distance, 1 - cos, to the
nearest other over the mean of these in its group.

In the authors' code (tinnerhrhe/GARDO, 1cc77fb) ranks count from the best (1) and u is taken with the same sign, so
that it gates what the trained reward ranks lower; ours follows the paper. Its distances are DINOv3's, ours those of
the final latents, and its share and its reference move by thresholds on the rollout, ours by numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from align.common.errors import UserError
from align.objectives.online.rewards import Scorer
from align.policy.policy import Policy


def ranks(values: Tensor) -> Tensor:
    """(N,) the share of the others that each of ``values`` (N,) beats; a tie is one half."""
    beaten = (values[:, None] > values).double() + 0.5 * (values[:, None] == values).double()
    return (beaten.sum(1) - 0.5) / max(len(values) - 1, 1)


def isolation(features: Tensor, groups: Tensor) -> Tensor:
    """(N,) how far ``features`` (N, D) of each element are from the nearest other of its group, 1 - cos, over the mean
    of that in the group; 1 where all are alike."""
    unit = F.normalize(features.double(), dim=1)
    apart = 1 - unit @ unit.T
    apart = apart.masked_fill((groups[:, None] != groups) | torch.eye(len(groups), dtype=torch.bool), torch.inf)
    nearest = apart.amin(1).clamp(min=0)
    for group in torch.unique(groups):
        members = groups == group
        mean = nearest[members].mean()
        nearest[members] = nearest[members] / mean if mean > 0 else 1.0
    return nearest


@dataclass
class Gate:
    """What of a rollout is held to the reference.

    Args:
        auxiliary: labels of rewards of weight 0, by which the trained one is doubted.
        share: of the images, which is held at most.
        diversity: positive advantages grow with an image's distance to the nearest other of its prompt.
        refresh: rollouts after which the reference is moved to the weights; null never does. It begins at those that
            the run starts from, and needs a LoRA.
    """

    auxiliary: list[str]
    share: float = 0.1
    diversity: bool = True
    refresh: int | None = None

    def __post_init__(self) -> None:
        if not self.auxiliary or not 0 < self.share <= 1 or (self.refresh is not None and self.refresh < 1):
            raise ValueError("gate: name auxiliary rewards, a share above 0 and at most 1, a refresh of at least 1")

    def require(self, policy: Policy, scorer: Scorer | None) -> None:
        """Have a reference that can be moved, where that is asked. Raises :class:`UserError` for rewards that there are
        not, and a reference that cannot be."""
        known = sorted(scorer.rewards.keys() - scorer.weights.keys()) if scorer else []
        if unknown := sorted(set(self.auxiliary) - set(known)):
            raise UserError(
                f"gate: {', '.join(unknown)} is no reward of weight 0; there are {', '.join(known) or 'none'}"
            )
        if self.refresh:
            policy.anchor()

    def held(self, total: Tensor, scores: Mapping[str, Tensor]) -> Tensor:
        """(N,) which images are held, by the trained reward (N,) and all ``scores``, of all processes."""
        doubt = ranks(total) - torch.stack([ranks(scores[name]) for name in self.auxiliary]).mean(0)
        least = doubt.topk(max(1, round(self.share * len(doubt)))).values[-1]
        return (doubt >= least) & (doubt > 0)
