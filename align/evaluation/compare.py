"""Models side by side: the same prompts and noise through each, scored, and what the scores say of the differences.

:func:`draw_and_compare` runs the models, the first of which is the baseline that every other is held against, and keeps
what they drew (:mod:`align.evaluation.pictures`) and how it scored (:mod:`align.evaluation.scored`); :func:`compare`,
:func:`diversity` and :func:`table` only read its results.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL.Image import Image

from align.common.errors import UserError, require_at_least
from align.common.resolution import Resolution
from align.data.prompts import read_prompt_rows
from align.evaluation.gallery import save_grid, to_pil
from align.evaluation.intervals import Mean, bootstrap, evenly_spaced, over_tasks
from align.evaluation.pictures import Drawing, PictureFolder, Wanted, folder_name, noise_seed
from align.evaluation.scored import score_pictures
from align.families import Family
from align.sampling.diversity import Features, pairwise, thumbnails
from align.shapes.world import held_out_prompts
from rewards import RewardConfig, RewardSum, parse_rewards
from rewards.common.device import Launched
from rewards.common.files import write_text
from rewards.common.page import Card, Figure, Page, Table
from rewards.models.shapes import Shapes
from rewards.models.shapes import parse as parse_caption

STRICT = "Shapes (strict)"  # the right picture against a wrong one, beside Shapes' partial credit
Images = Mapping[str, PictureFolder]  # model -> P*K pictures: K a prompt, one prompt after another
Scores = Mapping[str, Mapping[str, np.ndarray]]  # model -> reward -> (P*K,), as the images


@dataclass
class Comparison:
    """What models are compared on.

    Args:
        prompts: a prompt file (.txt, .jsonl, .json, .csv, .tsv) or ``shapes``, the embedded world's held-out set. What
            it says of a prompt beside its text goes to the rewards as metadata.
        reward: what the pictures are scored by, as :func:`rewards.parse_rewards` reads it, without weights; default
            ``Shapes``. The first decides the win rate (``Shapes``: by its strict verdict, the right picture against a
            wrong one).
        samples_per_prompt: pictures per prompt, each with a seed of its own.
        num_inference_steps: sampler steps; null is the pipeline's own default.
        guidance_scale: guidance scale; null is the pipeline's own default.
        noise: what names the noise that a picture starts from: ``prompt``, the text and the number of the picture of it
            (:func:`align.evaluation.pictures.noise_seed`), whatever else is drawn; or ``index``, the older rule by
            which picture k of prompt j has the seed ``seed + j * samples_per_prompt + k``.
        seed: another one is other noise, for every model.
        batch_size: pictures sampled at once.
        max_prompts: use evenly spaced prompts, so many at most.
        task_column: tables show every reward for each value of this column too, where all prompts have one.
    """

    prompts: str = "shapes"
    reward: list[RewardConfig] = field(default_factory=list)
    samples_per_prompt: int = 1
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    noise: Literal["prompt", "index"] = "prompt"
    seed: int = 1000
    batch_size: int = 64
    max_prompts: int | None = None
    task_column: str = "task"

    def __post_init__(self) -> None:
        self.reward = parse_rewards(self.reward or "Shapes", weighted=False)

    @property
    def deciding_reward(self) -> str:
        return STRICT if self.reward[0].title == "Shapes" else self.reward[0].title

    def bench(self, device: str | None = None) -> Bench:
        """Read the prompts, evenly spaced where there are more than ``max_prompts``, and load the rewards, with
        ``Shapes`` its strict verdict too. Raises :class:`UserError`, also for counts below 1."""
        require_at_least(1, self, "samples_per_prompt", "num_inference_steps", "batch_size", "max_prompts")
        if self.prompts == "shapes":
            rows = [{"prompt": prompt, "task": parse_caption(prompt).task} for prompt in held_out_prompts()]
        else:
            rows = read_prompt_rows(self.prompts)
        return self.of(rows, self.task_column, device)

    def of(
        self,
        rows: Sequence[Mapping[str, Any]],
        task_column: str | None,
        device: str | None = None,
        mean: Mean = "tasks",
    ) -> Bench:
        """:meth:`bench` of ``rows`` that are read already."""
        if self.max_prompts and self.max_prompts < len(rows):
            rows = [rows[k] for k in evenly_spaced(len(rows), self.max_prompts)]
        tasks = None
        if task_column is not None and all(task_column in row for row in rows):
            tasks = [str(row[task_column]) for row in rows]
        if tasks is None and task_column not in (None, "task"):
            raise UserError(f"not every prompt has a {task_column!r}; the first has {', '.join(rows[0])}")
        named = RewardSum.of(self.reward, device).rewards
        rewards = RewardSum(named | ({STRICT: Shapes(mode="strict")} if "Shapes" in named else {}))
        return Bench(rows, tasks, rewards, device or "cpu", mean)

    def wanted(self, rows: Sequence[Mapping[str, Any]]) -> list[Wanted]:
        """The pictures to draw of ``rows``, prompt after prompt."""
        each, wanted = self.samples_per_prompt, []
        for j, row in enumerate(rows):
            others = {key: value for key, value in row.items() if key != "prompt"}
            for k in range(each):
                named = self.noise == "prompt"
                seed = noise_seed(row["prompt"], k, self.seed) if named else self.seed + j * each + k
                wanted.append(Wanted(row["prompt"], seed, others))
        return wanted


@dataclass(frozen=True)
class Bench:
    """The prompts that models are compared on, each a row with ``prompt`` and what rewards read beside, their tasks
    where all have one, and the rewards that judge. ``mean``: a score is the mean over tasks, GenEval's, or over prompts
    whatever their task."""

    rows: Sequence[Mapping[str, Any]]
    tasks: Sequence[str] | None
    rewards: RewardSum
    device: str = "cpu"
    mean: Mean = "tasks"

    @property
    def prompts(self) -> list[str]:
        return [row["prompt"] for row in self.rows]


@dataclass(frozen=True)
class Compared:
    """What models drew of the same prompts and noise, how that was scored, and what :func:`compare` says of it."""

    settings: Comparison
    prompts: Sequence[str]
    images: dict[str, PictureFolder]
    scores: dict[str, dict[str, np.ndarray]]
    report: dict[str, Any]

    def rows(self) -> list[dict[str, Any]]:
        """Prompt, seed and every model's scores of each image."""
        return [
            {"prompt": one.prompt, "seed": one.seed}
            | {f"{model}/{reward}": float(v[k]) for model in self.scores for reward, v in self.scores[model].items()}
            for k, one in enumerate(next(iter(self.images.values())).wanted)
        ]

    def show(self, folder: Path, title: str, tables: Sequence[Table], charts: Sequence[Image] = ()) -> None:
        """Write ``gallery.png`` and, with ``tables`` and ``charts``, ``gallery.html``: the first image of evenly spaced
        prompts."""
        samples, models = self.settings.samples_per_prompt, list(self.images)
        few = evenly_spaced(len(self.prompts), 16)
        images = torch.stack([self.images[model][k * samples] for k in few for model in models])
        save_grid(images, [self.prompts[k] for k in few], folder / "gallery.png", 8, models)

        def figure(model: str, k: int) -> Figure:
            return Figure(to_pil(self.images[model][k]), model, {r: v[k] for r, v in self.scores[model].items()})

        cards = [
            Card(self.prompts[k], [figure(model, k * samples) for model in models])
            for k in evenly_spaced(len(self.prompts), 48)
        ]
        introduction = (
            "The same prompts and seeds through each; evenly spaced prompts, the first image of each. "
            f"{self.settings.deciding_reward} decides; ties count one half."
        )
        write_text(folder / "gallery.html", Page(title, introduction, tables, cards, charts).html())


