"""GARDO's gate: which images are held to the reference, what the unlike ones are worth, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from align.common.errors import UserError
from align.objectives import AWM, NFT
from align.objectives.online.forward_process import distance, predict_noised
from align.objectives.online.gate import Gate, isolation, ranks
from align.objectives.online.rewards import Scorer
from align.policy.policy import LoRA, Policy
from align.sampling.sampler import Sampler
from tests.helpers import Bright, Heard, gradients, moved, rolled
from tests.pipelines import Build
from tests.test_policy import disturb


class Red(Bright):
    """What a brighter picture need not have."""

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))


def scorer() -> Scorer:
    return Scorer({"bright": Bright(), "red": Red()}, {"bright": 1.0})


def test_ranks_are_shares_of_what_is_beaten() -> None:
    assert ranks(torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0])).tolist() == [1.0, 0.25, 0.625, 0.625, 0.0]
    assert ranks(torch.zeros(4)).tolist() == [0.5] * 4


def test_images_in_doubt_are_those_that_auxiliary_rewards_rank_lower() -> None:
    total = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    scores = {"a": torch.tensor([0.0, 3.0, 2.0, 1.0, 4.0]), "b": torch.tensor([2.0, 1.0, 3.0, 0.0, 4.0])}
    gate = Gate(["a", "b"], share=0.4)  # ranks a: 0 .75 .5 .25 1, b: .5 .25 .75 0 1, u: .75 .25 -.125 .125 -1
    assert gate.held(total, scores).tolist() == [True, True, False, False, False]
    assert Gate(["a", "b"], share=1.0).held(total, scores).tolist() == [True, True, False, True, False]
    assert not Gate(["a"], share=1.0).held(total, {"a": total}).any()  # no doubt


def test_an_image_unlike_the_others_of_its_prompt_is_worth_more() -> None:
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0], [5.0, 5.0]])
    found = isolation(features, torch.tensor([0, 0, 0, 1, 1, 1]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 3.0, 1.0, 1.0, 1.0]).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [NFT, AWM])
def test_only_the_images_in_doubt_are_held_and_asked_about(tiny: Build, kind: type[Any]) -> None:
    policy = moved(tiny, "flow")
    free = kind(Sampler(3, guidance_scale=1.0), images_per_prompt=4)
    gated = replace(free, kl_weight=2.0, gate=Gate(["red"], share=0.5, diversity=False))
    heard = Heard(policy)
    ctx, rows = rolled(gated, policy, scorer=scorer())
    held = rows.held[rows.image]
    assert 0 < held.sum() < len(rows)
    assert heard.rows(trained=False) == 8 * 3 + len(rows) + int(held.sum())
    disturb(policy, 0.2)
    loss, metrics = gated.loss(ctx, rows)
    without, _ = free.loss(ctx, replace(rows, reference=None))
    new = predict_noised(ctx, rows)[0]
    with policy.reference(), torch.no_grad():
        answer = predict_noised(ctx, rows)[0].raw
    kl = (distance(new, answer) * held).mean()
    assert metrics["kl_reference"].item() == pytest.approx(kl.item(), rel=1e-4) and kl > 0
    assert loss.item() == pytest.approx((without + 2 * kl).item(), rel=1e-4)
    parts = [(len(p), gradients(policy, gated.loss(ctx, p)[0])) for p in rows.chunks(5)]
    whole = gradients(policy, gated.loss(ctx, rows)[0])
    torch.testing.assert_close(sum(n * g for n, g in parts) / len(rows), whole, rtol=1e-3, atol=1e-6)


def test_positive_advantages_alone_grow_with_distance(tiny: Build) -> None:
    policy = moved(tiny, "flow")
    objective = AWM(Sampler(3, guidance_scale=1.0), images_per_prompt=4, kl_weight=1.0, gate=Gate(["red"]))
    _, plain = rolled(replace(objective, gate=None), policy, scorer=scorer())
    _, spread = rolled(objective, policy, scorer=scorer())
    good = plain.advantage > 0
    assert torch.equal(spread.advantage[~good], plain.advantage[~good])
    ratio = spread.advantage[good] / plain.advantage[good]
    lonely = isolation(plain.x0.flatten(1), torch.arange(2).repeat_interleave(4))[good]
    torch.testing.assert_close(ratio.double(), lonely, rtol=1e-3, atol=1e-3)
    assert ratio.std() > 0.01


def test_the_reference_is_moved_to_the_weights(tiny: Build) -> None:
    torch.manual_seed(0)
    policy = Policy(tiny("flow"), LoRA(2))
    gate = Gate(["red"], share=1.0, diversity=False, refresh=2)
    objective = AWM(Sampler(3, 1.0), images_per_prompt=4, kl_weight=1.0, gate=gate)
    objective.prepare(policy, scorer())
    disturb(policy, 0.3)
    far = [
        objective.loss(*rolled(objective, policy, step=step, scorer=scorer()))[1]["kl_reference"].item()
        for step in (0, 1, 2)
    ]
    assert far[0] > 1e-4 and far[1] > 1e-4 and far[2] == pytest.approx(0, abs=1e-9)


def test_gates_that_cannot_be_are_refused(tiny: Build) -> None:
    with pytest.raises(ValueError, match="gate: name auxiliary rewards"):
        Gate([])
    with pytest.raises(ValueError, match="kl_weight, which is 0"):
        NFT(gate=Gate(["red"]))
    policy = Policy(tiny("flow"), LoRA(2))
    with pytest.raises(UserError, match="gate: bright is no reward of weight 0; there are red"):
        NFT(kl_weight=1.0, gate=Gate(["bright"])).prepare(policy, scorer())
    with pytest.raises(UserError, match="only the reference of a LoRA can be moved"):
        NFT(kl_weight=1.0, gate=Gate(["red"], refresh=5)).prepare(Policy(tiny("flow"), None), scorer())
