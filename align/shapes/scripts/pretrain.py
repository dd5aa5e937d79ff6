"""Train the two embedded pipelines, ``shapes-sd`` and ``shapes-sd3``, from nothing.

    python -m align.shapes.scripts.pretrain --output align/shapes

Three stages, each resumable by running the same command again: a small AutoencoderKL; a StableDiffusionPipeline
(epsilon U-Net, DDIM) and a StableDiffusion3Pipeline (flow-matching MMDiT, no T5) on the cached latents of rendered
scenes, their CLIP text encoders trained along. Every draw comes from (seed, stage, step) on the CPU, so a seed names
the result, up to the rounding of the device.

On two cores of an EPYC all of it took 117 minutes (2026-11-28, ``tests/benchmarks/pretrain.py``, which also says what
the two score). ``--device cuda`` trains a step as one CUDA graph: on an H200 (2026-11-27) 47.8 steps of 512 rows a
second of shapes-sd3, against 1.6 of 64 on one core of an earlier CPU, where the shipped weights were made. Those were
trained by these phases and sizes, on scenes drawn one after the other from one stream of numbers; now every chunk has
its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
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

from align.diffusion.process import Prediction, add_noise
from align.families import SAMPLING_FILE, Conditioning, Family
from align.families.sd import SD
from align.families.sd3 import SD3
from align.shapes.world import COMBINATIONS, SEEN, TASKS, caption, render
from rewards.common.files import atomic

TOKENS = 12  # the longest caption has ten words
CHUNK = 1024  # scenes rendered by one process at a time
Draw = Callable[[int], tuple[Tensor, ...]]  # a step's number to its batch
Loss = Callable[..., Tensor]  # a batch to its loss


def scenes(
    rng: np.random.Generator, count: int, pairs: tuple[tuple[str, str], ...] = SEEN
) -> tuple[list[str], np.ndarray]:
    """``count`` captions and their pictures, (count, 3, 64, 64) uint8, tasks in equal share."""
    captions = [caption(rng, TASKS[rng.integers(len(TASKS))], pairs) for _ in range(count)]
    pictures = np.stack([render(rng, text) for text in captions])
    return captions, np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))


def signed(pictures: np.ndarray) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1], the autoencoder's own range."""
    return torch.from_numpy(pictures).float() / 127.5 - 1


def eager(loss: Loss, module: nn.Module, _: tuple[Tensor, ...]) -> Loss:
    """``loss`` that leaves its gradient in ``module``."""

    def run(*batch: Tensor) -> Tensor:
        module.zero_grad(set_to_none=True)
        value = loss(*batch)
        value.backward()
        return value

    return run


def captured(loss: Loss, module: nn.Module, example: tuple[Tensor, ...]) -> Loss:
    """The same as one CUDA graph: a step of models so small is thousands of kernels of some microseconds each, and
    launching them one by one would take several times as long as they do."""
    run, static = eager(loss, module, example), tuple(tensor.clone() for tensor in example)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # libraries set themselves up at their first calls, which a graph must not record
        for _ in range(3):
            run(*static)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    module.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        value = run(*static)  # its gradients live where the graph will write them again

    def replay(*batch: Tensor) -> Tensor:
        for place, tensor in zip(static, batch, strict=True):
            place.copy_(tensor)
        graph.replay()
        return value

    return replay


