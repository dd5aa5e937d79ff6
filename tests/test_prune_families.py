"""Blocks of the families beside SD3 and Stable Diffusion: gone, saved, read by stock diffusers, healed and in 4 bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from torch import Tensor

import pruning
from align import families
from align.common.errors import UserError
from align.families import Family
from pruning import compress
from pruning.graph import BlockGraph
from pruning.quantize import KEPT, choose
from tests import tiny_families

PRUNABLE = [
    name for name in tiny_families.BUILD if name not in ("chroma", "sdxl-turbo", "z-image-turbo", "flux2-klein")
]
FAST = ("flux-schnell", "qwen-image")  # of a UNet's blocks test_pruning_graph has more
SIBLINGS = ("sdxl-turbo", "flux-schnell", "z-image-turbo", "flux2-klein", "flux2-dev")  # of the same class as others
END_TO_END = ("flux-schnell", "sdxl", "qwen-image", "z-image")
PROMPTS = ("two red stars", "a star")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("families")
    return lambda name: root / name if (root / name).is_dir() else tiny_families.save(name, root / name)


def answer(family: Family) -> Tensor:
    x = torch.randn(2, *family.latent_shape(), generator=torch.Generator().manual_seed(3))
    t, cond = family.sample_timesteps(torch.tensor([0.2, 0.7])), family.encode(PROMPTS)
    with torch.no_grad():
        return family.forward(x, t, cond)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PRUNABLE]
)
def test_a_block_that_is_gone_is_one_that_is_skipped_and_stock_diffusers_reads_the_rest(
    name: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    family = families.load(str(folder(name)))
    graph, whole = BlockGraph.of(family.denoiser), answer(family)
    unit = graph.units()[0]
    with graph.skip(unit):
        skipped = answer(family)
    assert not torch.allclose(skipped, whole, atol=1e-4)
    with graph.tap([block.name for block in graph.blocks]) as features:
        answer(family)
    assert features.keys() == {block.name for block in graph.blocks}
    assert all(len(streams["hidden"]) == 2 for streams in features.values())
    small = graph.remove(unit)
    small.save_pretrained(tmp_path / "denoiser")
    loaded, info = type(small).from_pretrained(tmp_path / "denoiser", output_loading_info=True)
    assert {kind: list(keys) for kind, keys in info.items() if keys} == {}
    family.pipe.register_modules(**{family.denoiser_name: loaded.eval()})
    assert torch.equal(answer(family), skipped)


def test_chroma_is_refused_with_its_reason(folder: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="no block of a ChromaTransformer2DModel can go: its blocks find their modulat"):
        BlockGraph.of(families.load(str(folder("chroma"))).denoiser)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SIBLINGS else name for name in tiny_families.BUILD]
)
def test_what_stays_in_full_precision_is_there(name: str, folder: Callable[[str], Path]) -> None:
    """Every entry names a Linear, and no Linear outside the blocks is packed without one."""
    denoiser = families.load(str(folder(name))).denoiser
    kept = KEPT[type(denoiser).__name__]
    layers = choose(denoiser)
    if type(denoiser).__name__ not in ("UNet2DConditionModel", "FluxTransformer2DModel"):
        assert all(any(entry in layer.name for layer in layers) for entry in kept)
    outside = [
        layer.name
        for layer in layers
        if layer.kept is None and not any(part.isdigit() for part in layer.name.split("."))
    ]
    assert outside in ([], ["proj_out"])  # FLUX.1's last layer is packed, as it was before there were other families


@pytest.mark.slow
@pytest.mark.parametrize("name", END_TO_END)
def test_compress_end_to_end(name: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    teacher = {"teacher": {"path": "filled in"}, "plan_path": "filled in", "profile": "filled in"}
    sampler = {"num_inference_steps": 2, "guidance_scale": families.load(str(folder(name))).unguided_scale}
    heal: dict[str, Any] = {
        "objective": {"class_path": "pruning.distill.Heal", "init_args": teacher | {"sampler": sampler}},
        "data": {"class_path": "Prompts", "init_args": {"path": str(tmp_path / "prompts.txt")}},
        "lora": None, "rollout_batch_size": 2, "train_batch_size": 4, "max_train_steps": 2, "learning_rate": 1e-3,
        "report_to": "none",
    }  # fmt: skip
    (tmp_path / "heal.yaml").write_text(yaml.safe_dump(heal))
    report = {"prompts": str(tmp_path / "prompts.txt"), "reward": ["tests.helpers.Bright"], "repeats": 1}
    config = {
        "pretrained_model_name_or_path": str(folder(name)), "output_dir": str(tmp_path / "out"),
        "prompts": str(tmp_path / "prompts.txt"), "num_inference_steps": 2, "budget": {"parameters": 0.03},
        "heal": str(tmp_path / "heal.yaml"), "dtype": "float32",
        "report": report | {"num_inference_steps": 2, "memory": False},
    }  # fmt: skip
    (tmp_path / "compress.yaml").write_text(yaml.safe_dump(config))
    assert compress.main(["--config", str(tmp_path / "compress.yaml")]) == 0
    out = tmp_path / "out"
    shown = json.loads((out / "report.json").read_text())["pipelines"]
    assert list(shown) == ["original", "pruned", "healed", "int4-alone", "int4"]
    assert shown["original"]["parameters"] > shown["int4"]["parameters"] == shown["healed"]["parameters"]
    assert shown["int4"]["denoiser_bytes"] < shown["healed"]["denoiser_bytes"] < shown["original"]["denoiser_bytes"]
    ours = families.load(str(out / "healed"))
    stock = families.of(DiffusionPipeline.from_pretrained(out / "healed"), str(out / "healed"))
    assert torch.equal(answer(ours), answer(stock))
    assert answer(families.of(pruning.load(out / "int4"), str(out / "int4"))).isfinite().all()
