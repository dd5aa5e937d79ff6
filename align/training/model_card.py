"""The model card that a run leaves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from rewards.common.files import write_text

if TYPE_CHECKING:
    pass


def add_to_card(path: Path, title: str, text: str) -> None:
    """Put a section into a model card, replacing its older self; without a card, nothing."""
    if path.is_file():
        kept = re.sub(
            rf"\n## {re.escape(title)}\n.*?(?=\n## |\Z)", "", path.read_text(encoding="utf-8"), flags=re.DOTALL
        )
        write_text(path, f"{kept.rstrip()}\n\n## {title}\n\n{text}\n")
