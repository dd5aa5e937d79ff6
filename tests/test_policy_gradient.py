"""The clipped policy gradient: advantages by plain loops, REINFORCE at ratio 1, clipping, KL, guard, self-check."""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from align.common.errors import UserError
from align.diffusion.kernels import DDIM, FlowSDE, Gaussian
from align.objectives.losses import masked_surrogate
from align.objectives.online import advantages
from align.objectives.online.advantages import PromptHistory
from align.objectives.online.replay import log_probs, replay_step
from align.objectives.online.rewards import RewardConfig, Scorer
from align.objectives.policy_gradient import PolicyGradient, PolicyGradientRows
from align.policy.policy import LoRA, Policy
from align.sampling.sampler import Sampler, SDEWindow
from align.sampling.trajectory import Trajectories
from tests.helpers import Bright, Even, Fixed, Flat, Toy, gradients, moved, rolled
from tests.pipelines import Build
from tests.test_policy import disturb

KINDS = ("epsilon", "v", "flow")
GROUPS = torch.tensor([3, 3, 3, 5, 5, 5, 9, 9])


def scores(seed: int = 0) -> Tensor:
    """Rewards of GROUPS in float64; the last group's are all alike."""
    found = 3 + 2 * torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found[6:] = 0.1
    return found


# advantages
@pytest.mark.parametrize("spread", ["group", "batch", "none"])
def test_group_advantages_are_the_plain_loop(spread: Literal["group", "batch", "none"]) -> None:
    rewards = scores()
    expected = []
    for k in range(8):
        mine = [float(rewards[j]) for j in range(8) if GROUPS[j] == GROUPS[k]]
        whole = mine if spread == "group" else rewards.tolist()
        scale = 1.0 if spread == "none" else float(np.std(whole)) + 1e-4
        expected.append((float(rewards[k]) - float(np.mean(mine))) / scale)
    found = advantages.group_advantages(rewards, GROUPS, spread)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert (found[6:] == 0).all()


def test_mean_0_std_1_and_the_order_of_pictures_does_not_matter() -> None:
    rewards, order = scores(), torch.randperm(8, generator=torch.Generator().manual_seed(2))
    found = advantages.group_advantages(rewards, GROUPS, "group", eps=0)
    for group in (3, 5):
        mine = found[group == GROUPS]
        assert mine.mean() == pytest.approx(0, abs=1e-12)
        assert mine.std(correction=0) == pytest.approx(1)
    for spread in ("group", "batch", "none"):
        straight = advantages.group_advantages(rewards, GROUPS, spread)
        mixed = advantages.group_advantages(rewards[order], GROUPS[order], spread)
        torch.testing.assert_close(mixed, straight[order])


def test_rounding_does_not_make_a_group_of_equals_differ() -> None:
    """The mean of three 0.1 is not 0.1."""
    rewards = torch.full((3,), 0.1, dtype=torch.float64)
    assert (advantages.group_advantages(rewards, torch.zeros(3), "group", eps=0) == 0).all()
    assert advantages.zero_std_mask(scores(), GROUPS).tolist() == [False] * 6 + [True] * 2


def test_batch_advantages() -> None:
    rewards = scores()
    found = advantages.batch_advantages(rewards)
    expected = (rewards.numpy() - np.mean(rewards.numpy())) / (np.std(rewards.numpy()) + 1e-6)
    np.testing.assert_allclose(found.numpy(), expected)


class Tracker:
    """DDPO's PerPromptStatTracker as its paper's repository describes it, written anew."""

    def __init__(self, size: int, least: int) -> None:
        self.size, self.least = size, least
        self.kept: dict[str, deque[float]] = {}

    def update(self, prompts: list[str], rewards: np.ndarray) -> np.ndarray:
        found = np.empty_like(rewards)
        for prompt in sorted(set(prompts)):
            mine = np.array([other == prompt for other in prompts])
            self.kept.setdefault(prompt, deque(maxlen=self.size)).extend(rewards[mine])
            pool = rewards if len(self.kept[prompt]) < self.least else np.array(self.kept[prompt])
            found[mine] = (rewards[mine] - pool.mean()) / (pool.std() + 1e-6)
        return found


