"""Bad inputs and accidents, made by kind: tables of what can be wrong, each crossed with the commands it can reach.

A case is a command line whose inputs are made in a folder of its own. ``controls`` are the same command lines with
nothing wrong, so that a command which refuses everything would be seen.
"""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.families import LORA_FILE
from align.policy.policy import LoRA, Policy
from align.shapes.world import render
from tests import pipelines
from tests.test_policy import disturb

BRIGHT, BAD = "tests.helpers.Bright", f"{__name__}.Bad"
CAPTIONS = ["two red stars", "a blue circle", "a star and a circle", "three green squares", "a black square"]
DEEP = "[" * 100_000
COMMANDS = {
    "train": "align.train", "online": "align.train", "sample": "align.sample", "evaluate": "align.evaluate",
    "rollout": "align.rollout", "compress": "pruning.compress", "score": "rewards.score", "agree": "rewards.agree",
}  # fmt: skip
BY_CONFIG = ("train", "sample", "evaluate", "rollout", "compress")  # those that take --config
MODEL = "pretrained_model_name_or_path"


# what misbehaves
class Bad:
    """A reward that does what ``how`` says in place of scoring."""

    differentiable = False

    def __init__(self, how: str) -> None:
        self.how = how
        if how == "begin":
            raise RuntimeError("no such weights")

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Any:
        count = len(images)
        if self.how == "raise":
            raise ZeroDivisionError("somebody else's bug")
        if self.how == "recurse":
            return self.score(images=images, prompts=prompts)
        if self.how == "memory":
            raise MemoryError
        if self.how == "exit":
            sys.exit(0)
        return {
            "nan": torch.full((count,), torch.nan),
            "infinite": torch.full((count,), torch.inf),
            "shape": torch.zeros(count, 2),
            "scalar": torch.tensor(0.5),
            "list": [0.5] * count,
            "none": None,
            "text": "0.5",
            "complex": torch.full((count,), 0.5 + 1j),
            "meta": torch.zeros(count, device="meta"),
        }[self.how]


class Silent:
    """No reward: it has no ``score``."""

    differentiable = False


class Harm:
    """Unpickled, it makes the file ``harm`` where the command runs."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harm"),)


def pickled(path: Path) -> None:
    """A torch file that does harm when it is unpickled."""
    torch.save({"state": Harm(), "param_groups": []}, path)


# inputs with nothing wrong
@dataclass(frozen=True)
class Shared:
    """Inputs that all cases read and none may change: the tiny pipelines ``epsilon`` and ``flow``, a LoRA for each
    (``epsilon-lora``, ``flow-lora``), ``pairs.parquet``, ``pictures``, ``prompts.txt``, and what commands have left:
    ``run``, ``drawn``, ``scores``, ``pruned``."""

    root: Path

    @staticmethod
    def make(root: Path) -> Shared:
        for kind, folder in pipelines.folders(root).items():
            if kind != "v":
                policy = Policy(pipelines.tiny(kind), LoRA(2))
                disturb(policy, 0.1)
                (root / f"{folder.name}-lora").mkdir()
                policy.save(root / f"{folder.name}-lora")
        rows = [
            {"caption": CAPTIONS[k % 5], "jpg_0": png(k), "jpg_1": png(k + 1), "label_0": k % 2, "label_1": 1 - k % 2}
            for k in range(8)
        ]
        pq.write_table(pa.Table.from_pylist(rows), root / "pairs.parquet")
        (root / "pictures").mkdir()
        for k in range(6):
            (root / "pictures" / f"{k}.png").write_bytes(png(k))
        lines = [json.dumps({"file_name": f"{k}.png", "text": CAPTIONS[k % 5]}) for k in range(6)]
        (root / "pictures/metadata.jsonl").write_text("\n".join(lines) + "\n")
        (root / "prompts.txt").write_text("\n".join(CAPTIONS[:3]) + "\n")
        return Shared(root)

    def __getitem__(self, name: str) -> Path:
        return self.root / name


def png(number: int, side: int = 16) -> bytes:
    file = io.BytesIO()
    Image.fromarray(render(np.random.default_rng(number), CAPTIONS[number % 5])).resize((side, side)).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Place:
    """The folder of one case."""

    folder: Path
    shared: Shared

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def copy(self, name: str, to: str = "") -> Path:
        """A shared input as one's own, to be damaged."""
        target = self.folder / (to or name)
        (shutil.copytree if self.shared[name].is_dir() else shutil.copy)(self.shared[name], target)
        return target


def settings(base: str, place: Place) -> dict[str, Any]:
    """The settings of a command with nothing wrong, small enough for a second."""
    shared, out = place.shared, str(place.out)
    prompts, sampler = str(shared["prompts.txt"]), {"num_inference_steps": 2, "guidance_scale": 1.0}
    steps = {"num_inference_steps": 1, "guidance_scale": 1.0}
    tuned = place.folder / "lora"
    if base == "evaluate" and not tuned.exists():
        place.copy("epsilon-lora", "lora")  # it fills the model card there
    run = {
        MODEL: str(shared["epsilon"]), "output_dir": out, "lora": {"rank": 2}, "train_batch_size": 4,
        "max_train_steps": 2, "learning_rate": 1e-3, "checkpointing_steps": 0, "report_to": "none",
    }  # fmt: skip
    pairs = {"path": str(shared["pairs.parquet"]), "cache_dir": str(place.folder / "cache")}
    found: dict[str, dict[str, Any]] = {
        "train": run
        | {
            "data": {"class_path": "PreferencePairs", "init_args": pairs},
            "objective": {"class_path": "DPO", "init_args": {"beta": 100.0}},
        },
        "online": run
        | {
            "data": {"class_path": "Prompts", "init_args": {"path": prompts}},
            "objective": {
                "class_path": "PolicyGradient",
                "init_args": {"sampler": dict(sampler), "images_per_prompt": 2},
            },
            "rewards": [{"name": BRIGHT}],
            "rollout_batch_size": 3,
        },
        "sample": {"prompts": "two red stars", MODEL: str(shared["epsilon"]), "output_dir": out, **steps},
        "evaluate": {
            "tuned": str(tuned), "base": str(shared["epsilon"]), "prompts": prompts,
            "reward": [BRIGHT], "output_dir": out, **steps,
        },
        "rollout": {
            "prompts": prompts, MODEL: str(shared["epsilon"]), "output_dir": out, "sampler": dict(sampler),
            "images_per_prompt": 2,
        },
        "compress": {
            MODEL: str(shared["flow"]), "output_dir": out, "prompts": prompts, "blocks": "1", "dtype": "float32",
            "stages": ["analyze", "plan", "remove", "quantize"], **steps,
        },
        "score": {"source": str(shared["pictures"]), "reward": BRIGHT, "output": out},
        "agree": {"pairs": str(shared["pairs.parquet"]), "reward": BRIGHT, "output": f"{out}.json"},
    }  # fmt: skip
    return found[base]


def changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with others at dotted keys."""
    new = copy.deepcopy(dict(values))
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = new
        for parent in parents:
            if not isinstance(section.get(parent), dict):
                section[parent] = {}
            section = section[parent]
        section[last] = value
    return new


def line(base: str, place: Place, changes: Mapping[str, Any] | None = None) -> list[str]:
    """The command line of a command, with ``changes``; settings of those that take ``--config`` stand in a file."""
    values = changed(settings(base, place), changes or {})
    if base in ("score", "agree"):
        source = [str(values.pop("source"))] if base == "score" else []
        return [*source, *(f"--{key}={value}" for key, value in values.items())]
    path = place.folder / "config.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return ["--config", str(path)]


# the cases
@dataclass(frozen=True)
class Case:
    """A command line that meets something bad, and how it has to end.

    ``named``: one of these words has to be in what the user is told. ``begins``: the work may begin before anybody can
    know, so what it has written by then may stay, whole.
    """

    kind: str
    member: str
    base: str
    words: Callable[[Place], list[str]]
    named: tuple[str, ...] = ()
    status: tuple[int, ...] = (2,)
    begins: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def with_changes(base: str, changes: Mapping[str, Any]) -> Callable[[Place], list[str]]:
    return lambda place: line(base, place, changes)


def controls() -> Iterator[Case]:
    for base in COMMANDS:
        yield Case("controls", "nothing wrong", base, with_changes(base, {}), (), (0,), True)
    yield Case(
        "controls", "resumed", "train", lambda p: (p.copy("run", "out"), of_run(p, "latest", {}))[1], (), (0,), True
    )


# config files
def _text(text: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(text.encode() if isinstance(text, str) else text)


def _lines_of(path: Path) -> str:
    return path.read_text()


CONFIGS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "not YAML": _text("a: [1, 2\nb: }"),
    "a tab": _text("lora:\n\trank: 2\n"),
    "a list": _text("- 1\n- 2\n"),
    "a word": _text("yes please\n"),
    "binary": _text(bytes(range(256)) * 8),
    "NUL": lambda path: path.write_bytes(path.read_bytes() + b"\0seed: 1\n"),
    "UTF-16 without a mark": lambda path: path.write_bytes(_lines_of(path).encode("utf-16-le")),
    "deep": _text(f"seed: {DEEP}"),
    "a key twice": lambda path: path.write_text(f"seed: 1\n{_lines_of(path)}seed: 2\n"),
    "a nested key twice": lambda path: path.write_text(f"{_lines_of(path)}lora: {{rank: 2, rank: 3}}\n"),
    "code": lambda path: path.write_text(f"{_lines_of(path)}seed: !!python/object/apply:pathlib.Path.touch [harm]\n"),
    "itself": _text("seed: &a [*a]\n"),
    "parquet": lambda path: pq.write_table(pa.table({"a": [1]}), path),
}


def config_files() -> Iterator[Case]:
    for base in BY_CONFIG:
        for member, spoil in CONFIGS.items():

            def words(place: Place, base: str = base, spoil: Callable[[Path], object] = spoil) -> list[str]:
                found = line(base, place)
                spoil(Path(found[1]))
                return found

            named = ("rank", "seed", "lora") if "twice" in member else ("config",)
            yield Case("config files", member, base, words, named)


# keys and values
KEYS = {
    "train": ["learning_rat", "lora.ranks", "objective.init_args.betta", "data.init_args.pth", "unet", "samples.seeds"],
    "online": ["objective.init_args.group_sizes", "objective.init_args.sampler.stepz"],
    "sample": ["promts", "nois"],
    "evaluate": ["tunde", "rewardz"],
    "rollout": ["sampler.stepz", "images_per_promt"],
    "compress": ["budgets", "quantize.skips", "report.repeat"],
    "score": ["rewardz", "shard"],
    "agree": ["pair", "agreements"],
}


def wrong_keys() -> Iterator[Case]:
    for base, keys in KEYS.items():
        for key in keys:
            yield Case("wrong keys", key, base, with_changes(base, {key: 1}), (key.rpartition(".")[2],))


NAN, INF, WORD, LIST, FRACTION, HUGE = float("nan"), float("inf"), "many", [1, 2], 1.5, 2**70
REAL = (NAN, INF, WORD, LIST)
POSITIVE = (*REAL, 0.0, -1.0)
COUNT = (NAN, WORD, LIST, FRACTION, HUGE, 0, -1)
STEPS = (*COUNT, 5000)
VALUES: dict[str, dict[str, Sequence[Any]]] = {
    "train": {
        "learning_rate": POSITIVE,
        "train_batch_size": COUNT,
        "gradient_accumulation_steps": COUNT,
        "max_train_steps": COUNT,
        "lora.rank": (*COUNT, 10**6),
        "lora.alpha": POSITIVE,
        "lora.targets": ([], ["to_q", "typo"], 3),
        "seed": (NAN, WORD, FRACTION, HUGE, -1),
        "max_grad_norm": POSITIVE,
        "ema_decay": (NAN, WORD, 1.0, -0.5, 2.0),
        "adam_beta1": (NAN, 1.0, -0.1),
        "adam_beta2": (NAN, 1.0, -0.1),
        "adam_epsilon": POSITIVE,
        "adam_weight_decay": (NAN, INF, -1.0),
        "lr_warmup_steps": (NAN, WORD, -1),
        "checkpointing_steps": (NAN, WORD, -1),
        "checkpoints_total_limit": (0, -1),
        "logging_steps": (0, -1),
        "sgd_momentum": (NAN, 1.5, -1.0),
        "mixed_precision": ("fp8", 16, "fp16"),
        "lr_scheduler": ("steep", 3),
        "report_to": ("paper", ["none", "paper"]),
        "attention_backend": ("nowhere",),
        "use_8bit_adam": (True, WORD),
        "objective.init_args.beta": POSITIVE,
        "data.init_args.resolution": (NAN, WORD, FRACTION, 0, -16, 17),
        "data.init_args.limit": (NAN, WORD, 0, -1),
        "samples": ({"num_inference_steps": 0}, {"guidance_scale": NAN}, {"prompts": 3}),
        MODEL: ("", "nowhere", 3),
    },
    "online": {
        "rollout_batch_size": (*COUNT, None),
        "objective.init_args.images_per_prompt": COUNT,
        "objective.init_args.sampler.num_inference_steps": STEPS,
        "objective.init_args.sampler.guidance_scale": (*REAL, -1.0),
        "objective.init_args.sampler.batch_size": COUNT,
        "objective.init_args.clip_range": (*REAL, -1.0),
        "objective.init_args.advantage": ("psychic", 3),
        "rewards": ([], [{"name": BRIGHT, "weight": NAN}], [{"name": BRIGHT, "wait": 1}], WORD, 3, [3]),
    },
    "sample": {
        "images_per_prompt": COUNT,
        "num_inference_steps": STEPS,
        "guidance_scale": (*REAL, -1.0),
        "seed": (NAN, WORD, FRACTION, HUGE),
        "batch_size": COUNT,
        "resolution": (NAN, WORD, FRACTION, 0, -16, 17),
        "mixed_precision": ("fp8", 16),
        "device": ("toaster", 3),
        "prompts": (None, ["a", "b"]),
        "noise": ("nowhere.safetensors",),
    },
    "evaluate": {
        "samples_per_prompt": COUNT,
        "num_inference_steps": STEPS,
        "guidance_scale": REAL,
        "seed": (NAN, WORD, HUGE),
        "batch_size": COUNT,
        "max_prompts": COUNT,
        "resolution": (NAN, 0, -16, 17),
        "device": ("toaster",),
        "tuned": ("nowhere", None),
    },
    "rollout": {
        "images_per_prompt": (*COUNT, 1),
        "prompts_per_shard": COUNT,
        "limit": (NAN, WORD, 0, -1),
        "sampler.num_inference_steps": STEPS,
        "seed": (NAN, WORD, HUGE),
        "resolution": (NAN, 0, -16, 17),
        "device": ("toaster",),
    },
    "compress": {
        "calibration_prompts": COUNT,
        "num_inference_steps": STEPS,
        "guidance_scale": REAL,
        "seed": (NAN, WORD, HUGE),
        "batch_size": COUNT,
        "blocks": ("", "7", "0-2", "nonsense", "2-1", None),
        "budget": ({"parameters": 0.2}, {"parameters": NAN}, {"parameters": -1}, {}),
        "stages": (["nope"], WORD),
        "dtype": ("int3",),
        "measure": ("taste",),
        "quantize": ({"skip": ["nowhere"]}, {"compute_dtype": "int3"}, {"skip": 3}),
        "heal": ("nowhere.yaml",),
        "device": ("toaster",),
    },
    "score": {
        "limit": (WORD, FRACTION, 0, -1),
        "batch_size": (WORD, 0, -1),
        "threads": (WORD, 0, -1),
        "shard_size": (WORD, 0, -1),
        "max_bad": (WORD, -1),
        "gallery": (WORD, 0),
        "patience": (NAN, WORD, -1),
        "engine": ("spark",),
        "workers": (2,),
        "device": ("toaster",),
        "output": ("scores.xlsx",),
        "prompts": ("nowhere.txt", "nowhere.jsonl"),
        "source": ("nowhere", "nowhere.jsonl", ""),
        "caption_column": ("nowhere",),
    },
    "agree": {
        "limit": (WORD, FRACTION, 0, -1),
        "batch_size": (WORD, 0, -1),
        "threads": (WORD, 0),
        "agreement": (NAN, INF, WORD, 0.3, 2),
        "human_ties": ("maybe",),
        "caption_column": ("nowhere",),
        "device": ("toaster",),
        "pairs": ("nowhere", "nowhere.jsonl", ""),
    },
}
OPTIONAL = {("sample", "guidance_scale", -1.0)}  # a scale below 0 draws away from the prompt on purpose


def wrong_values() -> Iterator[Case]:
    for base, keys in VALUES.items():
        for key, values in keys.items():
            for value in values:
                if (base, key, value) not in [*OPTIONAL]:
                    named = (key.rpartition(".")[2].removesuffix("s"), str(value)) if value != "" else ()
                    member = f"{key}: {value!r}"
                    yield Case("wrong values", member, base, with_changes(base, {key: value}), named)


CLASSES: dict[str, Any] = {
    "unknown": "NoSuch",
    "unknown module": "no.such.Module",
    "another kind": "align.data.Prompts",
    "a function": "os.system",
    "a number": 3,
    "a list": [1],
    "a wrong argument": {"class_path": "DPO", "init_args": {"nope": 1}},
    "no class_path": {"init_args": {"beta": 1.0}},
    "null": None,
}


def classes() -> Iterator[Case]:
    for member, value in CLASSES.items():
        yield Case("classes", f"objective: {member}", "train", with_changes("train", {"objective": value}))
        other = "align.objectives.DPO" if member == "another kind" else value
        yield Case("classes", f"data: {member}", "train", with_changes("train", {"data": other}))
        if value is not None:
            yield Case("classes", f"kernel: {member}", "rollout", with_changes("rollout", {"sampler.kernel": value}))


# data
def _table(change: Callable[[list[dict[str, Any]]], object]) -> Callable[[Place], Path]:
    """The pairs, once ``change`` has seen to them."""

    def write(place: Place) -> Path:
        rows = pq.read_table(place.shared["pairs.parquet"]).to_pylist()
        rows = change(rows) or rows
        pq.write_table(pa.Table.from_pylist(rows), place.folder / "bad.parquet")
        return place.folder / "bad.parquet"

    return write


def _each(**values: Any) -> Callable[[Place], Path]:
    return _table(lambda rows: [row | values for row in rows])


def _file(name: str, content: bytes | str) -> Callable[[Place], Path]:
    def write(place: Place) -> Path:
        path = place.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def _cut(share: float) -> Callable[[Place], Path]:
    def write(place: Place) -> Path:
        data = place.shared["pairs.parquet"].read_bytes()
        (place.folder / "bad.parquet").write_bytes(data[: int(len(data) * share)])
        return place.folder / "bad.parquet"

    return write


def _fifo(name: str) -> Callable[[Place], Path]:
    def write(place: Place) -> Path:
        os.mkfifo(place.folder / name)
        return place.folder / name

    return write


def _device(name: str) -> Callable[[Place], Path]:
    def write(place: Place) -> Path:
        (place.folder / name).symlink_to("/dev/zero")
        return place.folder / name

    return write


def _folder(name: str, **files: bytes) -> Callable[[Place], Path]:
    def write(place: Place) -> Path:
        (place.folder / name).mkdir()
        for file, content in files.items():
            (place.folder / name / file.replace("_", ".")).write_bytes(content)
        return place.folder / name

    return write


ROW = {"prompt": "a star", "chosen": "a.png", "rejected": "b.png"}
TEXTS: dict[str, Callable[[str], Callable[[Place], Path]]] = {  # of a file of records, whatever they are
    "missing": lambda name: lambda place: place.folder / name,
    "empty": lambda name: _file(name, ""),
    "blank lines": lambda name: _file(name, "\n \n\n"),
    "binary": lambda name: _file(name, bytes(range(256)) * 8),
    "UTF-16 without a mark": lambda name: _file(name, (json.dumps(ROW) + "\n").encode("utf-16-le")),
    "cut": lambda name: _file(name, json.dumps(ROW)[:-9]),
    "lists": lambda name: _file(name, "[1, 2]\n[3, 4]\n"),
    "numbers": lambda name: _file(name, "1\n2\n"),
    "null": lambda name: _file(name, "null\n"),
    "deep": lambda name: _file(name, f'{{"prompt": {DEEP}\n'),
    "a huge number": lambda name: _file(name, f'{{"prompt": {"9" * 6000}}}\n'),
    "lone surrogates": lambda name: _file(name, '{"prompt": "a \\ud800 star", "chosen": "a", "rejected": "b"}\n'),
    "other keys": lambda name: _file(name, '{"colour": "red"}\n'),
    "a prompt that is a list": lambda name: _file(name, '{"prompt": ["a star"], "chosen": "a", "rejected": "b"}\n'),
    "a fifo": lambda name: _fifo(name),
    "a device": lambda name: _device(name),
}
PAIRS: dict[str, Callable[[Place], Path]] = {
    **{f"{member} (.jsonl)": make("bad.jsonl") for member, make in TEXTS.items()},
    "JSONL whose images are not there": _file("bad.jsonl", json.dumps(ROW) + "\n"),
    "empty (.parquet)": _file("bad.parquet", b""),
    "garbage (.parquet)": _file("bad.parquet", b"PAR1" + bytes(range(256)) + b"PAR1"),
    "cut at half (.parquet)": _cut(0.5),
    "cut at the end (.parquet)": _cut(0.99),
    "text (.parquet)": _file("bad.parquet", "caption,image\n"),
    "a fifo (.parquet)": _fifo("bad.parquet"),
    "a device (.parquet)": _device("bad.parquet"),
    "no rows": _table(lambda rows: [dict.fromkeys(rows[0])][:0] or rows.clear() or [{"caption": None}]),
    "other columns": _table(lambda rows: [{"a": 1, "b": "x"} for _ in rows]),
    "no captions": _each(caption=None),
    "captions that are numbers": _each(caption=7),
    "ties alone": _each(label_0=0.5, label_1=0.5),
    "labels that add up to nothing": _each(label_0=0.0, label_1=0.0),
    "labels that are NaN": _each(label_0=float("nan"), label_1=float("nan")),
    "labels that are words": _each(label_0="left", label_1="right"),
    "no label": _table(
        lambda rows: [{k: v for k, v in row.items() if not k.startswith("label")} for row in rows]
    ),
    "images that are no images": _each(jpg_0=b"no image", jpg_1=b"none either"),
    "images that are cut": _table(
        lambda rows: [row | {"jpg_0": row["jpg_0"][:60], "jpg_1": row["jpg_1"][:60]} for row in rows]
    ),
    "images that are empty": _each(jpg_0=b"", jpg_1=b""),
    "images that are null": _each(jpg_0=None, jpg_1=None),
    "images that are numbers": _each(jpg_0=1, jpg_1=2),
    "both images the same": _table(lambda rows: [row | {"jpg_1": row["jpg_0"]} for row in rows]),
    "an empty folder": _folder("bad"),
    "a folder of text": _folder("bad", notes_txt=b"nothing to see"),
    "a folder of a bad image": _folder("bad", a_png=b"no image"),
}  # fmt: skip


def pairs() -> Iterator[Case]:
    for member, make in PAIRS.items():
        for base, key in (("train", "data.init_args.path"), ("agree", "pairs")):

            def words(
                place: Place, base: str = base, key: str = key, make: Callable[[Place], Path] = make
            ) -> list[str]:
                return line(base, place, {key: str(make(place))})

            # what scores two equal images alike counts one half
            fine = (base, member) == ("agree", "both images the same")
            yield Case("pairs", member, base, words, ("bad",), (0, 2) if fine else (2,), fine)


PROMPT_KEYS = {
    "online": "data.init_args.path",
    "sample": "prompts",
    "evaluate": "prompts",
    "rollout": "prompts",
    "compress": "prompts",
}


def prompt_files() -> Iterator[Case]:
    for base, key in PROMPT_KEYS.items():
        for member, make in TEXTS.items():
            names = ["bad.jsonl"]
            if member in ("missing", "empty", "blank lines", "binary", "a device", "UTF-16 without a mark"):
                names.append("bad.txt")
            if member in ("cut", "deep", "numbers", "a fifo"):
                names.append("bad.json")
            for name, write in ((name, make(name)) for name in names):

                def words(
                    place: Place, base: str = base, key: str = key, write: Callable[[Place], Path] = write
                ) -> list[str]:
                    return line(base, place, {key: str(write(place))})

                yield Case("prompt files", f"{member} ({name[3:]})", base, words, ("bad",))
        yield Case(
            "prompt files", "parquet (.txt)", base,
            lambda place, base=base, key=key: line(
                base, place, {key: str(shutil.copy(place.shared["pairs.parquet"], place.folder / "bad.txt"))}
            ), ("bad",),
        )  # fmt: skip


SOURCES: dict[str, Callable[[Place], Path]] = {
    **{f"{member} (.jsonl)": make("bad.jsonl") for member, make in TEXTS.items()},
    **{
        f"{member} (.csv)": TEXTS[member]("bad.csv")
        for member in ("empty", "binary", "other keys", "a fifo", "a device")
    },
    "a list whose images are not there": _file("bad.jsonl", '{"file_name": "x.png", "text": "a star"}\n'),
    "garbage (.parquet)": _file("bad.parquet", b"PAR1" + bytes(range(256)) + b"PAR1"),
    "cut (.parquet)": _cut(0.5),
    "other columns (.parquet)": _table(lambda rows: [{"a": 1, "b": "x"} for _ in rows]),
    "images that are numbers (.parquet)": _table(lambda rows: [{"image": 1, "caption": "a star"} for _ in rows]),
    "empty (.tar)": _file("bad.tar", b""),
    "garbage (.tar)": _file("bad.tar", bytes(range(256)) * 40),
    "a fifo (.tar)": _fifo("bad.tar"),
    "an empty folder": _folder("bad"),
    "a folder of text": _folder("bad", notes_txt=b"nothing to see"),
    "a folder of bad images": _folder("bad", a_png=b"no image", a_txt=b"a star"),
    "a folder with broken metadata": _folder("bad", a_png=png(0), metadata_jsonl=b"{"),
    "a folder with metadata of lists": _folder("bad", a_png=png(0), metadata_jsonl=b"[1]\n"),
    "a folder with deep metadata": _folder("bad", a_png=png(0), metadata_jsonl=DEEP.encode()),
    "a folder with prompts in UTF-16": _folder("bad", a_png=png(0), a_txt="a star".encode("utf-16-le")),
}


def sources() -> Iterator[Case]:
    for member, make in SOURCES.items():
        begins = member.startswith(("a folder of bad images", "a list whose", "images that"))  # listed in bad.jsonl
        yield Case(
            "images to score", member, "score",
            lambda place, make=make: line("score", place, {"source": str(make(place))}), ("bad",), begins=begins,
        )  # fmt: skip


# models
def _tensors(file: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], object]:
    return lambda folder: save_file(change(load_file(folder / file)), folder / file)


def _filled(value: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        name = next(name for name, tensor in reversed(state.items()) if tensor.is_floating_point())
        return state | {name: torch.full_like(state[name], value)}

    return change


def _narrow(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t[: max(1, len(t) // 2)].contiguous() if t.ndim else t for name, t in state.items()}


def _half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for k, (name, tensor) in enumerate(state.items()) if k % 2}


def _foreign(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"other.{name}": tensor for name, tensor in state.items()}


def _shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _weights(file: str) -> dict[str, Callable[[Path], object]]:
    """What may befall a file of weights."""
    folder = str(Path(file).parent)
    return {
        f"{folder}: no weights": lambda at: (at / file).unlink(),
        f"{folder}: empty weights": lambda at: (at / file).write_bytes(b""),
        f"{folder}: cut weights": lambda at: _shorter(at / file),
        f"{folder}: garbage for weights": lambda at: (at / file).write_bytes(bytes(range(256)) * 4),
        f"{folder}: NaN": _tensors(file, _filled(torch.nan)),
        f"{folder}: infinite": _tensors(file, _filled(torch.inf)),
        f"{folder}: narrower": _tensors(file, _narrow),
        f"{folder}: half of the tensors": _tensors(file, _half),
        f"{folder}: other names": _tensors(file, _foreign),
    }


def _json(file: str, **values: Any) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | values))

    return write


def _jsons(file: str, title: str) -> dict[str, Callable[[Path], object]]:
    """What may befall a JSON file."""
    return {
        f"{title}: missing": lambda at: (at / file).unlink(),
        f"{title}: not JSON": lambda at: (at / file).write_text("{no JSON"),
        f"{title}: a list": lambda at: (at / file).write_text("[]"),
        f"{title}: deep": lambda at: (at / file).write_text(DEEP),
        f"{title}: binary": lambda at: (at / file).write_bytes(bytes(range(256))),
    }


def _replaced(content: str | None) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        shutil.rmtree(folder)
        if content is None:
            folder.mkdir()
        else:
            folder.write_text(content)

    return write


def models(denoiser: str) -> dict[str, Callable[[Path], object]]:
    """What may befall a pipeline's folder."""
    weights = f"{denoiser}/diffusion_pytorch_model.safetensors"

    def pickle_weights(folder: Path) -> None:
        (folder / weights).unlink()
        pickled(folder / denoiser / "diffusion_pytorch_model.bin")

    impossible = {"num_layers": -1, "block_out_channels": [0, 0], "attention_head_dim": 0}
    return {
        "missing": shutil.rmtree,
        "a file": _replaced("no folder"),
        "an empty folder": _replaced(None),
        **_jsons("model_index.json", "index"),
        "index: an unknown class": _json("model_index.json", _class_name="NoSuchPipeline"),
        "index: another pipeline": _json("model_index.json", _class_name="FluxPipeline"),
        "index: no class": _json("model_index.json", _class_name=None),
        "index: a part of nowhere": _json("model_index.json", **{denoiser: ["nowhere", "NoSuch"]}),
        "index: a part that is code": _json("model_index.json", **{denoiser: ["os", "system"]}),
        **_jsons(f"{denoiser}/config.json", "denoiser's config"),
        "denoiser's config: impossible": _json(f"{denoiser}/config.json", **impossible),
        "denoiser's config: words": _json(f"{denoiser}/config.json", sample_size="big", in_channels="four"),
        **_weights(weights),
        "denoiser: a pickle": pickle_weights,
        **_weights("vae/diffusion_pytorch_model.safetensors"),
        **_weights("text_encoder/model.safetensors"),
        **_jsons("scheduler/scheduler_config.json", "scheduler"),
        "scheduler: of nowhere": _json("model_index.json", scheduler=["diffusers", "NoSuchScheduler"]),
        "scheduler: no steps": _json("scheduler/scheduler_config.json", num_train_timesteps=0),
        "scheduler: steps a word": _json("scheduler/scheduler_config.json", num_train_timesteps="many"),
        "scheduler: NaN": _json("scheduler/scheduler_config.json", beta_start=float("nan"), shift=float("nan")),
        "no tokenizer": lambda at: shutil.rmtree(at / "tokenizer"),
        "tokenizer: not JSON": lambda at: (at / "tokenizer/tokenizer.json").write_text("{no JSON"),
    }


