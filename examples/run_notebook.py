"""Run examples/first_ensemble.ipynb and write what it prints into it: python examples/run_notebook.py"""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_name("first_ensemble.ipynb")


def run(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Execute a notebook in `folder`. Its outputs stay, without warnings, times and the versions of this machine."""
    metadata = dict(notebook.metadata)
    client = NotebookClient(
        notebook, timeout=600, record_timing=False, coalesce_streams=True, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(metadata)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    run(notebook, NOTEBOOK.parent)
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