def test_history_is_ddpos_tracker_and_survives_a_checkpoint() -> None:
    tracker, objective = Tracker(5, 4), PolicyGradient(advantage="history", history_size=5, history_min_count=4)
    rng = np.random.default_rng(0)
    early = late = 0
    for stage in range(8):
        prompts = [str(p) for p in rng.choice(["a", "b", "c"], 6, p=[0.6, 0.3, 0.1])]
        rewards = rng.normal(size=6)
        expected = tracker.update(prompts, rewards)
        found = advantages.tracked_advantages(torch.from_numpy(rewards), prompts, objective.history, 4)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)
        early += sum(len(tracker.kept[p]) < 4 for p in prompts)
        late += sum(len(tracker.kept[p]) == 5 for p in prompts)
        if stage == 3:
            state = json.loads(json.dumps(objective.state()))
            objective = PolicyGradient(advantage="history", history_size=5, history_min_count=4)
            objective.load_state(state)
    assert early and late, "this test should see prompts with too few scores and with a full buffer"
    assert PolicyGradient(advantage="group").state() == {}


def test_history_by_stage_forgets_stages_in_which_a_prompt_did_not_come() -> None:
    history = PromptHistory(2, "stage")
    for stage, prompts in enumerate(["a", "b", "b"]):
        history.add([prompts], [float(stage)])
    assert (history.of("a"), history.of("b")) == ([], [1.0, 2.0])


def test_gdpo_normalises_each_reward_and_then_the_sum() -> None:
    """A reward of a thousand times the scale weighs no more; the sum of raw rewards would follow it alone."""
    parts = {"small": scores(1), "large": 1000 * scores(2)}
    found = advantages.combine(parts, {"small": 1.0, "large": 0.5}, GROUPS, "group", eps=0)
    total = np.zeros(8)
    for name, weight in (("small", 1.0), ("large", 0.5)):
        for group in (3, 5):
            mine = GROUPS.numpy() == group
            values = parts[name].numpy()[mine]
            total[mine] += weight * (values - values.mean()) / values.std()
    np.testing.assert_allclose(found.numpy(), (total - total.mean()) / total.std())
    rescaled = advantages.combine(
        parts | {"large": parts["large"] / 1e6}, {"small": 1.0, "large": 0.5}, GROUPS, "group", eps=0
    )
    torch.testing.assert_close(rescaled, found)


@pytest.mark.parametrize(
    "arguments",
    [
        {"advantage": "group", "scale_rewards": "batch"},
        {"advantage": "group", "scale_rewards": "group"},
        {"advantage": "batch"},
        {"advantage": "history", "history_min_count": 1},
        {"rewards": "each", "scale_rewards": "group"},
    ],
)
def test_a_rollout_uses_the_advantage_it_is_told_to(tiny: Build, arguments: dict[str, Any]) -> None:
    policy = moved(tiny, "epsilon")
    both = Scorer({"bright": Bright(), "flat": Flat()}, {"bright": 2.0, "flat": 1.0})
    objective = PolicyGradient(Sampler(2, 1.0), 3, **arguments)
    _, table = rolled(objective, policy, scorer=both)
    groups = torch.arange(6) // 3
    with torch.no_grad():
        pictures = table.trajectories.latents[:, -1]
        seen = Bright().score(images=policy.family.to_image(pictures), prompts=[""] * 6).double()
    total = 2 * seen + 0.5
    expected = {
        "group": lambda: advantages.group_advantages(total, groups, objective.scale_rewards),
        "batch": lambda: advantages.batch_advantages(total),
        "history": lambda: advantages.group_advantages(total, groups, "group", eps=1e-6),  # a prompt each, one rollout
    }[objective.advantage]()
    if objective.rewards == "each":
        one = 2 * advantages.group_advantages(seen, groups, "group")
        expected = (one - one.mean()) / (one.std(correction=0) + 1e-4)
    found = table.advantage
    torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=2e-3)  # pixels are float32
    assert table.metrics["reward/total"] == pytest.approx(float(total.mean()), abs=1e-5)
    assert table.metrics["zero_std_share"] == 0


