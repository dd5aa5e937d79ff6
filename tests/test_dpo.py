"""Diffusion-DPO: the loss against the paper's formula, for epsilon, v and flow, and the cost of a step."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from align.data.preferences import PairBatch
from align.diffusion.process import Prediction
from align.objectives import Context
from align.objectives.dpo import DPO
from align.objectives.losses import denoising_error, preference_loss
from align.objectives.pair_losses import (
    PairErrors,
    PairRows,
    mapo_logit,
    pair_errors,
    pair_loss,
    safeguard,
    scale_gradient,
)
from align.policy.policy import LoRA, Policy
from tests.helpers import moved
from tests.pipelines import Build

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


def run(objective: DPO, policy: Policy, pairs: PairBatch | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    ctx = context(policy)
    with torch.no_grad():
        table = objective.rollout(ctx, pairs or batch(policy))
    return objective.loss(ctx, table)


def in_float64(objective: DPO, policy: Policy, table: PairRows) -> Tensor:
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


@pytest.mark.parametrize(
    ("space", "kind"),
    [
        *(("native", "epsilon"), ("native", "v"), ("native", "flow"), ("epsilon", "v"), ("epsilon", "flow")),
        pytest.param("epsilon", "epsilon", marks=pytest.mark.slow),
    ],
)
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


# votes
def voted(policy: Policy, votes: list[float]) -> PairBatch:
    pairs = batch(policy)
    return PairBatch(pairs.latents, pairs.cond, pairs.captions, pairs.ids, torch.tensor(votes))


def test_votes_smooth_or_weigh_each_pair(tiny: Build) -> None:
    """Share p of the votes: label smoothing 1 - p, or weight 2 p - 1; a pair nobody voted on has the settings' own."""
    policy, shares = moved(tiny, "epsilon"), [1.0, 0.75, 0.5, math.nan]
    settings: dict[str, Any] = {"beta": 200.0, "proportion_empty_prompts": 0.0}
    plain, ctx = DPO(**settings), context(policy)
    rows = plain.rollout(ctx, voted(policy, shares))
    assert rows.votes is None
    errors, _ = plain.errors(ctx, rows)
    m = errors.logit(200.0).detach().double()
    smooth = torch.tensor([0, 0.25, 0.5, 0.1]).double()
    weight = torch.tensor([1, 0.5, 0, 1]).double()
    expected = {
        "ignore": F.softplus(-m),
        "smooth": (1 - smooth) * F.softplus(-m) + smooth * F.softplus(m),
        "weight": weight * F.softplus(-m),
    }
    for votes, each in expected.items():
        objective = DPO(votes=votes, label_smoothing=0.1 if votes == "smooth" else 0.0, **settings)  # type: ignore
        assert objective.needs.labels == (votes != "ignore")
        found, _ = run(objective, policy, voted(policy, shares))
        assert found.item() == pytest.approx(each.mean().item(), rel=1e-5)


# DPO's kin
def errors_of(winner: Tensor, loser: Tensor, then: Tensor) -> PairErrors:
    """Of predictions (R, D) whose targets are 0."""
    parts = [x.square().mean(1) for x in (winner, loser, *then.chunk(2))]
    return PairErrors(*parts, (winner - then.chunk(2)[0]).square().mean(1))


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    winner, loser = (0.3 * torch.randn(2, 3, 16, dtype=torch.float64, generator=generator)).unbind()
    loser = loser + 0.5 * winner
    then = torch.cat([winner, loser]) + 0.1 * torch.randn(6, 16, dtype=torch.float64, generator=generator)
    return winner.requires_grad_(), loser.requires_grad_(), then


