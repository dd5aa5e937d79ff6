"""What of a result goes to the hub, and its card as the hub has it.

What goes is listed, and nothing else does: the weights that a pipeline is loaded from, the files that say how they were
made, the card, and the pictures that the card shows. Checkpoints, trackers' files, caches, rollouts and locks stay.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, unquote

import yaml

from align.common.errors import UserError
from align.common.hub import Repository
from align.families import LORA_FILE, SAMPLING_FILE
from align.families.parts import INDEX, read_json
from align.policy.initial_noise import NOISE_FILE
from align.training.model_card import is_hub_id, license_in, license_text, with_section
from rewards.common.errors import shortened

CARD = "README.md"
SINGLE = (LORA_FILE, NOISE_FILE)
RUN = ("config.yaml", "run.json")  # both, or the first is another program's
OF_A_COMPONENT = (".json", ".safetensors", ".txt", ".model", ".jinja")
PICTURE = re.compile(r"^!\[([^\n]*)\]\(([^()\s]+\.png)\)$", re.MULTILINE)


def weights_in(folder: Path) -> dict[str, Path]:
    """The files of a whole pipeline, or what a run trained: a LoRA, the denoiser, learned noise; by their names on the
    hub. Raises :class:`UserError` where there is none."""
    if (folder / INDEX).is_file():
        parts = [part for part in read_json(folder / INDEX) if re.fullmatch(r"[a-z]\w*", part)]
        found = [folder / name for name in (INDEX, SAMPLING_FILE) if (folder / name).is_file()]
        found += [file for part in parts for file in _component(folder / part)]
    else:
        found = [folder / name for name in SINGLE if (folder / name).is_file()]
        trained = (
            each.parent for each in folder.glob("*/config.json") if not each.parent.name.startswith("checkpoint-")
        )
        found += [file for part in sorted(trained) for file in _component(part)]
    if not any(file.suffix == ".safetensors" for file in found):
        raise UserError(
            f"{folder} holds no weights to upload: neither {' nor '.join(SINGLE)}, nor a denoiser, nor a pipeline; a "
            "run that was stopped goes on by --resume_from_checkpoint latest"
        )
    return {file.relative_to(folder).as_posix(): file for file in found}


def _component(folder: Path) -> list[Path]:
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(file for file in files if file.suffix in OF_A_COMPONENT and file.name[0] != "." and file.is_file())


def publish(repository: Repository | None, folder: Path) -> None:
    """Upload a run or pipeline folder; where ``repository`` is None, nothing. Raises :class:`UserError`."""
    if repository is not None:
        card = folder / CARD
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        send(repository, weights_in(folder), text, folder, folder)


def send(
    repository: Repository, weights: Mapping[str, Path], card: str, beside: Path, result: Path, options: str = ""
) -> None:
    """Upload ``weights`` by their names on the hub, the text ``card`` with its pictures, and where ``beside`` is a run
    its settings. ``result`` is what an error says to upload once more, by ``options`` of ``align.export``."""
    text, pictures = pictured(card, beside)
    more = {name: beside / name for name in RUN} if all((beside / name).is_file() for name in RUN) else {}
    cards = {CARD: for_hub(text, repository.id).encode()} if text else {}
    repository.upload({**weights, **more, **pictures, **cards}, result, options)


def pictured(card: str, folder: Path) -> tuple[str, dict[str, Path]]:
    """The card with the pictures that it shows by their names on the hub, and those files. A picture that is not there,
    or lies neither in ``folder`` nor beside it, is shown no more."""
    found: dict[str, Path] = {}

    def replaced(match: re.Match[str]) -> str:
        path = (folder / unquote(match[2])).resolve()
        inside = path.is_relative_to(folder.resolve())
        if not path.is_file() or not (inside or path.parent == folder.resolve().parent):
            return ""
        name = path.relative_to(folder.resolve()).as_posix() if inside else path.name
        found[name] = path
        return f"![{match[1]}]({quote(name)})"

    return PICTURE.sub(replaced, card), found


def for_hub(card: str, repository: str) -> str:
    """The card of a folder as the card of ``repository``: ``weights`` lie there; a base model that is no repository is
    left out of what the hub reads; the base's terms are asked for where they are not known yet."""
    from huggingface_hub import ModelCard

    try:
        parsed = ModelCard(_loading_from(card, repository), ignore_metadata_errors=True)
    except (ValueError, TypeError, yaml.YAMLError) as error:  # somebody's hand was in it
        raise UserError(f"{CARD}: the metadata at its head cannot be read: {shortened(str(error))}") from error
    base = parsed.data.get("base_model")
    if isinstance(base, str) and not is_hub_id(base):
        parsed.data["base_model"] = base = None
    if isinstance(base, str) and parsed.data.get("license") is None and (terms := _asked(base)):
        for key, value in terms.items():
            parsed.data[key] = value
        parsed.text = with_section(parsed.text, "License", license_text(base, terms))
    return f"{parsed.content.rstrip()}\n"


def _loading_from(card: str, repository: str) -> str:
    """Stock diffusers takes the repository's name; our own loaders read a folder."""
    line = re.search(r"^weights = .*$", card, re.MULTILINE)
    if line is None:
        return card
    ours = re.search(r"^(from align|import pruning)", card[: line.start()].rpartition("```python")[2], re.MULTILINE)
    source = f"snapshot_download({repository!r})" if ours else repr(repository)
    head = card[: line.start()].rstrip("\n") + ("\nfrom huggingface_hub import snapshot_download" if ours else "")
    return f"{head}\n\nweights = {source}{card[line.end() :]}"


def _asked(base: str) -> dict[str, str]:
    """The terms of ``base`` by the hub; none where it says nothing of it."""
    from huggingface_hub import model_info

    try:
        data = model_info(base).card_data
    except Exception:  # a gated or private base, no connection: the upload says so, or needs none of it
        return {}
    return license_in(data.to_dict() if data is not None else {}, base)
