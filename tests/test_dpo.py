"""Diffusion-DPO: the loss against the paper's formula, for epsilon, v and flow, and the cost of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from align.data.preferences import PairBatch
from align.diffusion.process import Prediction
from align.objectives import Context
from align.objectives.dpo import DPO, DPORows
from align.objectives.losses import denoising_error, preference_loss
from align.policy.policy import LoRA, Policy
from tests.pipelines import Build
from tests.test_policy import disturb

KINDS = ("epsilon", "v", "flow")
CAPTIONS = ["two red stars", "a star", "a blue circle left of a green square", "a red circle"]


def batch(policy: Policy, same: bool = False) -> PairBatch:
    latents = torch.randn(4, 2, 4, 8, 8, generator=torch.Generator().manual_seed(11))
    if same:
        latents[:, 1] = latents[:, 0]
    with torch.no_grad():
        return PairBatch(latents, policy.family.encode(CAPTIONS), CAPTIONS, [0, 1, 2, 3])


def context(policy: Policy, positions: Sequence[int] = range(4), step: int = 0) -> Context:
    return Context(policy, 0, step, positions)


def moved(tiny: Build, kind: str, lora: LoRA | None = LoRA(2)) -> Policy:
    torch.manual_seed(0)
    policy = Policy(tiny(kind), lora)
    disturb(policy, 0.1)
    return policy


def run(objective: DPO, policy: Policy, pairs: PairBatch | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    ctx = context(policy)
    with torch.no_grad():
        table = objective.rollout(ctx, pairs or batch(policy))
    return objective.loss(ctx, table)


def in_float64(objective: DPO, policy: Policy, table: DPORows) -> Tensor:
    """The paper's formula, written out pair by pair from the raw network outputs."""
    losses = []
    for k in range(len(table)):
        row = table.take(torch.tensor([k]))
        x0, eps, t, cond = row.latents[0].double(), row.eps.double(), row.t, row.cond
        alpha, sigma = (float(v) for v in policy.family.path(t))
        gaps = []
        for side in (0, 1):
            x_t = (alpha * x0[side] + sigma * eps[0])[None]
            target = {
                "epsilon": eps[0],
                "v_prediction": alpha * eps[0] - sigma * x0[side],
                "flow_prediction": eps[0] - x0[side],
            }[policy.family.prediction_type]
            with torch.no_grad():
                now = policy.predict(x_t.float(), t, cond).raw[0].double()
                with policy.reference():
                    then = policy.predict(x_t.float(), t, cond).raw[0].double()
            scale = alpha if objective.target_space == "epsilon" and policy.family.prediction_type != "epsilon" else 1.0
            gaps.append(scale**2 * ((now - target).square().mean() - (then - target).square().mean()))
        losses.append(-F.logsigmoid(-objective.beta / 2 * (gaps[0] - gaps[1])))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", ["native", "epsilon"])
def test_is_the_paper_in_float64(tiny: Build, kind: str, space: Any) -> None:
    policy = moved(tiny, kind)
    objective = DPO(beta=50.0, target_space=space, proportion_empty_prompts=0.0)
    ctx = context(policy)
    table = objective.rollout(ctx, batch(policy))
    loss, _ = objective.loss(ctx, table)
    torch.testing.assert_close(loss.double(), in_float64(objective, policy, table), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [LoRA(2), None])
def test_the_loss_starts_at_ln_2(tiny: Build, kind: str, lora: LoRA | None) -> None:
    policy = Policy(tiny(kind), lora)
    loss, metrics = run(DPO(), policy)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["implicit_acc"] == 0.5
    loss.backward()
    grads = {n: p.grad for n, p in policy.denoiser.named_parameters() if p.grad is not None}
    if lora:
        assert all(not g.any() for n, g in grads.items() if "lora_A" in n)
        assert any(g.any() for n, g in grads.items() if "lora_B" in n)
    else:
        assert any(g.any() for g in grads.values())


def test_the_slope_in_delta_is_that_of_the_formula() -> None:
    objective = DPO(beta=5000.0)
    delta = torch.tensor([0.0, 1e-4, -2e-4], dtype=torch.float64, requires_grad=True)
    preference_loss(-0.5 * objective.beta * delta, objective.loss_type, objective.beta).sum().backward()
    s = objective.beta / 2
    torch.testing.assert_close(delta.grad, s * torch.sigmoid(s * delta.detach()))
    assert delta.grad is not None
    assert delta.grad[0] == 1250


