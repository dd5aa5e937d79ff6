"""Large models on a GPU: a Diffusion-DPO step by LoRA and by QLoRA, eager and compiled, and its peak beside the traced.

    python tests/benchmarks/gpu_scale.py --deadline 460        # writes results/scale_gpu.json
    python tests/benchmarks/gpu_scale.py --tiny                # the same code in seconds, for a CPU; only printed

SDXL and FLUX.1-dev of the published architecture (:mod:`tests.benchmarks.config_folders`) with random weights, 1024
pixels, bf16, LoRA of rank 16, gradient checkpointing, one pair: latents and embeddings are made up, so neither the
autoencoder nor a text encoder is there, and the traced peak is that of an update without them. A step is the
objective's loss, backward, clipping and AdamW (of QLoRA in 8 bit, on an NF4 base). ``utilization`` is the operations of
a step, those of recomputing in them (torch's ``FlopCounterMode``), a second, over those of a product of two bf16
matrices of 8,192. Last, SD3.5-medium's Flow-GRPO with compiled blocks, as ``gpu_online.py`` measures it.
"""

from __future__ import annotations

# ruff: noqa: E402
import time

START = time.monotonic()  # before the imports, for which a deadline has to pay too

import argparse
import json
import statistics
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import rewards  # isort: skip  first of all: it makes torchvision importable beside a CPU torch

import torch
from diffusers.utils import logging as diffusers_logging
from torch.utils.flop_counter import FlopCounterMode

from align import families
from align.data.preferences import PairBatch
from align.families.blank import blank, captions
from align.families.loading import quantized
from align.objectives import Context
from align.policy.compiled import compile_blocks
from align.policy.policy import Policy
from align.training.config import TrainConfig
from align.training.ledger import Part
from align.training.memory import trace
from align.training.optimizer import build_optimizer
from tests import tiny_families
from tests.benchmarks import RESULTS, config_folders, gpu_online, record
from tests.benchmarks.memory import config_of

assert rewards
GIB = 2**30
STEPS = 4  # timed, after one that warms up
MODELS = {"SDXL": "sdxl", "FLUX.1 dev": "flux-dev"}  # and the tiny one
# what matters most comes first: the deadline cuts off the end
ORDER = [
    *[(model, base, "eager") for model in MODELS for base in ("LoRA", "QLoRA")],
    *[(model, "LoRA", "compiled") for model in MODELS],
]


def settings(model: Path, root: Path, base: str, tiny: bool) -> TrainConfig:
    """The run whose update is measured, and traced."""
    more: dict[str, Any] = {"quantize": "nf4", "use_8bit_adam": torch.cuda.is_available()} if base == "QLoRA" else {}
    precision, side = ("no", 64) if tiny else ("bf16", 1024)
    both = {"mixed_precision": precision, "gradient_checkpointing": True, "train_batch_size": 1, "lora": {"rank": 16}}
    return config_of(model, "DPO", root, resolution=side, **both, **more)


def on(device: torch.device, module: torch.nn.Module) -> None:
    """Give a module without weights small random ones on ``device``."""
    module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_(0, 0.02, generator=generator)


