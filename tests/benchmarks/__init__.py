"""Scripts that measure; each writes ``results/NAME.json``, and ``make results`` puts those into ``README.md``."""

from __future__ import annotations

import hashlib
import json
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import yaml

from align.common.provenance import provenance
from align.training.stop import STATUS
from rewards.common.files import write_text

RESULTS = Path(__file__).parent / "results"
# a quick run's evaluation: a quarter of the network evaluations, and still two pictures a prompt, for diversity
QUICK = ("--max_prompts", "120", "--samples_per_prompt", "2", "--num_inference_steps", "10")


def runs_folder(quick: bool) -> Path:
    """Where finished runs are kept; a quick run never passes for a whole one."""
    return Path("outputs/quick" if quick else "outputs/bench")


def record(name: str, figures: dict[str, Any], quick: bool = False) -> None:
    """Write ``results/NAME.json``: figures with date, hardware, versions and commit. A quick run is only printed."""
    if quick:
        return
    hardware = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        hardware += f", {torch.cuda.get_device_name()}"
    content = {"date": date.today().isoformat(), "hardware": hardware, **figures, **provenance()}
    write_text(RESULTS / f"{name}.json", json.dumps(content, indent=2) + "\n")


def settings_of(configs: Iterable[str], **more: Any) -> str:
    """A digest of what ``configs`` say, comments aside, and of whatever else decides about the figures."""
    said = [yaml.safe_load(Path(config).read_text()) for config in configs]
    return hashlib.sha256(json.dumps([said, more], sort_keys=True).encode()).hexdigest()


def earlier(name: str, settings: str) -> dict[str, Any]:
    """What ``results/NAME.json`` holds, if its ``settings`` (:func:`settings_of`) are these; else nothing. Seeds can so
    be run one by one, on whatever day there is time."""
    file = RESULTS / f"{name}.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    return found if found.get("settings") == settings else {}


def day(file: Path) -> str:
    """The day that ``file`` was written."""
    return date.fromtimestamp(file.stat().st_mtime).isoformat()


def span(dates: Iterable[str]) -> str:
    """``first to last`` of ISO dates; of one day its date."""
    days = sorted(set(dates))
    return " to ".join(dict.fromkeys([days[0], days[-1]]))


def spread(values: list[float]) -> str:
    """``mean (min to max)`` over seeds; of one seed its value."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def command(*words: str) -> None:
    """Run a module of ours as a user would; a SIGTERM ends both."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and `run` kills what it waits for
    subprocess.run([sys.executable, "-m", *words], check=True)


def trained(
    config: str, seed: int, folder: Path, *options: str, evaluate: Sequence[str] = ()
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train ``config`` with ``options`` and evaluate it on the embedded held-out prompts, at the guidance of its
    samples, with options ``evaluate``, unless ``folder`` has both already; returns the evaluation's report and the
    lines of ``metrics.jsonl``."""
    scores = folder / "evaluation/scores.json"
    if not scores.exists():
        guidance_scale = yaml.safe_load(Path(config).read_text()).get("samples", {}).get("guidance_scale")
        evaluate = [*evaluate, *([] if guidance_scale is None else ["--guidance_scale", str(guidance_scale)])]
        more = ["--output_dir", str(folder), "--seed", str(seed), "--resume_from_checkpoint", "latest", *options]
        command("align.train", "--config", config, *more)
        command("align.evaluate", "--config", "configs/evaluate_shapes.yaml", "--tuned", str(folder), *evaluate)
    return json.loads(scores.read_text()), metrics(folder)


class Finished(NamedTuple):
    """A run's exit status, 0 or that of its stop rule, and the CPU seconds that it took."""

    status: int
    cpu_seconds: int

    @property
    def stopped(self) -> bool:
        return self.status == STATUS


def finished(folder: Path, *words: str) -> Finished:
    """Train into ``folder`` in this process, with ``words`` on the command line, unless that has been done."""
    done = folder / "done"
    if not done.exists():
        from align.train import main

        started = time.process_time()
        status = main([*words, "--output_dir", str(folder), "--report_to", "none"])
        if status not in (0, STATUS):
            raise SystemExit(status)
        write_text(done, f"{status} {time.process_time() - started:.0f}")
    return Finished(*map(int, done.read_text().split()))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def looks(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Strict and graded score whenever an online run looked at its held-out prompts, with the pictures that it had
    drawn by then, and the network evaluations that its last rollout had counted."""
    pictures, evaluations, found = 0, 0, []
    for line in lines:
        if "rollout/pictures" in line:
            pictures = line["rollout"] * line["rollout/pictures"]
            evaluations = line["evaluations/trained"] + line["evaluations/frozen"]
        if "validation/strict" in line:
            scores = {"strict": line["validation/strict"], "graded": line["validation/Shapes"]}
            found.append({"pictures": pictures, "evaluations": evaluations} | scores)
    return found


def mean_curve(runs: Sequence[Sequence[Mapping[str, float]]], across: str) -> list[tuple[float, float]]:
    """(``across``, strict): the mean over runs of the k-th of each one's :func:`looks`."""
    return [
        (fmean(point[across] for point in points), fmean(point["strict"] for point in points))
        for points in zip(*runs, strict=False)
    ]


def curves(
    path: Path, series: Mapping[str, Sequence[tuple[float, float]]], title: str, across: str, along: str
) -> None:
    """A line for each of ``series``, named beside them, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 3.6), dpi=120)
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set(title=title, xlabel=across, ylabel=along)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
