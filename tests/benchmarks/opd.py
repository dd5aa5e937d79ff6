"""Three experts into one LoRA of shapes-sd3: on-policy distillation, joint training, averaging; seeds 0, 1, 2.

    python tests/benchmarks/opd.py

Experts for counting, position and attribution are trained by configs/opd_teacher_shapes_sd3.yaml, each on captions of
its own task; one student learns from all by configs/opd_shapes_sd3.yaml, which begins at the experts' average. Beside
it: students that begin at the base model, with ``form: ode`` and ``form: sde``; the experts' LoRAs averaged and left at
that; and joint training on all captions with as many network evaluations as the experts and the student took together.
All without guidance, where there is something to learn (configs/ddpo_unguided_shapes.yaml). Graded and strict score on
the held-out captions of each task in ten steps, 64 pictures each, or 16 of students from the base model, whose curves
are what is compared. (Of 40 captions, 16 pictures each, chance alone moves an expert's strict score by a fifteenth.)
Also how the gradient of the closed form varies against that of PPO on the same rollouts. ``--quick`` trains
experts and the student from their average briefly, scores two pictures each, records nothing. Finished runs are kept
in ``outputs/`` and not run again; of others it keeps what ``results/opd.json`` holds, as long as configs and experts
are still the same, so that ``--seeds --joint 1`` runs joint training with one seed and nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from align.sampling import generate

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from torch import Tensor

from align import families
from align.data.dataset import Setup
from align.data.prompts import TaskPrompts
from align.diffusion.process import Prediction
from align.objectives import Context
from align.objectives.online.replay import replay_step
from align.objectives.opd import OPD
from align.objectives.teachers import LoRATeacher
from align.policy.policy import LoRA, Policy
from align.sampling.sampler import Sampler
from align.shapes.world import caption, held_out_prompts
from rewards.common.files import write_text
from rewards.models.shapes import Shapes, parse
from tests.benchmarks import (
    RESULTS,
    command,
    curves,
    day,
    earlier,
    looks,
    mean_curve,
    metrics,
    record,
    runs_folder,
    settings_of,
    span,
)

TASKS = ("counting", "position", "attribution")
BASE, STEPS, GUIDANCE = "shapes-sd3", 10, 1.0
TEACH, LEARN = "configs/opd_teacher_shapes_sd3.yaml", "configs/opd_shapes_sd3.yaml"
FROM_BASE = ("--objective.init_args.cold_start", "false", "--lora.rank", "32")
PICTURES, FROM_BASE_PICTURES = 64, 16
STUDENTS: dict[str, tuple[str, ...]] = {
    "cold": (),  # the config as it stands
    "ode": FROM_BASE,
    "sde": (*FROM_BASE, "--objective.init_args.form", "sde"),
}
QUICK = ("cold",)
SHORT = ("--max_rollouts", "6", "--rollout_batch_size", "16", "--gradient_accumulation_steps", "2")
NAMES = {"cold": "from the experts' average", "ode": "from the base model", "sde": "from the base model, form: sde"}


def prompt_files(folder: Path) -> dict[str, str]:
    """150 captions of seen combinations for each task."""
    found = {}
    for task in TASKS:
        rng, texts = np.random.default_rng(5), dict[str, None]()
        while len(texts) < 150:
            texts[caption(rng, task)] = None
        write_text(folder / f"{task}.txt", "\n".join(texts) + "\n")
        found[task] = str(folder / f"{task}.txt")
    return found


def scores(folder: Path, pictures: int) -> dict[str, dict[str, float]]:
    """Mean graded and strict score of each task, ``pictures`` a caption, by the LoRA in ``folder`` or, where that is
    named ``base``, by the base model; kept there."""
    kept = folder / f"tasks-{pictures}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    family = families.load(BASE)
    if folder.name != "base":
        family = families.tuned(family, str(folder))
    prompts = [p for p in held_out_prompts() if parse(p).task in TASKS for _ in range(pictures)]
    images = generate.sample_images(
        family.predict, family, prompts, range(3000, 3000 + len(prompts)), STEPS, GUIDANCE, batch_size=96
    )
    tasks = [parse(prompt).task for prompt in prompts]
    found: dict[str, dict[str, float]] = {}
    for mode in ("graded", "strict"):
        values = Shapes(mode=mode).score(images=images, prompts=prompts).double()
        found[mode] = {t: values[torch.tensor([task == t for task in tasks])].mean().item() for t in TASKS}
    write_text(kept, json.dumps(found))
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
    return {
        "date": day(folder / "README.md"),
        "scores": scores(folder, each),
        "evaluations": spent(folder),
        "curve": looks(metrics(folder)),
    }


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
        policy.average_adapters([teacher.name for teacher in teachers])
        folder.mkdir(parents=True, exist_ok=True)
        policy.save(folder)
    return folder


def variance(teachers: list[LoRATeacher], files: dict[str, str]) -> dict[str, float]:
    """Variance of the gradient, over draws of the same states' next states, of PPO's surrogate with the pointwise
    log-ratio as its reward and of the closed form, which has none; summed over parameters, relative to the squared
    norm of the closed form's gradient."""
    torch.manual_seed(0)
    policy = Policy(families.load(BASE), LoRA(4))
    objective = OPD(list(teachers), Sampler(STEPS, GUIDANCE, batch_size=64), form="sde", normalize="paper")
    objective.prepare(policy, None)
    batch = TaskPrompts(files).prepare(Setup(policy.family)).batch(range(6))
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
        student, _ = replay_step(ctx, objective.sampler, rows.trajectories, rows.image, rows.step)
        noise = torch.randn(student.mean.shape, generator=torch.Generator().manual_seed(k))
        y = student.sample(noise).detach()
        with torch.no_grad():
            latents = rows.trajectories.latents
            i = rows.step
            x = latents[rows.image, i]
            alpha, sigma = policy.family.path(grid.t[i])
            target = rows.target
            theirs = kernel(Prediction(target[rows.image, i], x, alpha, sigma, policy.family.prediction_type), grid, i)
            cost = student.log_prob(y, "sum") - theirs.log_prob(y, "sum")
        found.append(flat((cost * student.log_prob(y, "sum")).mean()))
    stacked = torch.stack(found)
    return {
        "ppo_variance_over_squared_gradient": (stacked.var(0).sum() / exact.square().sum()).item(),
        "closed_form_variance": 0.0,
        "cosine_of_mean": torch.nn.functional.cosine_similarity(stacked.mean(0), exact, dim=0).item(),
        "draws": len(found),
    }


