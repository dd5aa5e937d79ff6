"""On-policy distillation: closed forms, routing, what stays frozen, targets, cold start, its costs, runs, a toy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from align import families
from align.common.command import parse
from align.common.errors import UserError
from align.data.dataset import Setup
from align.data.prompts import PromptBatch, TaskPrompts, TaskSet
from align.diffusion.kernels import DDIM, FlowSDE, Kernel
from align.diffusion.process import Grid, Prediction
from align.families import LORA_FILE, Conditioning, Family
from align.objectives import Context
from align.objectives.losses import Form, Normalize, divergence
from align.objectives.opd import OPD, OPDRows
from align.objectives.teachers import LoRATeacher, PipelineTeacher, Teacher
from align.policy.policy import LoRA, Policy
from align.sampling.sampler import Sampler
from align.train import main
from align.training.batch_plan import BatchPlan
from align.training.config import TrainConfig
from align.training.trainer import Trainer
from tests.helpers import (
    TEXTS,
    Fixed,
    Heard,
    errors,
    everything,
    families_loaded,
    gradients,
    launch_together,
    lines,
    online,
    prompt_file,
    same,
    untimed,
    weights,
    write,
)
from tests.pipelines import Build, tiny_sd, tiny_sd3

KINDS = ("epsilon", "flow")
NORMALISE = ("paper", "code", "velocity")
SHAPE = (4, 8, 8)
DIMS = 256
A, B = TEXTS[:2], TEXTS[2:]  # the prompts of two tasks


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def move(policy: Policy, seed: int, scale: float = 0.2) -> None:
    for k, parameter in enumerate(policy.parameters()):
        parameter.data += scale * normal(*parameter.shape, seed=100 * seed + k)


def expert(tiny: Build, kind: str, path: Path, seed: int, lora: LoRA | None = LoRA(2)) -> Path:
    """The folder of a LoRA that has been moved."""
    torch.manual_seed(seed)
    policy = Policy(tiny(kind), lora)
    move(policy, seed)
    path.mkdir(exist_ok=True)
    policy.save(path)
    return path


@pytest.fixture(scope="module")
def schools(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By kind, a folder with a LoRA of rank 2 for either task, ``a`` and ``b``."""
    found = {}
    for kind, build in (("epsilon", tiny_sd), ("flow", tiny_sd3)):
        found[kind] = tmp_path_factory.mktemp(kind)
        for seed, task in enumerate(("a", "b"), 1):
            expert(lambda kind, build=build: build(), kind, found[kind] / task, seed)
    return found


def experts(school: Path, guidance_scale: float | None = None) -> list[Teacher]:
    return [LoRATeacher(task, guidance_scale, school / task) for task in ("a", "b")]


def student(tiny: Build, kind: str, objective: OPD, lora: LoRA | None = LoRA(2), moved: int = 0, **more: Any) -> Policy:
    torch.manual_seed(0)
    policy = Policy(tiny(kind), lora, objective.needs.reference, **more)
    if moved:
        move(policy, moved, 0.05)
    objective.prepare(policy, None)
    return policy


