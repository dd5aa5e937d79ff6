"""What a run folder says of its run, read without loading a model: also one that is still written, was killed, went on
several times, or is of version 0.1."""

from __future__ import annotations

import enum
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.common.errors import UserError
from align.common.settings_file import read_settings
from align.evaluation.compare import evenly_spaced, overall
from align.evaluation.curves import Metrics
from align.evaluation.pictures import folder_name
from align.families import LORA_FILE
from align.policy.initial_noise import NOISE_FILE
from rewards.common.files import LOCK
from rewards.common.page import Table
from rewards.data.text import read_text

PATIENCE = 3600  # seconds without a line after which a run of another machine counts as interrupted
SLACK = 60  # seconds by which weights may be older than the last line and still be that run's
WEIGHTS = (LORA_FILE, NOISE_FILE, "unet/config.json", "transformer/config.json")
RUN_FILES = ("config.yaml", "metrics.jsonl")


class State(enum.Enum):
    """How a run stands."""

    FINISHED = "finished"
    RUNNING = "still going"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Drawn:
    """A picture in an evaluation: whose it is, its file, its scores by reward."""

    model: str
    path: Path
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """What ``align.evaluate`` left: its table, and ``pictures`` of evenly spaced prompts; of version 0.1, which kept no
    pictures, the ``overview`` of them."""

    table: Table
    pictures: Sequence[tuple[str, Sequence[Drawn]]]
    overview: Path | None


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it.

    ``settings`` are the resolved config in today's names, by dotted keys; ``config`` is its text; ``weights`` of
    rewards, by their titles, 0 of those that are only watched; ``samples`` are the sample grids by optimizer step.
    """

    name: str
    path: Path
    state: State
    metrics: Metrics
    settings: Mapping[str, str]
    config: str
    weights: Mapping[str, float]
    prompts: Sequence[str]
    samples: Mapping[int, Path]
    evaluation: Evaluation | None

    @property
    def objective(self) -> str:
        return self.settings.get("objective.class_path", "?").rpartition(".")[2]

    @property
    def planned(self) -> int | None:
        """The updates that the run was to take; None where its rollouts decide."""
        steps = self.settings.get("max_train_steps", "null")
        unset = 1000 if self.settings.get("max_rollouts", "null") == "null" else None
        return int(steps) if steps.isdecimal() else unset

    @property
    def planned_rollouts(self) -> int | None:
        """The rollouts after which it was to end, if any."""
        rollouts = self.settings.get("max_rollouts", "null")
        return int(rollouts) if rollouts.isdecimal() else None


def read_run(name: str, path: Path, now: float, prompts: int) -> Run:
    """The run in ``path`` as it stands at ``now`` (seconds of the epoch), with pictures of at most ``prompts`` prompts
    of its evaluation. Raises :class:`UserError` where there is none."""
    require_run(path)
    config, text = _config(path / RUN_FILES[0])
    metrics = Metrics.read(path / RUN_FILES[1])
    samples = {
        int(m[1]): file for file in path.glob("samples/step-*.png") if (m := re.search(r"-(\d+)\.png$", file.name))
    }
    section = config.get("samples")
    captions = section.get("prompts") if isinstance(section, dict) else None
    return Run(
        name,
        path,
        _state(path, metrics.last, now),
        metrics,
        dict(_flat(config)),
        text,
        dict(_weights(config.get("rewards"))),
        [str(prompt) for prompt in captions] if isinstance(captions, list) else [],
        dict(sorted(samples.items())),
        _evaluation(path / "evaluation", prompts),
    )


def require_run(path: Path) -> None:
    """Raise :class:`UserError` where ``path`` is no run folder; the error names runs that lie below it."""
    if not path.is_dir():
        raise UserError(f"{path} is no folder; expected the run folder (output_dir) of align.train")
    if not (path / RUN_FILES[0]).is_file():
        below = sorted(
            str(file.parent) for file in path.glob(f"*/{RUN_FILES[0]}") if file.with_name("run.json").exists()
        )
        hint = f"; give the runs below it: {' '.join(below[:8])}" if below else ""
        raise UserError(f"{path} is no run folder (no {RUN_FILES[0]}){hint}")


def _config(path: Path) -> tuple[dict[str, Any], str]:
    try:
        return read_settings(path), read_text(path)
    except UserError as error:
        raise UserError(f"{error}; expected the config.yaml that align.train wrote") from error


def _flat(value: object, above: str = "") -> Iterator[tuple[str, str]]:
    """Settings by dotted keys, without the ``init_args`` between."""
    items: list[tuple[str, object]] = []
    if isinstance(value, dict) and value:
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        items = [(str(k), item) for k, item in enumerate(value)]
    if not items:
        yield above, json.dumps(value, ensure_ascii=False, default=str).strip('"')
    for key, item in items:
        yield from _flat(item, above if key == "init_args" else f"{above}.{key}" if above else key)


def _weights(rewards: object) -> Iterator[tuple[str, float]]:
    for reward in rewards if isinstance(rewards, list) else []:
        if isinstance(reward, dict) and "name" in reward:
            weight = reward.get("weight", 1.0)
            yield str(reward.get("label") or reward["name"]), weight if isinstance(weight, int | float) else 1.0


def _state(path: Path, last: float | None, now: float) -> State:
    lock = path / LOCK
    if lock.is_file():
        holder = re.match(r"process (\d+) on (.+) since ", lock.read_text(encoding="utf-8", errors="replace"))
        if holder and holder[2] == platform.node():
            return State.RUNNING if _alive(int(holder[1])) else State.INTERRUPTED
        return State.RUNNING if now - (last or lock.stat().st_mtime) < PATIENCE else State.INTERRUPTED
    times = [(path / name).stat().st_mtime for name in WEIGHTS if (path / name).is_file()]
    return State.FINISHED if times and max(times) + SLACK >= (last or 0) else State.INTERRUPTED


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _evaluation(path: Path, prompts: int) -> Evaluation | None:
    try:
        report = json.loads((path / "scores.json").read_text(encoding="utf-8"))
        models, table = report["models"], _table(report)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or still being written by other hands
        return None
    overview = path / "gallery.png"
    return Evaluation(table, _drawn(path, models, report, prompts), overview if overview.is_file() else None)


def _table(report: Mapping[str, Any]) -> Table:
    """Means of every model and win rates, of reports of 0.1 too."""
    models = report["models"]
    rates = [name for name in ("win_rate", *(f"{model}_win_rate" for model in models[1:])) if name in report]
    rows = []
    for reward, entry in report["rewards"].items():
        cells = [f"{overall(entry, model):.3f}" for model in models]
        for rate in rates:
            low, high = entry.get(f"{rate}_ci") or (None, None)
            cells.append(f"{entry[rate]:.3f}" + (f" ({low:.3f}–{high:.3f})" if low is not None else ""))
        rows.append([reward, *cells])
    heads = [f"{rate.replace('_', ' ')} (95 % interval)" for rate in rates]
    return Table(["", *models, *heads], rows)


def _drawn(path: Path, models: Sequence[str], report: Mapping[str, Any], most: int) -> list[tuple[str, list[Drawn]]]:
    """The first picture of evenly spaced prompts by every model that kept it."""
    folders: list[str] = []
    for model in models:
        folders.append(folder_name(model, folders))
    try:
        with (path / "images.jsonl").open(encoding="utf-8") as file:
            lines = file.read().splitlines()
        each = int(report.get("samples_per_prompt", 1))
        shown = []
        for number in evenly_spaced(len(lines) // each, most):
            row = json.loads(lines[number * each])
            files = [path / "images" / folder / f"{number * each:05d}.png" for folder in folders]
            shown.append((str(row["prompt"]), [
                Drawn(model, file, {name.partition("/")[2]: float(value) for name, value in row.items()
                                    if name.startswith(f"{model}/")})
                for model, file in zip(models, files, strict=True) if file.is_file()
            ]))  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return []
    return [(prompt, drawn) for prompt, drawn in shown if drawn]
