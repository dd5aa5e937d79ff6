"""LoRA files as other programs read them: names of layers, where alpha is, and what the header says.

| form | keys | alpha | read by |
|---|---|---|---|
| diffusers | ``transformer.….to_q.lora_A.weight`` | in B: it is the rank | diffusers, SD.Next, ComfyUI's networks |
| kohya | ``lora_unet_….lora_down.weight`` | a tensor ``….alpha`` | ComfyUI, A1111, Forge, kohya's trainers |

ComfyUI knows diffusers' names of most transformers (``comfy/lora.py``), and looks for ``….alpha`` alone: without one
alpha is the rank, whatever the header says. Of U-Nets and Lumina 2 it knows kohya's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from align.common.errors import UserError
from align.families.lora_file import LoRAFile
from align.families.lora_layers import LoRALayer, fuse, swapped
from align.families.original_names import Original, originals
from rewards.common.files import atomic

Target = Literal["diffusers", "comfyui", "kohya"]
Names = Literal["diffusers", "original"]


@dataclass(frozen=True)
class Readers:
    """Who reads LoRAs of a network, and by which names; None where a program does not have the network."""

    comfyui: Literal["diffusers", "kohya"] | None
    kohya: Names | None = None  # behind ``lora_unet_``
    module: str = ""  # kohya's ``network_module``; sd-scripts', of FLUX.2, Qwen-Image and Z-Image musubi-tuner's
    version: str = ""  # ``ss_base_model_version``
    architecture: str = ""  # ``modelspec.architecture``


READERS = {
    "ChromaTransformer2DModel": Readers("diffusers", "original", "networks.lora_flux", "chroma", "chroma"),
    "Lumina2Transformer2DModel": Readers("kohya", "original", "networks.lora_lumina", "lumina2", "lumina-2"),
    "QwenImageTransformer2DModel": Readers(
        "diffusers", "diffusers", "networks.lora_qwen_image", "qwen_image", "Qwen-Image"
    ),
    "ZImageTransformer2DModel": Readers("diffusers", "diffusers", "networks.lora_zimage", "z_image", "Z-Image"),
    "PixArtTransformer2DModel": Readers("diffusers"),
    "SanaTransformer2DModel": Readers(None),
}


def readers(network: nn.Module, v_prediction: bool = False) -> Readers:
    """Who reads LoRAs of ``network``, a denoiser of diffusers. Raises :class:`UserError` for one that nobody does."""
    kind = type(network).__name__
    config: Any = network.config
    if kind == "UNet2DConditionModel":
        if config.addition_embed_type == "text_time":
            return Readers("kohya", "original", "networks.lora", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base")
        second = config.cross_attention_dim == 1024
        architecture = f"stable-diffusion-v2-{'768-v' if v_prediction else '512'}" if second else "stable-diffusion-v1"
        return Readers("kohya", "diffusers", "networks.lora", "sd_v2" if second else "sd_v1", architecture)
    if kind == "SD3Transformer2DModel":
        size = "medium" if not config.qk_norm else "5-medium" if config.dual_attention_layers else "5-large"
        return Readers("diffusers", "original", "networks.lora_sd3", size, f"stable-diffusion-3-{size}")
    if kind == "FluxTransformer2DModel":
        architecture = "flux-1-dev" if config.guidance_embeds else "flux-1-schnell"
        return Readers("diffusers", "original", "networks.lora_flux", "flux1", architecture)
    if kind == "Flux2Transformer2DModel":
        klein = "4b" if config.num_attention_heads < 32 else "9b"
        name = "dev" if config.guidance_embeds else f"klein-{klein}"
        version = f"flux_2_{name.replace('-', '_')}"
        return Readers("diffusers", "original", "networks.lora_flux_2", version, f"Flux.2-{name}")
    if kind not in READERS:
        raise UserError(f"no program is known here that reads LoRAs of a {kind}; take --to diffusers")
    return READERS[kind]


def tensors_for(target: Target, file: LoRAFile, modules: Mapping[str, nn.Module], denoiser: str) -> dict[str, Tensor]:
    """The tensors of ``file`` as ``target`` reads them; ``modules`` of the pipeline may be on the meta device. Raises
    :class:`UserError` where the program does not have the network, or a layer has no name there."""
    if target == "diffusers":
        return file.state_dict()
    known = readers(modules[denoiser])
    if (known.comfyui if target == "comfyui" else known.kohya) is None:
        program = "ComfyUI" if target == "comfyui" else "kohya's trainers"
        raise UserError(f"{program} knows no {type(modules[denoiser]).__name__}; take --to diffusers, which reads it")
    state: dict[str, Tensor] = {}
    for component in sorted({name.partition(".")[0] for name in file.layers}):
        layers = file.of(component)
        if component != denoiser:
            state |= _kohya({_encoder(component, name, modules): layer for name, layer in layers.items()})
        elif target == "comfyui" and known.comfyui == "diffusers":
            state |= LoRAFile(file.path, {f"{component}.{name}": layer for name, layer in layers.items()}).state_dict()
        elif known.kohya == "diffusers":
            state |= _kohya({f"lora_unet_{name}": layer for name, layer in layers.items()})
        else:
            state |= _kohya({f"lora_unet_{k}": v for k, v in by_original_names(layers, modules[component]).items()})
    return state


def by_original_names(layers: Mapping[str, LoRALayer], network: nn.Module) -> dict[str, LoRALayer]:
    """The layers of ``network`` by the original's names, fused where the original has one weight. Raises
    :class:`UserError` for layers that it has not."""
    of = {part: original for original in originals(network) for part in original.parts}
    if strange := [name for name in layers if name not in of]:
        raise UserError(
            f"{len(strange)} layers of this LoRA have no name outside diffusers, for example {strange[0]}; train "
            "others (lora.targets), or merge the LoRA (--merge)"
        )
    found: dict[str, Original] = {of[name].name: of[name] for name in layers}
    return {name: _original(original, layers, network) for name, original in found.items()}


def _original(original: Original, layers: Mapping[str, LoRALayer], network: nn.Module) -> LoRALayer:
    if len(original.parts) > 1:
        rows = [int(network.get_submodule(part).out_features) for part in original.parts]  # type: ignore[arg-type]
        return fuse([layers.get(part) for part in original.parts], rows)
    layer = layers[original.parts[0]]
    return swapped(layer) if original.swapped else layer


def _encoder(component: str, name: str, modules: Mapping[str, nn.Module]) -> str:
    """kohya's name of a text encoder's layer: CLIP's with ``text_model``, T5 the third wherever it is."""
    kind = type(modules[component]).__name__ if component in modules else "unknown text encoder"
    if not kind.startswith(("CLIPText", "T5Encoder")):
        raise UserError(f"{component}.{name}: no other program is known here that reads a LoRA of a {kind}")
    if kind.startswith("T5"):
        return f"lora_te3_{name}"
    number = component.removeprefix("text_encoder").removeprefix("_") or "1"
    alone = not any(other.startswith("text_encoder_") for other in modules)
    return f"lora_te{'' if alone else number}_text_model.{name.removeprefix('text_model.')}"


