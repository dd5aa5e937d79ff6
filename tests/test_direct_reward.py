"""Reward back-propagation: gradients by hand on a linear network, what passes where on real ones, and whole runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from align.common.errors import UserError
from align.diffusion.kernels import DDIM
from align.diffusion.process import Grid, Prediction
from align.families import Conditioning
from align.objectives import Context, DirectReward
from align.objectives.direct_reward import DirectRewardRows
from align.objectives.online.collect import initial_noise
from align.objectives.online.differentiate import TrainedPredictor
from align.objectives.online.rewards import Scorer
from align.policy.policy import LoRA, Policy
from align.sampling.loop import sample
from align.sampling.sampler import Sampler
from align.train import main
from align.training.memory import trace
from tests.benchmarks import memory as benchmark
from tests.helpers import (
    Bright,
    Heard,
    errors,
    gradients,
    launch_together,
    lines,
    moved,
    online,
    rolled,
    same,
    untimed,
    weights,
    write,
)
from tests.pipelines import Build

KINDS = ("epsilon", pytest.param("v", marks=pytest.mark.slow), "flow")
T = 5
PLAIN: dict[str, Any] = {"checkpoint": False, "decode_batch_size": None}


def made(steps: int = 3, guidance_scale: float = 1.0, **arguments: Any) -> DirectReward:
    return DirectReward(Sampler(steps, guidance_scale), **(PLAIN | arguments))


# by hand
class Linear:
    """v(x) = a x + b on a flow's grid, policy and family in one, float64; an image is 1/2 + x / 100."""

    device = torch.device("cpu")
    prediction_type = "flow_prediction"
    default_guidance_scale = 1.0
    cell = 1

    def __init__(self) -> None:
        self.a, self.b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.7, -0.2))

    @property
    def family(self) -> Linear:
        return self

    def latent_shape(self, *_: int | None) -> tuple[int, int, int]:
        return (3, 1, 1)

    def grid(self, steps: int, *_: int | None) -> Grid:
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return Grid(t, 1 - t, t)

    def path(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def to_image(self, x0: Tensor) -> Tensor:
        return 0.5 + x0 / 100

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float = 1.0) -> Prediction:
        return Prediction(self.a * x + self.b, x, *self.path(t), self.prediction_type)  # type: ignore[arg-type]

    def recomputing(self) -> AbstractContextManager[None]:
        return nullcontext()


class Near(Bright):
    """-|image - 0.6|^2 in float64."""

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        return -(images - 0.6).square().mean((1, 2, 3))


def by_hand(objective: DirectReward, x: Tensor) -> tuple[float, float]:
    """d loss / d (a, b): the sensitivities of the state, carried along Euler's steps beside it."""
    a, b, dt = 0.7, -0.2, -1 / T
    trained, stop = objective.steps(0, 0)
    by_a, by_b = torch.zeros_like(x), torch.zeros_like(x)
    for i in range(T):
        t, v, here = 1 - i / T, a * x + b, float(i in trained)
        dv_a, dv_b = here * x, here * torch.ones_like(x)
        if not objective.stop_input_gradient:
            dv_a, dv_b = dv_a + here * a * by_a, dv_b + here * a * by_b
        if i == stop:
            x, by_a, by_b = x - t * v, by_a - t * dv_a, by_b - t * dv_b
            break
        x, by_a, by_b = x + dt * v, by_a + dt * dv_a, by_b + dt * dv_b
    image = 0.5 + x / 100
    reward = -(image - 0.6).square().mean((1, 2, 3))
    slope = -2 * (image - 0.6) / 3 / 100  # of the reward, by x
    counts = torch.ones_like(reward) if objective.hinge is None else (reward < objective.hinge).double()
    weighted = -counts[:, None, None, None] * slope / len(x)
    return (weighted * by_a).sum().item(), (weighted * by_b).sum().item()


