"""FIND: closed forms of the noise distribution, the clipped surrogate on toys, pairing, frozen models, files, runs."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, PNDMScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence
from torchvision.transforms.functional import pil_to_tensor

from align import families
from align import sample as drawing
from align.common import rng
from align.common.errors import UserError
from align.data.prompts import Prompts
from align.diffusion.process import Reduction
from align.families import LORA_FILE
from align.objectives import Context
from align.objectives.find import FIND
from align.objectives.noise_memory import FINDRows, NoiseSamples
from align.objectives.online.advantages import calibrated_advantages
from align.objectives.value_network import ValueNet
from align.policy.initial_noise import NOISE_FILE, InitialNoise, kl, log_prob
from align.policy.policy import Policy
from align.sampling.loop import sample
from align.sampling.sampler import Sampler
from align.train import main
from tests.helpers import (
    TEXTS,
    Bright,
    Heard,
    bright,
    errors,
    everything,
    families_loaded,
    launch_together,
    lines,
    online,
    prompt_file,
    prompted,
    rolled,
    same,
    untimed,
    write,
)
from tests.pipelines import Build

KINDS = ("epsilon", "flow")
SHAPE = (4, 8, 8)
DIMS = math.prod(SHAPE)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noise_for(
    budget: float | None = None,
    shape: tuple[int, int, int] = SHAPE,
    typical: bool = False,
) -> InitialNoise:
    scheduler = "FlowMatchEulerDiscreteScheduler"
    return InitialNoise(TEXTS, shape, "tiny-sd3", scheduler, budget, typical)


def shifted(noise: InitialNoise, scale: float = 0.3) -> InitialNoise:
    """With parameters that are not the prior's."""
    for k, parameter in enumerate(noise.parameters()):
        parameter.data += scale * normal(*parameter.shape, seed=k)
    return noise


def learner(tiny: Build, kind: str, objective: FIND) -> Policy:
    """A policy of which the noise of TEXTS is trained."""
    family = tiny(kind)
    scheduler = type(family.pipe.scheduler).__name__
    args = (objective.kl_budget, objective.typical)
    return Policy(family, trained=InitialNoise(TEXTS, SHAPE, family.source, scheduler, *args))


def alone(noise: InitialNoise, step: int = 0) -> Context:
    """What :meth:`FIND.loss` asks of a context, without a model."""
    policy: Any = SimpleNamespace(model=noise, trained=noise, family=SimpleNamespace(device=torch.device("cpu")))
    return Context(policy, 0, step, range(1))


def rows(z: Tensor, old: Tensor, advantage: Tensor, index: Tensor | None = None) -> FINDRows:
    """Noises ``z`` drawn at log-density ``old``, of one rollout, whose calibrated rewards are ``advantage``."""
    return FINDRows(
        image=torch.arange(len(z)),
        index=torch.zeros(len(z), dtype=torch.long) if index is None else index,
        noise=z,
        log_prob=old,
        advantage=advantage,
        reward=torch.zeros(len(z)),
        rollout=torch.zeros(len(z), dtype=torch.long),
    )


