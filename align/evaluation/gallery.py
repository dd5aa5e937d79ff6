"""Images as files: one, a folder with captions, or a captioned grid."""

from __future__ import annotations

import contextlib
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from rewards.common.files import atomic, write_text

METADATA = "metadata.jsonl"
GAP, LABEL, GUTTER = 6, 26, 44  # pixels of a grid: between images, of a caption above them, of rows' names beside them


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] to an 8-bit image."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def save_png(image: Image.Image, path: Path) -> None:
    """Write one image, whole or not at all."""
    with atomic(path) as draft:
        image.save(draft, "PNG")


def save_folder(images: Tensor, texts: Sequence[str], seeds: Sequence[int], folder: Path) -> None:
    """Write images (N, 3, H, W) as ``00000.png``, .. and their captions and seeds as ``metadata.jsonl``: the layout of
    datasets' image folders; all of that or nothing, also where a signal or a full disk ends it."""
    rows = [
        {"file_name": f"{k:05d}.png", "prompt": text, "seed": seed}
        for k, (text, seed) in enumerate(zip(texts, seeds, strict=True))
    ]
    try:
        for row, image in zip(rows, images, strict=True):
            save_png(to_pil(image), folder / str(row["file_name"]))
        write_text(folder / METADATA, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except BaseException:  # the next start would refuse a folder with pictures
        with contextlib.suppress(OSError):
            for row in rows:
                (folder / str(row["file_name"])).unlink(missing_ok=True)
        raise


def save_grid(
    images: Tensor, captions: Sequence[str], path: Path, columns: int = 4, rows_of: Sequence[str] | None = None
) -> None:
    """Write :func:`grid` as a PNG."""
    save_png(grid(images, captions, columns, rows_of), path)


def grid(
    images: Tensor, captions: Sequence[str], columns: int = 4, rows_of: Sequence[str] | None = None
) -> Image.Image:
    """Images (N, 3, H, W) in [0, 1] as a captioned grid; small ones are enlarged to be seen.

    With ``rows_of`` (names such as base and tuned) ``images`` holds that many a caption, one under another.
    """
    deep = len(rows_of) if rows_of else 1
    side = max(128, images.shape[-1])
    count = len(captions)
    columns = min(columns, count)
    left = GUTTER if rows_of else 0
    rows = -(-count // columns)
    tile_h = side * deep + LABEL
    sheet = Image.new("RGB", (left + columns * (side + GAP), rows * (tile_h + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    for k, caption in enumerate(captions):
        x, y = left + (k % columns) * (side + GAP), (k // columns) * (tile_h + GAP)
        for d in range(deep):
            tile = to_pil(images[k * deep + d]).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(tile, (x, y + LABEL + d * side))
            if rows_of and k % columns == 0:
                pen.text((2, y + LABEL + d * side + side // 2 - 6), rows_of[d], fill="black")
        label_lines = textwrap.wrap(caption, side // 6, break_long_words=False)[:2]
        pen.text((x + 2, y), "\n".join(label_lines), fill="black", spacing=1)
    return sheet


def cut_grid(sheet: Image.Image, count: int, columns: int = 4) -> list[Image.Image] | None:
    """The ``count`` images of a grid that :func:`grid` made without ``rows_of``, one a caption; None where its
    size says that it is no such grid."""
    columns = min(columns, count)
    side = sheet.width // columns - GAP if columns else 0
    tile, rows = side + LABEL + GAP, -(-count // columns) if columns else 0
    if side < 1 or sheet.size != (columns * (side + GAP), rows * tile):
        return None
    places = [((k % columns) * (side + GAP), (k // columns) * tile + LABEL) for k in range(count)]
    return [sheet.crop((x, y, x + side, y + side)) for x, y in places]
