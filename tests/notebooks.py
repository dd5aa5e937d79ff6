"""Running the notebooks: in this process with small parameters, as tests do, or as Jupyter does, which renders them.

    make notebooks                                  # all, with their outputs, where they lie
    python -m tests.notebooks 1_your_own_pairs      # one

A notebook's cell that is tagged ``parameters`` holds plain numbers; others may be put in their place, as papermill
does.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import json
import os
import sys
import tempfile
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
QUALITY = 88  # of a stored picture
Notebook = dict[str, Any]


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name: str) -> Notebook:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def digest(notebook: Notebook) -> str:
    """Of all that is written in it: what its outputs belong to."""
    text = json.dumps([[cell["cell_type"], "".join(cell["source"])] for cell in notebook["cells"]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run(name: str, parameters: Mapping[str, object], until: str | None = None) -> dict[str, Any]:
    """Run the code of a notebook in this process and folder, or no further than the cell that holds ``until``; returns
    its names. Last expressions of cells are evaluated as Jupyter would, and have to be worth showing."""
    os.environ["MPLBACKEND"] = "Agg"
    module = types.ModuleType(f"notebook_{name}")
    sys.modules[module.__name__] = module  # what it defines is then importable by its path
    try:
        for cell in read(name)["cells"]:
            if cell["cell_type"] == "code":
                _run_cell("".join(cell["source"]), module.__dict__, f"{name}:{cell['id']}")
                if "parameters" in cell["metadata"].get("tags", ()):
                    unknown = parameters.keys() - module.__dict__.keys()
                    assert not unknown, f"{name} has no parameter {unknown}"
                    module.__dict__.update(parameters)
                if until is not None and until in "".join(cell["source"]):
                    break
    finally:
        del sys.modules[module.__name__]
    return module.__dict__


def _run_cell(source: str, scope: dict[str, Any], where: str) -> None:
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), where, "exec"), scope)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), where, "eval"), scope)
        called = isinstance(last.value, ast.Call) and value is None  # print(...), say
        assert called or value is not None, f"{where} ends with nothing to show"


def render(name: str) -> float:
    """Run a notebook as Jupyter does, in an empty folder, and store it with its outputs; returns how long it took."""
    import nbformat
    from nbclient import NotebookClient

    path = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    os.environ |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": folder}}).execute()
    seconds = time.perf_counter() - start
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [_small(output) for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata["rendered"] = digest(json.loads(nbformat.writes(notebook)))
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, path)
    return seconds


def _small(output: Any) -> Any:
    """An output whose pictures are JPEGs."""
    data = output.get("data", {})
    if "image/png" in data:
        image = Image.open(io.BytesIO(base64.b64decode(data.pop("image/png")))).convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=QUALITY, subsampling=0, optimize=True)
        data["image/jpeg"] = base64.b64encode(buffer.getvalue()).decode()
    return output


def main(asked: Sequence[str]) -> None:
    for name in asked or names():
        print(f"{name}: {render(name):.0f} s, {(FOLDER / f'{name}.ipynb').stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
