"""The embedded world: captions, renderer, two tiny pipelines, a preference set, and the scripts that made them.

Nothing else in the library knows about it but the names below, which stand for folders inside this package.
"""

from importlib.resources import files

EMBEDDED = ("shapes-sd", "shapes-sd3", "shapes-preferences")


def locate(source: str) -> str:
    """An embedded name to its folder; anything else (folder or hub id) unchanged."""
    return str(files("align.shapes").joinpath(source)) if source in EMBEDDED else source
