"""Online training of full-size models on a GPU: pictures a second, trained rows a second, and what both hold.

    python tests/benchmarks/gpu_online.py --deadline 125        # writes results/online_gpu.json
    python tests/benchmarks/gpu_online.py --tiny                # the same code in seconds, for a CPU; only printed

Flow-GRPO of SD3.5-medium and DDPO of SD1.5, by the loop that trains and with their own configs
(``flow_grpo_sd35.yaml``, ``ddpo_sd15.yaml``): 512 pixels, steps, guidance, LoRA, micro-batches, gradient checkpointing
as there. What differs from a real run:

- Weights are random, the text encoders two small layers of the right widths. The denoiser and the VAE are of the real
  architectures, and so are the shapes of the conditions: SD3.5 333 tokens of 4096 and 2048 pooled, SD1.5 77 of 768.
- The precision is bf16. The reward is the pictures' brightness, which costs nothing, and no features are compared.
- A rollout is one prompt and one batch of pictures, an update a few micro-batches, so that they can be repeated.

Each is measured as it is (``eager``); with LoRA layers that leave the cast of their inputs to autocast, where peft
makes float32 of them first (``uncast``); and with the repeated blocks of the denoiser compiled (``compiled``). There
the first block, whose input needs no gradient, and the last, SD3's without a text output and the U-Net's at 8 x 8, stay
eager: each would cost graphs of its own. ``compile_s`` is what the first call took longer than the next, with a cold
cache. Every figure is the median of whole calls, the GPU's work in them; the peaks are PyTorch's allocations.
"""

from __future__ import annotations

# ruff: noqa: E402
import time

START = time.monotonic()  # before the imports, for which a deadline has to pay too

import argparse
import gc
import json
import os
import signal
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parents[2]))

import rewards  # isort: skip  first of all: it makes torchvision importable beside a CPU torch

import torch
import torch._dynamo
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from torch._dynamo.utils import counters
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

from align import families
from align.common.command import parse
from align.families import Family
from align.families.sd import SD
from align.families.sd3 import SD3
from align.objectives.policy_gradient import PolicyGradient
from align.shapes.scripts import pretrain
from align.training.config import TrainConfig
from align.training.trainer import Trainer
from tests.benchmarks import RESULTS, record
from tests.benchmarks.sizes import SD35_LARGE

assert rewards
ROOT = Path(__file__).parents[2]
GIB = 2**30
WARM_STEPS = 2  # sampler steps of the rollouts that only warm up
ROLLOUTS = 2  # timed rollouts of all steps, besides the one that is then trained on
UPDATES = 3  # timed updates, after one that warms up
PROMPT = "a photo of an astronaut riding a horse on mars"

SD35_MEDIUM = SD35_LARGE[2] | {  # stabilityai/stable-diffusion-3.5-medium, transformer
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
}
SD35_TINY = SD35_MEDIUM | {
    "sample_size": 8,
    "num_layers": 6,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 128,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (0, 1, 2),
}
SD15: dict[str, Any] = {  # stable-diffusion-v1-5/stable-diffusion-v1-5, unet
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "attention_head_dim": 8,  # diffusers' name for the number of heads
    "cross_attention_dim": 768,
}
SD15_TINY = SD15 | {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16, 16),
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
    "norm_num_groups": 4,
}


class Brightness:
    """A reward that costs nothing and yet differs from picture to picture."""

    differentiable: ClassVar[bool] = True

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        return images.mean((1, 2, 3))


# models of random weights, made where they are used
def new_tokenizer() -> CLIPTokenizer:
    tokenizer = pretrain.new_tokenizer()
    tokenizer.model_max_length = 77
    return tokenizer


def new_text_encoder(tokenizer: CLIPTokenizer, width: int, cls: type[PreTrainedModel]) -> PreTrainedModel:
    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_vae(tiny: bool, **config: Any) -> AutoencoderKL:
    widths = (8,) * 4 if tiny else (128, 256, 512, 512)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=2,
        norm_num_groups=4 if tiny else 32,
        **config,
    )


