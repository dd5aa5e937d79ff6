"""Which metrics of runs a page shows together, in which section, and in whose words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from align.evaluation.curves import Curve


@dataclass(frozen=True)
class SectionKey:
    """A heading, what a reader should know of it, and whether it opens only when asked."""

    title: str
    note: str
    folded: bool = False


REWARDS = SectionKey(
    "Rewards",
    "Mean score of a rollout's pictures, and of held-out prompts (dashed). A reward of weight 0 is watched and not "
    "trained on: where one falls while the trained one rises, the policy hacks its reward.",
)
PREFERENCES = SectionKey(
    "Preferences",
    "How the trained model tells preferred from rejected pictures, against its reference; dashed on held-out pairs.",
)
DIVERSITY = SectionKey("Diversity", "Mean distance of two pictures of one prompt. It falls as a policy collapses.")
DRIFT = SectionKey("Drift", "How far the policy moves: from its last rollout, and from its reference.")
OPTIMIZATION = SectionKey("Loss and gradient", "")
REST = SectionKey("Everything else that was logged", "", folded=True)
SECTIONS = (REWARDS, PREFERENCES, DIVERSITY, DRIFT, OPTIMIZATION, REST)

MOST = 48  # panels of the last section; an objective may log a metric for each of many tasks
COUNTERS = ("step", "rollout", "rollout/pictures", "evaluations/trained", "evaluations/frozen")  # axes, not curves

KNOWN: Mapping[str, tuple[SectionKey, str]] = {
    "reward": (REWARDS, "Reward"),
    "best_so_far": (REWARDS, "Best picture yet, mean over prompts"),
    "implicit_acc": (PREFERENCES, "Implicit accuracy"),
    "delta_winner": (PREFERENCES, "Error against the reference, preferred"),
    "delta_loser": (PREFERENCES, "Error against the reference, rejected"),
    "error_winner": (PREFERENCES, "Denoising error, preferred"),
    "clip_fraction": (DRIFT, "Clip share"),
    "approx_kl": (DRIFT, "KL to the rollout's policy"),
    "kl_reference": (DRIFT, "KL to the reference"),
    "rollout/kl": (DRIFT, "KL of the noise to the prior"),
    "divergence": (DRIFT, "Divergence from the teachers"),
    "moved": (DRIFT, "Squared change of the prediction"),
    "ratio_mean": (DRIFT, "Likelihood ratio, mean"),
    "ratio_max": (DRIFT, "Likelihood ratio, greatest"),
    "loss": (OPTIMIZATION, "Loss"),
    "grad_norm": (OPTIMIZATION, "Gradient norm"),
    "lr": (OPTIMIZATION, "Learning rate"),
}
DIVERSE, REWARD, HELD_OUT = "rollout/diversity/", "rollout/reward/", "validation/"


@dataclass(frozen=True)
class PanelKey:
    """What is drawn into one chart: ``metrics`` as they are logged, what is trained on before what is held out."""

    section: SectionKey
    title: str
    tag: str
    metrics: Sequence[str]


def panels_of(curves: Sequence[Mapping[str, Curve]], weights: Sequence[Mapping[str, float]]) -> list[PanelKey]:
    """The panels of runs with these ``curves`` and these ``weights`` of rewards, in order."""
    metrics = list(dict.fromkeys(name for run in curves for name in run))
    weight = {title: value for run in reversed(weights) for title, value in run.items()}
    panels = [*_rewards(metrics, weight), *_others(metrics, weight)]
    order = list(KNOWN)
    panels.sort(key=lambda panel: order.index(panel.metrics[0]) if panel.metrics[0] in KNOWN else -1)
    rest = [panel for panel in panels if panel.section is REST]
    return [panel for panel in panels if panel.section is not REST] + rest[:MOST]


def _rewards(metrics: Sequence[str], weight: Mapping[str, float]) -> Iterator[PanelKey]:
    """Trained ones first, then their sum where that is another curve, then the watched."""
    titles = [name.removeprefix(REWARD) for name in metrics if name.startswith(REWARD)]
    titles += [title for title in weight if title not in titles and HELD_OUT + title in metrics]
    trained = [title for title in titles if title != "total" and weight.get(title, 1.0)]
    watched = [title for title in titles if title != "total" and not weight.get(title, 1.0)]
    total = ["total"] if "total" in titles and (len(trained) != 1 or weight.get(trained[0], 1.0) != 1) else []
    for title in trained + total + watched:
        tag = "weighted sum" if title == "total" else "trained on" if title in trained else "watched, weight 0"
        present = [name for name in (REWARD + title, HELD_OUT + title) if name in metrics]
        yield PanelKey(REWARDS, title, tag, present)


def _others(metrics: Sequence[str], weight: Mapping[str, float]) -> Iterator[PanelKey]:
    held = [HELD_OUT + title for title in weight]
    for name in metrics:
        if name in COUNTERS or name in held or name.startswith(REWARD):
            continue
        if name.startswith(HELD_OUT):
            bare = name.removeprefix(HELD_OUT)
            if bare not in metrics:  # else it is drawn into that one's chart
                yield PanelKey(*KNOWN.get(bare, (REST, bare)), "held out", [name])
        elif name.startswith(DIVERSE):
            yield PanelKey(DIVERSITY, f"Diversity in {name.removeprefix(DIVERSE)}", "", [name])
        else:
            section, title = KNOWN.get(name) or KNOWN.get(name.removeprefix("rollout/")) or (REST, _words(name))
            yield PanelKey(section, title, "", list(_present((name, HELD_OUT + name), metrics)))


def _present(names: Iterable[str], metrics: Sequence[str]) -> Iterator[str]:
    return (name for name in names if name in metrics)


def _words(name: str) -> str:
    return name.removeprefix("rollout/").replace("_", " ").replace("/", ", ").capitalize()
