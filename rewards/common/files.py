"""Writing files and folders so that readers never meet half of one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from rewards.common.errors import UserError, WriteError, shortened

logger = logging.getLogger(__name__)


LOCK = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what a file system without locks says
_threads = threading.RLock()  # the system's locks are a process's, not a thread's
_locked: set[Path] = set()  # by this process, which the system lets lock twice


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Gives a draft beside ``path``, to be written as a file or as a folder, and renames it once the block has ended;
    where the block fails, the draft goes and ``path`` stays as it was.

    The folder of ``path`` is made. The draft bears the machine's name and this process's number: a cluster that takes a
    machine for dead gives its work to another one. A folder in the place of a draft that is one is replaced.
    ``WriteError`` names ``path`` where the system does not write: a full disk, one that is read-only or gone, a limit.
    """
    draft, old = _draft(path), _draft(path, "old.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in (draft, old):  # of an earlier process of this number
            discard(leftover)
        yield draft
        if draft.is_dir() and path.is_dir():
            path.replace(old)
        draft.replace(path)
        discard(old)
    except (OSError, SafetensorError) as error:
        own = isinstance(error, OSError) and error.strerror and error.filename in (None, str(draft), str(path.parent))
        reason = error.strerror if own else shortened(str(error))  # type: ignore[union-attr]
        raise WriteError(f"cannot write {path}: {reason}; nothing of it was left") from error
    finally:
        with contextlib.suppress(OSError):  # its folder is gone, or cannot be written
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
    work finds out before it begins, and for a pipeline's own folder (``model_index.json``)."""
    if (folder / "model_index.json").exists():
        raise UserError(f"{folder} is a pipeline's own folder; nothing is written into one, give another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write into {folder} ({error.strerror}); give another output_dir") from error


@contextmanager
def locked(folder: Path, passing: bool = False) -> Iterator[None]:
    """:func:`claim` ``folder``, and keep every other run out of it until the block ends.

    Raises :class:`UserError` that names the process and the machine that write into it. The system gives the lock of a
    process that died, however it did, to the next one that asks. Of several processes of one launch the first holds it
    for all. A folder that was made here, or is only ``passing``, goes at the end where nothing is in it.
    """
    made = not folder.exists()
    claim(folder)
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    try:
        with _lock(folder):
            yield
    finally:
        if made or passing:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Lets the processes and threads that name the same ``path`` through one after the other, where its file system has
    locks; each should look whether what it wants to make is there by then. The folder of ``path`` is made."""
    with _threads, contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.with_name(f".{path.name}.lock").open("a"))
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise WriteError(f"cannot write {path}: {error.strerror}") from error
        yield


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    path = folder.resolve() / LOCK
    with _locked_file(path, folder) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        _locked.add(path)
        try:
            yield
        finally:
            _locked.discard(path)
            path.unlink(missing_ok=True)  # while it is locked: who has opened it meanwhile finds out that it is gone


def _locked_file(path: Path, folder: Path) -> TextIO:
    """The file at ``path``, open and locked."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            if path in _locked:
                raise BlockingIOError(errno.EAGAIN, "locked by this process")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                with file:
                    file.seek(0)
                    holder = file.read().strip() or "another process"
                raise UserError(f"{folder} is written by {holder}; wait for it, or name another folder") from error
            logger.warning("%s cannot be locked (%s); let no other run write into it", folder, error.strerror)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # its holder took it away after it was opened here


def fingerprint(path: Path) -> str:
    """Of a file, or of all files below a folder, by their names, sizes and times: another one for other weights."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    stats = [[file.relative_to(path).as_posix(), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def reached(count: Callable[[], int], wanted: int, patience: float, pause: float = 0.05) -> bool:
    """Wait until ``count()``, what other processes have made, is ``wanted``; False where it has stood still for
    ``patience`` seconds. It is asked every ``pause`` seconds."""
    last, since = count(), time.monotonic()
    while last < wanted:
        time.sleep(pause)
        if (now := count()) != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > patience:
            return False
    return True
