"""Drawing and replaying trajectories: ratios of 1, no density without noise, windows, keyed draws, diversity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from align.common.errors import UserError
from align.diffusion.kernels import DDIM, FlowSDE, Kernel
from align.diffusion.process import Grid
from align.objectives import Context
from align.objectives.online.collect import Rollout, collect, initial_noise, noise_of
from align.objectives.online.replay import log_probs, replay_step
from align.objectives.online.rewards import Scorer
from align.objectives.policy_gradient import PolicyGradient
from align.policy.policy import LoRA, Policy
from align.sampling.diversity import pairwise
from align.sampling.sampler import Sampler, SDEWindow, grid_of
from tests.helpers import TEXTS, Bright, Heard, bright, moved, prompted, rolled
from tests.pipelines import Build

KINDS = ("epsilon", pytest.param("v", marks=pytest.mark.slow), "flow")
FEW = ("epsilon", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("v", "flow")))
SHAPE = (4, 8, 8)


def drawn(policy: Policy, sampler: Sampler, count: int = 6, group: int = 3, first: int = 0, **more: Any) -> Rollout:
    """Pictures ``first`` to ``first + count`` of a rollout with ``group`` a prompt, all steps kept."""
    ctx = Context(policy, 0, 0, range(first, first + count), more.pop("scorer", bright()))
    batch = prompted(policy, (first + count - 1) // group - first // group + 1, first // group)
    with torch.no_grad():
        return collect(ctx, sampler, batch, group, more.pop("keep", range(sampler.num_inference_steps)), **more)


def latents(rollout: Rollout) -> Tensor:
    found = rollout.trajectories.latents
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("guidance_scale", [pytest.param(1.0, marks=pytest.mark.slow), 3.0])
@pytest.mark.parametrize(
    ("kind", "kernel"),
    [
        pytest.param("epsilon", DDIM(1.0), marks=pytest.mark.slow),
        *(("epsilon", DDIM(0.5)), ("v", DDIM(1.0)), ("flow", FlowSDE(0.7)), ("flow", DDIM(1.0))),
    ],
)
def test_replay_gives_the_stored_log_probs(tiny: Build, kind: str, kernel: Kernel, guidance_scale: float) -> None:
    """Drawn 4 at a time with one step for all, replayed 5 at a time with steps mixed. On a flow grid the posterior's
    last step ends at sigma 0 and is deterministic, so it is not kept."""
    policy, sampler = moved(tiny, kind), Sampler(4, guidance_scale, kernel, batch_size=4)
    rollout = drawn(policy, sampler, means=True, keep=range(3))
    ctx = Context(policy, 0, 0, range(6))
    stored = rollout.trajectories.log_probs
    torch.testing.assert_close(log_probs(ctx, sampler, rollout.trajectories, 5), stored, atol=1e-5, rtol=1e-5)
    again, y = replay_step(ctx, sampler, rollout.trajectories, torch.tensor([5, 0, 3]), torch.tensor([2, 0, 1]))
    kept = rollout.trajectories.means
    assert isinstance(kept, Tensor)
    torch.testing.assert_close(again.mean, kept[[5, 0, 3], [2, 0, 1]], atol=1e-5, rtol=1e-5)
    assert torch.equal(y, latents(rollout)[[5, 0, 3], [3, 1, 2]])


def test_fails_for_other_weights_guidance_or_reference(tiny: Build) -> None:
    policy, sampler = moved(tiny, "epsilon"), Sampler(3, 3.0)
    rollout, ctx = drawn(policy, sampler), Context(policy, 0, 0, range(6))
    stored = rollout.trajectories.log_probs
    assert isinstance(stored, Tensor)
    for other in (
        log_probs(ctx, Sampler(3, 1.0), rollout.trajectories, 8),
        log_probs(ctx, sampler, rollout.trajectories, 8, reference=True),
    ):
        assert (other - stored).abs().max() > 1e-3


@pytest.mark.parametrize("kind", FEW)
def test_log_probs_do_not_depend_on_the_chunk(tiny: Build, kind: str) -> None:
    policy, sampler = moved(tiny, kind), Sampler(3, 3.0)
    rollout, ctx = drawn(policy, sampler), Context(policy, 0, 0, range(6))
    one, eight = (log_probs(ctx, sampler, rollout.trajectories, chunk) for chunk in (1, 8))
    torch.testing.assert_close(one, eight, atol=1e-5, rtol=0)


def test_a_deterministic_sampler_has_no_density(tiny: Build) -> None:
    policy = moved(tiny, "flow")
    with pytest.raises(UserError, match="takes step 0 of 2 without noise"):
        drawn(policy, Sampler(2, 1.0, FlowSDE(0.0)))
    drawn(policy, Sampler(2, 1.0, FlowSDE(0.0)), keep=())


# whose draws
@pytest.mark.parametrize("kind", FEW)
def test_pictures_do_not_depend_on_batch_size_or_process(tiny: Build, kind: str) -> None:
    """Six pictures in groups of three; the second process begins in the middle of a group."""
    policy = moved(tiny, kind)
    whole, parts = (drawn(policy, Sampler(3, 3.0, batch_size=size)) for size in (6, 1))
    torch.testing.assert_close(latents(whole), latents(parts), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole.scores["bright"], parts.scores["bright"], atol=1e-5, rtol=1e-5)
    second = drawn(policy, Sampler(3, 3.0), count=4, first=2)
    torch.testing.assert_close(latents(whole)[2:], latents(second), atol=1e-4, rtol=1e-4)
    assert second.prompts == whole.prompts[2:]
    assert second.groups.tolist() == whole.groups.tolist()[2:] == [0, 1, 1, 1]
    torch.testing.assert_close(whole.scores["bright"][2:], second.scores["bright"], atol=1e-5, rtol=1e-5)


def test_noise_belongs_to_picture_step_and_rollout(tiny: Build) -> None:
    """Bitwise, and no two of them alike."""
    policy = moved(tiny, "epsilon")
    ctx, half = Context(policy, 0, 5, range(4)), Context(policy, 0, 5, range(2, 4))
    assert torch.equal(
        initial_noise(ctx, ctx.sample_indices, SHAPE)[2:], initial_noise(half, half.sample_indices, SHAPE)
    )
    noise = noise_of(ctx, range(4), "step", SHAPE)
    assert torch.equal(noise(1)[2:], noise_of(half, range(2, 4), "step", SHAPE)(1))
    later = Context(policy, 0, 6, range(4))
    other = Context(policy, 1, 5, range(4))
    everything = torch.cat(
        [
            initial_noise(ctx, range(4), SHAPE),
            noise(0),
            noise(1),
            noise_of(ctx, range(4), "prefix", SHAPE)(0),
            noise_of(later, range(4), "step", SHAPE)(0),
            noise_of(other, range(4), "step", SHAPE)(0),
        ]
    )
    assert len({tuple(row.flatten().tolist()) for row in everything}) == len(everything)


def test_shared_noise(tiny: Build) -> None:
    policy, sampler = moved(tiny, "epsilon"), Sampler(2, 1.0, batch_size=4)
    shared, own = (latents(drawn(policy, sampler, shared_noise=yes)) for yes in (True, False))
    for group in shared.split(3):
        assert torch.equal(group[0, 0], group[1, 0]) and torch.equal(group[0, 0], group[2, 0])
        assert not torch.equal(group[0, 1], group[1, 1])
    assert not torch.equal(shared[0, 0], shared[3, 0])
    assert len({tuple(row.flatten().tolist()) for row in own[:, 0]}) == 6


def test_pictures_have_the_resolution_asked_for(tiny: Build) -> None:
    policy, sizes = moved(tiny, "flow"), []

    class Watch(Bright):
        def score(
            self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
        ) -> Tensor:
            sizes.append(tuple(images.shape))
            return images.mean((1, 2, 3))

    ctx = Context(policy, 0, 0, range(2), Scorer({"w": Watch()}, {"w": 1.0}), resolution=12)
    with torch.no_grad():
        rollout = collect(ctx, Sampler(2, 1.0), prompted(policy, 1), 2, range(2))
    assert sizes == [(2, 3, 12, 12)]
    assert latents(rollout).shape == (2, 3, 4, 6, 6)


def test_rewards_see_every_picture_with_its_prompt_and_metadata(tiny: Build) -> None:
    policy, seen = moved(tiny, "epsilon"), []

    class Watch(Bright):
        def score(
            self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
        ) -> Tensor:
            assert metadata is not None and [row["prompt"] for row in metadata] == list(prompts)
            seen.extend(prompts)
            return torch.arange(len(seen) - len(images), len(seen)).float()

    rollout = drawn(policy, Sampler(2, 1.0, batch_size=4), scorer=Scorer({"w": Watch()}, {"w": 1.0}))
    assert seen == rollout.prompts == [TEXTS[0]] * 3 + [TEXTS[1]] * 3
    assert rollout.scores["w"].tolist() == list(range(6))
    assert rollout.metrics["reward/w"] == 2.5


# windows
def test_a_fast_window_lies_anywhere_in_the_first_half() -> None:
    places = {tuple(SDEWindow(2).steps(9, 0, rollout)) for rollout in range(60)}
    assert places == {(0, 1), (1, 2), (2, 3), (3, 4)}
    assert {tuple(SDEWindow(1, until=1).steps(9, 0, rollout)) for rollout in range(9)} == {(0,)}
    assert SDEWindow(2).steps(9, 0, 3) == SDEWindow(2).steps(9, 0, 3)
    assert [SDEWindow(2).steps(9, 0, k) for k in range(20)] != [SDEWindow(2).steps(9, 1, k) for k in range(20)]


def test_a_window_begins_no_earlier_than_told() -> None:
    places = {tuple(SDEWindow(2, until=6, start=2).steps(9, 0, rollout)) for rollout in range(60)}
    assert places == {(2, 3), (3, 4), (4, 5)}
    assert [SDEWindow(2, until=6, start=3, every=2).steps(9, 0, k)[0] for k in range(5)] == [3, 3, 4, 4, 4]


def test_a_mix_window_moves_from_noise_to_data() -> None:
    window = SDEWindow(4, every=25)
    first = [window.steps(25, 0, rollout)[0] for rollout in range(25 * 30)]
    assert first[:25] == [0] * 25 and first[25] == 1 and first[49] == 1 and first[50] == 2
    assert max(first) == first[-1] == 21
    assert [SDEWindow(2, until=6, every=1, stride=2).steps(8, 0, k)[0] for k in range(4)] == [0, 2, 4, 4]


@pytest.mark.parametrize(
    "window", [SDEWindow(6), SDEWindow(2, until=12), SDEWindow(11, every=1), SDEWindow(2, start=4)]
)
def test_a_window_that_does_not_fit_is_refused(window: SDEWindow) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        PolicyGradient(Sampler(10), window=window)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_outside_the_window_nothing_is_drawn_and_nothing_trained(tiny: Build, kind: str) -> None:
    policy, sampler, window = moved(tiny, kind), Sampler(4, 1.0, batch_size=8), range(1, 3)
    pictures: list[Tensor] = []

    class Watch(Bright):
        def score(
            self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
        ) -> Tensor:
            pictures.append(images)
            return images.mean((1, 2, 3))

    rollout = drawn(policy, sampler, keep=window, stochastic=window, scorer=Scorer({"w": Watch()}, {"w": 1.0}))
    family, grid = policy.family, policy.family.grid(4)
    cond, ctx = prompted(policy).cond.take(torch.arange(6) // 3), Context(policy, 0, 0, range(6))

    def deterministic(x: Tensor, i: int) -> Tensor:
        said = policy.predict(x, grid.t[i].expand(6), cond)
        return grid.alpha[i + 1] * said.x0 + grid.sigma[i + 1] * said.eps

    kept = latents(rollout)
    assert kept.shape[1] == 3 and rollout.trajectories.kept_steps.tolist() == [1, 2]
    with torch.no_grad():
        before = deterministic(initial_noise(ctx, range(6), SHAPE), 0)
        torch.testing.assert_close(kept[:, 0], before, atol=1e-4, rtol=1e-4)
        after = family.to_image(deterministic(kept[:, 2], 3))
        inside = deterministic(kept[:, 0], 1)
    torch.testing.assert_close(pictures[0], after, atol=1e-4, rtol=1e-4)
    assert (kept[:, 1] - inside).abs().mean() > 0.05
    objective = PolicyGradient(sampler, 3, window=SDEWindow(2, every=1, until=3))
    ctx, table = rolled(objective, policy, step=1)
    heard = Heard(policy)
    objective.loss(ctx, table)[0].backward()
    assert heard.times(trained=True) == set(grid.t[1:3].tolist())


# cost
@pytest.mark.parametrize("guidance_scale", [pytest.param(1.0, marks=pytest.mark.slow), 3.0])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(
    ("arguments", "trained_steps"),
    [
        pytest.param({}, 4, marks=pytest.mark.slow),
        pytest.param({"timestep_fraction": 0.99}, 3, marks=pytest.mark.slow),
        ({"window": SDEWindow(2)}, 2),
        pytest.param({"step_normalisation": "guard"}, 4, marks=pytest.mark.slow),
        ({"kl": "flow_grpo"}, 4),
    ],
)
def test_no_evaluation_more_than_the_method_needs(
    tiny: Build, arguments: dict[str, Any], trained_steps: int, beta: float, guidance_scale: float
) -> None:
    """A rollout asks once a step; training once a trained step, and the reference as often where there is a KL."""
    policy = moved(tiny, "flow")
    objective = PolicyGradient(Sampler(4, guidance_scale, batch_size=3), 2, beta=beta, **arguments)
    assert policy.family.uncond is not None
    heard, each, pictures = Heard(policy), 1 if guidance_scale == 1.0 else 2, 4
    ctx, table = rolled(objective, policy)
    assert (heard.rows(False), heard.rows(True)) == (pictures * 4 * each, 0)
    for chunk in table.chunks(3):
        objective.loss(ctx, chunk)[0].backward()
    reference = trained_steps if beta else 0
    assert heard.rows(True) == pictures * trained_steps * each
    assert heard.rows(False) == pictures * (4 + reference) * each
    plan = objective.cost(policy.family, None)
    assert (plan.trained * pictures, plan.frozen * pictures) == (heard.rows(True), heard.rows(False))
    assert len(table) == pictures * plan.rows


def test_the_grid_of_one_family_is_not_given_to_the_next() -> None:
    """Families may die and others be born at the same address."""

    class Some:
        def __init__(self, last: float) -> None:
            self.last = last

        def grid(self, steps: int) -> Grid:
            t = torch.linspace(1, self.last, steps + 1)
            return Grid(t, 1 - t, t)

    found = [float(grid_of(Some(k / 100), 3).t[-1]) for k in range(20)]
    assert found == pytest.approx([k / 100 for k in range(20)])


# diversity
def test_pairwise_distance_is_the_loop_over_pairs() -> None:
    values = torch.randn(7, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    groups = torch.tensor([4, 9, 4, 9, 4, 2, 9])
    expected = []
    for group in (4, 9):  # 2 has a single member and no distance
        members = [values[k] for k in range(7) if groups[k] == group]
        pairs = [(a, b) for k, a in enumerate(members) for b in members[:k]]
        expected.append(sum(float((a - b).square().mean().sqrt()) for a, b in pairs) / len(pairs))
    torch.testing.assert_close(pairwise(values, groups), torch.tensor(expected))
    assert len(pairwise(values, torch.arange(7))) == 0


class Alike:
    """Features that see no difference."""

    power = 1

    def __call__(self, images: Tensor) -> Tensor:
        return torch.ones(len(images), 5)


def test_a_rollout_measures_its_diversity(tiny: Build) -> None:
    policy = Policy(tiny("epsilon"), LoRA(2))
    ctx = Context(policy, 0, 0, range(6), bright(), features=Alike())  # type: ignore[arg-type]
    with torch.no_grad():
        rollout = collect(ctx, Sampler(2, 1.0), prompted(policy), 3, ())
    assert rollout.metrics["diversity/pixels"] > 0
    assert rollout.metrics["diversity/latents"] > 0
    assert rollout.metrics["diversity/features"] == 0
    assert not rollout.trajectories.latents.numel()
    assert "diversity/pixels" not in drawn(policy, Sampler(2, 1.0), 2, 1).metrics
