"""INT4: NF4 weights through bitsandbytes, written as stock diffusers and transformers read them, and run anywhere.

Which layers are packed, and the models that hold them; :mod:`pruning.linear4bit` is the layer itself.

    report = quantize(pipe.transformer)          # in place; says what was kept and why
    save_pipeline(pipe, "outputs/int4")          # stock `from_pretrained` reads it where a GPU is
    pipe = pruning.load("outputs/int4")          # here, without one
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from align.common.errors import UserError
from align.families import read_lora
from pruning.linear4bit import bytes_of, pack
from pruning.nf4 import NF4

DEFAULT = NF4()
Model = Any  # a ModelMixin or a PreTrainedModel
# What stays in full precision unless the settings say otherwise: the way in, the way out, and what makes the
# conditioning vector. All together under 1 % of a large model. An entry means what the model's library takes it to
# mean (see `_names`): in diffusers a bare `proj_out` would also name the `proj_out` of each of FLUX's single blocks,
# 15 % of that model, so FLUX's last layer is quantised.
KEPT: dict[str, tuple[str, ...]] = {
    "SD3Transformer2DModel": ("context_embedder", "time_text_embed", "norm_out", "proj_out"),
    "FluxTransformer2DModel": ("x_embedder", "context_embedder", "time_text_embed", "norm_out"),
    "Flux2Transformer2DModel": (
        *("x_embedder", "context_embedder", "time_guidance_embed", "norm_out", "proj_out"),
        *("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"),
    ),
    "QwenImageTransformer2DModel": ("img_in", "txt_in", "time_text_embed", "norm_out", "proj_out"),
    "ZImageTransformer2DModel": ("all_x_embedder", "cap_embedder", "t_embedder", "all_final_layer"),
    "SanaTransformer2DModel": ("caption_projection", "time_embed", "proj_out"),
    "ChromaTransformer2DModel": ("x_embedder", "context_embedder", "distilled_guidance_layer", "proj_out"),
    "Lumina2Transformer2DModel": ("x_embedder", "time_caption_embed", "norm_out"),
    "PixArtTransformer2DModel": ("caption_projection", "adaln_single", "proj_out"),
    "UNet2DConditionModel": ("time_embedding", "add_embedding"),
    "CLIPTextModelWithProjection": ("text_projection",),
}


@dataclass(frozen=True)
class Layer:
    """One ``nn.Linear``: its name, its number of weights (the bias not counted), and why it was kept, if it was."""

    name: str
    weights: int
    kept: str | None


@dataclass(frozen=True)
class Report:
    """What :func:`quantize` did: every Linear, and the module's bytes before and after."""

    architecture: str
    layers: tuple[Layer, ...]
    before: int
    after: int

    @property
    def quantised(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.kept is None)

    @property
    def kept(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.kept is not None)

    def __str__(self) -> str:
        done, weights = self.quantised, sum(layer.weights for layer in self.layers)
        share = sum(layer.weights for layer in done) / weights
        first = (
            f"{self.architecture}: {len(done)} of {len(self.layers)} Linears quantised, {share:.1%} of their weights; "
            f"{self.before:,} bytes before, {self.after:,} after"
        )
        kept = [f"  kept {layer.name} ({layer.weights:,}): {layer.kept}" for layer in self.kept]
        return "\n".join([first, *kept])


# which layers
def choose(module: Model, settings: NF4 = DEFAULT) -> tuple[Layer, ...]:
    """Every ``nn.Linear`` of a diffusers or transformers model, quantised or kept with the reason; touches nothing.

    Works on the meta device. The choice is the one that the model's own library makes when it reads the saved folder,
    which is why the list of what it keeps by itself (T5's ``wo``) is added. Raises :class:`UserError`
    with everything that stands against it.
    """
    if problems := _against(module):
        raise UserError(f"cannot quantize {type(module).__name__}: " + "; ".join(problems))
    reasons = {entry: f"{entry!r} is on the skip list" for entry in skip_list(module, settings)}
    library = module._keep_in_fp32_modules or ()
    reasons |= {entry: f"its library keeps {entry!r} in full precision" for entry in library}
    layers = tuple(split(module, reasons))
    if idle := unnamed(settings, module):
        raise UserError(f"skip: {', '.join(map(repr, idle))} names no Linear of {type(module).__name__}")
    if not any(layer.kept is None for layer in layers):
        raise UserError(f"nothing to quantize in {type(module).__name__}: it has {len(layers)} Linears, all kept")
    return layers


def unnamed(settings: NF4, *modules: Model) -> list[str]:
    """The entries of ``settings.skip`` that name no Linear of any of ``modules``."""
    linears = [(m, name) for m in modules for name, layer in m.named_modules() if isinstance(layer, nn.Linear)]
    return [entry for entry in settings.skip or () if not any(_names(m, entry, name) for m, name in linears)]


def settings_for(module: Model, settings: NF4) -> NF4:
    """The settings of a whole pipeline for one of its models: the entries of ``skip`` that name a Linear of it. A model
    that none of them names keeps its own list (``KEPT``)."""
    others = unnamed(settings, module)
    if not others:
        return settings
    return replace(settings, skip=[entry for entry in settings.skip or () if entry not in others] or None)