def tasked(family: Family, count: int = 2) -> PromptBatch:
    rows = [[{"prompt": text, "task": task} for text in texts] for task, texts in (("a", A), ("b", B))]
    return TaskSet(family, rows).batch([k // 2 for k in range(count)])


def taught(objective: OPD, policy: Policy, prompts: int = 2) -> tuple[Context, OPDRows]:
    """A rollout as the loop asks for it."""
    ctx = Context(policy, 0, 0, range(prompts * objective.needs.group_size))
    with torch.no_grad():
        return ctx, objective.rollout(ctx, tasked(policy.family, prompts))


def column(table: OPDRows, name: str) -> Tensor:
    found = getattr(table.trajectories if name == "latents" else table, name)
    assert isinstance(found, Tensor)
    return found


# closed forms
@pytest.mark.parametrize("steps", [4, 10])
def test_the_divergence_of_a_flow(steps: int) -> None:
    """KL_j against torch's, against eta² |dv|² / (2 s²) with the paper's eta, and the conventions among each other."""
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    t = 3 * t / (1 + 2 * t)  # SD3's shift
    grid, kernel, noise = Grid(1000 * t, 1 - t, t), FlowSDE(0.7), 0.7
    x, v_s, v_t = (normal(2, *SHAPE, seed=k).double() for k in range(3))
    gap = (v_s - v_t).square().flatten(1).sum(1)
    for i in range(steps):
        one, other = (Prediction(v, x, 1 - t[i], t[i], "flow_prediction") for v in (v_s, v_t))
        m_s, m_t = kernel(one, grid, i), kernel(other, grid, i)
        dt = t[i + 1] - t[i]
        variance = noise**2 * t[i] / (1 - t[i] if i else 1 - t[1])
        eta, s2 = (1 + variance * (1 - t[i]) / (2 * t[i])) * dt, variance * -dt
        found = divergence(one, other, kernel, grid, i, "sde", "paper")
        if i < steps - 1 or s2 > 0:
            torch_kl = kl_divergence(Normal(m_s.mean, m_s.std), Normal(m_t.mean, m_t.std)).flatten(1).sum(1)
            torch.testing.assert_close(found, torch_kl, rtol=1e-8, atol=0)
            torch.testing.assert_close(found, eta**2 * gap / (2 * s2), rtol=1e-5, atol=0)
        code = divergence(one, other, kernel, grid, i, "sde", "code")
        torch.testing.assert_close(code * DIMS / -dt, found, rtol=1e-8, atol=0)
        ode = divergence(one, other, kernel, grid, i, "ode", "paper")
        torch.testing.assert_close(ode, dt**2 * gap / 2, rtol=1e-8, atol=0)
        torch.testing.assert_close(divergence(one, other, kernel, grid, i, "ode", "code") * DIMS, ode)
        for form in ("ode", "sde"):
            plain = divergence(one, other, kernel, grid, i, form, "velocity")
            torch.testing.assert_close(plain, (gap / DIMS).float())
            torch.testing.assert_close(divergence(one, one, kernel, grid, i, form, "paper"), torch.zeros(2).double())


def test_the_divergence_of_ddim(tiny: Build) -> None:
    grid, kernel = tiny("epsilon").grid(4), DDIM(1.0)
    x, e_s, e_t = (normal(2, *SHAPE, seed=k).double() for k in range(3))
    for i in range(4):
        alpha, sigma = grid.alpha[i].double(), grid.sigma[i].double()
        one, other = (Prediction(e, x, alpha, sigma, "epsilon") for e in (e_s, e_t))
        m_s, m_t = kernel(one, grid, i), kernel(other, grid, i)
        expected = kl_divergence(Normal(m_s.mean, m_s.std), Normal(m_t.mean, m_t.std)).flatten(1).sum(1)
        torch.testing.assert_close(divergence(one, other, kernel, grid, i, "sde", "paper"), expected)
        deterministic = DDIM()(one, grid, i).mean - DDIM()(other, grid, i).mean
        ode = divergence(one, other, kernel, grid, i, "ode", "paper")
        torch.testing.assert_close(ode, deterministic.square().flatten(1).sum(1) / 2)


def test_rows_of_several_steps_are_those_of_each() -> None:
    t = torch.linspace(1, 0, 6)
    grid, kernel = Grid(t, 1 - t, t), FlowSDE(0.7)
    x, one, other = (normal(4, *SHAPE, seed=k) for k in range(3))
    steps = torch.tensor([0, 3, 1, 3])
    for form in ("ode", "sde"):
        for normalize in NORMALISE:
            args: Any = (form, normalize)
            mine, theirs = (Prediction(raw, x, 1 - t[steps], t[steps], "flow_prediction") for raw in (one, other))
            found = divergence(mine, theirs, kernel, grid, steps, *args)
            for row, i in enumerate(steps.tolist()):
                mine, theirs = (
                    Prediction(raw[row][None], x[row][None], 1 - t[i], t[i], "flow_prediction") for raw in (one, other)
                )
                torch.testing.assert_close(found[row][None], divergence(mine, theirs, kernel, grid, i, *args))


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ("ode", "epsilon"),
        *(
            pytest.param(*both, marks=pytest.mark.slow)
            for both in (("sde", "flow"), ("ode", "flow"), ("sde", "epsilon"))
        ),
    ],
)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(
    tiny: Build, kind: str, form: Form, schools: dict[str, Path]
) -> None:
    """Loss and gradient 0 for every step, in every convention; of another teacher they are not."""
    path = schools[kind] / "a"
    objective = OPD([LoRATeacher(path=path)], Sampler(3, 2.0), form=form, skip_last=False)
    policy = student(tiny, kind, objective, initial=path)
    ctx, table = taught(objective, policy)
    far = column(table, "target") + 0.1
    assert sorted(table.step.tolist()) == [0, 0, 1, 1, 2, 2]
    for normalize in NORMALISE:
        objective.normalize = normalize  # type: ignore[assignment]
        for row in list(table.chunks(1))[:3]:
            loss, metrics = objective.loss(ctx, row)
            away, _ = objective.loss(ctx, replace(row, target=far))
            assert loss.item() == metrics["divergence"].item() < 1e-7 * away.item()
            if normalize == "paper":
                continue  # "code" but for a factor
            # the gradient is linear in the difference, which is rounding here (1.4e-4 of it was seen) and 0.1 there
            assert gradients(policy, loss).abs().max() < 2e-4 * gradients(policy, away).abs().max()


def surrogate(policy_mean: Tensor, teacher_mean: Tensor, std: Tensor, eps: Tensor) -> Tensor:
    """The clipped policy gradient's loss at ratio 1, the reward being log p_T - log p_S of what was drawn."""
    drawn = (policy_mean + std * eps).detach()
    old, target = Normal(policy_mean.detach(), std), Normal(teacher_mean, std)
    advantage = (target.log_prob(drawn) - old.log_prob(drawn)).flatten(1).sum(1)
    ratio = (Normal(policy_mean, std).log_prob(drawn) - old.log_prob(drawn)).flatten(1).sum(1).exp()
    return -(ratio * advantage).mean()


def test_the_policy_gradient_of_a_toy_averages_to_the_closed_form() -> None:
    """And scatters, where the closed form is one number; in float64, N(theta, s²) against N(0.4, s²)."""
    theta = torch.tensor([[0.1, -0.2, 0.9]], dtype=torch.float64, requires_grad=True)
    target, std, count = torch.full((1, 3), 0.4, dtype=torch.float64), 0.5, 20_000
    one, other = (
        Prediction(raw[..., None, None], torch.zeros(1, 3, 1, 1), *Z, "flow_prediction") for raw in (theta, target)
    )
    t = torch.tensor([1.0, 0.0])
    loss = divergence(one, other, Fixed(std), Grid(t, 1 - t, t), 0, "sde", "paper").sum()
    (closed,) = torch.autograd.grad(loss, theta)
    torch.testing.assert_close(closed, (theta - target).detach() / std**2)
    eps = normal(count, 3, seed=3).double()
    (found,) = torch.autograd.grad(surrogate(theta, target, torch.tensor(std).double(), eps), theta)
    advantage = (Normal(target, std).log_prob(theta + std * eps) - Normal(theta, std).log_prob(theta + std * eps)).sum(
        1
    )
    each = -(advantage[:, None] * eps / std).detach()
    torch.testing.assert_close(found[0], each.mean(0))
    assert ((found - closed).abs() < 3 * each.std(0) / count**0.5).all()
    assert (each.std(0) > closed.abs().max()).all()


