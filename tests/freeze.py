"""What version 0.1 did, kept so that a reorganisation can be shown to change nothing.

    python -m tests.freeze check             # compare what this checkout does with tests/v0_1
    python -m tests.freeze check losses      # one part: configs, losses, names or folders
    python -m tests.freeze record            # write tests/v0_1; done once, with version 0.1

- ``configs.json``: what ``--print_config`` says of every file in ``configs/``;
- ``losses/``: small training configs, and ``losses.json``, every line of metrics that they gave, on one thread;
- ``names.json``: the names that the README, the notebooks and the model cards import;
- ``folders/``: a killed LoRA run, a labelled rollout, a learned noise, half the scores and a compressed pipeline,
  and ``folders.json``, what comes of going on with them.

Everything goes through the commands' own ``main`` and through files, so that modules may move. Configs are given as
files with the keys of 0.1: they have to load as they are. Floats are compared bit by bit on the CPU and the torch that
recorded them, elsewhere to 1e-4.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).resolve().parent / "v0_1"

# what may differ, and why: the path of a key in a printed config, such as "dpo_shapes.yaml:objective.init_args.beta"
# or, in every config, "objective.init_args.beta", or a whole config, "dpo_shapes.yaml" -> the reason
EXPECTED: dict[str, str] = {
    "objective.init_args.reference": "every objective that has a reference may have the weights the run starts from",
    "objective.init_args.update.init_args.reference": "the same",
    "mixed_precision": "auto is what accelerate is configured with; no where it is not",
    "push_to_hub": "a result can go to the hub",
    "hub_model_id": "the same",
    "hub_private": "the same",
    "rewards[0].timeout": "a reward that never answers can be given a time",
    "rewards[1].timeout": "the same",
    **{f"rewards[{k}]": "image statistics are watched, at weight 0" for k in range(1, 8)},
    "data.init_args.max_contradicted_share": "pairs that contradict one another are counted",
    "validation_data.init_args.max_contradicted_share": "the same",
    "data.init_args.text_cache": "embeddings of captions need not be on disk",
    "validation_data.init_args.text_cache": "the same",
    "data.init_args.text_cache_dtype": "nor in full precision",
    "validation_data.init_args.text_cache_dtype": "the same",
    "data.init_args.streaming": "hub data sets need not be downloaded",
    "validation_data.init_args.streaming": "the same",
    "data.init_args.aspect_ratio_buckets": "images need not be square",
    "validation_data.init_args.aspect_ratio_buckets": "the same",
    "data.init_args.bucket_reso_steps": "the same",
    "validation_data.init_args.bucket_reso_steps": "the same",
    "reward[0].timeout": "the same",
    "report.reward[0].timeout": "the same",
    "noise": "names the noise of evaluation, by prompt unless a config says index",
    "task_column": "tables by any column of a prompt file",
    "report.noise": "the same for reports of compression",
    "report.task_column": "the same",
    "compile": "the denoiser's repeated blocks can be compiled",
    "overwrite_output_dir": "what another run left is replaced on request alone",
    "quantize": "4 bit at load, on request",
    "offload_idle": "networks on the CPU while nobody asks them, on request",
    "vae_slicing": "a picture at a time, on request",
    "memory": "the peak is traced, on request",
    "flow_grpo_sd35.yaml:objective.init_args.sampler.kernel.init_args.schedule": "noise has several",
    "objective.init_args.trust_region": "a policy gradient can be masked by its KL from the weights that drew",
    "objective.init_args.kl_threshold": "the same",
    "objective.init_args.update.init_args.trust_region": "the same",
    "objective.init_args.update.init_args.kl_threshold": "the same",
    "objective.init_args.votes": "votes can smooth or weigh a pair",
    "data.init_args.soft_labels": "and be a soft label",
    "validation_data.init_args.soft_labels": "the same",
    "objective.init_args.loser_weight": "the gradient through the loser can be scaled",
    "objective.init_args.safeguard": "so that the winner's error does not rise",
    "objective.init_args.timesteps": "DiffusionNFT can be set to the authors' run",
    "objective.init_args.loss_scale": "the same",
    "objective.init_args.kl_weight": "the same",
    "objective.init_args.gate": "DiffusionNFT may hold to the reference what is in doubt alone",
    "stop": "a run may end by itself, on request",
    "flow_grpo_sd35.yaml:adam_weight_decay": "1e-4 in the official run",
    "flow_grpo_sd35.yaml:ema_decay": "0.9 every 8 updates in the official run",
    "flow_grpo_sd35.yaml:allow_tf32": "on in the official run",
    "b2_diffurl_sd14.yaml:allow_tf32": "the same",
    "d3po_sd15.yaml:allow_tf32": "the same",
    "ddpo_sd15.yaml:allow_tf32": "the same",
    "b2_diffurl_sd14.yaml:rewards[0].args.model": "OpenCLIP ViT-H-14 in the official run",
    "d3po_human.yaml:adam_weight_decay": "1e-4 in the official run",
    "d3po_sd15.yaml:rollout_batch_size": "2 x 10 pairs a process in the official run",
    "ddpo_sd15.yaml:objective.init_args.history_size": "32 in the official run of a learned reward",
    "dpo_sd15.yaml:data.init_args.random_flip": "on in the official run",
    "dpo_sd15.yaml:lr_warmup_steps": "500 in the official run",
    "dpo_sd15.yaml:lora.rank": "8 in diffusers' example, as the learning rate",
    "dpo_sd35.yaml:objective.init_args.proportion_empty_prompts": "0.2 in Diffusion-DPO's run on the same pairs",
    "dpo_sd35.yaml:max_train_steps": "one epoch, as in the paper",
    "flow_grpo_smoke.yaml[1]": "the rows of a group whose rewards are equal do not train: they would dilute the rest",
}
# a metric's old name -> its new name
RENAMED_METRICS: dict[str, str] = {
    f"held_out/{name}": f"validation/{name}"
    for name in ("Shapes", "strict", "loss", "implicit_acc", "delta_winner", "delta_loser", "error_winner")
}
# an old module or name -> the new one, such as "align.noise.InitialNoise" or "align.noise"; the longest fit counts
MOVED_NAMES: dict[str, str] = {
    "align.gallery": "align.evaluation.gallery",
    "align.noise": "align.policy.initial_noise",
    "align.shapes.pretrain": "align.shapes.scripts.pretrain",
    "pruning.lora": "pruning.lora_remap",
    "pruning.sizes": "tests.benchmarks.sizes",
    "rewards.lpips": "rewards.models.lpips",
    "rewards.lpips.main": "tests.benchmarks.convert_weights.main",
    "rewards.shapes": "rewards.models.shapes",
}

RELATIVE, ABSOLUTE = 1e-4, 1e-6  # between machines


# helpers
def moved(name: str) -> str:
    """The dotted ``name`` of 0.1, as it is called now."""
    for old in sorted(MOVED_NAMES, key=len, reverse=True):
        if name == old or name.startswith(f"{old}."):
            return MOVED_NAMES[old] + name[len(old) :]
    return name


def resolve(name: str) -> Any:
    """The module or attribute with the dotted ``name``; raises ImportError or AttributeError."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}.") or count == 1:
                raise
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def call(module: str, *words: str) -> str:
    """Run a command in this process, as if it were one of its own; returns what it printed. RuntimeError where it
    fails."""
    import torch
    from accelerate.state import AcceleratorState

    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = resolve(moved(f"{module}.main"))(list(words))
        except SystemExit as leaving:
            status = leaving.code
    if status:
        said = " ".join(err.getvalue().split())[-1000:]
        raise RuntimeError(f"{module} {' '.join(words)} ended with {status}: {said}")
    return out.getvalue()


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def copy_of(source: Path) -> Iterator[None]:
    """Inside a copy of ``source`` that goes afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(source, scratch, dirs_exist_ok=True)
        with inside(Path(scratch)):
            yield


def dump(path: Path, content: Mapping[str, Any]) -> None:
    """YAML, or JSON with a line for each key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    else:
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def kept(name: str) -> Any:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def machine() -> dict[str, str]:
    """What bits depend on: the CPU and torch."""
    import torch

    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    found = dict(re.findall(r"^(model name|cpu family|model|stepping)\s*: (.*)$", text, re.MULTILINE))
    return found | {"capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}


def metrics(folder: str) -> list[dict[str, Any]]:
    """The lines of a run, without their time."""
    lines = (json.loads(line) for line in Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def renamed(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{RENAMED_METRICS.get(name, name): value for name, value in line.items()} for line in lines]


def pictures(folder: str) -> list[dict[str, Any]]:
    """Mean, spread and digest of the pixels of every picture that ``align.sample`` wrote."""
    import numpy as np
    from PIL import Image

    found = []
    for path in sorted(Path(folder).glob("0*.png")):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        values = pixels.astype(np.float64) / 255
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        found.append({"mean": float(values.mean()), "std": float(values.std()), "digest": digest})
    return found


def tensors(path: str) -> dict[str, dict[str, Any]]:
    """Sum, norm and digest of every tensor in a safetensors file."""
    from safetensors.torch import load_file

    return {
        name: {
            "sum": float(tensor.double().sum()),
            "norm": float(tensor.double().norm()),
            "digest": hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest(),
        }
        for name, tensor in sorted(load_file(path).items())
    }


def differences(old: Any, new: Any, exact: bool, at: str = "", least: float = ABSOLUTE) -> list[str]:
    """Where two JSON values differ, a line each, on another machine by more than ``least`` and RELATIVE of them."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        least = 10 * RELATIVE * old["norm"] if "norm" in old else ABSOLUTE  # the terms of a tensor's sum cancel
        for name in [*old, *(name for name in new if name not in old)]:
            key = f"{at}.{name}" if at else str(name)
            if name not in new:
                found.append(f"{key}: is gone, was {old[name]!r}")
            elif name not in old:
                found.append(f"{key}: is new, {new[name]!r}")
            else:
                found += differences(old[name], new[name], exact, key, least)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) <= len(new):
        return [
            text
            for k, (a, b) in enumerate(zip(old, new, strict=False))
            for text in differences(a, b, exact, f"{at}[{k}]", least)
        ] + [f"{at}[{k}]: is new, {new[k]!r}" for k in range(len(old), len(new))]
    if not exact and at.endswith((".digest", ".implicit_acc")):  # the share of pairs in which rounding decides at first
        return []
    same = type(old) is type(new) and (old == new or (old != old and new != new))
    if not exact and isinstance(old, float) and isinstance(new, float):
        same = same or math.isclose(old, new, rel_tol=RELATIVE, abs_tol=max(ABSOLUTE, least))
    return [] if same else [f"{at}: was {old!r}, is {new!r}"]


# the printed configs
def reader(content: Mapping[str, Any]) -> str:
    """The command that reads a config of 0.1."""
    if "objective" in content:
        return "align.train"
    return "pruning.compress" if "budget" in content or "blocks" in content else "align.evaluate"


def printed(module: str, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(call(module, "--config", str(path), "--print_config"))
    return found


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """A config of 0.1 with the keys and class paths of today, by ``align.common.renames``."""
    new: dict[str, Any] = importlib.import_module("align.common.renames").upgrade(config)
    return new


def canonical(config: Any) -> Any:
    """``config`` with every class path as where the class is defined, and every reward in full: both may be short."""
    if isinstance(config, list):
        return [canonical(item) for item in config]
    if not isinstance(config, dict):
        return config
    new = {key: canonical(value) for key, value in config.items()}
    if isinstance(new.get("reward"), list):
        new["reward"] = resolve("rewards.config.plain_rewards")(new["reward"])
    if isinstance(new.get("class_path"), str):
        found = resolve(new["class_path"])
        new["class_path"] = f"{found.__module__}.{found.__qualname__}"
    return new


def record_configs() -> None:
    found = {}
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        module = reader(yaml.safe_load(path.read_text(encoding="utf-8")))
        found[path.name] = {"command": module, "config": printed(module, path)}
    dump(DATA / "configs.json", found)


def check_configs() -> list[str]:
    """Each config says what it said, and what it said in 0.1, given as a file, still loads as that."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, entry in kept("configs.json").items():
            module, path, old = entry["command"], ROOT / "configs" / name, Path(scratch) / name
            wanted = upgraded(entry["config"])
            dump(old, entry["config"])
            for what, file in (("", path), (" (the config of 0.1)", old)):
                if not file.is_file():
                    wrong = ["is gone"]
                else:
                    try:
                        wrong = differences(canonical(wanted), canonical(printed(module, file)), exact=True)
                    except RuntimeError as error:
                        wrong = [str(error)]
                found += [f"{name}{what}:{text}" for text in wrong if not _expected(name, text.partition(":")[0])]
    return found


def _expected(name: str, key: str) -> bool:
    return any(wanted in EXPECTED for wanted in (name, key, f"{name}:{key}"))


# the losses
PROMPTS = ["two red stars", "a blue circle left of a green square"]
SMALL: dict[str, dict[str, Any]] = {  # a config of 0.1 -> what makes it small
    "b2_smoke.yaml": {"max_rollouts": 3},  # the second rollout is the first that selects pictures
    "d3po_smoke.yaml": {},
    "ddpo_smoke.yaml": {},
    "find_smoke.yaml": {},
    "flow_grpo_smoke.yaml": {},
    "opd_smoke.yaml": {},
    "dpo_shapes.yaml": {
        "data": {"init_args": {"limit": 8, "cache_dir": "cache"}},
        "validation_data": {"init_args": {"limit": 4, "cache_dir": "cache"}},
        "lora": {"rank": 2},
        "train_batch_size": 4,
        "max_train_steps": 3,
        "lr_warmup_steps": 1,
        "checkpointing_steps": 0,
        "samples": {"prompts": []},
        "report_to": "none",
    },
    "nft_shapes_sd3.yaml": {
        "objective": {"init_args": {"sampler": {"steps": 2, "batch_size": 8}, "images_per_prompt": 4}},
        "validation_data": {"init_args": {"limit": 2}},
        "lora": {"rank": 2},
        "rollout_batch_size": 2,
        "train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_train_steps": 3,
        "lr_warmup_steps": 1,
        "checkpointing_steps": 0,
        "validation_steps": 0,
        "samples": {"steps": 2, "prompts": []},
        "report_to": "none",
    },
}
HEAL: dict[str, Any] = {
    "objective": {
        "class_path": "pruning.distill.Heal",
        "init_args": {
            "teacher": {"path": "shapes-sd3"},
            "plan_path": "filled in",
            "sampler": {"steps": 2, "guidance": 1.0},
            "sensitivity": "none",
            "feature_weight": 0.1,
        },
    },
    "data": {"class_path": "Prompts", "init_args": {"path": "prompts.txt"}},
    "lora": None,
    "rollout_batch_size": 2,
    "train_batch_size": 4,
    "max_train_steps": 2,
    "learning_rate": 1e-3,
    "checkpointing_steps": 0,
    "report_to": "none",
}
COMPRESS: dict[str, Any] = {
    "pretrained_model_name_or_path": "shapes-sd3",
    "output_dir": "compressed",
    "stages": ["plan", "remove", "heal"],
    "prompts": "prompts.txt",
    "components": True,
    "blocks": "3, 5-6.ff",
    "heal": "heal.yaml",
    "dtype": "float32",
}


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = merged(found[key], value) if both else value
    return found


def lines_of(name: str) -> list[dict[str, Any]]:
    """The metrics of a small run with the config ``name`` here; ``compress.yaml`` heals."""
    if name == "compress.yaml":
        call("pruning.compress", "--config", name)
        return metrics("compressed/heal")
    call("align.train", "--config", name)
    return metrics(f"runs/{Path(name).stem}")


def record_losses() -> None:
    folder = DATA / "losses"
    for name, changes in SMALL.items():
        config = yaml.safe_load((ROOT / "configs" / name).read_text(encoding="utf-8"))
        dump(folder / name, merged(config, changes | {"output_dir": f"runs/{Path(name).stem}"}))
    dump(folder / "heal.yaml", HEAL)
    dump(folder / "compress.yaml", COMPRESS)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    with copy_of(folder):
        dump(DATA / "losses.json", {"machine": machine(), "runs": {name: lines_of(name) for name in runs()}})


def runs() -> list[str]:
    """The configs of small runs."""
    return sorted(path.name for path in (DATA / "losses").glob("*.yaml") if path.name != "heal.yaml")


def check_losses(names: Sequence[str] | None = None) -> list[str]:
    old = kept("losses.json")
    exact, found = old["machine"] == machine(), []
    with copy_of(DATA / "losses"):
        for name in names or runs():
            try:
                new = lines_of(name)
            except RuntimeError as error:
                found.append(str(error))
                continue
            texts = [f"{name}{text}" for text in differences(renamed(old["runs"][name]), new, exact)]
            found += [text for text in texts if text.partition("]")[0] + "]" not in EXPECTED]
    return found


# the public names
def record_names() -> None:
    """Those of the README's code, the notebooks' cells and the cards in the recorded folders."""
    books = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "notebooks").glob("*.ipynb")]
    cells = [cell for book in books for cell in book["cells"]]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    texts += [path.read_text(encoding="utf-8") for path in (DATA / "folders").rglob("README.md")]
    texts += re.findall(r"```.*?```|`[^`\n]+`", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    texts += [resolve(name).__doc__ or "" for name in ("align", "rewards", "pruning")]
    package = r"(?:align|rewards|pruning)"
    found = set()
    for text in texts:
        for module, names in re.findall(rf"^(?:>>> )?from ({package}[\w.]*) import ([\w, ]+)", text, re.MULTILINE):
            found |= {f"{module}.{name.strip()}" for name in names.split(",")}
        found |= {f"{module}.main" for module in re.findall(rf"-m ({package}\.[\w.]+)", text)}
        found |= set(re.findall(rf"(?<![\w./-])({package}(?:\.[A-Za-z_]\w*)+)(?![\w/=-])", text))
    names = sorted(name for name in found if not _wrong(name))
    (DATA / "names.json").write_text(json.dumps(names, indent=1) + "\n")


def _wrong(name: str) -> str | None:
    try:
        resolve(moved(name))
    except (ImportError, AttributeError) as error:
        return f"{name}: {error}"
    return None


def check_names() -> list[str]:
    return [wrong for wrong in map(_wrong, kept("names.json")) if wrong]


# the folders
SCORE = ("rewards.score", "pictures", "--reward", "JPEGCompressibility", "--reward", "Shapes", "--shard_size", "3")


def make_run() -> None:
    """A LoRA run of four updates that was killed after the third; its last weights are kept to draw with."""
    config = {
        "objective": {
            "class_path": "PolicyGradient",
            "init_args": {
                "sampler": {"steps": 2, "batch_size": 4},
                "images_per_prompt": 2,
                "advantage": "history",
                "history_min_count": 2,
                "clip_range": 0.2,
            },
        },
        "pretrained_model_name_or_path": "shapes-sd",
        "data": {"class_path": "Prompts", "init_args": {"path": "prompts.txt"}},
        "rewards": [{"name": "JPEGCompressibility"}],
        "output_dir": "run",
        "lora": {"rank": 1, "targets": ["to_v"]},
        "rollout_batch_size": 2,
        "train_batch_size": 8,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "ema_decay": 0.9,
        "checkpointing_steps": 2,
        "resume_from_checkpoint": "latest",
        "report_to": "none",
    }
    dump(Path("run.yaml"), config)
    call("align.train", "--config", "run.yaml")
    Path("run.yaml").unlink()


def kill_run() -> None:
    """Leave what a kill after the third update would have left, and the last weights."""
    shutil.rmtree("run/checkpoint-4")
    path = Path("run/metrics.jsonl")
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if json.loads(line)["step"] <= 3))