def _kohya(layers: Mapping[str, LoRALayer]) -> dict[str, Tensor]:
    state = {}
    for name, layer in layers.items():
        flat = name.replace(".", "_")
        state[f"{flat}.lora_down.weight"], state[f"{flat}.lora_up.weight"] = layer.A, layer.B
        state[f"{flat}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
    return state


def header(target: Target, file: LoRAFile, known: Readers | None, title: str) -> dict[str, str]:
    """The header of a file for ``target``: kohya's ``ss_…`` and Stability's ``modelspec.…``, which A1111 and ComfyUI's
    managers show. For diffusers nothing but the format: alpha is the rank there."""
    if target == "diffusers" or known is None or not known.architecture:
        return {"format": "pt"}
    spec = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{known.architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
    }
    if target == "comfyui" and known.comfyui == "diffusers":
        return spec
    ranks, alphas = {layer.rank for layer in file.layers.values()}, {layer.alpha for layer in file.layers.values()}
    return spec | {
        "ss_v2": str(known.version == "sd_v2"),
        "ss_base_model_version": known.version,
        "ss_network_module": known.module,
        "ss_network_dim": str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(next(iter(alphas))) if len(alphas) == 1 else "Dynamic",
        "ss_network_args": json.dumps({}),
    }


def write(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """The file at ``path``, whole or not at all; kohya's kind with the hash of its tensors, by which A1111 knows it."""
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    if "ss_network_module" in metadata:
        data = safetensors.torch.save(tensors)
        body = data[8 + int.from_bytes(data[:8], "little") :]
        metadata = {**metadata, "sshs_model_hash": hashlib.sha256(body).hexdigest()}
    with atomic(path) as draft:
        safetensors.torch.save_file(tensors, draft, dict(metadata))
    return path


@torch.no_grad()
def merge(modules: Mapping[str, Any], file: LoRAFile) -> None:
    """Add ``file`` to the weights of a pipeline's ``modules``: in float32, and rounded once to what a weight is in."""
    for name, layer in file.layers.items():
        component, _, path = name.partition(".")
        weight = modules[component].get_submodule(path).weight
        weight.copy_(weight.float() + layer.delta().to(weight.device).view(weight.shape))
