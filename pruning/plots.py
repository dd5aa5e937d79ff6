"""Pruning in images: the block stack of a plan, and the heat map of a profile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from align.evaluation.gallery import save_png

if TYPE_CHECKING:
    from pruning.plan import Plan

_FATES = {"goes": "#f4d6d2", "frozen": "#9fbfdf", "heals": "#9fd0a8"}
_LINE = 20  # pixels


def stack(plan: Plan, path: Path) -> None:
    """Write a PNG of the block stack, first block on top: what goes, what is frozen, what heals. Bars are as long as
    blocks are large; where only parts go, that share of the bar is struck out."""
    font, margin, full = ImageFont.load_default(13), 250, 420
    whole = [name for name in plan.sizes if name not in plan.owners]
    biggest = max(plan.sizes[name] for name in whole)
    fates = {n: "goes" if n in plan.dropped else "frozen" if n in plan.frozen else "heals" for n in whole}
    parts = {name: [part for part, owner in plan.owners.items() if owner == name] for name in whole}
    notes = {}
    for name in whole:
        short = ", ".join(part.removeprefix(f"{name}.") for part in parts[name])
        notes[name] = f"{fates[name]}   {plan.sizes[name]:,}" + (f"   without {short}" if short else "")
    wide = max(
        margin + full + 24 + max(font.getlength(note) for note in notes.values()), 16 + font.getlength(plan.text())
    )
    sheet = Image.new("RGB", (round(wide), _LINE * (len(whole) + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((8, 4), plan.text(), fill="black", font=font)
    for k, (fate, colour) in enumerate(_FATES.items()):
        pen.rectangle((8 + 110 * k, _LINE + 8, 24 + 110 * k, _LINE + 22), colour, "black")
        pen.text((30 + 110 * k, _LINE + 6), fate, fill="black", font=font)
    for k, name in enumerate(whole):
        y, size, fate = _LINE * (k + 3), plan.sizes[name], fates[name]
        end = margin + max(2, round(full * size / biggest))
        lost = size if fate == "goes" else sum(plan.sizes[part] for part in parts[name])
        cut = end - round((end - margin) * lost / size)
        pen.text((8, y + 1), f"{k:3d}  {name}", fill="black", font=font)
        pen.rectangle((margin, y + 2, end, y + _LINE - 2), _FATES[fate], "black")
        if cut < end:
            pen.rectangle((cut, y + 2, end, y + _LINE - 2), _FATES["goes"], "black")
            pen.line((cut, y + _LINE // 2, end, y + _LINE // 2), "#b03020", 2)
        pen.text((margin + full + 12, y + 1), notes[name], fill="black", font=font)
    save_png(sheet, path)


def heatmap(profile: Mapping[str, Any], path: Path) -> None:
    """Write a PNG of units by measures; within a column, darker is more important, for seconds slower."""
    blocks, cell, font = profile["blocks"], 110, ImageFont.load_default(13)
    margin = 20 + round(max(font.getlength(name) for name in profile["units"]))
    columns: dict[str, list[float | None]] = {"drop": [], "mse": [], "cosine": [], "seconds": []}
    for name, entry in profile["units"].items():
        members = [blocks[n] for n in name.split("+")]
        cosines = [m["cosine"] for m in members if m["cosine"] is not None]
        columns["drop"].append(entry["drop"])
        columns["mse"].append(entry["mse"])
        columns["cosine"].append(min(cosines) if len(cosines) == len(members) else None)
        columns["seconds"].append(sum(m["seconds"] for m in members))
    columns = {name: values for name, values in columns.items() if any(v is not None for v in values)}
    title = f"{profile['settings']['model']}: what each loss costs"
    side = max(margin + cell * len(columns) + 10, 16 + round(font.getlength(title)))
    sheet = Image.new("RGB", (side, _LINE * (len(profile["units"]) + 3)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((8, 4), title, fill="black", font=font)
    for k, name in enumerate(profile["units"]):
        pen.text((8, _LINE * (k + 2) + 2), name, fill="black", font=font)
    for c, (name, values) in enumerate(columns.items()):
        pen.text((margin + cell * c + 6, _LINE + 2), name, fill="black", font=font)
        signed = [None if v is None else -v if name == "cosine" else v for v in values]
        known = [v for v in signed if v is not None]
        low, wide = min(known), max(known) - min(known)
        for k, (value, weight) in enumerate(zip(values, signed, strict=True)):
            if value is None or weight is None:
                continue
            dark = (weight - low) / wide if wide else 0.0
            x, y = margin + cell * c, _LINE * (k + 2)
            pen.rectangle((x, y, x + cell - 2, y + _LINE - 2), _shade(dark))
            pen.text((x + 6, y + 1), f"{value:.4g}", fill="white" if dark > 0.6 else "black", font=font)
    save_png(sheet, path)


def _shade(dark: float) -> tuple[int, int, int]:
    light, deep = (245, 240, 225), (120, 20, 50)
    red, green, blue = (round(a + (b - a) * dark) for a, b in zip(light, deep, strict=True))
    return red, green, blue