def ask_run() -> Any:
    """What the kept weights draw; the lines and the weights of the run when it has gone on to its end."""
    config = {"prompts": PROMPTS[0], "weights": "run", "steps": 2, "output_dir": "drawn-run"}
    dump(Path("drawn-run.yaml"), config)
    call("align.sample", "--config", "drawn-run.yaml")
    before = Path("run/metrics.jsonl").read_text().splitlines()
    call("align.train", "--config", "run/config.yaml")
    after = Path("run/metrics.jsonl").read_text().splitlines()
    return {
        "pictures": pictures("drawn-run"),
        "resumed": [after[:2] == before[:2], after[2] == before[2]],  # with their times: the third step was taken again
        "lines": metrics("run"),
        "weights": tensors("run/pytorch_lora_weights.safetensors"),
    }


def make_rollout() -> None:
    config = {
        "prompts": "prompts.txt",
        "output_dir": "rollout",
        "sampler": {"steps": 2},
        "images_per_prompt": 3,
        "prompts_per_shard": 1,
        "rewards": [{"name": "JPEGCompressibility"}],
    }
    dump(Path("rollout.yaml"), config)
    call("align.rollout", "--config", "rollout.yaml")
    for sheet in Path("rollout").glob("contact-sheet-*.png"):
        sheet.unlink()  # half of the bytes, and nobody reads them
    votes = [(0, 1, "a"), (0, 2, "tie"), (1, 2, "b"), (3, 4, "b"), (3, 5, "a")]
    lines = [{"image_a": f"images/{a:05d}.png", "image_b": f"images/{b:05d}.png", "label": v} for a, b, v in votes]
    Path("answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train = {
        "objective": {"class_path": "D3PO", "init_args": {"sampler": {"steps": 2}}},
        "pretrained_model_name_or_path": "shapes-sd",
        "data": {"class_path": "LabelledRollout", "init_args": {"path": "rollout", "labels": ["answers.jsonl"]}},
        "output_dir": "d3po",
        "lora": {"rank": 1},
        "rollout_batch_size": 2,
        "train_batch_size": 4,
        "max_train_steps": 3,
        "learning_rate": 1e-3,
        "checkpointing_steps": 0,
        "report_to": "none",
    }
    dump(Path("d3po.yaml"), train)


