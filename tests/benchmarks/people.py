"""People in the loop: 400 answers given on the page train shapes-sd, by pairs (DPO), thumbs (KTO), orders (D3PO).

    python tests/benchmarks/people.py

``align.rollout`` draws pictures of training prompts, unguided. A script opens ``align.label`` in Chromium (where there
is none it talks to the server as the page does), looks at what is on the screen with the exact reward, and presses the
keys of the right answer in 85 % of the items, else of the opposite:

- ``--task pair``, for DPO: the pictures of a prompt that the reward likes most and least among 7, of the 400 prompts
  where these differ most;
- ``--task thumbs``, for KTO: of the same prompts, in turn, the one or the other; good is what is exactly right;
- ``--task best``, for D3PO: all 8 pictures of a prompt, put in order; the opposite is the reverse order, so 85 % of
  the pairs that an order decides are right too. In four rounds: the weights of one draw what the next asks about.

``align.train`` reads the answers file as it is; ``align.evaluate`` sets the runs beside the base on held-out prompts,
drawn as the pictures were, in 10 steps without guidance. Seeds are of the training; DPO's and KTO's answers are the
same for all, D3PO's runs ask 400 each. ``--quick`` takes 12 answers and few updates of one seed, and records nothing.
What is finished is kept in ``outputs/`` and judged with what is asked for by ``--methods`` and ``--seeds``; what was
recorded with today's settings stays recorded.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import sys
import urllib.request
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from align.common.rng import generator, uniform
from align.data.trajectories import ManifestLine, RolloutFolder
from align.diffusion.kernels import DDIM, Gaussian, Kernel
from align.diffusion.process import Grid, Prediction
from align.evaluation.compare import STRICT
from align.evaluation.intervals import evenly_spaced
from align.labelling.items import Task
from align.shapes.world import training_prompts
from rewards.common.files import write_text
from rewards.data.images import decode_tensor
from rewards.models.shapes import Shapes, flawless
from tests import label_page
from tests.benchmarks import RESULTS, command, metrics, record, runs_folder, settings_of

RIGHT, STEPS = 0.85, 10
EACH, ORDERED, ROUNDS = 7, 8, 4  # pictures of a prompt: of the one rollout, and of each of D3PO's


@dataclass(frozen=True, repr=False)
class EarlyDDIM(Kernel):
    """DDIM with ``eta`` in the first ``steps`` steps and without noise after them, as ``D3PO.window`` draws while it
    trains: what is preferred follows from the steps that train."""

    eta: float = 1.0
    steps: int = 2

    def __call__(self, prediction: Prediction, grid: Grid, i: int | Tensor) -> Gaussian:
        last = int(i.max()) if isinstance(i, Tensor) else i  # a training batch lies within the steps
        return DDIM(self.eta if last < self.steps else 0.0)(prediction, grid, i)


@dataclass(frozen=True)
class Method:
    """What people are asked, and how ``config`` trains on that, with ``options`` after it."""

    task: Task
    config: str
    options: str

    @property
    def settings(self) -> str:
        """A digest of what decides about its figures."""
        return settings_of([self.config], **asdict(self), sampler=SAMPLER, right=RIGHT, each=[EACH, ORDERED, ROUNDS])


KERNEL = f"tests.benchmarks.people.{EarlyDDIM.__name__}"
SAMPLER = (("num_inference_steps", str(STEPS)), ("guidance_scale", "1.0"), ("batch_size", "64"), ("kernel", KERNEL))
COMMON = ("--checkpointing_steps", "0", "--report_to", "none")
STILL = "--objective.proportion_empty_prompts 0 --lr_scheduler cosine --ema_decay 0.9 --lr_warmup_steps 5"
METHODS = {
    "DPO": Method("pair", "configs/dpo_shapes.yaml", f"{STILL} --max_train_steps 80"),
    "KTO": Method(
        "thumbs",
        "configs/kto_shapes.yaml",
        f"{STILL} --data.pairs false --objective.reference_point zero --objective.beta 500 --max_train_steps 100",
    ),
    "D3PO": Method(  # of one of its rounds
        "best",
        "configs/d3po_human.yaml",
        "--objective.reference start --objective.timestep_fraction 0.2 --lora.rank 8 --learning_rate 5e-3 "
        "--lr_warmup_steps 4 --train_batch_size 350 --gradient_accumulation_steps 4 --max_train_steps 4",
    ),
}
REWARDS = [{"name": "Shapes"}, {"name": "Shapes", "args": {"mode": "strict"}, "label": "strict"}]  # for the manifest


# The person
PIXELS = """images => Promise.all(images.map(async image => {
    const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
    canvas.getContext("2d").drawImage(image, 0, 0);
    const bytes = await (await canvas.convertToBlob()).arrayBuffer();
    return btoa(String.fromCharCode(...new Uint8Array(bytes)));
}))"""
KEYS: dict[int | str, str] = {1: "ArrowLeft", 2: "ArrowRight", "good": "ArrowUp", "bad": "ArrowDown"}
Choice = int | str | list[int]


@dataclass
class Person:
    """Sees a prompt and its pictures, and gives the right answer in :data:`RIGHT` of the items, by a draw that belongs
    to the item; else the opposite: the other one, or all pictures in the reverse order. In an order, pictures of equal
    worth come as chance has it."""

    task: Task
    seed: int
    right: list[bool] = field(default_factory=list)

    def choose(self, item: str, prompt: str, pictures: Sequence[bytes]) -> Choice:
        images = torch.stack([decode_tensor(picture) for picture in pictures]) / 255
        graded = Shapes().score(images=images, prompts=[prompt] * len(images)).tolist()
        luck, *chance = uniform([generator(self.seed, "person", self.task, item, k) for k in range(len(graded) + 1)])
        self.right.append(luck.item() < RIGHT)
        if self.task == "best":
            order = sorted(range(len(graded)), key=lambda k: (-graded[k], chance[k].item()))
            return [1 + k for k in (order if self.right[-1] else order[::-1])]
        if self.task == "thumbs":
            words: list[Choice] = ["good", "bad"] if flawless(graded[0]) else ["bad", "good"]
        else:
            words = [1, 2] if graded[0] > graded[1] else [2, 1]
        return words[0 if self.right[-1] else 1]


def in_a_browser(url: str, person: Person, count: int) -> list[float]:
    """``count`` answers by keyboard; returns milliseconds from each key to the next pictures."""
    with label_page.chromium() as browser:
        page = label_page.opened(browser, url)
        if person.task == "best":
            page.keyboard.press("o")  # an order, not only the best
        for _ in range(count):
            label_page.until(page, "document.body.dataset.item")
            pictures = [base64.b64decode(one) for one in page.eval_on_selector_all("#pictures img", PIXELS)]
            choice = person.choose(label_page.item_of(page), page.inner_text("#prompt"), pictures)
            if isinstance(choice, list):
                for place in choice[:-1]:  # the last follows
                    page.keyboard.press(str(place))
            label_page.press(page, "Enter" if isinstance(choice, list) else KEYS[choice])
        label_page.settled(page)
        return label_page.latencies(page)


def by_post(url: str, person: Person, count: int) -> list[float]:
    """The same without a browser, and so without times."""

    def ask(path: str, body: object = None) -> bytes:
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(f"{url}/{path}", data, {"Content-Type": "application/json"})
        answer: bytes = urllib.request.urlopen(request).read()
        return answer

    while len(person.right) < count:
        told = json.loads(ask("next"))
        for shown in told["items"][: count - len(person.right)]:
            pictures = [ask(source) for source in shown["src"]]
            choice = person.choose(shown["key"], shown["prompt"], pictures)
            entry = {"id": uuid.uuid4().hex, "session": told["session"], "item": shown["item"], "check": ""}
            ask("answers", {"entries": [entry | {"choice": choice}]})
    return []


def answered(source: Path, task: Task, count: int, answers: Path, seed: int = 0) -> dict[str, Any]:
    """Have ``count`` items of ``source`` answered into ``answers``, unless they are; returns what there was to see."""
    seen = answers.with_suffix(".seen.json")
    if not seen.exists():
        for left in answers.parent.glob(f"{answers.stem}*"):
            left.unlink()
        person, browser = Person(task, seed), label_page.CHROMIUM is not None
        words = [str(source), "--output", str(answers), "--task", task]
        with label_page.served(*words) as server:
            times = (in_a_browser if browser else by_post)(server.url("/annotate/ann"), person, count)
        figures = {"answers": len(label_page.standing(answers)), "right": sum(person.right), "browser": browser}
        write_text(seen, json.dumps(figures | {"milliseconds": sorted(times)[len(times) // 2] if times else None}))
    found: dict[str, Any] = json.loads(seen.read_text())
    return found


# What they are asked about
def drawn(folder: Path, prompts: str, each: int, *options: str) -> Path:
    """A rollout, as all are drawn here."""
    how = [word for name, value in SAMPLER for word in (f"--sampler.{name}", value)]
    words = ["--prompts", prompts, "--images_per_prompt", str(each), "--prompts_per_shard", "64", *how, *options]
    command("align.rollout", "--output_dir", str(folder), "--rewards", json.dumps(REWARDS), *words)
    return folder


def graded(line: ManifestLine) -> float:
    return line.scores["Shapes"]


def sources(rollout: Path, count: int) -> dict[Task, Path]:
    """For each task the list, beside ``rollout``, that ``align.label`` is to be opened on."""
    groups = dict[int, list[ManifestLine]]()
    for line in RolloutFolder(rollout).read().lines:
        groups.setdefault(line.prompt_index, []).append(line)
    ends = [(max(group, key=graded), min(group, key=graded)) for group in groups.values()]
    ends.sort(key=lambda pair: graded(pair[1]) - graded(pair[0]))
    name = rollout.name
    rows: dict[Task, list[dict[str, str]]] = {
        "pair": [
            {"prompt": a.prompt, "chosen": f"{name}/{a.image}", "rejected": f"{name}/{b.image}"}
            for a, b in ends[:count]
        ],
        "thumbs": [
            {"prompt": pair[k % 2].prompt, "image": f"{name}/{pair[k % 2].image}"}
            for k, pair in enumerate(ends[:count])
        ],
    }
    files: dict[Task, Path] = {task: rollout.parent / f"items-{task}.jsonl" for task in rows}
    for task, file in files.items():
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows[task]))
    return files


# Training and judging
def finished(folder: Path) -> bool:
    return (folder / "pytorch_lora_weights.safetensors").exists()


def trained(method: Method, data: Sequence[str], seed: int, folder: Path, quick: bool) -> int:
    """Train on ``data``, unless that is done; returns the number of updates."""
    if not finished(folder):
        few = ["--max_train_steps", "2", "--lr_warmup_steps", "0"] if quick else []
        where = ["--output_dir", str(folder), "--overwrite_output_dir", "true", "--seed", str(seed)]
        command("align.train", "--config", method.config, *data, *COMMON, *method.options.split(), *few, *where)
    return int(metrics(folder)[-1]["step"])


def in_rounds(method: Method, count: int, seed: int, folder: Path, quick: bool) -> tuple[int, dict[str, Any]]:
    """Draw, ask and train, a round after the other, each by the weights of the one before; returns the number of
    updates and what there was to see in ``count`` answers. The last round trains into ``folder``, others beside it."""
    captions = training_prompts()
    captions = [captions[k] for k in evenly_spaced(len(captions), count)]
    updates, weights, seen = 0, list[str](), list[dict[str, Any]]()
    for number in range(ROUNDS):
        place = folder.parent / f"{folder.name}-rounds" / str(number)
        place.mkdir(parents=True, exist_ok=True)
        asked = captions[number::ROUNDS]  # every kind of task
        prompts, rollout, answers = place / "prompts.txt", place / "rollout", place / "answers.jsonl"
        run, name = folder if number == ROUNDS - 1 else place / "run", ROUNDS * seed + number
        if not finished(run):
            write_text(prompts, "".join(f"{caption}\n" for caption in asked))
            words = ["--weights", *weights] if weights else []
            drawn(rollout, str(prompts), ORDERED, "--seed", str(name), *words)
        seen.append(answered(rollout, method.task, len(asked), answers, name))
        data = ["--data.path", str(rollout), "--data.labels", json.dumps([str(answers)])]
        data += [word for key, value in SAMPLER for word in (f"--objective.sampler.{key}", value)]
        data += ["--rollout_batch_size", str(len(asked) * math.comb(ORDERED, 2))]  # every pair of every order
        data += ["--initial_weights", *weights] if weights else []
        updates += trained(method, data, seed, run, quick)
        weights = [str(run)]
    total = {key: sum(told[key] for told in seen) for key in ("answers", "right")}
    return updates, total | {key: seen[-1][key] for key in ("browser", "milliseconds")}


def judged(runs: Sequence[Path], folder: Path, quick: bool) -> dict[str, Any]:
    """The base and ``runs`` on held-out prompts; pictures that are there are not drawn again."""
    how = ["--guidance_scale", "1", "--num_inference_steps", str(STEPS), *(["--max_prompts", "12"] if quick else [])]
    tuned = ["--tuned", json.dumps([str(run) for run in runs]), "--output_dir", str(folder)]
    command("align.evaluate", "--config", "configs/evaluate_shapes.yaml", *tuned, *how)
    report: dict[str, Any] = json.loads((folder / "scores.json").read_text())
    return report


def recorded() -> list[dict[str, Any]]:
    """The runs in the results whose settings are today's."""
    file = RESULTS / "people.json"
    runs = json.loads(file.read_text())["runs"] if file.exists() else []
    return [run for run in runs if run.get("settings") == METHODS[run["method"]].settings]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    count, seeds = (12, args.seeds[:1]) if args.quick else (400, args.seeds)
    root = runs_folder(args.quick) / "people"
    few = ["--limit", "16"] if args.quick else []
    rollout = drawn(root / "rollout", "shapes-prompts", EACH, *few)
    asked = {
        task: answered(source, task, count, root / f"{task}.jsonl") for task, source in sources(rollout, count).items()
    }
    runs = dict[str, dict[str, Any]]()
    for name, method in METHODS.items():
        for seed in range(10):
            folder = root / f"{name.lower()}-{seed}"
            if not folder.is_dir() and not (name in args.methods and seed in seeds):
                continue
            if method.task == "best":
                updates, seen = in_rounds(method, count, seed, folder, args.quick)
            else:
                seen, answers = asked[method.task], root / f"{method.task}.jsonl"
                data = ["--data.path", str(answers), "--data.split", "null", "--validation_data", "null"]
                updates = trained(method, data, seed, folder, args.quick)
            runs[folder.name] = {"method": name, "task": method.task, "seed": seed, "settings": method.settings}
            runs[folder.name] |= {"updates": updates, "asked": seen}
    report = judged([root / name for name in runs], root / "evaluation", args.quick)
    for name, run in runs.items():
        model, prefix = (name, f"{name}_") if len(runs) > 1 else ("tuned", "")
        for title, reward in (("strict", STRICT), ("graded", "Shapes")):
            entry = report["rewards"][reward]
            wins = {key: entry[f"{prefix}{key}"] for key in ("win_rate", "win_rate_ci")}
            run[title] = {"base": entry["base_overall"], "tuned": entry[f"{model}_overall"], **wins}
    pictures = RolloutFolder(rollout).record().images
    known = {} if args.quick else {f"{run['method'].lower()}-{run['seed']}": run for run in recorded()}
    every = sorted((known | runs).values(), key=lambda run: ([*METHODS].index(run["method"]), run["seed"]))
    figures = {"pictures": pictures, "right": RIGHT, "runs": every}
    record("people", figures, args.quick)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
