"""B²-DiffuRL: its schedule, branches, selection, statistics and cost, over both update rules."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from align.objectives.b2_diffurl import B2DiffuRL
from align.objectives.d3po import D3PO
from align.objectives.online.advantages import PromptHistory, staged_advantages
from align.objectives.online.pairs import best_over_worst
from align.objectives.online.rewards import Scorer
from align.objectives.policy_gradient import PolicyGradient
from align.sampling.sampler import Sampler, SDEWindow
from align.train import main
from tests.helpers import Flat, Heard, lines, moved, online, rolled, weights, write
from tests.pipelines import Build
from tests.test_policy import disturb

KINDS = ("epsilon", pytest.param("v", marks=pytest.mark.slow), "flow")
FEW = {"first": 2, "stages": 4, "threshold_best": 0.1, "threshold_worst": 0.1}


def gradient(steps: int = 4, branches: int = 3, guidance_scale: float = 1.0, **more: Any) -> PolicyGradient:
    return PolicyGradient(Sampler(steps, guidance_scale, batch_size=4), branches, **more)


def test_trained_steps_grow_with_the_stage_as_the_official_schedule() -> None:
    objective = B2DiffuRL(PolicyGradient(Sampler(20)))
    found = Counter(len(objective.interval(stage)) for stage in range(100))
    assert found == {14: 15, 15: 14, 16: 14, 17: 15, 18: 14, 19: 14, 20: 14}
    lengths = [len(objective.interval(stage)) for stage in range(150)]
    assert lengths == sorted(lengths) and lengths[100:] == [20] * 50
    assert objective.interval(0) == range(6, 20)
    assert B2DiffuRL(PolicyGradient(Sampler(20)), progressive=False).interval(0) == range(20)


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        pytest.param(stage, kind, marks=[] if (stage, kind) in ((0, "epsilon"), (3, "flow")) else pytest.mark.slow)
        for stage in (0, 3)
        for kind in ("epsilon", "v", "flow")
    ],
)
def test_branches_share_the_prefix_and_nothing_after_it(tiny: Build, kind: str, stage: int) -> None:
    """What is kept begins where they fork: bitwise one state. The last stage forks at the noise."""
    objective, policy = B2DiffuRL(gradient(), **FEW), moved(tiny, kind)
    _, table = rolled(objective, policy, prompts=3, step=stage)
    latents, k = table.trajectories.latents, len(objective.interval(stage))
    assert latents.shape[:2] == (9, k + 1)
    assert table.trajectories.kept_steps.tolist() == list(range(4 - k, 4))
    for group in latents.split(3):
        assert torch.equal(group[0, 0], group[1, 0]) and torch.equal(group[0, 0], group[2, 0])
        for later in range(1, k + 1):
            assert not any(torch.equal(group[0, later], other[later]) for other in group[1:])
    assert len({tuple(group[0, 0].flatten().tolist()) for group in latents.split(3)}) == 3


@pytest.mark.parametrize("kind", ["epsilon", pytest.param("flow", marks=pytest.mark.slow)])
def test_the_prefix_is_the_sampler_of_the_update(tiny: Build, kind: str) -> None:
    """The fork is what the kernel makes of the shared noise in N - k steps, drawn in batches of any size."""
    policy, found = moved(tiny, kind), []
    for size in (1, 8):
        objective = B2DiffuRL(PolicyGradient(Sampler(4, 2.0, batch_size=size), 2), first=2)
        found.append(rolled(objective, policy, prompts=3)[1].trajectories.latents[:, 0])
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
    later = rolled(objective, policy, prompts=3, step=1)[1].trajectories.latents[:, 0]
    assert not torch.allclose(found[1], later)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_without_either_part_it_is_the_update_alone(tiny: Build, kind: str) -> None:
    """No branches, all steps: the pictures, rows and densities of PolicyGradient, bit for bit. Advantages are B2's own
    statistics (ddof 1, with history); with one prompt and no history they are DDPO's batch ones up to sqrt(n / (n-1)),
    and the loss with equal advantages is equal."""
    policy = moved(tiny, kind)
    alone = gradient(branches=4, advantage="batch")
    both = B2DiffuRL(gradient(branches=4), progressive=False, branches=False)
    ctx, plain = rolled(alone, policy, prompts=1)
    _, table = rolled(both, policy, prompts=1)
    for name in ("latents", "log_probs", "kept_steps", "prompt_index"):
        assert torch.equal(getattr(table.trajectories, name), getattr(plain.trajectories, name))
    assert torch.equal(table.step, plain.step) and torch.equal(table.image, plain.image)
    found, expected = table.advantage, plain.advantage
    torch.testing.assert_close(found * (4 / 3) ** 0.5, expected, atol=1e-3, rtol=1e-3)
    disturb(policy, 0.01)
    loss, _ = both.loss(ctx, table)
    weighted, _ = alone.loss(ctx, replace(plain, advantage=found))
    assert loss == weighted


def test_equal_rewards_select_nothing(tiny: Build) -> None:
    flat = Scorer({"flat": Flat()}, {"flat": 1.0})
    for update in (gradient(), D3PO(Sampler(4, 1.0), 3)):
        objective = B2DiffuRL(update, first=2, threshold_worst=0.0)
        for stage in range(2):  # with and without a history
            _, table = rolled(objective, moved(tiny, "epsilon"), step=stage, scorer=flat)
            assert len(table) == 0
            assert table.metrics["selected_share"] == 0


@pytest.mark.parametrize("rule", [pytest.param("PolicyGradient", marks=pytest.mark.slow), "D3PO"])
def test_a_run_of_equal_rewards_updates_nothing_and_ends(
    tiny_folders: dict[str, Path], tmp_path: Path, rule: str
) -> None:
    update = {
        "class_path": rule,
        "init_args": {"sampler": {"num_inference_steps": 3, "guidance_scale": 1.0}, "images_per_prompt": 2},
    }
    config = online(tiny_folders["epsilon"], tmp_path, "B2DiffuRL", update=update, first=2, stages=2)
    file = write(config, rewards=[{"name": "tests.helpers.Flat"}], max_rollouts=2, max_train_steps=5)
    assert main(["--config", file]) == 0
    assert all(not value.any() for name, value in weights(tmp_path / "run").items() if "lora_B" in name)
    logged = [line for line in lines(tmp_path / "run") if "rollout" in line]
    assert [line["rollout"] for line in logged] == [1, 2]
    assert [line["rollout/trained_steps"] for line in logged] == [2, 3]
    assert all(line["step"] == 0 and line["rollout/selected_share"] == 0 for line in logged)


def test_the_best_and_the_worst_are_selected_where_they_pass() -> None:
    objective = B2DiffuRL(gradient(), first=2, threshold_best=0.5, threshold_worst=0.7)
    scores = torch.tensor([0.2, 0.5, 0.4, -0.8, 2.0, 1.0, -0.7, 0.4, -0.2, -0.71, -0.9, -0.8])
    groups = torch.arange(12) // 3
    chosen = objective.select(scores, groups)
    # 0.5 is best and enough, 0.2 is worst and not low enough; -0.8 and 2.0; -0.7 is not below -0.7; only the worst
    assert chosen.nonzero().flatten().tolist() == [1, 3, 4, 10]


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_a_rollout_keeps_at_most_two_of_a_group(tiny: Build, kind: str) -> None:
    thresholds = {"threshold_best": 0.6, "threshold_worst": 0.9}
    objective = B2DiffuRL(gradient(branches=5), first=2, **thresholds)
    ctx, table = rolled(objective, moved(tiny, kind), prompts=4)
    advantage, kept = table.advantage, table.image.unique()
    assert 0 < len(kept) <= 8 and max(Counter((kept // 5).tolist()).values()) <= 2
    for picture in kept.tolist():
        group = advantage[picture // 5 * 5 : picture // 5 * 5 + 5]
        assert advantage[picture] in (group.max(), group.min())
        assert advantage[picture] >= 0.6 or advantage[picture] < -0.9
    assert Counter(table.image.tolist()) == dict.fromkeys(kept.tolist(), 2)  # every trained step of each
    assert table.metrics["selected_share"] == pytest.approx(len(kept) / 20)
    loss, _ = objective.loss(ctx, table)
    assert loss.isfinite()


def test_advantages_are_weighted_by_their_sign_and_cut(tiny: Build) -> None:
    policy, found = moved(tiny, "epsilon"), []
    for more in ({}, {"weight_best": 0.5, "weight_worst": 3.0}):
        objective = B2DiffuRL(gradient(branches=5, adv_clip_max=2.0), first=2, **more)
        found.append(rolled(objective, policy)[1].advantage)
    plain, weighted = found
    assert torch.equal(weighted, plain * torch.where(plain > 0, 0.5, 3.0))  # cut first, as in the official code
    assert weighted.min() < -2
    assert (plain > 0).any() and (plain < 0).any()


def test_pairs_are_best_over_worst_of_a_group_that_has_both() -> None:
    objective = B2DiffuRL(D3PO(Sampler(4), 3), first=2)
    scores = torch.tensor([0.1, 0.9, -0.8, 1.0, 0.9, 0.8, -1.0, -0.6, 0.5])
    groups = torch.arange(9) // 3
    pairs = best_over_worst(scores, groups, objective.select(scores, groups))
    assert pairs.tolist() == [[1, 2], [8, 6]]  # of the second group only the best is kept


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_d3po_trains_the_pairs_on_the_trained_steps(tiny: Build, kind: str) -> None:
    """The first of them starts from one state for both members."""
    objective = B2DiffuRL(D3PO(Sampler(4, 1.0), 4), **FEW)
    ctx, table = rolled(objective, moved(tiny, kind), prompts=3)
    assert len(table) > 0 and len(table) % 2 == 0
    latents, winner, loser = table.trajectories.latents, table.winner, table.loser
    assert torch.equal(latents[winner, 0], latents[loser, 0])
    assert sorted(set(table.step.tolist())) == [0, 1] and table.trajectories.kept_steps.tolist() == [2, 3]
    loss, metrics = objective.loss(ctx, table)
    loss.backward()
    assert abs(metrics["ratio_mean"] - 1) > 0  # the policy has moved from its reference
    assert objective.needs.reference and objective.reference == "base"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", [gradient, D3PO])
def test_only_the_interval_is_trained(tiny: Build, kind: str, rule: Any) -> None:
    policy = moved(tiny, kind)
    objective = B2DiffuRL(gradient() if rule is gradient else D3PO(Sampler(4, 1.0), 3), **FEW)
    ctx, table = rolled(objective, policy, prompts=3)
    heard = Heard(policy)
    loss, metrics = objective.loss(ctx, table)
    loss.backward()
    assert heard.times(trained=True) == set(policy.family.grid(4).t[2:4].tolist())
    if rule is gradient:
        assert abs(metrics["ratio_max"] - 1) < 1e-4


def test_statistics_are_of_this_stage_and_eight_before() -> None:
    """Against numpy, through a checkpoint on the way."""
    objective = B2DiffuRL(gradient(), first=2)
    rng, past = np.random.default_rng(0), []
    for stage in range(12):
        prompts = [str(p) for p in rng.choice(["a", "b", "c"], 6)]
        rewards = rng.normal(size=6)
        found = staged_advantages(torch.from_numpy(rewards), prompts, objective.scores)
        now = {p: [r for r, q in zip(rewards, prompts, strict=True) if q == p] for p in set(prompts)}
        for k, prompt in enumerate(prompts):
            pool = np.array([r for old in [*past[-8:], now] for r in old.get(prompt, [])])
            expected = (rewards[k] - pool.mean()) / (pool.std(ddof=1) + 1e-8) if len(pool) > 1 else 0.0
            assert found[k].item() == pytest.approx(expected, rel=1e-9)
        past.append(now)
        assert len(objective.scores.stages) == min(stage + 1, 8)
        if stage == 5:
            state = json.loads(json.dumps(objective.state()))
            objective = B2DiffuRL(gradient(), first=2)
            objective.load_state(state)


def test_a_prompt_seen_once_or_always_the_same_has_no_advantage() -> None:
    history = PromptHistory(8, "stage")
    rewards = torch.tensor([0.3, 0.1, 0.1, 0.1], dtype=torch.float64)
    assert (staged_advantages(rewards, ["a", "b", "b", "b"], history) == 0).all()
    assert (staged_advantages(rewards[1:2], ["b"], history) == 0).all()


# cost
@pytest.mark.parametrize("guidance_scale", [pytest.param(1.0, marks=pytest.mark.slow), 2.0])
@pytest.mark.parametrize(
    ("stage", "branches"),
    [
        pytest.param(stage, branches, marks=[] if branches == (stage != 0) else pytest.mark.slow)
        for stage in (0, 2, 3)
        for branches in (True, False)
    ],
)
def test_a_rollout_costs_a_prefix_and_b_branches(
    tiny: Build, stage: int, branches: bool, guidance_scale: float
) -> None:
    """(M/b) ((N - k) + b k) evaluations, counted at the network; twice that with guidance."""
    policy, objective = (
        moved(tiny, "flow"),
        B2DiffuRL(gradient(5, 3, guidance_scale), branches=branches, first=2, stages=4),
    )
    assert policy.family.uncond is not None
    heard, k = Heard(policy), (2, 4, 5)[(0, 2, 3).index(stage)]
    rolled(objective, policy, prompts=4, step=stage)
    prefix = (5 - k) if branches else 3 * (5 - k)
    assert heard.rows(False) == 4 * (prefix + 3 * k) * (1 if guidance_scale == 1.0 else 2)
    assert heard.rows(False) == objective.evaluations(4, stage, guided=guidance_scale != 1.0)
    assert policy.evaluations["frozen"] == heard.rows(False)


def test_a_rollouts_cost_at_the_official_settings() -> None:
    objective = B2DiffuRL(PolicyGradient(Sampler(20, 5.0), 5))
    assert objective.evaluations(1280 // 5, stage=0) == 38_912
    assert objective.evaluations(1280 // 5, stage=99) == 51_200


@pytest.mark.parametrize("rule", ["none", "guard"])
def test_the_update_may_normalise_its_steps(tiny: Build, rule: Any) -> None:
    policy, objective = moved(tiny, "flow"), B2DiffuRL(gradient(step_normalisation=rule), **FEW)
    ctx, table = rolled(objective, policy, prompts=3)
    loss, metrics = objective.loss(ctx, table)
    assert loss.isfinite() and abs(metrics["ratio_mean"] - 1) < 1e-5


class Other:
    """No update rule."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"update": Other()}, "update must be PolicyGradient or D3PO, got Other"),
        ({"update": gradient(), "first": 5}, "first must be between 1 and the sampler's 4 steps, got 5"),
        ({"update": gradient(), "first": 2, "stages": 0}, "stages must be at least 1"),
        ({"update": PolicyGradient(Sampler(20), window=SDEWindow(2))}, "leave the update's window unset"),
        ({"update": D3PO(Sampler(20), window=SDEWindow(2))}, "leave the update's window unset"),
    ],
)
def test_bad_hyper_parameters_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        B2DiffuRL(**arguments)


def test_best_and_worst_differ_in_the_trained_steps_alone(tiny: Build) -> None:
    """Why it is done: of two branches, the reward's difference is due to what is trained."""
    policy, spread = moved(tiny, "epsilon"), {}
    for branches in (True, False):
        objective = B2DiffuRL(gradient(6, 4), first=1, branches=branches)
        _, table = rolled(objective, policy, prompts=3)
        spread[branches] = table.metrics["diversity/latents"]
    assert spread[True] < 0.5 * spread[False]


def rows_of(table: Any) -> Tensor:
    return torch.stack([table.image, table.step], 1)


def test_every_chosen_picture_gives_each_trained_step_once(tiny: Build) -> None:
    objective = B2DiffuRL(gradient(), **FEW)
    _, table = rolled(objective, moved(tiny, "v"), prompts=3, step=1)
    found = rows_of(table)
    assert len(found.unique(dim=0)) == len(found) == len(table.image.unique()) * len(objective.interval(1))
