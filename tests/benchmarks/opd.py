"""Three experts into one LoRA of shapes-sd3: on-policy distillation, joint training, averaging; seeds 0, 1, 2.

    python tests/benchmarks/opd.py

Experts for counting, position and attribution are trained by configs/opd_teacher_shapes_sd3.yaml, each on captions of
its own task; one student learns from all by configs/opd_shapes_sd3.yaml, which begins at the experts' average. Beside
it: students that begin at the base model, with ``form: ode`` and ``form: sde``; the experts' LoRAs averaged and left at
that; and joint training on all captions with as many network evaluations as the experts and the student took together.
All without guidance, where there is something to learn (configs/ddpo_unguided_shapes.yaml). Graded and strict score on
the held-out captions of each task, sixteen pictures each, ten steps.
Also how the gradient of the closed form varies against that of PPO on the same rollouts. ``--quick`` runs one seed
briefly, scores one picture each, and records nothing. Finished runs are kept in ``outputs/`` and not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from torch import Tensor

from align import families, gallery
from align.data import TaskPrompts
from align.files import write
from align.objectives import Context
from align.objectives.opd import OPD
from align.policy import LoRA, Policy
from align.process import Prediction
from align.rollouts import Sampler, transition
from align.shapes.world import caption, held_out_prompts
from align.teachers import LoRATeacher, average
from rewards.shapes import Shapes, parse
from tests.benchmarks import RESULTS, command, curves, looks, mean_curve, metrics, record, runs_folder

TASKS = ("counting", "position", "attribution")
BASE, STEPS, GUIDANCE = "shapes-sd3", 10, 1.0
FROM_BASE = ("--objective.init_args.cold_start", "false", "--lora.rank", "32")
STUDENTS: dict[str, tuple[str, ...]] = {
    "cold": (),  # the config as it stands
    "ode": FROM_BASE,
    "sde": (*FROM_BASE, "--objective.init_args.form", "sde"),
}
NAMES = {"cold": "from the experts' average", "ode": "from the base model", "sde": "from the base model, form: sde"}


def prompt_files(folder: Path) -> dict[str, str]:
    """150 captions of seen combinations for each task."""
    found = {}
    for task in TASKS:
        rng, texts = np.random.default_rng(5), dict[str, None]()
        while len(texts) < 150:
            texts[caption(rng, task)] = None
        write(folder / f"{task}.txt", "\n".join(texts) + "\n")
        found[task] = str(folder / f"{task}.txt")
    return found


def scores(folder: Path | None, pictures: int) -> dict[str, dict[str, float]]:
    """Mean graded and strict score of each task, ``pictures`` a caption; kept in ``folder``."""
    kept = folder / f"tasks-{pictures}.json" if folder else None
    if kept and kept.exists():
        return json.loads(kept.read_text())
    family = families.load(BASE)
    if folder:
        family = families.tuned(family, str(folder))
    prompts = [p for p in held_out_prompts() if parse(p).task in TASKS for _ in range(pictures)]
    images = gallery.sample_images(
        family.predict, family, prompts, range(3000, 3000 + len(prompts)), STEPS, GUIDANCE, batch_size=96
    )
    tasks = [parse(prompt).task for prompt in prompts]
    found: dict[str, dict[str, float]] = {}
    for mode in ("graded", "strict"):
        values = Shapes(mode=mode).score(images=images, prompts=prompts).double()
        found[mode] = {t: values[torch.tensor([task == t for task in tasks])].mean().item() for t in TASKS}
    if kept:
        write(kept, json.dumps(found))
    return found


def spent(folder: Path) -> int:
    """Network evaluations of a finished run: what its last rollout had counted, and that rollout's own training."""
    counts = [
        line["evaluations/trained"] + line["evaluations/frozen"]
        for line in metrics(folder)
        if "evaluations/frozen" in line
    ]
    return counts[-1] + (counts[-1] - counts[-2] if len(counts) > 1 else 0)


