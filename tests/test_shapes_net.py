"""The embedded differentiable reward: the contract, its gradient, and that it says what the exact reward says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import rewards
from align.shapes import world
from rewards import Reward, RewardError
from rewards.models.shapes import Shapes
from rewards.models.shapes_net import WEIGHTS, ShapesNet

SCENES = 72


@pytest.fixture(scope="module")
def net() -> ShapesNet:
    reward = rewards.load("ShapesNet", {"device": "cpu"})
    assert isinstance(reward, ShapesNet) and isinstance(reward, Reward)
    return reward


@pytest.fixture(scope="module")
def scenes() -> tuple[Tensor, list[str]]:
    """Pictures of captions in equal shares of the tasks; no training saw these."""
    rng = np.random.default_rng(4321)
    texts = [world.caption(rng, world.TASKS[k % len(world.TASKS)]) for k in range(SCENES)]
    pixels = np.stack([world.render(rng, text) for text in texts])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, texts


def test_it_is_small_differentiable_and_reads_the_prompt(net: ShapesNet) -> None:
    assert WEIGHTS.stat().st_size < 2e6
    assert net.differentiable and net.needs_prompt
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_it_agrees_with_the_exact_reward(net: ShapesNet, scenes: tuple[Tensor, list[str]]) -> None:
    """On true captions and on those of other scenes, which it tells apart."""
    images, texts = scenes
    others = texts[7:] + texts[:7]
    both = torch.cat([images, images]), texts + others
    exact = Shapes().score(images=both[0], prompts=both[1])
    scores = net.score(images=both[0], prompts=both[1])
    assert scores.shape == exact.shape and scores.dtype == torch.float32 and bool(((scores >= 0) & (scores <= 1)).all())
    assert np.corrcoef(scores, exact)[0, 1] > 0.95
    assert (scores[:SCENES] > scores[SCENES:]).float().mean() > 0.97


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_is_that_of_the_score(scenes: tuple[Tensor, list[str]], temperature: float) -> None:
    """Against a central difference in float64, and not nothing for any image."""
    reward = ShapesNet(device="cpu", temperature=temperature).double()
    images, texts = scenes[0][:6].double() * 0.9 + 0.05, scenes[1][:6]
    images.requires_grad_()
    total = reward(images, texts).sum()
    (grad,) = torch.autograd.grad(total, images)
    assert bool(grad.flatten(1).any(1).all())
    way = torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        numeric = (reward(images + 1e-6 * way, texts).sum() - reward(images - 1e-6 * way, texts).sum()) / 2e-6
    assert (grad * way).sum().item() == pytest.approx(numeric.item(), rel=1e-4)


def test_a_soft_eye_sees_less(net: ShapesNet, scenes: tuple[Tensor, list[str]]) -> None:
    """It is the eye's logits that are divided, and the score that agrees less."""
    images, texts = scenes
    soft = ShapesNet(device="cpu", temperature=4.0)
    for one, other in zip(soft.named(images[:2]), net.named(images[:2]), strict=True):
        assert one.equal(other)
    both = {"images": torch.cat([images, images]), "prompts": texts + texts[7:] + texts[:7]}
    exact = Shapes().score(**both)
    hard, less = (np.corrcoef(one.score(**both), exact)[0, 1] for one in (net, soft))
    assert 0.3 < less < hard - 0.05, less
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RewardError, match="temperature is .*; expected a number above 0"):
            ShapesNet(temperature=wrong)


def test_an_image_scores_the_same_alone_and_at_another_size(net: ShapesNet, scenes: tuple[Tensor, list[str]]) -> None:
    images, texts = scenes[0][:12], scenes[1][:12]
    together = net.score(images=images, prompts=texts)
    alone = torch.cat([net.score(images=images[k : k + 1], prompts=texts[k : k + 1]) for k in range(12)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    larger = torch.nn.functional.interpolate(images, (128, 128), mode="nearest")
    difference = (net.score(images=larger, prompts=texts) - together).abs()
    assert difference.mean() < 0.02 and difference.max() < 0.1


def test_captions_are_read_by_the_grammar(net: ShapesNet, scenes: tuple[Tensor, list[str]]) -> None:
    """However it leads and is spaced; another prompt is refused by its row."""
    images = scenes[0][:1].expand(2, -1, -1, -1)
    first, second = net.score(images=images, prompts=["a photo of  Three red stars", "three red stars"])
    assert first == second
    with pytest.raises(RewardError, match="ShapesNet: row 1: not a caption of the embedded world: 'a dog'"):
        net.score(images=images, prompts=["a star", "a dog"])


def test_weights_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="ShapesNet: .* holds no checkpoint that fits"):
        rewards.load("ShapesNet", {"weights": str(tmp_path)})
