"""Writing files so that readers never meet half of one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from align.common.errors import UserError


def claim(folder: Path) -> None:
    """Make ``folder`` where it is missing. Raises :class:`UserError` where nothing can be written into it, so that long
    work finds out before it begins."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write into {folder} ({error.strerror}); give another output_dir") from error


def write(path: Path, text: str) -> None:
    """Write a whole file or none, under a name of this process until it is complete; make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
