"""Score a folder of images: ``python -m rewards.score images/ --reward Shapes --output scores.parquet``.

Prompts come from ``--prompts``, or from ``metadata.jsonl`` / ``metadata.csv`` in the folder (``file_name``, ``text``),
or from a ``.txt`` file beside each image. The output is a parquet table with the columns ``file``, ``prompt`` and one
per reward, in natural order of the file names.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from rewards import Reward, RewardError, available, checked, load, needs_prompt

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class UserError(Exception):
    """Something the user can put right; printed as one line."""


def natural(text: str) -> list[tuple[bool, int, str]]:
    """Sort key under which ``2.png`` comes before ``10.png``, and both before ``a.png``."""
    parts = re.findall(r"[0-9]+|[^0-9]+", text)
    return [(False, int(part), "") if part.isdigit() else (True, 0, part.lower()) for part in parts]


def list_images(folder: Path) -> list[str]:
    """Images anywhere below ``folder``: paths relative to it with forward slashes, in natural order."""
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    files = [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    if not files:
        raise UserError(f"no images ({', '.join(SUFFIXES)}) in {folder}")
    return sorted(files, key=natural)


def read_prompts(folder: Path, files: Sequence[str], source: Path | None) -> dict[str, str]:
    """Prompt of each file that has one; ``source`` is what the user named, if anything."""
    if source is None:
        for name in ("metadata.jsonl", "metadata.csv"):
            if (folder / name).is_file():
                return _by_name(folder / name, _rows(folder / name), files)
        sidecars = {file: (folder / file).with_suffix(".txt") for file in files}
        return {file: path.read_text("utf-8").strip() for file, path in sidecars.items() if path.is_file()}
    if not source.is_file():
        raise UserError(f"no such prompts file: {source}")
    if source.suffix.lower() == ".txt":
        lines = [line.strip() for line in source.read_text("utf-8").splitlines() if line.strip()]
        return _by_order(source, lines, files)
    rows = _rows(source)
    if all("file_name" in row for row in rows):
        return _by_name(source, rows, files)
    return _by_order(source, [_text(source, number, row) for number, row in enumerate(rows, start=1)], files)


def _rows(path: Path) -> list[Mapping[str, object]]:
    if path.suffix.lower() == ".csv":
        with path.open(newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))
    rows: list[Mapping[str, object]] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number} is not a JSON object")
            rows.append(row)
    return rows


def _text(path: Path, number: int, row: Mapping[str, object]) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        raise UserError(f"{path}, row {number} has no string 'text'; it has {', '.join(map(str, row)) or 'nothing'}")
    return text


def _by_name(path: Path, rows: Sequence[Mapping[str, object]], files: Sequence[str]) -> dict[str, str]:
    prompts = {str(row.get("file_name")): _text(path, number, row) for number, row in enumerate(rows, start=1)}
    return {file: prompts[file] for file in files if file in prompts}


def _by_order(path: Path, lines: Sequence[str], files: Sequence[str]) -> dict[str, str]:
    if len(lines) != len(files):
        raise UserError(f"{path} has {len(lines)} prompts for {len(files)} images; expected one per image, in order")
    return dict(zip(files, lines, strict=True))


def read_image(path: Path) -> Tensor:
    """One upright picture on white: (3, H, W) float32 in [0, 1]. ``OSError`` where it cannot be read."""
    try:
        with Image.open(path) as opened:
            if opened.mode.startswith(("I", "F")):  # PIL would clip these to white without a word
                raise OSError(f"{opened.mode} pixels; expected 8 bits a channel")
            image = ImageOps.exif_transpose(opened).convert("RGBA")
    except (SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:  # PIL's ways of saying broken
        raise OSError(str(error)) from error
    white = Image.new("RGBA", image.size, "white")
    pixels = np.array(Image.alpha_composite(white, image).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def batches(
    folder: Path, files: Sequence[str], batch_size: int, errors: dict[str, str]
) -> Iterator[tuple[list[str], Tensor]]:
    """Batches of images of one size, (B, 3, H, W); files that cannot be read go to ``errors`` with the reason."""
    waiting: dict[tuple[int, ...], dict[str, Tensor]] = {}
    for file in tqdm(files, desc="scoring", unit="image"):
        try:
            image = read_image(folder / file)
        except OSError as error:
            errors[file] = str(error)
            continue
        waiting.setdefault(image.shape, {})[file] = image
        # Where every image has a size of its own no batch fills up: then the fullest leaves, to bound the memory.
        crowded = sum(map(len, waiting.values())) >= 4 * batch_size
        fullest = max(waiting, key=lambda size: len(waiting[size]))
        if crowded or len(waiting[fullest]) == batch_size:
            batch = waiting.pop(fullest)
            yield list(batch), torch.stack(list(batch.values()))
    for batch in waiting.values():
        yield list(batch), torch.stack(list(batch.values()))


def score_files(
    folder: Path,
    files: Sequence[str],
    prompts: Mapping[str, str],
    rewards: Mapping[str, Reward],
    batch_size: int,
    errors: dict[str, str],
) -> dict[str, dict[str, float]]:
    """Scores by reward and file; unreadable files are left out and go to ``errors``."""
    scores: dict[str, dict[str, float]] = {name: {} for name in rewards}
    for names, images in batches(folder, files, batch_size, errors):
        texts = [prompts.get(name, "") for name in names]
        for title, reward in rewards.items():
            try:
                with torch.no_grad():
                    values = checked(reward, title, images, texts)
            except RewardError as error:
                where = names[0] if error.row is None else names[error.row]
                raise UserError(f"{where}: {error}") from error
            scores[title].update(zip(names, values.tolist(), strict=True))
    return scores


def write_table(
    path: Path, files: Sequence[str], prompts: Mapping[str, str], scores: Mapping[str, Mapping[str, float]]
) -> None:
    """Write the table under a temporary name, then rename, so that ``path`` is never half a file."""
    columns: dict[str, pa.Array] = {
        "file": pa.array(files, pa.string()),
        "prompt": pa.array([prompts.get(file) for file in files], pa.string()),
    }
    for name, values in scores.items():
        columns[name] = pa.array([values[file] for file in files], pa.float32())
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pq.write_table(pa.table(columns), partial)
    partial.replace(path)


def write_errors(path: Path, errors: Mapping[str, str]) -> None:
    """One JSON object a line; no errors, no file, so that none is left from an earlier run."""
    if errors:
        lines = [json.dumps({"file": file, "error": error}) for file, error in errors.items()]
        path.write_text("\n".join(lines) + "\n", "utf-8")
    else:
        path.unlink(missing_ok=True)


def run(arguments: argparse.Namespace) -> int:
    """The command; ``UserError`` where the user has something to put right."""
    folder, output = Path(arguments.folder), Path(arguments.output)
    if arguments.batch_size < 1:
        raise UserError(f"--batch_size is {arguments.batch_size}; expected at least 1")
    if output.suffix != ".parquet" or output.is_dir():
        raise UserError(f"--output is {output}; expected a file name that ends in .parquet")
    files = list_images(folder)
    try:
        rewards = {name: load(name) for name in arguments.reward}
    except RewardError as error:
        raise UserError(str(error)) from error
    prompts = read_prompts(folder, files, Path(arguments.prompts) if arguments.prompts else None)
    bare = [file for file in files if not prompts.get(file)]
    reading = [name for name, reward in rewards.items() if needs_prompt(reward)]
    if bare and reading:
        raise UserError(
            f"{', '.join(reading)} needs prompts, but {len(bare)} of {len(files)} images have none: "
            f"{', '.join(bare[:5])}{', …' if len(bare) > 5 else ''}; give --prompts, metadata.jsonl or .txt files"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    errors: dict[str, str] = {}
    scores = score_files(folder, files, prompts, rewards, arguments.batch_size, errors)
    error_list = output.with_name(output.name + ".errors.jsonl")
    write_errors(error_list, errors)
    good = [file for file in files if file not in errors]
    if not good:
        raise UserError(f"none of the {len(files)} images can be read; the reasons are in {error_list}")
    write_table(output, good, prompts, scores)
    for name, values in scores.items():
        print(f"{name}: mean {sum(values.values()) / len(values):.4f} over {len(values)} images")
    if errors:
        print(f"{len(errors)} of {len(files)} images cannot be read, see {error_list}", file=sys.stderr)
    return 1 if errors and not arguments.skip_errors else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 where images could not be read, 2 where the user made a mistake."""
    parser = argparse.ArgumentParser(prog="python -m rewards.score", description="Score a folder of images.")
    parser.add_argument("folder", help="searched for images, with its subfolders")
    parser.add_argument("--reward", action="append", required=True, metavar="NAME", help=", ".join(available()))
    parser.add_argument("--output", default="scores.parquet", help="parquet file (default: %(default)s)")
    parser.add_argument("--prompts", help=".jsonl or .csv (file_name, text), or .txt with one prompt per image")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--skip_errors", action="store_true", help="exit with 0 even if images cannot be read")
    try:
        return run(parser.parse_args(argv))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
