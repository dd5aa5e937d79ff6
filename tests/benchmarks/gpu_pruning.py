"""What pruning and NF4 save at full size, on a GPU: SD3.5-large and FLUX.1-schnell transformers, weights random.

    python tests/benchmarks/gpu_pruning.py --deadline 180 --output pruning_gpu.json
    python tests/benchmarks/gpu_pruning.py --tiny      # every line on the CPU, small models, nothing recorded

Each model in bf16 with its real config (``sizes.py``), as it is, without the blocks that the table of sizes leaves
out, in NF4, and both: bytes of weights, peak memory and seconds of one denoising step at 1024 x 1024 (SD3.5-large as
guided, a batch of 2; FLUX alone), and what quantising takes. The last is saved in a pipeline's folder and comes back by
stock diffusers, by ``pruning.load``, and built on the CPU and moved: the same bits, the same output? Set the reductions
beside the 77.5 to 80.4 % of memory and 27.9 to 38.0 % of latency that HierarchicalPrune states. Text encoders and VAE
are no part of any figure; the folder has the small ones of ``shapes-sd3``. Errors of outputs say that the arithmetic
is right, and nothing of quality: the weights are random. A measurement that fails says why and costs no other.
"""

# ruff: noqa: E402  the clock starts before the imports

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

START = time.perf_counter()  # the imports count
sys.path.insert(0, str(Path(__file__).parents[2]))

import pruning  # noqa: I001  first: it makes torchvision importable beside a CPU torch
import bitsandbytes as bnb
import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, FluxPipeline
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer
from safetensors import safe_open
from torch import Tensor, nn

from align.common.provenance import provenance
from align.common.assets import locate
from rewards.common.files import write_text
from pruning import linear4bit
from pruning import quantize as q
from tests.benchmarks import sizes
from pruning.graph import BlockGraph
from pruning.loading import build
from pruning.plan import from_ranges
from pruning.linear4bit import bytes_of
from pruning.nf4 import NF4
from pruning.quantize import quantize
from pruning.saving import save_pipeline
from tests.benchmarks import record

