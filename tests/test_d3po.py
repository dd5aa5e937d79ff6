"""D3PO: the loss and its bounds, the reference, preferences from several rewards, what a rollout asks the network."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from align.objectives import Context
from align.objectives.d3po import D3PO, D3PORows
from align.objectives.online.pairs import preferences
from align.objectives.online.replay import log_probs
from align.objectives.online.rewards import Scorer
from align.policy.policy import LoRA, Policy
from align.sampling.sampler import Sampler, SDEWindow
from tests.helpers import Bright, Fixed, Flat, Heard, Toy, bright, gradients, moved, rolled
from tests.pipelines import Build
from tests.test_policy import disturb

KINDS = ("epsilon", pytest.param("v", marks=pytest.mark.slow), "flow")
LORAS = [
    pytest.param(
        lora, kind, marks=[] if (lora is None, kind) in ((False, "flow"), (True, "epsilon")) else pytest.mark.slow
    )
    for lora in (LoRA(2), None)
    for kind in ("epsilon", "v", "flow")
]


@pytest.mark.parametrize(("lora", "kind"), LORAS)
def test_the_loss_starts_at_ln_2(tiny: Build, kind: str, lora: LoRA | None) -> None:
    torch.manual_seed(0)
    policy, objective = Policy(tiny(kind), lora), D3PO(Sampler(3, 2.0))
    ctx, table = rolled(objective, policy)
    assert len(table) == 2 * 3
    loss, metrics = objective.loss(ctx, table)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert abs(metrics["ratio_mean"] - 1) < 1e-5 and metrics["clip_fraction"] == 0
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in policy.parameters())


@pytest.mark.parametrize("scale", [0.01, pytest.param(0.3, marks=pytest.mark.slow), 3.0])
def test_the_clamp_bounds_the_loss(tiny: Build, scale: float) -> None:
    """|argument| <= 0.1 (ln 1.1 - ln 0.9): the sigmoid never leaves its straight part, whatever the weights."""
    torch.manual_seed(0)
    policy, objective = Policy(tiny("epsilon"), LoRA(2)), D3PO(Sampler(3, 1.0))
    ctx, table = rolled(objective, policy)
    disturb(policy, scale)
    found = [objective.loss(ctx, row)[0].item() for row in table.chunks(1)]
    assert all(0.68316 - 1e-5 <= loss <= 0.70323 + 1e-5 for loss in found)
    assert len(set(found)) > 1
    if scale == 3.0:
        _, metrics = objective.loss(ctx, table)
        assert metrics["clip_fraction"] > 0.5


def test_the_bounds_are_reached() -> None:
    toy, objective = Toy(3.0), D3PO(Sampler(1, 1.0, Fixed(1.0)))
    y = torch.tensor([[3.0], [-3.0]], dtype=torch.float64)
    rows = pairs_of(toy, objective, y, torch.tensor([[0, 1], [1, 0]]))
    best, worst = (objective.loss(toy.context(2), row)[0].item() for row in rows.chunks(1))
    assert (best, worst) == (pytest.approx(0.68316, abs=1e-5), pytest.approx(0.70323, abs=1e-5))


def pairs_of(toy: Toy, objective: D3PO, y: Tensor, pairs: Tensor) -> D3PORows:
    return objective.rows_of(toy.context(len(y)), toy.trajectories(y), pairs, {})


def test_ties_make_no_rows_and_order_does_not_matter(tiny: Build) -> None:
    policy, objective = moved(tiny, "epsilon"), D3PO(Sampler(2, 1.0))
    ctx, table = rolled(objective, policy, scorer=Scorer({"flat": Flat()}, {"flat": 1.0}))
    assert len(table) == 0 and table.metrics["tie_share"] == 1
    ctx, table = rolled(objective, policy)
    assert table.metrics["tie_share"] == 0
    loss, _ = objective.loss(ctx, table)
    other, _ = objective.loss(ctx, replace(table, winner=table.loser, loser=table.winner))
    assert abs(loss - other) > 1e-5
    same = replace(table, loser=table.winner)
    equal, _ = objective.loss(ctx, same)
    assert equal.item() == pytest.approx(math.log(2), abs=1e-6)
    assert gradients(policy, equal).abs().max() < 1e-6


def test_which_of_the_two_comes_first_does_not_matter() -> None:
    toy, objective = Toy(0.3, anchor=0.25), D3PO(Sampler(1, 1.0, Fixed(0.5)))
    y = torch.tensor([[0.9, 0.1], [-0.4, 0.2]], dtype=torch.float64)
    one, _ = objective.loss(toy.context(2), pairs_of(toy, objective, y, torch.tensor([[0, 1]])))
    two, _ = objective.loss(toy.context(2), pairs_of(toy, objective, y.flip(0), torch.tensor([[1, 0]])))
    assert one == two != math.log(2)


@pytest.mark.parametrize("outside", [0.6, 1.6])
@pytest.mark.parametrize("side", ["winner", "loser"])
def test_outside_the_band_a_member_has_no_gradient_at_all(outside: float, side: str) -> None:
    """In both directions, unlike PPO's min. The other member, inside the band, keeps its own."""
    inside = 1.02
    toy, objective = Toy(0.3), D3PO(Sampler(1, 1.0, Fixed(0.5)))
    y = torch.tensor([[0.9], [-0.4]], dtype=torch.float64)
    rows = pairs_of(toy, objective, y, torch.tensor([[0, 1]]))
    now = log_probs(toy.context(2), objective.sampler, toy.trajectories(y), 2)
    ratios = (outside, inside) if side == "winner" else (inside, outside)
    reference = now - torch.tensor(ratios, dtype=torch.float64).log()[:, None]
    table = replace(rows, reference=reference)
    loss, metrics = objective.loss(toy.context(2), table)
    (found,) = torch.autograd.grad(loss, toy.theta)
    sign, kept = (1, 1) if side == "winner" else (-1, 0)  # the member that still has a gradient
    clamped = min(max(outside, 0.9), 1.1)
    logit = 0.1 * (math.log(clamped) - math.log(inside)) * sign
    slope = -1 / (1 + math.exp(logit)) * 0.1 * (-sign)
    assert float(found) == pytest.approx(slope * (float(y[kept]) - 0.3) / 0.5**2)
    assert metrics["clip_fraction"] == 0.5
    both = replace(rows, reference=now - math.log(outside))
    (nothing,) = torch.autograd.grad(objective.loss(toy.context(2), both)[0], toy.theta)
    assert nothing == 0