def test_advantages_are_cut(tiny: Build) -> None:
    found = []
    for limit in (5.0, 0.5):
        objective = PolicyGradient(Sampler(2, 1.0), 6, scale_rewards="group", adv_clip_max=limit)
        found.append(rolled(objective, moved(tiny, "epsilon"), 1)[1].advantage)
    whole, cut = found
    assert torch.equal(cut, whole.clamp(-0.5, 0.5))
    assert not torch.equal(cut, whole)


# rewards
def test_weighted_rewards_and_those_only_watched() -> None:
    settings = [
        RewardConfig("tests.helpers.Bright", 2.0, label="light"),
        RewardConfig("tests.helpers.Flat", -1.0),
        RewardConfig("tests.helpers.Bright", 0.0, label="watched"),
    ]
    scorer = Scorer.of(settings)
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = scorer.submit(images, ["x"] * 5)()
    assert set(found) == {"light", "tests.helpers.Flat", "watched"}
    assert scorer.weights.keys() == {"light", "tests.helpers.Flat"}
    torch.testing.assert_close(scorer.total(found), 2 * images.mean((1, 2, 3)) - 0.5)
    with pytest.raises(ValueError, match="two rewards are called 'tests.helpers.Bright'"):
        Scorer.of([RewardConfig("tests.helpers.Bright")] * 2)


def test_what_is_only_watched_teaches_nothing(tiny: Build) -> None:
    policy, objective = moved(tiny, "epsilon"), PolicyGradient(Sampler(2, 1.0), 3)
    watched = Scorer({"bright": Bright(), "flat": Flat()}, {"bright": 0.0, "flat": 1.0})
    _, table = rolled(objective, policy, scorer=watched)
    assert not table.advantage.any()
    assert table.metrics["reward/bright"] > 0
    assert table.metrics["reward/total"] == 0.5
    each = PolicyGradient(Sampler(2, 1.0), 3, rewards="each")
    assert not rolled(each, policy, scorer=watched)[1].advantage.any()


# the loss
@pytest.mark.parametrize(
    ("guidance_scale", "kind"),
    [
        pytest.param(scale, kind, marks=[] if (scale == 1.0) == (kind == "epsilon") else pytest.mark.slow)
        for scale in (1.0, 3.0)
        for kind in ("epsilon", "v", "flow")
    ],
)
def test_ratio_is_1_and_the_gradient_reinforces(tiny: Build, kind: str, guidance_scale: float) -> None:
    """Before any update the gradient is that of -A log p, the REINFORCE estimate."""
    policy, objective = moved(tiny, kind), PolicyGradient(Sampler(3, guidance_scale, batch_size=4), 3)
    ctx, table = rolled(objective, policy)
    loss, metrics = objective.loss(ctx, table)
    assert abs(metrics["ratio_mean"] - 1) < 1e-5
    assert abs(metrics["ratio_max"] - 1) < 1e-4
    assert metrics["clip_fraction"] == 0
    assert metrics["approx_kl"] < 1e-9
    step, y = replay_step(ctx, objective.sampler, table.trajectories, table.image, table.step)
    reinforce = -(table.advantage[table.image] * step.log_prob(y)).mean()
    torch.testing.assert_close(gradients(policy, loss), gradients(policy, reinforce), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_the_gradient_at_ratio_1_by_finite_difference(tiny: Build, kind: str) -> None:
    """d/dw of -mean A log p along a random direction, in float64, without autograd."""
    policy, objective = moved(tiny, kind), PolicyGradient(Sampler(3, 2.0), 3)
    ctx, table = rolled(objective, policy)
    policy.denoiser.double()
    policy.family._null = policy.family.uncond.to("cpu", torch.float64)
    cond = table.trajectories.cond.to("cpu", torch.float64)
    images = replace(table.trajectories, latents=table.trajectories.latents.double(), cond=cond)
    images = replace(images, log_probs=log_probs(ctx, objective.sampler, images, 32))
    table = replace(table, trajectories=images, advantage=table.advantage.double())
    parameters = policy.parameters()
    generator = torch.Generator().manual_seed(4)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    loss, _ = objective.loss(ctx, table)
    grads = torch.autograd.grad(loss, parameters)
    analytic = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True))

    def surrogate(amount: float) -> float:
        for parameter, d in zip(parameters, direction, strict=True):
            parameter.data += amount * d
        found = log_probs(ctx, objective.sampler, images, 32)
        for parameter, d in zip(parameters, direction, strict=True):
            parameter.data -= amount * d
        return -float((table.advantage[:, None] * found).mean())

    numeric = (surrogate(1e-4) - surrogate(-1e-4)) / 2e-4  # the flow network's norms round to float32
    assert analytic == pytest.approx(numeric, rel=1e-3)
    assert abs(numeric) > 1e-5


