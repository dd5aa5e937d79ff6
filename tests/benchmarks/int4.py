"""INT4 alone: the embedded pipelines, unpruned, in NF4: bytes on disk, error of the weights, strict ShapesEval.

    python tests/benchmarks/int4.py

Files are of the denoiser with everything else in bf16. Pictures are drawn in float32, with the denoiser's and the text
encoders' weights as they are and in 4 bits, so that the 4 bits are all that differs. Beside it the sizes of the large
models (``tests.benchmarks.sizes``). ``--quick`` draws 24 prompts once and records nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.sampling import generate

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from torch import nn

from align import families
from align.evaluation.compare import STRICT, compare
from align.families import Family
from align.shapes.world import held_out_prompts
from pruning.linear4bit import unpacked
from pruning.nf4 import NF4
from pruning.quantize import quantize
from pruning.saving import save
from rewards.models.shapes import Shapes
from rewards.models.shapes import parse as parse_caption
from tests.benchmarks import record, sizes

MODELS = ("shapes-sd3", "shapes-sd")
SETTINGS = {
    "nf4": NF4(compute_dtype="float32"),
    "nf4_double": NF4(double_quant=True, compute_dtype="float32"),
    "nf4_no_skip_list": NF4(compute_dtype="float32", skip=()),
}


def file_bytes(model: str, settings: NF4 | None) -> int:
    """The denoiser's safetensors, in bf16 or quantised from bf16."""
    denoiser = nn.Module.to(families.load(model).denoiser, torch.bfloat16)
    if settings is not None:
        quantize(denoiser, settings)
    with tempfile.TemporaryDirectory() as folder:
        save(denoiser, Path(folder) / "model")
        return sum(file.stat().st_size for file in (Path(folder) / "model").glob("*.safetensors"))


def pack(family: Family, settings: NF4) -> dict[str, Any]:
    """Quantise denoiser and text encoders in place; how much of the denoiser, and its weights' relative error."""
    weights = {name: m.weight.detach().clone() for name, m in family.denoiser.named_modules() if type(m) is nn.Linear}
    report = quantize(family.denoiser, settings)
    lost = total = 0.0
    for layer in report.quantised:
        packed = family.denoiser.get_submodule(layer.name).weight
        lost += float((unpacked(packed, torch.float32) - weights[layer.name]).double().square().sum())
        total += float(weights[layer.name].double().square().sum())
    for name, part in family.pipe.components.items():
        if name.startswith("text_encoder") and part is not None:
            quantize(part, settings)
    parameters = report.before // 4  # it was float32
    return {
        "quantised_share": sum(layer.weights for layer in report.quantised) / parameters,
        "linears": len(report.layers),
        "linears_kept": len(report.kept),
        "weight_error": (lost / total) ** 0.5,
    }


def strict(family: Family, prompts: list[str], samples: int) -> np.ndarray:
    """1 or 0 a picture."""
    texts = [prompt for prompt in prompts for _ in range(samples)]
    seeds = [1000 + k for k in range(len(texts))]
    images = generate.sample_images(family.predict, family, texts, seeds, batch_size=64, progress="drawing")
    return Shapes(mode="strict").score(images=images, prompts=texts).double().numpy()


def measure(model: str, prompts: list[str], samples: int) -> dict[str, Any]:
    """One embedded pipeline: unquantised, and quantised in each way."""
    whole = file_bytes(model, None)
    found: dict[str, Any] = {"bf16": {"file_bytes": whole}}
    base = strict(families.load(model), prompts, samples)
    tasks = [parse_caption(prompt).task for prompt in prompts]
    for name, settings in SETTINGS.items():
        size = file_bytes(model, settings)
        family = families.load(model)
        figures = {"file_bytes": size, "bytes_fall": 1 - size / whole, **pack(family, settings)}
        scores = {who: {STRICT: each} for who, each in (("base", base), ("tuned", strict(family, prompts, samples)))}
        report = compare(scores, tasks, samples, STRICT)["rewards"][STRICT]
        found["bf16"]["strict"] = report["base_overall"]
        found[name] = figures | {
            "strict": report["tuned_overall"],
            "win_rate": report["win_rate"],
            "win_rate_ci": report["win_rate_ci"],
        }
        print(model, name, json.dumps(found[name]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    prompts, samples = held_out_prompts(), 2
    if args.quick:
        prompts, samples = prompts[::10], 1
    figures: dict[str, Any] = {
        "prompts": len(prompts),
        "samples_per_prompt": samples,
        "models": {model: measure(model, prompts, samples) for model in MODELS},
        "sizes": [asdict(row) for row in sizes.rows()],
    }
    record("int4", figures, args.quick)
    print(json.dumps(figures["models"]))


if __name__ == "__main__":
    main()