def test_the_optimum_of_a_toy() -> None:
    """a, b ~ N(mu, s^2), P(a over b) = sigmoid(k (a - b)): the best shift from the reference is k s^2 / beta."""
    mu, std, k, beta, count = 0.5, 0.8, 2.0, 16.0, 40_000
    generator = torch.Generator().manual_seed(0)
    y = mu + std * torch.randn(2 * count, 1, dtype=torch.float64, generator=generator)
    first = torch.arange(count)
    a, b = y[:count, 0], y[count:, 0]
    wins = torch.rand(count, dtype=torch.float64, generator=generator) < torch.sigmoid(k * (a - b))
    pairs = torch.stack([torch.where(wins, first, first + count), torch.where(wins, first + count, first)], 1)
    toy = Toy(mu, anchor=mu)
    objective = D3PO(Sampler(1, 1.0, Fixed(std)), beta=beta, clip_range=0.49, reference_batch=2 * count)
    rows = pairs_of(toy, objective, y, pairs)
    for _ in range(6):  # Newton
        loss, metrics = objective.loss(toy.context(2 * count), rows)
        (slope,) = torch.autograd.grad(loss, toy.theta, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, toy.theta)
        toy.theta.data -= slope.detach() / curvature
        assert metrics["clip_fraction"] < 1e-3
    assert abs(slope) < 1e-5
    assert toy.theta.item() - mu == pytest.approx(k * std**2 / beta, rel=0.03)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_members_share_noise_and_step(tiny: Build, kind: str) -> None:
    policy, objective = moved(tiny, kind), D3PO(Sampler(3, 1.0), images_per_prompt=3)
    _, table = rolled(objective, policy)
    latents = table.trajectories.latents
    winner, loser = table.winner, table.loser
    assert torch.equal(latents[winner, 0], latents[loser, 0])
    assert not any(torch.equal(latents[w, 1], latents[s, 1]) for w, s in zip(winner, loser, strict=True))
    assert len({tuple(row.flatten().tolist()) for row in latents[:, 0]}) == 2  # one for each prompt
    # all 3 pairs of each of 2 prompts, at each of 3 steps, the step being the same for both by construction
    assert len(table) == 2 * 3 * 3 and sorted(table.step.tolist()) == sorted([0, 1, 2] * 6)
    own = rolled(D3PO(Sampler(3, 1.0), shared_noise=False), policy)[1]
    first = own.trajectories.latents[:, 0]
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(("lora", "kind"), LORAS)
def test_the_reference_is_a_deep_copy_of_the_start(tiny: Build, kind: str, lora: LoRA | None) -> None:
    family, objective = tiny(kind), D3PO(Sampler(2, 2.0))
    torch.manual_seed(0)
    frozen = copy.deepcopy(family.denoiser)
    policy = Policy(family, lora)
    disturb(policy, 0.1)
    ctx, table = rolled(objective, policy)
    call = family.call
    family.call = lambda denoiser, x, t, cond: call(frozen, x, t, cond)
    base = Context(policy, 0, 0, ctx.sample_indices, ctx.scorer)
    expected = log_probs(base, objective.sampler, table.trajectories, 32)
    assert torch.equal(table.reference, expected)
    family.call = call
    assert not torch.allclose(log_probs(ctx, objective.sampler, table.trajectories, 32), expected)


