"""LPIPS: how far apart two pictures look (Zhang et al. 2018, arXiv 1801.03924), version 0.1. A distance, no reward.

The weights are published in two parts, a trunk trained on ImageNet and heads fitted to people's judgements, which
``tests/benchmarks/convert_weights.py lpips`` joins into the one file that is read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards import RewardError
from rewards.models.network import loading, read_weights
from rewards.models.preprocess import normalise

FILE = "lpips.safetensors"
# of pictures in [-1, 1], as published: x becomes (x - SHIFT) / SCALE
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@dataclass(frozen=True)
class Trunk:
    """The convolutions of a published network, up to the last layer that LPIPS looks at.

    ``channels`` and ``kernels`` of each; the first has ``stride``; a maximum over ``pool`` pixels, two apart, goes
    before each that is ``pooled``; the rectified output of those ``seen`` is compared. Of a picture with a side under
    ``smallest`` pixels, nothing is left in the last of them.
    """

    channels: tuple[int, ...]
    kernels: tuple[int, ...]
    stride: int
    pool: int
    pooled: tuple[int, ...]
    seen: tuple[int, ...]
    smallest: int


TRUNKS = {
    "AlexNet": Trunk((64, 192, 384, 256, 256), (11, 5, 3, 3, 3), 4, 3, (1, 2), (0, 1, 2, 3, 4), 31),
    "VGG-16": Trunk(
        (64,) * 2 + (128,) * 2 + (256,) * 3 + (512,) * 6, (3,) * 13, 1, 2, (2, 4, 7, 10), (1, 3, 6, 9, 12), 16
    ),
}


class LPIPS(nn.Module):
    """The distance. Weights of AlexNet's heads and trunk are what the field means by LPIPS; VGG-16's is another scale.

    Frozen and float32. Differentiable with respect to the pictures. Range: 0 for equal pictures, seldom above 1.
    """

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.plan = trunk
        inputs = (3, *trunk.channels[:-1])
        self.trunk = nn.ModuleList(
            nn.Conv2d(i, o, k, stride=trunk.stride if number == 0 else 1, padding=min(k // 2, 2))
            for number, (i, o, k) in enumerate(zip(inputs, trunk.channels, trunk.kernels, strict=True))
        )
        self.heads = nn.ParameterList(torch.zeros(trunk.channels[number]) for number in trunk.seen)
        self.eval().requires_grad_(False)

    def embed(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, D), such that the squared distance of two rows is LPIPS; D grows with H W.

        ``RewardError`` where the pictures are too small for the trunk.
        """
        if min(images.shape[-2:]) < self.plan.smallest:
            raise RewardError(
                f"LPIPS got pictures of {images.shape[-2]} x {images.shape[-1]} pixels; expected at least "
                f"{self.plan.smallest} a side for this trunk: enlarge them"
            )
        # a training loop's autocast must not change what a distance is
        with torch.autocast(images.device.type, enabled=False):
            images = images.to(torch.promote_types(images.dtype, torch.float32))
            x = normalise(2 * images - 1, SHIFT, SCALE)
            features: list[Tensor] = []
            for number, layer in enumerate(self.trunk):
                if number in self.plan.pooled:
                    x = F.max_pool2d(x, self.plan.pool, 2)
                x = layer(x).relu()
                if number in self.plan.seen:
                    unit = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)  # at each place
                    weight = self.heads[len(features)] / x[0, 0].numel()  # a sum over channels, a mean over places
                    features.append((unit * weight.sqrt().view(-1, 1, 1)).flatten(1))
            return torch.cat(features, 1)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """The distance of each image from the other in its place: two of (N, 3, H, W) in [0, 1] -> (N,)."""
        return (self.embed(images) - self.embed(others)).square().sum(1)


def load(source: str, device: torch.device | str = "cpu") -> LPIPS:
    """From the file that ``tests/benchmarks/convert_weights.py lpips`` writes, or a folder or hub repository that holds
    it as ``lpips.safetensors``.

    ``RewardError`` where it cannot be found or is another file.
    """
    with loading("LPIPS", source):
        return built(read_weights(source, FILE)).to(device)


def built(weights: Mapping[str, Tensor]) -> LPIPS:
    """The network whose weights these are: ``trunk.K.weight``, ``trunk.K.bias`` and ``heads.K``."""
    count = sum(name.startswith("trunk.") for name in weights) // 2
    trunk = next((one for one in TRUNKS.values() if len(one.channels) == count), None)
    if trunk is None:
        raise ValueError(f"it has {count} convolutions, AlexNet 5 and VGG-16 13")
    network = LPIPS(trunk)
    network.load_state_dict(weights)
    if any(bool((head < 0).any()) for head in network.heads):
        raise ValueError("a head has weights below 0, so it measures no distance")
    return network
