"""Public benches: what is drawn, how it is scored and what others have reported, a YAML file each in ``benches/``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from torch import Tensor

from align.common.errors import DataError, UserError
from align.common.resolution import Resolution
from align.evaluation.compare import Bench, overall
from align.evaluation.pictures import PictureFolder, Wanted
from align.shapes.world import held_out_prompts
from rewards.base import needs_prompt
from rewards.common.files import atomic, write_text
from rewards.common.page import Table
from rewards.data.arrow_tables import hub_table
from rewards.data.records import RECORD_SUFFIXES, Broken, read_records
from rewards.data.text import brief, caption_fault, clean
from rewards.models.shapes import parse as parse_caption


@dataclass(frozen=True)
class PromptList:
    """Where a bench's prompts come from; nothing of them is shipped. ``bytes`` and ``sha256`` are of the official file,
    ``rows`` its prompts; None is not known to us."""

    where: str
    licence: str
    column: str
    hub: str | None = None
    rows: int | None = None
    bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Protocol:
    """How a bench is drawn; None is the pipeline's own."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    samples_per_prompt: int = 1
    resolution: Resolution = None


@dataclass(frozen=True)
class Published:
    """A figure that ``source`` reports of ``model``."""

    model: str
    reward: str
    value: float
    source: str


@dataclass(frozen=True)
class BenchSpec:
    """A bench. ``scale`` multiplies a reward's figures as its authors do; ``canary`` is what the scorers have to heed:
    with the prompts (or their metadata) of other pictures, scores have to change."""

    name: str
    title: str
    about: str
    prompts: PromptList
    protocol: Protocol
    reward: Sequence[str]
    canary: Literal["prompt", "metadata"]
    task_column: str | None = None
    scale: Mapping[str, float] = field(default_factory=dict)
    layout: Literal["geneval"] | None = None
    published: Sequence[Published] = ()


def names() -> list[str]:
    """The benches there are."""
    folder = files("align.evaluation").joinpath("benches")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_spec(name: str) -> BenchSpec:
    """A bench by its name, or from a YAML file of the same keys. Raises :class:`UserError`."""
    if name in names():
        text = files("align.evaluation").joinpath("benches", f"{name}.yaml").read_text(encoding="utf-8")
    elif Path(name).suffix == ".yaml" and Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise UserError(f"there is no bench {name!r}; known are {', '.join(names())}, or a .yaml file of your own")
    try:
        raw = yaml.safe_load(text)
        parts: dict[str, Any] = {
            "prompts": PromptList(**raw.pop("prompts")),
            "protocol": Protocol(**raw.pop("protocol")),
            "published": [Published(**row) for row in raw.pop("published", [])],
        }
        spec = BenchSpec(name=Path(name).stem, **parts, **raw)
        _require_kinds(spec)
        return spec
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"bench {name}: {' '.join(str(error).split())}; see {BenchSpec.__doc__}") from error


def _require_kinds(spec: BenchSpec) -> None:
    """Raise ValueError for a value of another kind than its key takes."""
    if isinstance(spec.reward, str) or not spec.reward:
        raise ValueError(f"reward is {spec.reward!r}; expected a list of rewards")
    if spec.canary not in ("prompt", "metadata") or spec.layout not in (None, "geneval"):
        raise ValueError(
            f"canary {spec.canary!r} and layout {spec.layout!r}; expected prompt or metadata, geneval or none"
        )
    protocol = dataclasses.asdict(spec.protocol)
    numbers = {"scale": list(spec.scale.values()), "published": [row.value for row in spec.published]}
    numbers["protocol"] = [value for key, value in protocol.items() if value is not None and key != "resolution"]
    for key, values in numbers.items():
        if wrong := [value for value in values if isinstance(value, bool) or not isinstance(value, int | float)]:
            raise ValueError(f"{key} has {wrong[0]!r}; expected a number")
    for key in ("num_inference_steps", "samples_per_prompt"):
        if protocol[key] is not None and (not isinstance(protocol[key], int) or protocol[key] < 1):
            raise ValueError(f"protocol.{key} is {protocol[key]!r}; expected at least 1")


