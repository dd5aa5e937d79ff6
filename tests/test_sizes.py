"""The arithmetic of sizes: against published counts, the method page's figures, and files really written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

from pruning.linear4bit import bytes_of
from pruning.nf4 import NF4
from pruning.quantize import quantize
from pruning.saving import save
from tests.benchmarks import sizes
from tests.benchmarks.sizes import Row

pytestmark = pytest.mark.slow  # full-size configs of the paper's tables


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return sizes.rows()


def near(found: float, gigabytes: float) -> bool:
    return abs(found / 1e9 / gigabytes - 1) < 0.01


def test_the_configs_are_those_of_the_published_models(rows: list[Row]) -> None:
    """Counts of the released checkpoints."""
    counts = {row.name: row.parameters for row in rows}
    assert counts["SDXL U-Net"] == 2_567_463_684
    assert counts["FLUX.1-schnell transformer"] == 11_891_178_560
    assert counts["T5-XXL encoder"] == 4_762_310_656
    assert counts["CLIP L text model"] == 123_650_304
    assert counts["CLIP bigG text model"] == 694_659_840
    assert round(counts["SD3.5-large transformer"] / 1e9, 2) == 8.06


# parameters, bf16, NF4, NF4 with double quantisation
@pytest.mark.parametrize(
    ("at", "figures"),
    [
        (0, (8.06, 16.1, 4.53, 4.16)),
        (1, (6.36, 12.7, 3.58, 3.28)),
        (2, (5.76, 11.5, 3.24, 2.97)),
        (3, (11.9, 23.8, 6.69, 6.14)),
    ],
)
def test_the_figures_of_the_method_page(rows: list[Row], at: int, figures: tuple[float, ...]) -> None:
    row = rows[at]
    for found, expected in zip((row.parameters, row.bf16, row.nf4, row.nf4_double), figures, strict=True):
        assert near(found, expected), (row.name, found, expected)


def test_flux_a_third_smaller_is_in_the_range_of_the_method_page(rows: list[Row]) -> None:
    row = rows[4]
    for found, low, high in ((row.parameters, 7.9, 8.5), (row.bf16, 15.9, 17.0), (row.nf4, 4.4, 4.8)):
        assert low <= found / 1e9 <= high


def test_the_linears_of_one_sd3_block_are_36_squares_of_the_width() -> None:
    whole, pruned = sizes.meta(sizes.SD35_LARGE), sizes.meta(sizes.SD35_LARGE, sizes.EIGHT_BLOCKS)
    block = whole.get_submodule("transformer_blocks.25")
    matrices = sum(p.numel() for p in block.parameters() if p.ndim == 2)
    assert matrices == 36 * 2432**2
    gone = sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in pruned.parameters())
    assert gone == 8 * sum(p.numel() for p in block.parameters())
    assert all(p.is_meta for p in whole.parameters())


def test_a_sum_is_the_sum_of_its_parts(rows: list[Row]) -> None:
    by_name = {row.name: row for row in rows}
    parts = ("SD3.5-large transformer", "CLIP L text model", "CLIP bigG text model", "T5-XXL encoder")
    total = by_name["SD3.5-large with its text encoders"]
    assert total.file_nf4 == sum(by_name[name].file_nf4 for name in parts)
    assert total.parameters == sum(by_name[name].parameters for name in parts)


@pytest.mark.parametrize("double", [False, True])
def test_a_file_is_as_large_as_the_arithmetic_says(double: bool, tmp_path: Path) -> None:
    """Within 1 % of what is written, whose header and JSON per layer are not counted."""
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 64,
        "num_attention_heads": 8,
        "joint_attention_dim": 128,
        "caption_projection_dim": 512,
        "pooled_projection_dim": 128,
        "pos_embed_max_size": 8,
    }
    row = sizes.row("", sizes.meta((sizes.diffusers, "SD3Transformer2DModel", config)))
    model = torch.nn.Module.to(SD3Transformer2DModel(**config), torch.bfloat16)
    assert bytes_of(model) == row.file_bf16
    quantize(model, NF4(double_quant=double))
    save(model, tmp_path / "model")
    written = (tmp_path / "model/diffusion_pytorch_model.safetensors").stat().st_size
    expected = row.file_nf4_double if double else row.file_nf4
    assert written == pytest.approx(expected, rel=0.01)


def test_the_command_prints_a_table_with_every_row(rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    assert sizes.main([]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(rows)
    assert lines[2].startswith("| SD3.5-large transformer | 8.06 B | 16.11 | 4.53 | 4.16 |")
