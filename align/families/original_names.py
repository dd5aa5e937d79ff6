"""What the networks' own programs call the layers that diffusers has renamed.

ComfyUI, A1111, kohya's trainers and single files use the names of the code that a network was published with. The
tables below go from there to diffusers: ``*`` is a number, and several diffusers names are the rows of one original
weight, one below the other. Sources: diffusers' ``single_file_utils.py`` and ``lora_conversion_utils.py`` (0.42), the
keys of kohya-ss/sd-scripts (48d368f) and kohya-ss/musubi-tuner (30c658c).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

Table = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Original:
    """One layer of the original network: diffusers' layers that are its rows, in order. Where it is ``swapped``, the
    original's (shift, scale) are diffusers' (scale, shift)."""

    name: str
    parts: tuple[str, ...]
    swapped: bool = False


def _block(original: str, ours: str, layers: Mapping[str, str | tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    named = {name: (parts,) if isinstance(parts, str) else parts for name, parts in layers.items()}
    return {f"{original}.{name}": tuple(f"{ours}.{part}" for part in parts) for name, parts in named.items()}


def _qkv(module: str) -> tuple[str, ...]:
    return tuple(f"{module}.to_{letter}" for letter in "qkv")


def _added(module: str) -> tuple[str, ...]:
    return tuple(f"{module}.add_{letter}_proj" for letter in "qkv")


def _embedder(original: str, ours: str, first: str, last: str) -> dict[str, tuple[str, ...]]:
    return {f"{original}.{first}": (f"{ours}.linear_1",), f"{original}.{last}": (f"{ours}.linear_2",)}


def _refined(layers: Mapping[str, str | tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The three stacks of Lumina's kind, all of the same blocks."""
    stacks = ("layers.*", "noise_refiner.*", "context_refiner.*")
    return {name: parts for stack in stacks for name, parts in _block(stack, stack, layers).items()}


