"""A run folder: resolved config, versions, metrics, checkpoints that are whole or absent, weights, model card."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from align.common.errors import UserError
from align.common.provenance import provenance
from align.common.settings_file import read_settings
from align.evaluation.curves import parsed
from align.families import LORA_FILE
from align.policy.initial_noise import NOISE_FILE
from align.training import checkpoint
from align.training.model_card import run_card
from rewards.common.files import atomic, claim, discard, sweep, write_text

if TYPE_CHECKING:
    from align.policy.policy import Policy
    from align.training.checkpoint import Parts
    from align.training.config import TrainConfig

RECORD = "run.json"
WRITTEN = ("config.yaml", "metrics.jsonl", "README.md", "samples")  # beside it and the weights


class RunFolder:
    """``config.yaml``, ``run.json``, ``metrics.jsonl``, ``checkpoint-N/``, ``samples/``, weights, ``README.md``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def claim(self, resumed: bool, overwrite: bool, denoiser: str) -> None:
        """Make the folder. Raises :class:`UserError` where it cannot be written, or where a run that is not resumed
        would replace the weights or checkpoints of another, unless ``overwrite``."""
        claim(self.path)
        foreign = [name for name in WRITTEN if (self.path / name).exists() and not (self.path / RECORD).exists()]
        if foreign and not resumed and not overwrite:
            raise UserError(
                f"{self.path} holds {foreign[0]}, and no run has written it; give another output_dir, or let it be "
                "replaced by overwrite_output_dir: true"
            )
        names = (LORA_FILE, NOISE_FILE, denoiser)
        left = [path for path in (*self.checkpoints(), *(self.path / name for name in names)) if path.exists()]
        if left and not resumed:
            if not overwrite:
                raise UserError(
                    f"{self.path} holds {left[0].name} of an earlier run; give another output_dir, go on with it by "
                    "resume_from_checkpoint: latest, or replace it by overwrite_output_dir: true"
                )
            for path in left:
                discard(path)

    def require_same(self, source: Path | None, settings: dict[str, Any]) -> None:
        """Raise :class:`UserError` where the run of the checkpoint ``source`` had other settings that matter."""
        before = checkpoint.read(source).get("settings") if source is not None else None
        if isinstance(before, dict) and (lines := checkpoint.differences(before, settings)):
            raise UserError(
                f"{source} is of a run with other settings: {'; '.join(lines)}. Set them back, or start a run of its "
                "own from these weights: initial_weights"
            )

    def start(self, resolved: str, step: int | None) -> None:
        """The first files of a run; one that is not resumed, at ``step``, clears the metrics."""
        sweep(self.path)
        if step is None:
            (self.path / "metrics.jsonl").unlink(missing_ok=True)
        else:
            self._forget_after(step)
        write_text(self.path / RECORD, json.dumps(provenance(), indent=2) + "\n")  # first: the rest is a run's then
        write_text(self.path / "config.yaml", resolved)

    def log(self, line: dict[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _forget_after(self, step: int) -> None:
        """Drop the metrics of steps that a resumed run will take again, and what is no line of metrics, such as one cut
        short by a kill."""
        path = self.path / "metrics.jsonl"
        kept = []
        for text in path.read_text(errors="replace").split("\n") if path.exists() else []:
            entry = parsed(text)
            if entry is not None and entry["step"] <= step:
                kept.append(text)
        write_text(path, "".join(line + "\n" for line in kept))

    def grid(self, step: int) -> Path:
        """The file of the sample grid at ``step``."""
        return self.path / f"samples/step-{step:06d}.png"

    # checkpoints
    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = [p for p in self.path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
        return sorted(found, key=lambda p: int(p.name.partition("-")[2]))

    def latest(self) -> Path | None:
        return self.checkpoints()[-1] if self.checkpoints() else None

    def find(self, wanted: str | None) -> Path | None:
        """The checkpoint to resume from: a folder, which must be a whole one, or ``latest``, the newest that is whole
        (None where there is none yet). Raises :class:`UserError`."""
        if wanted is None:
            return None
        if wanted == "latest":
            for path in reversed(self.checkpoints()):
                try:
                    checkpoint.check(path)
                    return path
                except UserError as error:
                    print(f"warning: {error}; going back to the one before", file=sys.stderr)
            return None
        places = (Path(wanted), self.path / wanted)
        for path in places:
            if path.is_dir() and (path / checkpoint.STATE).exists():
                checkpoint.check(path)
                return path
        raise UserError(
            f"resume_from_checkpoint: {wanted!r} is not a checkpoint folder; use 'latest' or one of "
            f"{[path.name for path in self.checkpoints()]} in {self.path}"
        )

    def checkpoint(self, parts: Parts, state: dict[str, Any], limit: int | None, writes: bool = True) -> None:
        """Save what :func:`align.training.checkpoint.load` reads, whole or not at all, and keep the newest ``limit``
        checkpoints, and the last good one of a stop rule; a process that does not write (``writes``) helps to gather
        shared weights. Raises :class:`UserError` where the disk takes no more."""
        final, last = self.path / f"checkpoint-{state['step']}", self.latest()
        if not writes:
            checkpoint.write(final, parts, state, writes=False)
            return
        try:
            with atomic(final) as draft:
                draft.mkdir()
                checkpoint.write(draft, parts, state)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write {final}: {error}; last good checkpoint: {last or 'none'}") from error
        for old in self.checkpoints()[: -limit if limit else 0]:
            if old.name != f"checkpoint-{state['stop']['good']}":
                discard(old)

    # what the run leaves
    def card(self, config: TrainConfig, policy: Policy, plan: str, steps: int, held_out: dict[str, float]) -> None:
        """Write the model card, see :func:`align.training.model_card.run_card`."""
        grids = {"before": self.grid(0), f"after {steps} steps": self.grid(steps)} if config.samples.prompts else {}
        samples = {when: path.relative_to(self.path).as_posix() for when, path in grids.items() if path.is_file()}
        card = run_card(config, policy, _resolved(self.path), plan, steps, held_out, samples)
        write_text(self.path / "README.md", card.text())


def _resolved(folder: Path) -> dict[str, Any]:
    return read_settings(folder / "config.yaml")


def base_of(folder: Path) -> str:
    """The model that the run in ``folder`` started from. Raises :class:`UserError`."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run folder (no config.yaml); say which model to compare with: --base MODEL")
    base = _resolved(folder).get("pretrained_model_name_or_path")
    if not isinstance(base, str):
        raise UserError(f"{folder}/config.yaml does not say which model its run started from; say it: --base MODEL")
    return base


def packed_base(folder: Path) -> str | None:
    """In what the base of the run in ``folder`` was packed while it trained; None where it was not, or is no run."""
    return _resolved(folder).get("quantize") if (folder / "config.yaml").is_file() else None