def test_swapping_the_pair_adds_beta_half_delta_and_equal_members_teach_nothing(tiny: Build) -> None:
    policy, objective = moved(tiny, "epsilon"), DPO(beta=200.0)
    pairs = batch(policy)
    loss, metrics = run(objective, policy, pairs)
    swapped, _ = run(objective, policy, PairBatch(pairs.latents.flip(1), pairs.cond, CAPTIONS, pairs.ids))
    delta = metrics["delta_winner"] - metrics["delta_loser"]
    assert (loss - swapped).item() == pytest.approx(float(objective.beta / 2 * delta), rel=1e-3)
    same, _ = run(objective, policy, batch(policy, same=True))
    assert same.item() == pytest.approx(math.log(2), abs=1e-6)
    same.backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-6 for p in policy.parameters())


def test_a_constant_shift_gives_the_logit_in_closed_form(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shift d of the output gives logit = -(beta / D) d . (eps_ref(winner) - eps_ref(loser)), exactly."""
    policy, objective = Policy(tiny("epsilon"), LoRA(2)), DPO(beta=300.0, proportion_empty_prompts=0.0)
    shift = 0.3 * torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(8))
    plain, heard = policy.predict, []

    def predict(x_t: Tensor, t: Tensor, cond: Any, guidance_scale: float = 1.0) -> Prediction:
        with torch.no_grad():  # with gradients some processors take products by another kernel than the reference's
            said = plain(x_t, t, cond, guidance_scale)
        said = Prediction(said.raw.double(), x_t, said.alpha, said.sigma, said.prediction_type)
        if policy.answering is not None:
            heard.append(said.raw)
            return said
        return Prediction(said.raw + shift, x_t, said.alpha, said.sigma, said.prediction_type)

    monkeypatch.setattr(policy, "predict", predict)
    loss, _ = run(objective, policy)
    winner, loser = heard[0].chunk(2)
    logit = -objective.beta / shift.numel() * (shift * (winner - loser)).flatten(1).sum(1)
    assert loss.item() == pytest.approx(F.softplus(-logit).mean().item(), rel=1e-9)


@pytest.mark.parametrize("lora", [LoRA(2), None])
def test_training_leaves_the_reference_alone(tiny: Build, lora: LoRA | None) -> None:
    policy = Policy(tiny("flow"), lora)
    frozen = [p for p in policy.denoiser.parameters() if not p.requires_grad]
    if policy.weights.frozen is not None:
        frozen += list(policy.weights.frozen.parameters())
    before = [p.clone() for p in frozen]
    optimiser = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for _ in range(3):
        run(DPO(beta=100.0), policy)[0].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize("kind", ["v", "flow"])
def test_epsilon_space_is_alpha_squared_native_space(tiny: Build, kind: str) -> None:
    policy = moved(tiny, kind)
    family, t = policy.family, torch.full((3,), 400.0)
    alpha, sigma = family.path(t)
    x0, eps, raw = torch.randn(3, 3, 4, 8, 8).unbind()
    prediction = Prediction(raw, x0, alpha, sigma, family.prediction_type)
    native = denoising_error(prediction, x0, eps, "native")
    torch.testing.assert_close(denoising_error(prediction, x0, eps, "epsilon"), alpha.square() * native)


def test_the_pair_shares_noise_time_and_dropped_caption(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, objective = Policy(tiny("epsilon"), LoRA(2)), DPO(proportion_empty_prompts=0.5)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    call = policy.family.call

    def listen(denoiser: Any, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        seen.append((x_t, t, cond["prompt_embeds"]))
        return call(denoiser, x_t, t, cond)

    monkeypatch.setattr(policy.family, "call", listen)
    pairs = batch(policy)
    run(objective, policy, pairs)
    for x_t, t, embeds in seen:
        alpha, sigma = policy.family.path(t)
        eps = (x_t - alpha.view(-1, 1, 1, 1) * torch.cat(pairs.latents.unbind(1))) / sigma.view(-1, 1, 1, 1)
        torch.testing.assert_close(eps[:4], eps[4:], atol=1e-3, rtol=1e-3)
        assert torch.equal(t[:4], t[4:])
        assert torch.equal(embeds[:4], embeds[4:])
    null = policy.family.uncond["prompt_embeds"]
    dropped = [torch.equal(row, null[0]) for row in seen[0][2][:4]]
    assert 0 < sum(dropped) < 4, "the seed of this test should drop some captions and keep some"
    assert len(set(seen[0][1].tolist())) > 1


def test_a_sum_with_beta_over_d_is_the_mean(tiny: Build) -> None:
    policy = moved(tiny, "flow")
    mean, _ = run(DPO(beta=512.0), policy)
    total, _ = run(DPO(beta=512.0 / 256, reduction="sum"), policy)
    assert mean.item() == pytest.approx(total.item(), rel=1e-5)
    assert DPO(beta=512.0).cost(policy.family, None).notes["beta"] == "512 (mean over D=256) = 2 as a sum"


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_average_to_the_batch(tiny: Build, kind: str) -> None:
    policy, objective = moved(tiny, kind), DPO(beta=100.0)
    ctx = context(policy)
    table = objective.rollout(ctx, batch(policy))
    whole, metrics = objective.loss(ctx, table)
    parts = [objective.loss(ctx, chunk) for chunk in table.chunks(1)]
    assert whole.item() == pytest.approx(sum(loss.item() for loss, _ in parts) / 4, rel=1e-5)
    for name, value in metrics.items():  # the deltas are small differences of errors near 1, each rounded to 1e-7
        assert value.item() == pytest.approx(sum(m[name].item() for _, m in parts) / 4, rel=1e-4, abs=1e-6)


def test_draws_belong_to_the_position(tiny: Build) -> None:
    policy, objective = Policy(tiny("epsilon"), LoRA(2)), DPO()
    pairs = batch(policy)
    whole = objective.rollout(context(policy), pairs)
    tail = PairBatch(pairs.latents[2:], pairs.cond.take(slice(2, 4)), CAPTIONS[2:], [2, 3])
    half = objective.rollout(context(policy, [2, 3]), tail)
    assert torch.equal(whole.eps[2:], half.eps)
    assert torch.equal(whole.t[2:], half.t)
    later = objective.rollout(context(policy, step=1), pairs)
    assert not torch.equal(whole.eps, later.eps)


@pytest.mark.parametrize("lora", [LoRA(2), None])
def test_a_step_costs_one_forward_and_one_reference_forward(tiny: Build, lora: LoRA | None) -> None:
    """No text encoder, no autoencoder: 2B rows through the policy and 2B through the reference, and that is all."""
    policy, rows = Policy(tiny("epsilon"), lora), []
    pairs = batch(policy)
    assert policy.family.uncond is not None
    for network in (policy.denoiser, policy.weights.frozen):
        if network is not None:
            network.register_forward_pre_hook(lambda m, args: rows.append((len(args[0]), torch.is_grad_enabled())))
    for part in (policy.family.pipe.vae, policy.family.pipe.text_encoder):
        part.register_forward_pre_hook(lambda m, args: pytest.fail(f"{type(m).__name__} was called"))
    run(DPO(), policy, pairs)
    assert sorted(rows) == [(8, False), (8, True)]
    plan = DPO().cost(policy.family, None)
    assert (plan.trained, plan.frozen) == (2, 2)


def test_other_losses() -> None:
    logit = torch.tensor([-2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    ipo = preference_loss(logit, "ipo", 0.1)
    torch.testing.assert_close(ipo, (logit / 0.1 - 5).square())
    torch.testing.assert_close(preference_loss(logit, "hinge", 1.0), torch.tensor([3, 1, 0.5, 0]).double())
    smooth = preference_loss(logit, "sigmoid", 1.0, 0.1)
    expected = 0.9 * F.softplus(-logit) + 0.1 * F.softplus(logit)
    torch.testing.assert_close(smooth, expected)


def test_winner_anchor_adds_the_winners_error(tiny: Build) -> None:
    policy = moved(tiny, "flow")
    plain, metrics = run(DPO(beta=100.0), policy)
    anchored, _ = run(DPO(beta=100.0, sft_weight=0.5), policy)
    assert (anchored - plain).item() == pytest.approx(0.5 * metrics["error_winner"].item(), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"label_smoothing": 0.5}, "label_smoothing must be in"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "defined for loss_type sigmoid"),
        ({"proportion_empty_prompts": 1.5}, "proportion_empty_prompts"),
    ],
)
def test_bad_hyper_parameters_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPO(**arguments)
