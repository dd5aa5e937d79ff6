"""The notebooks run, show what their code gives, are small, and end at the reader's own model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests import notebooks

TINY: dict[str, dict[str, object]] = {
    "1_your_own_pairs": {"pairs": 32, "held_out": 8, "steps": 2, "prompts": 4},
    "2_a_reward": {"updates": 2, "prompts": 2, "images": 2, "held_out": 4, "inference_steps": 4},
    "3_people": {"prompts": 3, "images": 3, "answers": 9, "updates": 1, "judged": 4, "inference_steps": 4},
    "4_small": {"heal_steps": 1, "scenes": 64},
    "5_choose_a_reward": {"images_per_prompt": 2, "inference_steps": 2, "pairs": 12},
}
QUICK = ("5_choose_a_reward",)
LIMIT = 400_000  # bytes


def test_every_notebook_is_tried() -> None:
    assert sorted(TINY) == notebooks.names()


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in sorted(TINY)])
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope = notebooks.run(name, TINY[name])
    if name == "1_your_own_pairs":
        assert (tmp_path / "outputs/pairs/pytorch_lora_weights.safetensors").is_file()
        assert scope["report"]["prompts"] == 4
    if name == "2_a_reward":
        assert (tmp_path / "outputs/redness.html").is_file() and len(scope["sheets"]) == 2
    if name == "3_people":
        second = (tmp_path / "answers2.jsonl").read_text().splitlines()
        assert len(scope["said"]) == len(second) == 9  # each of 3 prompts' 3 pairs, once
        assert scope["report"]["models"] == ["base", "run1", "run2"]
    if name == "4_small":
        assert set(scope["scores"]) == {"whole", "pruned", "healed", "4 bit"}
        assert scope["packed"].after < scope["packed"].before / 2
    if name == "5_choose_a_reward":
        assert scope["status"] == 0 and scope["images"].shape == (12, 3, 64, 64)


def test_people_answer_by_post_where_there_is_no_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notebook 3 up to its answers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    scope = notebooks.run("3_people", TINY["3_people"], until="shot = ask_people")
    assert len(scope["said"]) == 9 and scope["shot"] is None
    assert {line["label"] for line in scope["said"]} <= {"a", "b", "tie"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TINY))
def test_a_notebook_runs_as_jupyter_runs_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{name}.ipynb").write_text((notebooks.FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    notebooks.render(name)
    assert (tmp_path / f"{name}.ipynb").stat().st_size < LIMIT


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_notebook_shows_what_its_code_gave(name: str) -> None:
    notebook = notebooks.read(name)
    assert notebook["metadata"].get("rendered") == notebooks.digest(notebook), "its cells changed: run `make notebooks`"
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) >= 2
    assert (notebooks.FOLDER / f"{name}.ipynb").stat().st_size < LIMIT


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_notebook_ends_at_the_readers_model_and_its_links_lead_somewhere(name: str) -> None:
    cells = notebooks.read(name)["cells"]
    assert cells[-1]["cell_type"] == "markdown" and "## Now with your model" in "".join(cells[-1]["source"])
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert targets and not [target for target in targets if not (notebooks.FOLDER / target).exists()]
