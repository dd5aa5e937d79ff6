"""A run folder: resolved config, versions, metrics, checkpoints that are whole or absent, weights, model card."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.common.errors import UserError
from align.common.provenance import provenance
from align.training.checkpoint import MEMORY, STATE
from align.training.model_card import run_card
from rewards.common.files import atomic, claim, discard, sweep, write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

    from align.policy.policy import Policy
    from align.training.config import TrainConfig


class RunFolder:
    """``config.yaml``, ``run.json``, ``metrics.jsonl``, ``checkpoint-N/``, ``samples/``, weights, ``README.md``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def claim(self, resumed: bool) -> None:
        """Make the folder. Raises :class:`UserError` where it cannot be written, or holds the checkpoints of another
        run than the one that is resumed."""
        if not resumed and self.checkpoints():
            raise UserError(
                f"{self.path} holds checkpoints of an earlier run; give another output_dir, delete it, or "
                "set resume_from_checkpoint: latest"
            )
        claim(self.path)

    def start(self, resolved: str, resumed: bool) -> None:
        """The first files of a run; one that is not resumed clears the metrics."""
        sweep(self.path)
        if not resumed:
            (self.path / "metrics.jsonl").unlink(missing_ok=True)
        write_text(self.path / "config.yaml", resolved)
        write_text(self.path / "run.json", json.dumps(provenance(), indent=2) + "\n")

    def log(self, line: dict[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps that a resumed run will take again, and a line cut short by a kill."""
        path = self.path / "metrics.jsonl"
        kept = []
        for text in path.read_text().splitlines() if path.exists() else []:
            try:
                entry = json.loads(text)
            except json.JSONDecodeError:
                continue
            if entry["step"] <= step:
                kept.append(text)
        write_text(path, "".join(line + "\n" for line in kept))

    # checkpoints
    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = [p for p in self.path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
        return sorted(found, key=lambda p: int(p.name.partition("-")[2]))

    def latest(self) -> Path | None:
        return self.checkpoints()[-1] if self.checkpoints() else None

    def find(self, wanted: str | None) -> Path | None:
        """The checkpoint to resume from: ``latest`` (None where there is none yet) or a folder, which must be one."""
        if wanted is None:
            return None
        if wanted == "latest":
            return self.latest()
        for path in (Path(wanted), self.path / wanted):
            if (path / STATE).is_file():
                return path
        raise UserError(
            f"resume_from_checkpoint: {wanted!r} is not a checkpoint folder; use 'latest' or one of "
            f"{[path.name for path in self.checkpoints()]} in {self.path}"
        )

    def checkpoint(self, accelerator: Accelerator, state: dict[str, Any], limit: int | None) -> None:
        """Save what :meth:`restore` reads, whole or not at all, and keep the newest ``limit`` checkpoints."""
        from accelerate.utils import broadcast_object_list

        main, final = accelerator.is_main_process, self.path / f"checkpoint-{state['step']}"
        with atomic(final) if main else nullcontext(final) as draft:
            if main:
                draft.mkdir()
            folder = broadcast_object_list([str(draft)])[0]  # the name bears the main process's number
            accelerator.save_state(folder)
            accelerator.wait_for_everyone()
            if main:
                memory = {k: v.contiguous() for k, v in state["objective"].items() if isinstance(v, Tensor)}
                if memory:
                    save_file(memory, draft / MEMORY)
                small = {k: v for k, v in state["objective"].items() if k not in memory}
                write_text(draft / STATE, json.dumps(state | {"objective": small}))
        if main:
            for old in self.checkpoints()[: -limit if limit else 0]:
                discard(old)
        accelerator.wait_for_everyone()

    def restore(self, accelerator: Accelerator, source: Path) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((source / STATE).read_text())
        if (source / MEMORY).is_file():
            state["objective"] |= load_file(source / MEMORY)
        accelerator.load_state(str(source))
        return state

    # what the run leaves
    def card(self, config: TrainConfig, policy: Policy, plan: str, steps: int, held_out: dict[str, float]) -> None:
        """Write the model card, see :func:`align.training.model_card.run_card`."""
        card = run_card(config, policy, _resolved(self.path), plan, steps, held_out)
        write_text(self.path / "README.md", card.text())


def _resolved(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}


def base_of(folder: Path) -> str:
    """The model that the run in ``folder`` started from. Raises :class:`UserError`."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run folder (no config.yaml); say which model to compare with: --base MODEL")
    return str(_resolved(folder)["pretrained_model_name_or_path"])
