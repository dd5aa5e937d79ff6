"""ReNO: the reward's gradient through sampler and decoder, the prior, the best iterate, what is refused, runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from align import families
from align.families import LORA_FILE
from align.objectives import Context
from align.objectives.online.rewards import Scorer
from align.objectives.reno import BestNoise, ReNO
from align.policy.initial_noise import NOISE_FILE, InitialNoise
from align.policy.policy import Policy
from align.sampling.generate import sample_images
from align.sampling.loop import sample
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


class Falling(Bright):
    """Brightness, less at every further call: the first iterate is the best."""

    def __init__(self) -> None:
        self.calls = 0

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        self.calls += 1
        return images.mean((1, 2, 3)) - self.calls


class Blind(Bright):
    """A reward without a gradient."""

    differentiable = False


def learner(tiny: Build, kind: str, seed: int = 0) -> Policy:
    family = tiny(kind)
    return Policy(family, trained=BestNoise(TEXTS, SHAPE, family.source, type(family.pipe.scheduler).__name__, seed))


def best_noise(policy: Policy) -> BestNoise:
    assert isinstance(policy.trained, BestNoise)
    return policy.trained


# the gradient
@pytest.mark.parametrize(
    ("num_inference_steps", "guidance_scale", "kind"),
    [
        *((1, 1.0, "flow"), (2, 3.0, "epsilon")),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 1.0, "epsilon"), (2, 3.0, "flow"))),
    ],
)
def test_the_gradient_reaches_the_noise(
    tiny: Build, kind: str, num_inference_steps: int, guidance_scale: float
) -> None:
    """d loss / d z against a central difference, in float64, along a random direction; through all steps, guidance and
    decoder, for every prompt of the batch."""
    policy, objective = learner(tiny, kind), ReNO(num_inference_steps, guidance_scale, prior_weight=0.01)
    noise, family = best_noise(policy), policy.family
    ctx, table = rolled(objective, policy)
    cond = prompted(policy, 2).cond.to("cpu", torch.float64)
    uncond = family.uncond.to("cpu", torch.float64)
    for part in (family.denoiser, family.pipe.vae, noise):
        part.double()
    family._uncond = uncond
    table = replace(table, cond=cond)
    loss, _ = objective.loss(ctx, table)
    loss.backward()
    grad = noise.left["mean"].grad
    assert grad is not None and [bool(row.any()) for row in grad] == [True, True, False, False]
    start = noise.left["mean"].detach()[:2].clone()

    def value(z: Tensor) -> float:
        with torch.no_grad():
            images = family.to_image(sample(policy.predict, family.grid(num_inference_steps), cond, z, guidance_scale))
            norm = z.flatten(1).norm(dim=1)
            prior = (DIMS - 1) * norm.log() - norm.square() / 2
            return -(images.mean((1, 2, 3)) + 0.01 * prior).double().mean().item()

    # pictures are float32, so the difference is taken over a distance at which their rounding does not show
    direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    numeric = (value(start + 1e-3 * direction) - value(start - 1e-3 * direction)) / 2e-3
    assert loss.item() == pytest.approx(value(start), rel=1e-6)
    assert (grad[:2] * direction).sum().item() == pytest.approx(numeric, rel=1e-2)
    objective.prior_weight = 0.0
    reward, _ = objective.loss(ctx, table)
    (alone,) = torch.autograd.grad(reward, noise.left["mean"])
    assert alone[:2].norm() > 0.01 * grad[:2].norm()  # the reward's share is to be seen in the sum


@pytest.mark.slow
def test_the_prior_draws_the_norm_to_the_shell(tiny: Build) -> None:
    """(d - 1) ln|z| - |z|²/2 has its maximum at |z| = sqrt(d - 1), and no direction but the radius."""
    policy = learner(tiny, "flow")
    noise = best_noise(policy)
    flat = Scorer({"none": Nothing()}, {"none": 1.0})
    objective = ReNO(1, 1.0, prior_weight=1.0)
    for k, scale in enumerate((0.5, 2.0)):
        noise.left["mean"].data[k] *= scale * (DIMS - 1) ** 0.5 / noise.left["mean"].data[k].norm()
    before = noise.left["mean"].detach().clone()
    ctx, table = rolled(objective, policy, scorer=flat)
    loss, metrics = objective.loss(ctx, table)
    loss.backward()
    grad = noise.left["mean"].grad
    assert grad is not None
    for k, sign in ((0, -1), (1, 1)):  # of the loss: downhill is outwards for the small one, inwards for the large one
        norm = before[k].norm()
        radial = (norm - (DIMS - 1) / norm) / 2  # the mean over two prompts
        torch.testing.assert_close(grad[k], radial * before[k] / norm, rtol=1e-4, atol=1e-5)
        assert math.copysign(1, radial) == sign
    assert metrics["noise_norm"].item() == pytest.approx(1.25, abs=0.01)
    for _ in range(60):
        noise.left["mean"].grad = None
        objective.loss(ctx, table)[0].backward()
        noise.left["mean"].data -= 0.5 * noise.left["mean"].grad
    torch.testing.assert_close(
        noise.left["mean"].detach()[:2].flatten(1).norm(dim=1), torch.full((2,), (DIMS - 1) ** 0.5), rtol=1e-3, atol=0
    )


class Nothing(Bright):
    """0 for every picture, with a gradient of 0."""

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        return 0 * images.mean((1, 2, 3))


# the best iterate
def test_the_best_of_each_prompt_is_kept() -> None:
    noise = BestNoise(TEXTS, (1, 1, 1), "x", "y", 0)
    for score, index in (([0.1, 0.5], [0, 1]), ([0.3, 0.2], [0, 1]), ([0.2, 0.9], [0, 3])):
        z = torch.tensor(score).view(2, 1, 1, 1)
        noise.note(torch.tensor(index), z, torch.tensor(score))
    assert noise.best_score.tolist() == pytest.approx([0.3, 0.5, -math.inf, 0.9])
    assert noise.best.flatten()[[0, 1, 3]].tolist() == pytest.approx([0.3, 0.5, 0.9])
    assert torch.equal(noise.best[2], noise.left["mean"][2])  # never scored: what it would have started from
    z = torch.randn(3, 1, 1, 1)
    found = noise.initial([TEXTS[1], "nobody's", TEXTS[0]], z)
    assert found.flatten().tolist() == pytest.approx([0.5, z[1].item(), 0.3])


@pytest.mark.parametrize("kind", ["flow", pytest.param("epsilon", marks=pytest.mark.slow)])
def test_steps_raise_the_reward_and_the_first_is_what_it_started_from(tiny: Build, kind: str) -> None:
    policy, objective = learner(tiny, kind, seed=3), ReNO(1, 1.0)
    noise = best_noise(policy)
    start = noise.left["mean"].detach().clone()
    assert torch.equal(noise.best, start) and not torch.equal(start[0], start[1])
    assert not torch.equal(start, best_noise(learner(tiny, kind, seed=4)).left["mean"])
    optimiser = torch.optim.SGD(policy.parameters(), lr=30.0, momentum=0.9, nesterov=True)
    rewards, best = [], []
    for step in range(12):
        ctx, table = rolled(objective, policy, step=step)
        loss, metrics = objective.loss(ctx, table)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.1)
        optimiser.step()
        optimiser.zero_grad()
        rewards.append(metrics["reward"].item())
        best.append(metrics["best_so_far"].item())
    assert max(rewards) > rewards[0] + 0.005
    assert best == sorted(best) and best[0] == pytest.approx(rewards[0]) and best[-1] >= max(rewards) - 1e-6
    assert torch.equal(noise.left["mean"][2:], start[2:])  # other prompts' stay
    images = sample_images(policy.predict, policy.family, TEXTS[:2], [0, 1], 1, 1.0, initial=noise.initial)
    torch.testing.assert_close(noise.best_score[:2], images.mean((1, 2, 3)), atol=1e-5, rtol=0)  # each prompt's own


# what it costs, and what it refuses
@pytest.mark.parametrize(("kind", "guidance_scale"), [("epsilon", 2.0), ("flow", 1.0)])
def test_an_update_costs_what_the_plan_says(tiny: Build, kind: str, guidance_scale: float) -> None:
    policy, objective = learner(tiny, kind), ReNO(3, guidance_scale)
    plan, heard = objective.cost(policy.family, None), Heard(policy)
    assert policy.family.uncond is not None
    ctx, table = rolled(objective, policy)
    objective.loss(ctx, table)[0].backward()
    assert heard.rows(True) == policy.evaluations["trained"] == plan.trained * 2
    assert heard.rows(False) == policy.evaluations["frozen"] == plan.frozen == 0


@pytest.mark.parametrize("arguments", [{"num_inference_steps": 0}, {"prior_weight": -1.0}])
def test_bad_hyper_parameters_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="(steps|weight) must be at least"):
        ReNO(**arguments)


# whole runs
@pytest.fixture
def config(tiny_folders: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """Three prompts, all in every update."""
    config = online(tiny_folders["flow"], tmp_path, "ReNO", guidance_scale=1.0)
    data = {"class_path": "Prompts", "init_args": {"path": prompt_file(tmp_path, TEXTS[:2])}}
    config |= {"data": data, "rollout_batch_size": 2, "train_batch_size": 2, "learning_rate": 30.0}
    return config | {"sgd_momentum": 0.9, "max_grad_norm": 0.1, "max_train_steps": 4}


def kept(folder: str | Path) -> dict[str, Tensor]:
    return load_file(Path(folder) / NOISE_FILE)


@pytest.mark.parametrize("kind", [pytest.param("epsilon", marks=pytest.mark.slow), "flow"])
def test_a_run_trains_the_noise_and_nothing_else(
    tiny_folders: dict[str, Path], config: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pictures that the saved noise gives score what the log calls the best."""
    config["pretrained_model_name_or_path"] = str(tiny_folders[kind])
    loaded = families_loaded(monkeypatch)
    assert main(["--config", write(config, max_train_steps=8)]) == 0
    fresh = families.load(str(tiny_folders[kind]))
    assert same(everything(loaded[0]), everything(fresh))
    folder = Path(config["output_dir"])
    assert {name: tuple(part.shape) for name, part in kept(folder).items()} == dict.fromkeys(
        ("mean", "std"), (2, *SHAPE)
    )
    assert not (folder / LORA_FILE).exists()
    logged = [line for line in lines(folder) if "loss" in line]
    assert logged[-1]["best_so_far"] > logged[0]["reward"] + 0.002
    noise = InitialNoise.load(folder)
    images = sample_images(fresh.predict, fresh, TEXTS[:2], [0, 1], 1, 1.0, initial=noise.initial)
    assert images.mean().item() == pytest.approx(logged[-1]["best_so_far"], abs=1e-4)


