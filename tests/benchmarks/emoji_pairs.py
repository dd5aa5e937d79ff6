"""A preference set with an exact label from real pictures: the same emoji drawn by Noto and by OpenMoji.

    python -m tests.benchmarks.emoji_pairs --output /tmp/emoji [--layouts]

Noto is always preferred. Writes train.parquet and heldout.parquet (other captions) in Pick-a-Pic's columns, 64 x 64 PNG
on white, and contact.png to look at; with ``--layouts`` the training set in the other layouts as well. The icons
come from the npm packages @iconify-json/noto (Apache-2.0) and @iconify-json/openmoji (CC BY-SA 4.0), fetched with
``npm pack``; drawing them needs ``pip install resvg_py``. The same packages give the same files.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIDE = 64
STYLES = ("noto", "openmoji")  # winner, loser
VERSIONS = {"noto": "1.2.9", "openmoji": "1.2.29"}  # other versions have other drawings
SKIPPED = ("skin-tone", "flag-")  # near duplicates; and flags look alike in both styles


@dataclass(frozen=True)
class Pair:
    """A caption and its two PNGs."""

    name: str
    chosen: bytes
    rejected: bytes

    @property
    def caption(self) -> str:
        return self.name.replace("-", " ")


def icons(style: str, folder: Path) -> dict[str, Any]:
    """An icon set from ``icons.json`` in npm's package, which is fetched into ``folder`` when it is not there."""
    unpacked = folder / style / "icons.json"
    if unpacked.is_file():
        return dict(json.loads(unpacked.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    version = VERSIONS[style]
    archive = folder / f"iconify-json-{style}-{version}.tgz"
    if not archive.is_file():
        subprocess.run(["npm", "pack", "--silent", f"@iconify-json/{style}@{version}"], cwd=folder, check=True)
    with tarfile.open(archive) as package:
        file = package.extractfile("package/icons.json")
        if file is None:
            raise FileNotFoundError(f"no icons.json in npm's @iconify-json/{style}")
        return dict(json.loads(file.read()))


def names(sets: Sequence[dict[str, Any]]) -> list[str]:
    """The icons drawn in every set, without aliases, hidden ones and near duplicates."""
    shown = [{name for name, icon in one["icons"].items() if not icon.get("hidden")} for one in sets]
    return sorted(name for name in set.intersection(*shown) if not any(word in name for word in SKIPPED))


def render(one: dict[str, Any], name: str) -> bytes:
    """A 64 x 64 RGB PNG of an icon on white."""
    import resvg_py

    icon = one["icons"][name]
    left, top = icon.get("left", one.get("left", 0)), icon.get("top", one.get("top", 0))
    width, height = icon.get("width", one.get("width", 16)), icon.get("height", one.get("height", 16))
    box = f'viewBox="{left} {top} {width} {height}" width="{SIDE}" height="{SIDE}"'
    links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    drawn = resvg_py.svg_to_bytes(
        svg_string=f"<svg {links} {box}>{icon['body']}</svg>",
        width=SIDE,
        height=SIDE,
        background="#ffffff",
        skip_system_fonts=True,  # the same picture on every machine
    )
    out = io.BytesIO()
    Image.open(io.BytesIO(bytes(drawn))).convert("RGB").save(out, "PNG")
    return out.getvalue()


def pairs(folder: Path) -> list[Pair]:
    """All pairs, in an order that does not follow the alphabet."""
    sets = [icons(style, folder) for style in STYLES]
    found = [Pair(name, *(render(one, name) for one in sets)) for name in names(sets)]
    found = [pair for pair in found if pair.chosen != pair.rejected]
    return [found[index] for index in np.random.default_rng(0).permutation(len(found))]


def pick_a_pic(found: Sequence[Pair], file: Path, seed: int) -> None:
    """Parquet with Pick-a-Pic's columns; which side holds the winner is drawn at random."""
    first = np.random.default_rng(seed).random(len(found)) < 0.5
    columns = {
        "caption": [pair.caption for pair in found],
        "jpg_0": [pair.chosen if wins else pair.rejected for pair, wins in zip(found, first, strict=True)],
        "jpg_1": [pair.rejected if wins else pair.chosen for pair, wins in zip(found, first, strict=True)],
        "label_0": [float(wins) for wins in first],
        "label_1": [float(not wins) for wins in first],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file, row_group_size=100)


def write_layouts(found: Sequence[Pair], folder: Path, seed: int = 1) -> dict[str, Path]:
    """The same pairs in every layout that ``PreferencePairs`` knows; returns what to read, by layout."""
    places = {name: folder / name for name in ("siblings", "imagefolder", "pairs", "hpdv2", "shards", "saved")}
    stems = [f"{index:05d}" for index in range(len(found))]
    for stem, pair in zip(stems, found, strict=True):
        pictures = {
            f"siblings/chosen/{stem}.png": pair.chosen,
            f"siblings/rejected/{stem}.png": pair.rejected,
            f"siblings/chosen/{stem}.txt": pair.caption.encode(),
            f"imagefolder/{stem}.png": pair.chosen,
            f"imagefolder/rejected/{stem}.png": pair.rejected,
            f"pairs/images/{stem}-w.png": pair.chosen,
            f"pairs/images/{stem}-l.png": pair.rejected,
            f"hpdv2/images/{stem}-0.png": pair.rejected,
            f"hpdv2/images/{stem}-1.png": pair.chosen,
        }
        for path, data in pictures.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
    rows = list(zip(stems, [pair.caption for pair in found], strict=True))
    metadata = [{"file_name": f"{s}.png", "rejected_file_name": f"rejected/{s}.png", "text": c} for s, c in rows]
    plain = [{"prompt": c, "chosen": f"images/{s}-w.png", "rejected": f"images/{s}-l.png"} for s, c in rows]
    paths = [[f"images/{s}-0.png", f"images/{s}-1.png"] for s in stems]
    ranked = [{"prompt": c, "file_path": p, "human_preference": [0, 1]} for (_, c), p in zip(rows, paths, strict=True)]
    (folder / "imagefolder/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metadata))
    (folder / "pairs/pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    (folder / "hpdv2/train.json").write_text(json.dumps(ranked))
    half = len(found) // 2
    for index, part in enumerate((found[:half], found[half:])):
        pick_a_pic(part, folder / f"shards/train-{index:05d}-of-00002.parquet", seed + index)
    save_to_disk(found, places["saved"])
    return places


def save_to_disk(found: Sequence[Pair], folder: Path) -> None:
    """A `datasets` folder whose pictures have that library's Image type."""
    from datasets import Dataset, Features, Value
    from datasets import Image as Encoded

    columns = {
        "caption": [pair.caption for pair in found],
        "jpg_0": [{"bytes": pair.chosen, "path": None} for pair in found],
        "jpg_1": [{"bytes": pair.rejected, "path": None} for pair in found],
        "label_0": [1.0] * len(found),
        "label_1": [0.0] * len(found),
    }
    kinds = {"caption": Value("string"), "jpg_0": Encoded(), "jpg_1": Encoded()}
    features = Features(kinds | {"label_0": Value("float64"), "label_1": Value("float64")})
    Dataset.from_dict(columns, features=features).save_to_disk(str(folder))


def contact(found: Sequence[Pair], file: Path, columns: int = 8, rows: int = 10) -> None:
    """A sheet of pairs, the winner left of the loser."""
    sheet = Image.new("RGB", (columns * (2 * SIDE + 8), rows * (SIDE + 8)), "grey")
    for index, pair in enumerate(found[: columns * rows]):
        x, y = index % columns * (2 * SIDE + 8), index // columns * (SIDE + 8)
        for shift, data in enumerate((pair.chosen, pair.rejected)):
            sheet.paste(Image.open(io.BytesIO(data)), (x + shift * SIDE, y))
    sheet.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--cache", type=Path, default=Path("~/.cache/t2i-align/icons"), help="where npm packages are put"
    )
    parser.add_argument("--icons", type=Path, help="folder with noto/icons.json and openmoji/icons.json instead")
    parser.add_argument("--heldout", type=int, default=150, help="pairs whose captions are not trained on")
    parser.add_argument("--layouts", action="store_true", help="write the training set in the other layouts too")
    options = parser.parse_args()
    found = pairs((options.icons or options.cache).expanduser())
    heldout, train = found[: options.heldout], found[options.heldout :]
    pick_a_pic(train, options.output / "train.parquet", seed=1)
    pick_a_pic(heldout, options.output / "heldout.parquet", seed=2)
    contact(train, options.output / "contact.png")
    if options.layouts:
        write_layouts(train, options.output / "layouts")
    print(f"{len(train)} pairs to train on, {len(heldout)} held out, in {options.output}")


if __name__ == "__main__":
    main()
