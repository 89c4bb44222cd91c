"""The tables of the results pages and the reports in benchmarks/results are those of the committed rows."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.scripts import run_script

ROOT = Path(__file__).parents[2]


def printed_by(script: str, *options: str) -> set[str]:
    """Return the lines of tables that a script of benchmarks/ prints."""
    return {line for line in run_script(f"benchmarks/{script}", *options).splitlines() if line.startswith("|")}


def test_the_tables_of_the_results_are_those_of_the_rows() -> None:
    page = (ROOT / "docs" / "results.md").read_text("utf-8").splitlines()
    lines = [line for line in page if line.startswith("|")]
    assert len(lines) > 25
    printed = printed_by("portllm_tables.py") | printed_by("digits_tables.py")
    assert [line for line in lines if line not in printed] == []


def test_the_figures_of_the_demo_family_are_those_of_its_rows() -> None:
    pytest.importorskip("scipy")
    page = (ROOT / "docs" / "demo-family.md").read_text("utf-8").splitlines()
    lines = [line for line in page if re.search(r"\| .*\d to \d", line)]  # with an interval
    assert len(lines) >= 5
    printed = printed_by("demo_family.py", "--table")
    assert [line for line in lines if line not in printed] == []


@pytest.mark.parametrize("name", ["bench/demo", "sweeps/demo"])
def test_a_committed_report_is_the_one_that_its_rows_make(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from make_results import write_files

    def texts(folder: Path) -> list[str]:
        """The lines beside the pictures, which another version of matplotlib may draw otherwise."""
        page = (folder / "report.html").read_text("utf-8")
        return re.sub("<svg.*?</svg>", "<svg>", page, flags=re.DOTALL).splitlines()

    assert {"summary.json", "curve.png", "methods.png", "report.html"} <= set(write_files(name, tmp_path))
    assert texts(tmp_path) == texts(ROOT / "benchmarks" / "results" / name)


def test_figures_of_rows_alone_are_those_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the models and the data themselves; all but the hash of the documents, which rows do not hold."""
    pytest.importorskip("scipy")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from rows_to_figures import replay

    from ensembler.demo import demo_recipe
    from ensembler.evaluation.benchmark import Bench
    from ensembler.evaluation.recipe_file import read_recipe
    from ensembler.evaluation.summary import summarise

    of_rows = replay("bench/demo")
    planned = Bench(read_recipe(demo_recipe()))
    expected = summarise(planned.studies, of_rows.results)
    found = summarise(of_rows.studies, of_rows.results)
    assert len(expected) == 2
    assert [replace(task, tests="") for task in found] == [replace(task, tests="") for task in expected]