def fit(
    name: str,
    module: nn.Module,
    draw: Draw,
    loss: Loss,
    steps: int,
    learning_rate: float,
    work: Path,
    ema: float = 0.0,
    every: int = 500,
) -> None:
    """Minimise ``loss(*draw(step))`` over ``module`` with AdamW, warm-up and cosine decay; resume from
    ``work/name.pt``, written ``every`` so many steps. With ``ema`` the module ends with the average of its weights.
    """
    checkpoint = work / f"{name}.pt"
    optimiser = torch.optim.AdamW(
        module.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
    )
    shadow = [p.detach().clone() for p in module.parameters()] if ema else []
    device, start = next(module.parameters()).device, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        shadow, start = state["shadow"], state["step"]
    module.train()
    if start < steps:
        gradient = (captured if device.type == "cuda" else eager)(loss, module, draw(start))
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5)
    for step in bar:
        scale = min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * max(scale, 0.01)
        value = gradient(*draw(step))
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        if ema:
            torch._foreach_lerp_(
                shadow, [p.detach() for p in module.parameters()], 1 - min(ema, (step + 1) / (step + 10))
            )
        if step % 100 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}")
        if (step + 1) % every == 0 or step + 1 == steps:
            state = {
                "module": module.state_dict(),
                "optimiser": optimiser.state_dict(),
                "shadow": shadow,
                "step": step + 1,
            }
            with atomic(checkpoint) as draft:
                torch.save(state, draft)
    for parameter, average in zip(module.parameters(), shadow, strict=False):
        parameter.data.copy_(average)
    module.eval().zero_grad(set_to_none=True)


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


def train_vae(work: Path, seed: int, steps: int, polish_steps: int, device: torch.device) -> AutoencoderKL:
    """The autoencoder: L1 + L2 reconstruction, weak KL, on scenes drawn anew at every step.

    Trained on :data:`SEEN` alone it paints a purple star red, so it is polished on every combination: like a real
    pipeline's autoencoder it has seen more than its denoiser has, which still never meets a held-out combination.
    """
    torch.manual_seed(seed)
    vae = new_vae().to(device)

    def loss(x: Tensor, eps: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.mean + posterior.std * eps.to(posterior.std.dtype)).sample
        error = y.float() - x
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return error.abs().mean() + 2 * error.square().mean() + 1e-4 * kl

    def batches(stage: int, pairs: tuple[tuple[str, str], ...]) -> Draw:
        def draw(step: int) -> tuple[Tensor, ...]:
            rng = np.random.default_rng([seed, stage, step])
            x = signed(scenes(rng, 32, pairs)[1])
            noise = torch.Generator().manual_seed(int(rng.integers(2**62)))
            return x.to(device), torch.randn(len(x), 4, 8, 8, generator=noise).to(device)

        return draw

    fit("vae", vae, batches(0, SEEN), loss, steps, 3e-3, work)
    fit("vae-polish", vae, batches(len(COMBINATIONS), COMBINATIONS), loss, polish_steps, 2e-3, work)
    with torch.no_grad():
        held = signed(scenes(np.random.default_rng([seed, 1]), 1024, COMBINATIONS)[1]).to(device)
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


def _chunk(key: tuple[int, ...]) -> tuple[list[str], np.ndarray]:
    """CHUNK captions and their pictures by the random numbers of ``key``. Runs in a forked process, where torch's
    threads would wait for ever."""
    return scenes(np.random.default_rng(key), CHUNK)


