"""LAION's aesthetic heads on LAION's nine vectors: what they publish comes out, from numbers kept in the repository."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rewards.models.aesthetic import new_head
from rewards.models.network import unit
from tests.goldens.aesthetic import FILE, made

SOURCE = Path(__file__).parents[2] / "shared/data/aesthetic"
# of the vectors of ratings 1 to 9: as published, to two decimals, and by the files in float64 (2026-11-26)
PUBLISHED = {
    "linear": [-0.14, 1.9, 3.58, 5.1, 6.47, 7.79, 9.05, 10.23, 11.3],
    "mlp": [2.36, 3.07, 3.67, 4.24, 4.7, 5.07, 5.37, 5.58, 5.75],
}
EXACT = {
    "linear": [-0.137857, 1.895110, 3.584934, 5.099726, 6.470104, 7.786990, 9.048002, 10.226408, 11.304426],
    "mlp": [2.359275, 3.069824, 3.672451, 4.238010, 4.701021, 5.073054, 5.365362, 5.576664, 5.746761],
}


def head_weights(kept: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """As a checkpoint has them. Five maps of which the first does it all, and the others hand on its first number, are
    the published five: there is nothing between these."""
    weight, bias = (kept[f"{name}.{part}"] for part in ("weight", "bias"))
    if name == "linear":
        return {"weight": weight, "bias": bias}
    found = {}
    for number, (outputs, inputs) in {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}.items():
        layer, shift = torch.zeros(outputs, inputs), torch.zeros(outputs)
        if number == 0:
            layer[0], shift[0] = weight[0], bias[0]
        else:
            layer[0, 0] = 1
        found |= {f"layers.{number}.weight": layer, f"layers.{number}.bias": shift}
    return found


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_vectors_have_their_published_scores(name: str) -> None:
    kept = load_file(FILE)
    head = new_head(768, head_weights(kept, name))
    with torch.no_grad():
        scores = head(unit(3.0 * kept["vectors"])).squeeze(-1)  # the length of an embedding does not matter
        raw = head(3.0 * kept["vectors"]).squeeze(-1)
    assert scores.tolist() == pytest.approx(EXACT[name], abs=2e-5)
    assert [round(score, 2) for score in EXACT[name]] == PUBLISHED[name]
    assert (raw - scores).abs().mean() > 0.5  # what forgetting to normalise does


@pytest.mark.skipif(not SOURCE.is_dir(), reason="LAION's files are not in the repository")
def test_what_is_kept_is_laions() -> None:
    kept, again = load_file(FILE), made(SOURCE)
    assert kept.keys() == again.keys()
    for name, value in again.items():
        torch.testing.assert_close(kept[name], value, rtol=1e-9, atol=1e-12)