def model_folders() -> Iterator[Case]:
    for base in BY_CONFIG:
        kind, denoiser = ("flow", "transformer") if base == "compress" else ("epsilon", "unet")
        for member, spoil in models(denoiser).items():

            def words(
                place: Place, base: str = base, kind: str = kind, spoil: Callable[[Path], object] = spoil
            ) -> list[str]:
                spoil(place.copy(kind, "model"))
                return line(base, place, {"base" if base == "evaluate" else MODEL: str(place.folder / "model")})

            named = ("model", "Pipeline", "scheduler", "tokenizer")
            yield Case("models", member, base, words, named)


# LoRA
def _header(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / LORA_FILE).write_bytes(data + (folder / LORA_FILE).read_bytes()[len(data) :])


def _told(metadata: Mapping[str, str]) -> Callable[[Path], object]:
    return lambda folder: save_file(load_file(folder / LORA_FILE), folder / LORA_FILE, metadata)


def _only(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {name: tensor for name, tensor in state.items() if part in name}


def _lora_pickle(folder: Path) -> None:
    (folder / LORA_FILE).unlink()
    pickled(folder / "pytorch_lora_weights.bin")


def _odd_ranks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.cat([t, t]) if "lora_A" in n else t for n, t in state.items()}


def _wide(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.cat([t, t], 1).contiguous() if "lora_A" in n else t for n, t in state.items()}


