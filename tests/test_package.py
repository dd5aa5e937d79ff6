"""The rules that hold the packages together, and what a wheel carries."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from align.__main__ import COMMANDS, main
from tests.benchmarks import table

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "rewards": {"rewards"},
    "align": {"align", "rewards"},
    "pruning": {"pruning", "align", "rewards"},
}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_dependencies_point_one_way(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        ours = {name.partition(".")[0] for name in imports(file)} & set(MAY_IMPORT)
        assert ours <= MAY_IMPORT[package], f"{file} imports {ours - MAY_IMPORT[package]}"


def test_the_algebra_imports_only_torch() -> None:
    for file in (ROOT / "align/diffusion").glob("*.py"):
        outside = {name for name in imports(file) if name.partition(".")[0] not in sys.stdlib_module_names}
        assert {name for name in outside if not name.startswith("align.diffusion")} <= {"torch", "torch.nn"}, file


# B2-DiffuRL is a way to roll out and wraps the update rule that it is given
WRAPS = {"b2_diffurl.py": {"align.objectives.d3po", "align.objectives.policy_gradient"}}


PAPERS = {"b2_diffurl", "d3po", "dpo", "find", "nft", "opd", "policy_gradient", "reno"}


def test_objectives_do_not_import_one_another_or_a_family() -> None:
    for file in (ROOT / "align/objectives").rglob("*.py"):
        if file.name == "__init__.py":
            continue
        found = imports(file)
        others = {name for name in found if name.startswith("align.objectives.") and name.split(".")[2] in PAPERS}
        others |= found & {"align.families.sd", "align.families.sd3"}
        assert others == WRAPS.get(file.name, set()), f"{file.name} imports {others}"


def test_the_checkout_is_small() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    size = sum((ROOT / name).stat().st_size for name in listed.stdout.split("\0") if name and (ROOT / name).exists())
    assert size < 40e6


def exit_code(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """Of the command line, without a process of its own: each would import torch and diffusers anew."""
    monkeypatch.setattr(sys, "argv", ["t2i-align", *words])
    try:
        return main()
    except SystemExit as leaving:
        return leaving.code


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_is_readable(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert not exit_code([command, "--help"], monkeypatch)
    out = capsys.readouterr().out
    assert "usage:" in out
    assert len(out.splitlines()) > 5


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_no_argument_at_all_is_a_usage_error(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code([command], monkeypatch)
    assert "error:" in capsys.readouterr().err


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert not exit_code(["--help"], monkeypatch)
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


def test_a_command_runs_as_a_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "align.__main__", "score", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_the_results_page_shows_what_was_recorded() -> None:
    text = table.README.read_text(encoding="utf-8")
    assert table.BEGIN in text
    assert table.filled(text) == text, "run `make results`"


@pytest.mark.slow
def test_a_wheel_in_an_empty_environment_finds_everything(tmp_path: Path) -> None:
    """Built, installed without the checkout, imported elsewhere. Dependencies are borrowed from this environment."""
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT], check=True)
    wheel = next(tmp_path.glob("*.whl"))
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "empty"], check=True)
    python = tmp_path / "empty/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    borrowed = Path(sys.executable).parents[1] / f"lib/python3.{sys.version_info.minor}/site-packages"
    site = next((tmp_path / "empty/lib").glob("python*/site-packages"))
    for entry in borrowed.iterdir():
        if "t2i" not in entry.name and not (site / entry.name).exists() and not entry.name.endswith(".pth"):
            (site / entry.name).symlink_to(entry)
    script = (
        "import align, rewards, pruning, pathlib; from align import families; "
        "from align.data.preferences import read_pairs; "
        "assert 'empty' in align.__file__; "
        "print([families.load(name).prediction_type for name in ('shapes-sd', 'shapes-sd3')]); "
        "print(len(read_pairs('shapes-preferences', 'train')))"
    )
    done = subprocess.run([python, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "['epsilon', 'flow']" in done.stdout
