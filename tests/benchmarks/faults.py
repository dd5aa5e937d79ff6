"""What becomes of bad input and of kills.

    python tests/benchmarks/faults.py [--quick] [--part bad_input|kills] [--kinds "LoRA files"]

Bad input: every case of :mod:`tests.benchmarks.fault_cases` runs the real command, and passes if it ends by itself with
the status that its kind asks for (2, mostly), names what is wrong in at most three lines of stderr, from ``error:`` on
and beside the rows that it lists, without a traceback, and leaves every file as it was: nothing half-written, no run
folder that looks like a run. Kills: see :mod:`tests.benchmarks.fault_kills`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from PIL import Image
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[2]))

from align.common.provenance import provenance
from tests.benchmarks import RESULTS, fault_cases, fault_kills, forked, record
from tests.benchmarks.fault_cases import COMMANDS, KINDS, Case, Place, Shared, line

PATIENCE = 60.0  # seconds; what takes longer hangs
LINES, LETTERS = 3, 2000  # the most that a user has to read
OURS = ("cache", "home", "__pycache__")  # below a case's folder: encoded data, the user's home
READERS = {
    ".json": lambda path: json.loads(path.read_text()),
    ".yaml": lambda path: yaml.safe_load(path.read_text()),
    ".safetensors": lambda path: safe_open(path, "pt").keys(),
    ".parquet": pq.read_schema,
    ".png": lambda path: Image.open(path).load(),
}


def tree(folder: Path) -> dict[str, str]:
    """What lies below ``folder``: a digest by name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.relative_to(folder).parts[0] in OURS or "__pycache__" in path.parts:
            continue
        plain = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(folder))] = hashlib.blake2b(path.read_bytes()).hexdigest() if plain else "no file"
    return found


def broken(path: Path) -> bool:
    """Whether a file is half of one, as far as its suffix says what it should be."""
    try:
        READERS.get(path.suffix, lambda _: None)(path)
    except Exception:  # each reader has its own
        return True
    return False


@dataclass(frozen=True)
class Verdict:
    """What is wrong with how a case ended; nothing if it is empty."""

    case: Case
    wrong: list[str]
    command: str
    ended: forked.Ended

    def json(self, root: str) -> dict[str, Any]:
        said = [text for text in self.ended.errors.replace("\r", "\n").splitlines() if text.strip()]
        return {
            "kind": self.case.kind, "member": self.case.member, "wrong": self.wrong, "command": self.command,
            "status": self.ended.status, "stderr": [text.replace(root, "")[:400] for text in said[-4:]],
        }  # fmt: skip


def judge(case: Case, ended: forked.Ended, before: dict[str, str], folder: Path) -> list[str]:
    """Everything that is wrong with how a case ended."""
    after, wrong = tree(folder), []
    lines = [text for text in ended.errors.replace("\r", "\n").splitlines() if text.strip()]
    told = next((lines[k:] for k, text in enumerate(lines) if "error:" in text), [])
    listed = [text for text in told[1:] if text.startswith((" ", "- ")) and any(name in text for name in case.named)]
    if ended.status is None:
        wrong.append(f"did not end in {PATIENCE:.0f} s")
    elif ended.status not in case.status:
        wrong.append(f"status {ended.status}")
    if "Traceback (most recent call last)" in ended.errors:
        wrong.append("traceback")
    elif ended.status == 2:
        if not told:
            wrong.append("no error: line")
        elif len(told) - len(listed) > LINES or sum(map(len, told)) > LETTERS:  # rows may be listed
            wrong.append(f"{len(told)} lines, {sum(map(len, told))} letters")
        elif case.named and not any(name in text for name in case.named for text in told):
            wrong.append(f"names none of {', '.join(case.named)}")
    gone = sorted(name for name in before if after.get(name) != before[name])
    new = sorted(name for name in after.keys() - before.keys() if case.status != (0,))
    drafts = [name for name in after if name.endswith(".tmp")]
    if "harm" in after:
        wrong.append("ran code")
    if gone and not case.begins:
        wrong.append(f"changed {', '.join(gone[:3])}")
    if drafts:
        wrong.append(f"left the draft {drafts[0]}")
    if new and not case.begins:
        wrong.append(f"left {', '.join(new[:3])}")
    if halves := [name for name in new if case.begins and broken(folder / name) and (folder / name).is_file()]:
        wrong.append(f"left half of {', '.join(halves[:3])}")
    return wrong


