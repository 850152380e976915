"""The notebook runs from top to bottom and learns."""

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the Jupyter packages
def test_quickstart_runs_and_learns(monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # to compile in half the time
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all("outputs" not in cell or not cell.outputs for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    text = {
        i: "".join(output.get("text", "") for output in cell.get("outputs", []))
        for i, cell in enumerate(notebook.cells)
    }
    accuracies = [
        float(line.split()[-1])
        for output in text.values()
        for line in output.splitlines()
        if line.startswith("test accuracy")
    ]
    assert len(accuracies) == 2
    assert min(accuracies) > 0.85
    late_client, stopped, resumed = text[8], text[9], text[10]
    for output in (late_client, resumed):
        assert "True" in output and "False" not in output
    assert "stopped" in stopped and "resuming" in resumed and "200/200" in resumed