def draw_and_compare(
    models: Iterable[tuple[str, Family]],
    settings: Comparison,
    bench: Bench,
    folder: Path,
    resolution: Resolution = None,
    launched: Launched | None = None,
) -> Compared | None:
    """Every model, by name, on ``bench``; pictures are kept in ``folder/images/MODEL`` and scores in
    ``folder/scores/``, where they are found again. Models come one by one, so a later may use up an earlier. Of several
    processes each draws and scores a share, and the first returns the result."""
    drawing = Drawing(settings.num_inference_steps, settings.guidance_scale, resolution)
    wanted, images = settings.wanted(bench.rows), dict[str, PictureFolder]()
    launched = launched or Launched()
    for name, family in models:
        place = folder / "images" / folder_name(name, [pictures.path.name for pictures in images.values()])
        images[name] = PictureFolder(place, wanted, settings.batch_size)
        images[name].draw(family, drawing, launched, name)
    how = bench.rewards, settings.reward, folder / "scores", min(settings.batch_size, 64), bench.device, launched
    scores = {name: score_pictures(pictures, *how) for name, pictures in images.items()}
    if launched.rank:
        return None
    report = compare(scores, bench.tasks, settings.samples_per_prompt, settings.deciding_reward, bench.mean)
    report["drawn"] = {name: {k: v for k, v in one.record.items() if k != "contents"} for name, one in images.items()}
    return Compared(settings, bench.prompts, images, scores, report)


