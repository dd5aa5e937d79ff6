"""Public benches at their full number of prompts on ``shapes-sd``: what they hold in memory, and what kills change.

    python tests/benchmarks/benches.py --partiprompts PartiPrompts.tsv --hpsv2 hpsv2.json [--only hpsv2] [--quick]

Each is run whole, with a quarter of its prompts, and once more with SIGKILLs at random moments, until it ends; two
sampler steps, unguided, 32 pixels, scored by ``JPEGCompressibility``: of pictures and figures nothing is meant here.
Every run is the command's ``main`` in a process of its own (:mod:`tests.benchmarks.forked`); its peak is the most that
it held (``VmHWM``), imports included; what the kills left has to be the same files with the same bytes.

The prompts are the user's copy: PartiPrompts' own file, and HPSv2's folder ``benchmark/`` or Diffusion-SDPO's
``prompts/hpsv2.json``, the same prompts in one list, which is divided by 800 into the folder's four styles. Without
them prompts of that layout and number are made, and the record says so.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks import earlier, forked, record

STYLES = ("anime", "concept-art", "paintings", "photo")
PROMPTS = {"partiprompts": 1632, "hpsv2": 3200}
KILLS = 6  # at most, of a bench
SPARE = 2.0  # seconds: where all pictures are there, scores and report are to be made
MODEL = "shapes-sd"
SETTINGS = ("--num_inference_steps", "2", "--guidance_scale", "1", "--resolution", "32", "--batch_size", "32")
SCORER = ("--reward", "JPEGCompressibility")


@dataclass(frozen=True)
class Ended:
    """How a process ended: its status, seconds by the clock and of CPU, and the most that it held, in MiB."""

    status: int
    seconds: float
    cpu: float
    peak: float

    def json(self) -> dict[str, float]:
        return {"seconds": round(self.seconds, 1), "cpu_seconds": round(self.cpu, 1), "peak_mib": round(self.peak, 1)}


def bench(name: str, prompts: Path, folder: Path, most: int, kill_after: float | None = None) -> Ended:
    """``align.bench`` of ``most`` prompts in ``folder``, killed after so many seconds where it still runs then."""
    folder.mkdir(exist_ok=True)
    words = [name, "--models", MODEL, "--prompts", str(prompts), "--output_dir", "out", "--max_prompts", str(most)]
    start, cpu, peak = time.monotonic(), 0.0, 0.0
    process = forked.Started(["align.bench", *words, *SETTINGS, *SCORER], folder, folder / "said")
    while process.status is None:
        with contextlib.suppress(OSError, LookupError):  # it has just ended
            cpu, peak = used(process.pid)
        if kill_after is not None and time.monotonic() - start >= kill_after:
            process.kill()
        time.sleep(0.02)
    status = process.status
    assert status is not None
    return Ended(status, time.monotonic() - start, cpu, peak)


def used(pid: int) -> tuple[float, float]:
    """Seconds of CPU and the most MiB that a process had until now."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), int(lines["VmHWM"].split()[0]) / 1024


def whole(name: str, prompts: Path, folder: Path, most: int) -> Ended:
    """:func:`bench`, which has to succeed."""
    ended = bench(name, prompts, folder, most)
    if ended.status:
        sys.exit(f"{name} ended with {ended.status}:\n" + (folder / "said").read_text()[-2000:])
    return ended


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder``, locks apart."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def measured(name: str, prompts: Path, root: Path, most: int, kills: int) -> dict[str, Any]:
    """What one bench held and kept."""
    full = whole(name, prompts, root / "whole", most)
    quarter = whole(name, prompts, root / "quarter", most // 4)
    moments, killed = random.Random(f"{name} {most}"), list[dict[str, Any]]()
    there = 0
    for _ in range(kills):
        moment = moments.uniform(0, full.seconds * (1 - there / most) + SPARE)  # in what is still to do
        ended = bench(name, prompts, root / "killed", most, moment)
        if ended.status != -signal.SIGKILL:
            break
        there = len(list((root / "killed/out/images").glob("*/*.png")))
        killed.append({"after_seconds": round(moment, 1), "pictures": there})
    last = whole(name, prompts, root / "killed", most)
    one, other = tree(root / "whole/out"), tree(root / "killed/out")
    report = json.loads((root / "whole/out/bench.json").read_text())
    shutil.rmtree(root)
    return {
        "prompts": report["prompts"], "whole": full.json(), "quarter": quarter.json(), "last": last.json(),
        "kills": killed, "files": len(one),
        "changed": sorted(file for file in one.keys() | other.keys() if one.get(file) != other.get(file)),
        "differences": report["differences"],
    }  # fmt: skip


def made_up(name: str, folder: Path, count: int) -> Path:
    """Prompts of the bench's layout and number, where the official ones are not at hand."""
    texts = [f"{k} {('red', 'green', 'blue')[k % 3]} {('stars', 'circles')[k % 2]} on a hill" for k in range(count)]
    if name == "partiprompts":
        rows = [f"{text}\tAnimals\tBasic\t" for text in texts]
        (folder / "PartiPrompts.tsv").write_text("\n".join(["Prompt\tCategory\tChallenge\tNote", *rows]) + "\n")
        return folder / "PartiPrompts.tsv"
    return by_style(texts, folder)


def by_style(texts: list[str], folder: Path) -> Path:
    """HPSv2's folder of four files, of a list in their order."""
    place, each = folder / "benchmark", len(texts) // len(STYLES)
    place.mkdir(exist_ok=True)
    for k, style in enumerate(STYLES):
        (place / f"{style}.json").write_text(json.dumps(texts[k * each : (k + 1) * each]))
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--partiprompts", type=Path)
    parser.add_argument("--hpsv2", type=Path)
    parser.add_argument("--only", choices=PROMPTS, help="this one, beside what was recorded of the other")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    settings = " ".join((*SETTINGS, *SCORER))
    found: dict[str, Any] = dict(earlier("benches", settings).get("benches", {})) if options.only else {}
    forked.serve()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for bench_name, count in PROMPTS.items():
            if options.only not in (None, bench_name):
                continue
            given, source = getattr(options, bench_name), "made up by the script"
            if given is None:
                prompts = made_up(bench_name, root, count)
            elif given.suffix == ".json":
                prompts, source = by_style([row["prompt"] for row in json.loads(given.read_text())], root), given.name
            else:
                prompts, source = given.resolve(), given.name
            digest = hashlib.sha256(given.read_bytes()).hexdigest() if given is not None and given.is_file() else None
            most = 64 if options.quick else count
            (root / bench_name).mkdir()
            figures = measured(bench_name, prompts, root / bench_name, most, 2 if options.quick else KILLS)
            found[bench_name] = {"source": source, "sha256": digest} | figures
            print(bench_name, json.dumps(found[bench_name]), flush=True)
            record("benches", {"model": MODEL, "settings": settings, "benches": found}, options.quick)
    kills = sum(len(entry["kills"]) for entry in found.values())
    changed = sum(len(entry["changed"]) for entry in found.values())
    growth = {name: entry["whole"]["peak_mib"] - entry["quarter"]["peak_mib"] for name, entry in found.items()}
    print(json.dumps({"kills": kills, "changed": changed, "growth_mib": growth}))


if __name__ == "__main__":
    main()