NAME = "pruning_gpu"
VARIANTS = ("original", "pruned", "nf4", "pruned nf4")
WARM_UP, REPEATS = 3, 10
Figures = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model, the blocks that go, and one step of it: rows, side of what the network sees, tokens of text."""

    model: sizes.Architecture
    gone: tuple[str, ...]
    batch: int
    side: int
    text: int


CASES = {
    "SD3.5-large": Case(sizes.SD35_LARGE, sizes.EIGHT_BLOCKS, batch=2, side=128, text=333),
    "FLUX.1-schnell": Case(sizes.FLUX_SCHNELL, sizes.FLUX_THIRD, batch=1, side=64, text=512),
}


def shrunk(model: sizes.Architecture, **changes: Any) -> sizes.Architecture:
    return model[0], model[1], model[2] | {"joint_attention_dim": 64, "pooled_projection_dim": 64} | changes


SMALL_SD3 = {"sample_size": 8, "num_layers": 4, "num_attention_heads": 2, "caption_projection_dim": 128}
TINY = {
    "SD3.5-large": Case(
        shrunk(sizes.SD35_LARGE, pos_embed_max_size=8, **SMALL_SD3),
        ("transformer_blocks.1", "transformer_blocks.2"),
        batch=2,
        side=8,
        text=5,
    ),
    "FLUX.1-schnell": Case(
        shrunk(sizes.FLUX_SCHNELL, num_layers=2, num_single_layers=3, num_attention_heads=2),
        ("transformer_blocks.1", "single_transformer_blocks.1"),
        batch=1,
        side=4,
        text=5,
    ),
}


# the machine
def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak(begin: bool = False) -> int | None:
    """Bytes at the peak since the last ``begin``; None where there is no GPU."""
    if not torch.cuda.is_available():
        return None
    synchronize()
    if begin:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def timed(act: Callable[[], Any]) -> tuple[Any, float]:
    synchronize()
    start = time.perf_counter()
    result = act()
    synchronize()
    return result, time.perf_counter() - start


def attempt(measure: Callable[[], Figures]) -> Figures:
    """Its figures, or the last lines of what went wrong; the GPU is empty before and after but for what is in use."""
    try:
        return measure()
    except Exception as error:
        lines = traceback.format_exc().strip().splitlines()[-6:]
        print(f"  failed: {type(error).__name__}: {error}", flush=True)
        return {"error": lines}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# the models
def fresh(model: sizes.Architecture, device: str, dtype: torch.dtype) -> Any:
    """The denoiser with random weights, made where they stay, the same ones every time; buffers are computed."""
    library, name, config = model
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device), init_empty_weights(include_buffers=False):
        denoiser = getattr(library, name)(**config)
    for module in denoiser.modules():
        for key, empty in list(module.named_parameters(recurse=False)):
            value = torch.empty(empty.shape, device=device, dtype=dtype).normal_(0, 0.02, generator=generator)
            if key == "weight" and empty.dim() == 1:  # of a norm
                value += 1
            setattr(module, key, nn.Parameter(value, requires_grad=False))
    nn.Module.to(denoiser, dtype=dtype)  # the buffers, as from_pretrained does
    return denoiser.eval()


def inputs(case: Case, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What one step takes."""
    config, generator = case.model[2], torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn((case.batch, *shape), generator=generator, device=device, dtype=dtype)

    given = {
        "encoder_hidden_states": normal(case.text, config["joint_attention_dim"]),
        "pooled_projections": normal(config["pooled_projection_dim"]),
    }
    channels, half = config["in_channels"], torch.full((case.batch,), 0.5, device=device)
    if case.model[1] == "SD3Transformer2DModel":
        return given | {"hidden_states": normal(channels, case.side, case.side), "timestep": 1000 * half}
    places = torch.zeros(case.side, case.side, 3, device=device, dtype=dtype)
    places[..., 1] += torch.arange(case.side, device=device)[:, None]
    places[..., 2] += torch.arange(case.side, device=device)
    given |= {"guidance": 7 * half} if config["guidance_embeds"] else {}
    return given | {
        "hidden_states": normal(case.side**2, channels),
        "timestep": half,
        "img_ids": places.flatten(0, 1),
        "txt_ids": torch.zeros(case.text, 3, device=device, dtype=dtype),
    }


def prune(denoiser: Any, gone: tuple[str, ...], name: str) -> Figures:
    """Plan by hand and remove. The graph is let go with this function: it holds every block that was there."""
    graph = BlockGraph.of(denoiser)
    plan = from_ranges(graph, ",".join(gone), name)
    plan.fits(graph)
    graph.remove(plan.dropped)
    return {"blocks": len(graph.blocks), "dropped": len(plan.dropped), "parameters_planned": plan.after}


def pack(denoiser: Any, settings: NF4) -> Figures:
    """Quantise where it stands; the peak includes the weights that it begins with."""
    before = peak(begin=True)
    report, seconds = timed(lambda: quantize(denoiser, settings))
    return {
        "quantising": {"seconds": seconds, "bytes_before": before, "peak_bytes": peak()},
        "linears": len(report.layers),
        "linears_quantised": len(report.quantised),
    }


def differing(denoiser: nn.Module, file: Path) -> list[str]:
    """The tensors of ``denoiser`` that are not, to the bit, those of ``file``; and those that only one of them has."""
    state = denoiser.state_dict()
    with safe_open(file, "pt") as tensors:
        names = set(tensors.keys())
        wrong = names ^ state.keys()
        for name in names & state.keys():
            saved = tensors.get_tensor(name)
            here = state[name]
            if saved.dtype != here.dtype or not torch.equal(saved.to(here.device), here):
                wrong.add(name)
    return sorted(wrong)


def difference(found: Tensor, expected: Tensor | None) -> float | None:
    """Relative, in the 2-norm; None where the other was not measured."""
    if expected is None:
        return None
    return float((found.double() - expected.double()).norm() / expected.double().norm())


