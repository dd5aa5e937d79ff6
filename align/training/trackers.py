"""Where figures and pictures go beside ``metrics.jsonl``: the trackers that accelerate knows, several at once."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import filter_trackers, get_available_trackers
from accelerate.utils import LoggerType
from torch import Tensor

from align.common.errors import UserError
from align.evaluation.gallery import to_pil
from rewards.common.errors import one_line
from rewards.common.files import write_text

PROJECT = "t2i-align"
KEPT = "trackers.json"  # in the run folder: which run of a tracker this is, so that a resumed one goes on with it


def chosen(report_to: Sequence[str] | str) -> list[str]:
    """The trackers that ``report_to`` names. Raises :class:`UserError` for what is unknown or not installed."""
    words = report_to.split(",") if isinstance(report_to, str) else report_to
    names, there = [word.strip() for word in words], [str(name) for name in get_available_trackers()]
    if names == ["none"] or not names:
        return []
    if names == ["all"]:
        return there
    if missing := [name for name in names if name not in there]:
        known = [name for name in missing if name in LoggerType.list() and name != "all"]
        what = (
            f"{', '.join(known)} is not installed" if known else f"{', '.join(missing)} is no tracker to add to others"
        )
        raise UserError(
            f"report_to: {what}; here are {', '.join(there) or 'none'}. Give some of these, all, or none; accelerate "
            f"also knows {', '.join(name for name in LoggerType.list() if name not in ('all', *there))}"
        )
    return list(dict.fromkeys(names))


def require(report_to: Sequence[str] | str) -> None:
    """Raise :class:`UserError` where a tracker cannot be used, before any weight is loaded; W&B asks for its key here,
    where there is a terminal."""
    if "wandb" in chosen(report_to) and os.environ.get("RANK", "0") == "0":
        import wandb

        try:
            wandb.login()  # offline it only says so
        except Exception as error:
            raise UserError(f"report_to: wandb: {one_line(error)}; or WANDB_MODE=offline, for `wandb sync`") from error


def start(
    accelerator: Accelerator, report_to: Sequence[str] | str, folder: Path, settings: Mapping[str, Any], resumed: bool
) -> None:
    """Open the trackers with the run's settings. A W&B run keeps its id in ``folder``: a ``resumed`` run goes on with
    it. Raises :class:`UserError` where one does not open."""
    names, kept, ids = chosen(report_to), folder / KEPT, dict[str, str]()
    if not names:
        return
    arguments, project = {}, PROJECT
    if "wandb" in names:
        if resumed and kept.is_file():
            ids = json.loads(kept.read_text(encoding="utf-8"))
        ids.setdefault("wandb", secrets.token_hex(4))
        arguments["wandb"] = {"id": ids["wandb"], "resume": "allow", "dir": str(folder), "name": folder.resolve().name}
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        if accelerator.is_main_process:
            write_text(kept, json.dumps(ids) + "\n")
    accelerator.log_with = filter_trackers(names, accelerator.project_configuration.logging_dir)
    try:
        accelerator.init_trackers(project, init_kwargs=arguments)
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # which would make a run of them, and config.yaml lies beside its file
                tracker.store_init_configuration(flat(settings))
    except Exception as error:  # each tracker has errors of its own
        raise UserError(f"report_to: {', '.join(names)} cannot be opened: {one_line(error)}") from error


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings as trackers take them: dotted names, and JSON for what is no number, text or null."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = value if isinstance(value, bool | int | float | str | None) else json.dumps(value)
    return found


def log_images(accelerator: Accelerator, name: str, images: Tensor, step: int) -> None:
    """Show pictures (N, 3, H, W) in [0, 1] in every tracker that takes some by accelerate, each as it takes them."""
    pictures = [to_pil(image) for image in images]
    singly = {f"{name}/{k}": picture for k, picture in enumerate(pictures)}
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: images.numpy()}, step=step, dataformats="NCHW")
        elif tracker.name in ("clearml", "aim"):  # one picture a name
            tracker.log_images(singly, step=step)
        elif (log := getattr(tracker, "log_images", None)) is not None:  # wandb, swanlab; mlflow and others have none
            log({name: pictures}, step=step)
