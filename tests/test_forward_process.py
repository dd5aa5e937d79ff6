"""AWM and DGPO on the forward process that they share with DiffusionNFT: their losses are the authors', their gradients
the formulas', and how many rows are taken at once does not matter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from align.common.errors import UserError
from align.diffusion.process import Prediction
from align.families import Conditioning, Scale
from align.objectives import AWM, DGPO, NFT, Context
from align.objectives.dgpo import GroupRows
from align.objectives.objective import Objective
from align.objectives.online.forward_process import NoisedRows, predict_noised
from align.objectives.online.rewards import Scorer
from align.policy.policy import LoRA, Policy
from align.sampling.loop import sample
from align.sampling.sampler import Sampler
from tests.helpers import Even, Flat, Heard, bright, gradients, moved, prompted, rolled
from tests.pipelines import Build
from tests.test_policy import disturb

GOLDENS: dict[str, Any] = json.loads((Path(__file__).parent / "goldens/forward_process.json").read_text())
SIZE, GROUP = 8, 4  # images of the goldens


def made(kind: type[Any], **arguments: Any) -> Any:
    return kind(Sampler(3, guidance_scale=1.0), images_per_prompt=4, **arguments)


# the authors' code
class Told:
    """A policy that answers what it is told, whatever it is asked."""

    device = torch.device("cpu")

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    @property
    def family(self) -> Told:
        return self

    def path(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning, _scale: Scale = None) -> Prediction:
        return Prediction(self.raw, x_t, 1 - t, t, "flow_prediction")


def wave(k: int) -> Tensor:
    return torch.sin(torch.arange(SIZE * 8, dtype=torch.float64) * (0.7 + 0.13 * k) + k).reshape(SIZE, 2, 2, 2)


def told() -> tuple[Context, Tensor, NoisedRows]:
    """The goldens' numbers: an answer in the midst of training, and the rows that it is to."""
    x0, eps = wave(1), wave(2)
    reference = eps - x0 + 0.3 * wave(3)
    old = reference + 0.02 * wave(4)
    new = (old + 0.05 * wave(5)).requires_grad_()
    rows = NoisedRows(
        image=torch.arange(SIZE),
        t=torch.linspace(0.1, 0.95, SIZE, dtype=torch.float64),
        eps=eps,
        old=old,
        reference=reference,
        x0=x0,
        advantage=torch.tensor([1.5, -0.5, -1.0, 0.0, -2.0, 0.5, 1.0, 0.5], dtype=torch.float64),
        cond=Conditioning({"c": torch.zeros(1, 1)}),
        prompt_index=torch.zeros(SIZE, dtype=torch.long),
    )
    return Context(Told(new), 0, 0, range(SIZE)), new, rows  # type: ignore[arg-type]


def require_golden(loss: Tensor, new: Tensor, golden: dict[str, Any]) -> None:
    assert loss.item() == pytest.approx(golden["loss"], rel=1e-6, abs=1e-10)
    loss.backward()
    assert new.grad is not None
    wanted = torch.tensor(golden["gradient"], dtype=torch.float64)
    torch.testing.assert_close(new.grad.flatten(), wanted, rtol=1e-4, atol=1e-8)  # distances are in float32
    assert wanted.abs().max() > 1e-4


@pytest.mark.parametrize("golden", GOLDENS["awm"], ids=lambda g: f"{g['weighting']}-{g['clip_range']:g}")
def test_awm_is_the_authors(golden: dict[str, Any]) -> None:
    ctx, new, rows = told()
    names = ("weighting", "clip_range", "kl_weight", "old_weight", "loss_scale")
    loss, _ = made(AWM, **{name: golden[name] for name in names}).loss(ctx, rows)
    require_golden(loss, new, golden)


@pytest.mark.parametrize("golden", GOLDENS["dgpo"], ids=lambda g: f"{g['beta']:g}-{g['anchor']}")
def test_dgpo_is_the_authors(golden: dict[str, Any]) -> None:
    ctx, new, noised = told()
    names = ("beta", "clip_range", "anchor", "kl_weight")
    objective = made(DGPO, **{name: golden[name] for name in names})
    rows = GroupRows(image=torch.arange(2), members=torch.arange(SIZE).reshape(-1, GROUP), noised=noised)
    loss, metrics = objective.loss(ctx, rows)
    assert metrics["clip_fraction"].item() * SIZE == golden["clipped"]
    require_golden(loss, new, golden)


