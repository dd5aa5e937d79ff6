"""What a model folder is called and says of itself beside its parts."""

from __future__ import annotations

import json
import math
from pathlib import Path

from align.common.assets import locate
from align.common.errors import UserError
from align.common.renames import upgrade

LORA_FILE = "pytorch_lora_weights.safetensors"
SAMPLING_FILE = "sampling.json"  # a folder may say which guidance, steps and resolution its pipeline was made for
LEAST = {"num_inference_steps": 1, "resolution": 1, "guidance_scale": 0}


class Unsupported(UserError):
    """A model folder that is missing, or of a pipeline class without a family."""


def recommendations(source: str) -> dict[str, float]:
    """What ``sampling.json`` in ``source`` says, by the names in :data:`LEAST`. Raises :class:`Unsupported`."""
    path = Path(locate(source)) / SAMPLING_FILE
    try:
        content = upgrade(json.loads(path.read_text())) if path.is_file() else {}
        found = {name: float(value) for name, value in content.items() if name in LEAST}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Unsupported(f"{path} is no JSON object of numbers: {error}") from error
    for name, value in found.items():
        if not math.isfinite(value) or value < LEAST[name]:
            raise Unsupported(f"{path}: {name} is {value}; expected a number of at least {LEAST[name]}")
    return found
