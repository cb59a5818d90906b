"""The notebook, run from top to bottom on the demo's model.

``python -m tests.scripts.tour`` stores its outputs in demo/tour.ipynb, after ``make demo``.
"""

import nbformat
from nbclient import NotebookClient

from tests.conftest import ROOT

PATH = ROOT / "demo" / "tour.ipynb"


def executed() -> nbformat.NotebookNode:
    """The notebook with the outputs of a run, without times."""
    notebook = nbformat.read(PATH, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    folder = {"metadata": {"path": str(PATH.parent)}}
    NotebookClient(notebook, timeout=600, resources=folder, record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # without the log's lines, which name folders and machine
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def kinds(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """What each cell puts out: texts and pictures."""
    return [
        [
            kind
            for output in cell.get("outputs", [])
            for kind in sorted(output.get("data", ["text"]))
        ]
        for cell in notebook.cells
    ]


if __name__ == "__main__":
    nbformat.write(executed(), PATH)
