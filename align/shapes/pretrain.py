"""Train the two embedded pipelines, ``shapes-sd`` and ``shapes-sd3``, from nothing.

    python -m align.shapes.pretrain --output align/shapes

Three stages, each resumable by running the same command again: a small AutoencoderKL; a StableDiffusionPipeline
(epsilon U-Net, DDIM) and a StableDiffusion3Pipeline (flow-matching MMDiT, no T5) on the cached latents of rendered
scenes, their CLIP text encoders trained along. Every draw comes from (seed, stage, step), so a seed names the result.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from align.families import SAMPLING_FILE, Family
from align.families.sd import SD
from align.families.sd3 import SD3
from align.process import Prediction, diffuse
from align.shapes.world import COMBINATIONS, SEEN, TASKS, caption, render

TOKENS = 12  # the longest caption has ten words


def scenes(rng: np.random.Generator, count: int, pairs: tuple[tuple[str, str], ...] = SEEN) -> tuple[list[str], Tensor]:
    """``count`` captions and their pictures, (count, 3, 64, 64) uint8, tasks in equal share."""
    captions = [caption(rng, TASKS[rng.integers(len(TASKS))], pairs) for _ in range(count)]
    pictures = np.stack([render(rng, text) for text in captions])
    return captions, torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def signed(pictures: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1], the autoencoder's own range."""
    return pictures.float() / 127.5 - 1


def fit(
    name: str,
    module: nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    learning_rate: float,
    work: Path,
    ema: float = 0.0,
    every: int = 500,
) -> Iterator[int]:
    """Minimise ``loss(step)`` over ``module`` with AdamW, warm-up and cosine decay; resume from ``work/name.pt``.

    Yields the step count at every checkpoint, for a look at the intermediate result. With ``ema`` the module holds
    the moving average of its weights when the iteration ends.
    """
    checkpoint = work / f"{name}.pt"
    optimiser = torch.optim.AdamW(
        module.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
    )
    shadow = [p.detach().clone() for p in module.parameters()] if ema else []
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        shadow, start = state["shadow"], state["step"]
    module.train()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5)
    for step in bar:
        scale = min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * max(scale, 0.01)
        value = loss(step)
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        if ema:
            torch._foreach_lerp_(
                shadow, [p.detach() for p in module.parameters()], 1 - min(ema, (step + 1) / (step + 10))
            )
        if step % 20 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}")
        if (step + 1) % every == 0 or step + 1 == steps:
            state = {
                "module": module.state_dict(),
                "optimiser": optimiser.state_dict(),
                "shadow": shadow,
                "step": step + 1,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").rename(checkpoint)
            yield step + 1
    for parameter, average in zip(module.parameters(), shadow, strict=False):
        parameter.data.copy_(average)
    module.eval()


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        shift_factor=0.0,  # the SD3 pipeline adds it and cannot add None
    )


def train_vae(work: Path, seed: int, steps: int, polish_steps: int) -> AutoencoderKL:
    """The autoencoder: L1 + L2 reconstruction, weak KL, on scenes drawn anew at every step.

    Trained on :data:`SEEN` alone it paints a purple star red, so it is polished on every combination: like a real
    pipeline's autoencoder it has seen more than its denoiser has, which still never meets a held-out combination.
    """
    torch.manual_seed(seed)
    vae = new_vae()
    pairs = SEEN

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([seed, 0 if pairs is SEEN else len(pairs), step])
        x = signed(scenes(rng, 32, pairs)[1])
        noise = torch.Generator().manual_seed(int(rng.integers(2**62)))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample(noise)).sample
        error = y.float() - x
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return error.abs().mean() + 2 * error.square().mean() + 1e-4 * kl

    for _ in fit("vae", vae, loss, steps, 3e-3, work):
        pass
    pairs = COMBINATIONS
    for _ in fit("vae-polish", vae, loss, polish_steps, 2e-3, work):
        pass
    with torch.no_grad():
        held = signed(scenes(np.random.default_rng([seed, 1]), 1024, COMBINATIONS)[1])
        mean = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in held.split(128)])
        vae.register_to_config(scaling_factor=round(1 / mean.std().item(), 5))
        recon = torch.cat([vae.decode(chunk).sample for chunk in mean.split(128)])
        print(f"vae: scaling_factor {vae.config.scaling_factor}, reconstruction MSE {F.mse_loss(recon, held):.5f}")
    return vae