def tried(case: Case, number: int, root: Path, shared: Shared) -> Verdict:
    """Run a case and judge it."""
    place = Place(root / f"{number:04d}", shared)
    (place.folder / "home").mkdir(parents=True)
    words = case.words(place)
    before = tree(place.folder)
    ended = forked.run([COMMANDS[case.base], *words], place.folder, PATIENCE, **case.environment)
    command = shlex.join([COMMANDS[case.base], *words]).replace(str(root), "").replace(str(shared.root), "")
    environment = "".join(f"{name}={value} " for name, value in case.environment.items())
    return Verdict(case, judge(case, ended, before, place.folder), environment + command, ended)


def left_by_commands(shared: Shared) -> None:
    """Complete the shared inputs by what commands leave."""
    for name, base, changes in (
        ("run", "train", {"max_train_steps": 4, "checkpointing_steps": 2}),
        ("drawn", "rollout", {}),
        ("scores", "score", {}),
        ("pruned", "compress", {}),
    ):
        place = Place(shared.root / f"making-{name}", shared)
        (place.folder / "home").mkdir(parents=True)
        ended = forked.run([COMMANDS[base], *line(base, place, changes)], place.folder, PATIENCE)
        if ended.status != 0:
            raise SystemExit(f"{base} with nothing wrong ended with {ended.status}: {ended.errors[-2000:]}")
        place.out.rename(shared[name])


def chosen(kinds: Sequence[str], quick: bool) -> Iterator[Case]:
    """The cases of these kinds, or of all; with ``quick`` three of each kind and command, and the controls."""
    yield from fault_cases.controls()
    for make in KINDS:
        counts: dict[tuple[str, str], int] = {}
        for case in make():
            key = case.kind, case.base
            counts[key] = counts.get(key, 0) + 1
            if (not kinds or case.kind in kinds) and not (quick and counts[key] > 3):
                yield case


def bad_input(shared: Shared, root: Path, kinds: Sequence[str], quick: bool, workers: int) -> dict[str, Any]:
    """Run the cases; counts by kind, and what failed."""
    left_by_commands(shared)
    before, begin = tree(shared.root), time.monotonic()
    counts: dict[str, dict[str, int]] = {}
    failures, slowest = [], 0.0
    with ThreadPoolExecutor(workers) as pool:
        numbered = enumerate(chosen(kinds, quick))
        for verdict in pool.map(lambda pair: tried(pair[1], pair[0], root, shared), numbered):
            count = counts.setdefault(verdict.case.kind, {"count": 0, "passed": 0})
            count["count"] += 1
            count["passed"] += not verdict.wrong
            slowest = max(slowest, verdict.ended.seconds)
            if verdict.wrong:
                failures.append(verdict.json(str(root)))
                print(json.dumps(failures[-1]), flush=True)
    if tree(shared.root) != before:
        raise SystemExit("a command changed what it was only to read")
    seconds = round(time.monotonic() - begin)
    return {"kinds": counts, "failures": failures, "seconds": seconds, "slowest": round(slowest, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three cases of each kind and command, and ten kills")
    parser.add_argument("--part", choices=("bad_input", "kills"), help="one of the two; the other's figures stay")
    parser.add_argument("--kinds", action="append", default=[], help="of bad input; nothing is recorded then")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="commands at once")
    args = parser.parse_args()
    parts = [args.part] if args.part else ["bad_input", "kills"]
    file, figures = RESULTS / "faults.json", dict[str, Any]()
    if file.exists() and not args.quick:
        figures = {part: v for part, v in json.loads(file.read_text()).items() if part in ("bad_input", "kills")}
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        root = Path(place).resolve()
        root.chmod(0o755)
        forked.serve()
        for part in parts:
            for name in (f"{part}-shared", part):
                (root / name).mkdir()
            shared = Shared.make(root / f"{part}-shared")
            if part == "bad_input":
                found = bad_input(shared, root / part, args.kinds, args.quick, args.workers)
            else:
                total = 10 if args.quick else args.kills
                found = fault_kills.measure(shared, root / part, total, args.seed, args.workers)
            figures[part] = found | {"date": date.today().isoformat(), "commit": provenance()["commit"]}
    record("faults", figures, args.quick or bool(args.kinds))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
