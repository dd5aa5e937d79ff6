"""What the Markdown files name is there: links, anchors, images, configs, modules."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HIDDEN = {".git", ".venv", "outputs", "build", ".mirror", "node_modules"}
PAGES = sorted(
    file
    for top in (ROOT, *(ROOT / name for name in ("align", "rewards", "pruning", "tests", "notebooks", "configs")))
    for file in (top.glob("*.md") if top == ROOT else top.rglob("*.md"))
    if not HIDDEN & set(file.relative_to(ROOT).parts)
)


@cache
def anchors(file: Path) -> frozenset[str]:
    """The names that GitHub gives to the headings of ``file``."""
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
    heads = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ +(.+)$", text, re.M)]
    return frozenset(heads)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_images_resolve(page: Path) -> None:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file.resolve())):
            wrong.append(target)
    assert not wrong, f"{page} links to {wrong}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_configs_scripts_and_modules_are_there(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return  # tells of what is gone, too
    text = page.read_text(encoding="utf-8")
    files = re.findall(r"\b(?:configs|notebooks|tests/benchmarks)/\w+\.(?:yaml|py)\b", text)
    assert not [name for name in files if not (ROOT / name).exists()]
    ours = re.findall(r"-m ((?:align|rewards|pruning|tests)(?:\.\w+)+)", text)
    assert not [name for name in ours if importlib.util.find_spec(name) is None]


def test_the_readme_is_read_in_a_minute() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180