class Step:
    """An update of ``config`` on random weights."""

    def __init__(self, config: TrainConfig, device: torch.device, compiled: bool) -> None:
        self.config, self.device = config, device
        self.dtype = families.DTYPES[config.precision]
        self.family = family = blank(config.pretrained_model_name_or_path, config.frozen)
        on(device, family.denoiser)
        family.pipe.vae.to_empty(device="cpu")  # whose weights nobody reads
        if config.quantize:
            quantized(family.denoiser)
            family.denoiser.to(device)
        self.policy = Policy(family, config.lora, True, 0.0, config.gradient_checkpointing)
        if compiled:
            compile_blocks(family.denoiser)
        self.optimizer = build_optimizer(config, self.policy, config.learning_rate)
        shape = family.latent_shape(*(2 * [config.data.resolution]))
        noise = torch.Generator().manual_seed(1)
        latents = torch.randn(1, 2, *shape, generator=noise)
        self.batch = PairBatch(latents, captions(family, 1), [""], [0])
        self.number = 0

    def __call__(self) -> float:
        """One update; returns its loss."""
        context = Context(self.policy, 0, self.number, range(1), resolution=self.config.data.resolution)
        rows = self.config.objective.rollout(context, self.batch)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss, _ = self.config.objective.loss(context, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.number += 1
        return loss.item()


def seconds_of(call: Any, device: torch.device) -> float:
    """Seconds of one call, the GPU's work in them."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matmul_rate(device: torch.device, tiny: bool) -> float:
    """Operations a second of a product of two square matrices in bf16, the best of ten."""
    side = 256 if tiny else 8192
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / min(seconds_of(lambda: a @ b, device) for _ in range(10))


def traced(config: TrainConfig) -> int:
    """Bytes of the update's peak, without text encoders and autoencoder."""
    update = next(phase for phase in trace(config).phases if phase.name == "update")
    return sum(size for part, size in update.parts.items() if part not in (Part.TEXT, Part.VAE))


def measure(model: str, base: str, variant: str, tiny: bool, root: Path, rate: float) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = tiny_families.save(MODELS[model], root / model) if tiny else config_folders.write(model, root)
    config = settings(folder, root, base, tiny)
    figures: dict[str, Any] = {"traced_gib": round(traced(config) / GIB, 3)}
    step = Step(config, device, variant == "compiled")
    figures["parameters"] = sum(p.numel() for p in step.family.denoiser.parameters())
    figures["first_s"] = round(seconds_of(step, device), 3)  # what compiling takes is in it
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [seconds_of(step, device) for _ in range(1 if tiny else STEPS)]
    if device.type == "cuda":
        figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
        figures["traced_over_measured"] = round(figures["traced_gib"] / figures["peak_gib"], 3)
    figures |= {"step_s": round(statistics.median(times), 4), "steps": [round(t, 4) for t in times]}
    if variant == "eager":
        with FlopCounterMode(display=False) as counter:
            step()
        figures["flops"] = counter.get_total_flops()
        figures["utilization"] = round(figures["flops"] / figures["step_s"] / rate, 3)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", "--quick", action="store_true", help="small models, float32, for a CPU")
    parser.add_argument("--deadline", type=float, default=460.0, help="seconds from the start; what is left is skipped")
    names = ["/".join(entry) for entry in ORDER]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="MEASUREMENT", help=", ".join(names))
    args = parser.parse_args()
    diffusers_logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = matmul_rate(device, args.tiny)
    figures: dict[str, Any] = {"matmul_tflops": round(rate / 1e12, 4), "measurements": {}, "failed": {}, "skipped": []}

    def attempt(name: str, call: Any) -> None:
        if time.monotonic() - START > args.deadline:
            figures["skipped"].append(name)
            return
        print(f"{time.monotonic() - START:6.1f} s  {name}", flush=True)
        try:
            with gpu_online.until(START + args.deadline):
                figures["measurements"][name] = call()
            print(f"  {json.dumps(figures['measurements'][name])}", flush=True)
        except (Exception, SystemExit):  # one that fails must not cost the others
            figures["failed"][name] = traceback.format_exc().strip().splitlines()[-8:]
            print("  failed:", *figures["failed"][name], sep="\n    ", flush=True)
        gpu_online.free()
        figures["seconds"] = round(time.monotonic() - START, 1)
        record(str(RESULTS / "scale_gpu"), figures, quick=args.tiny)

    def online() -> dict[str, Any]:
        found: dict[str, Any] = {}
        case = gpu_online.CASES["sd35_medium_flow_grpo"]
        gpu_online.measure(case, "compiled", args.tiny, "no" if args.tiny else "bf16", found, lambda: None)
        return found

    with tempfile.TemporaryDirectory() as folder:
        for model, base, variant in ORDER:
            name = f"{model}/{base}/{variant}"
            if name in args.only:
                root = Path(folder) / name.replace(" ", "-")
                root.mkdir(parents=True)
                attempt(name, lambda m=model, b=base, v=variant, r=root: measure(m, b, v, args.tiny, r, rate))
        if args.only == names:
            attempt("SD3.5 medium/Flow-GRPO/compiled", online)
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