class Bench:
    """The measurements of one model. Every one builds what it needs, so that none needs another, but for the folder
    that the last variant leaves to those that load it."""

    def __init__(self, name: str, case: Case, where: Path, device: str, dtype: torch.dtype) -> None:
        self.name, self.case, self.device, self.dtype = name, case, device, dtype
        self.folder = where / name
        self.settings = NF4(compute_dtype="bfloat16" if dtype == torch.bfloat16 else "float32")
        self.outputs: dict[str, Tensor] = {}

    def measurements(self, loaders: tuple[str, ...]) -> dict[str, Callable[[], Figures]]:
        found: dict[str, Callable[[], Figures]] = {name: partial(self.variant, name) for name in VARIANTS}
        load = {"stock": self.by_stock, "built on the CPU": self.by_build, "pruning.load": self.by_load}
        return found | {name: load[name] for name in loaders}

    def variant(self, name: str) -> Figures:
        denoiser, seconds = timed(lambda: fresh(self.case.model, self.device, self.dtype))
        figures: Figures = {"building_seconds": seconds}
        if "pruned" in name:
            figures |= prune(denoiser, self.case.gone, self.name)
        figures["parameters"] = sum(p.numel() for p in denoiser.parameters())
        if "nf4" in name:
            figures |= pack(denoiser, self.settings)
        figures["weights_bytes"] = bytes_of(denoiser)
        gc.collect()
        figures["step"] = attempt(lambda: self.step(denoiser, name))
        if name == "pruned nf4":
            figures["saving"] = attempt(lambda: self.save(denoiser))
        return figures

    def output(self, denoiser: Any) -> Tensor:
        with torch.no_grad():
            return denoiser(**inputs(self.case, self.device, self.dtype), return_dict=False)[0].cpu()

    def step(self, denoiser: Any, name: str) -> Figures:
        given, times = inputs(self.case, self.device, self.dtype), []
        with torch.no_grad():
            for _ in range(WARM_UP + REPEATS):
                times.append(timed(lambda: denoiser(**given, return_dict=False))[1])
            before = peak(begin=True)
            result = denoiser(**given, return_dict=False)[0]
        figures: Figures = {"bytes_before": before, "peak_bytes": peak(), "seconds": statistics.median(times[WARM_UP:])}
        self.outputs[name] = result.cpu()
        figures |= {"seconds_all": times, "finite": bool(result.isfinite().all())}
        if "nf4" in name:
            plain = self.outputs.get(name.removesuffix("nf4").strip() or "original")
            figures["off_bf16"] = difference(self.outputs[name], plain)
        return figures

    def save(self, denoiser: Any) -> Figures:
        """A whole pipeline's folder: this denoiser, the rest from ``shapes-sd3``."""
        small: Any = DiffusionPipeline.from_pretrained(locate("shapes-sd3"), dtype=self.dtype)
        small.register_modules(transformer=denoiser)
        if self.case.model[1] == "FluxTransformer2DModel":
            small = FluxPipeline(
                scheduler=small.scheduler,
                vae=small.vae,
                text_encoder=small.text_encoder,
                tokenizer=small.tokenizer,
                text_encoder_2=small.text_encoder_3,
                tokenizer_2=small.tokenizer_3,
                transformer=denoiser,
            )
        _, seconds = timed(lambda: save_pipeline(small, self.folder))
        return {"seconds": seconds, "file_bytes": self.file.stat().st_size, "differing": differing(denoiser, self.file)}

    @property
    def file(self) -> Path:
        return self.folder / "transformer/diffusion_pytorch_model.safetensors"

    # and back
    def same(self, denoiser: Any) -> Figures:
        """Whether it is what was saved, and computes what that did."""

        def run() -> Figures:
            found, before = self.output(denoiser), self.outputs.get("pruned nf4")
            same = None if before is None else torch.equal(found, before)
            return {"off": difference(found, before), "equal": same}

        return {
            "device": str(denoiser.device),
            "tensors": attempt(lambda: {"differing": differing(denoiser, self.file)}),
            "output": attempt(run),
        }

    def by_stock(self) -> Figures:
        peak(begin=True)
        pipe, seconds = timed(lambda: DiffusionPipeline.from_pretrained(self.folder, dtype=self.dtype))
        layers = [m for m in pipe.transformer.modules() if isinstance(m, bnb.nn.Linear4bit)]
        kinds = sorted({f"{type(m).__module__}.{type(m).__name__}" for m in layers})
        figures: Figures = {"seconds": seconds, "peak_bytes": peak(), "layers": len(layers), "classes": kinds}
        return figures | {"pipeline": type(pipe).__name__, **self.same(pipe.transformer)}

    def by_build(self) -> Figures:
        denoiser, seconds = timed(lambda: build(self.folder / "transformer"))
        _, moving = timed(lambda: denoiser.to(self.device))
        return {"seconds": seconds, "moving_seconds": moving, **self.same(denoiser)}

    def by_load(self) -> Figures:
        pipe, seconds = timed(lambda: pruning.load(self.folder))
        before = devices(pipe)
        pipe.to(self.device)
        return {
            "seconds": seconds,
            "devices_as_loaded": before,
            "devices": devices(pipe),
            **self.same(pipe.transformer),
        }