def ask_rollout() -> Any:
    """Whether the rollout counts as finished, and the lines of D3PO on it."""
    before = _times("rollout", "*.safetensors")
    call("align.rollout", "--config", "rollout.yaml")
    call("align.train", "--config", "d3po.yaml")
    return {"finished": _times("rollout", "*.safetensors") == before, "lines": metrics("d3po")}


def make_noise() -> None:
    config = yaml.safe_load((ROOT / "configs/find_smoke.yaml").read_text(encoding="utf-8"))
    data = {"class_path": "Prompts", "init_args": {"path": "prompts.txt"}}
    dump(Path("find.yaml"), config | {"data": data, "output_dir": "find"})
    call("align.train", "--config", "find.yaml")
    Path("find.yaml").unlink()
    for path in Path("find").iterdir():
        if path.name not in ("find.safetensors", "README.md"):
            path.unlink()


def ask_noise() -> Any:
    """What is drawn from the learned noise."""
    dump(Path("drawn-noise.yaml"), {"noise": "find/find.safetensors", "steps": 2, "output_dir": "drawn-noise"})
    call("align.sample", "--config", "drawn-noise.yaml")
    return {"pictures": pictures("drawn-noise")}


def make_scores() -> None:
    from PIL import Image, ImageDraw

    Path("pictures").mkdir()
    rows = []
    for k, colour in enumerate(("red", "green", "blue", "yellow", "purple", "black")):
        image = Image.new("RGB", (32, 32), "white")
        ImageDraw.Draw(image).ellipse((4 + k, 6, 18 + k, 20), fill=colour)
        image.save(f"pictures/{k}.png")
        rows.append({"file_name": f"{k}.png", "prompt": f"a {colour} circle"})
    Path("pictures/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(*SCORE, "--output", "scores")


def halve_scores() -> None:
    for name in ("scores-00001.parquet", "summary.json"):
        Path("scores", name).unlink()


def ask_scores() -> Any:
    """The scores after the same command again, and whether it left the shard that was there."""
    import pyarrow.parquet as pq

    before = _times("scores", "*.parquet")
    call(*SCORE, "--output", "scores")
    shards = sorted(Path("scores").glob("*.parquet"))
    return {
        "kept": before.items() <= _times("scores", "*.parquet").items(),
        "rows": [row for shard in shards for row in pq.read_table(shard).to_pylist()],
        "summary": json.loads(Path("scores/summary.json").read_text()),
    }


def make_compressed() -> None:
    from tests import pipelines

    with contextlib.redirect_stderr(io.StringIO()):
        pipelines.folders(Path("pipelines"))
    config = {
        "pretrained_model_name_or_path": "pipelines/flow",
        "output_dir": "compressed",
        "stages": ["plan", "remove", "quantise"],
        "prompts": "prompts.txt",
        "components": True,
        "blocks": "1, 2.ff",
    }
    dump(Path("compress.yaml"), config)
    call("pruning.compress", "--config", "compress.yaml")
    Path("compressed/int4").rename("int4")
    for folder in ("pipelines", "compressed"):
        shutil.rmtree(folder)
    Path("compress.yaml").unlink()


def ask_compressed() -> Any:
    """What the compressed pipeline draws, and one evaluation of its denoiser by ``pruning.load``."""
    import torch

    config = {
        "pretrained_model_name_or_path": "int4", "prompts": PROMPTS[0], "steps": 2, "output_dir": "drawn-compressed",
    }  # fmt: skip
    dump(Path("drawn-compressed.yaml"), config)
    call("align.sample", "--config", "drawn-compressed.yaml")
    pipe = resolve(moved("pruning.load"))("int4", torch.float32)
    denoiser, size = pipe.transformer, pipe.transformer.config

    def numbers(*shape: int) -> torch.Tensor:
        return torch.linspace(-1, 1, math.prod(shape)).sin().view(shape)

    with torch.no_grad():
        said = denoiser(
            hidden_states=numbers(1, size.in_channels, 8, 8),
            encoder_hidden_states=numbers(1, 5, size.joint_attention_dim),
            pooled_projections=numbers(1, size.pooled_projection_dim),
            timestep=torch.tensor([500.0]),
        ).sample
    return {
        "pictures": pictures("drawn-compressed"),
        "class": type(pipe).__name__,
        "output": {"mean": said.mean().item(), "values": said.flatten()[::32].tolist()},
    }


def _times(folder: str, pattern: str) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in Path(folder).glob(pattern)}


