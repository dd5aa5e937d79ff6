"""The names that stand for folders and files inside this package: the embedded pipelines, preferences, prompts."""

import os
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

EMBEDDED = ("shapes-sd", "shapes-sd3", "shapes-preferences", "shapes-preferences-sd3")
_LISTS = ("shapes-prompts", "shapes-prompts-more-counting", "shapes-prompts-heldout")
FILES = {name: f"{name}.txt" for name in _LISTS}


def locate(source: str) -> str:
    """An embedded name to its folder or file; ``~`` to the home; anything else (a path, a hub id) unchanged."""
    inside = source if source in EMBEDDED else FILES.get(source)
    return str(files("align.shapes").joinpath(inside)) if inside else os.path.expanduser(source)


class TakesPaths:
    """Settings whose paths may also be texts, as people write them in Python; ``~`` is the home."""

    def __post_init__(self) -> None:
        settings: Any = self
        for field in fields(settings):
            value = getattr(self, field.name)
            if "Path" in str(field.type) and isinstance(value, str | Path):
                setattr(self, field.name, Path(value).expanduser())
