"""A whole pipeline in one file, by the names of the original programs: Stable Diffusion 1, 2, XL, 3 and 3.5.

The way back from what diffusers' ``from_single_file`` does (``single_file_utils.py``), and what ComfyUI and A1111 read
as a checkpoint::

    model.diffusion_model.…             the denoiser (:mod:`original_names`; of SD3 q, k and v in one weight)
    first_stage_model.…                 the autoencoder
    cond_stage_model.…                  the text encoder of SD 1 (CLIP) and 2 (OpenCLIP)
    conditioner.embedders.0|1.…         those of XL
    text_encoders.clip_l|clip_g|t5xxl.… those of 3
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from align.common.errors import UserError
from align.families.original_names import originals

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

State = dict[str, Tensor]
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline")


def require_single_file(pipeline: str) -> None:
    """Raise :class:`UserError` for a class of pipelines that has no single file here."""
    if pipeline not in PIPELINES:
        raise UserError(
            f"a {pipeline} has no single file here; take --to diffusers --merge, whose transformer ComfyUI loads as a "
            "diffusion model where it knows the network"
        )


def checkpoint(pipe: DiffusionPipeline) -> State:
    """The tensors of ``pipe`` by the original's names, in their own precision. Raises :class:`UserError` where a part
    has layers that the original has not, or where readers would take one text encoder for the other."""
    require_single_file(type(pipe).__name__)
    parts: dict[str, Any] = pipe.components
    third = "transformer" in parts
    state = _prefixed("model.diffusion_model.", denoiser_state(parts["transformer" if third else "unet"]))
    state |= _prefixed("first_stage_model.", vae_state(parts["vae"]))
    first, second = parts["text_encoder"], parts["text_encoder_2" if "text_encoder_2" in parts else "text_encoder"]
    if second is not first and first.config.hidden_size == second.config.hidden_size:
        raise UserError(
            f"both text encoders are {first.config.hidden_size} wide, and readers of a single file tell them by their "
            "width; take --to diffusers --merge"
        )
    if third:
        projection = first.text_projection.weight
        if not torch.equal(projection, torch.eye(len(projection)).to(projection)):
            raise UserError(
                "readers of SD3's single file put the identity in the place of the first text encoder's projection, "
                "which here is another; take --to diffusers --merge"
            )
        state |= _prefixed("text_encoders.clip_l.transformer.", _clip(first))
        state |= _prefixed("text_encoders.clip_g.transformer.", _clip(second))
        if (t5 := parts.get("text_encoder_3")) is not None:
            # its embedding twice, as readers look for both names
            state |= _prefixed("text_encoders.t5xxl.transformer.", {k: v.clone() for k, v in t5.state_dict().items()})
    elif second is not first:
        state |= _prefixed("conditioner.embedders.0.transformer.", _clip(first))
        state |= _prefixed("conditioner.embedders.1.model.", open_clip_state(second))
        if pipe.scheduler.config.prediction_type == "v_prediction":
            state["v_pred"] = torch.zeros(0)  # by which ComfyUI knows it; SD 2's it knows by its weights
    elif first.config.hidden_act == "quick_gelu":  # as the readers take a CLIP for OpenAI's
        state |= _prefixed("cond_stage_model.transformer.", _clip(first))
    else:
        state |= _prefixed("cond_stage_model.model.", open_clip_state(first))
    return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def denoiser_state(network: nn.Module) -> State:
    """The weights of a U-Net or of SD3's transformer by their original names. Raises :class:`UserError`."""
    ours, found = network.state_dict(), {}
    for original in originals(network):
        for end in ("weight", "bias"):
            keys = [f"{part}.{end}" for part in original.parts]
            if keys[0] in ours:
                tensors = [ours.pop(key) for key in keys]
                if original.swapped:  # diffusers' (scale, shift) are the original's (shift, scale)
                    tensors = list(reversed(tensors[0].chunk(2)))
                found[f"{original.name}.{end}"] = torch.cat(tensors)
    if "pos_embed.pos_embed" in ours:
        found["pos_embed"] = ours.pop("pos_embed.pos_embed")
    if ours:
        raise UserError(
            f"{len(ours)} tensors of this {type(network).__name__} have no place in a single file, for example "
            f"{next(iter(ours))}; take --to diffusers --merge"
        )
    return found


_VAE = (
    (r"^(en|de)coder\.mid_block\.resnets\.(\d+)\.", lambda m: f"{m[1]}coder.mid.block_{int(m[2]) + 1}."),
    (r"^(en|de)coder\.mid_block\.attentions\.0\.", lambda m: f"{m[1]}coder.mid.attn_1."),
    (r"^encoder\.down_blocks\.(\d+)\.resnets\.", lambda m: f"encoder.down.{m[1]}.block."),
    (r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", lambda m: f"encoder.down.{m[1]}.downsample."),
    (r"\.conv_shortcut\.", lambda m: ".nin_shortcut."),
    (r"\.conv_norm_out\.", lambda m: ".norm_out."),
    (r"(attn_1)\.group_norm\.", lambda m: f"{m[1]}.norm."),
    (r"(attn_1)\.to_([qkv])\.", lambda m: f"{m[1]}.{m[2]}."),
    (r"(attn_1)\.to_out\.0\.", lambda m: f"{m[1]}.proj_out."),
)


def vae_state(vae: nn.Module) -> State:
    """The weights of an AutoencoderKL by their original names; its decoder counts blocks from the picture."""
    if type(vae).__name__ != "AutoencoderKL":
        raise UserError(f"a single file holds an AutoencoderKL, and this pipeline has a {type(vae).__name__}")
    state = vae.state_dict()
    last = len(vae.decoder.up_blocks) - 1  # type: ignore[union-attr,arg-type]
    rules: list[tuple[str, Callable[[re.Match[str]], str]]] = [
        *_VAE,
        (r"^decoder\.up_blocks\.(\d+)\.resnets\.", lambda m: f"decoder.up.{last - int(m[1])}.block."),
        (r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"decoder.up.{last - int(m[1])}.upsample."),
    ]
    found = {}
    for key, tensor in state.items():
        name = key
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        convolved = re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", name)  # 1 by 1 convolutions there, Linears here
        found[name] = tensor[:, :, None, None] if convolved and tensor.ndim == 2 else tensor
    return found


def _clip(encoder: nn.Module) -> State:
    """A CLIP of transformers by the names it had before 5.6 took ``text_model`` away from some classes."""
    state = {key: tensor for key, tensor in encoder.state_dict().items() if not key.endswith("position_ids")}
    whole = ("text_model.", "text_projection.")
    return {key if key.startswith(whole) else f"text_model.{key}": tensor for key, tensor in state.items()}


_OPEN_CLIP = (
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    (".self_attn.out_proj.", ".attn.out_proj."),
)


def open_clip_state(encoder: nn.Module) -> State:
    """A CLIP of transformers by OpenCLIP's names, with q, k and v in one weight and the projection transposed."""
    state, found = _clip(encoder), {}
    for key in list(state):
        name = key
        for old, new in _OPEN_CLIP:
            name = name.replace(old, new)
        block, attention, rest = name.partition(".self_attn.")
        if not attention:
            found[name] = state[key]
        elif rest.startswith("q_proj."):
            end = rest.removeprefix("q_proj.")
            parts = [state[key.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            found[f"{block}.attn.in_proj_{end}"] = torch.cat(parts)
    if (projection := found.pop("text_projection.weight", None)) is not None:
        found["text_projection"] = projection.T
    return found
