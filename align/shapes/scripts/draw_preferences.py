"""Make the shipped preference sets: pairs of pictures that a model drew for one caption, judged by the reward.

    python -m align.shapes.scripts.draw_preferences

Every caption is drawn with several seeds; the best and the worst picture by the graded reward become a pair, and
captions whose pictures all score alike are left out. Written in Pick-a-Pic's columns, a training split and a held-out
split of other captions. Given several guidance scales, a caption's pictures take turns at them (Pick-a-Pic's were drawn
at several, too). The pictures are JPEG, as there, and are judged as they are stored. Resumes where it stopped.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from align import families
from align.evaluation import gallery
from align.families import Family
from align.sampling import generate
from align.shapes.world import TASKS, caption
from rewards.common.files import atomic, write_text
from rewards.models.shapes import judge

# how often a caption of each task is drawn: most where the base model fails most
SHARES = {
    "single_object": 0.04,
    "two_objects": 0.16,
    "counting": 0.28,
    "colours": 0.06,
    "position": 0.24,
    "attribution": 0.22,
}


def jpeg(image: Tensor) -> bytes:
    """(3, H, W) in [0, 1] to JPEG bytes with full chroma, so that colours stay apart."""
    file = io.BytesIO()
    gallery.to_pil(image).save(file, "JPEG", quality=88, subsampling=0, optimize=True)
    return file.getvalue()


def seen(data: bytes) -> Tensor:
    """JPEG bytes to (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1) / 255


def captions(count: int, seed: int) -> list[str]:
    """``count`` captions over seen combinations in the shares above; one may come again, with other seeds."""
    rng = np.random.default_rng(seed)
    tasks, shares = list(SHARES), np.array([SHARES[task] for task in TASKS])
    return [caption(rng, tasks[rng.choice(len(tasks), p=shares)]) for _ in range(count)]


def held_out(text: str) -> bool:
    """Whether every pair of this caption belongs to the held-out split: one caption in six does."""
    return zlib.crc32(text.encode()) % 6 == 0


def drawn(
    family: Family, texts: list[str], first: int, each: int, steps: int, scales: Sequence[float | None]
) -> np.ndarray:
    """(N, ``each``, 3, H, W) in [0, 1]: pictures of each caption, seeds from ``first`` on, in turn at ``scales``."""
    end = first + each * len(texts)
    columns = [
        generate.sample_images(
            family.predict, family, texts, range(first + k, end, each), steps, scales[k % len(scales)], len(texts)
        )
        for k in range(each)
    ]
    return torch.stack(columns, 1).numpy()


def pair(number: int, text: str, pictures: np.ndarray) -> dict[str, Any] | None:
    """Best against worst of ``pictures`` (K, 3, H, W) in [0, 1] by the graded score, or None where all score alike. A
    coin keyed by ``number`` says on which side the winner stands."""
    files = [jpeg(torch.from_numpy(image)) for image in pictures]
    scores = [judge(text, seen(file))[1] for file in files]
    best, worst = int(np.argmax(scores)), int(np.argmin(scores))
    if scores[best] == scores[worst]:
        return None
    label = int(np.random.default_rng([7, number]).integers(2))
    left, right = (best, worst) if label else (worst, best)
    sides = {"jpg_0": files[left], "jpg_1": files[right]}
    return {"caption": text, **sides, "label_0": float(label), "label_1": float(1 - label)}


def save(rows: list[dict[str, Any]], path: Path) -> None:
    with atomic(path) as draft:
        pq.write_table(pa.Table.from_pylist(rows), draft, compression="zstd", row_group_size=256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes-sd")
    parser.add_argument("--output", type=Path, default=Path("align/shapes/shapes-preferences"))
    parser.add_argument("--work", type=Path, default=Path("outputs/preferences"), help="finished batches")
    parser.add_argument("--train", type=int, default=2100, help="training pairs")
    parser.add_argument("--held_out", type=int, default=300, help="held-out pairs")
    parser.add_argument("--seeds", type=int, default=3, help="pictures per caption")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--guidance", type=float, nargs="+", help="one or several scales; default: the pipeline's own")
    parser.add_argument("--batch", type=int, default=24, help="captions per batch")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    scales = args.guidance or [None]
    if len(scales) > args.seeds:
        parser.error(f"--guidance: {len(scales)} scales for {args.seeds} pictures per caption; raise --seeds")
    drawn_by = {name: getattr(args, name) for name in ("model", "seeds", "steps", "guidance", "batch")}
    begun = args.work / "settings.json"
    if begun.exists() and (found := json.loads(begun.read_text())) != drawn_by:
        parser.error(f"--work {args.work} holds pairs drawn by {found}, asked are {drawn_by}; give another folder")
    write_text(begun, json.dumps(drawn_by))
    args.output.mkdir(parents=True, exist_ok=True)
    texts = captions(4 * (args.train + args.held_out), 11)
    train: list[dict[str, Any]] = []
    other: list[dict[str, Any]] = []
    with multiprocessing.Pool() as judges, tqdm(total=args.train + args.held_out, desc="pairs") as bar:
        family = families.load(args.model, device=args.device)
        for start in range(0, len(texts), args.batch):
            part, path = texts[start : start + args.batch], args.work / f"{start:06d}.parquet"
            if not path.exists():
                groups = drawn(family, part, start * args.seeds, args.seeds, args.steps, scales)
                asked = [(start + k, part[k], groups[k]) for k in range(len(part))]
                save([row for row in judges.starmap(pair, asked) if row], path)
            for row in pq.read_table(path).to_pylist():
                (other if held_out(row["caption"]) else train).append(row)
            bar.n = min(len(train), args.train) + min(len(other), args.held_out)
            bar.refresh()
            if len(train) >= args.train and len(other) >= args.held_out:
                break
    save(train[: args.train], args.output / "train.parquet")
    save(other[: args.held_out], args.output / "heldout.parquet")


if __name__ == "__main__":
    main()
