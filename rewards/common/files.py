"""Writing files and folders so that readers never meet half of one."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rewards.common.errors import UserError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Gives a draft beside ``path``, to be written as a file or as a folder, and renames it once the block has ended;
    where the block fails, the draft goes and ``path`` stays as it was.

    The folder of ``path`` is made. The draft bears the machine's name and this process's number: a cluster that takes a
    machine for dead gives its work to another one. A folder in the place of a draft that is one is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft, old = _draft(path), _draft(path, "old.tmp")
    for leftover in (draft, old):  # of an earlier process of this number
        discard(leftover)
    try:
        yield draft
        if draft.is_dir() and path.is_dir():
            path.replace(old)
        draft.replace(path)
        discard(old)
    finally:
        discard(draft)


def _draft(path: Path, kind: str = "tmp") -> Path:
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.{kind}")


def discard(path: Path) -> None:
    """Take away a file or a whole folder, where there is one: a folder by another name, so that a kill in the midst
    leaves no half of it under its own."""
    if path.is_dir():
        doomed = path if path.suffix == ".tmp" else path.replace(_draft(path, "old.tmp"))
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path, of: str = "*") -> None:
    """Take away the drafts, of files named like ``of``, that killed processes have left in a folder that one process
    writes."""
    for draft in folder.glob(f".{of}.tmp"):
        discard(draft)


def write_text(path: Path, text: str) -> None:
    """A whole UTF-8 file or none; its folder is made."""
    with atomic(path) as draft:
        draft.write_text(text, encoding="utf-8")


def claim(folder: Path) -> None:
    """Make ``folder`` where it is missing. Raises :class:`UserError` where nothing can be written into it, so that long
    work finds out before it begins."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write into {folder} ({error.strerror}); give another output_dir") from error