def test_the_best_iterate_is_saved_not_the_last(config: dict[str, Any]) -> None:
    rewards = [{"name": "tests.test_reno.Falling", "label": "falling"}]
    assert main(["--config", write(config, rewards=rewards)]) == 0
    logged = [line for line in lines(config["output_dir"]) if "loss" in line]
    assert [line["reward"] for line in logged] == sorted((line["reward"] for line in logged), reverse=True)
    assert all(line["best_so_far"] == logged[0]["reward"] for line in logged)
    started = BestNoise(TEXTS[:2], SHAPE, "x", "y", 0).best
    assert torch.equal(kept(config["output_dir"])["mean"], started)


@pytest.mark.slow  # FIND resumes what is kept of noise by the same code
def test_resumed_is_the_uninterrupted_run(config: dict[str, Any], tmp_path: Path) -> None:
    """Bitwise, with momentum; and where the reward only falls after the checkpoint, the best stays that of before."""
    config |= {"checkpointing_steps": 2}
    folder = Path(config["output_dir"])
    assert main(["--config", write(config, output_dir=str(tmp_path / "whole"))]) == 0
    assert main(["--config", write(config, max_train_steps=2)]) == 0
    assert main(["--config", write(config), "--resume_from_checkpoint", "latest"]) == 0
    assert same(kept(folder), kept(tmp_path / "whole"))
    assert untimed(folder) == untimed(tmp_path / "whole")
    before = load_file(folder / "checkpoint-2" / "trained.safetensors")["best"]
    assert not torch.equal(kept(folder)["mean"], before)
    config["rewards"] = [{"name": "tests.test_reno.Falling", "label": "falling"}]
    state = folder / "checkpoint-2/state.json"  # which would refuse another reward
    state.write_text(json.dumps(json.loads(state.read_text()) | {"settings": {}}))
    assert main(["--config", write(config), "--resume_from_checkpoint", "checkpoint-2"]) == 0
    assert torch.equal(kept(folder)["mean"], before)