def _dora(state: dict[str, Tensor]) -> dict[str, Tensor]:
    scales = {n.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(len(t)) for n, t in state.items()}
    return state | {name: tensor for name, tensor in scales.items() if "magnitude" in name}


LORAS: dict[str, Callable[[Path], object]] = {
    "missing": shutil.rmtree,
    "an empty folder": _replaced(None),
    "a folder of text": lambda at: (_replaced(None)(at), (at / "notes.txt").write_text("none")),
    "a text file": _replaced("no LoRA"),
    "a pickle": _lora_pickle,
    "empty": lambda at: (at / LORA_FILE).write_bytes(b""),
    "cut": lambda at: _shorter(at / LORA_FILE),
    "garbage": lambda at: (at / LORA_FILE).write_bytes(bytes(range(256)) * 4),
    "no tensors": _tensors(LORA_FILE, lambda state: {}),
    "NaN": _tensors(LORA_FILE, _filled(torch.nan)),
    "infinite": _tensors(LORA_FILE, _filled(torch.inf)),
    "other names": _tensors(LORA_FILE, _foreign),
    "A alone": _tensors(LORA_FILE, _only("lora_A")),
    "B alone": _tensors(LORA_FILE, _only("lora_B")),
    "ranks that do not fit": _tensors(LORA_FILE, _odd_ranks),
    "too wide": _tensors(LORA_FILE, _wide),
    "integers": _tensors(LORA_FILE, lambda state: {n: t.to(torch.int32) for n, t in state.items()}),
    "DoRA": _tensors(LORA_FILE, _dora),
    "a header of exabytes": _header(b"\xff" * 7 + b"\x0f"),
    "a header that is no JSON": _header((64).to_bytes(8, "little") + b"{no JSON" * 8),
    "settings that are no JSON": _told({"lora_adapter_metadata": "{no JSON"}),
    "settings that are a list": _told({"lora_adapter_metadata": "[1]"}),
    "settings that are deep": _told({"lora_adapter_metadata": "[" * 10_000}),
    "alpha NaN": _told({"lora_adapter_metadata": '{"unet.lora_alpha": NaN, "transformer.lora_alpha": NaN}'}),
    "of another model": lambda at: None,
}  # fmt: skip
LORA_KEYS = {
    "train": "initial_weights",
    "sample": "weights",
    "evaluate": "tuned",
    "rollout": "weights",
    "compress": "weights",
}