def new_sd35(tiny: bool, device: torch.device, dtype: torch.dtype) -> Family:
    config = SD35_TINY if tiny else SD35_MEDIUM
    with torch.device(device):  # weights are drawn, and position tables computed, by the device itself
        transformer = SD3Transformer2DModel(**config)
        vae = new_vae(
            tiny,
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    tokenizer = new_tokenizer()
    narrow, wide = (32, 32) if tiny else (768, 1280)
    small = T5Config(vocab_size=4, d_model=config["joint_attention_dim"], d_kv=8, d_ff=8, num_layers=2, num_heads=1)
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=new_text_encoder(tokenizer, narrow, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        text_encoder_2=new_text_encoder(tokenizer, wide, CLIPTextModelWithProjection),
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel(small),
        tokenizer_3=T5Tokenizer(vocab=words, extra_ids=0),
    )
    return SD3(pipe.to(device, dtype), "random SD3.5-medium")


def new_sd15(tiny: bool, device: torch.device, dtype: torch.dtype) -> Family:
    config = SD15_TINY if tiny else SD15
    with torch.device(device):
        unet = UNet2DConditionModel(**config)
        vae = new_vae(tiny, latent_channels=4, scaling_factor=0.18215)
    tokenizer = new_tokenizer()
    pipe = StableDiffusionPipeline(
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        vae=vae,
        text_encoder=new_text_encoder(tokenizer, config["cross_attention_dim"], CLIPTextModel),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return SD(pipe.to(device, dtype), "random SD1.5")


# what is measured
@dataclass(frozen=True)
class Case:
    """A config, how its model is built, the class of its repeated blocks, pictures of a rollout, micro-batches of an
    update. Pictures and micro-batch are the config's own sizes of a batch."""

    config: str
    build: Callable[[bool, torch.device, torch.dtype], Family]
    block: str
    pictures: int
    micro_batches: int


CASES = {
    "sd35_medium_flow_grpo": Case("flow_grpo_sd35", new_sd35, "JointTransformerBlock", 9, 2),
    "sd15_ddpo": Case("ddpo_sd15", new_sd15, "BasicTransformerBlock", 8, 4),
}
# what matters most comes first: the deadline cuts off the end
ORDER = [
    ("sd35_medium_flow_grpo", "eager"),
    ("sd15_ddpo", "eager"),
    ("sd35_medium_flow_grpo", "uncast"),
    ("sd35_medium_flow_grpo", "compiled"),
    ("sd15_ddpo", "compiled"),
    ("sd15_ddpo", "uncast"),
]


class Clock:
    """Whole calls of what it wraps, by name: seconds with the GPU's work in them, and the peak of allocated bytes."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.calls: dict[str, list[tuple[float, int]]] = {}

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            if self.cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            found = call(*arguments)
            if self.cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            self.calls.setdefault(name, []).append((seconds, torch.cuda.max_memory_allocated() if self.cuda else 0))
            return found

        return timed

    def figures(self, name: str, warm: int, count: int, what: str) -> dict[str, Any]:
        """Of the calls after the first ``warm``, each of ``count`` pictures or rows."""
        seconds, peaks = zip(*self.calls[name][warm:], strict=True)
        return {
            f"{what}_per_s": round(count / statistics.median(seconds), 3),
            what: count,
            "seconds": [round(value, 3) for value in seconds],
            "peak_gib": round(max(peaks) / GIB, 2),
        }

    def longer(self, name: str) -> float:
        """By how many seconds the first call outlasted the second."""
        (first, _), (second, _) = self.calls[name][:2]
        return round(first - second, 2)


def started(case: Case, folder: Path, tiny: bool, precision: str) -> Trainer:
    """The training loop, ready for its first rollout."""
    (folder / "prompts.txt").write_text(PROMPT + "\n")
    options = {
        "data.path": folder / "prompts.txt",
        "rewards": json.dumps([{"name": f"tests.benchmarks.{Path(__file__).stem}.{Brightness.__name__}"}]),
        "diversity_features": "null",
        "output_dir": folder / "run",
        "mixed_precision": precision,
        "objective.images_per_prompt": case.pictures,
        "rollout_batch_size": 1,
        "gradient_accumulation_steps": case.micro_batches,
        "report_to": "none",
    }
    if tiny:
        options |= {"data.resolution": 64, "objective.sampler.num_inference_steps": 16}
        options |= {"objective.images_per_prompt": 2, "train_batch_size": 2}
    words = [f"--{name}={value}" for name, value in options.items()]
    config, _ = parse(TrainConfig, "align.train", None, [f"--config={ROOT / 'configs' / case.config}.yaml", *words])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family = case.build(tiny, device, families.DTYPES[precision])
    with mock.patch.object(families, "load", return_value=family):
        loop = Trainer(config, "")
    loop.start()
    return loop


def change(loop: Trainer, case: Case, variant: str) -> int:
    """Make the loop the variant that is measured; returns how many blocks were compiled."""
    if variant == "uncast":
        for layer in loop.policy.weights.layers:
            layer.cast_input_dtype_enabled = False
    if variant != "compiled":
        return 0
    counters.clear()
    torch._dynamo.config.recompile_limit = 32  # two kinds of block, each drawn with, trained, and asked as reference
    blocks: list[nn.Module] = [m for m in loop.policy.denoiser.modules() if type(m).__name__ == case.block]
    for block in blocks[1:-1]:
        block.compile(dynamic=False)
    return len(blocks) - 2


def measure(
    case: Case, variant: str, tiny: bool, precision: str, figures: dict[str, Any], save: Callable[[], None]
) -> None:
    """Fill ``figures`` by two phases of the loop, and have them saved after each."""
    with tempfile.TemporaryDirectory() as folder:
        loop = started(case, Path(folder), tiny, precision)
        figures["parameters"] = sum(p.numel() for p in loop.policy.denoiser.parameters())
        if torch.cuda.is_available():
            figures["resident_gib"] = round(torch.cuda.memory_allocated() / GIB, 2)
        figures["compiled_blocks"] = change(loop, case, variant)
        objective, clock = loop.config.objective, Clock(loop.accelerator.device)
        assert isinstance(objective, PolicyGradient)
        objective.rollout = clock.wrap("rollout", objective.rollout)  # type: ignore[method-assign]
        loop.update = clock.wrap("training", loop.update)  # type: ignore[method-assign]

        def finish(name: str, warm: int, count: int, what: str) -> None:
            figures[name] = clock.figures(name, warm, count, what)
            if variant == "compiled":
                figures[name] |= {"compile_s": clock.longer(name), "graphs": counters["stats"]["unique_graphs"]}
                figures[name]["graph_breaks"] = sum(counters["graph_break"].values())
            save()
            print(f"  {name} {json.dumps(figures[name])}", flush=True)

        steps, loop.config.inner_epochs = objective.sampler.num_inference_steps, 0  # draws and does not train
        for some in [WARM_STEPS] * 2 + [steps] * ROLLOUTS:
            objective.sampler.num_inference_steps = some
            list(loop.rollout())
        finish("rollout", 2, loop.sizes.samples, "pictures")
        loop.config.inner_epochs = 1
        list(islice(loop.rollout(), 1 + UPDATES))
        finish("training", 1, loop.sizes.update, "rows")


@contextmanager
def until(end: float) -> Iterator[None]:
    """Raise TimeoutError within, once ``end`` of :func:`time.monotonic` is past."""

    def stop(*_: Any) -> None:
        raise TimeoutError("cut off by the deadline")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, end - time.monotonic()), 2.0)  # again, if a finaliser swallowed it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def free() -> None:
    """Give back what the last measurement held."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small models, float32, for a CPU")
    parser.add_argument("--deadline", type=float, default=125.0, help="seconds from the start; what is left is skipped")
    parser.add_argument("--output", type=Path, help="a .json file; default results/online_gpu.json")
    parser.add_argument("--mixed_precision", choices=list(families.DTYPES), help="default bf16; with --tiny, no")
    names = [f"{name}/{variant}" for name, variant in ORDER]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="MEASUREMENT", help=", ".join(names))
    args = parser.parse_args()
    diffusers_logging.set_verbosity_error()  # it warns of a cast that keeps no module in float32
    precision = args.mixed_precision or ("no" if args.tiny else "bf16")
    target = args.output.resolve().with_suffix("") if args.output else RESULTS / "online_gpu"
    figures: dict[str, Any] = {"precision": precision, "measurements": {}, "failed": {}, "skipped": []}

    def save() -> None:
        figures["seconds"] = round(time.monotonic() - START, 1)
        record(str(target), figures, quick=args.tiny and not args.output)

    for name in args.only:
        case, _, variant = name.partition("/")
        if time.monotonic() - START > args.deadline:
            figures["skipped"].append(name)
            continue
        print(f"{time.monotonic() - START:6.1f} s  {name}", flush=True)
        try:
            with until(START + args.deadline):
                mine = figures["measurements"].setdefault(name, {})
                measure(CASES[case], variant, args.tiny, precision, mine, save)
        except (Exception, SystemExit):  # one that fails must not cost the others
            figures["failed"][name] = traceback.format_exc().strip().splitlines()[-8:]
            print("  failed:", *figures["failed"][name], sep="\n    ", flush=True)
        free()
        save()
    save()
    print(f"{time.monotonic() - START:6.1f} s  done", flush=True)
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
