"""What a data set costs by its size: to start on, to encode, to go on with after a kill, and its captions on disk.

    python tests/benchmarks/data_size.py            # about a quarter of an hour of one core, 8 GB of disk
    python tests/benchmarks/data_size.py --quick    # a minute

Pairs of 64-pixel images in Pick-a-Pic's layout (parquet, PNG bytes, sixteen pairs a caption) are made up; of the images
a thousand differ. Each figure is of a process of its own: CPU seconds, the most anonymous memory (mapped files can be
dropped at any time and are not the process's own), and the most of all resident memory. *Start* is what every run does
before its model is loaded, ``check()``: the first reads the rows into an index, the second maps that. *Encode* is
``prepare()``; its autoencoder is a stand-in, 4x4 average pooling, since what is measured is all that is around one, and
its text encoder gives 77 x 16 numbers. The third is killed (SIGKILL) when half of the shards are there.

The sizes of texts are of tensors of the true shapes, random where the model's are dense, zero where the model's are.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import avg_pool2d

from align.data import PreferencePairs
from align.data.dataset import Setup
from align.data.packed import pack
from align.families import Conditioning
from tests.benchmarks import record

SIDE, POOL = 64, 1024
PROMPTS = 58_960  # distinct ones of Pick-a-Pic v1's training rows


def pngs() -> list[bytes]:
    """A rectangle each, about 150 bytes."""
    images = []
    for seed in range(POOL):
        rng = np.random.default_rng(seed)
        pixels = np.empty((SIDE, SIDE, 3), np.uint8)
        pixels[:] = rng.integers(0, 256, 3)
        x, y, width, height = rng.integers(4, SIDE // 2, 4)
        pixels[y : y + height, x : x + width] = rng.integers(0, 256, 3)
        Image.fromarray(pixels).save(out := io.BytesIO(), "PNG")
        images.append(out.getvalue())
    return images


def make_pairs(file: Path, count: int) -> None:
    """``count`` pairs in Pick-a-Pic's columns."""
    images = pngs()
    kinds = {"caption": pa.string(), "jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.float64()}
    with pq.ParquetWriter(file, pa.schema(kinds)) as out:
        for start in range(0, count, 10_000):
            rows = range(start, min(start + 10_000, count))
            columns = {
                "caption": [f"picture {row // 16}, by painter {row // 16 % 97}" for row in rows],
                "jpg_0": [images[row % POOL] for row in rows],
                "jpg_1": [images[(row + 1 + row // POOL % 1000) % POOL] for row in rows],
                "label_0": [float(row % 2) for row in rows],
            }
            out.write_table(pa.table(columns, pa.schema(kinds)), row_group_size=1000)


class Pooling:
    """What stands in for a model."""

    resolution, dtype, device = SIDE, torch.float32, torch.device("cpu")
    pipe = SimpleNamespace(components={})  # no tokenizer

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 3, height // 4, width // 4

    def to_latent(self, images: Tensor) -> Tensor:
        return avg_pool2d(images, 4)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        codes = [list(hashlib.blake2b(prompt.encode(), digest_size=16).digest()) for prompt in prompts]
        return Conditioning({"prompt_embeds": torch.tensor(codes).float()[:, None].repeat(1, 77, 1) + 1})

    def identity(self) -> Mapping[str, Mapping[str, object]]:
        return {"pictures": {"source": "pooling"}, "captions": {"source": "codes"}}


# in a process of its own
class Peak(threading.Thread):
    """The most anonymous memory, looked at twenty times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.mib = 0.0

    def look(self) -> float:
        status = Path("/proc/self/status").read_text()
        now = int(status.partition("RssAnon:")[2].split()[0]) / 1024
        self.mib = max(self.mib, now)
        return now

    def run(self) -> None:
        while True:
            self.look()
            time.sleep(0.05)


def work(what: str, file: str, cache: str) -> None:
    """Print a JSON line of what ``start`` or ``encode`` cost."""
    peak = Peak()
    before = peak.look()
    peak.start()
    started, wall = time.process_time(), time.perf_counter()
    pairs = PreferencePairs(file, cache_dir=cache)
    pairs.check()
    if what == "encode":
        data = pairs.prepare(Setup(Pooling(), progress=False))  # type: ignore[arg-type]
        data.batch(range(0, len(data), max(1, len(data) // 64)))
    peak.look()
    figures = {"cpu_seconds": time.process_time() - started, "wall_seconds": time.perf_counter() - wall}
    resident = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
    figures |= {"before_mib": before, "anonymous_mib": peak.mib, "resident_mib": resident}
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


def start_process(what: str, file: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--work", what, str(file), str(cache)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def measured(what: str, file: Path, cache: Path) -> dict[str, float]:
    process = start_process(what, file, cache)
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{what} of {file} ended with {process.returncode}")
    figures: dict[str, float] = json.loads(out.splitlines()[-1])
    return figures


def digest(cache: Path) -> str:
    """Of the tensors of all shards; the order in which safetensors writes a header is by chance."""
    found = hashlib.sha256()
    for file in sorted(cache.glob("*/*/*.safetensors")):
        found.update(f"{file.relative_to(cache)}".encode())
        for name, tensor in sorted(load_file(file).items()):
            found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def killed(file: Path, whole: Path, cache: Path) -> dict[str, Any]:
    """Kill an encoding half-way, go on, and compare with the whole one."""
    shards = len(list(whole.glob("pairs/*/latents-*.safetensors")))
    process = start_process("encode", file, cache)
    while len(there := list(cache.glob("pairs/*/latents-*.safetensors"))) < shards // 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    there = list(cache.glob("pairs/*/latents-*.safetensors"))
    times = {shard: shard.stat().st_mtime_ns for shard in there}
    again = measured("encode", file, cache)
    kept = sum(shard.stat().st_mtime_ns == made for shard, made in times.items())
    figures = {"shards": shards, "there_at_the_kill": len(there), "of_these_kept": kept}
    return figures | {"cpu_seconds": again["cpu_seconds"], "same_tensors": digest(cache) == digest(whole)}


# texts
def dense(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def sd35(rows: int) -> Conditioning:
    """77 tokens of two CLIPs (768 + 1280 features, zeros up to T5's 4,096), 256 of T5, its padding among them."""
    embeds = dense(rows, 77 + 256, 4096)
    embeds[:, :77, 768 + 1280 :] = 0
    return Conditioning({"prompt_embeds": embeds, "pooled": dense(rows, 2048)})


def sana(rows: int, tokens: int) -> Conditioning:
    """300 tokens of Gemma-2, those beyond a prompt's own masked; they are zeros in the cache of a masked family."""
    embeds, mask = dense(rows, 300, 2304), torch.zeros(rows, 300, dtype=torch.int64)
    embeds[:, tokens:] = 0
    mask[:, :tokens] = 1
    return Conditioning({"prompt_embeds": embeds, "mask": mask})


def text_sizes() -> list[dict[str, Any]]:
    lines = []
    cases = {"SD3.5": sd35(8), "a masked family, 30 of 300 tokens": sana(8, 30), "the same, 150 tokens": sana(8, 150)}
    for name, cond in cases.items():
        rows = len(cond)
        exact, small = pack(cond), pack(cond, "float8")
        sizes = [cond.nbytes, *(sum(t.nbytes for t in of.values()) for of in (exact, small))]
        lines.append(
            {"model": name} | dict(zip(("as_tensors", "disk", "float8"), (n / rows for n in sizes), strict=True))
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--encode_most", type=int, default=1_000_000, help="pairs that are encoded at most")
    args = parser.parse_args()
    if args.work:
        return work(*args.work)
    counts = (1_000, 10_000) if args.quick else (10_000, 100_000, 1_000_000)
    figures: dict[str, Any] = {"start": [], "encode": []}
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            file, cache = Path(folder, f"{count}.parquet"), Path(folder, f"cache-{count}")
            make_pairs(file, count)
            starts = {name: measured("start", file, cache) for name in ("first", "second")}
            bytes_ = sum(part.stat().st_size for part in cache.glob("index/*/*"))
            figures["start"].append({"pairs": count, "index_bytes": bytes_} | starts)
            print(json.dumps(figures["start"][-1]), file=sys.stderr, flush=True)
            if count <= args.encode_most:
                encoded = {name: measured("encode", file, cache) for name in ("first", "second")}
                figures["encode"].append({"pairs": count} | encoded)
                print(json.dumps(figures["encode"][-1]), file=sys.stderr, flush=True)
        first = Path(folder, f"{counts[0]}.parquet"), Path(folder, f"cache-{counts[0]}")
        figures["kill"] = {"pairs": counts[0]} | killed(*first, Path(folder, "killed"))
    figures["texts"] = {"prompts": PROMPTS, "bytes_a_caption": text_sizes()}
    record("data_size", figures, args.quick)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