@pytest.mark.parametrize(
    "arguments",
    [
        {"last_steps": 1},
        {"last_steps": 3},
        {"last_steps": None},
        {"last_steps": None, "random_truncation": True},
        {"last_steps": 1, "early_stop": 3},
        {"last_steps": 1, "early_stop": 3, "hinge": -0.0102},
        {"last_steps": None, "stop_input_gradient": True},
        {"last_steps": None, "stop_input_gradient": True, "train_steps": 2, "early_stop": 2},
        {"last_steps": 4, "train_steps": 2, "stop_input_gradient": True, "checkpoint": True, "decode_batch_size": 2},
    ],
    ids=str,
)
def test_the_gradient_is_the_one_by_hand(arguments: dict[str, Any]) -> None:
    toy, objective = Linear(), made(T, **arguments)
    ctx = Context(toy, 0, 0, range(6), Scorer({"near": Near()}, {"near": 1.0}))  # type: ignore[arg-type]
    rows = DirectRewardRows(
        image=torch.arange(6),
        number=torch.arange(6),
        cond=Conditioning({"c": torch.zeros(6, 1)}),
        prompts=["x"] * 6,
        metadata=[{}] * 6,
    )
    start: list[Tensor] = []
    plain = toy.predict

    def spied(x: Tensor, *rest: Any) -> Prediction:
        start.append(x.detach())
        return plain(x, *rest)

    toy.predict = spied  # type: ignore[method-assign]
    loss, _ = objective.loss(ctx, rows)
    found = torch.autograd.grad(loss, [toy.a, toy.b])
    wanted = by_hand(objective, start[0].double())
    # scores are kept in float32, gradients through them and the toy's arithmetic in float64
    assert [g.item() for g in found] == pytest.approx(wanted, rel=1e-6)
    assert abs(wanted[0]) > 1e-7


