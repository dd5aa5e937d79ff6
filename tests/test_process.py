"""Diffusion algebra against its definitions, torch.distributions and closed forms, in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from align.diffusion.kernels import DDIM, FlowSDE, Gaussian, Kernel, WindowedKernel
from align.diffusion.process import Grid, Prediction, add_noise, append_dims

KINDS = ("epsilon", "v_prediction", "flow_prediction")
GOLDENS = Path(__file__).parent / "goldens/upstream_objectives.json"


def coefficients(kind: str, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if kind == "flow_prediction":
        return 1 - t, t
    return torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)


def flow_grid(steps: int) -> Grid:
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return Grid(t, 1 - t, t)


@pytest.mark.parametrize("kind", KINDS)
def test_true_target_gives_back_data_and_noise(kind: str) -> None:
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 5, 3, 4, dtype=torch.float64).unbind()
    alpha, sigma = coefficients(kind, torch.linspace(0.1, 0.9, 5, dtype=torch.float64))
    x_t = add_noise(x0, eps, alpha, sigma)
    target = Prediction(x0, x_t, alpha, sigma, kind).target(x0, eps)
    prediction = Prediction(target, x_t, alpha, sigma, kind)
    torch.testing.assert_close(prediction.x0, x0)
    torch.testing.assert_close(prediction.eps, eps)


def test_half_precision_is_read_in_single() -> None:
    raw = torch.randn(2, 3, dtype=torch.bfloat16)
    prediction = Prediction(raw, raw, torch.tensor(0.5), torch.tensor(0.5), "flow_prediction")
    assert prediction.x0.dtype == prediction.eps.dtype == torch.float32


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_gaussian_is_torch_distributions_normal(eta: float) -> None:
    torch.manual_seed(1)
    mean, other, x = torch.randn(3, 4, 2, 3, dtype=torch.float64).unbind()
    std = torch.full((4,), eta, dtype=torch.float64)
    ours, theirs = Gaussian(mean, std), Normal(mean, eta)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x).flatten(1).mean(1))
    torch.testing.assert_close(ours.log_prob(x, "sum"), theirs.log_prob(x).flatten(1).sum(1))
    exact = kl_divergence(theirs, Normal(other, eta)).flatten(1)
    torch.testing.assert_close(ours.kl(Gaussian(other, std)), exact.mean(1))
    torch.testing.assert_close(ours.kl(Gaussian(other, std), "sum"), exact.sum(1))


def test_expected_log_prob_is_the_entropy() -> None:
    """E[log_prob, mean] = -(1 + ln 2 pi) / 2 - ln s."""
    torch.manual_seed(2)
    step = Gaussian(torch.zeros(400, 1000), torch.tensor(0.3))
    found = step.log_prob(step.sample(torch.randn(400, 1000))).mean()
    assert found == pytest.approx(-0.5 * (1 + math.log(2 * math.pi)) - math.log(0.3), abs=3e-3)


def test_deterministic_step_has_no_density() -> None:
    step = Gaussian(torch.zeros(2, 3), torch.tensor(0.0))
    with pytest.raises(ValueError, match="deterministic"):
        step.log_prob(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="positive std"):
        step.kl(step)


def test_ddim_eta_one_is_the_ddpm_posterior() -> None:
    """From Ho et al. 2020 eq. 7 on the strided chain."""
    torch.manual_seed(3)
    cumprod = torch.tensor([0.1, 0.45, 0.9], dtype=torch.float64)
    grid = Grid(torch.arange(2, -1, -1).double(), cumprod.sqrt(), (1 - cumprod).sqrt())
    x, eps = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    prediction = Prediction(eps, x, grid.alpha[0], grid.sigma[0], "epsilon")
    step = DDIM(1.0)(prediction, grid, 0)
    a_t, a_s = cumprod[0], cumprod[1]
    beta = 1 - a_t / a_s
    mean = a_s.sqrt() * beta / (1 - a_t) * prediction.x0 + (a_t / a_s).sqrt() * (1 - a_s) / (1 - a_t) * x
    torch.testing.assert_close(step.mean, mean)
    torch.testing.assert_close(step.std.square(), beta * (1 - a_s) / (1 - a_t))


def test_flow_without_noise_is_euler() -> None:
    """Without noise, and DDIM(0) on a flow grid, is the same step."""
    torch.manual_seed(4)
    x, velocity = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    grid = flow_grid(4)
    prediction = Prediction(velocity, x, grid.alpha[1], grid.sigma[1], "flow_prediction")
    euler = x - 0.25 * velocity
    for kernel in (FlowSDE(0.0), DDIM(0.0)):
        step = kernel(prediction, grid, 1)
        torch.testing.assert_close(step.mean, euler)
        assert step.std == 0


def test_flow_sde_is_the_paper_formula() -> None:
    """Flow-GRPO: mu = x (1 + s2 dt / 2t) + v (1 + s2 (1-t) / 2t) dt, std = s sqrt(-dt); 1 - t is 1 - t' at t = 1."""
    torch.manual_seed(5)
    x, v = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    grid = flow_grid(5)
    for i in range(5):
        t, s = float(grid.sigma[i]), float(grid.sigma[i + 1])
        dt, s2 = s - t, 0.7**2 * t / (1 - t if t < 1 else 1 - s)
        step = FlowSDE(0.7)(Prediction(v, x, grid.alpha[i], grid.sigma[i], "flow_prediction"), grid, i)
        expected = x * (1 + s2 * dt / (2 * t)) + v * (1 + s2 * (1 - t) / (2 * t)) * dt
        torch.testing.assert_close(step.mean, expected)
        assert float(step.std) == pytest.approx(math.sqrt(s2 * -dt))


