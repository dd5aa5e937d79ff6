"""Write the results in ``tests/benchmarks/README.md`` from ``results/*.json``:  ``make results``.

A test fails when the two are out of step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from rewards.common.files import write_text
from tests.benchmarks import RESULTS, mean_curve, span, spread

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- results: made by `make results`, do not edit -->", "<!-- end of results -->"

# the runs that draw as many pictures as each other, to set the methods side by side
EQUAL = {
    "online_ddpo_unguided": "DDPO, shapes-sd",
    "online_flow_grpo_unguided": "Flow-GRPO, shapes-sd3",
    "online_d3po_unguided": "D3PO, shapes-sd",
}


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def _dpo(name: str, title: str) -> str:
    found = load(name)
    lines = [
        f"**{title}, `{found['config']}`** ({found['date']}, {found['hardware']})",
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


def _diversity(run: Mapping[str, Any]) -> float:
    """By how much of the base's diversity, in pixels, the tuned pictures of an online run have more."""
    return float(run["diversity"]["pixels"]["tuned"] / run["diversity"]["pixels"]["base"] - 1)


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
            f"| {before:.3f} → {after:.3f} ({_diversity(run):+.0%}) |"
        )
    changes = []
    for task in runs[0]["tasks"]:
        base, tuned = (mean([run["tasks"][task][who] for run in runs]) for who in ("base", "tuned"))
        changes.append(f"{task.replace('_', ' ')} {base:.2f} → {tuned:.2f}")
    lines += ["", f"Strict by task, mean over seeds: {', '.join(changes)}.", ""]
    lines += [f"![Learning curves of {title}](results/{name}.png)"]
    return "\n".join(lines)


