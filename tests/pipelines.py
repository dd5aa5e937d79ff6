"""Tiny random pipelines of real classes, built from config: nothing is downloaded, nothing is mocked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from align import families
from align.families import Family
from align.families.sd import SD
from align.families.sd3 import SD3
from align.shapes.scripts import pretrain
from tests.mould import Mould

Build = Callable[..., Family]


def _randomise(module: nn.Module) -> None:
    """Fresh networks end in zeros; give every output something to say."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)


def tiny_vae(shift: float | None = 0.0, scale: float = 0.7, blocks: int = 2) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=scale,
        shift_factor=shift,
    )


def tiny_sd(prediction_type: str = "epsilon") -> SD:
    torch.manual_seed(0)
    pipe = pretrain.new_sd(tiny_vae(), pretrain.new_tokenizer())
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    _randomise(unet)
    pipe.register_modules(unet=unet)
    # not from_config of the old one: it would take prediction_type for a default that nobody set
    pipe.register_modules(
        scheduler=DDIMScheduler(set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type)
    )
    family = SD(pipe, f"tiny-sd-{prediction_type}")
    assert family.prediction_type == prediction_type
    return family


def tiny_sd3(dual: tuple[int, ...] = ()) -> SD3:
    torch.manual_seed(0)
    pipe = pretrain.new_sd3(tiny_vae(), pretrain.new_tokenizer())
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=128,
        caption_projection_dim=16,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=dual,
    )
    _randomise(transformer)
    pipe.register_modules(transformer=transformer)
    return SD3(pipe, "tiny-sd3")


def tokenizers(pipe: DiffusionPipeline) -> list[object]:
    """What copies of a pipeline may share."""
    return [part for name, part in pipe.components.items() if name.startswith("tokenizer")]


@functools.cache
def _built(kind: str) -> tuple[Mould, torch.Tensor]:
    """A tiny family to be copied, and the state of torch's generator after it was built."""
    family = tiny_sd3() if kind == "flow" else tiny_sd({"epsilon": "epsilon", "v": "v_prediction"}[kind])
    return Mould(family, tokenizers(family.pipe)), torch.get_rng_state()


def tiny(kind: str) -> Family:
    """A tiny family of one's own by kind: ``tiny("epsilon")``, ``tiny("v")`` or ``tiny("flow")``.

    A copy takes a tenth of the time of a new one; it leaves torch's generator where building leaves it.
    """
    mould, state = _built(kind)
    torch.set_rng_state(state)
    family: Family = mould.copy()
    return family


def folders(root: Path) -> dict[str, Path]:
    """The tiny pipelines saved below ``root``, by kind."""
    for kind, family in {"epsilon": tiny_sd(), "v": tiny_sd("v_prediction")}.items():
        family.pipe.save_pretrained(root / kind)
    torch.manual_seed(0)
    flow = tiny_sd3()
    flow.pipe.register_modules(
        text_encoder_3=pretrain.silent_t5(128),
        tokenizer_3=pretrain.new_sd3(tiny_vae(), flow.pipe.tokenizer).tokenizer_3,
    )
    flow.pipe.save_pretrained(root / "flow")
    assert families.pipeline_class(str(root / "flow")) == "StableDiffusion3Pipeline"
    return {kind: root / kind for kind in ("epsilon", "v", "flow")}
