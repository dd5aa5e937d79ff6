"""Names of files as other machines wrote them: which file is meant, which is nearest, and which are no data at all."""

from __future__ import annotations

import functools
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

NO_SUCH_FILE = "no such file"  # how the reason of a row begins whose file is not there
EXPECTED = frozenset({".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".md", ".yaml", ".yml", ".html"})

SYSTEMS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")
MASKS = ("-masklabel.png", "-condlabel.png")


def locate_file(root: Path, name: str) -> Path:
    """The file that a row calls ``name``, relative to ``root``. Windows' back-slashes are understood, accents in
    another Unicode form, as macOS spells them, space around a name, as CSV has it after commas, and ``file:`` URLs.
    Where no file is there: ``root / name``, for :func:`no_such_file`."""
    path = root / name
    if os.path.isfile(path):
        return path
    if name.startswith("file:"):
        return root / unquote(urlsplit(name).path)
    if name != name.strip():
        return locate_file(root, name.strip())
    if "\\" in name and os.path.isfile(forward := root / name.replace("\\", "/")):
        return forward
    return _walk(root, _parts(name), _composed) or path


def no_such_file(path: Path, root: Path, name: str | None = None) -> str:
    """What to say where ``path``, which a row calls ``name``, is not there: with the file that comes nearest to it."""
    if len(str(path)) > 1024:
        return f"{NO_SUCH_FILE}: a name of {len(str(path))} characters"
    parts = _parts(name or str(path))
    tails = (_walk(root, parts[start:], _loose) for start in range(len(parts)))
    nearest = _walk(Path("/"), _parts(str(path)), _loose) or next(filter(None, tails), None)
    return f"{NO_SUCH_FILE}: {path}" + (f"; the nearest that is there is {nearest}" if nearest else "")


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in PurePosixPath(name.replace("\\", "/")).parts if part != "/")


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _loose(name: str) -> str:
    """Without suffix, case and the form of accents."""
    return _composed(name.rpartition(".")[0] or name).casefold()


def _walk(root: Path, parts: Iterable[str], key: Callable[[str], str]) -> Path | None:
    """The file at ``parts`` below ``root``, by names that have the same ``key``; None where there is none."""
    place = root
    try:
        for part in parts:
            if not os.path.exists(place / part):
                names = _names(place, place.stat().st_mtime_ns, key)
                if (same := names.get(key(part))) is None:
                    return None
                part = same
            place = place / part
    except (OSError, ValueError):
        return None
    return place if os.path.isfile(place) else None


@functools.lru_cache(maxsize=64)
def _names(folder: Path, changed: int, key: Callable[[str], str]) -> dict[str, str]:
    """The names in ``folder`` by their key; ``changed`` is its time, so that a list that is old is not used."""
    return {key(name): name for name in sorted(os.listdir(folder), reverse=True)}


def is_hidden(name: str) -> bool:
    """Whether a name in a folder or an archive is a system's own (``._x.png``, ``.ipynb_checkpoints``, ``__MACOSX``) or
    a mask that OneTrainer keeps beside a picture (``x-masklabel.png``)."""
    if name.lower().endswith(MASKS):
        return True
    return any(part.startswith(".") or part in SYSTEMS for part in PurePosixPath(name).parts)


def name_fault(name: str) -> str:
    """Why the name of a file cannot be written down, as in archives of another encoding; empty where it can."""
    return (
        "" if printable(name) == name else "its name is not UTF-8; rename it, for example by convmv -f cp1252 -t utf-8"
    )


def printable(name: str) -> str:
    """A file's name, with the bytes that are not UTF-8 as ``\\xe9``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """What lies below ``folder`` and is neither hidden nor a folder; links that lead nowhere too."""
    paths = (path for path in folder.rglob(pattern) if not is_hidden(path.relative_to(folder).as_posix()))
    return [path for path in paths if path.is_symlink() or not path.is_dir()]


def left_out(folder: Path, names: Iterable[str]) -> str:
    """``names`` in ``folder`` that nobody reads, counted by suffix, without those that people expect beside images."""
    suffixes = Counter(
        "link to a folder" if (folder / name).is_dir() else PurePosixPath(name).suffix.lower() or "without suffix"
        for name in names
    )
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(suffixes.items()) if suffix not in EXPECTED)