Z = (torch.zeros(()), torch.ones(()))


def test_the_policy_gradient_of_a_policy_averages_to_the_closed_form(tiny: Build, schools: dict[str, Path]) -> None:
    """Of a real network's parameters, at one state that the student visited, along random directions."""
    objective = OPD([LoRATeacher(path=schools["flow"] / "a")], Sampler(3, 1.0), form="sde")
    objective.normalize = "paper"
    policy = student(tiny, "flow", objective, moved=2)
    ctx, table = taught(objective, policy)
    (row,) = (chunk for chunk in table.chunks(1) if (chunk.image == 1).all() and (chunk.step == 1).all())
    closed = gradients(policy, objective.loss(ctx, row)[0])
    grid, cond = policy.family.grid(3), column(table, "latents")[1:2, 1]
    bound = row.trajectories.cond_of(row.image)
    mine = policy.predict(cond, grid.t[1:2], bound, 1.0)
    kernel = objective.sampler.kernel_of(policy.family)
    theirs = kernel(
        Prediction(column(table, "target")[1:2, 1], cond, mine.alpha, mine.sigma, "flow_prediction"), grid, 1
    )
    step = kernel(mine, grid, 1)
    directions = normal(len(closed), 6, seed=1)
    batches = []
    for k in range(30):
        loss = surrogate(step.mean, theirs.mean, step.std, normal(400, *SHAPE, seed=k))
        found = torch.autograd.grad(loss, policy.parameters(), retain_graph=True, allow_unused=True)
        batches.append(torch.cat([g.flatten() for g in found if g is not None]) @ directions)
    scattered = torch.stack(batches)
    error = scattered.std(0) / 30**0.5
    assert ((scattered.mean(0) - closed @ directions).abs() < 3 * error).all()
    assert (error > 0).all() and torch.equal(closed, gradients(policy, objective.loss(ctx, row)[0]))
    assert (closed @ directions).norm() > 3 * error.norm()  # there is a gradient to be found


# frozen teachers
def test_teachers_are_not_among_what_trains(tiny: Build, tmp_path: Path, schools: dict[str, Path]) -> None:
    objective = OPD(experts(schools["flow"]), Sampler(2, 1.0))
    torch.manual_seed(0)
    policy = Policy(tiny("flow"), LoRA(2), ema_decay=0.5)
    before = [id(p) for p in policy.parameters()]
    objective.prepare(policy, None)
    theirs = {name: p for name, p in policy.denoiser.named_parameters() if ".teacher_" in name}
    assert {name.split(".teacher_")[1][0] for name in theirs} == {"a", "b"}
    assert not any(p.requires_grad for p in theirs.values())
    assert [id(p) for p in policy.parameters()] == before and policy.ema is not None
    assert len(policy.ema.shadow_params) == len(before)
    assert not any("teacher" in name for name in policy.state())
    kept = {name: p.clone() for name, p in theirs.items()}
    optimiser = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for _ in range(2):
        ctx, table = taught(objective, policy)
        objective.loss(ctx, table)[0].backward()
        assert any(p.grad is not None and p.grad.any() for p in policy.parameters())
        assert all(p.grad is None for p in theirs.values())
        optimiser.step()
        policy.after_step()
    assert same(theirs, kept)
    policy.save(tmp_path)
    plain = Policy(tiny("flow"), LoRA(2))
    (tmp_path / "plain").mkdir()
    plain.save(tmp_path / "plain")
    assert {k: v.shape for k, v in weights(tmp_path).items()} == {
        k: v.shape for k, v in weights(tmp_path / "plain").items()
    }


