"""Models side by side: the same prompts and noise through each, scored, and what the scores say of the differences.

:func:`draw_and_score` runs the models; :func:`compare`, :func:`diversity` and :func:`table` only read its results. The
first model is the baseline that every other is held against.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.common.errors import require_at_least
from align.data.prompts import read_prompt_rows
from align.families import Family
from align.sampling import generate
from align.sampling.diversity import Features, pairwise, thumbnails
from align.shapes.world import held_out_prompts
from rewards import RewardConfig, RewardSum, parse_rewards
from rewards.models.shapes import Shapes
from rewards.models.shapes import parse as parse_caption

STRICT = "Shapes (strict)"  # the right picture against a wrong one, beside Shapes' partial credit
Images = Mapping[str, Tensor]  # model -> (P*K, 3, H, W): K images a prompt, one prompt after another
Scores = Mapping[str, Mapping[str, np.ndarray]]  # model -> reward -> (P*K,), as the images


@dataclass
class Comparison:
    """What models are compared on.

    Args:
        prompts: a prompt file (.txt, .jsonl with ``prompt`` and perhaps ``task``, .json) or ``shapes``, the embedded
            world's held-out set.
        reward: what the pictures are scored by, as :func:`rewards.parse_rewards` reads it, without weights; default
            ``Shapes``. The first decides the win rate (``Shapes``: by its strict verdict, the right picture against a
            wrong one).
        samples_per_prompt: pictures per prompt, each with a seed of its own.
        num_inference_steps: sampler steps; null is the pipeline's own default.
        guidance_scale: guidance scale; null is the pipeline's own default.
        seed: picture k of prompt j starts from seed + j * samples_per_prompt + k, for every model.
        batch_size: pictures sampled at once.
        max_prompts: use evenly spaced prompts, so many at most.
    """

    prompts: str = "shapes"
    reward: list[RewardConfig] = field(default_factory=list)
    samples_per_prompt: int = 1
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 1000
    batch_size: int = 64
    max_prompts: int | None = None

    def __post_init__(self) -> None:
        self.reward = parse_rewards(self.reward or "Shapes", weighted=False)

    def check(self) -> None:
        """Raises :class:`UserError` for counts below 1."""
        require_at_least(1, self, "samples_per_prompt", "num_inference_steps", "batch_size", "max_prompts")

    @property
    def deciding_reward(self) -> str:
        return STRICT if self.reward[0].title == "Shapes" else self.reward[0].title

    def read_prompts(self) -> tuple[list[str], list[str] | None]:
        """The prompts, evenly spaced where there are more than ``max_prompts``, and their tasks where all have one."""
        if self.prompts == "shapes":
            rows = [{"prompt": prompt, "task": parse_caption(prompt).task} for prompt in held_out_prompts()]
        else:
            rows = read_prompt_rows(self.prompts)
        if self.max_prompts and self.max_prompts < len(rows):
            rows = [rows[k] for k in evenly_spaced(len(rows), self.max_prompts)]
        tasks = [str(row["task"]) for row in rows] if all("task" in row for row in rows) else None
        return [row["prompt"] for row in rows], tasks

    def load_rewards(self) -> RewardSum:
        """The rewards, with ``Shapes`` its strict verdict too."""
        rewards = RewardSum.of(self.reward).rewards
        return RewardSum(rewards | ({STRICT: Shapes(mode="strict")} if "Shapes" in rewards else {}))

    def texts_and_seeds(self, prompts: Sequence[str]) -> tuple[list[str], list[int]]:
        """Prompt and seed of every picture."""
        texts = [prompt for prompt in prompts for _ in range(self.samples_per_prompt)]
        return texts, list(range(self.seed, self.seed + len(texts)))


def draw_and_score(
    models: Iterable[tuple[str, Family]],
    settings: Comparison,
    prompts: Sequence[str],
    rewards: RewardSum,
    resolution: int | None = None,
) -> tuple[dict[str, Tensor], dict[str, dict[str, np.ndarray]]]:
    """Images and scores of every model, by name. Models come one by one, so a later may use up an earlier."""
    texts, seeds = settings.texts_and_seeds(prompts)
    images: dict[str, Tensor] = {}
    scores: dict[str, dict[str, np.ndarray]] = {}
    for name, family in models:
        images[name] = generate.sample_images(
            family.predict,
            family,
            texts,
            seeds,
            settings.num_inference_steps,
            settings.guidance_scale,
            settings.batch_size,
            resolution,
            name,
        )
        components = rewards.components(images=images[name], prompts=texts)
        scores[name] = {reward: components[reward].double().numpy() for reward in rewards.rewards}
    return images, scores


def compare(scores: Scores, tasks: Sequence[str] | None, samples: int, decides: str) -> dict[str, Any]:
    """Means, medians and win rates per reward, as plain values under names such as ``base_mean``.

    Win rate: the share of pictures where a model scores higher than the first, ties one half; its 95 % interval is a
    bootstrap over prompts, since pictures of one prompt are not independent. With one model beside the first it is
    called ``win_rate``, with several ``{model}_win_rate``. Task means and ``overall``, the mean over tasks, follow
    GenEval.
    """
    models = list(scores)
    challengers = {model: f"{model}_" if len(models) > 2 else "" for model in models[1:]}
    report: dict[str, Any] = {"models": models, "rewards": {}}
    for reward, baseline in scores[models[0]].items():
        values = {model: scores[model][reward] for model in models}
        entry: dict[str, Any] = {f"{model}_mean": v.mean() for model, v in values.items()}
        entry |= {f"{model}_median": np.median(v) for model, v in values.items()}
        for model, prefix in challengers.items():
            wins = ((values[model] > baseline) + 0.5 * (values[model] == baseline)).reshape(-1, samples).mean(1)
            entry |= {f"{prefix}win_rate": wins.mean(), f"{prefix}win_rate_ci": bootstrap(wins)}
        if tasks is not None:
            each, names = np.repeat(np.array(tasks), samples), list(dict.fromkeys(tasks))
            entry["tasks"] = {t: {model: v[each == t].mean() for model, v in values.items()} for t in names}
            entry |= {f"{model}_overall": np.mean([entry["tasks"][t][model] for t in names]) for model in models}
        report["rewards"][reward] = entry
    report |= {key: value for key, value in report["rewards"][decides].items() if "win_rate" in key}
    return json.loads(json.dumps(report, default=float))


def overall(entry: Mapping[str, Any], model: str) -> float:
    """A model's score in a reward's entry of :func:`compare`: the mean over tasks, without tasks that over images."""
    return entry.get(f"{model}_overall", entry[f"{model}_mean"])


def bootstrap(values: np.ndarray, resamples: int = 4000, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of ``values`` (N,)."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def diversity(images: Images, samples: int, features: Features | None) -> dict[str, dict[str, float]]:
    """Mean distance of two images of a prompt, over prompts, for every model: in pixels, and in features."""
    distances: dict[str, dict[str, float]] = {"pixels": {}}
    for model, drawn in images.items():
        groups = torch.arange(len(drawn)) // samples
        distances["pixels"][model] = pairwise(thumbnails(drawn), groups).mean().item()
        if features is not None:
            values = torch.cat([features(part) for part in drawn.split(64)])
            distances.setdefault("features", {})[model] = pairwise(values, groups, features.power).mean().item()
    return distances


def table(report: Mapping[str, Any]) -> str:
    """:func:`compare`'s report, with ``diversity`` where it was added, as a Markdown table."""
    models, several = report["models"], len(report["models"]) > 2
    rates = {f"{model}_win_rate": f"{model}, win rate" for model in models[1:]} if several else {"win_rate": "win rate"}
    heads = [*models, *(f"{title} (95 % interval)" for title in rates.values())]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]

    def line(*cells: str) -> None:
        lines.append(f"| {' | '.join(cells)} |" + " |" * (len(heads) + 1 - len(cells)))

    for reward, entry in report["rewards"].items():
        intervals = [(entry[rate], *entry[f"{rate}_ci"]) for rate in rates]
        cells = [f"{rate:.3f} ({low:.3f}–{high:.3f})" for rate, low, high in intervals]
        line(f"**{reward}**", *(f"{overall(entry, model):.3f}" for model in models), *cells)
        for task, means in entry.get("tasks", {}).items():
            line(task.replace("_", " "), *(f"{means[model]:.3f}" for model in models))
    for name, means in report.get("diversity", {}).items():
        line(f"diversity, {name}", *(f"{means[model]:.4f}" for model in models))
    return "\n".join(lines)


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """The few figures that scripts read: the last line that ``align.evaluate`` prints."""
    figures = {name: report[name] for name in ("win_rate", "win_rate_ci", "gallery")}
    strict = report["rewards"].get(STRICT)
    if strict is None:
        return figures
    return {f"strict_{model}": overall(strict, model) for model in report["models"]} | figures


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` positions, from first to last: nobody picked the good ones."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()