# what else nothing has been run on
def devices(pipe: Any) -> dict[str, str]:
    return {name: str(part.device) for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def layer(shape: tuple[int, int], double: bool, device: str) -> Figures:
    """One Linear in bf16: packed here and there, and the one packed here moved there; few and many rows."""
    torch.manual_seed(0)
    settings = NF4(double)
    linear = nn.Linear(shape[1], shape[0]).bfloat16().requires_grad_(False)
    here = linear4bit.pack(linear, settings).eval()
    weight, codes = linear4bit.unpacked(here.weight, torch.float32), here.weight.data.clone()
    rows = [torch.randn(count, shape[1], dtype=torch.bfloat16) for count in (2, 600)]
    expected = [here(x) for x in rows]
    there = linear4bit.pack(linear.to(device), settings).eval()
    moved = here.to(device)

    def off(layer: Any) -> list[float | None]:
        return [difference(layer(x.to(device)).cpu(), y) for x, y in zip(rows, expected, strict=True)]

    return {
        "codes_equal": float((there.weight.data.cpu() == codes).double().mean()),
        "moved_codes_equal": bool(torch.equal(moved.weight.data.cpu(), codes)),
        "unpacked_off": difference(linear4bit.unpacked(moved.weight, torch.float32).cpu(), weight),
        "moved_off": off(moved),
        "packed_there_off": off(there),
        "shape_of_codes": [list(there.weight.shape), list(codes.shape)],
    }


def layers(device: str) -> Figures:
    shapes = ((2432, 2432), (33, 192), (24, 48), (10, 6)) if device != "cpu" else ((128, 64), (24, 48))
    return {
        f"{shape[0]} x {shape[1]}{', double' * double}": attempt(partial(layer, shape, double, device))
        for shape in shapes
        for double in (False, True)
    }


def small_pipeline(where: Path, device: str) -> Figures:
    """``shapes-sd3``, denoiser and text encoders in NF4 and float32: drawn on the CPU, and from its folder on the GPU
    as ``pruning.load`` reads it there, as it reads it where no GPU is, and moved."""
    settings, folder = NF4(compute_dtype="float32"), where / "shapes"
    pipe: Any = DiffusionPipeline.from_pretrained(locate("shapes-sd3"), dtype=torch.float32)
    for part in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        quantize(getattr(pipe, part), settings)
    save_pipeline(pipe, folder)

    def draw(pipe: Any) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "max_sequence_length": 32, "output_type": "pt"}
        return pipe("two red stars", generator=noise, **options).images.cpu()

    expected = draw(pipe)

    def drawn(load: Callable[[], Any]) -> Figures:
        loaded = load()
        before = devices(loaded)
        loaded.to(device)
        figures: Figures = {"devices_as_loaded": before, "devices": devices(loaded)}
        return figures | {"picture_off": float((draw(loaded) - expected).abs().max())}

    def without() -> Any:
        with mock.patch.object(q, "_gpu", return_value=False):
            return pruning.load(folder)

    ways: dict[str, Callable[[], Any]] = {"pruning.load": lambda: pruning.load(folder), "built": without}
    return {name: attempt(partial(drawn, load)) for name, load in (ways | {"moved": lambda: pipe}).items()}