def lora_files() -> Iterator[Case]:
    for base, key in LORA_KEYS.items():
        kinds = ("flow", "epsilon") if base == "compress" else ("epsilon", "flow")
        for member, spoil in LORAS.items():

            def words(
                place: Place,
                base: str = base,
                key: str = key,
                kind: str = kinds[member == "of another model"],
                spoil: Callable[[Path], object] = spoil,
            ) -> list[str]:
                spoil(place.copy(f"{kind}-lora", "tuned"))
                return line(base, place, {key: str(place.folder / "tuned")})

            yield Case("LoRA files", member, base, words, ("tuned", LORA_FILE))


# checkpoints
def _state(**values: Any) -> Callable[[Path], object]:
    return _json("state.json", **values)


CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "missing": shutil.rmtree,
    "a file": _replaced("no folder"),
    "an empty folder": _replaced(None),
    **_jsons("state.json", "state"),
    "state: empty": lambda at: (at / "state.json").write_text(""),
    "state: cut": lambda at: _shorter(at / "state.json"),
    "step: a word": _state(step="four"),
    "step: negative": _state(step=-4),
    "step: a fraction": _state(step=1.5),
    "step: true": _state(step=True),
    "step: null": _state(step=None),
    "rollouts: a list": _state(rollouts=[4]),
    "evaluations: a list": _state(evaluations=[]),
    "objective: a list": _state(objective=[1]),
    "objective: of another": _state(objective={"value": 1.0}),
    "optimizer: empty": _state(optimizer={}),
    "optimizer: a list": _state(optimizer=[]),
    "scheduler: a word": _state(scheduler="cosine"),
    "settings: a word": _state(settings="mine"),
    **{member.replace(".: ", ""): spoil for member, spoil in _weights("trained.safetensors").items()},
    **{member.replace(".", "moments"): spoil for member, spoil in _weights("optimizer.safetensors").items()},
    "a pickled optimizer": lambda at: ((at / "optimizer.safetensors").unlink(), pickled(at / "optimizer.bin")),
    "a pickled scheduler": lambda at: (
        (at / "optimizer.safetensors").unlink(),
        torch.save({"state": {}, "param_groups": []}, at / "optimizer.bin"),
        pickled(at / "custom_checkpoint_0.pkl"),
    ),
}
OTHER_RUN: dict[str, Any] = {
    "seed": 1,
    "learning_rate": 1e-4,
    "lora.alpha": 8.0,
    "lora.rank": 4,
    "lora": None,
    "objective.init_args.beta": 5.0,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "mixed_precision": "bf16",
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "adam_beta1": 0.5,
    "ema_decay": 0.9,
    "max_grad_norm": 0.5,
    "data.init_args.limit": 4,
}