# what is asked of the network
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_reference_is_asked_once_about_each_picture_that_is_in_a_pair(tiny: Build, guidance_scale: float) -> None:
    """Three pictures a prompt, of which one prompt's are all alike: 3 of 6 pictures are in pairs, each in two."""

    class Half(Bright):
        def score(
            self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
        ) -> Tensor:
            return torch.where(torch.tensor([p == prompts[0] for p in prompts]), 0.0, images.mean((1, 2, 3)))

    policy = moved(tiny, "flow")
    objective = D3PO(Sampler(4, guidance_scale, batch_size=6), images_per_prompt=3, reference_batch=5)
    assert policy.family.uncond is not None
    heard, each = Heard(policy), 1 if guidance_scale == 1.0 else 2
    ctx, table = rolled(objective, policy, scorer=Scorer({"half": Half()}, {"half": 1.0}))
    assert heard.rows(False) == (6 + 3) * 4 * each
    assert table.metrics["tie_share"] == 0.5
    for _ in range(2):  # inner epochs ask it no more
        for chunk in table.chunks(5):
            objective.loss(ctx, chunk)[0].backward()
    assert heard.rows(False) == (6 + 3) * 4 * each
    # of 3 pairs x 4 steps x 2 members, in chunks of 5 rows, two are of a picture and step that their chunk has already
    assert heard.rows(True) == 2 * (3 * 4 * 2 - 2) * each
    objective.loss(ctx, table)[0].backward()  # in one chunk each picture, though in two pairs, is asked about once
    assert heard.rows(True) == 2 * (3 * 4 * 2 - 2) * each + 3 * 4 * each
    assert policy.evaluations == {"trained": heard.rows(True), "frozen": heard.rows(False)}


def test_the_plan_is_the_cost_without_ties(tiny: Build) -> None:
    policy, objective = moved(tiny, "flow"), D3PO(Sampler(3, 2.0), images_per_prompt=3)
    assert policy.family.uncond is not None
    heard, plan = Heard(policy), objective.cost(policy.family, None)
    ctx, table = rolled(objective, policy)
    objective.loss(ctx, table)[0].backward()
    assert (plan.trained * 6, plan.frozen * 6) == (heard.rows(True), heard.rows(False))
    assert plan.rows is None
    assert "0.0201" in plan.notes["sigmoid's argument"]


def test_a_share_of_the_steps(tiny: Build) -> None:
    """The first ones: kept, asked of the reference, and trained; all of them are drawn."""
    policy, objective = moved(tiny, "epsilon"), D3PO(Sampler(4, 1.0), timestep_fraction=0.5)
    heard, plan = Heard(policy), objective.cost(policy.family, None)
    ctx, table = rolled(objective, policy)
    assert sorted(table.step.tolist()) == [0, 0, 1, 1]
    objective.loss(ctx, table)[0].backward()
    assert heard.times(trained=True) == set(policy.family.grid(4).t[:2].tolist())
    assert (plan.trained * 4, plan.frozen * 4) == (heard.rows(True), heard.rows(False))
    assert heard.rows(False) == 4 * (4 + 2)


def test_a_window_is_drawn_with_noise_and_trained_and_nothing_else_is(tiny: Build) -> None:
    policy, objective = moved(tiny, "flow"), D3PO(Sampler(4, 1.0), window=SDEWindow(2, until=3, every=1))
    heard, plan = Heard(policy), objective.cost(policy.family, None)
    ctx, table = rolled(objective, policy, step=1)
    states = table.trajectories.latents
    assert states.shape[:2] == (4, 3)
    assert table.trajectories.kept_steps.tolist() == [1, 2]  # type: ignore[union-attr]
    pair = (table.winner[0], table.loser[0])
    assert torch.equal(*(states[k, 0] for k in pair))  # one noise, and none drawn on the way to the window
    assert (states[pair[0], 1] - states[pair[1], 1]).abs().mean() > 0.05
    objective.loss(ctx, table)[0].backward()
    assert heard.times(trained=True) == set(policy.family.grid(4).t[1:3].tolist())
    assert (plan.trained * 4, plan.frozen * 4) == (heard.rows(True), heard.rows(False))