# the result
def reductions(measured: Mapping[str, Mapping[str, Any]]) -> Figures:
    """1 - variant / original, of bytes of weights, of a step's peak and of its time."""

    def values(name: str) -> tuple[Any, ...]:
        figures = measured.get(name, {})
        step = figures.get("step", {})
        return figures.get("weights_bytes"), step.get("peak_bytes"), step.get("seconds")

    keys, whole = ("weights_bytes", "peak_bytes", "seconds"), values("original")
    return {
        name: {key: 1 - v / w if v and w else None for key, v, w in zip(keys, values(name), whole, strict=True)}
        for name in VARIANTS[1:]
    }


def keep(found: Figures, output: Path | None, tiny: bool) -> None:
    for name in CASES:
        found["reductions"][name] = reductions(found["measured"].get(name, {}))
    if output is None:
        record(NAME, found, quick=tiny)
    else:
        head = {"date": date.today().isoformat(), "hardware": found["device"]}
        write_text(output, json.dumps({**head, **found, **provenance()}, indent=2) + "\n")


def run(tiny: bool, deadline: float, output: Path | None, where: Path) -> Figures:
    device, dtype = ("cpu", torch.float32) if tiny else ("cuda", torch.bfloat16)
    found: Figures = {
        "device": "CPU" if tiny else torch.cuda.get_device_name(),
        "bitsandbytes": version("bitsandbytes"),
        "cuda": torch.version.cuda,
        "warm_up": WARM_UP,
        "repeats": REPEATS,
        "reductions": {},
        "measured": {},
        "skipped": [],
    }
    gc.freeze()  # or every collection goes through all that the imports made
    tasks: dict[tuple[str, str], Callable[[], Figures]] = {}
    for name, case in (TINY if tiny else CASES).items():
        loaders = ("stock",) if tasks else ("stock", "built on the CPU", "pruning.load")
        own = Bench(name, case, where, device, dtype).measurements(loaders)
        tasks |= {(name, what): task for what, task in own.items()}
        if "layers" not in {what for _, what in tasks}:
            tasks["checks", "layers"] = partial(layers, device)
            tasks["checks", "small pipeline"] = partial(small_pipeline, where, device)
    for (name, what), task in tasks.items():
        spent = time.perf_counter() - START
        if spent > deadline:
            found["skipped"].append(f"{name}: {what}")
            continue
        print(f"{spent:6.1f} s  {name}: {what}", flush=True)
        figures, seconds = timed(partial(attempt, task))
        found["measured"].setdefault(name, {})[what] = figures | {"measuring_seconds": seconds}
        found["seconds"] = time.perf_counter() - START
        keep(found, output, tiny)
    keep(found, output, tiny)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU, in float32; record nothing")
    parser.add_argument("--deadline", type=float, default=180, help="seconds after which no measurement begins")
    parser.add_argument("--output", type=Path, help="write the figures here, not into results/")
    args = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    with ExitStack() as stack:
        where = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.tiny:  # diffusers loads 4 bits only where it believes that there is a GPU
            stack.enter_context(mock.patch.object(BnB4BitDiffusersQuantizer, "validate_environment", mock.Mock()))
            on_cpu = mock.Mock(return_value={"": "cpu"})
            stack.enter_context(mock.patch.object(BnB4BitDiffusersQuantizer, "update_device_map", on_cpu))
        found = run(args.tiny, args.deadline, args.output, where)
    print(json.dumps({"reductions": found["reductions"], "skipped": found["skipped"], "seconds": found["seconds"]}))


if __name__ == "__main__":
    main()
