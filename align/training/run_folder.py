"""A run folder: resolved config, versions, metrics, checkpoints that are whole or absent, weights, model card."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from accelerate import Accelerator
from huggingface_hub import ModelCardData
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.common.errors import UserError
from align.common.provenance import provenance
from align.policy.policy import Policy
from align.training.checkpoint import MEMORY, STATE
from rewards.common.files import claim, write_text

if TYPE_CHECKING:
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
        for leftover in self.path.glob("checkpoint-*.tmp"):
            shutil.rmtree(leftover)
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
        """Save under a temporary name and rename, so that a kill at any moment leaves whole checkpoints only."""
        final = self.path / f"checkpoint-{state['step']}"
        temporary = final.with_name(final.name + ".tmp")
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            memory = {k: v.contiguous() for k, v in state["objective"].items() if isinstance(v, Tensor)}
            if memory:
                save_file(memory, temporary / MEMORY)
            small = {k: v for k, v in state["objective"].items() if k not in memory}
            write_text(temporary / STATE, json.dumps(state | {"objective": small}))
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
            for old in self.checkpoints()[: -limit if limit else 0]:
                doomed = old.with_name(old.name + ".tmp")  # a kill while deleting must not leave half a checkpoint
                os.replace(old, doomed)
                shutil.rmtree(doomed)
        accelerator.wait_for_everyone()

    def restore(self, accelerator: Accelerator, source: Path) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((source / STATE).read_text())
        if (source / MEMORY).is_file():
            state["objective"] |= load_file(source / MEMORY)
        accelerator.load_state(str(source))
        return state

    # what the run leaves
    def card(self, config: TrainConfig, policy: Policy, plan: str, steps: int, held_out: dict[str, float]) -> None:
        """A model card: objective and its numbers, data, base model, seed, held-out scores, load snippet."""
        family, objective = policy.family, type(config.objective).__name__
        pipeline = type(family.pipe).__name__
        base = config.pretrained_model_name_or_path
        kind = "LoRA" if policy.lora else f"`{family.denoiser_name}`"
        start = f'pipe = {pipeline}.from_pretrained("{base}"'
        if policy.trained is not None:
            kind, load = "initial noise", policy.trained.card(pipeline)
        elif policy.lora:
            load = f'from diffusers import {pipeline}\n\n{start})\npipe.load_lora_weights("{self.path.name}")'
        else:
            denoiser, name = type(family.denoiser).__name__, family.denoiser_name
            load = (
                f"from diffusers import {denoiser}, {pipeline}\n\n"
                f'{name} = {denoiser}.from_pretrained("{self.path.name}", subfolder="{name}")\n{start}, {name}={name})'
            )
        scores = "\n".join(f"| {name} | {value:.4f} |" for name, value in held_out.items())
        table = f"\n## Held-out data, after training\n\n| metric | value |\n|---|---|\n{scores}\n" if held_out else ""
        resolved = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8") or "{}") or {}
        numbers = yaml.safe_dump(resolved.get("objective", {}), sort_keys=False)
        text = f"""# {objective} {kind} of {base}

Made by t2i-align on `{getattr(config.data, "path", type(config.data).__name__)}`, {steps} steps, seed {config.seed}.

```
{plan}
```

```yaml
{numbers}```
{table}
## Load

```python
{load}
```

`config.yaml` in this folder reruns the training; `run.json` has the versions and the commit.
"""
        tags = ["diffusers", "diffusers-training", "text-to-image", objective.lower()] + ["lora"] * bool(policy.lora)
        data = ModelCardData(
            base_model=str(base), library_name="diffusers", pipeline_tag="text-to-image", tags=tags, license="other"
        )
        write_text(self.path / "README.md", f"---\n{data.to_yaml()}\n---\n\n{text}")