def toy_rows(toy: Toy, y: Tensor, advantage: Tensor, old: Tensor | None = None) -> PolicyGradientRows:
    """One step that drew ``y`` (N, D) for advantages (N,)."""
    images, sampler = toy.trajectories(y), Sampler(1, 1.0, STEP)
    found = log_probs(toy.context(len(y)), sampler, images, len(y)) if old is None else old
    return one_step(replace(images, log_probs=found), advantage)


def one_step(trajectories: Trajectories, advantage: Tensor) -> PolicyGradientRows:
    count = len(advantage)
    return PolicyGradientRows(
        image=torch.arange(count),
        step=torch.zeros(count, dtype=torch.long),
        trajectories=trajectories,
        advantage=advantage,
    )


STEP = Fixed(0.5)


def test_linear_gaussian_toy_climbs_the_reward() -> None:
    """x ~ N(theta, s^2), r = -(x - m)^2: E[r] has the gradient -2 (theta - m), which the loss's is minus of."""
    theta, m, count = 0.3, 1.0, 40_000
    toy, objective = Toy(theta), PolicyGradient(Sampler(1, 1.0, STEP), 2)
    y = theta + 0.5 * torch.randn(count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    rewards = -(y[:, 0] - m).square()
    advantage = advantages.group_advantages(rewards, torch.zeros(count), "none")
    loss, _ = objective.loss(toy.context(count), toy_rows(toy, y, advantage))
    (found,) = torch.autograd.grad(loss, toy.theta)
    each = advantage * (y[:, 0] - theta) / 0.5**2
    assert abs(-found - -2 * (theta - m)) < 3 * each.std() / math.sqrt(count)
    assert each.std() / math.sqrt(count) < 0.02


@pytest.mark.parametrize("ratio", [0.5, 0.85, 0.95, 1.0, 1.05, 1.15, 2.0])
@pytest.mark.parametrize("advantage", [-2.0, 3.0])
def test_clipping_acts_only_where_the_ratio_has_gone_far_enough(ratio: float, advantage: float) -> None:
    toy, objective = Toy(0.3), PolicyGradient(Sampler(1, 1.0, STEP), 2, clip_range=0.1)
    y = torch.tensor([[0.9, 0.1]], dtype=torch.float64)
    now = toy_rows(toy, y, torch.zeros(1)).trajectories.log_probs
    assert now is not None
    rows = toy_rows(toy, y, torch.tensor([advantage], dtype=torch.float64), now - math.log(ratio))
    loss, metrics = objective.loss(toy.context(1), rows)
    (found,) = torch.autograd.grad(loss, toy.theta)
    active = math.copysign(1, advantage) * (ratio - 1) > 0.1
    assert (float(found) == 0) is active
    assert float(metrics["clip_fraction"]) == active
    assert loss.item() == pytest.approx(-advantage * (1 + math.copysign(0.1, advantage) if active else ratio))
    if not active:
        assert float(found) == pytest.approx(-advantage * ratio * float((y - 0.3).mean()) / 0.5**2)


def test_groups_of_equal_rewards_give_no_rows(tiny: Build, caplog: pytest.LogCaptureFixture) -> None:
    """As in Flow-GRPO's code. The loss is over the rows that teach: with all in it, the KL would weigh as much and
    the policy gradient a third."""
    policy = moved(tiny, "flow")
    flat = PolicyGradient(Sampler(2, 1.0), 3)
    _, table = rolled(flat, policy, scorer=Scorer({"flat": Flat()}, {"flat": 1.0}))
    assert table.metrics["zero_std_share"] == 1 and len(table) == 0
    assert len(caplog.messages) == 1 and "have the same reward" in caplog.text
    objective = PolicyGradient(Sampler(2, 1.0), 3, scale_rewards="group", beta=0.1, clip_range=0.5)
    even = Scorer({"even": Even()}, {"even": 1.0})
    ctx, table = rolled(objective, policy, scorer=even)
    _, everything = rolled(replace(objective, advantage="batch"), policy, scorer=even)
    teaching = table.image.unique()
    assert 0 < len(teaching) < len(everything.image.unique()) == len(table.advantage)
    assert len(caplog.messages) == 1
    assert not table.advantage[[k for k in range(len(table.advantage)) if k not in teaching]].any()
    disturb(policy, 0.01)  # ratios are not 1 now
    full = replace(table, image=everything.image, step=everything.step)  # what it was before: every row
    kl, kl_of_all = (objective.loss(ctx, rows)[1]["kl_reference"] for rows in (table, full))
    plain = replace(objective, beta=0.0)
    ratio = plain.loss(ctx, full)[0] / plain.loss(ctx, table)[0]
    assert float(ratio) == pytest.approx(len(table) / len(full), rel=1e-3)
    assert float(kl / kl_of_all) > float(ratio)


def test_sum_reduction_is_the_joint_density(tiny: Build) -> None:
    policy = moved(tiny, "epsilon")
    ctx, table = rolled(PolicyGradient(Sampler(2, 1.0), 3), policy)
    disturb(policy, 1e-4)
    ratios = []
    for reduction in ("mean", "sum"):
        objective = PolicyGradient(Sampler(2, 1.0), 3, reduction=reduction)
        ratios.append(objective.loss(ctx, table.take(torch.tensor([1])))[1]["ratio_mean"].double().log())
    assert ratios[1] == pytest.approx(256 * float(ratios[0]), rel=2e-2)
    assert abs(ratios[1]) > 1e-3


# GRPO-Guard
def test_guard_log_ratio_is_the_mean_of_delta_times_z() -> None:
    """Eq. 8-10: unbiased (the plain one lies below 0), and the same for a step of any std; weighted by 1 / |dt|."""
    toy, size, count, delta = Toy(0.2), 16, 4000, 0.2
    z = torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    advantage = torch.linspace(-1, 1, count, dtype=torch.float64)
    found = []
    for std in (0.05, 0.5):
        y = std * z  # the old mean is 0, the new one theta
        means = torch.zeros(count, 1, size, 1, 1, dtype=torch.float64)
        kept = replace(toy.trajectories(y), means=means, log_probs=torch.zeros(count, 1, dtype=torch.float64))
        rows = one_step(kept, advantage)
        sampler = Sampler(4, 1.0, Fixed(std))  # the toy's grid: |dt| is 1/4
        guarded = PolicyGradient(sampler, 2, step_normalisation="guard", clip_range=10.0)
        loss, metrics = guarded.loss(toy.context(count), rows)
        expected = (delta * z).mean(1)
        torch.testing.assert_close(loss.detach(), (-advantage * expected.exp()).mean() * 4)
        assert metrics["approx_kl"] == pytest.approx(float(0.5 * expected.square().mean()))
        assert abs(expected.mean()) < 3 * expected.std() / math.sqrt(count)
        found.append(loss.detach())
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_guard_ratio_is_1_before_any_update(tiny: Build, kind: str) -> None:
    policy = moved(tiny, kind)
    objective = PolicyGradient(Sampler(3, 1.0), 3, step_normalisation="guard", clip_range=2e-6)
    ctx, table = rolled(objective, policy)
    _, metrics = objective.loss(ctx, table)
    assert abs(metrics["ratio_max"] - 1) < 1e-5


# TempFlow-GRPO
@pytest.mark.parametrize("window", [None, SDEWindow(1, until=3)])
def test_noise_weights_are_the_steps_std_with_mean_1(tiny: Build, window: SDEWindow | None) -> None:
    """Of all steps that may train, those of any window. UniRL's 2.25 is that mean's inverse for its nine steps."""
    policy = moved(tiny, "flow")
    sampler, fraction = Sampler(4, 1.0, FlowSDE(0.7)), 0.75 if window is None else 1.0
    settings: dict[str, Any] = {"window": window, "timestep_fraction": fraction, "clip_range": 1e9}
    plain = PolicyGradient(sampler, 2, **settings)
    ctx, table = rolled(plain, policy, 1)
    sigma = policy.family.grid(4).sigma.double()
    std = [0.7 * math.sqrt(t / (1 - t if t < 1 else 1 - sigma[1]) * (t - s)) for t, s in pairwise(sigma.tolist())]
    weighted = replace(plain, step_normalisation="noise")
    for row in range(len(table)):
        one = table.take(torch.tensor([row]))
        i = int(one.trajectories.kept_steps[one.step])
        ratio = weighted.loss(ctx, one)[0] / plain.loss(ctx, one)[0]
        assert float(ratio) == pytest.approx(std[i] / np.mean(std[:3]), rel=1e-4)
    sd35 = [1, 0.960, 0.913, 0.858, 0.790, 0.707, 0.602, 0.465, 0.278, 0.0089]
    std = [0.7 * math.sqrt(t / (1 - t if t < 1 else 1 - sd35[1]) * (t - s)) for t, s in pairwise(sd35)]
    assert 1 / np.mean(std) == pytest.approx(2.25, abs=0.01)


# Flow-DPPO
@pytest.mark.parametrize("ratio", [0.8, 1.0, 1.25])
@pytest.mark.parametrize("advantage", [-2.0, 0.0, 3.0])
@pytest.mark.parametrize("kl", [0.9, 1.1])
def test_the_kl_mask_acts_only_outward_and_beyond_the_threshold(ratio: float, advantage: float, kl: float) -> None:
    """UniRL's flowdppo: the loss is -A rho; no gradient where KL >= threshold, and rho > 1 with A > 0 or rho < 1 with
    A < 0."""
    rho = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    loss, share = masked_surrogate(rho, torch.tensor([advantage]).double(), torch.tensor([kl]).double(), 1.0)
    (found,) = torch.autograd.grad(loss.sum(), rho)
    masked = kl > 1 and (ratio - 1) * advantage > 0
    assert (float(loss), float(found)) == pytest.approx((0, 0) if masked else (-advantage * ratio, -advantage))
    assert float(share) == masked


def surrogate_drawn() -> tuple[Tensor, Tensor, Tensor]:
    """Log-ratios, advantages and means of eight steps whose old means are 0, for the authors' values."""
    generator = torch.Generator().manual_seed(9)
    log_ratio, advantage = torch.randn(2, 8, dtype=torch.float64, generator=generator).unbind()
    return 0.1 * log_ratio, advantage, 0.1 * torch.randn(8, 3, 2, 2, dtype=torch.float64, generator=generator)


def test_flow_dppo_is_the_authors_code() -> None:
    """What UniRL's flowdppo.py gave for the same steps: goldens/make_objectives.py."""
    golden = json.loads((Path(__file__).parent / "goldens/upstream_objectives.json").read_text())["flow_dppo"]
    log_ratio, advantage, means = surrogate_drawn()
    kl = Gaussian(means, torch.tensor(0.5).double()).kl(Gaussian(torch.zeros_like(means), torch.tensor(0.5).double()))
    loss, share = masked_surrogate(log_ratio.exp(), advantage, kl, 0.02)
    assert loss.tolist() == pytest.approx(golden["loss"], rel=1e-9)
    assert share.item() == golden["masked"]
    assert 0 < golden["masked"] < (kl >= 0.02).double().mean()  # some of those beyond the limit come back


def test_the_trust_region_by_kl_is_the_closed_form() -> None:
    """A step N(theta, s^2) drawn by N(0.1, s^2): KL = (theta - 0.1)^2 / 2 s^2, whatever the ratio."""
    toy, y = Toy(0.3), torch.tensor([[0.9, 0.1], [-0.4, 0.0], [0.5, 0.4]], dtype=torch.float64)
    means = torch.full((3, 1, 2, 1, 1), 0.1, dtype=torch.float64)
    old = Gaussian(means[:, 0], torch.tensor(0.5, dtype=torch.float64)).log_prob(y.reshape(3, 2, 1, 1))
    kept = replace(toy.trajectories(y), means=means, log_probs=old[:, None])
    advantage = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    ratio = torch.exp(-((y - 0.3).square() - (y - 0.1).square()).mean(1) / (2 * 0.5**2))
    assert ratio[0] > 1 > ratio[1] and ratio[2] > 1
    kl = 0.2**2 / (2 * 0.5**2)
    for threshold, masked in ((1.01 * kl, [False] * 3), (0.99 * kl, [True, False, False])):
        objective = PolicyGradient(Sampler(1, 1.0, STEP), 2, trust_region="kl", kl_threshold=threshold)
        assert objective.keeps_means
        loss, metrics = objective.loss(toy.context(3), one_step(kept, advantage))
        torch.testing.assert_close(loss.detach(), (-advantage * ratio * ~torch.tensor(masked)).mean())
        assert float(metrics["clip_fraction"]) == pytest.approx(sum(masked) / 3)


def test_before_any_update_the_kl_region_is_plain_reinforce(tiny: Build) -> None:
    policy = moved(tiny, "flow")
    objective = PolicyGradient(Sampler(3, 1.0), 3, trust_region="kl")
    ctx, table = rolled(objective, policy)
    loss, metrics = objective.loss(ctx, table)
    assert metrics["clip_fraction"] == 0
    clipped, _ = replace(objective, trust_region="clip").loss(ctx, table)
    torch.testing.assert_close(gradients(policy, loss), gradients(policy, clipped))
    notes = objective.cost(policy.family, None).notes
    assert notes["KL limit"] == "1e-05 (mean over D=256) = 0.00256 nats of a step's density"


# the reference
@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_exact_kl_and_flow_grpos(tiny: Build, kind: str) -> None:
    """Exact: |mu - mu_ref|^2 / 2 s^2 as a mean; Flow-GRPO's code leaves the step's length out: 1 / |dt| smaller."""
    policy = moved(tiny, kind)
    ctx, table = rolled(PolicyGradient(Sampler(3, 1.0), 2), policy, 1)
    table = table.take(torch.tensor([1]))
    where = ctx, Sampler(3, 1.0), table.trajectories, table.image, table.step
    with torch.no_grad():
        now, _ = replay_step(*where)
        with policy.reference():
            base, _ = replay_step(*where)
    exact = float(((now.mean - base.mean).square() / (2 * now.std.reshape(-1, 1, 1, 1) ** 2)).mean())
    measured = {}
    for kl in ("exact", "flow_grpo"):
        losses = {}
        for beta in (1e-9, 0.7):
            objective = PolicyGradient(Sampler(3, 1.0), 2, beta=beta, kl=kl)
            assert objective.needs.reference
            losses[beta], metrics = objective.loss(ctx, table)
        measured[kl] = float(metrics["kl_reference"])
        assert (losses[0.7] - losses[1e-9]).item() == pytest.approx(0.7 * measured[kl], rel=1e-3, abs=1e-6)
    sigma = policy.family.grid(3).sigma
    assert measured["exact"] == pytest.approx(exact, rel=1e-4)
    assert measured["exact"] / measured["flow_grpo"] == pytest.approx(1 / abs(float(sigma[2] - sigma[1])), rel=1e-4)
    assert exact > 1e-5


def test_kl_pulls_back_to_the_reference() -> None:
    toy = Toy(0.8, anchor=0.3)
    objective = PolicyGradient(Sampler(1, 1.0, STEP), 2, beta=2.0)
    y = torch.full((3, 2), 0.8, dtype=torch.float64)
    loss, metrics = objective.loss(toy.context(3), toy_rows(toy, y, torch.zeros(3, dtype=torch.float64)))
    assert float(metrics["kl_reference"]) == pytest.approx(0.5**2 / (2 * 0.5**2))
    (found,) = torch.autograd.grad(loss, toy.theta)
    assert float(found) == pytest.approx(2.0 * 0.5 / 0.5**2)


def test_full_finetuning_without_a_kl_needs_no_frozen_copy(tiny: Build) -> None:
    objective = PolicyGradient(Sampler(2, 1.0), 2)
    assert not objective.needs.reference
    policy = Policy(tiny("epsilon"), None, reference=objective.needs.reference)
    ctx, table = rolled(objective, policy, 1)
    objective.loss(ctx, table)[0].backward()
    assert policy.weights.frozen is None


# steps
@pytest.mark.parametrize(("steps", "fraction", "count"), [(5, 0.99, 4), (5, 0.6, 3), (4, 1.0, 4), (3, 0.1, 1)])
def test_timestep_fraction(tiny: Build, steps: int, fraction: float, count: int) -> None:
    policy = moved(tiny, "epsilon")
    objective = PolicyGradient(Sampler(steps, 1.0), 4, timestep_fraction=fraction)
    _, table = rolled(objective, policy)
    assert [table.step[table.image == k].tolist() for k in range(8)] == [list(range(count))] * 8
    assert objective.trained_steps == count == objective.cost(policy.family, None).rows


# the self-check
@pytest.mark.parametrize("guard", ["none", "guard"])
def test_other_weights_than_the_rollouts_are_noticed(tiny: Build, guard: Literal["none", "guard"]) -> None:
    policy, objective = moved(tiny, "epsilon"), PolicyGradient(Sampler(2, 1.0), 2, step_normalisation=guard)
    ctx, table = rolled(objective, policy)
    fresh = type(ctx)(policy, 0, 0, ctx.sample_indices, ctx.scorer, on_policy=True, tolerance=1e-4)
    objective.loss(fresh, table)
    disturb(policy, 0.1)
    with pytest.raises(UserError, match=r"likelihood ratio off 1 by .* \(allowed 0\.0001\).*Likely causes: half"):
        objective.loss(fresh, table)
    objective.loss(ctx, table)
    for parameter in policy.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(UserError, match="off 1 by nan"):
        objective.loss(fresh, table)


def test_dropout_is_noticed(tiny: Build) -> None:
    torch.manual_seed(0)
    policy, objective = Policy(tiny("epsilon"), LoRA(2)), PolicyGradient(Sampler(2, 1.0), 2)
    ctx, table = rolled(objective, policy)
    for module in policy.denoiser.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    policy.denoiser.train()
    with pytest.raises(UserError, match="dropout"):
        objective.loss(type(ctx)(policy, 0, 0, ctx.sample_indices, ctx.scorer, on_policy=True), table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images_per_prompt": 1}, "group of one picture"),
        ({"clip_range": 0.0}, "must be positive"),
        ({"beta": -1.0}, "beta at least 0"),
        ({"timestep_fraction": 0.0}, "timestep_fraction must be in"),
        ({"timestep_fraction": 0.5, "window": SDEWindow(2)}, "give one of them"),
    ],
)
def test_bad_hyper_parameters_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyGradient(**arguments)


def test_the_plan_says_what_a_picture_costs(tiny: Build) -> None:
    family = tiny("epsilon")
    objective = PolicyGradient(Sampler(10, 5.0, DDIM(1.0)), 8, beta=0.1, timestep_fraction=0.5)
    plan = objective.cost(family, None)
    assert (plan.rows, plan.trained, plan.frozen) == (5, 10, 30)
    assert "D=256" in plan.notes["clip range"] and "0.0256 nats" in plan.notes["clip range"]