# closed forms
def test_log_prob_is_torchs() -> None:
    mean, log_std, z = normal(3, *SHAPE), 0.3 * normal(3, *SHAPE, seed=1), normal(3, *SHAPE, seed=2)
    expected = Independent(Normal(mean, log_std.exp()), 3).log_prob(z)
    torch.testing.assert_close(log_prob(z, mean, log_std, "mean") * DIMS, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(log_prob(z, mean, log_std, "sum"), expected, rtol=1e-5, atol=0)


def test_kl_is_torchs_and_quadratic_near_the_prior() -> None:
    mean, log_std = normal(3, *SHAPE), 0.3 * normal(3, *SHAPE, seed=1)
    prior = Normal(torch.zeros(SHAPE), torch.ones(SHAPE))
    expected = kl_divergence(Normal(mean, log_std.exp()), prior).flatten(1)
    torch.testing.assert_close(kl(mean, log_std, "sum"), expected.sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(kl(mean, log_std, "mean"), expected.mean(1), rtol=1e-5, atol=0)
    assert (kl(mean, log_std) > 0).all()
    for delta in (-0.05, 0.05):
        mu, std = torch.full((1, *SHAPE), 0.1, dtype=torch.float64), torch.full((1, *SHAPE), 1 + delta).double()
        assert kl(mu, std.log()).item() == pytest.approx(0.1**2 / 2 + delta**2, rel=0.03)


def test_a_fresh_distribution_is_the_prior() -> None:
    noise, z = noise_for(), normal(4, *SHAPE)
    mean, log_std = noise.all()
    assert torch.equal(mean, torch.zeros(4, *SHAPE)) and torch.equal(log_std, torch.zeros(4, *SHAPE))
    assert torch.equal(kl(mean, log_std), torch.zeros(4))
    assert torch.equal(noise.initial(TEXTS, z), z)
    expected = Normal(0.0, 1.0).log_prob(z).flatten(1).mean(1)
    loss, metrics = FIND().loss(alone(noise), rows(z, expected, torch.ones(4)))
    assert loss.item() == pytest.approx(-1, abs=1e-6)
    assert metrics["ratio_max"].item() == pytest.approx(1, abs=1e-6) and metrics["approx_kl"] < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_a_fresh_distribution_start_from_plain_randn(tiny: Build, kind: str) -> None:
    objective = FIND(Sampler(2, 1.0), 3, antithetic=False)
    ctx, table = rolled(objective, learner(tiny, kind, objective), step=4)
    plain = [torch.randn(SHAPE, generator=rng.generator(0, "initial", 4, position)) for position in range(6)]
    assert torch.equal(table.noise, torch.stack(plain))
    _, metrics = objective.loss(ctx, table)
    assert metrics["ratio_max"] == 1 and metrics["approx_kl"] == 0 and table.metrics["kl"] == 0


def test_every_number_of_every_prompt_has_a_gradient() -> None:
    """2·d numbers a prompt; mean and log std can both leave the start."""
    noise = noise_for()
    assert sum(p.numel() for p in noise.parameters()) == 2 * DIMS * len(TEXTS)
    z = normal(4, *SHAPE)
    old = log_prob(z, *noise.all()).detach()
    FIND().loss(alone(noise), rows(z, old, torch.tensor([1.0, -1.0, 2.0, -2.0]), torch.arange(4)))[0].backward()
    for name in ("mean", "log_std"):
        grad = noise.left[name].grad
        assert grad is not None and all(row.any() for row in grad)


# the surrogate
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_gradient_of_a_toy(reduction: Reduction) -> None:
    """r(z) = -|z - c|²: dE/dmean = -2 (mean - c) and dE/dlog_std = -2 std²; the mean convention divides both by d."""
    shape, count = (2, 1, 2), 100_000
    noise, c = noise_for(shape=shape), normal(*shape, seed=7)
    noise.left["mean"].data[0], noise.left["log_std"].data[0] = normal(*shape, seed=8), 0.3 * normal(*shape, seed=9)
    mean, log_std = (part[0].detach() for part in noise.all())
    z = mean + log_std.exp() * normal(count, *shape, seed=1)
    reward = -(z - c).square().flatten(1).sum(1)
    calibrated = reward - reward.mean()
    old = log_prob(z, mean, log_std, reduction)
    loss, _ = FIND(reduction=reduction, kl_weight=0.0).loss(alone(noise), rows(z, old, calibrated))
    loss.backward()
    scaled = (z - mean) / log_std.exp()
    for name, exact, score in (
        ("mean", -2 * (mean - c), scaled / log_std.exp()),
        ("log_std", -2 * (2 * log_std).exp(), scaled.square() - 1),
    ):
        grad = noise.left[name].grad
        assert grad is not None and not grad[1:].any()
        found = -grad[0] * (4 if reduction == "mean" else 1)
        each = calibrated[:, None, None, None] * score
        error = each.std(0) / count**0.5
        assert ((found - exact).abs() < 3 * error).all()
        assert (error < 0.15).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_training_on_the_toy_finds_the_target(reduction: Reduction) -> None:
    shape = (2, 1, 2)
    noise, c = noise_for(shape=shape), torch.full(shape, 0.8)
    objective = FIND(reduction=reduction, kl_weight=0.0)
    optimiser = torch.optim.Adam(noise.parameters(), lr=0.03)
    distances, spreads = [], []
    for step in range(60):
        with torch.no_grad():
            mean, log_std = (part[0] for part in noise.all())
            distances.append((mean - c).norm().item())
            spreads.append(log_std.exp().mean().item())
            z = mean + log_std.exp() * normal(64, *shape, seed=step)
            reward = -(z - c).square().flatten(1).sum(1)
            table = rows(z, log_prob(z, mean, log_std, reduction), (reward - reward.mean()) / reward.std())
        objective.loss(alone(noise), table)[0].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert distances[-1] < 0.2 * distances[0]
    assert spreads[-1] < 0.6


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 2.0])
@pytest.mark.parametrize("advantage", [-2.0, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_clip_is_ppos(ratio: float, advantage: float, reduction: Reduction) -> None:
    """No gradient iff (A > 0 and rho > 1 + c) or (A < 0 and rho < 1 - c); the released code stops outside on both."""
    noise, z = shifted(noise_for()), normal(1, *SHAPE, seed=5)
    mean, log_std = (part[:1].detach() for part in noise.all())
    old = log_prob(z, mean, log_std, reduction) - math.log(ratio)
    objective = FIND(reduction=reduction, kl_weight=0.0)
    loss, metrics = objective.loss(alone(noise), rows(z, old, torch.tensor([advantage])))
    loss.backward()
    stopped = ratio > 1.2 if advantage > 0 else ratio < 0.8
    grad = noise.left["mean"].grad
    assert grad is not None and bool((grad == 0).all()) is stopped
    assert metrics["clip_fraction"].item() == stopped
    kept = min(max(ratio, 0.8), 1.2) if stopped else ratio
    assert loss.item() == pytest.approx(-advantage * kept, rel=1e-3)


def test_the_kl_of_the_loss_is_the_exact_one() -> None:
    """Its weight is of the mean over the latent; the released regulariser counts the mean twice."""
    noise, z, index = shifted(noise_for()), normal(4, *SHAPE), torch.arange(4)
    table = rows(z, log_prob(z, *noise.all()).detach(), torch.zeros(4), index)
    loss, _ = FIND(kl_weight=0.5).loss(alone(noise), table)
    assert loss.item() == pytest.approx(0.5 * kl(*noise.all()).mean().item(), rel=1e-5)


# bounds
def test_the_budget_is_kept_and_no_more_than_kept() -> None:
    noise = noise_for(budget=0.02)
    for name, part in noise.left.items():
        part.data = torch.tensor([0.0, 0.05, 0.5, 1.5])[:, None, None, None] * normal(*part.shape, seed=len(name))
    before = [part.clone() for part in noise.all()]
    near = kl(before[0], before[1]) <= 0.02
    assert near.tolist() == [True, True, False, False]
    noise.after_step()
    after = noise.all()
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[near], new[near])
    found = kl(*after)[~near]
    assert (found <= 0.02).all()
    torch.testing.assert_close(found, torch.full((2,), 0.02), rtol=1e-3, atol=0)
    for old, new in zip(before, after, strict=True):  # towards the prior in a straight line
        assert torch.cosine_similarity(old[~near].flatten(1), new[~near].flatten(1)).min() > 1 - 1e-5


@pytest.mark.parametrize("budget", [None, 0.02])
def test_a_typical_norm_is_kept_within_the_budget(budget: float | None) -> None:
    """mean² + std² is 1 over the latent, so that z has the norm of plain noise, whatever the means are."""
    noise = noise_for(budget, typical=True)
    fresh = [part.clone() for part in noise.all()]
    noise.after_step()
    assert all(torch.equal(a, b) for a, b in zip(fresh, noise.all(), strict=True))
    noise.left["mean"].data = torch.tensor([0.0, 0.02, 0.5, 5.0])[:, None, None, None] * normal(
        *noise.left["mean"].shape, seed=1
    )
    before = noise.all()[0].clone()
    noise.after_step()
    mean, log_std = noise.all()
    torch.testing.assert_close((mean.square() + (2 * log_std).exp()).mean((1, 2, 3)), torch.ones(4))
    z = noise.initial(TEXTS, normal(4, *SHAPE, seed=5))
    torch.testing.assert_close(z.flatten(1).norm(dim=1) / DIMS**0.5, torch.ones(4), atol=0.15, rtol=0)
    assert torch.equal(mean[:2], before[:2])
    assert budget is None or (kl(mean, log_std) <= budget * (1 + 1e-3)).all()
    assert budget is None or kl(mean, log_std)[2:].min() > 0.99 * budget
    assert torch.cosine_similarity(before[2:].flatten(1), mean[2:].flatten(1)).min() > 1 - 1e-5


def test_the_budget_bounds_the_standard_deviations_too() -> None:
    noise = noise_for(budget=0.02, typical=True)
    noise.left["mean"].data, noise.left["log_std"].data = 0.1 * normal(4, *SHAPE), 0.3 * normal(4, *SHAPE, seed=1)
    noise.after_step()
    mean, log_std = noise.all()
    assert (kl(mean, log_std) <= 0.02 * (1 + 1e-3)).all()
    assert all(row.any() for row in mean)


def test_without_a_budget_nothing_is_taken_back() -> None:
    noise = shifted(noise_for(), 3.0)
    before = [part.clone() for part in noise.all()]
    noise.after_step()
    assert all(torch.equal(a, b) for a, b in zip(before, noise.all(), strict=True))


def test_the_average_of_steps_is_within_the_budget_too(tiny: Build) -> None:
    """What a run with ema_decay saves is bounded as what it trains is."""
    noise = noise_for(budget=0.02)
    policy = Policy(tiny("flow"), trained=noise, ema_decay=0.5)
    for _ in range(6):
        noise.left["mean"].data += 3.0
        policy.after_step()
        with policy.ema_scope():
            assert kl(*noise.all()).max() <= 0.02 * (1 + 1e-4)


def test_std_has_a_floor() -> None:
    noise = noise_for()
    noise.left["log_std"].data.fill_(-100.0)
    assert noise.all()[1].exp().min().item() == pytest.approx(1e-4)


# rollouts
def test_pairs_are_mean_plus_and_minus(tiny: Build) -> None:
    objective = FIND(Sampler(2, 1.0), 4)
    policy = learner(tiny, "flow", objective)
    noise = shifted(policy.trained)  # type: ignore[arg-type]
    _, table = rolled(objective, policy, step=3)
    z, (mean, log_std) = table.noise, noise(table.index)
    for k in range(0, 8, 2):
        eps = torch.randn(SHAPE, generator=rng.generator(0, "initial", 3, k))
        torch.testing.assert_close(z[k], mean[k] + log_std[k].exp() * eps)
        torch.testing.assert_close(z[k + 1], mean[k] - log_std[k].exp() * eps)
    own = FIND(Sampler(2, 1.0), 4, antithetic=False)
    free = rolled(own, policy, step=3)[1].noise
    assert not torch.allclose(free[0] + free[1], 2 * mean[0])


def seen(policy: Policy, sampler: Sampler, prompts: list[str], z: Tensor) -> Tensor:
    """The brightness of the pictures that ``z`` gives, one by one."""
    family, found = policy.family, []
    with torch.no_grad():
        for prompt, start in zip(prompts, z, strict=True):
            cond = family.encode([prompt])
            x = sample(
                policy.predict,
                family.grid(sampler.num_inference_steps),
                cond,
                start[None],
                sampler.guidance_scale_of(family),
            )
            found.append(Bright().score(images=family.to_image(x), prompts=[prompt]))
    return torch.cat(found)


@pytest.mark.parametrize("kind", ["epsilon", pytest.param("flow", marks=pytest.mark.slow)])
def test_rewards_stay_with_their_noise(tiny: Build, kind: str) -> None:
    """Over three rollouts of other prompts, replayed rows, and sampler batches that cut prompts in two: the reward of
    a row is that of its own noise under its own prompt, and its density is that of the policy as it now is."""
    sampler = Sampler(2, 2.0, batch_size=3)
    objective = FIND(sampler, 4, replay=6)
    policy = learner(tiny, kind, objective)
    noise = policy.trained
    assert isinstance(noise, InitialNoise)
    for step, first in enumerate((0, 1, 0)):
        shifted(noise, 0.1)
        then = [part.detach().clone() for part in noise.all()]
        ctx = Context(policy, 0, step, range(8), bright())
        with torch.no_grad():
            table = objective.rollout(ctx, prompted(policy, 2, first))
    index, made, z = table.index, table.rollout, table.noise
    # rollouts were of prompts 0 and 1, 1 and 2, 0 and 1; the last one takes in the rows of prompts 0 and 1 before it
    kept = sorted(zip(index.tolist(), made.tolist(), strict=True))
    assert kept == sorted([(0, 0)] * 4 + [(0, 2)] * 4 + [(1, 0)] * 2 + [(1, 1)] * 4 + [(1, 2)] * 4)
    torch.testing.assert_close(
        table.reward, seen(policy, sampler, [TEXTS[k] for k in index.tolist()], z), atol=1e-5, rtol=1e-4
    )
    for row in range(len(table)):
        mean, log_std = (part[index[row]][None] for part in then)
        assert table.log_prob[row].item() == pytest.approx(log_prob(z[row][None], mean, log_std).item())
    memory = objective.memory.samples
    assert memory is not None
    held = zip(memory.index.tolist(), memory.rollout.tolist(), strict=True)
    assert sorted(held) == sorted([(0, 0)] * 2 + [(0, 2)] * 4 + [(1, 1)] * 2 + [(1, 2)] * 4 + [(2, 1)] * 4)
    assert objective.loss(ctx, table)[1]["approx_kl"] < 1e-9


def test_replay_of_the_best() -> None:
    """Of each prompt those of the highest rewards yet, of equals the older."""
    objective = FIND(Sampler(1, 1.0), 4, replay=2, replay_by="reward")
    reward = torch.tensor([1.0, 5.0, 2.0, 3.0, 9.0, 1.0, 1.0, 1.0])
    index = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    for step in range(3):
        number = 8 * step + torch.arange(8)
        rows = objective.memory.recall(NoiseSamples(index, torch.zeros(8, 1), reward + (step == 1) * 0.5, number))
    assert objective.memory.samples is not None
    assert sorted(objective.memory.samples.rollout.tolist()) == [1, 4, 9, 12]  # and not 17 and 20, as good as 1 and 4
    assert sorted(rows.rollout.tolist()) == [1, 4, 9, 12, *range(16, 24)]


def test_leave_one_out_advantages(tiny: Build) -> None:
    """Against a plain loop; they sum to 0 in every prompt, and a prompt of equal rewards has none."""
    reward = torch.tensor([1.0, 2.0, 4.0, 0.5, 3.0, -1.0, 7.0, 7.0])
    index = torch.tensor([2, 2, 2, 0, 0, 0, 1, 1])
    found = calibrated_advantages(reward, index)
    for k in range(8):
        mine = [float(reward[j]) for j in range(8) if index[j] == index[k]]
        others = [float(reward[j]) for j in range(8) if index[j] == index[k] and j != k]
        scale = torch.tensor(mine).std(correction=0).item()
        expected = (float(reward[k]) - sum(others) / len(others)) / (scale + 1e-4) if scale else 0.0
        assert found[k].item() == pytest.approx(expected, abs=1e-5)
    for prompt in range(3):
        assert found[index == prompt].sum().item() == pytest.approx(0, abs=1e-5)
    assert not found[6:].any() and found[:6].all()


@pytest.mark.parametrize("calibration", ["leave_one_out", "value"])
def test_every_prompt_moves_its_own_distribution_only(tiny: Build, calibration: Any) -> None:
    objective = FIND(Sampler(1, 1.0), 4, calibration=calibration, kl_weight=0.1)
    policy = learner(tiny, "flow", objective)
    noise = shifted(policy.trained)  # type: ignore[arg-type]
    ctx = Context(policy, 0, 0, range(8), bright())
    with torch.no_grad():
        table = objective.rollout(ctx, prompted(policy, 2, 1))
    found = []
    for chosen in (torch.arange(8), torch.arange(4)):
        noise.zero_grad()
        loss, _ = objective.loss(ctx, table.take(chosen))
        (loss * len(chosen)).backward()
        grad = noise.left["mean"].grad
        assert grad is not None
        found.append(grad.clone())
    assert [bool(row.any()) for row in found[0]] == [False, True, True, False]
    assert [bool(row.any()) for row in found[1]] == [False, True, False, False]
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize(("kind", "guidance_scale"), [("epsilon", 2.0), ("flow", 1.0)])
def test_a_rollout_costs_what_the_plan_says_and_training_nothing(tiny: Build, kind: str, guidance_scale: float) -> None:
    objective = FIND(Sampler(3, guidance_scale, batch_size=5), 4)
    policy = learner(tiny, kind, objective)
    plan, heard = objective.cost(policy.family, None), Heard(policy)
    assert policy.family.uncond is not None
    ctx, table = rolled(objective, policy)
    objective.loss(ctx, table)[0].backward()
    assert (
        heard.rows(False)
        == policy.evaluations["frozen"]
        == plan.frozen * 8
        == 3 * 8 * (1 if guidance_scale == 1 else 2)
    )
    assert heard.rows(True) == policy.evaluations["trained"] == plan.trained == 0


def test_best_so_far_never_forgets(tiny: Build) -> None:
    objective = FIND(Sampler(2, 1.0), 4)
    policy = learner(tiny, "epsilon", objective)
    best: dict[int, float] = {}
    for step, first in enumerate((0, 1, 0)):
        ctx = Context(policy, 0, step, range(8), bright())
        with torch.no_grad():
            table = objective.rollout(ctx, prompted(policy, 2, first))
        for number, reward in zip(table.index.tolist(), table.reward.tolist(), strict=True):
            best[number] = max(reward, best.get(number, -math.inf))
        assert table.metrics["best_so_far"] == pytest.approx(sum(best.values()) / len(best))
        assert table.metrics["noise_norm"] == pytest.approx(1, abs=0.1)
    assert objective.best == {TEXTS[k]: pytest.approx(value) for k, value in best.items()}


# dynamic reward calibration
def test_the_value_network_learns_and_goes_on_after_a_checkpoint() -> None:
    seen, reward = normal(8, 5), normal(8, seed=1)
    net, other = ValueNet(5, 1e-2, 0), ValueNet(5, 1e-2, 3)
    start = net(seen)
    net.learn(seen, reward, 20)
    assert (net(seen) - reward).square().mean() < 0.5 * (start - reward).square().mean()
    other.load_state({name: tensor.clone() for name, tensor in net.state().items()})
    for one in (net, other):
        one.learn(seen, reward, 3)
    assert torch.equal(net(seen), other(seen))


@pytest.mark.slow
def test_value_calibration_is_against_what_was_expected(tiny: Build) -> None:
    """Before the network learns from this rollout; fresh rows only teach it; other distributions are other inputs."""
    objective = FIND(Sampler(1, 1.0), 4, calibration="value", value_steps=50, value_learning_rate=1e-3, replay=4)
    policy = learner(tiny, "flow", objective)
    expected, gaps = torch.zeros(8), []
    for step in range(5):
        shifted(policy.trained, 0.01)  # type: ignore[arg-type]
        ctx = Context(policy, 0, step, range(8), bright())
        with torch.no_grad():
            table = objective.rollout(ctx, prompted(policy))
        reward, index = table.reward, table.index
        scale = torch.tensor([reward[index == k].std(correction=0) for k in (0, 1)])[index]
        expected = reward - table.advantage * (scale + 1e-4)
        assert all(len(expected[index == k].round(decimals=5).unique()) == 1 for k in (0, 1))
        gaps.append((expected - reward).abs().mean().item())
    assert expected[index == 0][0] != pytest.approx(expected[index == 1][0].item(), abs=1e-6)
    assert gaps[-1] < 0.3 * gaps[0]


# files
def test_a_saved_distribution_gives_the_same_latents(tmp_path: Path, tiny: Build) -> None:
    noise, family = shifted(noise_for()), tiny("flow")
    loaded = InitialNoise.load(noise.save(tmp_path))
    assert set(load_file(tmp_path / NOISE_FILE)) == {"mean", "std"}
    with safe_open(tmp_path / NOISE_FILE, "pt") as file:
        assert file.metadata().keys() >= {"model", "scheduler", "shape", "prompts"}
    assert (loaded.prompts, loaded.shape, loaded.source) == (TEXTS, SHAPE, "tiny-sd3")
    for prompt in TEXTS:
        mine, theirs = noise.latents(family.pipe, prompt, [5, 6]), loaded.latents(family.pipe, prompt, [5, 6])
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)  # std goes through a logarithm
        again = InitialNoise.load(tmp_path)
        assert torch.equal(theirs, again.latents(family.pipe, prompt, [5, 6]))
    assert not torch.equal(noise.latents(family.pipe, TEXTS[0], [5]), noise.latents(family.pipe, TEXTS[1], [5]))


