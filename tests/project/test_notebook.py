"""The notebook runs from its first cell to its last, and its policy learns."""

from __future__ import annotations

import json
import os

import nbformat
import pytest
from nbclient import NotebookClient

from tests.project.code import ROOT

NOTEBOOK = ROOT / "docs" / "ppo_in_python.ipynb"

pytestmark = pytest.mark.slow


def test_the_notebook_runs_and_its_policy_learns() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    check = "import json; print(json.dumps([n['score'] for n in trainer.history]))"
    notebook.cells.append(nbformat.v4.new_code_cell(check))
    os.environ["PYTHONPATH"] = str(ROOT)
    client = NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute()
    scores = json.loads(notebook.cells[-1].outputs[0]["text"])
    assert len(scores) == 8
    assert scores[-1] > scores[0] + 0.1
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert pictures


def test_the_notebook_is_committed_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") for cell in cells)