def of_run(place: Place, resume: str | None, changes: Mapping[str, Any]) -> list[str]:
    """The command line that goes on with a run, at its place in ``out``."""
    own = {"max_train_steps": 6, "checkpointing_steps": 2, "resume_from_checkpoint": resume}
    return line("train", place, own | changes)


def checkpoints() -> Iterator[Case]:
    for member, spoil in CHECKPOINTS.items():

        def words(place: Place, spoil: Callable[[Path], object] = spoil, resume: str = "checkpoint-4") -> list[str]:
            spoil(place.copy("run", "out") / "checkpoint-4")
            return of_run(place, resume, {})

        yield Case("checkpoints", member, "train", words, ("checkpoint-4",))
        if member not in ("missing",) and "names" not in member:
            latest = lambda place, words=words: words(place, resume="latest")  # noqa: E731
            # the one before it serves, where it can be told at once; else it is refused
            yield Case("checkpoints", f"{member}, latest", "train", latest, status=(0, 2), begins=True)
    for key, value in OTHER_RUN.items():

        def other(place: Place, key: str = key, value: Any = value) -> list[str]:
            place.copy("run", "out")
            return of_run(place, "latest", {key: value})

        named = (key.rpartition(".")[2], "rows of an update")
        yield Case("another run's checkpoint", f"{key}: {value}", "train", other, named)