def figures_of(folder: Path, each: int) -> dict[str, Any]:
    """What a finished run is judged by; ``each`` pictures a caption."""
    return {"scores": scores(folder, each), "evaluations": spent(folder), "curve": looks(metrics(folder))}


def rollouts_of(folder: Path) -> int:
    """How many rollouts a run took."""
    return sum("rollout/pictures" in line for line in metrics(folder))


def trained(folder: Path, config: str, *options: str) -> Path:
    if not (folder / "README.md").exists():
        command(
            "align.train",
            "--config",
            config,
            "--output_dir",
            str(folder),
            "--resume_from_checkpoint",
            "latest",
            *options,
        )
    return folder


def averaged(folder: Path, teachers: list[LoRATeacher], rank: int) -> Path:
    """The mean of the experts' LoRAs as a LoRA of ``rank``."""
    if not (folder / "pytorch_lora_weights.safetensors").exists():
        policy = Policy(families.load(BASE), LoRA(rank))
        for teacher in teachers:
            teacher.open(policy)
        average(policy, [teacher.name for teacher in teachers])
        folder.mkdir(parents=True, exist_ok=True)
        policy.save(folder)
    return folder


def variance(teachers: list[LoRATeacher], files: dict[str, str]) -> dict[str, float]:
    """Variance of the gradient, over draws of the same states' next states, of PPO's surrogate with the pointwise
    log-ratio as its reward and of the closed form, which has none; summed over parameters, relative to the squared
    norm of the closed form's gradient."""
    torch.manual_seed(0)
    policy = Policy(families.load(BASE), LoRA(4))
    objective = OPD(list(teachers), Sampler(STEPS, GUIDANCE, batch_size=64), form="sde", normalise="paper")
    objective.prepare(policy, None)
    batch = TaskPrompts(files).prepare(policy.family).batch(range(6))
    ctx = Context(policy, 0, 0, range(6))
    with torch.no_grad():
        table = objective.rollout(ctx, batch)
    kernel, grid = objective.sampler.kernel_of(policy.family), policy.family.grid(STEPS)

    def flat(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.parameters()) if g is not None])

    loss, _ = objective.loss(ctx, table)
    exact = flat(loss)
    found = []
    rows = table
    for k in range(24):
        student, _ = transition(ctx, objective.sampler, rows.images, rows.image, rows.tensor("step"))
        noise = torch.randn(student.mean.shape, generator=torch.Generator().manual_seed(k))
        y = student.sample(noise).detach()
        with torch.no_grad():
            latents = rows.images["latents"]
            assert isinstance(latents, Tensor)
            i = rows.tensor("step")
            x = latents[rows.image, i]
            alpha, sigma = policy.family.path(grid.t[i])
            target = rows.images["target"]
            assert isinstance(target, Tensor)
            theirs = kernel(Prediction(target[rows.image, i], x, alpha, sigma, policy.family.kind), grid, i)
            cost = student.log_prob(y, "sum") - theirs.log_prob(y, "sum")
        found.append(flat((cost * student.log_prob(y, "sum")).mean()))
    stacked = torch.stack(found)
    return {
        "ppo_variance_over_squared_gradient": (stacked.var(0).sum() / exact.square().sum()).item(),
        "closed_form_variance": 0.0,
        "cosine_of_mean": torch.nn.functional.cosine_similarity(stacked.mean(0), exact, dim=0).item(),
        "draws": len(found),
    }