def test_prompts_without_a_distribution_start_from_the_noise_itself() -> None:
    noise, z = shifted(noise_for()), normal(3, *SHAPE)
    moved = noise.initial([TEXTS[2], "nobody's", TEXTS[0]], z)
    assert torch.equal(moved[1], z[1])
    mean, log_std = noise.all()
    for row, number in ((0, 2), (2, 0)):
        torch.testing.assert_close(moved[row], mean[number] + log_std[number].exp() * z[row])
    assert torch.equal(noise.initial(["nobody's"] * 3, z), z)


def test_noise_for_something_else_is_refused(tiny: Build, tmp_path: Path) -> None:
    family = tiny("flow")
    noise = noise_for()
    noise.check(family)
    with pytest.raises(UserError, match=r"latents of \(4, 8, 8\), not \(4, 16, 16\)"):
        noise.check(family, 32)
    with pytest.raises(UserError, match="model 'tiny-sd3', not 'tiny-sd-epsilon'.*scheduler Flow.* not DDIMScheduler"):
        noise.check(tiny("epsilon"))
    with pytest.raises(UserError, match="learned for scheduler FlowMatch.*, the pipeline has DDIMScheduler"):
        noise.latents(tiny("epsilon").pipe, TEXTS[0], [0])
    with pytest.raises(UserError, match="no noise was learned for 'nothing', only for 'two red stars'"):
        noise.latents(family.pipe, "nothing", [0])
    with pytest.raises(UserError, match="'a star' comes twice"):
        InitialNoise(["a star", "b", "a star"], SHAPE, "x", "y")
    with pytest.raises(UserError, match="no noise at .*expected the find.safetensors"):
        InitialNoise.load(tmp_path)


