"""How ``rewards.score`` does at scale.

    python tests/benchmarks/scoring.py [--quick]

Throughput: what share of the wall time, from the first file opened to the last shard written, passes inside the
reward, at batch 32, over JPEG and PNG files of several sizes in random order. Batches are of one size, so it takes
about 32 pictures of each size until the first one is there: a cost of the start, which is why the share from then on
is given as well. CLIPScore runs on CLIP's own architectures
with random weights; "network" is the part of it inside the two towers, without resizing and cropping. On one core
nothing can run beside a network that fills that core. ``Elsewhere`` is there for that: a stand-in for an accelerator,
which takes half as long again as all the rest that is done for a picture, and leaves the core alone meanwhile.

Kills: the command is killed at ten random moments of scoring and then left to end. Every picture has to be there
once, with the score of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

import rewards  # isort: skip  first of all: it makes torchvision importable beside a CPU torch

from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from align.shapes.world import render
from rewards.data.formats import open_input
from rewards.models.clip_score import CLIPScore
from rewards.models.shapes import PALETTE, SHAPES, Shapes
from rewards.scoring.engine import ScoringEngine
from rewards.scoring.loader import Decoder
from rewards.scoring.output import ScoreShards
from tests.benchmarks import record

ROOT = Path(__file__).parents[2]
BATCH = 32
SIZES = ((1024, 1024), (896, 1152), (1216, 832), (768, 768), (512, 512), (480, 640))  # height, width
NETWORKS = {  # of the image tower and of the text tower
    "ViT-B/32": (
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 32},
        {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8},
        512,
    ),
    "ViT-L/14": (
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14},
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
        768,
    ),
}


class Elsewhere:
    """Takes ``seconds`` a picture and no core."""

    differentiable: ClassVar[bool] = False

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        time.sleep(self.seconds * len(images))
        return torch.zeros(len(images))


class Counted(Shapes):
    """Shapes that writes down, into the file ``log``, how many pictures it is asked about."""

    def __init__(self, log: str) -> None:
        super().__init__()
        self.log = Path(log)

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        scores = super().score(images=images, prompts=prompts, metadata=metadata)
        with self.log.open("a") as stream:
            stream.write(f"{len(images)}\n")
        return scores


# Throughput
def photographs(folder: Path) -> Path:
    """Four JPEG and four PNG files of each size."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for height, width in SIZES:
        for number in range(8):
            coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
            picture = coarse.resize((width, height), Image.Resampling.BICUBIC)
            picture.save(folder / f"{height}x{width}-{number}.{'jpg' if number % 2 else 'png'}", quality=92)
    return folder


def listed(folder: Path, sizes: int, batches: int) -> Path:
    """A list that names pictures of the first ``sizes`` sizes in random order, ``batches`` whole batches of each."""
    names = [
        file.name
        for height, width in SIZES[:sizes]
        for file in itertools.islice(itertools.cycle(sorted(folder.glob(f"{height}x{width}-*"))), batches * BATCH)
    ]
    random.Random(0).shuffle(names)
    lines = [json.dumps({"file_name": name, "text": f"a photograph of {name}"}) for name in names]
    path = folder / f"{sizes}-{batches}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def new_clip(folder: Path, name: str) -> CLIPScore:
    """CLIPScore on the architecture ``name`` with random weights and CLIP's own vocabulary."""
    words = SimpleTokenizer()
    rename = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {rename.get(piece, piece): number for piece, number in words.encoder.items()}
    CLIPTokenizer(vocab=vocab, merges=list(words.bpe_ranks), model_max_length=77).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    vision, text, width = NETWORKS[name]
    for tower in (vision, text):
        tower["intermediate_size"] = 4 * tower["hidden_size"]
    ends = {"bos_token_id": 49406, "eos_token_id": 49407}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text | ends, projection_dim=width)).save_pretrained(folder)
    return CLIPScore(str(folder), device="cpu")


@contextlib.contextmanager
def clocked(cls: Any, *methods: str) -> Iterator[list[tuple[float, float]]]:
    """Begin and end of every call of these ``methods`` while the context lasts."""
    calls: list[tuple[float, float]] = []
    originals = {name: getattr(cls, name) for name in methods}

    def timed(call: Any) -> Any:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                calls.append((start, time.perf_counter()))

        return replacement

    for name, call in originals.items():
        setattr(cls, name, timed(call))
    try:
        yield calls
    finally:
        for name, call in originals.items():
            setattr(cls, name, call)


def throughput(name: str, reward: rewards.Reward, table: Path, threads: int) -> dict[str, Any]:
    """Score what ``table`` lists and say where the time went."""
    source = open_input(str(table))
    with (
        tempfile.TemporaryDirectory() as folder,
        clocked(type(reward), "score") as inside,
        clocked(CLIPModel, "get_image_features", "get_text_features") as network,
    ):
        decoder = Decoder(source, None, 1024, BATCH, threads)
        scorer = ScoringEngine(
            decoder, {name: reward}, ScoreShards(Path(folder), {}), Path(folder) / "bad.jsonl", 0, "cpu"
        )
        start = time.perf_counter()
        rows = scorer.run(lambda shard: True, {})
        end = time.perf_counter()

    def share(calls: list[tuple[float, float]], since: float) -> float:
        return round(sum(after - before for before, after in calls) / (end - since), 4)

    figures = {
        "scorer": name,
        "images": rows,
        "mean_batch": round(rows / len(inside), 1),
        "threads": threads,
        "images_per_second": round(rows / (end - start), 2),
        "share_in_scorer": share(inside, start),
        "share_in_scorer_from_the_first_batch_on": share(inside, inside[0][0]),
    }
    if network:
        figures["share_in_network"] = share(network, start)
    print(json.dumps(figures), flush=True)
    return figures