def test_chunks_average_to_the_batch(tiny: Build) -> None:
    policy, objective = moved(tiny, "v", scale=0.01), D3PO(Sampler(3, 1.0), images_per_prompt=3)
    ctx, table = rolled(objective, policy)
    whole, metrics = objective.loss(ctx, table)
    shared = gradients(policy, whole)
    alone = torch.stack([gradients(policy, objective.loss(ctx, row)[0]) for row in table.chunks(1)]).mean(0)
    assert (shared - alone).norm() < 1e-4 * alone.norm()  # alone, a row shares no picture with another
    parts = [objective.loss(ctx, chunk) for chunk in table.chunks(6)]
    assert whole.item() == pytest.approx(sum(loss.item() for loss, _ in parts) / 3, rel=1e-5)
    for name in set(metrics) - {"ratio_max"}:
        assert metrics[name].item() == pytest.approx(sum(m[name].item() for _, m in parts) / 3, rel=1e-4, abs=1e-6)


def test_a_few_updates_prefer_the_winners(tiny: Build) -> None:
    torch.manual_seed(0)
    policy, objective = Policy(tiny("v"), LoRA(4)), D3PO(Sampler(2, 1.0))
    ctx, table = rolled(objective, policy)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss, metrics = objective.loss(ctx, table)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-4
    assert metrics["implicit_acc"] == 1


# preferences
def test_the_winner_is_nowhere_worse_and_somewhere_better() -> None:
    """Against a plain loop over ordered pairs, with ties in one reward and contradictions between two."""
    values = torch.tensor(list(itertools.product([0.0, 1.0], [0.0, 1.0, 2.0]))).repeat(2, 1)
    groups = torch.tensor([0] * 6 + [4] * 6)
    expected = {
        (a, b)
        for a in range(12)
        for b in range(12)
        if groups[a] == groups[b] and (values[a] >= values[b]).all() and (values[a] > values[b]).any()
    }
    found = [tuple(pair) for pair in preferences(values, groups).tolist()]
    assert set(found) == expected and len(found) == len(expected)
    assert (1, 3) not in expected and (3, 1) not in expected  # (0, 1) against (1, 0)
    assert preferences(torch.ones(4, 2), torch.zeros(4)).shape == (0, 2)


def test_one_reward_is_plain_comparison() -> None:
    values = torch.tensor([[0.3], [0.1], [0.1], [0.9]])
    assert sorted(preferences(values, torch.zeros(4)).tolist()) == [[0, 1], [0, 2], [3, 0], [3, 1], [3, 2]]


def test_several_rewards_of_a_rollout(tiny: Build) -> None:
    """A reward and its opposite never agree; a reward of weight 0 has no vote; a negative weight turns it round."""

    class Dark(Bright):
        def score(
            self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
        ) -> Tensor:
            return -images.mean((1, 2, 3))

    policy, objective = moved(tiny, "epsilon"), D3PO(Sampler(2, 1.0))
    both = {"bright": Bright(), "dark": Dark()}
    shares = {}
    for dark in (1.0, 0.0, -1.0):
        _, table = rolled(objective, policy, scorer=Scorer(both, {"bright": 1.0, "dark": dark}))
        shares[dark] = table.metrics["tie_share"]
        assert {"reward/bright", "reward/dark"} <= table.metrics.keys()
    assert shares == {1.0: 1.0, 0.0: 0.0, -1.0: 0.0}
    _, up = rolled(objective, policy)
    _, down = rolled(objective, policy, scorer=Scorer({"b": Bright()}, {"b": -1.0}))
    assert torch.equal(up.winner, down.loser)
    brighter = bright().total({"bright": policy.family.to_image(up.trajectories.latents[:, -1]).mean((1, 2, 3))})
    assert (brighter[up.winner] > brighter[up.loser]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images_per_prompt": 1}, "images_per_prompt must be at least 2"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"clip_range": 1.0}, "clip_range in"),
        ({"timestep_fraction": 1.5}, "timestep_fraction must be in"),
        ({"timestep_fraction": 0.5, "window": SDEWindow(2)}, "give one of them"),
    ],
)
def test_bad_hyper_parameters_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        D3PO(**arguments)
