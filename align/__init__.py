"""Fine-tune text-to-image diffusion pipelines through a pluggable objective."""

import rewards  # noqa: F401  first: it makes torchvision importable beside a CPU torch
