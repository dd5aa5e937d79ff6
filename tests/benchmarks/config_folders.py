"""Pipeline folders of full size without a weight: the JSON files alone, from which memory is traced.

Denoisers are those of :mod:`tests.benchmarks.full_size`, whose parameters agree with the published numbers; SD1.5's and
SD3.5-medium's are those that ``gpu_online.py`` measured. Text encoders and autoencoders are the published
ones as their authors describe them, diffusers' and transformers' defaults for the rest.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks import sizes
from tests.benchmarks.full_size import MODELS

Config = dict[str, Any]
LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
DDIM = ("DDIMScheduler", LINEAR | {"clip_sample": False, "set_alpha_to_one": False})
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
BLOCKS = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
KL4 = ("AutoencoderKL", BLOCKS | {"latent_channels": 4, "scaling_factor": 0.18215})
KL_XL = ("AutoencoderKL", BLOCKS | {"latent_channels": 4, "scaling_factor": 0.13025, "sample_size": 1024})
KL16 = (
    "AutoencoderKL",
    BLOCKS
    | {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 1024}
    | {"use_quant_conv": False, "use_post_quant_conv": False},
)
CLIP_L = ("CLIPTextModel", sizes._CLIP_L)
CLIP_L_PROJECTED = ("CLIPTextModelWithProjection", sizes._CLIP_L)
BIG_G = ("CLIPTextModelWithProjection", sizes._CLIP_BIG_G)
T5 = ("T5EncoderModel", sizes._T5_XXL)
GEMMA = (
    "Gemma2Model",
    {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8}
    | {"num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000},
)
QWEN3_4B: Config = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36}
QWEN3_4B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
QWEN3_4B |= {"max_position_embeddings": 40960, "tie_word_embeddings": True}
QWEN_VL: Config = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
QWEN_VL |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
QWEN_VL |= {"rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}}
QWEN_SEES: Config = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
QWEN_SEES |= {"out_hidden_size": 3584}
MISTRAL: Config = {"model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40}
MISTRAL |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072}
FLOW = "FlowMatchEulerDiscreteScheduler"


@dataclass(frozen=True)
class Folder:
    """A pipeline: its class, its parts (class and config), its tokenizers, and what else its index says."""

    pipeline: str
    denoiser: tuple[str, Config]
    vae: tuple[str, Config]
    scheduler: tuple[str, Config]
    texts: tuple[tuple[str, Config], ...]
    tokenizers: tuple[str, ...]
    resolution: int = 1024
    index: Config = field(default_factory=dict)


def _denoiser(name: str) -> tuple[str, Config]:
    return MODELS[name].cls, MODELS[name].config


SD15_UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
}
SD3_TEXT = (CLIP_L_PROJECTED, BIG_G, T5), ("CLIPTokenizer", "CLIPTokenizer", "T5TokenizerFast")
SD35_VAE = (KL16[0], KL16[1] | {"scaling_factor": 1.5305, "shift_factor": 0.0609})
FOLDERS: dict[str, Folder] = {
    "SD1.5": Folder(
        "StableDiffusionPipeline", ("UNet2DConditionModel", SD15_UNET), KL4, DDIM, (CLIP_L,), ("CLIPTokenizer",), 512
    ),
    "SDXL": Folder(
        "StableDiffusionXLPipeline",
        _denoiser("SDXL"),
        KL_XL,
        ("EulerDiscreteScheduler", LINEAR | {"timestep_spacing": "leading"}),
        (CLIP_L, BIG_G),
        ("CLIPTokenizer", "CLIPTokenizer"),
        index={"force_zeros_for_empty_prompt": True},
    ),
    "SD3.5 medium": Folder(
        "StableDiffusion3Pipeline",
        ("SD3Transformer2DModel",
         {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
          "qk_norm": "rms_norm", "dual_attention_layers": list(range(13)), "sample_size": 128}),
        SD35_VAE, (FLOW, {"shift": 3.0}), *SD3_TEXT,
    ),
    "SD3.5 large": Folder(
        "StableDiffusion3Pipeline", _denoiser("SD3.5 large"), SD35_VAE, (FLOW, {"shift": 3.0}), *SD3_TEXT
    ),
    "FLUX.1 dev": Folder(
        "FluxPipeline", _denoiser("FLUX.1 dev"), KL16, (FLOW, {"shift": 3.0} | DYNAMIC), (CLIP_L, T5),
        ("CLIPTokenizer", "T5TokenizerFast"),
    ),
    "Chroma": Folder(
        "ChromaPipeline", _denoiser("Chroma"), KL16, (FLOW, {"shift": 1.0}), (T5,), ("T5TokenizerFast",)
    ),
    "FLUX.2 klein 4B": Folder(
        "Flux2KleinPipeline", _denoiser("FLUX.2 klein 4B"), ("AutoencoderKLFlux2", {}),
        (FLOW, {"shift": 3.0} | DYNAMIC), (("Qwen3ForCausalLM", QWEN3_4B),), ("Qwen2TokenizerFast",),
        index={"is_distilled": False},
    ),
    "FLUX.2 dev": Folder(
        "Flux2Pipeline", _denoiser("FLUX.2 dev"), ("AutoencoderKLFlux2", {}), (FLOW, {"shift": 3.0} | DYNAMIC),
        (("Mistral3ForConditionalGeneration", {"text_config": MISTRAL}),), ("PixtralProcessor",),
    ),
    "Qwen-Image": Folder(
        "QwenImagePipeline", _denoiser("Qwen-Image"), ("AutoencoderKLQwenImage", {}),
        (FLOW, {"shift": 1.0, "shift_terminal": 0.02, "base_shift": 0.5, "max_shift": 0.9, "use_dynamic_shifting": True}
         | {"base_image_seq_len": 256, "max_image_seq_len": 8192}),
        (("Qwen2_5_VLForConditionalGeneration", {"text_config": QWEN_VL, "vision_config": QWEN_SEES}),),
        ("Qwen2Tokenizer",),
    ),
    "Z-Image": Folder(
        "ZImagePipeline", _denoiser("Z-Image"), KL16, (FLOW, {"shift": 6.0}), (("Qwen3Model", QWEN3_4B),),
        ("Qwen2Tokenizer",),
    ),
    "SANA 1.6B": Folder(
        "SanaPipeline", _denoiser("SANA 1.6B"), ("AutoencoderDC", {"scaling_factor": 0.41407}),
        ("DPMSolverMultistepScheduler",
         {"flow_shift": 3.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
        (GEMMA,), ("GemmaTokenizerFast",),
    ),
    "Lumina-Image 2": Folder(
        "Lumina2Pipeline", _denoiser("Lumina-Image 2"), KL16, (FLOW, {"shift": 6.0}), (GEMMA,), ("GemmaTokenizerFast",)
    ),
    "PixArt-Sigma": Folder(
        "PixArtSigmaPipeline", _denoiser("PixArt-Sigma"), KL_XL, DDIM, (T5,), ("T5Tokenizer",)
    ),
}  # fmt: skip


def write(name: str, root: Path) -> Path:
    """The folder of ``name`` under ``root``, with the config files and nothing else."""
    spec, folder = FOLDERS[name], root / name.replace(" ", "-")
    where = "unet" if "UNet" in spec.denoiser[0] else "transformer"
    parts: dict[str, tuple[str, str, str, Config]] = {
        where: ("diffusers", "config.json", *spec.denoiser),
        "vae": ("diffusers", "config.json", *spec.vae),
        "scheduler": ("diffusers", "scheduler_config.json", *spec.scheduler),
    }
    for k, (cls, config) in enumerate(spec.texts):
        parts["text_encoder" + (f"_{k + 1}" if k else "")] = ("transformers", "config.json", cls, config)
    for k, cls in enumerate(spec.tokenizers):
        settings = {"model_max_length": 77 if "CLIP" in cls else 512}
        parts["tokenizer" + (f"_{k + 1}" if k else "")] = ("transformers", "tokenizer_config.json", cls, settings)
    index: Config = {"_class_name": spec.pipeline, **spec.index}
    for part, (library, file, cls, config) in parts.items():
        index[part] = [library, cls]
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / file).write_text(json.dumps({"_class_name": cls, **config}))
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "sampling.json").write_text(json.dumps({"resolution": spec.resolution}))
    return folder
