"""What lies in the folder of :mod:`pruning.compress`, and which settings made it.

``stages.json`` keeps, for every result, the settings and the contents of the files that it depends on, those of earlier
stages among them. It is written before the result appears, so that one which is there, or half of which a killed run
left, was surely made by what stands in it. A result that other settings made is refused, or made anew where the user
asks for it (``overwrite``), and so is all that follows from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from align.common.assets import locate
from align.common.errors import UserError
from align.families import lora_path
from rewards.common.files import discard, write_text

if TYPE_CHECKING:
    from pruning.settings import Compress, Stage

Recipe = dict[str, Any]
RECORD = "stages.json"
FILES: dict[str, tuple[str, ...]] = {  # of each result, in the order in which they are made
    "merged": ("merged",),
    "profile": ("profile.json", "profile.png"),
    "plan": ("plan.json", "plan.png"),
    "pruned": ("pruned",),
    "healed": ("healed", "heal"),  # the run that heals goes with what it healed
    "int4": ("int4",),
    "int4-alone": ("int4-alone",),
    "int4-tuned": ("int4-tuned", "tune"),
}
REPORT = ("report.json", "report.md", "gallery.png", "gallery.html")  # always made anew
MAKES: dict[Stage, tuple[str, ...]] = {
    "analyze": ("profile",), "plan": ("plan",), "remove": ("pruned",), "heal": ("healed",),
    "quantize": ("int4", "int4-alone"), "tune": ("int4-tuned",), "report": (),
}  # fmt: skip
# of a run that heals: what this command fills in, and what changes no weight
_NOT_HEALING = (
    "pretrained_model_name_or_path", "output_dir", "resume_from_checkpoint", "objective.init_args.plan_path",
    "objective.init_args.teacher.init_args.path", "objective.init_args.profile", "data.init_args.cache_dir",
    "data.init_args.vae_batch", "validation_data", "validation_steps", "samples", "logging_steps", "report_to",
    "dry_run", "push_to_hub", "hub_model_id", "hub_private", "checkpointing_steps", "checkpoints_total_limit",
    "diversity_features",
)  # fmt: skip


def recipes(config: Compress, prompts: Sequence[str]) -> dict[str, Recipe]:
    """What each result that ``config`` asks for depends on, flat: the name of a setting to its value, or to the digest
    of the file that it names."""
    lora = config.weights and lora_path(config.weights)
    source: Recipe = {
        "pretrained_model_name_or_path": contents(config.pretrained_model_name_or_path),
        "weights": contents(str(lora)) if lora else None,
    } | ({"dtype": config.dtype} if lora else {})
    profile = source | {
        "prompts": _digest(json.dumps(list(prompts)).encode()),
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "seed": config.seed,
        "reward": [reward.record() for reward in config.reward],
        "files of rewards": {reward.title: reward.files() for reward in config.reward},
    }
    plan = source | {"blocks": config.blocks and config.blocks.replace(" ", "")}
    if config.budget is not None:
        budget = {f"budget.{name}": value for name, value in asdict(config.budget).items()}
        plan = profile | plan | budget
        plan |= {name: getattr(config, name) for name in ("measure", "components", "position_weighting")}
    runs = {run: {run: "set"} | _healing(config, run) for run in config.healing()}
    measured = profile if config.heals_by_profile() else {}
    healed = plan | measured | {"dtype": config.dtype} | runs.get("heal", {"heal": None})
    quantize = {f"quantize.{name}": value for name, value in asdict(config.quantize).items()}
    quantize |= {"text_encoders": config.text_encoders, "dtype": config.dtype}
    made = {"profile": profile, "plan": plan, "pruned": plan | {"dtype": config.dtype}, "int4": healed | quantize}
    made |= {"int4-alone": source | quantize}
    made |= {"merged": source} if lora else {}
    made |= {"healed": healed} if "heal" in runs else {}
    made |= {"int4-tuned": healed | quantize | runs["tune"]} if "tune" in runs else {}
    return {name: json.loads(json.dumps(made[name])) for name in FILES if name in made}


def _healing(config: Compress, run: str) -> Recipe:
    """The settings of a run that heals, without those that do not matter to its weights."""
    flat = dict(_flat(yaml.safe_load(config.run(run)[1])))
    matters = {k: v for k, v in flat.items() if not any(k == n or k.startswith(f"{n}.") for n in _NOT_HEALING)}
    for name, value in matters.items():
        if name.rpartition(".")[2] in ("path", "weights", "initial_weights") and isinstance(value, str):
            matters[name] = contents(value)
    return {f"{run}.{name}": value for name, value in matters.items()}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def contents(source: str) -> str:
    """A digest of the file or folder that ``source`` names, wherever it lies; of a model of the hub its name and
    commit; any other text as it is. Of a file it takes the size and 64 pieces, evenly spaced, so that a model of many
    gigabytes takes no time; training changes every weight."""
    path = Path(locate(source))
    if path.is_file():
        return _digest(_pieces(path))
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix != ".md")  # cards grow
        read = (".safetensors", ".json", ".jsonl", ".txt", ".csv", ".parquet", ".model")  # pictures: name and size
        said = [
            f"{file.relative_to(path)} {_digest(_pieces(file)) if file.suffix in read else file.stat().st_size}"
            for file in files
        ]
        return _digest("\n".join(said).encode())
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        index = try_to_load_from_cache(source, "model_index.json")
    except HFValidationError:
        index = None
    return f"{source} at {Path(index).parent.name}" if isinstance(index, str) else source


def _pieces(path: Path) -> bytes:
    size, piece, count = path.stat().st_size, 1 << 14, 64
    with path.open("rb") as file:
        if size <= piece * count:
            return file.read()
        found = [str(size).encode()]
        for k in range(count):
            file.seek((size - piece) * k // (count - 1))
            found.append(file.read(piece))
        return b"".join(found)


def _digest(data: bytes) -> str:
    return "sha256 " + hashlib.sha256(data).hexdigest()


def _as_now(recipe: Recipe) -> Recipe:
    """What an earlier version wrote, which told of a reward how long it may take."""
    rewards = recipe.get("reward")
    if not (isinstance(rewards, list) and all(isinstance(reward, dict) for reward in rewards)):
        return recipe
    return {**recipe, "reward": [{k: v for k, v in reward.items() if k != "timeout"} for reward in rewards]}


def _difference(name: str, before: Any, now: Any) -> str:
    if any(isinstance(value, str) and value.startswith("sha256 ") for value in (before, now)):
        return f"{name} had other contents"
    return f"{name} was {json.dumps(before)}, is {json.dumps(now)}"


class Results:
    """The results in ``folder``, held against ``wanted``, the recipes of what the settings ask for; ``settings`` are
    those as YAML, kept as ``config.yaml`` beside what they made."""

    def __init__(self, folder: Path, wanted: Mapping[str, Recipe], settings: str = "") -> None:
        self.folder, self.wanted, self.settings = folder, wanted, settings
        self.made: dict[str, Recipe] = {}
        if (path := folder / RECORD).is_file():
            try:
                self.made = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise UserError(
                    f"cannot read {path} ({error}); remove it and set overwrite_output_dir: true"
                ) from error
            if not isinstance(self.made, dict) or not all(isinstance(recipe, dict) for recipe in self.made.values()):
                raise UserError(f"{path} is no record of stages; remove it and set overwrite_output_dir: true")

    def path(self, name: str) -> Path:
        """The file or folder that a result is."""
        return self.folder / FILES[name][0]

    def whole(self, name: str) -> bool:
        return self.path(name).exists()

    def stale(self) -> dict[str, list[str]]:
        """The results that other settings made, with what differs, in words, beyond what differs in earlier ones."""
        stale: dict[str, list[str]] = {}
        said: set[str] = set()
        for name, recipe in self.wanted.items():
            if not any((self.folder / file).exists() for file in FILES[name]):
                continue
            if name not in self.made:
                if name != "profile":  # which says itself what it was measured on
                    stale[name] = ["settings unknown"]
                continue
            before = _as_now(self.made[name])
            differ = [key for key in recipe if key in before and before[key] != recipe[key]]
            if differ:
                new = [key for key in differ if key not in said]
                stale[name] = [_difference(key, before[key], recipe[key]) for key in new]
                said |= set(new)
        return stale

    def require_fresh(self, overwrite: bool) -> list[str]:
        """The names of the results that have to go. Raises :class:`UserError` where there are some and ``overwrite``
        does not allow it."""
        stale = self.stale()
        if not stale or overwrite:
            return list(stale)
        told = []
        for name, differences in stale.items():
            more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
            told.append(f"{name} ({', '.join(differences[:5])}{more})" if differences else f"{name}, which follows")
        raise UserError(
            f"{self.folder} holds results of other settings: {'; '.join(told)}; name another output_dir, or set "
            "overwrite_output_dir: true to make these anew"
        )

    def discard(self, names: Sequence[str]) -> None:
        """Take away these results, and the report of them."""
        for name in names:
            for file in FILES[name]:
                discard(self.folder / file)
        for file in REPORT if names else ():
            discard(self.folder / file)

    def begin(self, name: str) -> None:
        """Keep what ``name`` is about to be made of."""
        self.made = self.made | {name: self.wanted[name]}
        write_text(self.folder / RECORD, json.dumps(self.made, indent=2) + "\n")
        self.keep_settings()

    def keep_settings(self) -> None:
        if self.settings:
            write_text(self.folder / "config.yaml", self.settings)