def examples(vae: AutoencoderKL, work: Path, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """``count`` scenes, a multiple of CHUNK: the tokens of their captions (count, TOKENS), and their latents
    (count, 4, 8, 8) in the denoiser's scale. Rendered by all cores and encoded once, kept in ``work``."""
    cache = work / f"examples-{seed}-{count}.pt"
    if not cache.exists():
        captions, latents = [], []
        with multiprocessing.Pool() as pool, torch.no_grad():
            keys = [(seed, 2, number) for number in range(count // CHUNK)]
            for texts, pictures in tqdm(pool.imap(_chunk, keys), total=len(keys), desc="scenes"):
                captions += texts
                parts = signed(pictures).to(vae.device).split(256)
                mean = torch.cat([vae.encode(part).latent_dist.mean for part in parts])
                latents.append(mean.cpu() * vae.config.scaling_factor)
        state = {"ids": tokens(new_tokenizer(), captions), "latents": torch.cat(latents)}
        with atomic(cache) as draft:
            torch.save(state, draft)
    state = torch.load(cache, weights_only=True)
    return state["ids"], state["latents"]


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """(len(texts), TOKENS), as a pipeline would ask its tokenizer for them."""
    ids: Tensor = tokenizer(
        texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def conditions(family: Family, ids: Tensor) -> Conditioning:
    """What ``family.encode`` makes of the captions with these tokens; without a look at any number, so a CUDA graph can
    hold it."""
    pipe = family.pipe
    if isinstance(family, SD):
        return Conditioning({"prompt_embeds": pipe.text_encoder(ids).last_hidden_state})
    said = [encoder(ids, output_hidden_states=True) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    clip = torch.cat([out.hidden_states[-2] for out in said], -1)
    t5 = clip.new_zeros(len(ids), 1, pipe.transformer.config.joint_attention_dim)
    clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    return Conditioning(
        {"prompt_embeds": torch.cat([clip, t5], 1), "pooled": torch.cat([out.text_embeds for out in said], -1)}
    )


def train_denoiser(
    name: str,
    family: Family,
    data: tuple[Tensor, Tensor],
    work: Path,
    seed: tuple[int, int],
    steps: int,
    batch: int,
    every: int,
) -> None:
    """Plain denoising loss in the family's own coordinate; denoiser and text encoders learn together.

    One caption in ten becomes the empty prompt, so that classifier-free guidance works.
    """
    encoders = [
        family.pipe.components[key] for key in ("text_encoder", "text_encoder_2") if key in family.pipe.components
    ]
    module = nn.ModuleList([family.denoiser, *encoders]).requires_grad_(True)
    captions, latents = data
    nothing = tokens(family.pipe.tokenizer, [""])

    def draw(step: int) -> tuple[Tensor, ...]:
        draws = torch.Generator().manual_seed(int(np.random.default_rng([*seed, step]).integers(2**62)))
        rows = torch.randint(len(captions), (batch,), generator=draws)
        ids = torch.where(torch.rand(batch, 1, generator=draws) < 0.1, nothing, captions[rows])
        x0, eps = latents[rows], torch.randn(batch, *latents.shape[1:], generator=draws)
        t = family.sample_timesteps(torch.rand(batch, generator=draws))
        return tuple(x.to(family.device, non_blocking=True) for x in (ids, x0, eps, t, *family.path(t)))

    def loss(ids: Tensor, x0: Tensor, eps: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        x_t = add_noise(x0, eps, alpha, sigma)
        prediction = Prediction(
            family.forward(x_t, t, conditions(family, ids)), x_t, alpha, sigma, family.prediction_type
        )
        return F.mse_loss(prediction.raw, prediction.target(x0, eps))

    fit(name, module, draw, loss, steps, 1.5e-3, work, ema=0.999, every=every)


def half(pipe: DiffusionPipeline, folder: Path) -> None:
    """Save the pipeline in float16 safetensors: all of it or nothing.

    Loaded without a dtype, diffusers' own models come up in float32 but transformers' in the dtype of their config;
    so that config says float32, lest the text encoder's halves meet the denoiser's floats.
    """
    with atomic(folder) as draft:
        pipe.to(dtype=torch.float16).save_pretrained(draft, safe_serialization=True)
        for config in draft.glob("text_encoder*/config.json"):
            config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
        (draft / SAMPLING_FILE).write_text(json.dumps({"guidance_scale": 3.0, "num_inference_steps": 20}) + "\n")


# each denoiser's phases and their shift: the flow model first learns to draw, then composition, which is decided at
# high noise, where a shifted schedule spends more of its steps (Esser et al. 2024, §5.3.2), then at all noise levels
# alike again, for sharp edges and pure colours; it is shipped with the shifted one
PHASES: dict[str, dict[str, float | None]] = {
    "shapes-sd": {"shapes-sd": None},
    "shapes-sd3": {"shapes-sd3": 1.0, "shapes-sd3-shifted": 3.0, "shapes-sd3-sharp": 1.0},
}


def train_pipeline(
    name: str, vae: AutoencoderKL, data: tuple[Tensor, Tensor], steps: Mapping[str, int], args: argparse.Namespace
) -> None:
    """Train one of the two pipelines, ``steps`` of each phase, and save it after its last."""
    torch.manual_seed(args.seed)
    build, cls = (new_sd3, SD3) if name == "shapes-sd3" else (new_sd, SD)
    pipe = build(copy.deepcopy(vae), new_tokenizer())
    components = dict(pipe.components)
    family = cls(pipe.to(args.device), name)
    phases = list(PHASES[name].items())[: args.phases]
    for number, (phase, shift) in enumerate(phases):
        if shift is not None:
            pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=shift))
        key = (args.seed, 3 + number)
        train_denoiser(phase, family, data, args.work, key, steps[phase], args.batch, args.checkpointing_steps)
    if len(phases) < len(PHASES[name]):
        return
    if isinstance(family, SD3):
        components["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.register_modules(**components)  # the family may have set a silent T5 aside
    half(pipe.to("cpu"), args.output / name)


def side_by_side(vae: Path, cores: int) -> None:
    """Train the first phase of both denoisers at the same time, each by this command in a process of its own with its
    share of the cores, on the autoencoder in folder ``vae`` and the scenes that are there by now: a step of models so
    small is not twice as fast on two cores (shapes-sd3's bars: 2.6 a second here, 3.5 later with both).
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the children end as well
    children = []
    try:
        for number, name in enumerate(PHASES):
            share = {"OMP_NUM_THREADS": str(max(1, cores // len(PHASES))), "TQDM_POSITION": str(number)}
            only = ["--only", name, "--phases", "1", "--vae", str(vae)]
            words = [sys.executable, "-m", "align.shapes.scripts.pretrain", *sys.argv[1:], *only]
            children.append(subprocess.Popen(words, env=os.environ | share))
        failed = [name for name, child in zip(PHASES, children, strict=True) if child.wait()]
    finally:
        for child in children:
            child.terminate()
    if failed:
        sys.exit(f"training {' and '.join(failed)} ended in an error, which is above; run this command again to resume")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("align/shapes"), help="the two pipeline folders go here")
    parser.add_argument("--work", type=Path, default=Path("outputs/pretrain"), help="checkpoints while training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--scenes", type=int, default=32768, help=f"a multiple of {CHUNK}")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--vae", type=Path, help="the folder of a trained autoencoder, to train none")
    parser.add_argument("--only", choices=tuple(PHASES), help="train just one of the two denoisers")
    longest = max(len(phases) for phases in PHASES.values())
    parser.add_argument(
        "--phases",
        type=int,
        choices=range(1, longest + 1),
        help="stop each denoiser after so many; a pipeline is saved after its last",
    )
    parser.add_argument("--vae_steps", type=int, default=2600)
    parser.add_argument("--polish_steps", type=int, default=1000)
    parser.add_argument("--sd_steps", type=int, default=5000)
    parser.add_argument("--sd3_steps", type=int, default=6000)
    parser.add_argument("--sd3_shifted_steps", type=int, default=4500)
    parser.add_argument("--sd3_sharp_steps", type=int, default=6000)
    args = parser.parse_args()
    if args.scenes % CHUNK or args.scenes <= 0:
        parser.error(f"--scenes is {args.scenes}; expected a multiple of {CHUNK}")
    args.work.mkdir(parents=True, exist_ok=True)
    if args.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if args.vae:
        vae = AutoencoderKL.from_pretrained(args.vae).to(args.device)
    else:
        vae = train_vae(args.work, args.seed, args.vae_steps, args.polish_steps, args.device)
    data = examples(vae, args.work, args.seed, args.scenes)
    names = [args.only] if args.only else list(PHASES)
    cores = os.cpu_count() or 1
    if args.device.type == "cpu" and not args.only and not args.phases and cores > 1:
        if not args.vae:
            vae.save_pretrained(args.work / "vae")
        side_by_side(args.vae or args.work / "vae", cores)
        names = [name for name, phases in PHASES.items() if len(phases) > 1]  # they go on, with all cores
    steps = {
        "shapes-sd": args.sd_steps,
        "shapes-sd3": args.sd3_steps,
        "shapes-sd3-shifted": args.sd3_shifted_steps,
        "shapes-sd3-sharp": args.sd3_sharp_steps,
    }
    for name in names:
        train_pipeline(name, vae, data, steps, args)


if __name__ == "__main__":
    main()
