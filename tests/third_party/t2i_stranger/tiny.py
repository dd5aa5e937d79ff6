"""An AuraFlow pipeline of the real classes with 100,000 random weights, to test the family on in seconds."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel


def save_tiny(folder: Path) -> Path:
    """Save the pipeline to ``folder``, which comes back."""
    torch.manual_seed(0)
    letters = [(letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)
    encoder = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.7,
    )
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    for parameter in transformer.parameters():
        if not parameter.any():  # fresh networks end in zeros: give every output something to say
            nn.init.normal_(parameter, std=0.05)
    text_encoder, scheduler = UMT5EncoderModel(encoder), FlowMatchEulerDiscreteScheduler(shift=1.73)
    AuraFlowPipeline(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(folder)
    return folder
