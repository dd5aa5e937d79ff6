"""Makes ``aesthetic.safetensors`` from LAION's published files: ``python -m tests.goldens.aesthetic SOURCE``.

SOURCE is a folder with ``rating1.npy`` ... ``rating9.npy`` (nine published CLIP L/14 embeddings, one a rating),
``sa_0_4_vit_l_14_linear.pth`` (LAION-AI/aesthetic-predictor, MIT) and ``sac+logos+ava1-l14-linearMSE.pth``
(christophschuhmann/improved-aesthetic-predictor, Apache-2.0). The second head is five linear maps with nothing between
them, 3.7 MB, and so is one linear map, 6 kB, which is kept in float64.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.benchmarks.convert_weights import read_state

FILE = Path(__file__).with_suffix(".safetensors")
LINEAR, MLP = "sa_0_4_vit_l_14_linear.pth", "sac+logos+ava1-l14-linearMSE.pth"


def made(source: Path) -> dict[str, Tensor]:
    """``vectors`` (9, 768), and ``weight`` (1, 768) and ``bias`` (1,) of each head."""
    linear, layers = (read_state(source / name) for name in (LINEAR, MLP))
    weight, bias = torch.eye(768, dtype=torch.float64), torch.zeros(768, dtype=torch.float64)
    for number in (0, 2, 4, 6, 7):
        layer, shift = (layers[f"layers.{number}.{part}"].double() for part in ("weight", "bias"))
        weight, bias = layer @ weight, layer @ bias + shift
    vectors = [torch.from_numpy(np.load(source / f"rating{number}.npy")).flatten() for number in range(1, 10)]
    heads = {"linear.weight": linear["weight"], "linear.bias": linear["bias"], "mlp.weight": weight, "mlp.bias": bias}
    return {"vectors": torch.stack(vectors), **heads}


if __name__ == "__main__":
    draft = FILE.with_suffix(".tmp")
    save_file(made(Path(sys.argv[1])), draft, metadata={"provenance": " ".join((__doc__ or "").split())})
    draft.chmod(0o644)
    draft.replace(FILE)