FINAL = {"final_layer.linear": ("proj_out",), "final_layer.adaLN_modulation.1": ("norm_out.linear",)}
SD3 = {
    **_embedder("t_embedder.mlp", "time_text_embed.timestep_embedder", "0", "2"),
    **_embedder("y_embedder.mlp", "time_text_embed.text_embedder", "0", "2"),
    **_block(
        "joint_blocks.*.x_block",
        "transformer_blocks.*",
        {
            "attn.qkv": _qkv("attn"),
            "attn.proj": "attn.to_out.0",
            "attn.ln_q": "attn.norm_q",
            "attn.ln_k": "attn.norm_k",
            "attn2.qkv": _qkv("attn2"),
            "attn2.proj": "attn2.to_out.0",
            "attn2.ln_q": "attn2.norm_q",
            "attn2.ln_k": "attn2.norm_k",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "adaLN_modulation.1": "norm1.linear",
        },
    ),
    **_block(
        "joint_blocks.*.context_block",
        "transformer_blocks.*",
        {
            "attn.qkv": _added("attn"),
            "attn.proj": "attn.to_add_out",
            "attn.ln_q": "attn.norm_added_q",
            "attn.ln_k": "attn.norm_added_k",
            "mlp.fc1": "ff_context.net.0.proj",
            "mlp.fc2": "ff_context.net.2",
            "adaLN_modulation.1": "norm1_context.linear",
        },
    ),
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    **FINAL,
}
_FLUX_ATTENTION: dict[str, str | tuple[str, ...]] = {
    "img_attn.qkv": _qkv("attn"),
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.qkv": _added("attn"),
    "txt_attn.proj": "attn.to_add_out",
}
FLUX = {
    **_block(
        "double_blocks.*",
        "transformer_blocks.*",
        _FLUX_ATTENTION
        | {
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "img_mod.lin": "norm1.linear",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
            "txt_mod.lin": "norm1_context.linear",
        },
    ),
    **_block(
        "single_blocks.*",
        "single_transformer_blocks.*",
        {"linear1": (*_qkv("attn"), "proj_mlp"), "linear2": "proj_out", "modulation.lin": "norm.linear"},
    ),
    **_embedder("time_in", "time_text_embed.timestep_embedder", "in_layer", "out_layer"),
    **_embedder("vector_in", "time_text_embed.text_embedder", "in_layer", "out_layer"),
    **_embedder("guidance_in", "time_text_embed.guidance_embedder", "in_layer", "out_layer"),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    **FINAL,
}
_GUIDANCE = "distilled_guidance_layer"
CHROMA = {  # it has no modulation in its blocks
    **FLUX,
    **_embedder(f"{_GUIDANCE}.layers.*", f"{_GUIDANCE}.layers.*", "in_layer", "out_layer"),
    **{f"{_GUIDANCE}.{end}": (f"{_GUIDANCE}.{end}",) for end in ("in_proj", "out_proj")},
}
FLUX2 = {
    **_block(
        "double_blocks.*",
        "transformer_blocks.*",
        _FLUX_ATTENTION
        | {
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
    ),
    **_block(
        "single_blocks.*",
        "single_transformer_blocks.*",
        {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
    ),
    **_embedder("time_in", "time_guidance_embed.timestep_embedder", "in_layer", "out_layer"),
    **_embedder("guidance_in", "time_guidance_embed.guidance_embedder", "in_layer", "out_layer"),
    **{f"{name}.lin": (f"{name}.linear",) for name in ("double_stream_modulation_img", "double_stream_modulation_txt")},
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    **FINAL,
}
_NEXT: dict[str, str | tuple[str, ...]] = {
    "attention.qkv": _qkv("attn"),
    "attention.out": "attn.to_out.0",
    **{f"feed_forward.w{k}": f"feed_forward.linear_{k}" for k in (1, 2, 3)},
    "adaLN_modulation.1": "norm1.linear",
}
LUMINA2 = {
    **_refined(_NEXT),
    **_embedder("t_embedder.mlp", "time_caption_embed.timestep_embedder", "0", "2"),
    "cap_embedder.1": ("time_caption_embed.caption_embedder.1",),
    "x_embedder": ("x_embedder",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear_1",),
    "final_layer.linear": ("norm_out.linear_2",),
}
_Z: dict[str, str | tuple[str, ...]] = {
    "attention.qkv": _qkv("attention"),
    "attention.out": "attention.to_out.0",
    **{f"feed_forward.w{k}": f"feed_forward.w{k}" for k in (1, 2, 3)},
    "adaLN_modulation.0": "adaLN_modulation.0",
}
Z_IMAGE = {
    **_refined(_Z),
    "x_embedder": ("all_x_embedder.2-1",),
    "final_layer.linear": ("all_final_layer.2-1.linear",),
    "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
}
PIXART = _block(
    "blocks.*",
    "transformer_blocks.*",
    {
        "attn.qkv": _qkv("attn1"),
        "attn.proj": "attn1.to_out.0",
        "cross_attn.q_linear": "attn2.to_q",
        "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
        "cross_attn.proj": "attn2.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    },
)
TABLES: Mapping[str, Table] = {  # by the denoiser's class; others keep diffusers' names
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": FLUX,
    "ChromaTransformer2DModel": CHROMA,
    "Flux2Transformer2DModel": FLUX2,
    "Lumina2Transformer2DModel": LUMINA2,
    "ZImageTransformer2DModel": Z_IMAGE,
    "PixArtTransformer2DModel": PIXART,
}


def originals(network: nn.Module) -> list[Original]:
    """The original layers of which ``network``, a denoiser of diffusers, has renamed or split some; on any device."""
    kind, paths = type(network).__name__, [name for name, _ in network.named_modules()]
    if kind == "UNet2DConditionModel":
        return [Original(name, (path,)) for path in paths if (name := unet_name(path, network)) is not None]
    return [
        Original(name, parts, _swapped(network, parts[0]))
        for original, ours in TABLES.get(kind, {}).items()
        for name, parts in _expanded(original, ours, paths)
    ]


def _expanded(original: str, ours: tuple[str, ...], paths: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    pattern = re.compile(re.escape(ours[0]).replace(r"\*", r"(\d+)"))
    for path in paths:
        if (match := pattern.fullmatch(path)) is not None:
            number = match[1] if match.groups() else "*"
            yield original.replace("*", number), tuple(part.replace("*", number) for part in ours)


def _swapped(network: nn.Module, path: str) -> bool:
    """Of a layer in diffusers' AdaLayerNormContinuous, which reads (scale, shift), as no original does."""
    above, _, _ = path.rpartition(".")
    return type(network.get_submodule(above)).__name__ == "AdaLayerNormContinuous"


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_INNER = re.compile(r"(down|up|mid)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def unet_name(path: str, unet: nn.Module) -> str | None:
    """The original name of the layer ``path`` of a U-Net of Stable Diffusion 1, 2 or XL: CompVis' blocks count resnets
    and resamplings in one row. None of what is no layer, or of another kind of U-Net."""
    config: Any = unet.config
    match = _INNER.fullmatch(path)
    if match is None or not isinstance(per_block := config.layers_per_block, int):
        return _OUTER.get(path)
    where, block, kind, index, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    inner = rest if kind != "resnets" else _RESNET.get(rest)
    if inner is None:
        return None
    if where == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{inner}"
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (per_block + 1)}.0.op"
    if kind == "upsamplers":
        attends = "CrossAttn" in config.up_block_types[block]
        return f"output_blocks.{block * (per_block + 1) + per_block}.{2 if attends else 1}.conv"
    number = block * (per_block + 1) + index
    start = f"input_blocks.{number + 1}" if where == "down" else f"output_blocks.{number}"
    return f"{start}.{0 if kind == 'resnets' else 1}.{inner}"
