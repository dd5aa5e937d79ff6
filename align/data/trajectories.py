"""Trajectories on disk: the folder that ``align.rollout`` writes, and pairs of them as a model trains on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from align.common.errors import DataError, UserError
from align.common.provenance import provenance
from align.common.renames import upgrade
from align.common.resolution import Resolution, sides
from align.data.mapped_files import MappedFiles
from align.data.prompts import PromptSet
from align.families import Family
from align.sampling.sampler import Sampler
from align.sampling.trajectory import Trajectories
from rewards.common.files import claim, sweep, write_text


@dataclass(frozen=True)
class RolloutRecord:
    """``rollout.json``: what the images depend on and how they are stored. ``digest`` is of the weights that drew,
    ``contents`` of every part of the pipeline and of rewards' files, which folders of earlier versions do not tell."""

    model: str
    weights: str | None
    digest: str
    mixed_precision: str
    seed: int
    sampler: dict[str, Any]
    shared_noise: bool
    resolution: Resolution
    latent_shape: list[int]
    prompts: int
    prompts_digest: str
    images_per_prompt: int
    prompts_per_shard: int
    images: int
    shards: int
    half: bool
    rewards: list[dict[str, Any]]
    contents: dict[str, str] = field(default_factory=dict)

    @property
    def kept_steps(self) -> int:
        """Steps of each trajectory that are kept: all, or those that have noise."""
        return int(self.sampler.get("kept_steps", self.sampler["num_inference_steps"]))

    def prompts_of(self, shard: int) -> range:
        """The numbers of the prompts in a shard; the last shard may have fewer."""
        first = shard * self.prompts_per_shard
        return range(first, min(first + self.prompts_per_shard, self.prompts))


@dataclass(frozen=True)
class ManifestLine:
    """A line of the manifest: the image's file, its trajectory's name, and the shard and row where that lies."""

    image: str
    trajectory: str
    prompt: str
    prompt_index: int
    shard: int
    row: int
    scores: dict[str, float]


def describe(sampler: Sampler, family: Family) -> dict[str, Any]:
    """Steps, guidance and kernel as they apply to ``family``: plain values, the kernel as a config would name it."""
    kernel = sampler.kernel_of(family)
    description: dict[str, Any] = {
        "num_inference_steps": sampler.num_inference_steps,
        "guidance_scale": sampler.guidance_scale_of(family),
        "kernel": {
            "class_path": f"{type(kernel).__module__}.{type(kernel).__qualname__}",
            "init_args": kernel.settings(),
        },
    }
    total = sampler.num_inference_steps
    if (kept := len(sampler.with_noise(family, range(total)))) < total:  # the others have no log-density to keep
        description["kept_steps"] = kept
    return dict(json.loads(json.dumps(description, default=repr)))


class RolloutFolder:
    """What :func:`rollout` wrote, or is about to write, to ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record_file, self.manifest = path / "rollout.json", path / "manifest.jsonl"

    def record(self) -> RolloutRecord:
        """Raises :class:`DataError` where there is none, or one that cannot be read."""
        if not self.record_file.is_file():
            raise DataError(f"no {self.record_file}; expected a folder that python -m align.rollout made")
        try:
            saved = json.loads(self.record_file.read_text(encoding="utf-8"))
            return RolloutRecord(**upgrade({name: value for name, value in saved.items() if name != "made_with"}))
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{self.record_file} is not as align.rollout wrote it ({error}); draw anew") from error

    def start(self, record: RolloutRecord) -> None:
        """Open the folder for writing; :class:`UserError` where it holds the rollout of other settings."""
        if self.record_file.is_file():
            there, here = asdict(self.record()), asdict(record)
            for each in (there, here):
                each |= {f"contents of {part}": digest for part, digest in each.pop("contents").items()}
            shared = [name for name in here if name in there]
            other = [f"{name} {there[name]!r}, now {here[name]!r}" for name in shared if there[name] != here[name]]
            if other:
                raise UserError(
                    f"{self.path} holds a rollout with other settings ({'; '.join(other)}); give another output_dir, "
                    "or delete that folder"
                )
            sweep(self.path)
            return
        claim(self.path)
        whole = asdict(record) | {"made_with": provenance()}
        write_text(self.record_file, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")

    def manifest_lines(self) -> list[ManifestLine]:
        """The manifest's lines; none yet where a rollout has only begun. Raises :class:`DataError`."""
        if not self.manifest.is_file():
            return []
        lines = []
        for number, text in enumerate(self.manifest.read_text(encoding="utf-8").strip().split("\n"), 1):
            try:
                lines.append(ManifestLine(**json.loads(text)))
            except (ValueError, TypeError) as error:
                raise DataError(f"{self.manifest}:{number} is not as align.rollout wrote it ({error})") from error
        return lines

    def shard(self, number: int) -> Path:
        return self.path / f"trajectories-{number:05d}.safetensors"

    def fault(self, record: RolloutRecord, number: int) -> str | None:
        """What is wrong with a shard, by its header; None where nothing is."""
        file, steps = self.shard(number), record.kept_steps
        if not file.is_file():
            return f"{file} is missing"
        try:
            with safe_open(file, framework="pt") as opened:
                shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in ("latents", "log_probs")}
        except (SafetensorError, OSError) as error:
            return f"{file} is damaged ({error})"
        rows = len(record.prompts_of(number)) * record.images_per_prompt
        expected = {"latents": (rows, steps + 1, *record.latent_shape), "log_probs": (rows, steps)}
        return f"{file} holds {shapes}, but {self.record_file.name} says {expected}" if shapes != expected else None

    def finished(self, record: RolloutRecord) -> dict[int, list[ManifestLine]]:
        """The manifest lines of the shards of which every file is there."""
        shards: dict[int, list[ManifestLine]] = {}
        for line in self.manifest_lines():
            shards.setdefault(line.shard, []).append(line)
        whole = {shard: all((self.path / line.image).is_file() for line in lines) for shard, lines in shards.items()}
        return {shard: lines for shard, lines in shards.items() if whole[shard] and not self.fault(record, shard)}

    def read(self) -> Rollout:
        """A finished rollout, its files' headers checked; raises :class:`DataError` where it is not whole."""
        record, lines = self.record(), self.manifest_lines()
        again = "run align.rollout with its settings again to draw what is missing"
        if len(lines) != record.images:
            raise DataError(
                f"{self.manifest} lists {len(lines)} images, but {record.prompts} prompts x "
                f"{record.images_per_prompt} make {record.images}; {again}"
            )
        for number, line in enumerate(lines):
            prompt, _ = divmod(number, record.images_per_prompt)
            shard, row = divmod(number, record.prompts_per_shard * record.images_per_prompt)
            if (line.prompt_index, line.shard, line.row) != (prompt, shard, row):
                raise DataError(
                    f"{self.manifest}:{number + 1} is of prompt {line.prompt_index}, shard {line.shard}, row "
                    f"{line.row}, but image {number} is of {(prompt, shard, row)}; keep the lines in their order, or "
                    "draw anew"
                )
        for fault in (self.fault(record, number) for number in range(record.shards)):
            if fault:
                raise DataError(f"{fault}; {again}")
        return Rollout(self, record, lines)