def compare(
    scores: Scores, tasks: Sequence[str] | None, samples: int, decides: str, mean: Mean = "tasks"
) -> dict[str, Any]:
    """Means, medians and win rates per reward, as plain values under names such as ``base_mean``.

    Win rate: the share of pictures where a model scores higher than the first, ties one half; its 95 % interval is a
    bootstrap over prompts, since pictures of one prompt are not independent. With one model beside the first it is
    called ``win_rate``, with several ``{model}_win_rate``. Task means and ``overall``, the mean over tasks, follow
    GenEval. ``{model}_ci`` is the interval of a model's mean, with tasks of the mean over them, and ``difference`` how
    far that is above the first model's, on the same prompts and noise, with its interval ``difference_ci``. Where
    ``mean`` is ``prompts`` tasks have means, and nothing else is of tasks.
    """
    models, within = list(scores), tasks if mean == "tasks" else None
    challengers = {model: f"{model}_" if len(models) > 2 else "" for model in models[1:]}
    report: dict[str, Any] = {"models": models, "rewards": {}}
    for reward, baseline in scores[models[0]].items():
        values = {model: scores[model][reward] for model in models}
        entry: dict[str, Any] = {f"{model}_mean": v.mean() for model, v in values.items()}
        entry |= {f"{model}_median": np.median(v) for model, v in values.items()}
        each = {model: v.reshape(-1, samples).mean(1) for model, v in values.items()}
        entry |= {f"{model}_ci": bootstrap(v, within) for model, v in each.items()}
        for model, prefix in challengers.items():
            wins = ((values[model] > baseline) + 0.5 * (values[model] == baseline)).reshape(-1, samples).mean(1)
            entry |= {f"{prefix}win_rate": wins.mean(), f"{prefix}win_rate_ci": bootstrap(wins)}
            more = each[model] - each[models[0]]
            entry |= {
                f"{prefix}difference": over_tasks(more, within),
                f"{prefix}difference_ci": bootstrap(more, within),
            }
        if tasks is not None:
            of, names = np.array(tasks), list(dict.fromkeys(tasks))
            entry["tasks"] = {t: {model: v[of == t].mean() for model, v in each.items()} for t in names}
        if within is not None:
            entry |= {f"{model}_overall": np.mean([entry["tasks"][t][model] for t in names]) for model in models}
        report["rewards"][reward] = entry
    report |= {key: value for key, value in report["rewards"][decides].items() if "win_rate" in key}
    return json.loads(json.dumps(report, default=float))


def overall(entry: Mapping[str, Any], model: str) -> float:
    """A model's score in a reward's entry of :func:`compare`: the mean over tasks, without tasks that over images."""
    return entry.get(f"{model}_overall", entry[f"{model}_mean"])


def diversity(images: Images, samples: int, features: Features | None) -> dict[str, dict[str, float]]:
    """Mean distance of two images of a prompt, over prompts, for every model: in pixels, and in features."""
    distances: dict[str, dict[str, float]] = {"pixels": {}}
    for model, drawn in images.items():
        groups = torch.arange(len(drawn)) // samples
        small = torch.cat([thumbnails(part) for part in drawn.split(64)])
        distances["pixels"][model] = pairwise(small, groups).mean().item()
        if features is not None:
            values = torch.cat([features(part) for part in drawn.split(64)])
            distances.setdefault("features", {})[model] = pairwise(values, groups, features.power).mean().item()
    return distances


def table(report: Mapping[str, Any]) -> Table:
    """:func:`compare`'s report, with ``diversity`` where it was added."""
    models, several = report["models"], len(report["models"]) > 2
    rates = {f"{model}_win_rate": f"{model}, win rate" for model in models[1:]} if several else {"win_rate": "win rate"}
    rates = rates if len(models) > 1 else {}
    rows = []
    for reward, entry in report["rewards"].items():
        intervals = [(entry[rate], *entry[f"{rate}_ci"]) for rate in rates]
        cells = [f"{rate:.3f} ({low:.3f}–{high:.3f})" for rate, low, high in intervals]
        differences = [name.replace("win_rate", "difference") for name in rates]
        cells += ["{:+.3f} ({:+.3f}–{:+.3f})".format(entry[d], *entry[f"{d}_ci"]) for d in differences]
        rows.append([reward, *(f"{overall(entry, model):.3f}" for model in models), *cells])
        for task, means in entry.get("tasks", {}).items():
            rows.append([f"{reward}: {task.replace('_', ' ')}", *(f"{means[model]:.3f}" for model in models)])
    for name, means in report.get("diversity", {}).items():
        rows.append([f"diversity, {name}", *(f"{means[model]:.4f}" for model in models)])
    titles = [*rates.values(), *(title.replace("win rate", "difference") for title in rates.values())]
    return Table(["", *models, *(f"{title} (95 % interval)" for title in titles)], rows)


def depends(report: Mapping[str, Any]) -> str:
    """What the figures depend on, in a line."""
    drawn = next(iter(report["drawn"].values()))
    words = [f"{drawn['num_inference_steps']} steps", f"guidance {drawn['guidance_scale']:g}", drawn["dtype"]]
    words.append(f"{drawn['resolution'] or 'own'} resolution, latents {' x '.join(map(str, drawn['latents']))}")
    words.append(f"{report['samples_per_prompt']} pictures of each of {report['prompts']} prompts")
    words.append(f"noise by {report['noise']}, seed {report['seed']}")
    return "; ".join(words)


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """The few figures that scripts read: the last line that ``align.evaluate`` prints."""
    figures = {name: value for name, value in report.items() if "win_rate" in name or name == "gallery"}
    strict = report["rewards"].get(STRICT)
    if strict is None:
        return figures
    return {f"strict_{model}": overall(strict, model) for model in report["models"]} | figures
