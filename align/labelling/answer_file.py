"""The file of answers: a line each, on the disk before it is confirmed, by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.common.errors import DataError, UserError
from rewards.common.errors import WriteError
from rewards.common.files import UNSUPPORTED, write_text
from rewards.data.text import loads

logger = logging.getLogger(__name__)


class AnswerFile:
    """``path``, locked until :meth:`close` or the end of the process, however that comes. A last line that a kill cut
    short goes: it was never confirmed, so its page sends it again.

    ``record`` is what the numbers of items in it depend on, kept beside it as ``NAME.session.json``.

    Raises:
        UserError: another process writes it, or it holds answers of another session.
        DataError: a line that is none of this page's.
    """

    def __init__(self, path: Path, record: Mapping[str, Any]) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}); give another --output") from error
        try:
            self._lock()
            self._settle(record)
            self.lines = self._read()
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                logger.warning("%s cannot be locked (%s); let no other process write it", self.path, error.strerror)
            elif error.errno in (errno.EAGAIN, errno.EACCES):
                raise UserError(
                    f"{self.path} is being written by another process; open the page of that one, it is for any number "
                    "of people, or give another --output"
                ) from error
            else:
                raise

    def _settle(self, record: Mapping[str, Any]) -> None:
        beside = self.path.with_suffix(".session.json")
        if self.path.stat().st_size == 0:
            write_text(beside, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
            return
        try:
            before: Any = loads(beside.read_text(encoding="utf-8"))
            wrong = [
                f"{key} {before.get(key)!r}, now {record[key]!r}"
                for key in record
                if key != "source" and before.get(key, record[key]) != record[key]  # earlier versions told less
            ]
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"{self.path} holds answers, but {beside.name} beside it cannot be read, which says of what; give "
                "another --output"
            ) from error
        if wrong:
            raise UserError(f"{self.path} holds answers of another session ({'; '.join(wrong)}); give another --output")

    def _read(self) -> list[dict[str, Any]]:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            logger.warning("%s: the last line was cut short by a kill and goes: %r", self.path, data[whole:][:200])
            os.ftruncate(self._fd, whole)
            os.fsync(self._fd)
        lines = []
        for number, text in enumerate(data[:whole].split(b"\n")[:-1], 1):
            try:
                line: Any = loads(text.decode())
                lines.append(line if "undo" in line else {"item": line["item"], "id": line["id"], **line})
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"{self.path}:{number} is no answer of this page ({error}); give another --output"
                ) from error
        self._size = whole
        return lines

    def append(self, line: Mapping[str, Any]) -> None:
        """Write a line, which is on the disk when this returns. ``WriteError`` where it is not, and nothing of it; also
        where another hand has changed the file, or put another in its place: the line would be lost, or end half of
        one."""
        rest = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        if not self._ours():
            raise WriteError(
                f"{self.path} has been changed, moved or deleted by other hands; start align.label again, which reads "
                "it anew; answers wait in their browsers"
            )
        size = self._size + len(rest)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            os.fsync(self._fd)
            self._size = size
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
            raise WriteError(f"cannot write {self.path}: {error.strerror}; nothing of the answer was left") from error

    def _ours(self) -> bool:
        """Whether the file is still there and holds what this process knows of."""
        held = os.fstat(self._fd)
        try:
            return os.path.samestat(held, self.path.stat()) and held.st_size == self._size
        except OSError:
            return False

    def close(self) -> None:
        os.close(self._fd)