@pytest.mark.parametrize("kind", ["epsilon", pytest.param("flow", marks=pytest.mark.slow)])
def test_using_a_teacher_leaves_no_trace(tiny: Build, kind: str, schools: dict[str, Path]) -> None:
    """Flags, the active adapter and the answers are those of before, also after an exception."""
    objective = OPD(experts(schools[kind]), Sampler(2, 1.0))
    policy = student(tiny, kind, objective, moved=5)
    x, t, cond = normal(2, *SHAPE), torch.tensor([700.0, 20.0]), policy.family.encode(TEXTS[:2])

    def found() -> tuple[Tensor, list[bool], list[Any]]:
        with torch.no_grad():
            said = policy.predict(x, t, cond).raw
        flags = [p.requires_grad for p in policy.denoiser.parameters()]
        return said, flags, [(layer.active_adapters, layer.disable_adapters) for layer in policy.weights.layers]

    said, flags, active = found()
    with policy.adapter("teacher_a"), torch.no_grad():
        theirs = policy.predict(x, t, cond).raw
    with pytest.raises(ZeroDivisionError), policy.adapter("teacher_b"):
        raise ZeroDivisionError
    with policy.reference(), torch.no_grad():
        base = policy.predict(x, t, cond).raw
    again = found()
    assert torch.equal(again[0], said) and again[1:] == (flags, active)
    assert not torch.allclose(theirs, said) and not torch.allclose(theirs, base)
    tuned = families.tuned(tiny(kind), str(schools[kind] / "a"))
    with torch.no_grad():
        torch.testing.assert_close(theirs, tuned.predict(x, t, cond).raw, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(base, tiny(kind).predict(x, t, cond).raw, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", ["ode", "sde"])
def test_states_are_given(tiny: Build, form: Form, schools: dict[str, Path]) -> None:
    """No graph leads from a step's loss to the step before, and one row asks the network once."""
    objective = OPD(experts(schools["flow"]), Sampler(3, 1.0), form=form)
    policy = student(tiny, "flow", objective, moved=3)
    ctx, table = taught(objective, policy)
    for name in ("latents", "target"):
        assert not column(table, name).requires_grad and column(table, name).dtype == torch.float32
    heard = Heard(policy)
    last = next(row for row in table.chunks(1) if row.step.item() == 1)
    objective.loss(ctx, last)[0].backward()
    assert heard.rows(True) == 1 and heard.rows(False) == 0
    assert heard.times(True) == {policy.family.grid(3).t[1].item()}


# who is asked what
@pytest.mark.parametrize("kind", ["epsilon", pytest.param("flow", marks=pytest.mark.slow)])
def test_each_picture_is_answered_by_the_teacher_of_its_task(
    tiny: Build, kind: str, monkeypatch: pytest.MonkeyPatch, schools: dict[str, Path]
) -> None:
    """Once a step, by that teacher alone, in whatever sampler batches; the target is what it alone says there."""
    asked: list[tuple[str, int]] = []
    plain = LoRATeacher.predict

    def predict(self: LoRATeacher, policy: Policy, x: Tensor, *more: Any) -> Prediction:
        asked.append((self.task, len(x)))
        return plain(self, policy, x, *more)

    monkeypatch.setattr(LoRATeacher, "predict", predict)
    objective = OPD(experts(schools[kind]), Sampler(3, 2.0, batch_size=3), images_per_prompt=2)
    policy = student(tiny, kind, objective, moved=3)
    _, table = taught(objective, policy, 4)
    rows = {task: sum(n for other, n in asked if other == task) for task in ("a", "b")}
    assert rows == {"a": 4 * 2, "b": 4 * 2}  # 4 pictures, 2 trained steps
    grid, batch = policy.family.grid(3), tasked(policy.family, 4)
    assert [row["task"] for row in batch.metadata] == ["a", "b", "a", "b"]
    for task in ("a", "b"):
        alone = families.tuned(tiny(kind), str(schools[kind] / task))
        for picture in range(8):
            if batch.metadata[picture // 2]["task"] != task:
                continue
            cond = alone.encode([batch.prompts[picture // 2]])
            for j in range(2):
                x = column(table, "latents")[picture, j][None]
                with torch.no_grad():
                    expected = alone.predict(x, grid.t[j].expand(1), cond, 2.0).raw
                torch.testing.assert_close(column(table, "target")[picture, j][None], expected, atol=1e-4, rtol=1e-4)


def test_a_task_without_a_teacher_is_named(tiny: Build, schools: dict[str, Path]) -> None:
    objective = OPD([LoRATeacher("a", None, schools["flow"] / "a")], Sampler(2, 1.0))
    policy = student(tiny, "flow", objective)
    with pytest.raises(UserError, match=r"prompt 'a blue .*' has task 'b', and there are teachers of a; give every"):
        taught(objective, policy)


def test_extrapolation(tiny: Build, schools: dict[str, Path]) -> None:
    """lambda 1 is the teacher; else as far beyond it, away from the base, as lambda says."""
    found = {}
    for extrapolation in (None, 1.0, 1.5):
        target: Any = "same" if extrapolation is None else "extrapolated"
        objective = OPD(experts(schools["flow"]), Sampler(2, 2.0), target=target, extrapolation=extrapolation or 1)
        policy = student(tiny, "flow", objective, moved=3)
        _, table = taught(objective, policy)
        found[extrapolation] = column(table, "target")[:, 0]
    x, cond = column(table, "latents")[:, 0], policy.family.encode(tasked(policy.family).prompts)
    with torch.no_grad():
        base = tiny("flow").predict(x, policy.family.grid(2).t[:1].expand(2), cond, 2.0).raw
    torch.testing.assert_close(found[1.0], found[None])
    torch.testing.assert_close(found[1.5], found[None] + 0.5 * (found[None] - base), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[1.5], found[None], atol=1e-2)


def test_guided_to_conditional(tiny: Build, schools: dict[str, Path]) -> None:
    """The student is asked once a row, without guidance, in rollout and loss; the teacher twice, at its guidance."""
    arguments: Any = {"target": "guided_to_conditional", "sampler": Sampler(3, 4.0)}
    objective = OPD(experts(schools["flow"]), **arguments)
    policy = student(tiny, "flow", objective, moved=3)
    assert policy.family.uncond is not None
    heard = Heard(policy)
    ctx, table = taught(objective, policy)
    assert heard.rows(False) == 2 * (3 + 2 * 2)
    objective.loss(ctx, table)[0].backward()
    assert heard.rows(True) == len(table) == 2 * 2
    x, cond = column(table, "latents")[:1, 0], policy.family.encode(A[:1])
    t = policy.family.grid(3).t[:1]
    teacher = families.tuned(tiny("flow"), str(schools["flow"] / "a"))
    with torch.no_grad():
        guided, plain = teacher.predict(x, t, cond, 4.0).raw, policy.predict(x, t, cond, 1.0).raw
    torch.testing.assert_close(column(table, "target")[:1, 0], guided, atol=1e-4, rtol=1e-4)
    objective.normalize = "velocity"
    first = table.take(torch.tensor([0]))
    expected = (plain - guided).square().mean().item()
    assert objective.loss(ctx, first)[0].item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("guidance_scale", [pytest.param(1.0, marks=pytest.mark.slow), 2.0])
@pytest.mark.parametrize(
    ("arguments", "theirs"),
    [
        pytest.param({}, None, marks=pytest.mark.slow),
        ({}, 1.0),
        ({"anchor": 0.5, "form": "sde"}, None),
        pytest.param({"target": "extrapolated"}, None, marks=pytest.mark.slow),
        ({"target": "guided_to_conditional", "skip_last": False}, None),
    ],
)
def test_a_rollout_costs_what_the_plan_says(
    tiny: Build, guidance_scale: float, arguments: dict[str, Any], theirs: float | None, schools: dict[str, Path]
) -> None:
    objective = OPD(experts(schools["flow"], theirs), Sampler(3, guidance_scale), images_per_prompt=2, **arguments)
    policy = student(tiny, "flow", objective)
    assert policy.family.uncond is not None
    heard, plan = Heard(policy), objective.cost(policy.family, None)
    ctx, table = taught(objective, policy)
    assert len(table) == plan.rows * 4  # type: ignore[operator]
    objective.loss(ctx, table)[0].backward()
    assert policy.evaluations == {"trained": heard.rows(True), "frozen": heard.rows(False)}
    assert (plan.trained * 4, plan.frozen * 4) == (heard.rows(True), heard.rows(False))


# the loss
def test_anchor_and_the_last_step(tiny: Build, schools: dict[str, Path]) -> None:
    arguments: Any = {"sampler": Sampler(3, 1.0), "normalize": "velocity"}
    objective = OPD(experts(schools["flow"]), anchor=0.25, **arguments)
    policy = student(tiny, "flow", objective, moved=3)
    ctx, table = taught(objective, policy)
    loss, metrics = objective.loss(ctx, table)
    target, base = column(table, "target"), column(table, "base")
    grid, cond = policy.family.grid(3), policy.family.encode(tasked(policy.family).prompts)
    expected, apart, away = 0.0, 0.0, 0.0
    for j in range(2):
        x = column(table, "latents")[:, j]
        with torch.no_grad():
            said = policy.predict(x, grid.t[j].expand(2), cond, 1.0).raw
            plain = tiny("flow").predict(x, grid.t[j].expand(2), cond, 1.0).raw
        torch.testing.assert_close(base[:, j], plain, atol=1e-5, rtol=1e-4)
        gap, far = (said - target[:, j]).square().mean().item(), (said - plain).square().mean().item()
        expected += (gap + 0.25 * far) / 2
        apart, away = apart + gap / 2, away + far / 2
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    assert metrics["divergence"].item() == pytest.approx(apart, rel=1e-3)
    assert metrics["from_base"].item() == pytest.approx(away, rel=1e-3) and away > 0
    whole = OPD(objective.teachers, skip_last=False, **arguments)
    assert (whole.trained_steps, objective.trained_steps) == (3, 2)
    assert sorted(set(taught(whole, policy)[1].step.tolist())) == [0, 1, 2]
    anchored = student(tiny, "flow", OPD(experts(schools["flow"]), anchor=0.25, **arguments))
    ctx, table = taught(objective, anchored)
    assert objective.loss(ctx, table)[1]["from_base"] < 1e-10  # at the base


def test_chunks_average_to_the_batch(tiny: Build, schools: dict[str, Path]) -> None:
    objective = OPD(experts(schools["epsilon"]), Sampler(3, 2.0), form="sde", anchor=0.5)
    policy = student(tiny, "epsilon", objective, moved=3)
    ctx, table = taught(objective, policy)
    whole, metrics = objective.loss(ctx, table)
    parts = [objective.loss(ctx, chunk) for chunk in table.shuffled(torch.Generator()).chunks(2)]
    assert whole.item() == pytest.approx(sum(loss.item() for loss, _ in parts) / len(parts), rel=1e-4)
    for name in metrics:
        assert metrics[name].item() == pytest.approx(sum(m[name].item() for _, m in parts) / len(parts), rel=1e-3)


@pytest.mark.parametrize("kernel", [DDIM(1.0), DDIM(0.0), FlowSDE(0.0)])
def test_a_step_without_noise_has_no_kl_and_says_so(tiny: Build, kernel: Kernel, schools: dict[str, Path]) -> None:
    """DDIM with eta 1 on a flow has noise at every step but the last."""
    path = schools["flow"] / "a"
    objective = OPD([LoRATeacher(path=path)], Sampler(2, 1.0, kernel), form="sde", skip_last=False)
    with pytest.raises(UserError, match="noise"):
        student(tiny, "flow", objective)
    if kernel == DDIM(1.0):
        objective.skip_last = True
        policy = student(tiny, "flow", objective)
        ctx, table = taught(objective, policy)
        assert objective.loss(ctx, table)[0] > 0


# cold start
def delta(policy: Policy, name: str) -> list[Tensor]:
    """What the adapter ``name`` adds to every layer's weight."""
    return [
        layer.scaling[name] * (layer.lora_B[name].weight @ layer.lora_A[name].weight).detach()
        for layer in policy.weights.layers
    ]


@pytest.mark.parametrize(
    ("kind", "rank", "alpha"),
    [pytest.param("flow", 5, None, marks=pytest.mark.slow), ("epsilon", 8, 3.0), ("flow", 2, 6.0)],
)
def test_cold_start_is_the_mean_of_what_the_teachers_add(
    tiny: Build, tmp_path: Path, kind: str, rank: int, alpha: float | None
) -> None:
    """Exactly, where the rank is at least 2 + 3; else the best approximation of that rank."""
    a = expert(tiny, kind, tmp_path / "a", 1, LoRA(2, alpha=4.0))
    b = expert(tiny, kind, tmp_path / "b", 2, LoRA(3))
    objective = OPD([LoRATeacher("a", None, a), LoRATeacher("b", None, b)], Sampler(2, 1.0), cold_start=True)
    policy = student(tiny, kind, objective, LoRA(rank, alpha))
    for own, one, two in zip(*(delta(policy, name) for name in ("default", "teacher_a", "teacher_b")), strict=True):
        mean = (one + two) / 2
        if rank >= 5:
            torch.testing.assert_close(own, mean, atol=1e-5, rtol=1e-4)
            continue
        tail = torch.linalg.svdvals(mean)[rank:]
        assert torch.linalg.matrix_rank(own, atol=1e-4) <= rank and tail[0] > 1e-3
        assert (own - mean).norm().item() == pytest.approx(tail.norm().item(), rel=1e-3)
    assert any(p.requires_grad for p in policy.parameters())
    assert len(policy.parameters()) == 2 * len(policy.weights.layers)


def test_cold_start_wants_teachers_on_the_students_layers(
    tiny: Build, tmp_path: Path, schools: dict[str, Path]
) -> None:
    path = schools["flow"] / "a"
    objective = OPD([LoRATeacher(path=path)], Sampler(2, 1.0), cold_start=True)
    with pytest.raises(UserError, match=r"teacher has LoRA on layers that the student lacks; give both one lora\.tar"):
        student(tiny, "flow", objective, LoRA(2, targets=["attn.to_q"]))
    other = OPD([LoRATeacher("a", None, expert(tiny, "flow", tmp_path, 1, LoRA(2, targets=["attn.to_q"])))])
    policy = student(tiny, "flow", other)
    policy.average_adapters(["teacher_a"])
    whole = [name for name, layer in policy.denoiser.named_modules() if layer in policy.weights.layers]
    for name, layer, own in zip(whole, policy.weights.layers, delta(policy, "default"), strict=True):
        assert bool(own.any()) is name.endswith("attn.to_q") is ("teacher_a" in layer.lora_A)


# teachers that do not fit
def test_teachers_that_cannot_teach_are_refused(
    tiny: Build, tiny_folders: dict[str, Path], tmp_path: Path, schools: dict[str, Path]
) -> None:
    path = schools["flow"] / "a"
    for lora, teacher, message in (
        (None, LoRATeacher(path=path), r"a LoRA teaches a LoRA student.*PipelineTeacher"),
        (LoRA(2), LoRATeacher(path=tmp_path / "gone"), "no pytorch_lora_weights.safetensors in .*gone"),
        (
            LoRA(2),
            PipelineTeacher(path=str(tiny_folders["epsilon"])),
            "its prediction epsilon, the student's flow_prediction",
        ),
        (LoRA(2), PipelineTeacher(path=str(tmp_path / "gone")), "no model_index.json"),
    ):
        with pytest.raises(UserError, match=message):
            student(tiny, "flow", OPD([teacher], Sampler(2, 1.0)), lora)


def test_a_pipeline_of_another_shape_is_refused(
    tiny: Build, tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Family.latent_shape
    monkeypatch.setattr(
        Family, "latent_shape", lambda self, *side: (16, 8, 8) if "/" in self.source else plain(self, *side)
    )
    with pytest.raises(UserError, match=r"its latents \(16, 8, 8\), the student's \(4, 8, 8\)"):
        student(tiny, "flow", OPD([PipelineTeacher(path=str(tiny_folders["flow"]))], Sampler(2, 1.0)))


@pytest.mark.parametrize("lora", [pytest.param(LoRA(2), marks=pytest.mark.slow), None])
def test_a_pipeline_teaches(
    tiny: Build, tiny_folders: dict[str, Path], lora: LoRA | None, schools: dict[str, Path]
) -> None:
    """LoRA or full students, with a run's weights put in or not; its evaluations count, its parameters are frozen."""
    run = schools["epsilon"] / "a"
    teacher = PipelineTeacher(path=str(tiny_folders["epsilon"]), weights=run)
    objective = OPD([teacher], Sampler(3, 2.0))
    policy = student(tiny, "epsilon", objective, lora, moved=3)
    frozen = everything(teacher.family)
    ctx, table = taught(objective, policy)
    assert policy.evaluations["frozen"] == 2 * objective.cost(policy.family, None).frozen
    x, t = column(table, "latents")[:, 1], policy.family.grid(3).t[1].expand(2)
    tuned = families.tuned(tiny("epsilon"), str(run))
    with torch.no_grad():
        expected = tuned.predict(x, t, tuned.encode(tasked(policy.family).prompts), 2.0).raw
    torch.testing.assert_close(column(table, "target")[:, 1], expected, atol=1e-4, rtol=1e-4)
    objective.loss(ctx, table)[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.family.denoiser.parameters())
    assert same(everything(teacher.family), frozen)
    assert any(p.grad is not None and p.grad.any() for p in policy.parameters())


def test_tasks_may_have_any_name(tiny: Build, tmp_path: Path) -> None:
    """Also names that are no identifiers, several of them."""
    teachers: list[Teacher] = [
        LoRATeacher(task, None, expert(tiny, "flow", tmp_path / str(k), k)) for k, task in enumerate(("1-a", "b c"))
    ]
    policy = student(tiny, "flow", OPD(teachers, Sampler(2, 1.0)))
    assert len({tuple(layer.lora_A) for layer in policy.weights.layers}) == 1
    assert len(list(policy.weights.layers[0].lora_A)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teachers": []}, "teachers: expected one for each task"),
        ({"teachers": [LoRATeacher("a"), LoRATeacher("a")]}, r"got tasks \['a', 'a'\]"),
        ({"teachers": [LoRATeacher("a"), LoRATeacher("*")]}, r"or one of '\*'"),
        ({"sampler": Sampler(1)}, "a step has to be trained"),
        ({"anchor": -0.1}, "anchor at least 0"),
        ({"teachers": [PipelineTeacher()], "cold_start": True}, "cold_start averages LoRAs"),
    ],
)
def test_bad_hyper_parameters_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPD(**({"teachers": [LoRATeacher()]} | arguments))


# prompts of several tasks
def test_tasks_come_in_equal_shares(tiny: Build, tmp_path: Path) -> None:
    """However many prompts each has; whole epochs of the longest show every prompt of each."""
    data = TaskPrompts({"a": prompt_file(tmp_path, TEXTS[:1], "a"), "b": prompt_file(tmp_path, TEXTS, "b")}, limit=3)
    data.check()
    items = data.prepare(Setup(tiny("flow")))
    assert (len(items), data.multiple) == (3, 2)
    batch = items.batch([2, 0, 1, 2, 0, 1])
    assert [row["task"] for row in batch.metadata] == ["a", "b"] * 3
    assert batch.prompts == [TEXTS[0], TEXTS[0], TEXTS[0], TEXTS[2], TEXTS[0], TEXTS[1]]
    assert {items.batch([0, k]).prompts[1] for k in range(3)} == set(TEXTS[:3])
    assert batch.ids == [0, 1, 0, 3, 0, 2]
    with pytest.raises(UserError, match="tasks is empty"):
        TaskPrompts({}).check()
    with pytest.raises(UserError, match="gone"):
        TaskPrompts({"a": str(tmp_path / "gone.txt")}).check()


@pytest.mark.parametrize(("items", "group", "world"), [(3, 1, 1), (2, 1, 2), (6, 1, 2), (5, 2, 2)])
def test_a_share_that_is_no_multiple_of_the_tasks_is_refused(
    tiny: Build, tmp_path: Path, items: int, group: int, world: int
) -> None:
    """Two tasks: of 3 items, of one or three for each process, and of 5 items that two processes share by pictures."""
    data = TaskPrompts({task: prompt_file(tmp_path, TEXTS, task) for task in ("a", "b")})
    objective = OPD([LoRATeacher("a"), LoRATeacher("b")], Sampler(2, 1.0), images_per_prompt=group)
    config = TrainConfig(data, objective, rollout_batch_size=items, train_batch_size=1)
    with pytest.raises(UserError, match="items .* do not divide among the 2 tasks of data"):
        BatchPlan(config, tiny("flow"), world).check()
    config.rollout_batch_size = 4
    BatchPlan(config, tiny("flow"), world).check()


# whole runs
def distilling(pipeline: Path, folder: Path, school: Path, **arguments: Any) -> dict[str, Any]:
    """Two teachers, two prompts each, four pictures a rollout of two trained steps: one update."""
    teachers = [
        {"class_path": "LoRATeacher", "init_args": {"task": t.task, "path": str(t.path)}}  # type: ignore[attr-defined]
        for t in experts(school)
    ]
    arguments = {"teachers": teachers, "sampler": {"num_inference_steps": 3, "guidance_scale": 2.0}} | arguments
    config = online(pipeline, folder, "OPD", **arguments)
    files = {task: prompt_file(folder, texts, task) for task, texts in (("a", A), ("b", B))}
    config["data"] = {"class_path": "TaskPrompts", "init_args": {"tasks": files}}
    return config | {"rewards": [], "rollout_batch_size": 4, "train_batch_size": 8, "learning_rate": 1e-2}


@pytest.mark.parametrize(("kind", "form"), [pytest.param("epsilon", "sde", marks=pytest.mark.slow), ("flow", "ode")])
def test_a_run_trains_the_student_and_nothing_else(
    tiny: Build,
    tiny_folders: dict[str, Path],
    tmp_path: Path,
    kind: str,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
    schools: dict[str, Path],
) -> None:
    """One optimiser step a round; base and teachers bit-identical afterwards, and absent from what is saved."""
    config = distilling(tiny_folders[kind], tmp_path, schools[kind], form=form, normalize="velocity")
    loaded = families_loaded(monkeypatch)
    assert main(["--config", write(config, max_train_steps=4, ema_decay=0.5)]) == 0
    fresh = families.load(str(tiny_folders[kind]))
    assert same(everything(loaded[0]), everything(fresh))
    untouched = Policy(fresh, LoRA(2))
    for task in ("a", "b"):
        untouched.add_adapter(f"teacher_{task}", schools[kind] / task)
    for name, p in untouched.denoiser.named_parameters():
        if ".teacher_" in name:
            other = loaded[0].denoiser.get_parameter(name)
            assert torch.equal(other, p) and other.grad is None and not other.requires_grad
    assert {k: v.shape for k, v in weights(tmp_path / "run").items()} == {
        k: v.shape for k, v in weights(schools[kind] / "a").items()
    }
    logged = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert [(line["step"], line["rollout"]) for line in logged] == [(k, k) for k in range(1, 5)]
    frozen = 4 * (3 * 2 + 2 * 2)
    assert [line["evaluations/frozen"] for line in logged] == [frozen * k for k in range(1, 5)]
    assert logged[-1]["divergence"] < 0.9 * logged[0]["divergence"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "load_lora_weights" in card and "OPD" in card


@pytest.mark.slow
def test_resumed_is_the_uninterrupted_run(
    tiny: Build, tiny_folders: dict[str, Path], tmp_path: Path, schools: dict[str, Path]
) -> None:
    config = distilling(tiny_folders["flow"], tmp_path, schools["flow"], cold_start=True, anchor=0.1, form="sde")
    config |= {"checkpointing_steps": 2, "ema_decay": 0.5}
    assert main(["--config", write(config, output_dir=str(tmp_path / "whole"))]) == 0
    assert main(["--config", write(config, max_train_steps=2)]) == 0
    assert main(["--config", write(config), "--resume_from_checkpoint", "latest"]) == 0
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert untimed(tmp_path / "run") == untimed(tmp_path / "whole")
    kept = load_file(tmp_path / "run" / "checkpoint-2" / "trained.safetensors")
    assert kept and not any("teacher" in name for name in kept)
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "state.json").read_text())
    assert state["evaluations"]["trained"] > 0


def test_the_average_of_weights_begins_at_the_cold_start(
    tiny: Build, tiny_folders: dict[str, Path], tmp_path: Path, schools: dict[str, Path]
) -> None:
    config = distilling(tiny_folders["flow"], tmp_path, schools["flow"], cold_start=True) | {"ema_decay": 0.9}
    loop = Trainer(*parse(TrainConfig, "align.train", None, ["--config", write(config)]))
    own = loop.policy.parameters()
    assert loop.policy.ema is not None and any(p.any() for p in delta(loop.policy, "default"))
    assert all(torch.equal(a, b) for a, b in zip(own, loop.policy.ema.shadow_params, strict=True))


@pytest.mark.slow
def test_two_processes_are_one(
    tiny: Build, tiny_folders: dict[str, Path], tmp_path: Path, schools: dict[str, Path]
) -> None:
    """Each draws a prompt of either task."""
    config = distilling(tiny_folders["flow"], tmp_path, schools["flow"], form="sde", anchor=0.1)
    config |= {"max_train_steps": 3, "max_grad_norm": 1e9, "learning_rate": 1e-3, "adam_epsilon": 1e-4}
    assert main(["--config", write(config, output_dir=str(tmp_path / "one"))]) == 0
    assert launch_together(["--config", write(config, train_batch_size=4)]) == [0, 0]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "run")
    for layer in one:
        torch.testing.assert_close(one[layer], two[layer], atol=2e-5, rtol=1e-3)
    for a, b in zip(untimed(tmp_path / "one"), untimed(tmp_path / "run"), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], abs=2e-4, rel=1e-3), key


def test_mistakes_are_one_clear_line(
    tiny: Build,
    tiny_folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    schools: dict[str, Path],
) -> None:
    config = distilling(tiny_folders["flow"], tmp_path, schools["flow"])
    for changes, message in (
        ({"rollout_batch_size": 3}, "do not divide among the 2 tasks of data"),
        ({"train_batch_size": 5}, "8 rows, which do not divide into updates"),
        ({"lora": None}, "a LoRA teaches a LoRA student"),
        ({"data": {"class_path": "Prompts", "init_args": {"path": "shapes-prompts"}}}, "has task None"),
        (
            {"data": {"class_path": "PreferencePairs", "init_args": {"path": "shapes-preferences"}}},
            "OPD trains on PromptBatch",
        ),
    ):
        assert main(["--config", write(config, **changes)]) == 2
        (error,) = errors(capsys.readouterr().err)
        assert message in error
        assert not (tmp_path / "run" / LORA_FILE).exists()


# from end to end
class Lines(nn.Module):
    """Policy and family in one: the velocity is linear in the latent, with a matrix for each of two kinds of prompt."""

    device = torch.device("cpu")
    default_guidance_scale = 1.0
    kernel = FlowSDE(0.5)
    prediction_type = "flow_prediction"

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Parameter(torch.zeros(2, 4, 4))
        self.evaluations = {"trained": 0, "frozen": 0}

    @property
    def family(self) -> Lines:
        return self

    cell, unguided_scale = 1, 1.0

    def latent_shape(self, *_size: int | None) -> tuple[int, int, int]:
        return (1, 2, 2)

    def grid(self, steps: int, *_size: int) -> Grid:
        t = torch.linspace(1, 0, steps + 1)
        return Grid(t, 1 - t, t)

    def to_image(self, x: Tensor) -> Tensor:
        return x.sigmoid().expand(-1, 3, -1, -1)

    def answer(self, maps: Tensor, x: Tensor, t: Tensor) -> Prediction:
        raw = torch.einsum("bij,bj->bi", maps, x.flatten(1)).view_as(x)
        return Prediction(raw, x, 1 - t, t, "flow_prediction")

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float = 1.0) -> Prediction:
        return self.answer(torch.einsum("bk,kij->bij", cond["which"], self.maps), x, t)


@dataclass
class LinearTeacher(Teacher):
    """Anyone's teacher: it knows one matrix, whatever the prompt."""

    seed: int = 0

    def open(self, policy: Policy) -> None:
        self.map = 0.5 * normal(4, 4, seed=self.seed)

    def conditions(self, policy: Policy, batch: PromptBatch) -> Conditioning:
        return batch.cond

    def predict(self, policy: Any, x: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float) -> Prediction:
        return policy.answer(self.map.expand(len(x), 4, 4), x, t)


@pytest.mark.parametrize(
    ("form", "normalize"),
    [("ode", "code"), *(pytest.param("sde", n, marks=pytest.mark.slow) for n in ("paper", "velocity"))],
)
def test_a_toy_student_reaches_two_teachers(form: Form, normalize: Normalize) -> None:
    """On disjoint prompts, to a mean square of 1e-3, which the average of the two misses by far."""
    teachers: Sequence[LinearTeacher] = [LinearTeacher("a", None, 1), LinearTeacher("b", None, 2)]
    objective = OPD(list(teachers), Sampler(4, 1.0), images_per_prompt=4, form=form, normalize=normalize)
    policy: Any = Lines()
    objective.prepare(policy, None)
    which = torch.eye(2).repeat(2, 1)
    rows = [{"prompt": f"p{k}", "task": "ab"[k % 2]} for k in range(4)]
    batch = PromptBatch([row["prompt"] for row in rows], Conditioning({"which": which}), list(rows), list(range(4)))
    optimiser = torch.optim.Adam(policy.parameters(), lr=0.05)
    for step in range(120):
        ctx = Context(policy, 0, step, range(4 * 4))
        with torch.no_grad():
            table = objective.rollout(ctx, batch)
        objective.loss(ctx, table)[0].backward()
        optimiser.step()
        optimiser.zero_grad()
    x = normal(64, 4, seed=9)
    average_of_both = sum(teacher.map for teacher in teachers) / 2
    for k, teacher in enumerate(teachers):
        assert ((policy.maps[k] - teacher.map) @ x.T).square().mean() < 1e-3
        assert ((average_of_both - teacher.map) @ x.T).square().mean() > 0.1