# the formulas
@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_awm_before_the_first_update_is_matching_weighted_by_advantage(tiny: Build, kind: str) -> None:
    policy, objective = moved(tiny, kind), made(AWM, weighting="t")
    ctx, rows = rolled(objective, policy)
    loss, metrics = objective.loss(replace(ctx, on_policy=True), rows)
    assert loss.item() == pytest.approx(-rows.row_advantage.mean().item(), abs=1e-5)
    assert metrics["ratio_max"].item() == pytest.approx(1, abs=1e-4)
    found = gradients(policy, loss)
    new, x0, eps = predict_noised(ctx, rows)
    error = (new.raw - new.target(x0, eps)).square().mean((1, 2, 3))
    wanted = gradients(policy, (rows.row_advantage * new.sigma * error).mean())
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    assert wanted.norm() > 1e-4


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_dgpo_is_the_likelihood_of_a_groups_preferences(tiny: Build, kind: str) -> None:
    """Its gradient is 1 / beta of that of -log sigmoid(-beta / G sum A (e - e_ref)); where nothing has moved half of
    that of the mean A e."""
    policy, objective = moved(tiny, kind, scale=0.0), made(DGPO, beta=30.0, clip_range=1e9)
    ctx, rows = rolled(objective, policy)
    loss, metrics = objective.loss(ctx, rows)
    assert metrics["preference"].item() == pytest.approx(0.5, abs=1e-4)
    begin = gradients(policy, loss)
    _, _, advantage, error = errors(ctx, rows)
    torch.testing.assert_close(begin, gradients(policy, 0.5 * (advantage * error).mean()), rtol=1e-3, atol=1e-6)
    disturb(policy, 0.2)
    found = gradients(policy, objective.loss(ctx, rows)[0])
    part, new, advantage, error = errors(ctx, rows)
    answer = (part.reference - new.target(part.x0[part.image], part.eps)).square().mean((1, 2, 3))
    inside = -30.0 * (advantage * (error - answer.reshape(error.shape))).mean(1)
    torch.testing.assert_close(found, gradients(policy, -F.logsigmoid(inside).mean() / 30.0), rtol=1e-3, atol=1e-6)
    assert (torch.sigmoid(inside) - 0.5).abs().max() > 0.01


def errors(ctx: Context, rows: GroupRows) -> tuple[NoisedRows, Prediction, Tensor, Tensor]:
    part = rows.noised.take(rows.members.flatten())
    new, x0, eps = predict_noised(ctx, part)
    error = (new.raw - new.target(x0, eps)).square().mean((1, 2, 3)).reshape(rows.members.shape)
    return part, new, part.row_advantage.reshape(rows.members.shape), error


def test_an_image_that_has_gone_far_enough_has_no_gradient(tiny: Build) -> None:
    policy, objective = moved(tiny, "flow"), made(DGPO, clip_range=1e-9)
    ctx, rows = rolled(objective, policy)
    disturb(policy, 0.3)
    part, _, advantage, error = errors(ctx, rows)
    new, x0, eps = predict_noised(ctx, part)
    old = (part.old - new.target(x0, eps)).square().mean((1, 2, 3)).reshape(error.shape)
    inside = torch.where(advantage > 0, error >= old, error <= old)
    assert 0 < inside.sum() < inside.numel()
    found, metrics = objective.loss(ctx, rows)
    assert metrics["clip_fraction"].item() == pytest.approx(1 - inside.float().mean().item())
    free, _ = replace(objective, clip_range=1e9).loss(ctx, rows)
    weight = torch.sigmoid(100 * (advantage * (error - old_reference(part, new, x0, eps))).mean(1)).detach()
    wanted = (weight[:, None] * advantage * torch.where(inside, error, error.detach())).mean()
    torch.testing.assert_close(gradients(policy, found), gradients(policy, wanted), rtol=1e-3, atol=1e-7)
    assert found.item() == pytest.approx(free.item(), rel=1e-5)


def old_reference(part: NoisedRows, new: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
    assert part.reference is not None
    return (part.reference - new.target(x0, eps)).square().mean((1, 2, 3)).reshape(-1, 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AWM, DGPO])
