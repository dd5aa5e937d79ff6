"""Tiny random pipelines of the families beside Stable Diffusion 1 and 3: real classes, built from config in seconds."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from align.families.folder import SAMPLING_FILE
from align.shapes.scripts import pretrain
from tests.pipelines import _randomise, tiny_vae

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false"
    " %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
PIXTRAL = (
    "{{ bos_token }}{% for m in messages %}{% set tag = 'SYSTEM_PROMPT' if m['role'] == 'system' else 'INST' %}"
    "[{{ tag }}]{% for c in m['content'] %}{{ c['text'] }}{% endfor %}[/{{ tag }}]{% endfor %}"
)


# tokenizers
def _qwen() -> Qwen2Tokenizer:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    tokenizer = Qwen2Tokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[],
        additional_special_tokens=special[1:],
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def _t5() -> T5Tokenizer:
    words = sorted({word for sentence in pretrain._sentences() for word in sentence.split()})
    scored = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    scored += [("▁" + word, -3.0) for word in words] + [(letter, -8.0) for letter in LETTERS]
    return T5Tokenizer(vocab=scored, extra_ids=0, model_max_length=512)


def _gemma() -> GemmaTokenizer:
    """Letters, and the words of SANA's long instruction whole, or every prompt would have 1,300 tokens."""
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    words = sorted({"▁" + word for line in instruction for word in line.split() if word.isalpha()})
    signs = sorted({*LETTERS, *LETTERS.upper(), *"'-.,:>_()!?\"▁\n", *"".join(words)})
    merges = list(dict.fromkeys((word[:k], word[k]) for word in words for k in range(1, len(word))))
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), *signs]
    pieces = list(dict.fromkeys([*pieces, *(left + right for left, right in merges)]))
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return GemmaTokenizer(vocab=vocabulary, merges=merges, model_max_length=4096)


def _pixtral() -> PixtralProcessor:
    names = ["<unk>", "<s>", "</s>", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    names += ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    pieces = [*names, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=names[4:],
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=4096,
    )
    images = PixtralImageProcessor(patch_size=4, size={"longest_edge": 32})
    return PixtralProcessor(image_processor=images, tokenizer=tokenizer, patch_size=4, chat_template=PIXTRAL)


# text encoders
def _t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def _heads(tokenizer: Any, width: int, layers: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2}
    return sizes | {"vocab_size": len(tokenizer), "num_key_value_heads": 1, "head_dim": 8}


def _gemma_encoder(tokenizer: GemmaTokenizer) -> Gemma2Model:
    own = {"sliding_window": 4096, "query_pre_attn_scalar": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    return Gemma2Model(Gemma2Config(**_heads(tokenizer, 16, 2), **own))


def _qwen3(cls: type, tokenizer: Qwen2Tokenizer, width: int, layers: int) -> Any:
    return cls(Qwen3Config(**_heads(tokenizer, width, layers), max_position_embeddings=2048))


# autoencoders
FLUX_LATENTS = {"shift": 0.1159, "scale": 0.3611}
SDXL_LATENTS = {"shift": None, "scale": 0.13025}


def _flux2_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    vae.bn.running_mean.copy_(torch.randn(16) * 0.3)
    vae.bn.running_var.copy_(torch.rand(16) + 0.5)
    return vae


# pipelines
def _euler(shift: float = 1.0, **dynamic: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=shift, **dynamic)


FLUX_SHIFT = {"base_shift": 0.5, "max_shift": 1.15, "use_dynamic_shifting": True}
AXES = {"attention_head_dim": 16, "num_attention_heads": 2}


def sdxl(turbo: bool = False) -> StableDiffusionXLPipeline:
    tokenizer = pretrain.new_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=64 + 6 * 8,
        norm_num_groups=4,
    )
    scheduler = EulerAncestralDiscreteScheduler if turbo else EulerDiscreteScheduler
    spacing = {"timestep_spacing": "trailing"} if turbo else {"timestep_spacing": "leading", "steps_offset": 1}
    return StableDiffusionXLPipeline(
        vae=tiny_vae(**SDXL_LATENTS),
        text_encoder=pretrain.new_text_encoder(tokenizer, 64, CLIPTextModel),
        text_encoder_2=pretrain.new_text_encoder(tokenizer, 64, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **spacing),
        add_watermarker=False,
    )


def flux(dev: bool = True) -> FluxPipeline:
    clip, t5 = pretrain.new_tokenizer(), _t5()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=dev,
        **AXES,
    )
    return FluxPipeline(
        scheduler=_euler(3.0, **FLUX_SHIFT) if dev else _euler(),
        vae=tiny_vae(**FLUX_LATENTS),
        text_encoder=pretrain.new_text_encoder(clip, 64, CLIPTextModel),
        tokenizer=clip,
        text_encoder_2=_t5_encoder(t5),
        tokenizer_2=t5,
        transformer=transformer,
    )


def chroma() -> ChromaPipeline:
    t5 = _t5()
    transformer = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
        **AXES,
    )
    parts = {"text_encoder": _t5_encoder(t5), "tokenizer": t5, "transformer": transformer}
    return ChromaPipeline(scheduler=_euler(), vae=tiny_vae(**FLUX_LATENTS), **parts)


