"""What the commands of this package are given: rewards by name, and pictures in whichever layout they lie."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from rewards import Reward, RewardError, load
from rewards.data import formats
from rewards.data.formats import SUFFIXES
from rewards.data.images import Input, Row, decode

__all__ = ["Input", "Named", "Row", "decode", "load_rewards", "natural", "open_input", "parse_rewards", "pick_device"]

TARS = (".tar", ".tar.gz", ".tgz")
LAYOUTS = (
    "a folder of images, a .parquet file or folder of them, .jsonl or .csv, webdataset .tar files, "
    "a save_to_disk folder, or a hub id owner/name"
)


# Rewards
@dataclass(frozen=True)
class Named:
    """One reward as the user named it; ``args`` are its own."""

    label: str
    name: str
    args: dict[str, Any]

    def settings(self) -> dict[str, Any]:
        """What may be written down: a token authorises, it changes no score."""
        return {"name": self.name, "args": {key: value for key, value in self.args.items() if key != "token"}}


def parse_rewards(texts: Sequence[str]) -> list[Named]:
    """``NAME``, ``NAME:KEY=VALUE,KEY=VALUE``, or the YAML of a training run: ``{name: .., label: .., args: {..}}``.

    A VALUE is a YAML scalar without commas. ``RewardError`` where one is neither, or where two have the same label.
    """
    found = [_parse_reward(text) for text in texts]
    labels = [one.label for one in found]
    for label in labels:
        if labels.count(label) > 1:
            raise RewardError(
                f"two rewards are called {label!r}; give one a label: '{{name: .., label: .., args: ..}}'"
            )
        if label in ("file", "prompt"):
            raise RewardError(f"a reward cannot be called {label!r}, which is another column; give another label")
    return found


def _parse_reward(text: str) -> Named:
    expected = "expected NAME, NAME:KEY=VALUE,KEY=VALUE or '{name: NAME, label: LABEL, args: {KEY: VALUE}}'"
    try:
        if not text.lstrip().startswith("{"):
            name, _, rest = text.partition(":")
            args = {}
            for item in rest.split(",") if rest else []:
                key, equals, value = item.partition("=")
                if not equals or not key.isidentifier() or key in args:
                    raise RewardError(f"--reward {text}: {item!r} is no KEY=VALUE of its own; {expected}")
                args[key] = yaml.safe_load(value)
            return Named(name, name, args)
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RewardError(f"--reward {text} is not YAML ({' '.join(str(error).split())}); {expected}") from error
    if set(given) - {"name", "label", "args"}:
        raise RewardError(f"--reward {text} has the keys {', '.join(map(str, given))}; {expected}")
    name, args = given.get("name"), given.get("args", {})
    label = given.get("label", name)
    if not (isinstance(name, str) and isinstance(label, str) and label and isinstance(args, dict)):
        raise RewardError(f"--reward {text}: {expected}")
    return Named(label, name, args)


def load_rewards(named: Sequence[Named], device: str) -> dict[str, Reward]:
    """The rewards by label, networks on ``device``. ``RewardError`` says which one cannot be had, and why."""
    found = {}
    for one in named:
        try:
            reward = load(one.name, one.args)
        except RewardError:
            raise
        except (ValueError, TypeError) as error:  # what constructors say to a wrong argument
            raise RewardError(f"reward {one.label!r}: {error}") from error
        if isinstance(reward, nn.Module):
            reward.to(device)
        found[one.label] = reward
    return found


def pick_device(wanted: str | None, local: int = 0) -> str:
    """``wanted``, or GPU number ``local``, or the CPU. A GPU comes with its number, and becomes the one that "cuda"
    means. ``RewardError`` where there is no such device."""
    try:
        device = torch.device(wanted or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            torch.cuda.set_device(local if device.index is None else device)
            device = torch.device("cuda", torch.cuda.current_device())  # for other threads "cuda" may be another one
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RewardError(f"--device is {wanted}; expected cpu, cuda, cuda:0, ... ({reason})") from error
    return str(device)


# Pictures
def natural(text: str) -> list[tuple[bool, int, str]]:
    """Sort key under which ``2.png`` comes before ``10.png``, and both before ``a.png``."""
    parts = re.findall(r"[0-9]+|[^0-9]+", text)
    return [(False, int(part), "") if part.isdigit() else (True, 0, part.lower()) for part in parts]


def open_input(
    source: str,
    prompts: str | None = None,
    prompt_column: str | None = None,
    image_column: str | None = None,
    split: str | None = None,
) -> Input:
    """Find out which layout ``source`` has. In a folder that has several, images go before tar files and parquet.

    ``prompts`` names a file for a folder of images; the columns default to the first of ``formats.PROMPTS`` and
    ``formats.IMAGES`` that is there. ``RewardError`` says what arrived and what is understood.
    """
    place = Path(source).expanduser()
    if place.is_file():
        if place.suffix in (".jsonl", ".csv"):
            found = formats.records(place, prompt_column, image_column)
        elif place.suffix == ".parquet":
            found = formats.parquet(place.parent, [place], prompt_column, image_column)
        elif place.name.endswith(TARS):
            found = formats.tars(place.parent, [place], prompt_column, image_column)
        else:
            raise RewardError(f"{place} is no input that is understood; expected {LAYOUTS}")
    elif (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file():
        return formats.saved(place, split, prompt_column, image_column)  # the one, with the hub, that has splits
    elif place.is_dir():
        files = sorted((path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()), key=natural)
        images = [file for file in files if file.lower().endswith(SUFFIXES)]
        tars = [place / file for file in files if file.endswith(TARS)]
        shards = [place / file for file in files if file.endswith(".parquet")]
        if images:
            found = formats.folder(place, images, files, prompts, prompt_column)
        elif tars:
            found = formats.tars(place, tars, prompt_column, image_column)
        elif shards:
            found = formats.parquet(place, shards, prompt_column, image_column)
        else:
            raise RewardError(f"no images ({', '.join(SUFFIXES)}) in {place}; expected {LAYOUTS}")
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        return formats.hub(source, split, prompt_column, image_column)
    else:
        raise RewardError(f"no such folder or file: {place}; expected {LAYOUTS}")
    if split is not None:
        raise RewardError(f"{place} has no splits, but --split {split} is given; leave it out")
    if prompts is not None and found.identity["layout"] != "folder":
        raise RewardError(f"--prompts is for a folder of images; {place} brings its own, see --prompt_column")
    return found