def test_flow_sde_refuses_other_grids() -> None:
    cumprod = torch.tensor([0.1, 0.9])
    grid = Grid(torch.tensor([1.0, 0.0]), cumprod.sqrt(), (1 - cumprod).sqrt())
    prediction = Prediction(torch.zeros(1, 2), torch.zeros(1, 2), grid.alpha[0], grid.sigma[0], "epsilon")
    with pytest.raises(ValueError, match="rectified-flow"):
        FlowSDE()(prediction, grid, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("amount", [0.3, 0.8, 1.0])
def test_cps_is_the_paper_formula(kind: str, amount: float) -> None:
    """Flow-CPS: std = s sin(a pi / 2), mean = alpha_s x0 + sqrt(s^2 - std^2) eps."""
    x, raw = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).unbind()
    t = (
        torch.linspace(1, 0, 6, dtype=torch.float64)
        if kind == "flow_prediction"
        else torch.linspace(0.95, 0, 6).double()
    )
    grid = Grid(t, *coefficients(kind, t))
    for i in range(5):
        prediction = Prediction(raw, x, grid.alpha[i], grid.sigma[i], kind)
        step, s = DDIM(amount, schedule="cps")(prediction, grid, i), float(grid.sigma[i + 1])
        std = s * math.sin(amount * math.pi / 2)
        expected = float(grid.alpha[i + 1]) * prediction.x0 + math.sqrt(max(s**2 - std**2, 0)) * prediction.eps
        torch.testing.assert_close(step.mean, expected)
        assert float(step.std) == pytest.approx(std, abs=1e-15)
    assert step.std == 0  # into the data
    ode = DDIM(0.0)(prediction, grid, 4)
    assert torch.equal(DDIM(0.0, "cps")(prediction, grid, 4).mean, ode.mean)


def steps_drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States, velocities, and states that follow, of the authors' values."""
    generator = torch.Generator().manual_seed(6)
    x, v, y = torch.randn(3, 2, 3, 2, 2, dtype=torch.float64, generator=generator).unbind()
    return x, v, y


@pytest.mark.parametrize("i", range(5))
def test_cps_and_constant_sigma_are_the_authors_steps(i: int) -> None:
    """What Flow-CPS's and DanceGRPO's functions gave for the same states: goldens/make_objectives.py."""
    golden = json.loads(GOLDENS.read_text())["transitions"][i]
    (x, v, y), grid = steps_drawn(), flow_grid(5)
    prediction = Prediction(v, x, grid.alpha[i], grid.sigma[i], "flow_prediction")
    cps, dance = DDIM(0.8, "cps")(prediction, grid, i), FlowSDE(0.3, "constant")(prediction, grid, i)
    assert cps.mean.flatten().tolist() == pytest.approx(golden["cps"]["mean"], rel=1e-9)
    assert [float(cps.std)] * 2 == pytest.approx(golden["cps"]["std"], rel=1e-9)
    assert dance.mean.flatten().tolist() == pytest.approx(golden["dance"]["mean"], rel=1e-9)
    assert dance.log_prob(y).tolist() == pytest.approx(golden["dance"]["log_prob"], rel=1e-9)


