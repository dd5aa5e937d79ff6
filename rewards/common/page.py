"""What commands show of their results: tables, and one HTML page of images with nothing outside it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from PIL import Image

SIDE = 352  # pixels of a thumbnail's longer edge: twice what the page gives it, for screens of double density


@dataclass(frozen=True)
class Table:
    """Columns by ``head``, rows of cells; a row may end early."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table as GitHub's Markdown, every cell as it reads here."""
        rows = [list(map(escape, row)) + [""] * (len(self.head) - len(row)) for row in (self.head, *self.rows)]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([lines[0], "|---" * len(self.head) + "|", *lines[1:]])


def escape(text: str) -> str:
    """Markdown that reads as ``text`` does, on one line."""
    return re.sub(r"(?<!\w)_|_(?!\w)|[\\`*\[\]<>|~#&$]", r"\\\g<0>", " ".join(text.split()))


def data_uri(image: Image.Image, side: int) -> str:
    """A JPEG of ``image``, made smaller where an edge is longer than ``side``, as the ``src`` of an ``img``."""
    thumbnail = image.convert("RGB")
    thumbnail.thumbnail((side, side))
    return _source(thumbnail, "JPEG", quality=90, subsampling=0)


def _source(image: Image.Image, kind: str, **how: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True)
class Figure:
    """An image with what is written below it: scores, a text, and whose it is, a file's or a model's name."""

    image: Image.Image
    name: str
    scores: Mapping[str, float]
    text: str = ""

    @property
    def source(self) -> str:
        """The image's thumbnail as the ``src`` of an ``img``."""
        return data_uri(self.image, SIDE)


@dataclass(frozen=True)
class Card:
    """Figures under one heading."""

    title: str
    figures: Sequence[Figure]


@dataclass(frozen=True)
class Page:
    """A page: heading, introduction, charts as they are, tables, then cards in the order given."""

    title: str
    introduction: str = ""
    tables: Sequence[Table] = ()
    cards: Sequence[Card] = ()
    charts: Sequence[Image.Image] = ()

    @property
    def chart_sources(self) -> list[str]:
        """The charts, without loss, as the ``src`` of an ``img``."""
        return [_source(chart, "PNG") for chart in self.charts]

    def html(self) -> str:
        """The page by ``page.html.j2``, which escapes every text."""
        return render(self, "rewards.common", "page.html.j2")


def render(page: object, package: str, template: str) -> str:
    """The HTML of ``page`` by the ``template`` of ``package``, which may extend ``page.html.j2``. Texts are escaped."""
    import jinja2

    def source(name: str) -> str:
        return files(package if name == template else "rewards.common").joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(source),
    )
    return environment.get_template(template).render(page=page)
