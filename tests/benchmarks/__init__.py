"""Scripts that measure; each writes ``results/NAME.json``, and ``make results`` puts those figures into the README."""

from __future__ import annotations

import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch

from align.files import write
from align.runs import provenance

RESULTS = Path(__file__).parent / "results"


def record(name: str, figures: dict[str, Any], quick: bool = False) -> None:
    """Write ``results/NAME.json``: figures with date, hardware, versions and commit. A quick run is only printed."""
    if quick:
        return
    hardware = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        hardware += f", {torch.cuda.get_device_name()}"
    content = {"date": date.today().isoformat(), "hardware": hardware, **figures, **provenance()}
    write(RESULTS / f"{name}.json", json.dumps(content, indent=2) + "\n")


def spread(values: list[float]) -> str:
    """``mean (min to max)`` over seeds."""
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})"