def direct_start() -> Tensor:
    """Where the authors' trajectories start."""
    return torch.randn(4, 3, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("last_steps", range(1, T + 1))
def test_the_gradient_is_alignprops(last_steps: int) -> None:
    """What AlignProp's sampling loop gave to the weights of the same network from the same states, where it begins to
    pass gradients at step ``T - last_steps``: goldens/make_objectives.py."""
    golden = json.loads((Path(__file__).parent / "goldens/upstream_objectives.json").read_text())["alignprop"]
    toy, objective = Linear(), made(T, last_steps=last_steps)
    predict = TrainedPredictor(toy)  # type: ignore[arg-type]
    trained, stop = objective.steps(0, 0)
    cond = Conditioning({"c": torch.zeros(4, 1)})
    end = sample(predict, toy.grid(T), cond, direct_start(), 1.0, DDIM(), lambda _: None, trained=trained, stop=stop)
    loss = -Near().score(images=toy.to_image(end), prompts=[]).mean()
    found = [each.item() for each in torch.autograd.grad(loss, [toy.a, toy.b])]
    assert found == pytest.approx(golden[str(T - last_steps)], rel=1e-9)


def test_which_steps_are_trained() -> None:
    """ReFL's and DRTune's stops are any of the last, DRTune's steps evenly spaced, AlignProp's truncation is 1 to K."""
    stops = [made(20, early_stop=10).steps(0, k) for k in range(300)]
    assert {stop for _, stop in stops} == set(range(10, 20)) and all(steps == [stop] for steps, stop in stops)
    tuned = [made(20, last_steps=None, train_steps=4, early_stop=5).steps(1, k) for k in range(300)]
    for steps, stop in tuned:
        assert stop is not None and 15 <= stop < 20 and len(steps) == 4 and steps[-1] <= stop
        assert {b - a for a, b in pairwise(steps)} == {(stop + 1) // 4}
    assert len({steps[0] for steps, _ in tuned}) > 3
    counts = {len(made(6, last_steps=4, random_truncation=True).steps(0, k)[0]) for k in range(100)}
    assert counts == {1, 2, 3, 4}
    assert made(6, last_steps=2).steps(0, 0) == ([4, 5], None)


# on real networks
def near(found: Tensor, wanted: Tensor, rtol: float = 1e-3) -> bool:
    """Whether two gradients differ by rounding alone."""
    return bool((found - wanted).norm() < rtol * wanted.norm())


@pytest.mark.parametrize(
    ("count", "guidance_scale", "kind"),
    [
        pytest.param(
            count, scale, kind, marks=[] if kind == ("flow" if count == 2 else "epsilon") else pytest.mark.slow
        )
        for count, scale in ((1, 3.0), (2, 1.0), (3, 1.0))
        for kind in ("epsilon", "v", "flow")
    ],
)
def test_truncated_is_the_gradient_of_the_last_steps(tiny: Build, kind: str, count: int, guidance_scale: float) -> None:
    """Of all steps where the truncation is at all; of x0 itself, whatever has drawn the state before."""
    policy, objective = moved(tiny, kind), made(3, guidance_scale, last_steps=count)
    seen: list[Tensor] = []
    plain = policy.predict
    policy.predict = lambda x, *rest: (seen.append(x.detach()), plain(x, *rest))[1]  # type: ignore[method-assign,func-returns-value]
    ctx, rows = rolled(objective, policy)
    found = gradients(policy, objective.loss(ctx, rows)[0])
    family, cond = policy.family, rows.cond  # type: ignore[attr-defined]
    with torch.no_grad():
        before = sample(plain, family.grid(3), cond, seen[0], guidance_scale, steps=range(3 - count))
    x0 = sample(plain, family.grid(3), cond, before, guidance_scale, steps=range(3 - count, 3))
    wanted = gradients(policy, -family.to_image(x0).mean())
    assert near(found, wanted)
    whole = gradients(policy, -family.to_image(sample(plain, family.grid(3), cond, seen[0], guidance_scale)).mean())
    assert near(found, whole) == (count == 3)


@pytest.mark.parametrize("kind", KINDS)
def test_refl_judges_what_the_network_takes_for_the_image(tiny: Build, kind: str) -> None:
    policy, objective = moved(tiny, kind), made(4, early_stop=3, hinge=2.0)
    stop = objective.steps(0, 0)[1]
    assert stop is not None and stop < 3
    judged: list[Tensor] = []

    class Spy(Bright):
        def score(
            self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
        ) -> Tensor:
            judged.append(images.detach())
            return super().score(images=images, prompts=prompts)

    heard = Heard(policy)
    ctx, rows = rolled(objective, policy, scorer=Scorer({"spy": Spy()}, {"spy": 1.0}))
    loss, metrics = objective.loss(ctx, rows)
    family = policy.family
    assert heard.times(trained=True) == {family.grid(4).t[stop].item()}
    seen: list[Prediction] = []
    x = initial_noise(ctx, [0, 1], family.latent_shape())
    with torch.no_grad():
        sample(
            lambda *given: (seen.append(policy.predict(*given)), seen[-1])[1],  # type: ignore[func-returns-value]
            family.grid(4), rows.cond, x, 1.0,  # type: ignore[attr-defined]
        )  # fmt: skip
    torch.testing.assert_close(judged[0], family.to_image(seen[stop].x0), atol=1e-5, rtol=0)
    assert loss.item() == pytest.approx(2 - metrics["reward"].item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", pytest.param("flow", marks=pytest.mark.slow)])
def test_checkpoints_change_no_bit_and_no_count(tiny: Build, kind: str) -> None:
    found, counts = [], []
    for settings in ({}, {"checkpoint": True}, {"decode_batch_size": 1}, {"checkpoint": True, "decode_batch_size": 2}):
        policy = moved(tiny, kind)
        objective = made(3, 2.0, last_steps=2, kl_weight=0.5, **settings)
        ctx, rows = rolled(objective, policy)
        found.append(gradients(policy, objective.loss(ctx, rows)[0]))
        counts.append(dict(policy.evaluations))
    plan = objective.cost(policy.family, None)
    assert all(torch.equal(found[0], other) for other in (found[1], found[3]))
    assert near(found[2], found[0])  # one image at once: other kernels
    assert all(count == {"trained": plan.trained * 2, "frozen": plan.frozen * 2} for count in counts)


def test_low_variance_draws_start_from_the_finished_image(tiny: Build) -> None:
    """DRaFT-LV: the mean of DRaFT-1's gradient and those of the last step from new noisings of x0, by hand."""
    policy, objective = moved(tiny, "epsilon"), made(3, noise_draws=3)
    ctx, rows = rolled(objective, policy)
    asked: list[Tensor] = []
    plain = policy.predict
    policy.predict = lambda x, *rest: (asked.append(x), plain(x, *rest))[1]  # type: ignore[method-assign,func-returns-value]
    found = gradients(policy, objective.loss(ctx, rows)[0])
    family, grid, cond = policy.family, policy.family.grid(3), rows.cond  # type: ignore[attr-defined]
    assert len(asked) == 5 and objective.cost(family, None).trained == 3
    x0 = sample(plain, grid, cond, asked[0], 1.0).detach()
    eps = [(x - grid.alpha[2] * x0) / grid.sigma[2] for x in asked[3:]]
    assert not torch.allclose(eps[0], eps[1], atol=0.1) and 0.9 < torch.stack(eps).std().item() < 1.1
    each = [
        gradients(policy, -family.to_image(sample(plain, grid, cond, x.detach(), 1.0, steps=[2])).mean())
        for x in asked[2:]
    ]
    assert near(found, torch.stack(each).mean(0), 1e-5) and not near(found, each[0], 1e-4)


@pytest.mark.parametrize("arguments", [{}, {"kernel": DDIM(1.0)}])
def test_an_image_is_the_same_in_any_batch(tiny: Build, arguments: dict[str, Any]) -> None:
    policy = moved(tiny, "flow")
    objective = replace(made(last_steps=2, kl_weight=0.1), sampler=Sampler(3, 1.0, **arguments))
    ctx, rows = rolled(objective, policy, prompts=4)
    whole = gradients(policy, objective.loss(ctx, rows)[0])
    parts = [
        gradients(policy, objective.loss(ctx, part)[0]) for part in rows.take(torch.tensor([2, 0, 3, 1])).chunks(2)
    ]
    assert near(whole, (parts[0] + parts[1]) / 2)


@pytest.mark.parametrize("lora", [LoRA(2), pytest.param(None, marks=pytest.mark.slow)])
def test_the_kl_is_nothing_at_first_and_holds_the_weights(tiny: Build, lora: LoRA | None) -> None:
    torch.manual_seed(0)
    policy, objective = Policy(tiny("epsilon"), lora), made(last_steps=2, kl_weight=1e6)
    ctx, rows = rolled(objective, policy)
    loss, metrics = objective.loss(ctx, rows)
    free = gradients(policy, made(last_steps=2).loss(ctx, rows)[0])
    assert metrics["kl_reference"].item() == 0 and torch.equal(gradients(policy, loss), free)
    policy = moved(tiny, "epsilon", lora)
    loss, metrics = objective.loss(ctx := replace(ctx, policy=policy), rows)
    assert metrics["kl_reference"].item() > 0
    assert loss.item() == pytest.approx(1e6 * metrics["kl_reference"].item() - metrics["reward"].item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("v", "flow"))])
def test_a_policy_becomes_brighter(tiny: Build, kind: str) -> None:
    torch.manual_seed(0)
    policy = Policy(tiny(kind), LoRA(4), reference=False)
    adam, values = torch.optim.Adam(policy.parameters(), 1e-2), []
    for step in range(12):
        ctx, rows = rolled(made(last_steps=1), policy, step=step % 2)
        loss, metrics = made(last_steps=1).loss(ctx, rows)
        adam.zero_grad()
        loss.backward()
        adam.step()
        values.append(metrics["reward"].item())
    assert values[-2] > values[0] + 0.001 and values[-1] > values[1] + 0.001


# what is refused, and what is watched
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"last_steps": 4}, "last_steps must be 1 to the sampler's 3 steps"),
        ({"early_stop": -1}, "early_stop 0 to 3"),
        ({"last_steps": 2, "train_steps": 3}, "train_steps must be 1 to last_steps, 2"),
        ({"noise_draws": 2, "last_steps": 2}, "only with last_steps: 1"),
        ({"kl_weight": -1.0}, "kl_weight must be at least 0"),
        ({"decode_batch_size": 0}, "decode_batch_size at least 1"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**arguments)