def run(quick: bool, seeds: list[int], joint_seeds: list[int]) -> dict[str, Any]:
    root = runs_folder(quick) / "opd"
    files = prompt_files(root)
    held = root / "held-out.txt"
    write(held, "\n".join(p for p in held_out_prompts() if parse(p).task in TASKS) + "\n")
    teach = "configs/opd_teacher_shapes_sd3.yaml"
    short = ["--max_rollouts", "3"] if quick else []
    each = 1 if quick else 16
    teachers = [
        LoRATeacher(task, None, trained(root / f"teacher-{task}", teach, "--data.init_args.path", files[task], *short))
        for task in TASKS
    ]
    listed = json.dumps(
        [{"class_path": "LoRATeacher", "init_args": {"task": t.task, "path": str(t.path)}} for t in teachers]
    )
    rewards = [{"name": "Shapes"}, {"name": "Shapes", "args": {"mode": "strict"}, "weight": 0, "label": "strict"}]
    watch = ["--validation_data", json.dumps({"class_path": "Prompts", "init_args": {"path": str(held)}})]
    watch += ["--rewards", json.dumps(rewards)]
    tasks = ["--data.init_args.tasks", json.dumps(files)]
    figures: dict[str, Any] = {
        "guidance": GUIDANCE,
        "steps": STEPS,
        "pictures": each,
        "base": scores(None, each),
        "teachers": {},
        "seeds": [],
    }
    for teacher in teachers:
        figures["teachers"][teacher.task] = {"scores": scores(teacher.path, each), "evaluations": spent(teacher.path)}
    taught = sum(entry["evaluations"] for entry in figures["teachers"].values())
    figures["averaged"] = scores(averaged(root / "averaged", teachers, 48), each)
    for seed in seeds:
        entry: dict[str, Any] = {"seed": seed}
        for kind, changes in STUDENTS.items():
            options = ["--objective.init_args.teachers", listed, "--seed", str(seed), *changes]
            if quick:
                options += ["--max_train_steps", "8", "--validation_steps", "8"]
            folder = trained(root / f"{kind}-{seed}", "configs/opd_shapes_sd3.yaml", *options, *tasks, *watch)
            entry[kind] = figures_of(folder, each)
        total = taught + entry["cold"]["evaluations"]
        # of 36 prompts, twelve a task, where an expert had 32
        per_rollout = taught / sum(rollouts_of(root / f"teacher-{task}") for task in TASKS) * 36 / 32
        steps = 2 * max(1, round(total / per_rollout))
        joint = [
            "--data",
            json.dumps({"class_path": "TaskPrompts", "init_args": {"tasks": files}}),
            "--seed",
            str(seed),
        ]
        joint += ["--max_train_steps", str(steps), "--rollout_batch_size", "36", "--train_batch_size", "72"]
        joint += ["--validation_steps", "16", *watch]
        if seed in joint_seeds and not quick:
            folder = trained(root / f"joint-{seed}", teach, *joint)
            entry["joint"] = figures_of(folder, each)
        figures["seeds"].append(entry)
    figures["gradient"] = variance(teachers, files)
    if not quick:
        draw_curves(figures["seeds"], taught)
    return figures


def draw_curves(seeds: list[dict[str, Any]], taught: int) -> None:
    """How the students learn, and, where it was run, joint training beside experts and student, who begins when
    ``taught`` evaluations are spent; means over seeds."""
    title, along = f"One student of three experts, mean of {len(seeds)} seed(s)", "strict, held-out captions"
    series = {NAMES[kind]: mean_curve([seed[kind]["curve"] for seed in seeds], "pictures") for kind in STUDENTS}
    curves(RESULTS / "opd.png", series, title, "pictures", along)
    joint = [seed for seed in seeds if "joint" in seed]
    if joint:
        student = mean_curve([seed["cold"]["curve"] for seed in joint], "evaluations")
        beside = {
            "joint training": mean_curve([seed["joint"]["curve"] for seed in joint], "evaluations"),
            "experts, then a student": [(taught + x, y) for x, y in student],
        }
        title = f"One student of three experts, mean of {len(joint)} seed(s)"
        curves(RESULTS / "opd_joint.png", beside, title, "network evaluations", along)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--joint", type=int, nargs="*", default=[0, 1, 2], help="seeds that get joint training too, the dearest"
    )
    args = parser.parse_args()
    figures = run(args.quick, args.seeds[:1] if args.quick else args.seeds, args.joint)
    record("opd", figures, args.quick)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
