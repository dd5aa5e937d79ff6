"""A family hides diffusers: one file for each kind of pipeline."""

from align.families.family import LORA_FILE, SAMPLING_FILE, Conditioning, Family, Unsupported
from align.families.loading import (
    DTYPES,
    FAMILIES,
    READERS,
    find,
    load,
    of,
    pipeline_class,
    reader,
    tuned,
    what_is_tuned,
)

__all__ = ["DTYPES", "FAMILIES", "LORA_FILE", "READERS", "SAMPLING_FILE", "Conditioning", "Family", "Unsupported"]
__all__ += ["find", "load", "of", "pipeline_class", "reader", "tuned", "what_is_tuned"]
