"""The names that stand for folders and files inside this package: the embedded pipelines, preferences, prompts."""

import os
from importlib.resources import files

EMBEDDED = ("shapes-sd", "shapes-sd3", "shapes-preferences", "shapes-preferences-sd3")
_LISTS = ("shapes-prompts", "shapes-prompts-more-counting", "shapes-prompts-heldout")
FILES = {name: f"{name}.txt" for name in _LISTS}


def locate(source: str) -> str:
    """An embedded name to its folder or file; ``~`` to the home; anything else (a path, a hub id) unchanged."""
    inside = source if source in EMBEDDED else FILES.get(source)
    return str(files("align.shapes").joinpath(inside)) if inside else os.path.expanduser(source)
