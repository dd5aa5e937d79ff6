"""One HTML page of runs: how they stand, curves, samples through time, settings that differ, before and after.

Nothing is asked of any host: images are data URIs, charts are SVG, and the page's own script is allowed by its hash.
The page does not grow with the runs: a curve has at most ``2 * BUCKETS`` points; of sample grids there are at most
:data:`FRAMES` a run and :data:`TILES` pictures in all (the first and the last grid, evenly spaced ones between), each
of at most :data:`SIDE` pixels a side; and of evaluations :data:`FIGURES` pictures.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from align.common.errors import UserError
from align.evaluation.compare import evenly_spaced
from align.evaluation.curve_chart import Line, chart, has, number
from align.evaluation.curves import Axis, Curve
from align.evaluation.gallery import cut_grid
from align.evaluation.panels import SECTIONS, PanelKey, panels_of
from align.evaluation.run_record import Run, State
from rewards.common.page import Card, Figure, Table, data_uri, render

RUNS = 8  # that a page tells apart by color
FRAMES, PROMPTS, TILES, SIDE = 24, 8, 480, 256
FIGURES, PAIRS = 96, 12
CONFIG = 20_000  # characters of a config that are shown
OWN = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "report_to", "dry_run", "memory")


@dataclass(frozen=True)
class RunCard:
    """How a run stands: facts as label and value, and what share of its updates is done."""

    name: str
    state: State
    facts: Sequence[tuple[str, str]]
    share: float | None
    config: str


@dataclass(frozen=True)
class Panel:
    """A metric's charts, one an axis, and the last value of each run, by its number."""

    title: str
    tag: str
    metric: str
    charts: Mapping[Axis, Markup]
    last: Sequence[tuple[int, str]]
    held_out: bool
    broken: int


@dataclass(frozen=True)
class Section:
    """Panels under a heading."""

    title: str
    note: str
    panels: Sequence[Panel]
    folded: bool


@dataclass(frozen=True)
class Frame:
    """The sample grid of a step: captions and sources of its pictures."""

    step: int
    tiles: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Strip:
    """A run's sample grids through time."""

    name: str
    number: int
    frames: Sequence[Frame]
    note: str


@dataclass(frozen=True)
class Gallery:
    """A run's evaluation: base beside tuned."""

    name: str
    number: int
    table: Table
    cards: Sequence[Card]
    overview: str | None


@dataclass(frozen=True)
class RunPage:
    """What ``run_page.html.j2`` shows."""

    title: str
    cards: Sequence[RunCard]
    axes: Sequence[Axis]
    sections: Sequence[Section]
    strips: Sequence[Strip]
    differences: Table | None
    one_sided: Table | None
    galleries: Sequence[Gallery]
    script: Markup = field(default_factory=lambda: Markup(_script()))

    @property
    def steps(self) -> list[int]:
        """All at which a grid is shown."""
        return sorted({frame.step for strip in self.strips for frame in strip.frames})

    @property
    def allowed(self) -> str:
        """The page's script as its Content-Security-Policy names it."""
        return f"'sha256-{base64.b64encode(hashlib.sha256(self.script.encode()).digest()).decode()}'"

    def html(self) -> str:
        return render(self, "align.evaluation", "run_page.html.j2")


def run_page(runs: Sequence[Run], now: float) -> RunPage:
    """The page of ``runs`` as they stand at ``now`` (seconds of the epoch), which only runs that still go show. Raises
    :class:`UserError` for more than :data:`RUNS` of them."""
    if len(runs) > RUNS:
        raise UserError(f"{len(runs)} runs are more than a page can tell apart; give at most {RUNS}")
    lines = [Line(k, run.name, curve) for k, run in enumerate(runs) for curve in run.metrics.curves.values()]
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    return RunPage(
        title,
        [_card(run, now) for run in runs],
        [axis for axis in Axis if has(lines, axis)],
        list(_sections(runs)),
        [strip for k, run in enumerate(runs) if (strip := _strip(k, run, len(runs))).frames or strip.note],
        _differences(runs, everywhere=True) if len(runs) > 1 else None,
        _differences(runs, everywhere=False) if len(runs) > 1 else None,
        [_gallery(k, run, len(runs)) for k, run in enumerate(runs) if run.evaluation],
    )


