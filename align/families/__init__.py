"""A family hides diffusers: one file for each kind of pipeline."""

from align.common.resolution import Resolution, sides
from align.families.captions import Truncated, tell_truncated
from align.families.conditioning import Conditioning
from align.families.family import Family, GuidanceKind, Scale
from align.families.folder import LORA_FILE, SAMPLING_FILE, Unsupported
from align.families.loading import (
    DTYPES,
    FAMILIES,
    READERS,
    find,
    load,
    of,
    pipeline_class,
    reader,
    set_attention_backend,
    stock_latents,
    stock_scheduler,
    tuned,
    what_is_tuned,
)
from align.families.lora_file import LoRAFile, load_lora, lora_path, read_lora

__all__ = ["DTYPES", "FAMILIES", "LORA_FILE", "READERS", "SAMPLING_FILE", "Conditioning", "Family", "GuidanceKind"]
__all__ += ["LoRAFile", "Scale", "Unsupported", "find", "load", "load_lora", "lora_path", "of", "pipeline_class"]
__all__ += ["read_lora", "reader", "set_attention_backend", "stock_latents", "stock_scheduler", "tell_truncated"]
__all__ += ["Resolution", "Truncated", "sides", "tuned", "what_is_tuned"]