# rewards
NAMES: dict[str, Any] = {
    "unknown": "NoSuch",
    "of an unknown module": "no.such.Module",
    "unknown in a module": "tests.helpers.NoSuch",
    "a module": "tests.helpers",
    "another class": "torch.nn.Linear",
    "a function": "json.dumps",
    "without score": f"{__name__}.Silent",
    "a wrong argument": {"name": "Shapes", "args": {"nope": 1}},
    "a missing argument": BAD,
    "that cannot be made": {"name": BAD, "args": {"how": "begin"}},
    "of a module that raises": "raises.Reward",
    "of a module with a slip": "slip.Reward",
    "of a module that exits": "exits.Reward",
}
WAYS = ("raise", "recurse", "memory", "exit", "nan", "infinite", "shape", "scalar", "list", "none", "text", "complex",
        "meta")  # fmt: skip
REWARD_KEYS = {"online": "rewards", "evaluate": "reward", "rollout": "rewards", "compress": "reward", "score": "reward",
               "agree": "reward"}  # fmt: skip


def rewards() -> Iterator[Case]:
    for base, key in REWARD_KEYS.items():
        behaviours = {f"in scoring: {way}": {"name": BAD, "args": {"how": way}} for way in WAYS}
        for member, reward in (NAMES | behaviours).items():

            def words(place: Place, base: str = base, key: str = key, reward: Any = reward) -> list[str]:
                (place.folder / "raises.py").write_text("raise RuntimeError('at import')\n")
                (place.folder / "slip.py").write_text("def reward(:\n")
                (place.folder / "exits.py").write_text("import sys\nsys.exit(0)\n")
                if base in ("score", "agree"):
                    return line(base, place, {key: reward if isinstance(reward, str) else json.dumps(reward)})
                more = {"measure": "drop", "blocks": None, "budget": {"parameters": 0.2}} if base == "compress" else {}
                return line(base, place, {key: [reward if isinstance(reward, dict) else {"name": reward}], **more})

            name = reward if isinstance(reward, str) else reward["name"]
            yield Case("rewards", member, base, words, (name, name.rpartition(".")[2]), begins=member in behaviours)