def prompts_shown(runs: int) -> int:
    """How many prompts of each of so many runs' evaluations a page shows."""
    return max(2, min(PAIRS, FIGURES // (2 * runs)))


def _card(run: Run, now: float) -> RunCard:
    metrics, at = run.metrics, run.metrics.at
    planned = f" of {run.planned:,}" if run.planned else ""
    facts = [
        ("objective", run.objective),
        ("model", run.settings.get("pretrained_model_name_or_path", "?")),
        ("updates", f"{at.updates:,.0f}{planned}"),
    ]
    rollouts = max((bucket.high for bucket in metrics.curves.get("rollout", Curve()).buckets), default=0)
    if run.planned_rollouts:
        facts.append(("rollouts", f"{rollouts:,.0f} of {run.planned_rollouts:,}"))
    if at.pictures is not None:
        facts.append(("pictures", f"{at.pictures:,.0f}"))
    if at.evaluations is not None:
        facts.append(("network evaluations", f"{at.evaluations:,.0f}"))
    if metrics.first is not None and metrics.last is not None:
        ago = f", {duration(now - metrics.last)} before this page" if run.state is State.RUNNING else ""
        facts += [("first line, UTC", _date(metrics.first)), ("last line, UTC", _date(metrics.last) + ago)]
        facts.append(("between them", duration(metrics.last - metrics.first)))
    else:
        facts.append(("metrics", "none yet"))
    if metrics.unread:
        facts.append(("unreadable lines", f"{metrics.unread:,} of metrics.jsonl, left out"))
    ends = ((at.updates, run.planned), (rollouts, run.planned_rollouts))  # whichever comes first
    share = max((min(1.0, done / wanted) for done, wanted in ends if wanted), default=None)
    whole = len(run.config) <= CONFIG
    config = run.config if whole else run.config[:CONFIG] + "\n... (see config.yaml)"
    return RunCard(run.name, run.state, facts, share, config)


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 3 min, 2 h 5 min, 3 d 4 h."""
    whole = max(0, round(seconds))
    if whole < 100:
        return f"{whole} s"
    minutes, hours, days = round(whole / 60), whole // 3600, whole // 86400
    if hours == 0:
        return f"{minutes} min"
    return f"{days} d {hours % 24} h" if days else f"{hours} h {whole % 3600 // 60} min"


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "?"


def _sections(runs: Sequence[Run]) -> Iterator[Section]:
    keys = panels_of([run.metrics.curves for run in runs], [run.weights for run in runs])
    for section in SECTIONS:
        panels = [panel for key in keys if key.section is section and (panel := _panel(key, runs)).charts]
        if panels:
            yield Section(section.title, section.note, panels, section.folded)


def _panel(key: PanelKey, runs: Sequence[Run]) -> Panel:
    lines = [
        Line(k, run.name, run.metrics.curves[metric], metric.startswith("validation/"))
        for metric in key.metrics
        for k, run in enumerate(runs)
        if metric in run.metrics.curves
    ]
    charts = {axis: svg for axis in Axis if (svg := chart(lines, axis, key.title))}
    told = {line.number: line for line in reversed(lines) if line.curve.buckets}  # what is trained on goes before
    last = [(k, number(told[k].curve.buckets[-1].mean)) for k in sorted(told)]
    held_out = any(line.held_out for line in lines)
    return Panel(key.title, key.tag, key.metrics[0], charts, last, held_out, sum(line.curve.broken for line in lines))


def _strip(k: int, run: Run, runs: int) -> Strip:
    shown = evenly_spaced(len(run.prompts), PROMPTS) if run.prompts else [0]
    count = max(2, min(FRAMES, TILES // (runs * len(shown))))
    steps = list(run.samples)
    frames, bad = [], 0
    for step in [steps[place] for place in evenly_spaced(len(steps), count)]:
        try:
            frames.append(Frame(step, list(_tiles(run.samples[step], run.prompts, shown))))
        except (OSError, ValueError, Image.DecompressionBombError):
            bad += 1
    return Strip(run.name, k, frames, f"{bad} grids cannot be read and are left out." if bad else "")


def _tiles(path: Path, prompts: Sequence[str], shown: Sequence[int]) -> Iterator[tuple[str, str]]:
    with Image.open(path) as sheet:
        images = cut_grid(sheet, len(prompts))
        if images is None:  # drawn for other prompts than the config has now
            yield "", data_uri(sheet, 4 * SIDE)
        else:
            yield from ((prompts[place], data_uri(images[place], SIDE)) for place in shown)


def _differences(runs: Sequence[Run], everywhere: bool) -> Table:
    """The settings in which the runs differ: those that all of them have (``everywhere``), or that only some have,
    as other objectives and data do."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in OWN)
    rows = []
    for key in keys:
        values = [run.settings.get(key, "–") for run in runs]
        if len(set(values)) > 1 and all(key in run.settings for run in runs) == everywhere:
            rows.append([key, *(value if len(value) <= 120 else f"{value[:117]}..." for value in values)])
    return Table(["setting", *(run.name for run in runs)], rows)


def _gallery(k: int, run: Run, runs: int) -> Gallery:
    evaluation, cards = run.evaluation, []
    assert evaluation is not None
    for prompt, drawn in evaluation.pictures:
        figures = [Figure(image, one.model, one.scores) for one in drawn[: FIGURES // runs]
                   if (image := _image(one.path)) is not None]  # fmt: skip
        cards.append(Card(prompt, figures))
    room = max(1, FIGURES // runs)
    while sum(len(card.figures) for card in cards) > room:
        cards.pop()
    sheet = _image(evaluation.overview) if evaluation.overview and not cards else None
    return Gallery(run.name, k, evaluation.table, cards, data_uri(sheet, 4 * SIDE) if sheet else None)


def _image(path: Path) -> Image.Image | None:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def _script() -> str:
    return files("align.evaluation").joinpath("run_page.js").read_text(encoding="utf-8")