@dataclass(frozen=True)
class Rollout:
    """A rollout as it lies in ``folder``: what it depends on, and its manifest."""

    folder: RolloutFolder
    record: RolloutRecord
    lines: list[ManifestLine]


@dataclass(frozen=True)
class TrajectoryBatch:
    """P pairs of stored trajectories.

    Attributes:
        trajectories: M of them, each once, with all of their steps.
        pairs: (P, 2) their rows there, winner first.
        names: of the M trajectories, unlike any other folder's.
        ids: of the pairs.
        rollout: that they are of.
    """

    trajectories: Trajectories
    pairs: Tensor
    names: list[str]
    ids: list[int]
    rollout: Rollout

    def require(self, sampler: Sampler, family: Family) -> None:
        """Raise :class:`UserError` unless ``sampler`` on ``family`` is what drew these trajectories: the same steps,
        guidance and kernel, on latents of the same shape."""
        record, folder = self.rollout.record, self.rollout.folder.path
        ours, theirs = describe(sampler, family), record.sampler
        wrong = [name for name in theirs if ours.get(name) != theirs[name]]
        if wrong:
            differ = ", ".join(f"{name} {ours.get(name)}" for name in wrong)
            expected = ", ".join(f"{name}: {theirs[name]}" for name in wrong)
            raise UserError(
                f"objective.sampler has {differ}, but the trajectories in {folder} were drawn otherwise; set in "
                f"objective.sampler {expected}"
            )
        shape, stored = list(family.latent_shape(*sides(record.resolution))), record.latent_shape
        if shape != stored:
            raise UserError(
                f"{family.source} has latents of shape {shape}, but the trajectories in {folder} have {stored}; "
                f"set pretrained_model_name_or_path: {record.model}, which drew them"
            )


class TrajectoryPairs:
    """Pairs whose trajectories are read, and whose prompts are encoded, when first asked for."""

    def __init__(self, rollout: Rollout, pairs: Sequence[tuple[int, int]], family: Family) -> None:
        self.rollout, self.pairs, self.family = rollout, pairs, family
        self._prompts = PromptSet(family, [], remember=rollout.record.prompts)
        self._tensors = MappedFiles()

    @property
    def fingerprint(self) -> str:
        named = [self.rollout.record.digest, [[self.rollout.lines[n].trajectory for n in pair] for pair in self.pairs]]
        return f"{len(self)} pairs {hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, indices: Sequence[int], variants: Sequence[int] | None = None) -> TrajectoryBatch:
        """The pairs at ``indices`` with the trajectories that they need, in float32, on the CPU; conditions on the
        family's device. Half-precision states come back as the numbers that were rounded to."""
        chosen = torch.tensor([self.pairs[index] for index in indices])
        needed, pairs = torch.unique(chosen, return_inverse=True)
        folder, lines = self.rollout.folder, [self.rollout.lines[number] for number in needed.tolist()]
        prompts = list(dict.fromkeys(line.prompt for line in lines))

        def stored(name: str) -> Tensor:
            return torch.stack([self._tensors[folder.shard(line.shard)][name][line.row] for line in lines]).float()

        trajectories = Trajectories(
            latents=stored("latents"),
            kept_steps=torch.arange(self.rollout.record.kept_steps),
            prompt_index=torch.tensor([prompts.index(line.prompt) for line in lines]),
            cond=self._prompts.encode(prompts).to(self.family.device),
            log_probs=stored("log_probs"),
        )
        names = [f"{folder.path}/{line.trajectory}" for line in lines]
        return TrajectoryBatch(trajectories, pairs, names, list(indices), self.rollout)
