"""What a bench says: whether its scorers heed what they are told, and its results beside what others have reported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.common.errors import UserError
from align.evaluation.bar_chart import Panel, Value
from align.evaluation.bench_spec import BenchSpec
from align.evaluation.compare import Bench, overall
from align.evaluation.pictures import PictureFolder, Wanted
from rewards.base import needs_prompt
from rewards.common.files import atomic, write_text
from rewards.common.page import Table


@dataclass(frozen=True)
class Shown:
    """Pictures (B, 3, H, W) in [0, 1], and for each what was asked for."""

    images: Tensor
    wanted: Sequence[Wanted]


def first_pictures(pictures: PictureFolder) -> Shown:
    """The first picture of each of the first 16 prompts."""
    texts = [one.prompt for one in pictures.wanted]
    chosen = [texts.index(text) for text in list(dict.fromkeys(texts))[:16]]
    return Shown(torch.stack([pictures[number] for number in chosen]), [pictures.wanted[number] for number in chosen])


def noise_pictures(wanted: Sequence[Wanted], side: int = 64) -> Shown:
    """Pictures of noise for the first four prompts, to try scorers on before anything is drawn."""
    few = list({one.prompt: one for one in wanted}.values())[:4]
    images = torch.rand(len(few), 3, side, side, generator=torch.Generator().manual_seed(0))
    return Shown(images, few)


def require_heed(spec: BenchSpec, bench: Bench, shown: Shown) -> None:
    """The canary: with each other's prompts and metadata, whoever's, every reward that reads prompts (or, by the spec,
    metadata) has to change its mind of one of the pictures. One that says the same of all cannot be told, nor one of
    two marks (yes and no) on fewer than four pictures, which may agree by chance. Raises :class:`UserError`."""

    def scored(shift: int) -> Mapping[str, Tensor]:
        rows = [*shown.wanted[shift:], *shown.wanted[:shift]]
        prompts, metadata = [row.prompt for row in rows], [dict(row.metadata) for row in rows]
        with torch.no_grad():
            return bench.rewards.scores(images=shown.images.to(bench.device), prompts=prompts, metadata=metadata)

    first = scored(0) if len(shown.wanted) > 1 else {}
    deaf = [
        name
        for name, scores in first.items()
        if (spec.canary == "metadata" or needs_prompt(bench.rewards.rewards[name]))
        and len(scores.unique()) > (1 if len(scores) > 3 else 2)
    ]
    for shift in range(1, len(shown.wanted)):
        if deaf:  # which after the first shift is rare
            other = scored(shift)
            deaf = [name for name in deaf if torch.equal(first[name], other[name])]
    if deaf:
        raise UserError(
            f"{deaf[0]} gives {len(shown.wanted)} pictures the same scores whatever {spec.canary} they come with; it "
            f"does not see what {spec.title} asks for, so its figures say nothing"
        )


def results(spec: BenchSpec, report: Mapping[str, Any]) -> Table:
    """Ours with its interval, then what was published, by reward."""
    rows = []
    for reward, entry in report["rewards"].items():
        scale = spec.scale.get(reward, 1.0)
        for model in report["models"]:
            low, high = (scale * x for x in entry[f"{model}_ci"])
            mean = scale * overall(entry, model)
            rows.append([reward, model, f"{mean:.4g} ({low:.4g}–{high:.4g})", "measured here"])
        same = [row for row in spec.published if row.reward == reward]
        rows += [[reward, row.model, f"{row.value:.4g}", row.source] for row in same]
    measured = set(report["rewards"])
    others = [row for row in spec.published if row.reward not in measured]
    rows += [[row.reward, row.model, f"{row.value:.4g}", f"{row.source}; not measured here"] for row in others]
    return Table(["reward", "model", "score (95 % interval)", "source"], rows)


def panels(spec: BenchSpec, report: Mapping[str, Any]) -> list[Panel]:
    """Of each reward every model's score and, where the report has ``task_ci``, its mean of each task."""
    found = []
    for reward, entry in report["rewards"].items():
        scale = spec.scale.get(reward, 1.0)
        rows = {"all": {model: (overall(entry, model), *entry[f"{model}_ci"]) for model in report["models"]}}
        for task, means in entry.get("tasks", {}).items():
            rows[task.replace("_", " ")] = {model: (means[model], *entry["task_ci"][task][model]) for model in means}
        scaled = {
            row: {model: Value(*(scale * x for x in three)) for model, three in values.items()}
            for row, values in rows.items()
        }
        found.append(Panel(reward, scaled))
    return found


def write_geneval(folder: Path, pictures: PictureFolder, scores: Mapping[str, np.ndarray], samples: int) -> None:
    """The pictures as GenEval's ``evaluate_images.py FOLDER`` reads them, ``00000/metadata.jsonl`` and
    ``00000/samples/0000.png``; and our verdicts as its ``summary_scores.py`` does, ``results.jsonl``."""
    lines = []
    for number, one in enumerate(pictures.wanted):
        prompt, sample = divmod(number, samples)
        row = {**one.metadata, "prompt": one.prompt}
        place = folder / f"{prompt:05d}"
        if not sample:
            write_text(place / "metadata.jsonl", json.dumps(row))
        target = place / "samples" / f"{sample:04d}.png"
        with atomic(target) as draft:
            draft.write_bytes(pictures.file(number).read_bytes())
        verdict = {"filename": str(target), "tag": row.get("tag"), "prompt": one.prompt}
        verdict |= {"correct": bool(next(iter(scores.values()))[number] == 1), "reason": "", "details": "{}"}
        lines.append(json.dumps(verdict | {"metadata": json.dumps(row)}) + "\n")
    write_text(folder / "results.jsonl", "".join(lines))
