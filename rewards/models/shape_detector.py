"""Finds flat-coloured objects on a plain ground and names their colour and shape, without a network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

UNKNOWN = "unknown"
SIDE = 64  # every picture is looked at with its shorter side at this many pixels; the thresholds below assume it

_SPECK = 20.0  # pixels of area below which a blob is dirt; the smallest object that the world draws has 79
_FAINT = 0.2  # coverage (0 ground .. 1 palette colour) up to which a pixel is ground
_REACH = 7  # pixels; a blob's edge is where it falls to half of the strongest pixel within this window
_OFF_PALETTE = 80.0  # RGB distance (0..255) from the nearest palette colour at which a colour has no name
_FLOOR = 0.8  # template IoU below which a shape has no name
_TURNS = tuple(range(-15, 16, 3))  # degrees by which templates are turned
_GRID = 32  # templates are _GRID x _GRID cells over [-_SPAN, _SPAN] in units of sqrt(area)
_SPAN = 1.05
_OVERSAMPLING = 8  # of a template's outline


@dataclass(frozen=True)
class DetectedObject:
    """An object seen in a picture. ``x, y`` is its centroid and ``area`` its area, in pixels of that picture;
    ``fit`` is the IoU with the best ideal shape. ``shape`` and ``colour`` may be ``"unknown"``."""

    shape: str
    colour: str
    x: float
    y: float
    area: float
    fit: float


class Finder:
    """Finds objects of the colours in ``palette`` (name -> RGB, 0..255) and the shapes in ``outlines``
    (name -> corners as (radius, angle) around the centroid, angles in radians, y downwards)."""

    def __init__(
        self,
        palette: Mapping[str, tuple[int, int, int]],
        outlines: Mapping[str, tuple[tuple[float, float], ...]],
    ) -> None:
        self.names = tuple(palette)
        self.colours = np.array(list(palette.values()), dtype=np.float32)  # (C, 3)
        self.shapes = tuple(shape for shape in outlines for _ in _TURNS)  # (K,)
        self.templates = np.stack([_template(corners, turn) for corners in outlines.values() for turn in _TURNS])

    def __call__(self, image: Tensor) -> list[DetectedObject]:
        """Objects in one picture (3, H, W), float in [0, 1]; the largest comes first.

        The ground is the median of the border, so it may have any colour that no object has.
        """
        scale = SIDE / min(image.shape[-2:])
        small = image.detach().float().cpu()
        if scale != 1.0:
            size = [round(side * scale) for side in image.shape[-2:]]
            small = functional.interpolate(small[None], size, mode="bilinear", antialias=True)[0]
        objects = sorted(self._detect(small.permute(1, 2, 0).numpy() * 255.0), key=lambda one: -one.area)
        return [replace(one, x=one.x / scale, y=one.y / scale, area=one.area / scale**2) for one in objects]

    def _detect(self, pixels: np.ndarray) -> Iterator[DetectedObject]:
        """Objects in a picture (H, W, 3) with values 0..255 at the working size."""
        from scipy import ndimage

        coverage, colour = self._unmix(pixels)
        strongest = ndimage.maximum_filter(coverage, _REACH)
        solid = coverage > np.maximum(_FAINT, 0.5 * np.minimum(strongest, 1.0))
        for index in np.unique(colour[solid]):
            labels, _ = ndimage.label(solid & (colour == index))
            for number, (ys, xs) in enumerate(ndimage.find_objects(labels), start=1):
                window = (slice(max(ys.start - 1, 0), ys.stop + 1), slice(max(xs.start - 1, 0), xs.stop + 1))
                mask = labels[window] == number
                core = ndimage.binary_erosion(mask, border_value=1)
                if mask.sum() < _SPECK or not core.any():  # dirt, or the seam where two touching colours mix
                    continue
                level = np.median(coverage[window][core])
                alpha = np.minimum(coverage[window] / level, 1.0) * ndimage.binary_dilation(mask)
                area = float(alpha.sum())
                y = float(alpha.sum(axis=1) @ np.arange(alpha.shape[0])) / area
                x = float(alpha.sum(axis=0) @ np.arange(alpha.shape[1])) / area
                shape, fit = self._name_shape(alpha, x, y, area)
                name = self._name_colour(pixels[window][core])
                yield DetectedObject(shape, name, x + window[1].start + 0.5, y + window[0].start + 0.5, area, fit)

    def _unmix(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How much of which palette colour covers the ground at each pixel: coverage (H, W), colour index (H, W).

        A pixel is ``ground + coverage * (colour - ground)``. The colour is the one whose direction from the
        ground is nearest, so the mixed pixels of a soft edge get the colour of their object and not, as with the
        nearest colour, that of a third one half way to it.
        """
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        away = pixels - np.median(border, axis=0)
        towards = self.colours - np.median(border, axis=0)
        length = np.maximum(np.linalg.norm(towards, axis=1), 1.0)
        colour = (away @ (towards / length[:, None]).T).argmax(axis=-1)
        return np.linalg.norm(away, axis=-1) / length[colour], colour

    def _name_shape(self, coverage: np.ndarray, x: float, y: float, area: float) -> tuple[str, float]:
        """Best template and its IoU for one object: its coverage (h, w) in [0, 1], centroid and area in pixels."""
        from scipy import ndimage

        cells = (np.arange(_GRID) + 0.5) * (2 * _SPAN / _GRID) - _SPAN
        rows, columns = np.meshgrid(y + cells * math.sqrt(area), x + cells * math.sqrt(area), indexing="ij")
        seen = ndimage.map_coordinates(coverage, [rows.ravel(), columns.ravel()], order=1, mode="constant") > 0.5
        shared = self.templates @ seen.astype(np.float32)
        overlap = shared / (self.templates.sum(axis=1) + seen.sum() - shared)
        best = int(overlap.argmax())
        fit = float(overlap[best])
        return (self.shapes[best] if fit >= _FLOOR else UNKNOWN), fit

    def _name_colour(self, pixels: np.ndarray) -> str:
        """Palette name nearest to the median of ``pixels`` (n, 3), or "unknown"."""
        distance = np.linalg.norm(self.colours - np.median(pixels, axis=0), axis=1)
        return self.names[int(distance.argmin())] if distance.min() < _OFF_PALETTE else UNKNOWN


def _template(corners: tuple[tuple[float, float], ...], degrees: float) -> np.ndarray:
    """The filled, turned polygon with unit area on the template grid: (_GRID * _GRID,) of 0 or 1."""
    turn = math.radians(degrees)
    points = np.array([(r * math.cos(a + turn), r * math.sin(a + turn)) for r, a in corners])
    following = np.roll(points, -1, axis=0)
    area = 0.5 * abs((points[:, 0] * following[:, 1] - points[:, 1] * following[:, 0]).sum())
    side = _GRID * _OVERSAMPLING
    canvas = Image.new("L", (side, side))
    on_canvas = (points / math.sqrt(area) / _SPAN + 1) * (side / 2)
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in on_canvas], fill=255)
    return (np.asarray(canvas.resize((_GRID, _GRID), Image.Resampling.BOX)) > 127).astype(np.float32).ravel()