# what makes a folder, what takes away a part of it, and what is asked of it
FOLDERS: dict[str, tuple[Callable[[], None], Callable[[], None] | None, Callable[[], Any]]] = {
    "run": (make_run, kill_run, ask_run),
    "rollout": (make_rollout, None, ask_rollout),
    "noise": (make_noise, None, ask_noise),
    "scores": (make_scores, halve_scores, ask_scores),
    "compressed": (make_compressed, None, ask_compressed),
}


def record_folders() -> None:
    answers = {}
    for name, (make, damage, ask) in FOLDERS.items():
        folder = DATA / "folders" / name
        folder.mkdir(parents=True)
        (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
        with inside(folder):
            make()
            whole: dict[str, Any] = {}
            if name == "run":
                whole = {"lines": metrics("run"), "weights": tensors("run/pytorch_lora_weights.safetensors")}
            if name == "scores":
                whole = {"summary": json.loads(Path("scores/summary.json").read_text())}
            if damage:
                damage()
        with copy_of(folder):
            answers[name] = ask()
        for key, value in whole.items():  # what was not interrupted gave the same
            assert not differences(value, answers[name][key], exact=True), (name, key)
    dump(DATA / "folders.json", {"machine": machine(), "answers": answers})


def check_folders(names: Sequence[str] | None = None) -> list[str]:
    old = kept("folders.json")
    exact, found = old["machine"] == machine(), []
    for name in names or FOLDERS:
        with copy_of(DATA / "folders" / name):
            try:
                new = FOLDERS[name][2]()
            except Exception:  # whatever it is, the other folders are worth a look
                found.append(f"{name}: {traceback.format_exc(limit=-3)}")
                continue
        wanted = old["answers"][name]
        for answer in (wanted, new):  # of both: a run that goes on keeps its first lines as they are
            if "lines" in answer:
                answer["lines"] = renamed(answer["lines"])
        found += [f"{name}.{text}" for text in differences(wanted, new, exact)]
    return found


PARTS: dict[str, tuple[Callable[[], None], Callable[[], list[str]]]] = {  # the names are read off recorded folders too
    "configs": (record_configs, check_configs),
    "losses": (record_losses, check_losses),
    "folders": (record_folders, check_folders),
    "names": (record_names, check_names),
}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in ("record", "check") or not set(words[1:]) <= PARTS.keys():
        print(f"usage: python -m tests.freeze {{record|check}} [{'|'.join(PARTS)}] ..", file=sys.stderr)
        return 2
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # torch is not imported yet
    if words[0] == "record" and DATA.exists():
        print(f"{DATA} is there already", file=sys.stderr)
        return 2
    wrong = 0
    for name in words[1:] or PARTS:
        record, check = PARTS[name]
        if words[0] == "record":
            record()
            print(f"{name}: recorded")
            continue
        found = check()
        wrong += len(found)
        how = ""
        if name in ("losses", "folders"):
            how = (
                ", bit by bit" if kept(f"{name}.json")["machine"] == machine() else f", to {RELATIVE:g}: other machine"
            )
        print(f"{name}: {f'{len(found)} differences' if found else 'the same'}{how}")
        for text in found:
            print(f"  {text}")
    for name, reason in EXPECTED.items() if words[0] == "check" else ():
        print(f"expected: {name}: {reason}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