def qwen_image() -> QwenImagePipeline:
    tokenizer = _qwen()
    text = _heads(tokenizer, 16, 2) | {"num_key_value_heads": 2, "max_position_embeddings": 2048}
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    seeing = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(
        text_config=text | {"rope_scaling": rope, "rope_theta": 1e6},
        vision_config=seeing,
        vocab_size=len(tokenizer),
        vision_end_token_id=1,
        vision_start_token_id=2,
        vision_token_id=3,
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.7571, -0.7089, 0.1075, 1.5508],
        latents_std=[2.8184, 1.4541, 2.3275, 1.2196],
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
        **AXES,
    )
    shift = {"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 8192, "max_shift": 0.9}
    return QwenImagePipeline(
        scheduler=_euler(1.0, shift_terminal=0.02, use_dynamic_shifting=True, **shift),
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def z_image(shift: float = 6.0) -> ZImagePipeline:
    tokenizer = _qwen()
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[512, 32, 32],
    )
    text = {"text_encoder": _qwen3(Qwen3Model, tokenizer, 16, 2), "tokenizer": tokenizer}
    return ZImagePipeline(scheduler=_euler(shift), vae=tiny_vae(**FLUX_LATENTS), transformer=transformer, **text)


def _flux2_transformer(dev: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=24,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=dev,
        **AXES,
    )


def flux2() -> Flux2Pipeline:
    processor = _pixtral()
    text = _heads(processor.tokenizer, 8, 30) | {"head_dim": 4, "model_type": "mistral", "sliding_window": None}
    text |= {"max_position_embeddings": 4096, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2}
    seeing = {"model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    seeing |= {"intermediate_size": 16, "image_size": 32, "patch_size": 4, "num_channels": 3}
    config = Mistral3Config(text_config=text, vision_config=seeing, image_token_index=4, vision_feature_layer=-1)
    return Flux2Pipeline(
        scheduler=_euler(3.0, **FLUX_SHIFT),
        vae=_flux2_vae(),
        text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=processor,
        transformer=_flux2_transformer(dev=True),
    )


def flux2_klein(distilled: bool = False) -> Flux2KleinPipeline:
    tokenizer = _qwen()
    return Flux2KleinPipeline(
        scheduler=_euler(3.0, **FLUX_SHIFT),
        vae=_flux2_vae(),
        text_encoder=_qwen3(Qwen3ForCausalLM, tokenizer, 8, 27),
        tokenizer=tokenizer,
        transformer=_flux2_transformer(dev=False),
        is_distilled=distilled,
    )


def sana() -> SanaPipeline:
    tokenizer = _gemma()
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_cross_attention_heads": 2}
    text = {"cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 16}
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, sample_size=16, patch_size=1, **heads, **text
    )
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    scheduler = DPMSolverMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction")
    parts = {"vae": vae, "transformer": transformer, "scheduler": scheduler}
    return SanaPipeline(tokenizer=tokenizer, text_encoder=_gemma_encoder(tokenizer), **parts)


def lumina2() -> Lumina2Pipeline:
    tokenizer = _gemma()
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        norm_eps=1e-5,
        scaling_factor=1.0,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 32, 32),
        cap_feat_dim=16,
    )
    text = {"text_encoder": _gemma_encoder(tokenizer), "tokenizer": tokenizer}
    return Lumina2Pipeline(
        transformer=transformer, scheduler=_euler(6.0), vae=tiny_vae(blocks=4, **FLUX_LATENTS), **text
    )


def pixart() -> PixArtSigmaPipeline:
    t5 = _t5()
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False,
    )
    times = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}
    scheduler = DDIMScheduler(**times, set_alpha_to_one=False, steps_offset=1)
    text = {"text_encoder": _t5_encoder(t5), "tokenizer": t5}
    return PixArtSigmaPipeline(vae=tiny_vae(**SDXL_LATENTS), transformer=transformer, scheduler=scheduler, **text)


BUILD: dict[str, Callable[[], DiffusionPipeline]] = {
    "sdxl": sdxl,
    "sdxl-turbo": lambda: sdxl(turbo=True),
    "flux-dev": flux,
    "flux-schnell": lambda: flux(dev=False),
    "qwen-image": qwen_image,
    "z-image": z_image,
    "z-image-turbo": lambda: z_image(shift=3.0),
    "flux2-dev": flux2,
    "flux2-klein-base": flux2_klein,
    "flux2-klein": lambda: flux2_klein(distilled=True),
    "sana": sana,
    "chroma": chroma,
    "lumina2": lumina2,
    "pixart-sigma": pixart,
}
RESOLUTION = {"sana": 32, "lumina2": 32}  # of others 16; without an entry in sampling.json they all draw 128 cells


def save(name: str, folder: Path) -> Path:
    """The tiny pipeline ``name``, saved in ``folder``."""
    torch.manual_seed(0)
    with torch.no_grad():
        pipe = BUILD[name]()
        _randomise(getattr(pipe, "unet", None) or pipe.transformer)
    pipe.save_pretrained(folder)
    (folder / SAMPLING_FILE).write_text(json.dumps({"resolution": RESOLUTION.get(name, 16)}))
    return folder
