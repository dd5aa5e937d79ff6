"""Neither a sampler's step nor a loss waits for a GPU.

The tensors that a GPU would have are on the meta device, which has no values: whoever asks for one fails, where a GPU
would make it wait, and so does a copy to it that waits for what is queued there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from align.data.preferences import PairBatch
from align.diffusion.kernels import DDIM, FlowSDE, Gaussian, Kernel
from align.diffusion.process import Grid, Prediction, upload
from align.families import Conditioning
from align.objectives import DPO, Context, PolicyGradient
from align.objectives.policy_gradient import PolicyGradientRows
from align.policy.policy import LoRA, Policy
from align.sampling.loop import sample
from align.sampling.sampler import Sampler
from align.sampling.trajectory import Trajectories

if TYPE_CHECKING:
    from tests.pipelines import Build


class NoWaits(TorchDispatchMode):
    """Raises at a copy from the CPU to the meta device that is not asynchronous, or back."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and isinstance(result, Tensor):
            source = args[0].device.type
            if source != result.device.type:
                assert source == "cpu" and kwargs.get("non_blocking"), f"{source} to {result.device}: waits"
        return result


def flow_grid() -> Grid:
    sigma = torch.linspace(1, 0, 5)
    return Grid(1000 * sigma, 1 - sigma, sigma)


def vp_grid() -> Grid:
    cumprod = torch.linspace(0.1, 0.99, 5)
    return Grid(torch.linspace(900, 1, 5), cumprod.sqrt(), (1 - cumprod).sqrt())


@pytest.mark.parametrize(
    ("kernel", "grid"), [(DDIM(1.0), vp_grid()), (FlowSDE(), flow_grid()), (DDIM(), flow_grid())], ids=repr
)
def test_the_reverse_loop_asks_for_no_value(kernel: Kernel, grid: Grid) -> None:
    kept: list[Tensor] = []

    def predict(x: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float) -> Prediction:
        alpha, sigma = t / 1000, 1 - t / 1000
        return Prediction(torch.empty_like(x), x, alpha, sigma, "flow_prediction")

    def remember(i: int, x: Tensor, step: Gaussian, y: Tensor) -> None:
        kept.extend([step.log_prob(y), step.kl(step)])

    start = torch.empty(2, 4, 8, 8, device="meta")
    with NoWaits():
        found = sample(predict, grid, Conditioning({}), start, 1.0, kernel, lambda i: torch.randn(2, 4, 8, 8), remember)
    assert found.device.type == "meta" and len(kept) == 2 * len(grid)


def on_meta(build: Build, kind: str) -> Policy:
    policy = Policy(build(kind), LoRA(rank=2))
    policy.family._uncond = policy.family.uncond.to("meta")
    for part in policy.family.pipe.components.values():
        if isinstance(part, nn.Module):
            part.to("meta")
    return policy


def captions(policy: Policy, count: int) -> Conditioning:
    """Zeros, as a cache gives them: on the CPU."""
    found = policy.family.uncond.expand(count)
    return Conditioning({name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in found.tensors.items()})


@pytest.mark.parametrize("kind", ["epsilon", pytest.param("flow", marks=pytest.mark.slow)])
def test_a_dpo_update_asks_for_no_value(tiny: Build, kind: str) -> None:
    policy = on_meta(tiny, kind)
    family, objective = policy.family, DPO(beta=100.0)
    batch = PairBatch(torch.randn(3, 2, *family.latent_shape()), captions(policy, 3), ["a"] * 3, [0, 1, 2])
    ctx = Context(policy, 0, 0, range(3))
    with NoWaits():
        rows = objective.rollout(ctx, batch)
        loss, metrics = objective.loss(ctx, rows)
        loss.backward()
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in policy.parameters())
    assert {value.device.type for value in metrics.values()} == {"meta"}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("flow", {"step_normalisation": "guard"}),
        pytest.param("epsilon", {"beta": 0.1}, marks=pytest.mark.slow),
        pytest.param("flow", {"beta": 0.1}, marks=pytest.mark.slow),
        pytest.param("epsilon", {"step_normalisation": "guard"}, marks=pytest.mark.slow),
    ],
)
def test_a_policy_gradient_update_asks_for_no_value(tiny: Build, kind: str, settings: dict[str, Any]) -> None:
    policy = on_meta(tiny, kind)
    shape, steps = policy.family.latent_shape(), 2
    objective = PolicyGradient(Sampler(num_inference_steps=4, guidance_scale=2.0), images_per_prompt=2, **settings)
    kept = torch.arange(steps)
    trajectories = Trajectories(
        latents=torch.empty(4, steps + 1, *shape, device="meta"),
        kept_steps=kept,
        prompt_index=torch.tensor([0, 0, 1, 1]),
        cond=captions(policy, 2).to("meta"),
        log_probs=torch.empty(4, steps, device="meta"),
        means=torch.empty(4, steps, *shape, device="meta"),
    )
    rows = PolicyGradientRows(
        image=torch.arange(4).repeat_interleave(steps),
        step=kept.repeat(4),
        trajectories=trajectories,
        advantage=torch.randn(4),
    )
    checks: list[Callable[[], object]] = []
    ctx = Context(policy, 0, 0, range(4), on_policy=True, checks=checks)
    with NoWaits():
        loss, metrics = objective.loss(ctx, rows)
        loss.backward()
    assert {value.device.type for value in metrics.values()} == {"meta"}
    assert len(checks) == 1  # what has to wait does so once an update, when all rows have passed


def test_what_the_mode_is_for_fails_in_it() -> None:
    x = torch.empty(2, device="meta")
    with NoWaits(), pytest.raises(RuntimeError, match="meta"):
        bool((x > 0).any())
    with NoWaits(), pytest.raises(AssertionError, match="waits"):
        torch.ones(2).to("meta")
    with NoWaits():
        assert upload(torch.ones(2), "meta").device.type == "meta"
