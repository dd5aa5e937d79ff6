"""Write the README's results from ``results/*.json``:  ``make results``. A test fails when the two are out of step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from align.files import write
from tests.benchmarks import RESULTS, spread

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- results: made by `make results`, do not edit -->", "<!-- end of results -->"


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def _dpo(name: str) -> str:
    found = load(name)
    lines = [
        f"**Diffusion-DPO, `{found['config']}`** ({found['date']}, {found['hardware']})",
        "",
        "| seed | strict base | strict tuned | rise | win rate, strict (95 % interval) | win rate, graded "
        "| held-out implicit accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in found["seeds"]:
        wins = [
            f"{of['win_rate']:.3f} ({' to '.join(f'{x:.3f}' for x in of['win_rate_ci'])})"
            for of in (run, run["graded"])
        ]
        lines.append(
            f"| {run['seed']} | {run['strict_base']:.3f} | {run['strict_tuned']:.3f} "
            f"| {run['strict_tuned'] - run['strict_base']:+.3f} | {' | '.join(wins)} "
            f"| {run['held_out_implicit_acc']:.3f} |"
        )
    changes = []
    for task in found["seeds"][0]["tasks"]:
        base, tuned = (mean([run["tasks"][task][who] for run in found["seeds"]]) for who in ("base", "tuned"))
        changes.append(f"{task.replace('_', ' ')} {base:.2f} → {tuned:.2f}")
    lines += ["", f"Strict by task, mean over seeds: {', '.join(changes)}."]
    return "\n".join(lines)


def _online(name: str, title: str) -> str:
    found = load(name)
    runs = found["seeds"]
    lines = [
        f"**{title}, `{found['config']}`** ({found['date']}, {found['hardware']}): {runs[0]['pictures']:,.0f} pictures "
        "generated a seed",
        "",
        "| seed | strict base | strict tuned | rise | graded | win rate, strict (95 % interval) | diversity, pixels |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        low, high = run["win_rate_ci"]
        before, after = (run["diversity"]["pixels"][who] for who in ("base", "tuned"))
        lines.append(
            f"| {run['seed']} | {run['strict_base']:.3f} | {run['strict_tuned']:.3f} "
            f"| {run['strict_tuned'] - run['strict_base']:+.3f} | {run['graded_base']:.3f} → {run['graded_tuned']:.3f} "
            f"| {run['win_rate']:.3f} ({low:.3f} to {high:.3f}) "
            f"| {before:.3f} → {after:.3f} ({after / before - 1:+.0%}) |"
        )
    changes = []
    for task in runs[0]["tasks"]:
        base, tuned = (mean([run["tasks"][task][who] for run in runs]) for who in ("base", "tuned"))
        changes.append(f"{task.replace('_', ' ')} {base:.2f} → {tuned:.2f}")
    lines += ["", f"Strict by task, mean over seeds: {', '.join(changes)}.", ""]
    lines += [f"![Learning curves of {title}](tests/benchmarks/results/{name}.png)"]
    return "\n".join(lines)


def _b2() -> str:
    found = load("b2_diffurl")
    seeds = ", ".join(map(str, found["seeds"]))
    lines = [
        f"**B²-DiffuRL's claim** ({found['date']}, {found['hardware']}), seeds {seeds}: means, with the range over "
        "seeds in brackets. *At equal evaluations* is read off the curve of single held-out pictures at the total of "
        "the cheapest arm.",
        "",
        "| update | rollout | pictures | evaluations | updates | strict, at equal pictures "
        "| strict, at equal evaluations | diversity, pixels |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rule in found["configs"]:
        for part in dict.fromkeys(run["part"] for run in found["runs"]):
            runs = [run for run in found["runs"] if run["rule"] == rule and run["part"] == part]
            if not runs:
                continue
            change = [run["diversity"]["pixels"]["tuned"] / run["diversity"]["pixels"]["base"] - 1 for run in runs]
            lines.append(
                f"| {rule} | {part} | {mean([run['pictures'] for run in runs]):,.0f} "
                f"| {mean([run['evaluations'] for run in runs]):,.0f} | {mean([run['updates'] for run in runs]):.0f} "
                f"| {runs[0]['strict_base']:.3f} → {spread([run['strict_tuned'] for run in runs])} "
                f"| {spread([run['strict_at_least'] for run in runs])} | {mean(change):+.1%} |"
            )
    pictures = " ".join(
        f"![B²-DiffuRL over {rule}](tests/benchmarks/results/b2_{rule.lower()}.png)" for rule in found["configs"]
    )
    return "\n".join([*lines, "", pictures])


def _emoji() -> str:
    found = load("emoji")
    after = spread([run["after"] for run in found["seeds"]])
    before = spread([run["before"] for run in found["seeds"]])
    return (
        f"**Emoji, noto over openmoji, `{found['config']}`** ({found['date']}): implicit-reward accuracy on "
        f"{found['seeds'][0]['held_out_pairs']} held-out captions, mean (range) of {len(found['seeds'])} seeds: "
        f"before {before}, after {after}."
    )


def _overhead() -> str:
    found = load("overhead")
    return (
        f"**Overhead of the loop** ({found['date']}, {found['hardware']}): an update takes {found['ratio']:.3f} times "
        f"its bare forward and backward calls (`shapes-sd`, {found['pairs']} pairs, medians of {found['updates']})."
    )


def _overhead_online() -> str:
    found = load("overhead_online")
    return (
        f"**Overhead of an online training phase** ({found['date']}, {found['hardware']}): an update takes "
        f"{found['ratio']:.3f} times its bare forward and backward calls (`shapes-sd`, DDPO, {found['rows']} guided "
        f"rows, medians of {found['updates']})."
    )


def _shapes() -> str:
    found = load("shapes_reward")
    return f"**The reward that looks** ({found['date']}): {found['summary']}"


SECTIONS: dict[str, Callable[[], str]] = {
    "dpo_shapes_sd": lambda: _dpo("dpo_shapes_sd"),
    "dpo_shapes_sd3": lambda: _dpo("dpo_shapes_sd3"),
    "emoji": _emoji,
    "online_ddpo": lambda: _online("online_ddpo", "DDPO"),
    "online_flow_grpo": lambda: _online("online_flow_grpo", "Flow-GRPO"),
    "online_d3po": lambda: _online("online_d3po", "D3PO, the reward as proxy for people"),
    "b2_diffurl": _b2,
    "shapes_reward": _shapes,
    "overhead": _overhead,
    "overhead_online": _overhead_online,
}


def results() -> str:
    """The results section: one paragraph or table for every results file there is."""
    return "\n\n".join(section() for name, section in SECTIONS.items() if (RESULTS / f"{name}.json").exists())


def filled(text: str) -> str:
    """``text`` with what stands between the marks replaced by the results."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{results()}\n{END}{tail}"


if __name__ == "__main__":
    write(README, filled(README.read_text(encoding="utf-8")))