def new_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer that has every word of the captions as one token and spells out any other."""
    words = {word for text in _sentences() for word in text.split()}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [letter + "</w>" for letter in alphabet]
    merges: list[tuple[str, str]] = []
    for word in sorted(words, key=lambda w: (-len(w), w)):  # long first, so that no chain is cut by a shorter one's
        letters = [*word[:-1], word[-1] + "</w>"]
        for k in range(1, len(letters)):
            pair = ("".join(letters[:k]), letters[k])
            if pair not in merges:
                merges.append(pair)
    pieces += dict.fromkeys(a + b for a, b in merges)
    vocab = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)
    split = [word for word in words if len(tokenizer(word).input_ids) != 3]
    assert not split, f"words that are not one token: {split}"
    return tokenizer


def _sentences() -> list[str]:
    rng = np.random.default_rng(0)
    return [caption(rng, task, COMBINATIONS) for task in TASKS for _ in range(400)]


def new_text_encoder(tokenizer: CLIPTokenizer, width: int, cls: type[PreTrainedModel]) -> PreTrainedModel:
    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_sd(vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=96,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=new_text_encoder(tokenizer, 96, CLIPTextModel),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def new_sd3(vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=12,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=128,
        caption_projection_dim=96,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=new_text_encoder(tokenizer, 64, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        text_encoder_2=new_text_encoder(tokenizer, 64, CLIPTextModelWithProjection),
        tokenizer_2=tokenizer,
        text_encoder_3=silent_t5(128),
        tokenizer_3=T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)], extra_ids=0),
    )


def silent_t5(width: int) -> T5EncoderModel:
    """A 7,000-parameter T5 whose last norm is zero, so that it says exactly what an absent T5 says: zeros.

    diffusers saves ``text_encoder_3=None`` but then refuses to load the folder unless told None again; with this,
    plain ``from_pretrained(folder)`` works, and so does ``from_pretrained(folder, text_encoder_3=None, ...)``.
    """
    encoder = T5EncoderModel(T5Config(vocab_size=4, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder


def latent_set(vae: AutoencoderKL, work: Path, seed: int, count: int) -> tuple[list[str], Tensor]:
    """``count`` captions and their latents (count, 4, 8, 8) in the denoiser's scale; encoded once, kept in ``work``."""
    cache = work / f"latents-{seed}-{count}.pt"
    if not cache.exists():
        captions, pictures = scenes(np.random.default_rng([seed, 2]), count)
        with torch.no_grad():
            parts = [
                vae.encode(signed(chunk)).latent_dist.mean * vae.config.scaling_factor
                for chunk in tqdm(pictures.split(256), desc="latents")
            ]
        torch.save({"captions": captions, "latents": torch.cat(parts)}, cache.with_suffix(".tmp"))
        cache.with_suffix(".tmp").rename(cache)
    state = torch.load(cache, weights_only=True)
    return state["captions"], state["latents"]


