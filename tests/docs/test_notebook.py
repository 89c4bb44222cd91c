"""The notebook in examples/ runs, and prints what is written in it."""

from __future__ import annotations

import importlib.util
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import nbformat
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = EXAMPLES / "first_ensemble.ipynb"
DECIMAL = re.compile(r"-?\d+\.\d+")


def run(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """As examples/run_notebook.py does."""
    spec = importlib.util.spec_from_file_location("run_notebook", EXAMPLES / "run_notebook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.run(notebook, folder)


def printed(cell: nbformat.NotebookNode) -> list[Any]:
    """The texts of a cell's outputs, and the kinds of those that are pictures."""
    return [output.text if output.output_type == "stream" else sorted(output.data) for output in cell.outputs]


def test_the_notebook_prints_what_is_written_in_it(tmp_path: Path) -> None:
    written = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(written)
    executed = deepcopy(written)
    for cell in (cells := [cell for cell in executed.cells if cell.cell_type == "code"]):
        cell.outputs = []
    run(executed, tmp_path)
    pairs = [(old, new) for old, new in zip(written.cells, executed.cells, strict=True) if new in cells]
    assert len(pairs) >= 6
    for before, after in pairs:
        expected, found = map(str, (printed(before), printed(after)))
        assert DECIMAL.sub("#", found) == DECIMAL.sub("#", expected)
        # Sums of floats round differently on other CPUs, and a close answer of the 100 may fall the other way.
        assert list(map(float, DECIMAL.findall(found))) == pytest.approx(
            list(map(float, DECIMAL.findall(expected))), abs=0.021
        ), f"{found}\n{expected}"
    assert executed.metadata == written.metadata


def test_the_notebook_links_to_pages_that_are_there() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    links = re.findall(r"\]\(([^)]+)\)", "\n".join(cell.source for cell in notebook.cells))
    assert links
    assert [link for link in links if not (EXAMPLES / link).is_file()] == []