def experts(root: Path, quick: bool, files: dict[str, str]) -> list[LoRATeacher]:
    """Trained, each on its own task."""
    short = SHORT if quick else ()
    return [
        LoRATeacher(task, None, trained(root / f"teacher-{task}", TEACH, "--data.init_args.path", files[task], *short))
        for task in TASKS
    ]


def before_students(root: Path, teachers: list[LoRATeacher], files: dict[str, str], each: int) -> dict[str, Any]:
    """What the base, each expert, and the experts' average are worth, and how gradients vary."""
    found: dict[str, Any] = {
        "guidance": GUIDANCE,
        "steps": STEPS,
        "pictures": each,
        "base": scores(root / "base", each),
    }
    found["teachers"] = {
        teacher.task: {"rollouts": rollouts_of(teacher.path), **figures_of(teacher.path, each)} for teacher in teachers
    }
    found["averaged"] = scores(averaged(root / "averaged", teachers, 48), each)
    found["gradient"] = variance(teachers, files)
    return found


def learnt(root: Path, kind: str, seed: int, quick: bool, files: dict[str, str], joint_steps: int = 0) -> Path:
    """The run of one student, or of joint training for so many updates."""
    held = root / "held-out.txt"
    write_text(held, "\n".join(p for p in held_out_prompts() if parse(p).task in TASKS) + "\n")
    rewards = [{"name": "Shapes"}, {"name": "Shapes", "args": {"mode": "strict"}, "weight": 0, "label": "strict"}]
    options = ["--validation_data", json.dumps({"class_path": "Prompts", "init_args": {"path": str(held)}})]
    options += ["--rewards", json.dumps(rewards), "--seed", str(seed)]
    if kind in STUDENTS:
        listed = [
            {"class_path": "LoRATeacher", "init_args": {"task": t, "path": str(root / f"teacher-{t}")}} for t in TASKS
        ]
        options += ["--objective.init_args.teachers", json.dumps(listed), "--data.init_args.tasks", json.dumps(files)]
        options += [*STUDENTS[kind], *(["--max_train_steps", "8", "--validation_steps", "8"] if quick else [])]
        return trained(root / f"{kind}-{seed}", LEARN, *options)
    data = {"class_path": "TaskPrompts", "init_args": {"tasks": files}}
    options += ["--data", json.dumps(data), "--max_train_steps", str(joint_steps), "--validation_steps", "16"]
    options += ["--rollout_batch_size", "36", "--train_batch_size", "72"]
    return trained(root / f"joint-{seed}", TEACH, *options)