# places to write
def _there(base: str) -> str:
    return "output" if base in ("score", "agree") else "output_dir"


def folders() -> Iterator[Case]:
    def put(base: str, prepare: Callable[[Place], Path], changes: Mapping[str, Any] | None = None) -> Any:
        return lambda place: line(base, place, {_there(base): str(prepare(place)), **(changes or {})})

    def a_file(place: Place) -> Path:
        (place.folder / "taken").write_text("mine")
        return place.folder / "taken"

    def a_folder(place: Place) -> Path:
        (place.folder / "taken").mkdir()
        return place.folder / "taken"

    def closed(place: Place) -> Path:
        folder = a_folder(place)
        folder.chmod(0o555)
        return folder / "out.json"

    def copied(name: str) -> Callable[[Place], Path]:
        return lambda place: place.copy(name, "taken")

    for base in COMMANDS:
        taken = a_folder if base == "agree" else a_file
        yield Case("folders", "a file or folder in its place", base, put(base, taken), ("taken",))
        below = "out.json" if base == "agree" else "out"
        yield Case(
            "folders", "below a file", base, put(base, lambda place, below=below: a_file(place) / below), ("taken",)
        )
        yield Case("folders", "read-only", base, put(base, closed), ("taken",), environment={"PLAIN": "1"})
    for member, changes in {
        "LoRA": {},
        "all weights": {"lora": None},
        "LoRA, told to overwrite": {"overwrite_output_dir": True},
        "all weights, told to overwrite": {"lora": None, "overwrite_output_dir": True},
    }.items():
        base = "train"
        yield Case("folders", f"a pipeline's own: {member}", base, put(base, copied("epsilon"), changes), ("taken",))
    for name, changes in {"run": {}, "run, other settings": {"seed": 1}}.items():
        yield Case("folders", f"another {name}", "train", put("train", copied("run"), changes), ("taken",))
    yield Case("folders", "another model's run", "online", put("online", copied("run")), ("taken",))
    yield Case("folders", "pictures there already", "sample", put("sample", copied("pictures")), ("taken",))
    yield Case("folders", "a pipeline's own", "compress", put("compress", copied("flow")), ("taken",))
    for key, value in {"blocks": "0", "dtype": "bfloat16", "quantize.double_quant": True}.items():
        more = put("compress", copied("pruned"), {key: value})
        yield Case("folders", f"another {key}", "compress", more, ("taken", key))
    for key, value in {"seed": 1, "images_per_prompt": 3, "sampler.num_inference_steps": 3, "half": True}.items():
        yield Case("folders", f"another {key}", "rollout", put("rollout", copied("drawn"), {key: value}), ("taken",))
    for key, value in {"limit": 3, "shard_size": 2, "reward": "tests.helpers.Flat"}.items():
        yield Case("folders", f"another {key}", "score", put("score", copied("scores"), {key: value}), ("taken",))
    inputs = {
        "train": (MODEL, "epsilon"), "sample": (MODEL, "epsilon"), "evaluate": ("tuned", "epsilon-lora"),
        "rollout": ("prompts", "prompts.txt"), "compress": ("prompts", "prompts.txt"),
        "score": ("source", "pictures"), "agree": ("pairs", "pairs.parquet"),
    }  # fmt: skip
    for base, (key, name) in inputs.items():

        def unreadable(place: Place, base: str = base, key: str = key, name: str = name) -> list[str]:
            place.copy(name, f"closed{Path(name).suffix}").chmod(0)
            return line(base, place, {key: str(place.folder / f"closed{Path(name).suffix}")})

        yield Case("folders", f"an unreadable {key}", base, unreadable, ("closed",), environment={"PLAIN": "1"})


# accidents
def accidents() -> Iterator[Case]:
    for base in COMMANDS:
        for size in (0, 1000, 10_000):
            environment, status = {"FILE_SIZE": str(size)}, (0, 2) if size else (2,)  # some write less
            member = f"no file beyond {size} bytes"
            yield Case("accidents", member, base, with_changes(base, {}), (), status, True, environment)
        pipe = {"PIPE": "1"}
        yield Case("accidents", "nobody reads its stdout", base, with_changes(base, {}), (), (0, 1, 2, 141), True, pipe)
    for base, name in (("train", "WORLD_SIZE"), ("score", "WORLD_SIZE"), ("score", "RANK")):
        member, status = f"{name} a word", (0, 2) if base == "train" else (2,)  # accelerate reads none of it alone
        yield Case("accidents", member, base, with_changes(base, {}), (name,), status, True, {name: "many"})
    for name, value in {
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_MIXED_PRECISION": "fp8",
    }.items():
        environment = {name: value}
        yield Case("accidents", f"{name}={value}", "train", with_changes("train", {}), environment=environment)


KINDS: Sequence[Callable[[], Iterator[Case]]] = (
    config_files, wrong_keys, wrong_values, classes, pairs, prompt_files, sources, model_folders, lora_files,
    checkpoints, rewards, folders, accidents,
)  # fmt: skip