def test_a_brighter_policy_after_some_updates(tiny: Build, kind: type[Objective]) -> None:
    torch.manual_seed(0)
    policy: Policy = Policy(tiny("flow"), LoRA(4))
    objective = kind(Sampler(3, guidance_scale=1.0), images_per_prompt=8)  # type: ignore[call-arg]
    adam = torch.optim.Adam(policy.parameters(), 4e-2)

    def brightness() -> float:
        family = policy.family
        x = torch.randn(32, *family.latent_shape(), generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            cond = family.encode(["a star"]).expand(32)
            return family.to_image(sample(policy.predict, family.grid(3), cond, x, 1.0)).mean().item()

    before = brightness()
    for step in range(12):
        ctx, rows = rolled(objective, policy, step=step)
        adam.zero_grad()
        objective.loss(ctx, rows)[0].backward()
        adam.step()
    assert brightness() > before + 0.005


# rows
@pytest.mark.parametrize("kind", [AWM, DGPO])
def test_rows_may_come_in_any_number_at_once(tiny: Build, kind: type[Objective]) -> None:
    policy, objective = moved(tiny, "flow"), made(kind, kl_weight=0.5)
    ctx, rows = rolled(objective, policy, prompts=3)
    disturb(policy, 0.2)
    whole = gradients(policy, objective.loss(ctx, rows)[0])
    order = rows.shuffled(torch.Generator().manual_seed(3))
    parts = [(len(part), gradients(policy, objective.loss(ctx, part)[0])) for part in order.chunks(1)]
    assert len(parts) == len(rows) == (6 if kind is DGPO else 24)
    torch.testing.assert_close(sum(n * g for n, g in parts) / len(rows), whole, rtol=1e-3, atol=1e-6)


def test_a_group_is_noised_alike_and_whole_whichever_process_draws_it(tiny: Build) -> None:
    policy, objective = moved(tiny, "flow"), made(DGPO)
    _, rows = rolled(objective, policy, prompts=3)
    t, eps = rows.noised.t[rows.members], rows.noised.eps[rows.members]
    assert (t == t[:, :1]).all() and (eps == eps[:, :1]).all()
    assert len(set(t[:, 0].tolist())) == len(rows) == 6
    images = rows.noised.image[rows.members]
    assert (images == images[:, :1] + torch.arange(4)).all() and (images[:, 0] == 4 * rows.image).all()

    def gather(values: Tensor) -> Tensor:  # the first process's prompt scores nought
        return torch.cat([values.new_zeros(4, *values.shape[1:]), values])

    second = Context(policy, 0, 0, range(4, 12), bright(), gather)  # a process with the last two prompts
    with torch.no_grad():
        other = objective.rollout(second, prompted(policy, 2, 1))
    torch.testing.assert_close(other.noised.eps, rows.noised.eps[8:], rtol=0, atol=0)
    torch.testing.assert_close(other.noised.t, rows.noised.t[8:], rtol=0, atol=0)
    torch.testing.assert_close(other.noised.old, rows.noised.old[8:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("objective", "frozen", "trained"),
    [
        (made(AWM), 3 + 2, 2),
        (made(AWM, kl_weight=0.1), 3 + 4, 2),
        (made(DGPO), 3 + 4, 2),
        (made(DGPO, anchor="old"), 3 + 2, 2),
        (made(NFT, kl_weight=0.1), 3 + 4, 2),
    ],
)
def test_evaluations_are_the_plans(tiny: Build, objective: Objective, frozen: int, trained: int) -> None:
    policy = moved(tiny, "flow")
    heard = Heard(policy)
    ctx, rows = rolled(objective, policy)
    plan = objective.cost(policy.family, None)
    assert heard.rows(trained=False) == plan.frozen * 8 == frozen * 8
    objective.loss(ctx, rows)
    assert heard.rows(trained=True) == plan.trained * 8 == trained * 8


@pytest.mark.parametrize("kind", [AWM, DGPO])
def test_prompts_whose_images_score_alike_cost_nothing_more(tiny: Build, kind: type[Objective]) -> None:
    policy, objective = moved(tiny, "flow"), made(kind)
    heard = Heard(policy)
    _, none = rolled(objective, policy, scorer=Scorer({"flat": Flat()}, {"flat": 1.0}))
    assert len(none) == 0 and heard.rows(trained=False) == 3 * 8
    ctx, some = rolled(objective, policy, prompts=4, scorer=Scorer({"even": Even()}, {"even": 1.0}))
    part = some if kind is AWM else some.noised
    assert 0 < len(part) < 32 and (part.row_advantage != 0).all()
    assert torch.isfinite(objective.loss(ctx, some)[0])


def test_what_cannot_be_is_refused(tiny: Build) -> None:
    for kind in (AWM, DGPO):
        with pytest.raises(ValueError, match="images_per_prompt must be at least 2"):
            kind(images_per_prompt=1)
        with pytest.raises(ValueError, match="clip_range"):
            kind(clip_range=0.0)
        with pytest.raises(ValueError, match="as many draws_per_image as the sampler has steps"):
            kind(Sampler(3), draws_per_image=4, timesteps="sampler")
        with pytest.raises(UserError, match="set ema_decay above 0"):
            kind(old="average").prepare(Policy(tiny("flow"), LoRA(2)), None)
