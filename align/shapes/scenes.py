"""The embedded world's own images: captions and renders of them, as many as asked for, drawn when they are read."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from align.data.captioned import Images, Rows
from align.data.dataset import Example
from align.shapes import world


@dataclass(frozen=True)
class Rendered:
    """Scene ``row`` of the world that ``column`` (a seed) names: a caption over seen combinations, and its image."""

    row: int
    column: str
    file: Path = Path(world.__file__)  # a cache holds until the renderer changes

    def _scene(self) -> tuple[np.random.Generator, str]:
        rng = np.random.default_rng([int(self.column), self.row])
        return rng, world.caption(rng, world.TASKS[rng.integers(len(world.TASKS))])

    @property
    def caption(self) -> str:
        return self._scene()[1]

    def data(self) -> bytes:
        """A PNG of 64 x 64 pixels."""
        file = io.BytesIO()
        Image.fromarray(world.render(*self._scene())).save(file, "PNG")
        return file.getvalue()


@dataclass
class Scenes(Images):
    """``limit`` scenes (default 8192), tasks in equal shares; ``path`` is a number, the seed that names them."""

    path: str = "0"

    def rows(self) -> Rows:
        images = [Rendered(row, self.path) for row in range(self.limit or 8192)]
        examples = (Example(image.row, f"scene {image.row}", image.caption, (image,)) for image in images)
        return "rendered scenes", [Path(world.__file__)], examples