def read_rows(spec: BenchSpec, path: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """The prompts, each a row with ``prompt`` and what else its file says, and how they differ from the official ones.

    ``path`` is a file, or a folder of which every file is a task by its name; without one the bench's hub id is asked.
    Raises :class:`DataError`.
    """
    told = spec.prompts
    if path is None and told.where == "shapes":
        return [{"prompt": text, "task": parse_caption(text).task} for text in held_out_prompts()], []
    if path is None:
        if told.hub is None:
            raise DataError(f"{spec.title}: give its prompts, {told.where}, by --prompts")
        table = hub_table(told.hub, None)
        rows = [_row(spec, f"{told.hub} row {k}", table.record(k)) for k in range(len(table))]
        return rows, _count(spec, rows)
    place = Path(path).expanduser()
    if place.is_dir():
        parts = sorted(file for file in place.iterdir() if file.suffix in (*RECORD_SUFFIXES, ".txt"))
        if not parts:
            raise DataError(f"{place} holds no {', '.join(RECORD_SUFFIXES)} or .txt file; expected {told.where}")
        rows = [{"task": part.stem} | row for part in parts for row in _rows(spec, part)]
        return rows, _count(spec, rows)
    if not place.is_file():
        raise DataError(f"there is no {place}; expected {told.where}")
    rows, raw = _rows(spec, place), place.read_bytes()
    differences = _count(spec, rows)
    if told.bytes is not None and len(raw) != told.bytes:
        differences.append(f"the prompt file has {len(raw)} bytes, the official one {told.bytes}")
    elif told.sha256 is not None and hashlib.sha256(raw).hexdigest() != told.sha256:
        differences.append("the prompt file has another SHA-256 than the official one")
    return rows, differences


def _rows(spec: BenchSpec, file: Path) -> list[dict[str, Any]]:
    rows = [_row(spec, where, entry) for where, entry in read_records(file)]
    if not rows:
        raise DataError(f"{file} holds no prompt")
    return rows


def _row(spec: BenchSpec, where: str, entry: object) -> dict[str, Any]:
    if isinstance(entry, Broken):
        raise DataError(f"{where}: {entry.reason}")
    column = spec.prompts.column
    words = entry.get(column, entry.get("prompt")) if isinstance(entry, Mapping) else entry
    if not isinstance(words, str) or not clean(words) or caption_fault(words):
        raise DataError(f"{where}: expected a text or an object with {column!r}, found {brief(entry)}")
    others = {k: v for k, v in entry.items() if k != column} if isinstance(entry, Mapping) else {}
    return others | {"prompt": clean(words)}


def _count(spec: BenchSpec, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if spec.prompts.rows in (None, len(rows)):
        return []
    return [f"{len(rows)} prompts, {spec.prompts.rows} in the bench"]


def differences(spec: BenchSpec, used: Mapping[str, Any]) -> list[str]:
    """Where what was ``used`` is not the bench's protocol."""
    official = dataclasses.asdict(spec.protocol)
    return [f"{name} {used[name]}, {value} in the bench" for name, value in official.items() if used[name] != value]


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
    """The canary: with each other's prompts and metadata, every reward that reads prompts (or, by the spec, metadata)
    has to change its mind of one of the pictures; one that says the same of all cannot be told. Raises
    :class:`UserError`."""
    if len(shown.wanted) < 2:
        return
    scores = []
    for rows in (shown.wanted, [*shown.wanted[1:], shown.wanted[0]]):
        metadata = [dict(row.metadata) for row in rows]
        prompts = [row.prompt for row in rows]
        with torch.no_grad():
            scores.append(
                bench.rewards.scores(images=shown.images.to(bench.device), prompts=prompts, metadata=metadata)
            )
    for name, reward in bench.rewards.rewards.items():
        heeds, first = spec.canary == "metadata" or needs_prompt(reward), scores[0][name]
        if heeds and bool((first != first[0]).any()) and torch.equal(first, scores[1][name]):
            raise UserError(
                f"{name} gives {len(first)} pictures the same scores whatever {spec.canary} they come with; it does "
                f"not see what {spec.title} asks for, so its figures say nothing"
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
