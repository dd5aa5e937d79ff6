"""What compression cost and what it saved: pipelines side by side."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pruning
from align import families
from align.common.assets import locate
from align.common.errors import UserError
from align.common.provenance import provenance
from align.evaluation import compare
from align.evaluation.compare import STRICT, Comparison, overall
from align.families import Family
from align.sampling import generate
from align.training.model_card import add_section, picture
from pruning.graph import weights
from rewards.common.files import write_text
from rewards.common.page import Table


@dataclass
class Reporting(Comparison):
    """What pipelines are compared on, and whether their memory and time are measured.

    Args:
        memory: measure peak memory, each pipeline in a process of its own.
        repeats: evaluations of every denoiser, in turns, whose median is its latency.
    """

    memory: bool = True
    repeats: int = 15


def open_pipeline(source: str) -> Family:
    """A pipeline of any of our folders, or a model by its name, ready to sample: on a GPU as it was saved; on a CPU in
    float32."""
    if torch.cuda.is_available():
        return families.of(pruning.load(locate(source)).to("cuda"), source)
    return families.of(pruning.load(locate(source), torch.float32), source)


def weights_bytes(folder: Path) -> int:
    """Bytes of the safetensors under ``folder``."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def latencies(denoisers: Mapping[str, Family], batch: int, repeats: int) -> dict[str, float]:
    """Median seconds of one evaluation of ``batch`` rows by each denoiser, taken in turns after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in denoisers}
    for k in range(repeats + 1):
        for name, family in denoisers.items():
            x = torch.randn(batch, *family.latent_shape(), generator=torch.Generator().manual_seed(0))
            x = x.to(family.device, family.dtype)
            t = family.sample_timesteps(torch.full((batch,), 0.5)).to(family.device)
            cond = family.uncond.expand(batch)
            start = _now(family)
            with torch.no_grad(), family.autocast():
                family.forward(x, t, cond)
            if k:
                times[name].append(_now(family) - start)
    return {name: statistics.median(laps) for name, laps in times.items()}


def _now(family: Family) -> float:
    if family.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak(source: str, settings: Reporting) -> int:
    """Bytes of memory at the peak of loading ``source`` and drawing one batch, in a process of its own: of the GPU
    where there is one, else all that the process holds, which for a small model is mostly libraries."""
    batch, steps = min(8, settings.batch_size), settings.num_inference_steps or 4
    words = [sys.executable, "-m", "pruning.report", source, str(batch), str(steps)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2] or f"its process ended with status {done.returncode}"
        raise UserError(f"the memory of {source} cannot be measured: {reason}; set report.memory: false to do without")
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def _measure(source: str, batch: int, steps: int) -> int:
    pipe = pruning.load(locate(source))
    family = families.of(pipe.to("cuda") if torch.cuda.is_available() else pipe, source)
    prompts = ["a red circle"] * batch
    half = torch.bfloat16 if family.dtype == torch.float32 else family.dtype
    with torch.autocast(family.device.type, half):
        generate.sample_images(family.predict, family, prompts, range(batch), steps, batch_size=batch)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(folders: Mapping[str, str], settings: Reporting, output: Path) -> str:
    """Measure the pipelines of ``folders`` (name to folder or model, the original first), write ``report.json``,
    ``report.md``, ``gallery.png`` and ``gallery.html`` into ``output``, and return the tables."""
    bench = settings.bench()
    opened: dict[str, Family] = {}

    def models() -> Iterator[tuple[str, Family]]:
        for name, source in folders.items():
            opened[name] = open_pipeline(source)
            yield name, opened[name]

    compared = compare.draw_and_compare(models(), settings, bench, output)
    assert compared is not None, "there is one process"
    seconds = latencies(opened, min(settings.batch_size, 64), settings.repeats)
    pipelines = {
        name: sizes(source, opened[name])
        | {"peak_bytes": peak(source, settings) if settings.memory else None}
        | quality(compared.report, name)
        | {"latency": seconds[name]}
        for name, source in folders.items()
    }
    tables = [table(pipelines), *([compare.table(compared.report)] if len(folders) > 1 else [])]
    text = "\n\n".join(each.markdown() for each in tables)
    compared.show(output, "Original and compressed", tables)
    figures = {"pipelines": pipelines, "comparison": compared.report}
    write_text(output / "report.json", json.dumps(figures | provenance(), indent=2) + "\n")
    write_text(output / "report.md", text + "\n")
    shown = f"{text}\n\n{picture('Original and compressed, the same prompts and noise', '../gallery.png')}"
    for source in list(folders.values())[1:]:  # the original may be anyone's
        add_section(Path(source) / "README.md", "Original and compressed", shown)
    return text


def sizes(source: str, family: Family) -> dict[str, Any]:
    """Parameters of the denoiser, and bytes on disk of it and of the whole pipeline."""
    folder = Path(locate(source))
    return {
        "source": source,
        "parameters": sum(map(weights, family.denoiser.parameters())),
        "denoiser_bytes": weights_bytes(folder / family.denoiser_name),
        "pipeline_bytes": weights_bytes(folder),
    }


def quality(comparison: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A pipeline's mean under every reward; of the strict verdict the mean over tasks, and each task's."""
    entries = comparison["rewards"]
    means = {reward: entry[f"{name}_mean"] for reward, entry in entries.items()}
    if "tasks" not in entries.get(STRICT, {}):
        return {"rewards": means}
    tasks = {task: by_model[name] for task, by_model in entries[STRICT]["tasks"].items()}
    return {"rewards": means | {STRICT: overall(entries[STRICT], name)}, "tasks": tasks}


def table(pipelines: Mapping[str, Mapping[str, Any]]) -> Table:
    """Sizes, speed and scores. Latency is relative to the original's, in one run."""
    first = next(iter(pipelines.values()))
    names = list(first["rewards"])
    rows = []
    for name, entry in pipelines.items():
        sizes = [entry[key] for key in ("denoiser_bytes", "pipeline_bytes", "peak_bytes")]
        megabytes = ("" if size is None else f"{size / 1e6:.2f}" for size in sizes)
        scores = (f"{entry['rewards'][reward]:.3f}" for reward in names)
        rows.append(
            [name, f"{entry['parameters']:,}", *megabytes, f"{entry['latency'] / first['latency']:.2f}", *scores]
        )
    return Table(["", "parameters", "denoiser MB", "pipeline MB", "peak MB", "latency", *names], rows)


if __name__ == "__main__":
    print(json.dumps({"peak": _measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))}))