@pytest.mark.slow
def test_two_processes_are_one(config: dict[str, Any], tmp_path: Path) -> None:
    """Each optimises one of the two prompts; the file has the best of both."""
    config |= {"max_grad_norm": 1e9, "learning_rate": 1.0}
    assert main(["--config", write(config, output_dir=str(tmp_path / "one"))]) == 0
    assert launch_together(["--config", write(config, train_batch_size=1)]) == [0, 0]
    one, two = kept(tmp_path / "one"), kept(tmp_path / "run")
    started = BestNoise(TEXTS[:2], SHAPE, "x", "y", 0).best
    for found in (one["mean"], two["mean"]):
        assert not any(torch.equal(a, b) for a, b in zip(found, started, strict=True))
    torch.testing.assert_close(one["mean"], two["mean"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([{"name": "tests.test_reno.Blind", "label": "blind"}], "ReNO needs differentiable rewards, blind has no"),
        ([], "ReNO learns from rewards"),
    ],
)
def test_rewards_without_a_gradient_are_refused(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str], rewards: list[dict[str, Any]], message: str
) -> None:
    assert main(["--config", write(config, rewards=rewards)]) == 2
    (error,) = errors(capsys.readouterr().err)
    assert message in error
    assert not Path(config["output_dir"]).exists()


def test_a_reward_that_is_only_watched_needs_no_gradient(tiny: Build) -> None:
    policy, objective = learner(tiny, "flow"), ReNO(1, 1.0)
    scorer = Scorer({"bright": Bright(), "blind": Blind()}, {"bright": 1.0, "blind": 0.0})
    objective.prepare(policy, scorer)
    ctx, table = rolled(objective, policy, scorer=scorer)
    assert isinstance(ctx, Context) and objective.loss(ctx, table)[0].requires_grad
    assert bright().weights == {"bright": 1.0}


def test_data_of_another_kind_is_refused_in_words(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    tasks = {"one": config["data"]["init_args"]["path"]}
    config["data"] = {"class_path": "TaskPrompts", "init_args": {"tasks": tasks}}
    assert main(["--config", write(config)]) == 2
    (error,) = errors(capsys.readouterr().err)
    assert "Prompts" in error
