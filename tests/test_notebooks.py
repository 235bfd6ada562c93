"""Every notebook is run as it stands, on small real runs; in git it holds no outputs."""

import ast
import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
import written
from nbclient import NotebookClient
from tiny import TINY

from cil import run

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Notebook -> the figures that it shows of the runs below.
SHOWN = {
    "forgetting_curves": {"image/svg+xml": 4, "text/html": 1},  # the table
    "explanations": {"image/svg+xml": 1, "text/html": 3},
    "generation": {"image/svg+xml": 2, "text/html": 2},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two methods, one of which draws and explains, learned two experiences with two seeds.

    Images, runs and cache are named from there, as a user does.
    """
    folder = tmp_path_factory.mktemp("project")
    written.image_folder(folder / "images", ["a", "b", "c", "d"], train=8, test=4, side=16)
    words = ["--methods=[var,finetune]", "--seeds=[0,1]", "--runs=runs", "--cache=cache"]
    words += ["--stream.source=image_folder", "--stream.root=images", "--stream.image_size=16"]
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert run.main(["split_digits", *TINY, *words]) == 0
    finally:
        os.chdir(before)
    (folder / "notebooks").mkdir()
    return folder


def source_cell(notebook: Any) -> Any:
    """The one cell that a user changes."""
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    return cell


def by_name(path: Path) -> str:
    return path.stem


@pytest.mark.integration
@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_it_runs_and_shows_its_figures(
    path: Path, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = nbformat.read(path, as_version=4)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    resources = {"metadata": {"path": str(project / "notebooks")}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [out for c in notebook.cells if c.cell_type == "code" for out in c.outputs]
    assert not [out for out in outputs if out.output_type == "stream"]  # warnings, for one
    for kind, count in SHOWN[path.stem].items():
        shown = [out["data"][kind] for out in outputs if kind in out.get("data", {})]
        assert len(shown) == count
        if path.stem == "generation" and kind == "image/svg+xml":
            assert "<image" in shown[-1]  # edits, and no note that says why there are none
    assert not list((project / "notebooks").iterdir())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_in_git_it_holds_no_outputs_and_no_logic(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    assert source_cell(notebook) is cells[0]
    assert cells[0].source == 'SOURCE = "runs/split_digits"'
    for cell in cells:
        lines = [line for line in cell.source.splitlines() if not line.startswith("%")]
        assert len(lines) <= 8
        for node in ast.walk(ast.parse("\n".join(lines))):
            assert not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If | ast.While)
    text = path.read_text(encoding="utf-8")
    written = json.dumps(json.loads(text), indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    assert text == written  # so that a change shows as itself alone


def test_the_notebooks_are_those_that_are_checked() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(SHOWN)
