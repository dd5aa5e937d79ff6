"""What made a file: versions, commit, machine."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("t2i-align", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy")


def provenance() -> dict[str, Any]:
    """Versions, git commit (``dirty`` when the checkout has changes) and machine."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            found[name] = "not installed"
    return {"versions": found, "python": platform.python_version(), "commit": commit(), "machine": platform.machine()}


def commit() -> str:
    """The checkout's git commit, or ``unknown`` outside one."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + (" dirty" if git("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
