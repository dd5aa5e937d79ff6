"""Model cards: every snippet loads what the card lies beside, and what users wrote stays text."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard as Parsed
from torch import nn

from align import families
from align.policy.initial_noise import InitialNoise
from align.train import main
from align.training.model_card import ModelCard, add_section, code
from pruning import compress
from tests.helpers import HOSTILE, TEXTS, online, prompt_file, same, write

ODD = "it's \"odd\" '); raise SystemExit('run as code') #"


def run_snippets(card: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Execute every block of Python in a card; what it leaves."""
    text = card.read_text(encoding="utf-8")
    blocks = re.findall(r"^(`{3,})python\n(.*?)\n\1$", text, re.DOTALL | re.MULTILINE)
    assert blocks
    scope: dict[str, Any] = {}
    monkeypatch.chdir(card.parent)
    for _, block in blocks:
        assert "dtype=torch." in block or ", torch.float" in block
        exec(block, scope)
    return scope


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return same(a.state_dict(), b.state_dict())


@pytest.fixture
def base(tiny_folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folders["flow"], tmp_path / ODD))


@pytest.fixture
def config(base: Path, tmp_path: Path) -> dict[str, Any]:
    sampler = {"num_inference_steps": 2, "guidance_scale": 2.0}
    return online(base, tmp_path, "PolicyGradient", sampler=sampler, images_per_prompt=2) | {
        "max_train_steps": 1, "output_dir": str(tmp_path / f"run {ODD}")
    }  # fmt: skip


@pytest.mark.parametrize("lora", [{"rank": 2}, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("embedded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_card_of_a_run_loads_it(
    config: dict[str, Any], base: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any] | None, embedded: bool
) -> None:
    source = "shapes-sd3" if embedded else str(base)
    assert main(["--config", write(config, lora=lora, pretrained_model_name_or_path=source)]) == 0
    folder = Path(config["output_dir"])
    pipe = run_snippets(folder / "README.md", monkeypatch)["pipe"]
    assert same_weights(pipe.transformer, families.tuned(families.load(source), str(folder)).denoiser)
    data = Parsed((folder / "README.md").read_text()).data
    license = "apache-2.0" if embedded else None  # the other one's folder says nothing
    assert (data.base_model, data.library_name, data.license) == (source, "diffusers", license)
    assert ("lora" in data.tags) == (lora is not None)


def test_the_card_of_learned_noise_draws_with_it(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"sampler": {"num_inference_steps": 2, "guidance_scale": 2.0}, "images_per_prompt": 4}
    config["objective"] = {"class_path": "FIND", "init_args": arguments}
    config["data"]["init_args"]["path"] = prompt_file(tmp_path, [HOSTILE[1], *TEXTS[:2]])
    assert main(["--config", write(config, train_batch_size=64)]) == 0
    noise = run_snippets(Path(config["output_dir"]) / "README.md", monkeypatch)["noise"]
    assert isinstance(noise, InitialNoise) and noise.prompts[0] == HOSTILE[1]
    assert (Path(config["output_dir"]) / "0.png").is_file()


def test_the_cards_of_compressed_pipelines_load_them(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "pretrained_model_name_or_path": str(base), "output_dir": str(tmp_path / f"out {ODD}"), "blocks": "1",
        "prompts": prompt_file(tmp_path, TEXTS), "heal": None, "dtype": "float32",
    }  # fmt: skip
    (tmp_path / "compress.yaml").write_text(yaml.safe_dump(settings))
    assert compress.main(["--config", str(tmp_path / "compress.yaml"), "--stages", "[plan,remove,quantize]"]) == 0
    for name in ("pruned", "int4", "int4-alone"):
        card = Path(settings["output_dir"]) / name / "README.md"
        pipe = run_snippets(card, monkeypatch)["pipe"]
        assert len(pipe.transformer.transformer_blocks) == (3 if name == "int4-alone" else 2)
        assert pipe.vae.dtype == torch.float32
        assert ("Removed from the denoiser" in card.read_text()) == (name != "int4-alone")


@pytest.mark.parametrize("text", HOSTILE)
def test_what_users_wrote_is_text(tmp_path: Path, text: str) -> None:
    card = ModelCard(title=text, base_model=text, introduction="", load=f"x = {text!r}", sections={"Plan": code(text)})
    data = Parsed(card.text())
    assert data.data.base_model == text
    (heading,) = re.findall("^# (.*)$", data.text, re.MULTILINE)
    assert re.sub(r"\\(.)", r"\1", heading) == text
    assert not re.search(r"(?<!\\)[<>\[\]`*|]", heading)


def test_no_text_ends_a_block_of_code() -> None:
    assert code("a\n```\nb\n````\nc", "yaml") == "`````yaml\na\n```\nb\n````\nc\n`````"


def test_a_section_takes_its_own_place(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    add_section(path, "Figures", "1")
    assert not path.exists()
    path.write_text(ModelCard(title="t", base_model="b", introduction="i", load="pass").text())
    for figure in ("1", "2"):
        add_section(path, "Figures", figure)
    assert path.read_text().endswith("## Load\n\n```python\npass\n```\n\n## Figures\n\n2\n")
