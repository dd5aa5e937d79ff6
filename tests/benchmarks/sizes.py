"""What the large models take on disk, whole and pruned, in bf16 and in NF4: counted on the meta device.

    python -m tests.benchmarks.sizes

builds SD3.5-large, FLUX.1-schnell and SDXL with their text encoders from their real configs, without a weight, and
prints a Markdown table. Every size is in decimal GB, of weights alone: no VAE, no activations.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from pruning.linear4bit import BLOCK, bytes_of
from pruning.nf4 import NF4
from pruning.quantize import choose

NF4_BITS = 4 + 32 / BLOCK  # a code, and its share of a float32 scale
DOUBLE_BITS = 4 + 8 / BLOCK + 32 / (256 * BLOCK)  # a code, its share of an 8-bit scale and of that scale's own

# library, class and config, as in the hub repository named
Architecture = tuple[Any, str, dict[str, Any]]
SD35_LARGE: Architecture = (  # stabilityai/stable-diffusion-3.5-large, transformer
    diffusers,
    "SD3Transformer2DModel",
    {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 38,
        "attention_head_dim": 64,
        "num_attention_heads": 38,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 2432,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
)
FLUX_SCHNELL: Architecture = (  # black-forest-labs/FLUX.1-schnell, transformer
    diffusers,
    "FluxTransformer2DModel",
    {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": False,
    },
)
SDXL: Architecture = (  # stabilityai/stable-diffusion-xl-base-1.0, unet
    diffusers,
    "UNet2DConditionModel",
    {
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
)
_CLIP_L = {  # openai/clip-vit-large-patch14, the text model
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
_CLIP_BIG_G = {  # laion/CLIP-ViT-bigG-14-laion2B-39B-b160k, the text model
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
_T5_XXL = {  # google/t5-v1_1-xxl, the encoder
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
CLIP_L = (transformers, "CLIPTextModel", _CLIP_L)  # in FLUX and SDXL, which do not use its projection
CLIP_L_PROJECTED = (transformers, "CLIPTextModelWithProjection", _CLIP_L)
CLIP_BIG_G = (transformers, "CLIPTextModelWithProjection", _CLIP_BIG_G)
T5_XXL = (transformers, "T5EncoderModel", _T5_XXL)

# HierarchicalPrune's 20 % plan for SD3.5-large; its 30 % plan also removes components of blocks 13 to 19, not said
# which: these bring the parameters to what it states. For FLUX it states only the size, and SDXL is not in it.
EIGHT_BLOCKS = tuple(f"transformer_blocks.{k}" for k in (25, 26, 27, 28, 31, 32, 33, 34))
COMPONENTS = tuple(f"transformer_blocks.{k}.{part}" for k in range(13, 20) for part in ("ff_context", "norm1_context"))
FLUX_THIRD = (
    *(f"transformer_blocks.{k}" for k in range(11, 17)),
    *(f"single_transformer_blocks.{k}" for k in range(24, 36)),
)
SDXL_QUARTER = tuple(
    f"{part}.attentions.{stack}.transformer_blocks.{k}"
    for part, stacks in (("down_blocks.2", 2), ("mid_block", 1), ("up_blocks.0", 3))
    for stack in range(stacks)
    for k in (6, 7, 8)
)


@dataclass(frozen=True)
class Row:
    """Sizes in bytes of one model or of several together.

    ``bf16``, ``nf4`` and ``nf4_double`` count every parameter at 16, 4.5 and 4.127 bits, biases and norms too, and no
    buffer: the arithmetic by which papers compare. ``file_*`` is what is written: Linears packed, with codebooks; what
    the skip list and the library keep, norms, embeddings, convolutions and position tables in bf16.
    """

    name: str
    parameters: int
    bf16: float
    nf4: float
    nf4_double: float
    file_bf16: float
    file_nf4: float
    file_nf4_double: float


def meta(model: Architecture, remove: Sequence[str] = ()) -> nn.Module:
    """The model without weights, in bf16 on the meta device, the modules ``remove`` replaced by nothing."""
    library, name, config = model
    cls = getattr(library, name)
    with torch.device("meta"):
        built = cls(**config) if library is diffusers else cls(cls.config_class(**config))
    for module in remove:
        built.set_submodule(module, nn.Identity())
    return nn.Module.to(built, torch.bfloat16)  # diffusers' own `to` would warn of a cast


def packed_bytes(weights: int, double_quant: bool = False) -> int:
    """Bytes of a Linear's packed weights: half a byte each, a 4-byte scale a block and the 64-byte codebook; with
    double quantisation a byte a scale, four bytes a 256 scales and a second codebook of 1024. Without the JSON of some
    hundred bytes that bitsandbytes writes beside each layer."""
    blocks = -(-weights // BLOCK)
    scales = blocks + 4 * -(-blocks // 256) + 1024 if double_quant else 4 * blocks
    return -(-weights // 2) + scales + 64


def row(name: str, model: nn.Module) -> Row:
    """Count a model of :func:`meta`."""
    parameters = sum(p.numel() for p in model.parameters())
    stored = bytes_of(model)
    done = [layer.weights for layer in choose(model, NF4()) if layer.kept is None]
    return Row(
        name,
        parameters,
        parameters * 2,
        parameters * NF4_BITS / 8,
        parameters * DOUBLE_BITS / 8,
        stored,
        stored + sum(packed_bytes(n) - 2 * n for n in done),
        stored + sum(packed_bytes(n, double_quant=True) - 2 * n for n in done),
    )


def together(name: str, rows: Sequence[Row]) -> Row:
    """Their sum."""
    return Row(name, *(sum(getattr(r, field.name) for r in rows) for field in fields(Row)[1:]))


def rows() -> list[Row]:
    """Every model whole and pruned, every text encoder, and the pipelines that they make."""
    sd3 = row("SD3.5-large transformer", meta(SD35_LARGE))
    sd3_small = row("− 8 of 38 blocks", meta(SD35_LARGE, EIGHT_BLOCKS))
    sd3_smaller = row("− 8 blocks, − components of 13–19", meta(SD35_LARGE, EIGHT_BLOCKS + COMPONENTS))
    flux = row("FLUX.1-schnell transformer", meta(FLUX_SCHNELL))
    flux_small = row("− 6 of 19 double, − 12 of 38 single blocks", meta(FLUX_SCHNELL, FLUX_THIRD))
    sdxl = row("SDXL U-Net", meta(SDXL))
    sdxl_small = row("− 18 of 70 transformer layers", meta(SDXL, SDXL_QUARTER))
    t5, big_g = row("T5-XXL encoder", meta(T5_XXL)), row("CLIP bigG text model", meta(CLIP_BIG_G))
    clip, clip_plain = row("CLIP L text model", meta(CLIP_L_PROJECTED)), row("CLIP L", meta(CLIP_L))
    return [
        sd3,
        sd3_small,
        sd3_smaller,
        flux,
        flux_small,
        sdxl,
        sdxl_small,
        t5,
        big_g,
        clip,
        together("SD3.5-large with its text encoders", [sd3, clip, big_g, t5]),
        together("− 8 of 38 blocks", [sd3_small, clip, big_g, t5]),
        together("− 8 of 38 blocks, without T5", [sd3_small, clip, big_g]),
        together("FLUX.1-schnell with its text encoders", [flux, clip_plain, t5]),
        together("− 6 double, − 12 single blocks", [flux_small, clip_plain, t5]),
        together("SDXL with its text encoders", [sdxl, clip_plain, big_g]),
        together("− 18 of 70 transformer layers", [sdxl_small, clip_plain, big_g]),
    ]


def table(found: Sequence[Row]) -> str:
    """Markdown, in GB of 10⁹ bytes."""
    lines = [
        "| | parameters | bf16 | NF4, 4.5 bits | double, 4.127 bits | file: bf16 | file: NF4 | file: double |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in found:
        sizes = (r.bf16, r.nf4, r.nf4_double, r.file_bf16, r.file_nf4, r.file_nf4_double)
        cells = (f"{size / 1e9:.2f}" for size in sizes)
        lines.append(f"| {r.name} | {r.parameters / 1e9:.2f} B | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(
        "tests.benchmarks.sizes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    print(table(rows()))
    print(f"\n{' '.join(str(Row.__doc__).split())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