def test_constant_sigma_is_dancegrpos_step() -> None:
    """fastvideo's train_grpo_flux: mu = x + dt (v - eta^2 / 2 score), score = -(x - (1 - t) x0) / t^2, std = eta
    sqrt(-dt)."""
    x, v = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).unbind()
    grid, eta = flow_grid(5), 0.3
    for i in range(5):
        t, dt = float(grid.sigma[i]), float(grid.sigma[i + 1] - grid.sigma[i])
        step = FlowSDE(eta, "constant")(Prediction(v, x, grid.alpha[i], grid.sigma[i], "flow_prediction"), grid, i)
        score = -(x - (1 - t) * (x - t * v)) / t**2
        torch.testing.assert_close(step.mean, x + dt * (v - 0.5 * eta**2 * score))
        assert float(step.std) == pytest.approx(eta * math.sqrt(-dt))


def test_what_a_kernel_says_of_itself_names_the_schedule_where_it_is_not_the_usual() -> None:
    assert (DDIM(1.0).settings(), repr(DDIM(1.0))) == ({"eta": 1.0}, "DDIM(eta=1.0)")
    assert repr(DDIM(0.8, "cps")) == "DDIM(eta=0.8, schedule='cps')"
    assert FlowSDE(0.3, "constant").settings() == {"noise": 0.3, "schedule": "constant"}
    assert FlowSDE(0.7).settings() == {"noise": 0.7}


def toy_end(kernel: Kernel, steps: int) -> torch.Tensor:
    """Where the sampler ends for x0 ~ N(1.5, 0.4^2) with its exact velocity."""
    mean, deviation = 1.5, 0.4
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(60_000, 1, dtype=torch.float64, generator=generator)
    grid = flow_grid(steps)
    for i in range(steps):
        t = grid.t[i]
        gain = (t - (1 - t) * deviation**2) / ((1 - t) ** 2 * deviation**2 + t**2)
        velocity = gain * (x - (1 - t) * mean) - mean
        step = kernel(Prediction(velocity, x, grid.alpha[i], grid.sigma[i], "flow_prediction"), grid, i)
        x = step.sample(torch.randn(x.shape, dtype=torch.float64, generator=generator))
    return x


@pytest.mark.parametrize(
    ("kernel", "steps", "std"),
    [
        (DDIM(0.0), 10, 0.340),
        pytest.param(DDIM(0.0), 1000, 0.400, marks=pytest.mark.slow),
        (FlowSDE(0.7), 10, 0.380),
        pytest.param(FlowSDE(0.7), 1000, 0.401, marks=pytest.mark.slow),
        pytest.param(FlowSDE(1.0), 1000, 0.399, marks=pytest.mark.slow),
        pytest.param(FlowSDE(0.5, "constant"), 1000, 0.400, marks=pytest.mark.slow),
    ],
)
def test_marginals_of_a_gaussian_toy(kernel: Kernel, steps: int, std: float) -> None:
    """The SDE keeps the marginal that the ODE has."""
    x = toy_end(kernel, steps)
    assert x.mean().item() == pytest.approx(1.5, abs=0.01)
    assert x.std().item() == pytest.approx(std, abs=0.006)


@pytest.mark.parametrize(("eta", "schedule"), [(-0.1, "ddim"), (-0.1, "cps"), (2.0, "cps")])
def test_a_stochasticity_that_means_nothing_is_refused(eta: float, schedule: Any) -> None:
    """The sine of Flow-CPS comes back to 0 at 2: noise that grows no more is none that was asked for."""
    with pytest.raises(ValueError, match="eta of schedule"):
        DDIM(eta, schedule)


@pytest.mark.parametrize(("steps", "std"), [(10, 0.277), pytest.param(300, 0.318, marks=pytest.mark.slow)])
def test_cps_keeps_no_marginal(steps: int, std: float) -> None:
    """With any number of steps the data comes out too narrow."""
    found = toy_end(DDIM(0.8, "cps"), steps).std().item()
    assert found == pytest.approx(std, abs=0.006)
    assert abs(found - 0.400) > 0.07


