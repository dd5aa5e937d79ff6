"""Pipelines and components on disk: all of one or nothing, with the card that says what it is."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.common.assets import locate
from align.common.errors import UserError
from align.families import SAMPLING_FILE
from align.training.model_card import ModelCard, code
from pruning.plan import Plan
from rewards.common.files import atomic
from rewards.common.page import escape

if TYPE_CHECKING:
    import torch
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


def card(base: str, plan: Plan | None, what: str, folder: Path, dtype: torch.dtype, details: str = "") -> str:
    """The model card of the pipeline in ``folder``, made from ``base``: ``what`` was done, what the plan removed."""
    lines = [f"{what[0].upper()}{what[1:]}."]
    if plan is not None:
        lines.append(f"Removed from the denoiser, by the original's names: {', '.join(plan.dropped)}.")
        lines.append(f"{plan.after:,} of {plan.before:,} parameters are left.")
    lines.append("Where there is a GPU, stock diffusers loads it as well, unless parts of blocks were removed.")
    return ModelCard(
        title=f"{base}, compressed by t2i-align",
        base_model=base,
        introduction="\n\n".join(map(escape, lines)),
        load=f"import torch\nimport pruning\n\npipe = pruning.load(weights, {dtype})",
        folder=str(folder),
        sections={"Details": code(details)} if details else {},
    ).text()