def test_dspo_is_the_squared_difference_of_answers() -> None:
    winner, loser, then = drawn()
    errors = errors_of(winner, loser, then)
    loss, logit = pair_loss(errors, "dspo", 0.7)
    inside = -0.5 * 0.7 * (errors.winner - errors.loser - (errors.ref_winner - errors.ref_loser))
    c = 0.7 * (1 - torch.sigmoid(inside))
    plain = (winner - c[:, None] * (winner - then[:3])).square().mean(1)
    torch.testing.assert_close((loss, logit), (plain, inside))
    for found, wanted in zip(
        torch.autograd.grad(loss.sum(), (winner, loser), retain_graph=True),
        torch.autograd.grad(plain.sum(), (winner, loser)),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def test_mapo_and_orpo_in_float64() -> None:
    winner, loser, then = drawn(1)
    errors = errors_of(winner, loser, then)
    w, x = errors.winner, errors.loser
    loss, logit = pair_loss(errors, "mapo", 0.1)
    margin = 1000 * (0.5 * w / (torch.exp(0.5 * w) - 1) - 0.5 * x / (torch.exp(0.5 * x) - 1))
    torch.testing.assert_close((loss, logit), (w - 0.1 * torch.log(torch.sigmoid(margin)), margin))
    loss, logit = pair_loss(errors, "orpo", 0.1)
    torch.testing.assert_close((loss, logit), (w + 0.1 * torch.log1p(torch.exp(w - x)), x - w))
    for loss_type in ("mapo", "orpo"):  # winners are pulled, losers are pushed
        loss, _ = pair_loss(errors, loss_type, 0.1)  # type: ignore[arg-type]
        pull, push = torch.autograd.grad(loss.sum(), (w, x), retain_graph=True)
        assert bool((pull > 1).all()) and bool((push < 0).all())


@pytest.mark.parametrize("seed", range(3))
def test_losses_and_safeguard_are_the_authors_code(seed: int) -> None:
    """What Diffusion-SDPO's train.py, MaPO's utils.py and diffusers' ORPO script, whose log-odds have the other sign,
    gave on the same tensors: goldens/make_objectives.py."""
    goldens = json.loads((Path(__file__).parent / "goldens/upstream_objectives.json").read_text())["pairs"][seed]
    winner, loser, then = drawn(seed)
    errors = errors_of(winner, loser, then)
    for name, loss_type, beta in (("dpo", "sigmoid", 300.0), ("dspo", "dspo", 0.05), ("mapo", "mapo", 0.1)):
        loss, _ = pair_loss(errors, loss_type, beta)  # type: ignore[arg-type]
        assert loss.mean().item() == pytest.approx(goldens[name], rel=1e-9)
    loss, logit = pair_loss(errors, "orpo", 0.1)  # log sigmoid(-x) = log sigmoid(x) - x
    assert (loss + 0.1 * logit).mean().item() == pytest.approx(goldens["orpo"], rel=1e-9)
    for mu, wanted in goldens["lambda"].items():  # of one pair a batch
        assert safeguard(winner, loser, float(mu)).tolist() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(("loss_type", "beta"), [("mapo", 0.1), ("orpo", 0.1)])
def test_without_a_reference_none_is_asked(tiny: Build, loss_type: Any, beta: float) -> None:
    policy, rows = moved(tiny, "flow"), []
    objective = DPO(beta=beta, loss_type=loss_type, proportion_empty_prompts=0.0)
    assert not objective.needs.reference and objective.cost(policy.family, None).frozen == 0
    policy.denoiser.register_forward_pre_hook(lambda m, args: rows.append(torch.is_grad_enabled()))
    ctx = context(policy)
    table = objective.rollout(ctx, batch(policy))
    loss, metrics = objective.loss(ctx, table)
    assert rows == [True] and not metrics.keys() & {"delta_winner", "delta_loser"}
    errors, _ = DPO(beta=1.0, proportion_empty_prompts=0.0).errors(ctx, table)
    w, x = errors.winner.double(), errors.loser.double()
    margin = mapo_logit(w, x) if loss_type == "mapo" else x - w
    assert loss.item() == pytest.approx((w + 0.1 * F.softplus(-margin)).mean().item(), rel=1e-5)


@pytest.mark.parametrize("loss_type", ["dspo", "mapo", "orpo"])
def test_kin_start_as_their_formulas_say(tiny: Build, loss_type: Any) -> None:
    """DSPO at the reference is (1 - beta / 2) of the winner's denoising gradient."""
    policy = Policy(tiny("epsilon"), LoRA(2))
    objective = DPO(beta=0.1, loss_type=loss_type, proportion_empty_prompts=0.0)
    loss, metrics = run(objective, policy)
    found = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, policy.parameters(), allow_unused=True) if g is not None]
    )
    assert found.any()
    if loss_type == "dspo":
        assert loss.item() == pytest.approx(metrics["error_winner"].item()) and metrics["implicit_acc"] == 0.5
        sft, _ = run(DPO(beta=1e-12, proportion_empty_prompts=0.0, sft_weight=0.95), policy)
        wanted = torch.autograd.grad(sft, policy.parameters(), allow_unused=True)
        torch.testing.assert_close(
            found, torch.cat([g.flatten() for g in wanted if g is not None]), rtol=1e-3, atol=1e-7
        )