# steps of a training batch
@pytest.mark.parametrize("kernel", [DDIM(0.0), DDIM(1.0), DDIM(0.8, "cps"), FlowSDE(0.7), FlowSDE(0.3, "constant")])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_step_for_each_row_is_the_step_for_all(kernel: Kernel, kind: str) -> None:
    if isinstance(kernel, FlowSDE) and kind != "flow_prediction":
        pytest.skip("FlowSDE is for flows")
    torch.manual_seed(8)
    t = torch.linspace(0.98, 0.02, 6, dtype=torch.float64) if kind != "flow_prediction" else flow_grid(5).t
    grid = Grid(t, *coefficients(kind, t))
    steps = torch.tensor([4, 0, 2, 2, 1])
    x, raw, y = torch.randn(3, 5, 2, 3, dtype=torch.float64).unbind()
    mixed = kernel(Prediction(raw, x, grid.alpha[steps], grid.sigma[steps], kind), grid, steps)
    for row, i in enumerate(steps.tolist()):
        one = slice(row, row + 1)
        alone = kernel(Prediction(raw[one], x[one], grid.alpha[i], grid.sigma[i], kind), grid, i)
        assert torch.equal(mixed.mean[one], alone.mean)
        assert torch.equal(mixed.std[row], alone.std)
        if alone.std > 0:
            torch.testing.assert_close(
                Gaussian(mixed.mean[one], mixed.std[one]).log_prob(y[one]), alone.log_prob(y[one])
            )


def test_within_is_the_kernel_inside_and_deterministic_outside() -> None:
    x, velocity = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).unbind()
    grid, kernel = flow_grid(5), WindowedKernel(FlowSDE(0.7), range(1, 3))
    for i in range(5):
        prediction = Prediction(velocity, x, grid.alpha[i], grid.sigma[i], "flow_prediction")
        step, inside = kernel(prediction, grid, i), FlowSDE(0.7)(prediction, grid, i)
        if i in (1, 2):
            assert torch.equal(step.mean, inside.mean) and torch.equal(step.std, inside.std)
        else:
            torch.testing.assert_close(step.mean, x - 0.2 * velocity)
            assert step.std == 0
    with pytest.raises(TypeError, match="asks the kernel itself"):
        kernel(prediction, grid, torch.tensor([1, 2]))


# likelihood ratios
def test_kl_is_the_mean_log_ratio_of_samples() -> None:
    """By Monte Carlo, within three standard errors."""
    torch.manual_seed(10)
    mean, other = torch.randn(2, 1, 6, dtype=torch.float64).unbind()
    std = torch.tensor(0.8, dtype=torch.float64)
    ours, reference = (Gaussian(m.expand(40_000, 6), std) for m in (mean, other))
    x = ours.sample(torch.randn(40_000, 6, dtype=torch.float64))
    for reduction in ("mean", "sum"):
        ratios = ours.log_prob(x, reduction) - reference.log_prob(x, reduction)
        exact = ours.kl(reference, reduction)[0]
        assert abs(ratios.mean() - exact) < 3 * ratios.std() / 200


def test_the_mean_log_ratio_is_biased() -> None:
    """Why GRPO-Guard exists: E[ratio] = exp(-k (1 - 1/D)) with k the KL as a mean over D, not 1."""
    torch.manual_seed(11)
    size, k = 64, 0.3
    std = torch.tensor(0.5, dtype=torch.float64)
    shift = torch.full((1, size), math.sqrt(2 * k) * 0.5, dtype=torch.float64)
    old = Gaussian(torch.zeros(20_000, size, dtype=torch.float64), std)
    new = Gaussian(append_dims(torch.ones(20_000, dtype=torch.float64), old.mean) * shift, std)
    assert new.kl(old)[0] == pytest.approx(k)
    x = old.sample(torch.randn(20_000, size, dtype=torch.float64))
    ratio = (new.log_prob(x) - old.log_prob(x)).exp()
    assert ratio.mean() == pytest.approx(math.exp(-k * (1 - 1 / size)), abs=3 * float(ratio.std()) / math.sqrt(20_000))
    assert ratio.mean() < 0.76


def test_grid_refuses_unequal_vectors() -> None:
    with pytest.raises(ValueError, match="one length"):
        Grid(torch.zeros(3), torch.zeros(3), torch.zeros(2))