def skip_list(module: Model, settings: NF4) -> list[str]:
    """What ``llm_int8_skip_modules`` says in the saved config: the given or the default entries, then what the model's
    library adds by itself."""
    given = KEPT.get(type(module).__name__, ()) if settings.skip is None else settings.skip
    return list(dict.fromkeys([*given, *(module._keep_in_fp32_modules or ())]))


def _against(module: nn.Module) -> list[str]:
    """Why a module cannot be quantised: all reasons."""
    if not isinstance(module, (ModelMixin, PreTrainedModel)):
        return ["expected a diffusers ModelMixin or a transformers PreTrainedModel"]
    problems = []
    if packed := sum(isinstance(m, bnb.nn.Linear4bit) for m in module.modules()):
        problems.append(f"{packed} of its Linears are quantised already")
    if adapted := sum(isinstance(m, BaseTunerLayer) for m in module.modules()):
        problems.append(f"{adapted} of its layers carry a LoRA; merge it first (pruning.quantize.merge_lora)")
    linears = [(name, m.weight) for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    for name, weight in linears if not packed else ():
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            problems.append(f"{name} is in {weight.dtype}; expected 16 or 32-bit floats")
        elif not weight.is_meta and not bool(weight.isfinite().all()):
            problems.append(f"{name} holds NaN or infinity")
    return problems


def split(module: Model, reasons: Mapping[str, str]) -> Iterator[Layer]:
    """Every Linear, kept for the reason of the first entry of ``reasons`` that names it."""
    for name, linear in module.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        kept = next((reason for entry, reason in reasons.items() if _names(module, entry, name)), None)
        if kept is None and isinstance(module, PreTrainedModel) and type(linear) is not nn.Linear:
            kept = f"a {type(linear).__name__}, which transformers leaves alone"
        yield Layer(name, linear.weight.numel(), kept)


def _names(module: Model, entry: str, name: str) -> bool:
    """Whether a skip list's ``entry`` names the Linear ``name``, as the library of ``module`` reads it.

    diffusers (``quantizers/bitsandbytes/utils.py``): the last part of the name, the whole name, or a run of parts in
    it. transformers (``quantizers/quantizers_utils.py``): a regular expression from the start to a boundary, or how
    the name ends.
    """
    if isinstance(module, ModelMixin):
        return entry in (name, name.rpartition(".")[2]) or f"{entry}." in name
    return bool(re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", name)) or name.endswith(entry)


# doing it
def quantize(module: Model, settings: NF4 = DEFAULT) -> Report:
    """Replace, in place, the Linears of a diffusers or transformers model by NF4 ones; see :func:`choose` for which.

    The weights that stay keep their dtype. Raises :class:`UserError` before anything is changed.
    """
    layers, before = choose(module, settings), bytes_of(module)
    for layer in layers:
        if layer.kept is None:
            module.set_submodule(layer.name, pack(module.get_submodule(layer.name), settings))
    mark(module, settings)
    return Report(type(module).__name__, layers, before, bytes_of(module))


def mark(module: Model, settings: NF4) -> None:
    """Give the model what the libraries give theirs, so that it saves, trains adapters and refuses casts as theirs."""
    diffusing = isinstance(module, ModelMixin)
    config = (diffusers if diffusing else transformers).BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=settings.compute_dtype,
        llm_int8_skip_modules=skip_list(module, settings),
    )
    if diffusing:
        module.register_to_config(quantization_config=config)
    else:
        module.config.quantization_config = config
    quantizer = (DiffusersAutoQuantizer if diffusing else AutoHfQuantizer).from_config(config, pre_quantized=True)
    module.hf_quantizer = quantizer
    module.quantization_method = config.quant_method
    module.is_quantized = module.is_loaded_in_4bit = True


def quantised(pipe: DiffusionPipeline) -> list[str]:
    """The names of the pipeline's parts that hold packed weights."""
    return [
        name
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module) and any(isinstance(m, bnb.nn.Linear4bit) for m in part.modules())
    ]


def merge_lora(pipe: DiffusionPipeline, source: Path | str) -> None:
    """Add the LoRA at ``source`` (a file, a run folder of ours, or any that :func:`align.families.read_lora` reads) to
    the pipeline's own weights, at its own strength.

    Before quantising: four bits round a weight by some 9 %, more than a LoRA changes it. A LoRA for a quantised
    pipeline is loaded with ``pipe.load_lora_weights`` and stays beside the weights (QLoRA). Raises
    :class:`UserError`.
    """
    if names := quantised(pipe):
        raise UserError(
            f"cannot merge: {', '.join(names)} of this pipeline are quantised, and 4-bit weights would round most of a "
            "LoRA away: merge into the unquantised pipeline and quantize that, or leave the LoRA unmerged "
            "(pipe.load_lora_weights)"
        )
    pipe.load_lora_weights(read_lora(Path(source), pipe).state_dict())
    pipe.fuse_lora(safe_fusing=True)
    pipe.unload_lora_weights()