# the safeguard
def test_the_safeguards_factor_in_closed_form() -> None:
    winner = torch.tensor([[2.0, 0.0]] * 4, dtype=torch.float64)
    loser = torch.tensor([[4.0, 1.0], [1.0, 3.0], [-1.0, 5.0], [0.0, 2.0]], dtype=torch.float64)
    assert safeguard(winner, loser, 0.0).tolist() == [0.5, 1.0, 1.0, 1.0]  # |w|^2 / <l, w> = 4 / 8, 4 / 2; no limit
    assert safeguard(winner, loser, 0.9).tolist() == pytest.approx([0.05, 0.2, 1.0, 1.0])
    assert safeguard(winner, loser, 1.0).tolist() == [0.0, 0.0, 1.0, 1.0]
    assert safeguard(winner, loser, 0.0, 1.5).tolist() == [0.5, 1.5, 1.5, 1.5]  # another weight moves no bound
    gaps, settings = torch.cat([winner, loser]), {"loser_weight": 3.0, "mu": 0.0}
    assert pair_errors(gaps, None, "mean", **settings)[1].tolist() == [0.5, 2.0, 3.0, 3.0]  # type: ignore[arg-type]


@pytest.mark.parametrize("mu", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_a_guarded_step_does_not_raise_the_winners_error(mu: float | None, loss_type: Any) -> None:
    """A network of one vector, its answer to everything: gradients in the answer are those in the weights, as the
    safeguard takes them to be. Without it a step raises the error; with it, that falls by at least mu of what it would
    alone, to first order."""
    target_w, target_l = torch.tensor([[1.0, 0.0, 0.0]]).double(), torch.tensor([[2.0, 1.0, 0.5]]).double()
    weights = torch.tensor([0.2, 0.1, -0.3], dtype=torch.float64, requires_grad=True)
    gap_w, gap_l = weights[None] - target_w, weights[None] - target_l
    winner, loser = gap_w.square().mean(1), gap_l.square().mean(1)
    scale = torch.ones(1).double() if mu is None else safeguard(gap_w, gap_l, mu)
    errors = PairErrors(winner, scale_gradient(loser, scale), winner.detach(), loser.detach(), torch.zeros(1).double())
    loss, _ = pair_loss(errors, loss_type, 1.0)
    assert errors.loser.item() == loser.item()
    (step,) = torch.autograd.grad(loss.sum(), weights, retain_graph=True)
    (pull,) = torch.autograd.grad(winner.sum(), weights, retain_graph=True)
    (force,) = torch.autograd.grad(loss.sum(), errors.winner)
    change, alone = -float(step @ pull), -float(force) * float(pull @ pull)
    if mu is None:
        assert change > 0
    else:
        assert change <= mu * alone + 1e-12 <= 1e-12


def test_the_losers_gradient_is_what_is_scaled(tiny: Build) -> None:
    """The value of the loss stays; with a factor of 0 the gradient is that of the winner alone."""
    policy = moved(tiny, "flow")
    settings: dict[str, Any] = {"beta": 100.0, "proportion_empty_prompts": 0.0}
    plain, metrics = run(DPO(**settings), policy)
    assert "loser_scale" not in metrics
    guarded, metrics = run(DPO(safeguard=0.5, **settings), policy)
    assert guarded.item() == plain.item() and 0 < metrics["loser_scale"] < 1
    found = []
    for weight in (0.0, 0.25, 1.0):
        loss, _ = run(DPO(loser_weight=weight, **settings), policy)
        assert loss.item() == plain.item()
        grads = torch.autograd.grad(loss, policy.parameters(), allow_unused=True)
        found.append(torch.cat([g.flatten() for g in grads if g is not None]))
    torch.testing.assert_close(found[1], 0.75 * found[0] + 0.25 * found[2], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"loss_type": "mapo"}, "loss_type mapo: beta 2000 is DPO's; published are 0.1 and reduction mean"),
        ({"loss_type": "dspo", "beta": 0.001, "reduction": "sum"}, "published are 0.001 and reduction mean"),
        ({"loss_type": "hinge", "votes": "smooth"}, "defined for loss_type sigmoid"),
        ({"safeguard": 1.5}, "safeguard null or in"),
        ({"loser_weight": -1.0}, "loser_weight and sft_weight must be at least 0"),
        ({"label_smoothing": 0.5}, "label_smoothing must be in"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "defined for loss_type sigmoid"),
        ({"proportion_empty_prompts": 1.5}, "proportion_empty_prompts"),
    ],
)
def test_bad_hyper_parameters_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPO(**arguments)
