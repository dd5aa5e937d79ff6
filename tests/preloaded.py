"""What the process has imported from which tests fork others: once for all of them, and nothing of it is looked through
again by their garbage collections. Each fork would otherwise do for itself what a command imports where it needs it."""

import gc
import importlib

from align.common import bitsandbytes_shim

gc.disable()  # imports leave no garbage worth half of their time
bitsandbytes_shim.ensure()
for name in (
    "align.train", "align.training.trainer", "tests.helpers", "align.labelling.server",
    "datasets", "pandas", "onnxruntime",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "transformers.models.clip.modeling_clip", "transformers.models.t5.modeling_t5",
):  # fmt: skip
    importlib.import_module(name)
gc.freeze()
gc.enable()