class Lying(Bright):
    """Says that it is differentiable."""

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        return images.detach().mean((1, 2, 3))


def test_a_reward_that_only_says_that_it_has_a_gradient_is_named(tiny: Build) -> None:
    policy, scorer = moved(tiny, "flow"), Scorer({"bright": Bright(), "liar": Lying()}, {"bright": 1.0, "liar": 1.0})
    ctx, rows = rolled(made(), policy, scorer=scorer)
    with pytest.raises(UserError, match="^liar: differentiable is true, but"):
        made().loss(ctx, rows)


# whole runs
@pytest.fixture
def config(tiny_folders: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    config = online(tiny_folders["flow"], tmp_path, "DirectReward")
    config["objective"]["init_args"] = {
        "sampler": {"num_inference_steps": 3, "guidance_scale": 1.0}, "last_steps": 2, "kl_weight": 0.1,
    }  # fmt: skip
    config["rewards"] += [{"name": "JPEGCompressibility", "weight": 0.0, "label": "jpeg"}]
    return config | {"rollout_batch_size": 4, "train_batch_size": 2, "gradient_accumulation_steps": 2}


def test_rewards_without_a_gradient_are_refused_at_start_up(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config["rewards"] = [{"name": "Shapes"}, {"name": "tests.helpers.Bright", "label": "bright"}]
    assert main(["--config", write(config)]) == 2
    (error,) = errors(capsys.readouterr().err)
    assert "DirectReward needs differentiable rewards, Shapes has no gradient; give it weight 0" in error
    assert not Path(config["output_dir"]).exists()


@pytest.mark.slow
def test_resumed_is_the_uninterrupted_run(config: dict[str, Any], tmp_path: Path) -> None:
    """Bitwise; and the watched reward, which has no gradient, is in every line."""
    config["objective"]["init_args"] |= {"random_truncation": True, "early_stop": 1}
    config |= {"checkpointing_steps": 2}
    assert main(["--config", write(config, output_dir=str(tmp_path / "whole"))]) == 0
    assert main(["--config", write(config, max_train_steps=2)]) == 0
    assert main(["--config", write(config), "--resume_from_checkpoint", "latest"]) == 0
    assert same(weights(config["output_dir"]), weights(tmp_path / "whole"))
    assert untimed(config["output_dir"]) == untimed(tmp_path / "whole")
    logged = [line for line in lines(config["output_dir"]) if "loss" in line]
    assert len(logged) == 4 and all(line["rollout/pictures"] == 4 for line in logged)
    assert all({"reward", "reward/bright", "reward/jpeg", "kl_reference"} <= line.keys() for line in logged)


@pytest.mark.slow
def test_two_processes_are_one(config: dict[str, Any], tmp_path: Path) -> None:
    """What is computed again in the backward pass goes past the wrapper that averages gradients."""
    config |= {"max_train_steps": 2, "max_grad_norm": 1e9, "learning_rate": 1e-4}
    assert main(["--config", write(config, output_dir=str(tmp_path / "one"))]) == 0
    assert launch_together(["--config", write(config, gradient_accumulation_steps=1)]) == [0, 0]
    one, two = (
        [line["grad_norm"] for line in lines(folder) if "loss" in line]
        for folder in (tmp_path / "one", tmp_path / "run")
    )
    assert one == pytest.approx(two, rel=1e-4) and len(one) == 2


# memory
def test_half_precision_is_traced(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps without a gradient and then one with it, under one autocast."""
    monkeypatch.setitem(benchmark.OBJECTIVES, "DirectReward", {"sampler": {"num_inference_steps": 2}})
    config = benchmark.config_of(tiny_folders["flow"], "DirectReward", tmp_path, resolution=32, train_batch_size=2)
    whole = trace(config).peak.total
    config.mixed_precision = "fp16"
    assert 0 < trace(config).peak.total < whole


@pytest.mark.slow
def test_a_trace_counts_what_checkpoints_spare(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradient through four steps takes more than through one, and hardly more where the states alone are kept."""

    def peak(**arguments: Any) -> int:
        settings = {"sampler": {"num_inference_steps": 4}} | arguments
        monkeypatch.setitem(benchmark.OBJECTIVES, "DirectReward", settings)
        config = benchmark.config_of(tiny_folders["flow"], "DirectReward", tmp_path, resolution=32, train_batch_size=2)
        phases = {phase.name: phase for phase in trace(config).phases}
        return phases["update"].total

    one, all_kept = (peak(last_steps=count, checkpoint=False, decode_batch_size=None) for count in (1, 4))
    recomputed = peak(last_steps=4)
    assert all_kept > 1.2 * recomputed and recomputed < one < all_kept
