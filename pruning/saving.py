"""Pipelines and components on disk: all of one or nothing, with the card that says what it is."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from align.common.assets import locate
from align.common.errors import UserError
from align.families import SAMPLING_FILE
from pruning.plan import Plan
from rewards.common.files import atomic

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_ONE_FILE = "1000GB"  # diffusers' own loader fails where a shard ends between a weight's codes and its scales


def save_pipeline(pipe: DiffusionPipeline, folder: Path | str, beside: Mapping[str, str] | None = None) -> None:
    """Write the whole pipeline as ``from_pretrained`` reads it: all of it, or nothing.

    ``beside`` holds more files, name to text: a model card, ``sampling.json``. Raises
    :class:`UserError` where ``folder`` exists.
    """
    with _new_folder(Path(folder)) as draft:
        pipe.save_pretrained(draft, max_shard_size=_ONE_FILE)
        for name, text in (beside or {}).items():
            (draft / name).write_text(text, encoding="utf-8")


def save(module: Any, folder: Path | str) -> None:
    """Write one component, as :func:`save_pipeline` does."""
    with _new_folder(Path(folder)) as draft:
        module.save_pretrained(draft, max_shard_size=_ONE_FILE)


def _new_folder(folder: Path) -> AbstractContextManager[Path]:
    if folder.exists():
        raise UserError(f"{folder} exists; name another folder or remove it")
    return atomic(folder)


def sampling_settings(source: str) -> dict[str, str]:
    """The file of recommended sampling settings that ``source`` has, for a pipeline made of it."""
    path = Path(locate(source)) / SAMPLING_FILE
    return {SAMPLING_FILE: path.read_text()} if path.is_file() else {}


def card(base: str, plan: Plan | None, what: str) -> str:
    """The model card of a pipeline made from ``base``: ``what`` was done, what the plan removed, how to load it."""
    data = ModelCardData(base_model=base, library_name="diffusers", pipeline_tag="text-to-image")
    lines = [f"# {base}, compressed by t2i-align\n", f"{what[0].upper()}{what[1:]}.\n"]
    if plan is not None:
        lines.append(f"Removed from the denoiser, by the original's names: {', '.join(plan.dropped)}.\n")
        lines.append(f"{plan.after:,} of {plan.before:,} parameters are left.\n")
    lines.append(
        '```python\nimport pruning\n\npipe = pruning.load("this folder")  # on a GPU stock diffusers does\n```\n'
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)