@pytest.mark.parametrize("what", ["another kind of safetensors", "no safetensors at all"])
def test_another_file_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "other.safetensors"
    if what.startswith("no"):
        path.write_text("hello")
    else:
        save_file({"mean": torch.zeros(1, *SHAPE), "std": torch.ones(1, *SHAPE)}, path)
    with pytest.raises(UserError, match=r"other.safetensors is no (find.safetensors|safetensors file)"):
        InitialNoise.load(path)


def test_the_scheduler_of_the_file_is_the_one_that_draws(tiny: Build, tmp_path: Path) -> None:
    """Families of Stable Diffusion draw by DDIM, whatever scheduler the folder came with (SD 1.5: PNDM); a stock
    pipeline on DDIM gives these pictures, one on PNDM does not."""
    family = tiny("epsilon")
    family.pipe.register_modules(scheduler=PNDMScheduler.from_config(family.pipe.scheduler.config))
    noise = FIND().trains(type(family)(family.pipe, "x"), Prompts(prompt_file(tmp_path, TEXTS)))
    with pytest.raises(UserError, match="scheduler"):
        noise.latents(family.pipe, TEXTS[0], [0])
    family.pipe.register_modules(scheduler=DDIMScheduler.from_config(family.pipe.scheduler.config, clip_sample=True))
    with pytest.raises(UserError, match="clip_sample True.*stock_scheduler"):
        noise.latents(family.pipe, TEXTS[0], [0])
    family.pipe.register_modules(scheduler=families.stock_scheduler(family.pipe))
    noise.latents(family.pipe, TEXTS[0], [0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_stock_pipeline_draws_what_we_draw(tiny_folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """The saved noise through ``pipe(.., latents=...)`` and through ``align.sample``: one picture."""
    family = families.load(str(tiny_folders[kind]))
    noise = InitialNoise(TEXTS, SHAPE, family.source, type(family.pipe.scheduler).__name__)
    file = shifted(noise).save(tmp_path)
    command = [
        "--noise",
        str(file),
        "--prompts",
        TEXTS[1],
        "--images_per_prompt",
        "2",
        "--seed",
        "5",
        "--num_inference_steps",
        "4",
    ]
    folder = tmp_path / "pictures"
    assert drawing.main([*command, "--guidance_scale", "3", "--output_dir", str(folder)]) == 0
    mine = torch.stack([pil_to_tensor(Image.open(folder / f"0000{k}.png")) for k in range(2)])
    stock = DiffusionPipeline.from_pretrained(tiny_folders[kind])
    latents = InitialNoise.load(file).latents(stock, TEXTS[1], [5, 6])
    theirs = stock([TEXTS[1]] * 2, latents=latents, num_inference_steps=4, guidance_scale=3.0, output_type="pt").images
    assert (theirs * 255 - mine).abs().max() < 0.51  # 8 bit
    plain = normal(1, *SHAPE, seed=5)
    other = stock(TEXTS[1], latents=plain, num_inference_steps=4, guidance_scale=3.0, output_type="pt").images
    assert (theirs[0] - other[0]).abs().max() > 0.05


# whole runs
def finding(pipeline: Path, folder: Path, **arguments: Any) -> dict[str, Any]:
    """Three prompts, two of them a rollout, four pictures each."""
    arguments = {"sampler": {"num_inference_steps": 2, "guidance_scale": 2.0}, "images_per_prompt": 4} | arguments
    config = online(pipeline, folder, "FIND", **arguments)
    data = {"class_path": "Prompts", "init_args": {"path": prompt_file(folder, TEXTS[:3])}}
    return config | {"data": data, "rollout_batch_size": 2, "train_batch_size": 64, "learning_rate": 0.02}


def kept(folder: str | Path) -> dict[str, Tensor]:
    return load_file(Path(folder) / NOISE_FILE)


@pytest.mark.parametrize("kind", ["epsilon", pytest.param("flow", marks=pytest.mark.slow)])
def test_a_run_trains_the_noise_and_nothing_else(
    tiny_folders: dict[str, Path], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finding(tiny_folders[kind], tmp_path, kl_budget=0.001)
    loaded = families_loaded(monkeypatch)
    assert main(["--config", write(config, max_train_steps=3)]) == 0
    (family,) = loaded
    assert same(everything(family), everything(families.load(str(tiny_folders[kind]))))
    assert not any(p.requires_grad or p.grad is not None for p in family.denoiser.parameters())
    found = kept(tmp_path / "run")
    assert {name: tuple(part.shape) for name, part in found.items()} == {"mean": (3, *SHAPE), "std": (3, *SHAPE)}
    assert all(row.any() for row in found["mean"]) and (found["std"] != 1).any()
    assert kl(found["mean"], found["std"].log()).max() <= 0.001 * (1 + 1e-3)
    assert not (tmp_path / "run" / LORA_FILE).exists()
    logged = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert logged[0]["ratio_max"] == pytest.approx(1, abs=1e-5) and logged[0]["rollout/kl"] == 0
    assert [line["evaluations/frozen"] for line in logged] == [32, 64, 96]
    assert logged[-1]["evaluations/trained"] == 0
    best = [line["rollout/best_so_far"] for line in logged]
    assert all(line["rollout/best_so_far"] >= line["rollout/reward/bright"] for line in logged) and len(best) == 3
    card = (tmp_path / "run" / "README.md").read_text()
    assert "InitialNoise.load" in card and "latents=" in card and "load_lora_weights" not in card


def test_resumed_is_the_uninterrupted_run(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """Bitwise, with replayed rows, the value network, and the best of each prompt."""
    config = finding(tiny_folders["flow"], tmp_path, replay=6, calibration="value")
    config |= {"checkpointing_steps": 2, "max_train_steps": 4, "train_batch_size": 64}
    assert main(["--config", write(config, output_dir=str(tmp_path / "whole"))]) == 0
    assert main(["--config", write(config, max_train_steps=2)]) == 0
    assert not same(kept(tmp_path / "run"), kept(tmp_path / "whole"))
    assert main(["--config", write(config), "--resume_from_checkpoint", "latest"]) == 0
    assert same(kept(tmp_path / "run"), kept(tmp_path / "whole"))
    assert untimed(tmp_path / "run") == untimed(tmp_path / "whole")
    memory = [load_file(tmp_path / run / "checkpoint-4" / "objective.safetensors") for run in ("run", "whole")]
    assert same(*memory) and any(name.startswith("value.") for name in memory[0]) and "memory.noise" in memory[0]


@pytest.mark.slow
def test_two_processes_are_one(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """Each draws the pictures of one prompt, and replays its share of all rows."""
    config = finding(tiny_folders["flow"], tmp_path, replay=6, calibration="value")
    config |= {"max_train_steps": 3, "max_grad_norm": 1e9, "adam_epsilon": 1e-3}
    assert main(["--config", write(config, output_dir=str(tmp_path / "one"))]) == 0
    assert launch_together(["--config", write(config)]) == [0, 0]
    one, two = kept(tmp_path / "one"), kept(tmp_path / "run")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-5, rtol=1e-3)
    for a, b in zip(untimed(tmp_path / "one"), untimed(tmp_path / "run"), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"ratio_max"}:
            assert a[key] == pytest.approx(b[key], abs=2e-4, rel=1e-5), key


@pytest.mark.slow
def test_pictures_get_brighter(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """The same seeds from the learned noise and from plain noise, on every prompt."""
    config = finding(tiny_folders["flow"], tmp_path, images_per_prompt=16, kl_budget=0.1)
    config |= {"rollout_batch_size": 3, "max_train_steps": 10, "learning_rate": 0.05, "train_batch_size": 48}
    config["objective"]["init_args"]["sampler"]["guidance_scale"] = 1.0
    assert main(["--config", write(config)]) == 0
    family = families.load(str(tiny_folders["flow"]))
    policy, sampler = Policy(family, trained=InitialNoise.load(tmp_path / "run")), Sampler(2, 1.0)
    for prompt in TEXTS[:3]:
        z = normal(12, *SHAPE, seed=1)
        gain = seen(policy, sampler, [prompt] * 12, policy.initial([prompt] * 12, z)) - seen(
            policy, sampler, [prompt] * 12, z
        )
        assert gain.mean() > 3 * gain.std() / 12**0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"twice": True}, "the prompt 'a star' comes twice"),
        (
            {"data": {"class_path": "PreferencePairs", "init_args": {"path": "shapes-preferences"}}},
            "FIND trains on PromptBatch, but data: PreferencePairs gives PairBatch",
        ),
        ({"tasks": True}, "Prompts"),
        ({"rewards": []}, "FIND learns from rewards"),
        ({"initial_weights": "./somewhere"}, "this objective trains no weight of the model"),
    ],
)
def test_mistakes_are_one_clear_line(
    tiny_folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    config = finding(tiny_folders["flow"], tmp_path)
    if changes.pop("twice", False):
        config["data"]["init_args"]["path"] = prompt_file(tmp_path, [*TEXTS, "a star"])
    if changes.pop("tasks", False):
        tasks = {"one": config["data"]["init_args"]["path"]}
        config["data"] = {"class_path": "TaskPrompts", "init_args": {"tasks": tasks}}
    assert main(["--config", write(config, **changes)]) == 2
    (error,) = errors(capsys.readouterr().err)
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images_per_prompt": 3}, "even in pairs; got 3"),
        ({"images_per_prompt": 1, "antithetic": False}, "images_per_prompt must be at least 2"),
        ({"clip_range": 0.0}, "clip_range must be positive"),
        ({"replay": -1}, "replay must be at least 0"),
        ({"kl_weight": -1.0}, "kl_weight at least 0"),
        ({"kl_budget": 0.0}, "kl_budget positive or null"),
        ({"value_steps": 0}, "value_steps at least 1"),
    ],
)
def test_bad_hyper_parameters_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FIND(**arguments)
    assert FIND(images_per_prompt=3, antithetic=False).needs.group_size == 3