def elsewhere(folder: Path, batches: int, threads: int) -> dict[str, Any]:
    """The stand-in, paced by what all but the reward costs here and now."""
    table = listed(folder, len(SIZES), 1)
    rest = 1 / throughput("nothing", Elsewhere(0), table, threads)["images_per_second"]
    table = listed(folder, len(SIZES), batches)
    figures = throughput("Elsewhere", Elsewhere(1.5 * rest), table, threads)
    return figures | {"rest_ms": round(1e3 * rest, 1), "share_if_one_waited_for_the_other": 0.6}


# Kills
def drawings(folder: Path, count: int) -> Path:
    """``count`` drawings of the embedded world with their captions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    captions = [f"a {colour} {shape}" for colour, shape in itertools.product(PALETTE, SHAPES)]
    with (folder / "metadata.jsonl").open("w") as stream:
        for number in range(count):
            caption = captions[number % len(captions)]
            # every third one shows something else, so that scores differ
            Image.fromarray(render(rng, captions[(number * 7) % len(captions)] if number % 3 == 0 else caption)).save(
                folder / f"{number}.png"
            )
            stream.write(json.dumps({"file_name": f"{number}.png", "text": caption}) + "\n")
    return folder


def started(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """The command as a process, as soon as it scores."""
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stream)
    while b"scoring" not in log.read_bytes():
        if process.poll() is not None:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {log.read_text()}")
        time.sleep(0.01)
    return process


def whole(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("scores-*.parquet")}


def contents(folder: Path) -> list[tuple[Any, ...]]:
    rows = []
    for path in sorted(folder.glob("scores-*.parquet")):
        rows += list(zip(*pq.read_table(path).to_pydict().values(), strict=True))
    return rows


def kills(root: Path, count: int, times: int, shard_size: int) -> dict[str, Any]:
    """Score ``count`` pictures, killed ``times`` times."""
    source = drawings(root / "drawings", count)

    def command(out: str) -> list[str]:
        shapes = f"{{name: tests.benchmarks.scoring.Counted, label: Shapes, args: {{log: {root / out}.log}}}}"
        words = ["-m", "rewards.score", str(source), "--reward", shapes, "--reward", "JPEGCompressibility"]
        return [sys.executable, *words, "--output", str(root / out), "--shard_size", str(shard_size)]

    process = started(command("quiet"), root / "stderr")
    start = time.perf_counter()
    assert process.wait() == 0
    span = time.perf_counter() - start
    moments, left = random.Random(0), []
    stamps: dict[str, int] = {}
    for _ in range(times):
        process = started(command("killed"), root / "stderr")
        time.sleep(moments.uniform(0, span / times))
        if process.poll() is not None:
            raise SystemExit(f"scoring ended before kill {len(left) + 1} of {times}; take more pictures")
        process.kill()
        process.wait()
        now = whole(root / "killed")
        assert now.items() >= stamps.items(), "a whole shard was written again"
        stamps = now
        left.append(len(stamps))
    subprocess.run(command("killed"), cwd=ROOT, check=True, capture_output=True)
    assert whole(root / "killed").items() >= stamps.items(), "a whole shard was written again"
    found, expected = contents(root / "killed"), contents(root / "quiet")
    seen = Counter(row[0] for row in found)
    asked = sum(map(int, (root / "killed.log").read_text().split()))
    figures = {
        "images": count,
        "kills": times,
        "shard_size": shard_size,
        "whole_shards_at_each_kill": left,
        "scored_exactly_once": sum(number == 1 for number in seen.values()),
        "missing": count - len(seen),
        "twice": sum(number > 1 for number in seen.values()),
        "equal_to_uninterrupted": found == expected and len(expected) == count,
        "computed_again_because_their_shard_was_open": asked - count,
        "seconds_uninterrupted": round(span, 1),
    }
    print(json.dumps(figures), flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer pictures, the smaller network, three kills")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="that decode")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        killed = kills(root, *((600, 3, 25) if args.quick else (5000, 10, 100)))
        folder = photographs(root / "photographs")
        shares = []
        for name, sizes in {"ViT-B/32": 2}.items() if args.quick else {"ViT-B/32": 6, "ViT-L/14": 2}.items():
            clip = new_clip(root / name.replace("/", "-"), name)
            shares.append(throughput(f"CLIPScore {name}", clip, listed(folder, sizes, 1), args.threads))
        shares.append(elsewhere(folder, 1 if args.quick else 4, args.threads))
    figures = {"batch": BATCH, "throughput": shares, "kills": killed}
    record("scoring", figures, args.quick)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
