"""The denoisers of every family at their published sizes, on the meta device: no weight is made or read.

    python tests/benchmarks/full_size.py [--quick]

Configs are diffusers' own defaults but for what is named here; parameters are held against the number that the model's
authors give, to its last digit. LoRA is rank 16 on the family's default targets. 4 bit counts NF4 with blocks of 64 and
what :data:`pruning.quantize.KEPT` keeps in bfloat16; *pruned* has every fifth block gone. Text is what a caption takes
in a cache, in bfloat16, at the pipeline's most tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import diffusers
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import nn

import align.families  # noqa: F401  # before diffusers: it makes torchvision importable
from align.families.flux import Flux
from align.families.flux2 import Flux2
from align.families.sd3 import SD3
from align.families.sdxl import SDXL
from align.families.z_image import ZImage
from pruning.architectures import REFUSED
from pruning.graph import BlockGraph
from pruning.quantize import choose
from tests.benchmarks import record, sizes

RANK = 16
ATTENTION = ZImage.lora_targets


@dataclass(frozen=True)
class Model:
    """``published``: billions of parameters, as the authors write it. ``latent``: channels, and cells along the side at
    1024 pixels. ``text``: numbers that a caption takes."""

    cls: str
    published: str
    latent: tuple[int, int]
    text: int
    targets: Sequence[str] = ATTENTION
    config: dict[str, Any] = field(default_factory=dict)


KLEIN = {"guidance_embeds": False}
MODELS = {
    "SDXL": Model("UNet2DConditionModel", "2.57", (4, 128), 77 * 2048 + 1280, SDXL.lora_targets, sizes.SDXL[2]),
    "SD3.5 large": Model(
        "SD3Transformer2DModel", "8.1", (16, 128), 333 * 4096 + 2048, SD3.lora_targets,
        {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
         "qk_norm": "rms_norm"},
    ),
    "FLUX.1 dev": Model(
        "FluxTransformer2DModel", "12", (16, 128), 512 * 4096 + 768, Flux.lora_targets, {"guidance_embeds": True}
    ),
    "FLUX.2 klein 4B": Model(
        "Flux2Transformer2DModel", "4", (128, 64), 512 * 7680, Flux2.lora_targets,
        KLEIN | {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
    ),
    "FLUX.2 klein 9B": Model(
        "Flux2Transformer2DModel", "9", (128, 64), 512 * 12288, Flux2.lora_targets,
        KLEIN | {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
    ),
    "FLUX.2 dev": Model("Flux2Transformer2DModel", "32", (128, 64), 512 * 15360, Flux2.lora_targets),
    "Qwen-Image": Model("QwenImageTransformer2DModel", "20", (16, 128), 512 * 3584),
    "Z-Image": Model("ZImageTransformer2DModel", "6", (16, 128), 512 * 2560),
    "SANA 1.6B": Model("SanaTransformer2DModel", "1.6", (32, 32), 300 * 2304),
    "Chroma": Model("ChromaTransformer2DModel", "8.9", (16, 128), 512 * 4096),
    "Lumina-Image 2": Model("Lumina2Transformer2DModel", "2.6", (16, 128), 256 * 2304, config={"cap_feat_dim": 2304}),
    "PixArt-Sigma": Model(
        "PixArtTransformer2DModel", "0.6", (4, 128), 300 * 4096, (),
        {"caption_channels": 4096, "use_additional_conditions": False},
    ),
}  # fmt: skip


def lora_parameters(denoiser: ModelMixin, targets: Sequence[str]) -> int:
    def chosen(name: str) -> bool:
        single = name.startswith("single_transformer_blocks.") and name.endswith(".attn.to_out")  # FLUX.2's, in full
        return single or any(name == target or name.endswith(f".{target}") for target in targets)

    linears = (m for name, m in denoiser.named_modules() if isinstance(m, nn.Linear) and targets and chosen(name))
    return sum(RANK * (linear.in_features + linear.out_features) for linear in linears)


def fifth(denoiser: ModelMixin) -> int | None:
    """Parameters without every fifth block; None where no block can go, or none by itself."""
    if type(denoiser).__name__ in (*REFUSED, "UNet2DConditionModel"):
        return None
    graph = BlockGraph.of(denoiser)
    return graph.parameters(block.name for block in graph.blocks[1:-1][::5])


def measure(model: Model) -> dict[str, Any]:
    with init_empty_weights():
        denoiser = getattr(diffusers, model.cls)(**model.config)
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    digits = len(model.published.partition(".")[2])
    packed = sum(layer.weights for layer in choose(denoiser) if layer.kept is None)
    channels, cells = model.latent
    pruned = fifth(denoiser)
    return {
        "class": model.cls,
        "parameters": count,
        "published_billions": model.published,
        "agrees": f"{count / 1e9:.{digits}f}" == model.published,
        "lora_parameters": lora_parameters(denoiser, model.targets),
        "latent": [channels, cells, cells],
        "latent_numbers": channels * cells**2,
        "text_bytes": 2 * model.text,
        "bf16_bytes": 2 * count,
        "nf4_bytes": 2 * (count - packed) + packed // 2 + 4 * packed // 64,
        "pruned_parameters": pruned,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the two smallest, and nothing is written")
    arguments = parser.parse_args(argv)
    names = ["SANA 1.6B", "PixArt-Sigma"] if arguments.quick else list(MODELS)
    found = {name: measure(MODELS[name]) for name in names}
    record("full_size", {"models": found}, arguments.quick)
    print(json.dumps({name: [entry["parameters"], entry["agrees"]] for name, entry in found.items()}))


if __name__ == "__main__":
    main()