def train_denoiser(
    name: str,
    family: Family,
    captions: list[str],
    latents: Tensor,
    work: Path,
    seed: tuple[int, int],
    steps: int,
    batch: int,
) -> Iterator[int]:
    """Plain denoising loss in the family's own coordinate; denoiser and text encoders learn together.

    One caption in ten becomes the empty prompt, so that classifier-free guidance works.
    """
    encoders = [
        family.pipe.components[key] for key in ("text_encoder", "text_encoder_2") if key in family.pipe.components
    ]
    module = nn.ModuleList([family.denoiser, *encoders]).requires_grad_(True)

    def loss(step: int) -> Tensor:
        draw = torch.Generator().manual_seed(int(np.random.default_rng([*seed, step]).integers(2**62)))
        rows = torch.randint(len(captions), (batch,), generator=draw)
        dropped = torch.rand(batch, generator=draw) < 0.1
        cond = family.encode(["" if drop else captions[row] for row, drop in zip(rows, dropped, strict=True)])
        x0, eps = latents[rows], torch.randn(batch, *latents.shape[1:], generator=draw)
        t = family.draw_t(torch.rand(batch, generator=draw))
        alpha, sigma = family.path(t)
        x_t = diffuse(x0, eps, alpha, sigma)
        prediction = Prediction(family.forward(x_t, t, cond), x_t, alpha, sigma, family.kind)
        return F.mse_loss(prediction.raw, prediction.target(x0, eps))

    yield from fit(name, module, loss, steps, 1.5e-3, work, ema=0.999)


def half(pipe: DiffusionPipeline, folder: Path) -> None:
    """Save the pipeline in float16 safetensors: written to a temporary folder, then renamed.

    Loaded without a dtype, diffusers' own models come up in float32 but transformers' in the dtype of their config;
    so that config says float32, lest the text encoder's halves meet the denoiser's floats.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    pipe.to(dtype=torch.float16).save_pretrained(temporary, safe_serialization=True)
    for config in temporary.glob("text_encoder*/config.json"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    (temporary / SAMPLING_FILE).write_text(json.dumps({"guidance": 3.0, "steps": 20}) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("align/shapes"), help="the two pipeline folders go here")
    parser.add_argument("--work", type=Path, default=Path("outputs/pretrain"), help="checkpoints while training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--only", choices=("shapes-sd", "shapes-sd3"), help="train just one of the two denoisers")
    parser.add_argument("--vae_steps", type=int, default=2600)
    parser.add_argument("--polish_steps", type=int, default=1000)
    parser.add_argument("--sd_steps", type=int, default=5000)
    parser.add_argument("--sd3_steps", type=int, default=6000)
    parser.add_argument("--sd3_shifted_steps", type=int, default=4500)
    parser.add_argument("--sd3_sharp_steps", type=int, default=6000)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    vae = train_vae(args.work, args.seed, args.vae_steps, args.polish_steps)
    captions, latents = latent_set(vae, args.work, args.seed, args.scenes)
    for name, build, cls, phases in (
        # (name of the checkpoint, steps, scheduler's shift): the flow model first learns to draw, then composition,
        # which is decided at high noise, where a shifted schedule spends more of its steps (Esser et al. 2024, §5.3.2),
        # then at all noise levels alike again, for sharp edges and pure colours; it is shipped with the shifted one
        ("shapes-sd", new_sd, SD, [("shapes-sd", args.sd_steps, None)]),
        (
            "shapes-sd3",
            new_sd3,
            SD3,
            [
                ("shapes-sd3", args.sd3_steps, 1.0),
                ("shapes-sd3-shifted", args.sd3_shifted_steps, 3.0),
                ("shapes-sd3-sharp", args.sd3_sharp_steps, 1.0),
            ],
        ),
    ):
        if args.only not in (None, name):
            continue
        torch.manual_seed(args.seed)
        pipe = build(copy.deepcopy(vae), new_tokenizer())
        components = dict(pipe.components)
        family = cls(pipe, name)
        for number, (phase, steps, shift) in enumerate(phases):
            if shift is not None:
                pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=shift))
            key = (args.seed, 3 + number)
            for _ in train_denoiser(phase, family, captions, latents, args.work, key, steps, args.batch):
                pass
        if isinstance(family, SD3):
            components["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipe.register_modules(**components)  # the family may have set a silent T5 aside
        half(pipe, args.output / name)


if __name__ == "__main__":
    main()
