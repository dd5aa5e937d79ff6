"""DiffusionNFT: the loss against its formula, the gradient against policy improvement, and what a rollout costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from align.common.errors import UserError
from align.objectives.nft import NFT
from align.objectives.online.forward_process import predict_noised
from align.policy.policy import LoRA, Policy
from align.sampling.loop import sample
from align.sampling.sampler import Sampler
from tests.helpers import Heard, bright, gradients, moved, rolled
from tests.pipelines import Build
from tests.test_policy import disturb


def made(**arguments: object) -> NFT:
    return NFT(Sampler(3, guidance_scale=1.0), images_per_prompt=4, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_loss_is_the_papers(tiny: Build, kind: str, beta: float) -> None:
    policy, objective = moved(tiny, kind), made(beta=beta)
    ctx, table = rolled(objective, policy)
    disturb(policy, 0.2)  # the weights have gone on since the rollout
    loss, metrics = objective.loss(ctx, table)
    with torch.no_grad():
        new, x0, eps = predict_noised(ctx, table)
    v = new.target(x0, eps).double()
    old, theta, r = table.old.double(), new.raw.double(), objective.good(table).double()
    plus, minus = (1 - beta) * old + beta * theta, (1 + beta) * old - beta * theta
    wanted = r * (plus - v).square().mean((1, 2, 3)) + (1 - r) * (minus - v).square().mean((1, 2, 3))
    assert loss.item() == pytest.approx(wanted.mean().item(), rel=1e-5)
    assert metrics["moved"].item() == pytest.approx((theta - old).square().mean().item(), rel=1e-4)


def test_gradient_before_the_first_update_is_weighted_denoising(tiny: Build) -> None:
    """At v_theta = v_old it is that of beta (2r - 1) |v_theta - v|^2: towards the good, away from the bad."""
    policy, objective = moved(tiny, "flow"), made(beta=0.5)
    ctx, table = rolled(objective, policy)
    found = gradients(policy, objective.loss(ctx, table)[0])
    new, x0, eps = predict_noised(ctx, table)
    error = (new.raw - new.target(x0, eps)).square().mean((1, 2, 3))
    wanted = gradients(policy, (0.5 * (2 * objective.good(table) - 1) * error).mean())
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    assert wanted.norm() > 1e-4


def test_rewards_become_shares_of_good(tiny: Build) -> None:
    policy = moved(tiny, "flow")
    for cut in (1.0, 3.0):
        objective = made(adv_clip_max=cut)
        _, table = rolled(objective, policy)
        good, x0 = objective.good(table)[::2], table.x0
        with torch.no_grad():
            scores = bright().score(policy.family.to_image(x0), ["x"] * 8)["bright"].view(2, 4).double()
        centred = scores - scores.mean(1, keepdim=True)
        away = centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-4)
        torch.testing.assert_close(good.view(2, 4).double(), 0.5 + 0.5 * (away / cut).clamp(-1, 1), rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_evaluations_are_the_plans(tiny: Build, kind: str) -> None:
    policy, objective = moved(tiny, kind), NFT(Sampler(3, guidance_scale=2.0), images_per_prompt=4, draws_per_image=2)
    heard = Heard(policy)
    ctx, table = rolled(objective, policy)
    plan = objective.cost(policy.family, None)
    assert heard.rows(trained=False) == plan.frozen * 8 == (3 * 2 + 2) * 8
    objective.loss(ctx, table)
    assert heard.rows(trained=True) == plan.trained * 8 == len(table)


def test_average_draws_and_answers_by_the_moving_average(tiny: Build) -> None:
    policy = Policy(tiny("flow"), LoRA(2), ema_decay=0.9)
    objective = made(old="average")
    disturb(policy, 0.3)  # the average has stayed behind
    _, table = rolled(objective, policy)
    plain = Policy(tiny("flow"), LoRA(2))
    _, fresh = rolled(made(), plain)
    torch.testing.assert_close(table.old, fresh.old, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_brighter_policy_after_some_updates(tiny: Build) -> None:
    torch.manual_seed(0)
    policy, objective = Policy(tiny("flow"), LoRA(4)), NFT(Sampler(3, guidance_scale=1.0), images_per_prompt=8)
    adam = torch.optim.Adam(policy.parameters(), 2e-2)

    def brightness() -> float:
        family = policy.family
        x = torch.randn(32, *family.latent_shape(), generator=torch.Generator().manual_seed(9))
        cond = family.encode(["a star"]).expand(32)
        with torch.no_grad():
            return family.to_image(sample(policy.predict, family.grid(3), cond, x, 1.0)).mean().item()

    before = brightness()
    for step in range(16):
        ctx, table = rolled(objective, policy, step=step)
        adam.zero_grad()
        objective.loss(ctx, table)[0].backward()
        adam.step()
    assert brightness() > before + 0.01


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="images_per_prompt"):
        NFT(images_per_prompt=1)
    with pytest.raises(ValueError, match="beta"):
        NFT(beta=0.0)


# the authors' code
@pytest.mark.parametrize(("kind", "beta"), [("flow", 1.0), ("flow", 0.1)])
def test_the_official_combination_is_the_authors_loss(tiny: Build, kind: str, beta: float) -> None:
    """scripts/train_nft_sd3.py of NVlabs/DiffusionNFT (24af555), its lines 927 to 970 in float64."""
    policy = moved(tiny, kind)
    objective = NFT(
        Sampler(4, 1.0), 4, 3, beta, "batch", 5.0, "adaptive", timesteps="sampler", loss_scale=5 / beta, kl_weight=1e-4
    )
    ctx, rows = rolled(objective, policy)
    disturb(policy, 0.05)  # v_theta is not v_old now
    loss, metrics = objective.loss(ctx, rows)
    x0, eps = rows.x0[rows.image].double(), rows.eps.double()
    t = (rows.t / 1000).double()[:, None, None, None]
    xt = (1 - t) * x0 + t * eps
    cond = rows.cond.take(rows.prompt_index[rows.image])
    with torch.no_grad():
        forward = policy.predict(xt.float(), rows.t, cond).raw.double()
        with policy.reference():
            reference = policy.predict(xt.float(), rows.t, cond).raw.double()
    old, r = rows.old.double(), objective.good(rows).double()
    terms = []
    for prediction in (beta * forward + (1 - beta) * old, (1 + beta) * old - beta * forward):
        gap = xt - t * prediction - x0
        terms.append((gap.square() / gap.abs().mean((1, 2, 3), keepdim=True).clip(1e-5)).mean((1, 2, 3)))
    policy_loss = ((r * terms[0] + (1 - r) * terms[1]) / beta * 5).mean()
    kl = (forward - reference).square().mean()
    assert loss.item() == pytest.approx((policy_loss + 1e-4 * kl).item(), rel=1e-4)
    assert metrics["kl_reference"].item() == pytest.approx(kl.item(), rel=1e-3) and kl > 0


def test_timesteps_of_the_sampler_are_different_ones_of_its_own(tiny: Build) -> None:
    policy, objective = moved(tiny, "flow"), NFT(Sampler(5, 1.0), 4, 4, timesteps="sampler")
    _, rows = rolled(objective, policy)
    grid = policy.family.grid(5).t[:5]
    drawn = rows.t.reshape(-1, 4)
    assert all(len(set(row.tolist())) == 4 and set(row.tolist()) <= set(grid.tolist()) for row in drawn)
    assert len(set(rows.t.tolist())) == 5
    assert objective.cost(policy.family, None).frozen == 5 + 4
    assert replace(objective, kl_weight=1e-4).cost(policy.family, None).frozen == 5 + 8
    with pytest.raises(ValueError, match="as many draws_per_image as the sampler has steps"):
        NFT(Sampler(3), draws_per_image=4, timesteps="sampler")


def test_the_average_of_nothing_is_refused(tiny: Build) -> None:
    with pytest.raises(UserError, match="set ema_decay above 0"):
        NFT(old="average").prepare(Policy(tiny("flow"), LoRA(2)), None)
