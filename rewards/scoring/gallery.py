"""One HTML page, without anything outside it, that shows pictures beside their scores."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

SIDE = 192  # pixels of a thumbnail's longer edge
_STYLE = (
    "body{font:14px sans-serif;margin:2em}section{display:flex;flex-wrap:wrap;gap:12px}"
    f"figure{{margin:0;width:{SIDE}px;overflow-wrap:anywhere}}figcaption{{font-size:12px}}img{{max-width:100%}}"
)


@dataclass(frozen=True)
class Shown:
    """A picture (3, H, W) uint8 with what is written below it."""

    file: str
    prompt: str | None
    scores: Mapping[str, float]
    picture: Tensor


def page(title: str, sections: Mapping[str, Sequence[Shown]]) -> str:
    """The page: a heading and the pictures of each section, in the order given."""
    body = "".join(
        f"<h2>{html.escape(heading)}</h2><section>{''.join(map(_figure, shown))}</section>"
        for heading, shown in sections.items()
    )
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n"


def _figure(shown: Shown) -> str:
    thumbnail = Image.fromarray(shown.picture.permute(1, 2, 0).numpy())
    thumbnail.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    thumbnail.save(buffer, format="JPEG", quality=85)
    source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    scores = "<br>".join(f"<b>{html.escape(name)} {value:.4g}</b>" for name, value in shown.scores.items())
    text = f"{scores}<br>{html.escape(shown.prompt or '')}<br><small>{html.escape(shown.file)}</small>"
    return f'<figure><img src="{source}" alt="{html.escape(shown.file)}"><figcaption>{text}</figcaption></figure>'