def _equal() -> str:
    lines = [
        "**The three at equal pictures**, without guidance: means of the seeds, the range in brackets; network "
        "evaluations as counted when the last rollout was drawn.",
        "",
        "| method | pictures | evaluations | strict | rise | diversity, pixels |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in EQUAL.items():
        runs = load(name)["seeds"]
        change = [_diversity(run) for run in runs]
        lines.append(
            f"| {title} | {runs[0]['pictures']:,.0f} "
            f"| {mean([run['curve'][-1]['evaluations'] for run in runs]):,.0f} "
            f"| {runs[0]['strict_base']:.3f} → {spread([run['strict_tuned'] for run in runs])} "
            f"| {mean([run['strict_tuned'] - run['strict_base'] for run in runs]):+.3f} "
            f"| {mean(change):+.1%} ({min(change):+.1%} to {max(change):+.1%}) |"
        )
    return "\n".join([*lines, "", "![The three at equal pictures](results/online_equal.png)"])


def _equal_evaluations() -> str:
    found = load("equal")
    groups = dict[tuple[str, str], list[Any]]()
    for run in found["runs"]:
        groups.setdefault((run["pipeline"], run["method"]), []).append(run)
    lines = [
        f"**Every online method from about {found['budget']:,} network evaluations** "
        f"({span(run['date'] for run in found['runs'])}, {found['hardware']}), without guidance, in ten steps: means "
        "of the seeds, the range in brackets; 480 held-out pictures a seed. CPU is of the training, on a busy machine.",
        "",
        "| pipeline | method | seeds | pictures | evaluations | CPU, s | strict | rise | win rate, strict | graded "
        "| diversity, pixels |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (pipeline, method), runs in groups.items():
        change = [_diversity(run) for run in runs]
        strict, graded = ([run[kind] for run in runs] for kind in ("strict", "graded"))
        rise = mean([one["tuned_overall"] - one["base_overall"] for one in strict])
        lines.append(
            f"| {pipeline} | {method} | {len(runs)} | {mean([run['pictures'] for run in runs]):,.0f} "
            f"| {mean([run['evaluations'] for run in runs]):,.0f} | {mean([run['cpu_seconds'] for run in runs]):.0f} "
            f"| {strict[0]['base_overall']:.3f} → {spread([one['tuned_overall'] for one in strict])} | {rise:+.3f} "
            f"| {spread([one['win_rate'] for one in strict])} "
            f"| {graded[0]['base_overall']:.3f} → {spread([one['tuned_overall'] for one in graded])} "
            f"| {mean(change):+.1%} |"
        )
    pictures = [f"![{pipeline}](results/equal_{pipeline}.png)" for pipeline in dict.fromkeys(one for one, _ in groups)]
    return "\n".join([*lines, "", *pictures])


def _guided() -> str:
    found = load("guided")
    lines = [
        f"**Guided training of `shapes-sd3`, every weight** ({span(run['date'] for run in found['runs'])}, "
        f"{found['hardware']}), drawn and judged with guidance 3 in ten steps: strict, two pictures a prompt, 95 % "
        "interval of the difference. *Rendered* is the world's own pictures and the pretraining loss, no reward.",
        "",
        "| learns by | seed | evaluations | held out | difference | trained on | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in found["runs"]:
        cells = [run["arm"], str(run["seed"]), f"{run['evaluations']:,}"]
        for one in (run["held_out"], run["trained_on"]):
            low, high = one["difference_ci"]
            cells += [f"{one['base']:.3f} → {one['tuned']:.3f}", f"{low:+.3f} to {high:+.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _b2() -> str:
    found = load("b2_diffurl")
    seeds = ", ".join(map(str, sorted({run["seed"] for run in found["runs"]})))
    lines = [
        f"**B²-DiffuRL's claim** ({found['date']}, {found['hardware']}), guidance "
        f"{found['runs'][0]['guidance']:g}, seeds {seeds}: means, with the range over seeds in brackets. *At equal "
        "evaluations* is read off the curve of single held-out pictures at the total of the cheapest arm.",
        "",
        "| update | rollout | pictures | evaluations | updates | strict, at equal pictures "
        "| strict, at equal evaluations | diversity, pixels |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rules = dict.fromkeys(run["rule"] for run in found["runs"])
    for rule in rules:
        for part in dict.fromkeys(run["part"] for run in found["runs"]):
            runs = [run for run in found["runs"] if run["rule"] == rule and run["part"] == part]
            if not runs:
                continue
            change = [_diversity(run) for run in runs]
            lines.append(
                f"| {rule} | {part} | {mean([run['pictures'] for run in runs]):,.0f} "
                f"| {mean([run['evaluations'] for run in runs]):,.0f} | {mean([run['updates'] for run in runs]):.0f} "
                f"| {runs[0]['strict_base']:.3f} → {spread([run['strict_tuned'] for run in runs])} "
                f"| {spread([run['strict_at_least'] for run in runs])} | {mean(change):+.1%} |"
            )
    pictures = " ".join(f"![B²-DiffuRL over {rule}](results/b2_{rule.lower()}.png)" for rule in rules)
    return "\n".join([*lines, "", pictures])


def _find(name: str) -> str:
    found = load(name)
    low, high = found["gain_ci"]
    spread_of = found["diversity_learned"] / found["diversity_base"] - 1
    lines = [
        f"**FIND, `{found['config']}`, {found['model']}** ({found['date']}, {found['hardware']}): {found['prompts']} "
        f"held-out prompts that the base gets wrong, {found['pictures_per_prompt']} pictures each to learn from. "
        f"Strict success of NEW pictures {found['success_base']:.3f} → {found['success_learned']:.3f}, a gain of "
        f"{found['gain']:+.3f} ({low:+.3f} to {high:+.3f} over prompts); diversity of a prompt's pictures "
        f"{spread_of:+.0%}. Best-of-{found['best_of_n']['n']} by the same reward, one picture a prompt: "
        f"{found['best_of_n']['success_of_the_one_picture']:.3f}. {found['evaluations']:,} network evaluations.",
    ]
    other = found["policy_gradient"]
    best = max(point["strict"] for point in other["curve"])
    reached = (
        f"reached that success after {other['reached_at']:,} evaluations, {other['ratio']:.1f} times FIND's"
        if other["reached_at"]
        else f"did not reach that success within {other['spent']:,} evaluations (best {best:.3f})"
    )
    lines += ["", f"LoRA policy gradient (`{other['config']}`) on the same prompts {reached}.", ""]
    lines += [f"![The same noise draws without and with FIND](results/{name}.png)"]
    return "\n".join(lines)


def _reno(name: str) -> str:
    found = load(name)
    low, high = found["reno_less_best_of_n_ci"]
    lines = [
        f"**ReNO, `{found['config']}`, {found['model']}** ({found['date']}, {found['hardware']}): {found['prompts']} "
        f"held-out prompts, {found['iterates']} iterates of one noise or the best of {found['iterates']} pictures by "
        f"the same network, {found['evaluations']:,} network evaluations each, ReNO's with their gradients. ReNO's "
        f"strict score less the best picture's: {low:+.3f} to {high:+.3f} over prompts.",
        "",
        "| one picture a prompt | the network's score | graded | strict |",
        "|---|---|---|---|",
    ]
    kinds = {"start": "where ReNO starts", "reno": "ReNO's", "best_of_n": f"the best of {found['iterates']}"}
    for key, title in kinds.items():
        lines.append(f"| {title} | {' | '.join(f'{found[key][of]:.3f}' for of in ('net', 'graded', 'strict'))} |")
    return "\n".join([*lines, "", f"![Where it starts, the best picture, ReNO's](results/{name}.png)"])


def _opd() -> str:
    found = load("opd")
    tasks = list(found["teachers"])
    lines = [
        f"**On-policy distillation, `configs/opd_shapes_sd3.yaml`** ({found['date']}, {found['hardware']}): strict "
        f"(graded) score on held-out captions of each task, {found['pictures']} pictures each "
        f"({found['seeds'][0]['ode']['pictures']} of students from the base model), guidance {found['guidance']:g}, "
        f"{found['steps']} steps.",
        "",
        "| | " + " | ".join(tasks) + " | evaluations |",
        "|---" * (len(tasks) + 2) + "|",
    ]

    def row(name: str, scores: dict[str, dict[str, float]], spent: int | None) -> str:
        cells = [f"{scores['strict'][task]:.3f} ({scores['graded'][task]:.3f})" for task in tasks]
        return f"| {name} | {' | '.join(cells)} | {f'{spent:,}' if spent else ''} |"

    lines.append(row("base", found["base"], None))
    for task in tasks:
        lines.append(
            row(f"expert for {task}", found["teachers"][task]["scores"], found["teachers"][task]["evaluations"])
        )
    lines.append(row("experts' LoRAs averaged", found["averaged"], None))
    titles = {
        "cold": "student",
        "ode": "student from the base model",
        "sde": "student from the base model, `form: sde`",
        "joint": "joint training",
    }
    for run in found["seeds"]:
        for kind, title in titles.items():
            if kind in run:
                lines.append(row(f"{title}, seed {run['seed']}", run[kind]["scores"], run[kind]["evaluations"]))

    def kept(mode: str, task: str) -> str:
        """The share of the expert's own score that the student has, a mean over seeds."""
        expert = found["teachers"][task]["scores"][mode][task]
        return f"{mean(run['cold']['scores'][mode][task] for run in found['seeds']) / expert:.0%} in {task}"

    kept_of = [f"{mode} {', '.join(kept(mode, task) for task in tasks)}" for mode in ("strict", "graded")]
    ode, sde = (mean_curve([run[kind]["curve"] for run in found["seeds"]], "pictures") for kind in ("ode", "sde"))
    level = max(score for _, score in sde)
    needed = [next((f"{drawn:,.0f}" for drawn, score in line if score >= level), None) for line in (ode, sde)]
    as_good = f"is as good after {needed[0]}" if needed[0] else "is never as good"
    gradient, joint = found["gradient"], [run["joint"]["curve"] for run in found["seeds"] if "joint" in run]
    lines += [
        "",
        f"Of each expert's score on its own task the student keeps, mean over seeds: {'; '.join(kept_of)}.",
        "",
        f"From the base model, `form: sde` is at its best, {level:.3f} in the mean of the curves below, after "
        f"{needed[1]} pictures; `form: ode` {as_good}.",
        "",
    ]
    if joint:
        looked = mean_curve(joint, "evaluations")
        spent, best = max(looked, key=lambda point: point[1])
        lines += [
            f"Joint training is at its best, {best:.3f} in the mean of its curves on the held-out captions, after "
            f"{spent:,.0f} evaluations, and ends at {looked[-1][1]:.3f}.",
            "",
        ]
    lines += [
        "On the same rollouts PPO's gradient has a variance of "
        f"{gradient['ppo_variance_over_squared_gradient']:.2g} times the squared norm of the closed form's gradient, "
        "which has none.",
        "",
        "![Students on the way](results/opd.png)"
        + (" ![Beside joint training](results/opd_joint.png)" if joint else ""),
    ]
    return "\n".join(lines)


def _pruning() -> str:
    found = load("pruning")
    summary, strict = found["summary"], found["summary"]["strict"]
    whole = strict["whole method"]
    lines = [
        f"**Pruning, healing, INT4, `{found['config']}`** ({found['date']}, {found['hardware']}): strict ShapesEval on "
        f"the held-out prompts, mean (range) over seeds; the original has {summary['strict_original']:.3f} in "
        f"{summary['bytes_bf16']:,} bytes of bf16, INT4 alone {whole['int4-alone'][0]:.3f}.",
        "",
        "| variant | seeds | parameters | bytes after INT4 | denoiser's time | pruned | healed | INT4 | biases tuned |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, variant in found["variants"].items():
        small = variant["seeds"][0]["pipelines"]["int4"]
        fall = f"{1 - small['denoiser_bytes'] / summary['bytes_bf16']:.1%}"
        cells = [
            name + (" (chose the same)" if variant["same_as_whole"] else ""),
            " ".join(str(run["seed"]) for run in variant["seeds"]),
            f"{small['parameters'] / summary['parameters'] - 1:+.1%}",
            f"{small['denoiser_bytes']:,} (−{fall})",
            f"× {summary['latency'][name]:.2f}" if name in summary["latency"] else "",
            *(
                spread(strict[name][kind]) if strict[name][kind] else ""
                for kind in ("pruned", "healed", "int4", "int4-tuned")
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "![The plan: what goes, what is frozen](results/pruning_plan.png)",
        "![Original and compressed, the same noise](results/pruning.png)",
    ]
    return "\n".join(lines)


PAPER = {  # HierarchicalPrune (arXiv 2508.04663), its tables: GB of the transformer in bf16, and after INT4
    "SD3.5-large transformer": ("15.8", ""),
    "− 8 of 38 blocks": ("12.6", "3.56"),
    "− 8 blocks, − components of 13–19": ("", "3.24"),
    "FLUX.1-schnell transformer": ("22.6", ""),
    "− 6 of 19 double, − 12 of 38 single blocks": ("15.9", "4.44"),
}


def _int4() -> str:
    found = load("int4")
    lines = [
        f"**INT4 alone** ({found['date']}, {found['hardware']}): the embedded pipelines unpruned, denoiser and text "
        "encoders in NF4; pictures drawn in float32.",
        "",
        "| model | denoiser | bytes of its file | strict | win rate over bf16 (95 % interval) | error of the weights |",
        "|---|---|---|---|---|---|",
    ]
    for model, variants in found["models"].items():
        for name, entry in variants.items():
            if "win_rate" in entry:
                low, high = entry["win_rate_ci"]
                rest = f"{entry['win_rate']:.3f} ({low:.3f} to {high:.3f}) | {entry['weight_error']:.3f}"
            else:
                rest = " | "
            size = f"{entry['file_bytes']:,}" + (f" (−{entry['bytes_fall']:.1%})" if "bytes_fall" in entry else "")
            lines.append(f"| {model} | {name.replace('_', ' ')} | {size} | {entry['strict']:.3f} | {rest} |")
    lines += [
        "",
        "The large models from their real configs on the meta device (`python -m tests.benchmarks.sizes`), "
        "GB of 10⁹ bytes; the first three columns count every parameter at 16, 4.5 and 4.127 bits, the last two what "
        "is written with the "
        "Linears alone in 4 bits. Which blocks of FLUX go is our choice; the paper names none.",
        "",
        "| | parameters | bf16 | NF4 | NF4, double | file: bf16 | file: NF4 | paper: bf16 | paper: INT4 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    paper = dict(PAPER)
    for row in found["sizes"]:
        sizes = (row[key] / 1e9 for key in ("bf16", "nf4", "nf4_double", "file_bf16", "file_nf4"))
        cells = " | ".join(f"{size:.2f}" for size in sizes)
        theirs = " | ".join(paper.pop(row["name"], ("", "")))
        lines.append(f"| {row['name']} | {row['parameters'] / 1e9:.2f} B | {cells} | {theirs} |")
    return "\n".join(lines)


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


def _jpeg() -> str:
    found = load("jpeg")
    pictures = sorted({run["pictures"] for run in found["runs"]})
    lines = [
        f"**The online objectives on DDPO's own first task, small JPEG files** ({found['date']}, {found['hardware']}): "
        f"the configs above with that reward alone, {' or '.join(f'{n:,}' for n in pictures)} pictures a run; file "
        "size on the held-out prompts, the share of pictures that came out smaller (ties ½), and what it cost: nothing "
        "holds the pictures to their prompts",
        "",
        "| method | seed | kB base → tuned | smaller (95 % interval) | strict base → tuned "
        "| diversity of rollouts, first → last |",
        "|---|---|---|---|---|---|",
    ]
    for run in found["runs"]:
        low, high = run["smaller_ci"]
        lines.append(
            f"| {run['method']} | {run['seed']} | {run['kilobytes_base']:.3f} → {run['kilobytes_tuned']:.3f} "
            f"({run['kilobytes_tuned'] / run['kilobytes_base'] - 1:+.1%}) "
            f"| {run['smaller']:.3f} ({low:.3f} to {high:.3f}) | {run['strict_base']:.3f} → {run['strict_tuned']:.3f} "
            f"| {run['diversity_first']:.3f} → {run['diversity_last']:.3f} |"
        )
    lines += ["", "![File sizes of the pictures of each rollout](results/jpeg.png)"]
    return "\n".join(lines)


def _overhead_online() -> str:
    found = load("overhead_online")
    return (
        f"**Overhead of an online training phase** ({found['date']}, {found['hardware']}): an update takes "
        f"{found['ratio']:.3f} times its bare forward and backward calls (`shapes-sd`, DDPO, {found['rows']} guided "
        f"rows, medians of {found['updates']})."
    )


def _parallel() -> str:
    found = load("parallel")
    lines = [
        f"**Two processes and one** ({found['date']}, {found['hardware']}, {found['cores']} cores, load "
        f"{found['load_before']} before): Flow-GRPO on `shapes-sd3` with a LoRA, {found['images']} images a rollout, "
        f"medians of {found['rollouts'] - 1} rollouts with their updates, one thread a process. All weights of "
        f"`shapes-sd3` by DPO, with the frozen reference and the moments: {sum(found['bytes_one'].values()):,} bytes "
        f"in one process, {sum(found['bytes_fsdp2'].values()):,} in each of two that share them "
        f"({found['bytes_share']:.3f}).",
        "",
        "| processes | images a second | rows a second | over one |",
        "|---|---|---|---|",
    ]
    for name, kind in {"one": "one", "two, data-parallel": "ddp", "two, FSDP2": "fsdp2"}.items():
        over = 1.0 if kind == "one" else found[f"{kind}_over_one"]
        lines.append(f"| {name} | {found[kind]['images_s']} | {found[kind]['rows_s']} | {over:.2f} |")
    return "\n".join(lines)


def _peers() -> str:
    found = load("peers")
    lines = [
        f"**Beside other repositories** ({found['date']}, {found['hardware']}): their scripts, as they are, and ours "
        "on the embedded pipelines, float32, in turn on one thread; medians. User CPU seconds an iteration once it "
        "runs; peak resident memory, libraries and start-up included. [`peers.py`](peers.py) says what's in each.",
        "",
        "| repository | runs | theirs, s | ours, s | ratio | theirs, MB | ours, MB | ratio | options of ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in found["peers"].items():
        theirs, ours, ratio = entry["theirs"], entry["ours"], entry["ratio"]
        options = " ".join(f"`{option}`" for option in entry["options"]) or "none"
        lines.append(
            f"| {name} ({entry['commit'][:7]}) | {entry['runs']} | {theirs['seconds']:.2f} | {ours['seconds']:.2f} "
            f"| {ratio['seconds']:.2f} | {theirs['peak_mb']:.0f} | {ours['peak_mb']:.0f} | {ratio['peak_mb']:.2f} "
            f"| {options} |"
        )
    return "\n".join(lines)


def _shapes() -> str:
    found = load("shapes_reward")
    return f"**The reward that looks** ({found['date']}): {found['summary']}"


def _direct_reward() -> str:
    found = load("direct_reward")
    runs = [(arm, run) for arm, seeds in found["arms"].items() for run in seeds]
    lines = [
        f"**Reward back-propagation by `ShapesNet`** ({span(run['date'] for _, run in runs)}, {found['hardware']}), "
        "of the pipeline that the config names; the exact reward is only watched. Held-out prompts, once each, base → "
        "tuned in ten steps at the training's guidance, of a stopped run by its last good checkpoint; for strict the "
        "95 % interval of the difference, over prompts. A soft eye's logits are divided by 4, so its scores are small.",
        "",
        "| arm | config | seed | updates | evaluations | `ShapesNet` | graded | strict | difference | win rate |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, run in runs:
        held_out = run["held_out"]
        changes = [
            f"{held_out[name]['base_overall']:.3f} → {held_out[name]['tuned_overall']:.3f}"
            for name in ("net", "graded", "strict")
        ]
        low, high = held_out["strict"]["difference_ci"]
        stopped = ", stopped by its rule" if run["stopped"] else ""
        lines.append(
            f"| {arm} | `{Path(run['config']).stem}` | {run['seed']} | {run['updates']}{stopped} "
            f"| {run['evaluations']:,} | {' | '.join(changes)} | {low:+.3f} to {high:+.3f} "
            f"| {held_out['strict']['win_rate']:.3f} |"
        )
    return "\n".join(lines)


def _shapes_net() -> str:
    found = load("shapes_net")
    lines = [
        f"**The small network that stands for it where a gradient is needed, `ShapesNet`** ({found['date']}): "
        f"{found['weights']:,} weights, {found['bytes'] / 1e6:.2f} MB, beside the exact graded score on pictures that "
        "it was not trained on. *Right above wrong*: how often it scores an exactly right picture higher than one "
        "that is not; *pairs*: how often it prefers the same of two pictures of one caption.",
        "",
        "| pictures | number | correlation | mean error | right above wrong | pairs |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["kinds"].items():
        pairs = f"{row['pairs_in_order']:.3f}" if "pairs_in_order" in row else ""
        lines.append(
            f"| {name} | {row['pictures']} | {row['correlation']:.3f} | {row['mean_absolute_error']:.3f} "
            f"| {row['right_above_wrong']:.3f} | {pairs} |"
        )
    return "\n".join(lines)


def _pretrain() -> str:
    found = load("pretrain")
    scores = found["scores"]
    tasks = list(scores["shapes-sd"]["made"]["tasks"])
    head = ["pipeline", "whose", "strict", "graded", *(task.replace("_", " ") for task in tasks)]
    lines = [
        f"**The embedded pipelines from nothing, `python -m align.shapes.scripts.pretrain`** ({found['date']}): "
        f"{found['minutes']:.0f} minutes of {found['cores']} cores, seed 0. ShapesEval on the held-out prompts at the "
        "default guidance, by task the strict one:",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for name, sides in scores.items():
        for whose, title in {"made": "made in that run", "shipped": "shipped"}.items():
            side = sides[whose]
            values = [side["strict"], side["graded"], *(side["tasks"][task] for task in tasks)]
            lines.append(f"| `{name}` | {title} | {' | '.join(f'{value:.3f}' for value in values)} |")
    return "\n".join(lines)


def _scoring() -> str:
    found = load("scoring")
    kills = found["kills"]
    lines = [
        f"**Scoring at scale, `rewards.score`** ({found['date']}, {found['hardware']}): batch {found['batch']}, "
        "pictures of mixed sizes read from disk, CLIP's architectures with random weights. `Elsewhere` stands in for "
        "an accelerator: it sleeps for half as long again as all the rest takes, and leaves the core alone.",
        "",
        "| scorer | pictures | pictures a second | share of wall time in the scorer | from the first batch on |",
        "|---|---|---|---|---|",
    ]
    for row in found["throughput"]:
        lines.append(
            f"| {row['scorer']} | {row['images']} | {row['images_per_second']:.2f} | {row['share_in_scorer']:.1%} "
            f"| {row['share_in_scorer_from_the_first_batch_on']:.1%} |"
        )
    lines += [
        "",
        f"Killed {kills['kills']} times at random in {kills['images']:,} pictures: "
        f"{kills['scored_exactly_once']:,} scored exactly once, {kills['missing']} missing, {kills['twice']} twice.",
    ]
    return "\n".join(lines)


def _online_gpu() -> str:
    found = load("online_gpu")
    titles = {"sd35_medium_flow_grpo": "SD3.5-medium, Flow-GRPO", "sd15_ddpo": "SD1.5, DDPO"}
    lines = [
        f"**Online training at full size** ({found['date']}, {found['hardware']}): random weights, "
        f"{found['precision']}, 512 pixels, the steps, guidance, LoRA and micro-batches of `flow_grpo_sd35.yaml` and "
        "`ddpo_sd15.yaml`; a row is one trained transition, with its reference where the config has one.",
        "",
        "| model | rollout, pictures a second | its peak, GiB | training, rows a second | its peak, GiB |",
        "|---|---|---|---|---|",
    ]
    for name, entry in found["measurements"].items():
        model, _, variant = name.partition("/")
        draw, train = entry["rollout"], entry["training"]
        lines.append(
            f"| {titles[model]}, {variant} | {draw['pictures_per_s']:.2f} | {draw['peak_gib']:.1f} "
            f"| {train['rows_per_s']:.1f} | {train['peak_gib']:.1f} |"
        )
    if found["skipped"]:
        lines += ["", f"Not measured, for want of device time: {', '.join(found['skipped'])}."]
    return "\n".join(lines)


def _pruning_gpu() -> str:
    found = load("pruning_gpu")
    lines = [
        f"**Pruning and NF4 at full size** ({found['date']}, {found['hardware']}): random weights, one denoising step "
        f"at 1024 × 1024 in bf16 after {found['warm_up']} to warm up, median of {found['repeats']}; HierarchicalPrune "
        "states 77.5 to 80.4 % less memory and 27.9 to 38.0 % less latency for pruned + INT4.",
        "",
        "| model | variant | weights, GB | peak of a step, GB | ms a step |",
        "|---|---|---|---|---|",
    ]
    for model, less in found["reductions"].items():
        for variant in ("original", *less):
            entry, fall = found["measured"][model][variant], less.get(variant)
            figures = [entry["weights_bytes"] / 1e9, entry["step"]["peak_bytes"] / 1e9, 1e3 * entry["step"]["seconds"]]
            keys = ("weights_bytes", "peak_bytes", "seconds")
            cells = [
                f"{x:.1f}" + (f" ({-fall[key]:+.1%})" if fall else "") for x, key in zip(figures, keys, strict=True)
            ]
            lines.append(f"| {model} | {variant} | {' | '.join(cells)} |")
    stock = {model: found["measured"][model]["stock"] for model in found["reductions"]}
    alike = all(not entry["tensors"]["differing"] and entry["output"]["equal"] for entry in stock.values())
    assert alike, "stock diffusers reads something else: say so here"
    lines += [
        "",
        "Stock `DiffusionPipeline.from_pretrained` reads both pruned + NF4 folders to the same bits and output.",
    ]
    return "\n".join(lines)


def _scoring_gpu() -> str:
    found = load("scoring_gpu")
    lines = [
        f"**Scorers on a GPU** ({found['date']}, {found['hardware']}): full-size networks of random weights in bf16, "
        f"pictures of {found['side']} pixels a side, batch {found['batch']}; the plain loop prepares one picture after "
        "the other and runs the same network.",
        "",
        "| scorer | where | ours, pictures a second | plain loop | pictures a second | ours over plain |",
        "|---|---|---|---|---|---|",
    ]
    places = {"in_memory": "decoded, in memory", "end_to_end": "JPEG files, `rewards.score`"}
    for scorer, parts in found["scorers"].items():
        for place, title in places.items():
            entries = parts.get(place, {})
            ours = next((entry for name, entry in entries.items() if name.startswith("ours")), None)
            for name, entry in entries.items():
                if ours and "ours_over_plain" in entry:
                    lines.append(
                        f"| {scorer} | {title} | {ours['images_per_second']:.0f} | {name.removeprefix('plain, ')} "
                        f"| {entry['images_per_second']:.0f} | {entry['ours_over_plain']:.2f} |"
                    )
    return "\n".join(lines)


def _faults() -> str:
    found = load("faults")
    lines = []
    if bad := found.get("bad_input"):
        count, passed = (sum(kind[of] for kind in bad["kinds"].values()) for of in ("count", "passed"))
        lines += [
            f"**Bad input and accidents** ({bad['date']}): {passed:,} of {count:,} cases end by themselves with the "
            "status that their kind asks for (2, mostly), in at most three lines that name what is wrong, without a "
            "traceback, and leave no file half-written and no folder that looks like a run. `controls` have nothing "
            "wrong.",
            "",
            "| kind | cases | passed |",
            "|---|---|---|",
            *(f"| {name} | {kind['count']} | {kind['passed']} |" for name, kind in bad["kinds"].items()),
            "",
        ]
    if kills := found.get("kills"):
        jobs = kills["jobs"]
        lines += [
            f"**Kills at random moments** ({kills['date']}): {_killed(jobs.values()):,} in all, in "
            f"{kills['seconds'] / 60:.0f} minutes of two cores; each run was killed up to four times and then left to "
            "end. *Same* counts the runs that ended with the bits, or the rows, of one that nobody killed.",
            "",
            "| run | SIGKILL | SIGTERM | runs | same |",
            "|---|---|---|---|---|",
        ]
        for name, job in jobs.items():
            same = job["chains"] - len(job["failures"])
            lines.append(f"| {name} | {job['SIGKILL']} | {job['SIGTERM']} | {job['chains']} | {same} |")
    return "\n".join(lines).rstrip()


def _killed(jobs: Iterable[Mapping[str, Any]]) -> int:
    return sum(job["SIGKILL"] + job["SIGTERM"] for job in jobs)


def _families() -> str:
    found = load("families")
    keys = ("latents", "images", "row", "path", "lora", "lora_moves", "ratio", "nf4_reloaded")
    lines = [
        f"**Families against stock diffusers** ({found['date']}, {found['hardware']}, float32): tiny random pipelines "
        "of the real classes, 4 steps, two sizes (one not square), guidance off and on. Greatest differences: latents "
        "and images from the same noise; a row alone and in its batch; `path` and `grid`; images of a LoRA by our "
        "policy and by stock `load_lora_weights`, beside how far it moves them; the likelihood ratio on replay less 1; "
        "a 4-bit copy and what is read of it again. Then the loss of one update by `python -m align.train`.",
        "",
        f"| pipeline | {' | '.join(keys)} | DPO | PolicyGradient | NFT |".replace("_", " "),
        f"|{'---|' * (len(keys) + 4)}",
    ]
    for name, entry in found["families"].items():
        numbers = ["no LoRA" if entry[key] is None else f"{entry[key]:.1g}" for key in keys]
        losses = [f"{loss:.3f}" for loss in entry["losses"].values()]
        lines.append(f"| {name} | {' | '.join([*numbers, *losses])} |")
    return "\n".join(lines)


def _full_size() -> str:
    found = load("full_size")
    lines = [
        f"**Denoisers at their published sizes** ({found['date']}), counted on the meta device: no weight was made or "
        "read. LoRA of rank 16 on the default targets; latents at 1024 pixels; text of one caption in a cache, "
        "bfloat16; *a fifth gone*: parameters without every fifth block.",
        "",
        "| model | parameters | authors say | LoRA | latent | text, MiB | bf16, GiB | NF4, GiB | a fifth gone |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in found["models"].items():
        pruned = entry["pruned_parameters"]
        cells = [
            f"{entry['parameters']:,}", f"{entry['published_billions']} B", f"{entry['lora_parameters']:,}",
            " x ".join(map(str, entry["latent"])), f"{entry['text_bytes'] / 2**20:.1f}",
            f"{entry['bf16_bytes'] / 2**30:.1f}", f"{entry['nf4_bytes'] / 2**30:.1f}", f"{pruned:,}" if pruned else "",
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _data_size() -> str:
    found = load("data_size")
    lines = [
        f"**Data at size** ({found['date']}, {found['hardware']}): CPU seconds, and in brackets the most anonymous "
        "memory in MiB, of a process that starts on so many 64-pixel pairs (the rows read into an index, or the index "
        "mapped) and of one that encodes them or finds them encoded; the autoencoder and the text encoder are "
        "stand-ins, so that it is what is around them that is measured",
        "",
        "| pairs | first start | later starts | encode | find encoded | index, MB |",
        "|---|---|---|---|---|---|",
    ]
    encoded = {entry["pairs"]: entry for entry in found["encode"]}
    for entry in found["start"]:
        both = [entry["first"], entry["second"]]
        both += [encoded[entry["pairs"]][name] for name in ("first", "second")] if entry["pairs"] in encoded else []
        cells = [f"{one['cpu_seconds']:.3g} ({one['anonymous_mib']:.0f})" for one in both]
        cells += [""] * (4 - len(cells))
        lines.append(f"| {entry['pairs']:,} | {' | '.join(cells)} | {entry['index_bytes'] / 1e6:.1f} |")
    kill, texts = found["kill"], found["texts"]
    lines += [
        "",
        f"Killed with {kill['there_at_the_kill']} of {kill['shards']} shards of {kill['pairs']:,} pairs there: "
        f"{kill['of_these_kept']} are kept, the rest is encoded, and every tensor is "
        f"{'the same' if kill['same_tensors'] else 'NOT the same'} as of a run that nobody killed.",
        "",
        f"| captions on disk | kB each, as tensors | `disk` | with `float8` | GB of {texts['prompts']:,} "
        "(Pick-a-Pic's prompts): as tensors, `disk`, `float8` |",
        "|---|---|---|---|---|",
    ]
    for entry in texts["bytes_a_caption"]:
        sizes = [entry[name] for name in ("as_tensors", "disk", "float8")]
        whole = ", ".join(f"{size * texts['prompts'] / 1e9:.1f}" for size in sizes)
        lines.append(f"| {entry['model']} | {' | '.join(f'{size / 1e3:.0f}' for size in sizes)} | {whole} |")
    lines += [
        "",
        "`memory` and `none` write nothing. SD3.5 attends to T5's padding, which differs from prompt to prompt and is "
        "kept; what is dropped there is zeros beside CLIP's features.",
    ]
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}" if size >= 2**30 else f"{size / 2**30:.3f}"


def _memory() -> str:
    found = load("memory")
    offs = [entry["off"] for entry in found["measured"].values()]
    updates = [entry["update_off"] for entry in found["measured"].values()]
    lines = [
        f"**Peak memory, traced without a weight** ({found['date']}) by `align.train --dry_run true --memory 24GB`. Of "
        f"{len(offs)} runs of tiny pipelines at 64 pixels, float32, on a CPU, the traced peak was {min(offs):+.1%} to "
        f"{max(offs):+.1%} off what torch's allocator counted over encoding, rollout and update, and "
        f"{min(updates):+.1%} to {max(updates):+.1%} without the encoding of data. MiB, measured → traced:",
        "",
        "| pipeline, objective | LoRA | LoRA, checkpointing | full | full, checkpointing |",
        "|---|---|---|---|---|",
    ]
    rows: dict[str, list[str]] = {}
    for title, entry in found["measured"].items():
        name, objective, _ = title.split(", ", 2)
        cell = f"{entry['measured'] / 2**20:.1f} → {entry['traced'] / 2**20:.1f}"
        rows.setdefault(f"{name}, {objective}", []).append(cell)
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    lines += [
        "",
        "What [online_gpu](#online_gpu) measured on an H200 with these architectures, GiB, measured → traced (the "
        "workspace of half-precision convolutions, twice their input and output, was fitted to the two rollouts; "
        "training was not fitted):",
        "",
    ]
    lines += ["| model | rollout | training |", "|---|---|---|"]
    for name, pair in found["gpu"].items():
        cells = [f"{pair[key]['measured_gib']:.1f} → {pair[key]['traced_gib']:.1f}" for key in ("rollout", "training")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "Full size, traced, GiB a GPU, and in which phase; bf16, LoRA 16, gradient checkpointing, one row and one "
        "picture at once, 1024 pixels (SD1.5: 512), PixArt-Sigma every weight. *QLoRA*: NF4 (PixArt-Sigma: not), text "
        "encoders and VAE on the CPU while idle, AdamW in 8 bit. *encoding* is of 64 captions at once; an "
        "update of QLoRA begins with the text encoders still there from encoding.",
        "",
    ]
    lines += [
        "| model | DPO | its update alone | DPO, QLoRA | its update alone | policy gradient |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in found["full_size"].items():
        cells = []
        for title in ("DPO", "DPO, QLoRA"):
            cells += [f"{_gib(entry[title]['peak'])}, {entry[title]['phase']}", _gib(entry[title]["update"])]
        other = entry.get("policy gradient")
        cells.append(f"{_gib(other['peak'])}, {other['phase']}" if other else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "Recipes (`configs/`), traced, GiB, rewards not counted:",
        "",
        "| config | peak | phase |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {_gib(e['peak'])} | {e['phase']} |" for name, e in found["recipes"].items()]
    return "\n".join(lines)


def _guard() -> str:
    found = load("guard")
    head = [
        "| seed | rollouts | evaluations | kB | strict | graded | edges | entropy, bits | diversity |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def row(run: Mapping[str, Any]) -> str:
        cells = [
            f"{run[name][0]:.{digits}f} → {run[name][1]:.{digits}f}"
            for name, digits in {"kilobytes": 2, "strict": 3, "graded": 3, "EdgeDensity": 3}.items()
        ]
        cells += [f"{run[name][0]:.2f} → {run[name][1]:.2f}" for name in ("ColorEntropy", "diversity")]
        rollouts = f"{run['rollouts']}{', stopped' if run['stopped'] else ''}"
        return f"| {run['arm']} | {run['seed']} | {rollouts} | {run['evaluations']:,} | {' | '.join(cells)} |"

    lines = [
        f"**A reward that is hacked, `{found['config']}`** ({found['date']}, {found['hardware']}): small JPEG files "
        "by AWM, of the pictures that a run draws; means of its first two rollouts → of its last two.",
        "",
        f"| held by {head[0]}",
        head[1],
        *map(row, found["arms"]),
        "",
        "Held by nothing, from as many pictures and rows:",
        "",
        f"| method {head[0]}",
        head[1],
        *(row({**run, "arm": "AWM"}) for run in found["arms"] if run["arm"] == "nothing"),
        *map(row, found["methods"]),
    ]
    return "\n".join(lines)


def _benches() -> str:
    found = load("benches")
    entries = found["benches"]
    kills, changed = (sum(len(entry[key]) for entry in entries.values()) for key in ("kills", "changed"))
    lines = [
        f"**Benches at their full number of prompts, `{found['model']}`** ({found['date']}, {found['hardware']};",
        f"`{found['settings']}`). *Peak* is the most that the process held. Killed {kills} times by SIGKILL at random",
        f"moments and started again, they left {changed} files that differ from those of a run that nobody killed.",
        "",
        "| bench | prompts | prompt file | peak, MiB | a quarter | CPU, s | pictures at kills | files | changed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in entries.items():
        whole, there = entry["whole"], ", ".join(f"{kill['pictures']:,}" for kill in entry["kills"])
        source = entry["source"] + (f", SHA-256 {entry['sha256'][:8]}…" if entry["sha256"] else "")
        cells = [name, f"{entry['prompts']:,}", source, f"{whole['peak_mib']:.0f}"]
        cells += [f"{entry['quarter']['peak_mib']:.0f}", f"{whole['cpu_seconds']:.0f}", there, f"{entry['files']:,}"]
        lines.append(f"| {' | '.join([*cells, str(len(entry['changed']))])} |")
    return "\n".join(lines)


def _label() -> str:
    found = load("label")
    times = found["milliseconds"]
    return (
        f"**The page on which people choose** ({found['date']}, {found['hardware']}): {found['pairs']} pairs of "
        f"{found['side']} x {found['side']} pictures by keyboard in Chromium, the server killed by SIGKILL half way. "
        f"From key to next picture on the screen: median {times['median']:.0f} ms, 95 % within {times['p95']:.0f} ms, "
        f"at most {times['most']:.0f} ms. Answers lost: {found['lost']}; twice in the file: {found['twice']}; other "
        f"than given: {found['other']}."
    )


def _people() -> str:
    found = load("people")
    lines = [
        f"**People in the loop, by a script** ({found['date']}, {found['hardware']}): answers by keyboard on the page, "
        f"{found['right']:.0%} of them right in the mean. Pairs and thumbs are on {found['pictures']:,} pictures that "
        "shapes-sd drew, and the same for every seed; orders are of 8 pictures, which the run itself drew. Held-out "
        "prompts, in 10 steps without guidance.",
        "",
        "| method | answers | right | seed | updates | strict base | strict tuned | win rate, strict (95 % interval) "
        "| graded | win rate, graded |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    kinds = {"pair": "pairs", "thumbs": "thumbs", "best": "orders"}
    for run in found["runs"]:
        strict, graded = run["strict"], run["graded"]
        wins = [
            f"{of['win_rate']:.3f} ({' to '.join(f'{x:.3f}' for x in of['win_rate_ci'])})" for of in (strict, graded)
        ]
        answers = f"{run['asked']['answers']} {kinds[run['task']]} | {run['asked']['right']}"
        lines.append(
            f"| {run['method']} | {answers} | {run['seed']} | {run['updates']} | {strict['base']:.3f} "
            f"| {strict['tuned']:.3f} | {wins[0]} | {graded['base']:.3f} → {graded['tuned']:.3f} | {wins[1]} |"
        )
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[], str]] = {
    "dpo_shapes_sd": lambda: _dpo("dpo_shapes_sd", "Diffusion-DPO"),
    "dpo_shapes_sd3": lambda: _dpo("dpo_shapes_sd3", "Diffusion-DPO without guidance"),
    "dpo_safeguard": lambda: _dpo("dpo_safeguard", "Diffusion-SDPO's safeguard"),
    "emoji": _emoji,
    "online_ddpo": lambda: _online("online_ddpo", "DDPO"),
    "online_ddpo_unguided": lambda: _online("online_ddpo_unguided", "DDPO without guidance"),
    "online_flow_grpo": lambda: _online("online_flow_grpo", "Flow-GRPO"),
    "online_flow_grpo_unguided": lambda: _online("online_flow_grpo_unguided", "Flow-GRPO without guidance"),
    "online_d3po": lambda: _online("online_d3po", "D3PO, the reward as proxy for people"),
    "online_d3po_unguided": lambda: f"{_online('online_d3po_unguided', 'D3PO without guidance')}\n\n{_equal()}",
    "equal": _equal_evaluations,
    "guided": _guided,
    "online_awm_unguided": lambda: _online("online_awm_unguided", "AWM without guidance"),
    "online_dgpo_unguided": lambda: _online("online_dgpo_unguided", "DGPO without guidance"),
    "direct_reward": _direct_reward,
    "jpeg": _jpeg,
    "guard": _guard,
    "b2_diffurl": _b2,
    "online_gpu": _online_gpu,
    "find_shapes_sd": lambda: _find("find_shapes_sd"),
    "find_shapes_sd3": lambda: _find("find_shapes_sd3"),
    "reno_shapes_sd": lambda: _reno("reno_shapes_sd"),
    "reno_shapes_sd3": lambda: _reno("reno_shapes_sd3"),
    "opd": _opd,
    "online_opd_unguided": lambda: _online("online_opd_unguided", "On-policy distillation of guidance"),
    "pruning": _pruning,
    "pruning_gpu": _pruning_gpu,
    "int4": _int4,
    "scoring": _scoring,
    "scoring_gpu": _scoring_gpu,
    "shapes_reward": _shapes,
    "shapes_net": _shapes_net,
    "pretrain": _pretrain,
    "overhead": _overhead,
    "overhead_online": _overhead_online,
    "parallel": _parallel,
    "data_size": _data_size,
    "peers": _peers,
    "faults": _faults,
    "families": _families,
    "full_size": _full_size,
    "memory": _memory,
    "benches": _benches,
    "label": _label,
    "people": _people,
}


def results() -> str:
    """A heading and a paragraph or table for every results file there is; other pages link to ``#NAME``."""
    there = [name for name in SECTIONS if (RESULTS / f"{name}.json").exists()]
    return "\n\n".join(f"### {name}\n\n{SECTIONS[name]()}" for name in there)


def filled(text: str) -> str:
    """``text`` with what stands between the marks replaced by the results."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{results()}\n{END}{tail}"


if __name__ == "__main__":
    write_text(README, filled(README.read_text(encoding="utf-8")))