def taught(shared: dict[str, Any]) -> int:
    """Evaluations that the experts took."""
    return sum(expert["evaluations"] for expert in shared["teachers"].values())


def equally_long(shared: dict[str, Any], student: int) -> int:
    """Updates, two a rollout, that take joint training as many evaluations as all experts and the ``student``."""
    rollouts = sum(expert["rollouts"] for expert in shared["teachers"].values())
    each = taught(shared) / rollouts * 36 / 32  # of 36 prompts, twelve a task, where an expert had 32
    return 2 * max(1, round((taught(shared) + student) / each))


def run(quick: bool, seeds: list[int], joint_seeds: list[int]) -> dict[str, Any]:
    root, each, fewer = runs_folder(quick) / "opd", *((2, 2) if quick else (PICTURES, FROM_BASE_PICTURES))
    files = prompt_files(root)
    digest = settings_of([TEACH, LEARN], students=STUDENTS, pictures=(each, fewer))
    known = {} if quick else earlier("opd", digest)
    if known and not seeds:
        shared = {n: known[n] for n in ("guidance", "steps", "pictures", "base", "teachers", "averaged", "gradient")}
    else:
        shared = before_students(root, experts(root, quick, files), files, each)
    same = [entry for entry in known.get("seeds", []) if scores_of(known) == scores_of(shared)]
    found: dict[int, dict[str, Any]] = {entry["seed"]: entry for entry in same}
    if unknown := set(joint_seeds) - found.keys() - set(seeds):
        raise SystemExit(f"joint training costs what experts and student did: give --seeds {min(unknown)} as well")
    for seed in seeds:
        entry = found.setdefault(seed, {"seed": seed})
        for kind in QUICK if quick else STUDENTS:
            pictures = fewer if STUDENTS[kind] else each
            entry[kind] = {"pictures": pictures, **figures_of(learnt(root, kind, seed, quick, files), pictures)}
    for seed in joint_seeds:
        steps = equally_long(shared, found[seed]["cold"]["evaluations"])
        found[seed]["joint"] = figures_of(learnt(root, "joint", seed, quick, files, steps), each)
    figures = {**shared, "settings": digest, "seeds": [found[seed] for seed in sorted(found)]}
    runs = [entry[kind] for entry in (*found.values(), shared["teachers"]) for kind in entry if kind != "seed"]
    figures["date"] = span(run["date"] for run in runs)
    if not quick:
        draw_curves(figures["seeds"], taught(shared))
    return figures


def scores_of(figures: dict[str, Any]) -> dict[str, Any]:
    """What the experts can do: where that differs they are others, and so are their students."""
    return {task: expert["scores"] for task, expert in figures["teachers"].items()}


def draw_curves(seeds: list[dict[str, Any]], spent_before: int) -> None:
    """How the students learn, and, where it was run, joint training beside experts and student, who begins when
    ``spent_before`` evaluations are spent; means over seeds."""
    title, along = f"One student of three experts, mean of {len(seeds)} seed(s)", "strict, held-out captions"
    series = {NAMES[kind]: mean_curve([seed[kind]["curve"] for seed in seeds], "pictures") for kind in STUDENTS}
    curves(RESULTS / "opd.png", series, title, "pictures", along)
    joint = [seed for seed in seeds if "joint" in seed]
    if joint:
        student = mean_curve([seed["cold"]["curve"] for seed in joint], "evaluations")
        beside = {
            "joint training": mean_curve([seed["joint"]["curve"] for seed in joint], "evaluations"),
            "experts, then a student": [(spent_before + x, y) for x, y in student],
        }
        title = f"One student of three experts, mean of {len(joint)} seed(s)"
        curves(RESULTS / "opd_joint.png", beside, title, "network evaluations", along)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--joint", type=int, nargs="*", default=[0, 1, 2], help="seeds that get joint training too, the dearest"
    )
    args = parser.parse_args()
    figures = run(args.quick, args.seeds[:1] if args.quick else args.seeds, [] if args.quick else args.joint)
    record("opd", figures, args.quick)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
