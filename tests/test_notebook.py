"""The notebook runs from its first cell to its last, on a tiny model in the place of MiniLM, and is kept without outputs."""

import json
import re
from pathlib import Path

import pytest
from common import save_base

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples/quickstart.ipynb"


def test_it_is_kept_as_it_was_before_it_was_run():
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5 and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_every_cell_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    base = save_base(tmp_path / "base", "bert", "BertModel", hidden_size=64, intermediate_size=256)
    monkeypatch.setenv("QUICKSTART_BASE", str(base))
    monkeypatch.setenv("QUICKSTART_RECIPE", "quantized")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [
        "".join(each["text"] for each in cell.outputs if each.get("name") == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    dense, stored = map(float, re.search(r"([\d.]+) MB in float32, ([\d.]+) MB compressed", shown[1]).groups())
    assert 2 < dense / stored < 5  # rows of the tiny model are short, so their scales weigh much
    rows = [list(map(float, line.split()[-2:])) for line in shown[2].splitlines()[1:]]
    assert len(rows) == 3 and all(abs(base - compressed) < 0.05 for base, compressed in rows)
    assert re.search(r"agreement.*cosine: base 1\.0000, compressed 0\.99", shown[3])
    assert "bytes of weights" in shown[4]
    assert "# Evaluation of compressed" in (tmp_path / "report.md").read_text("utf-8")
