"""Figures in the README are those of the committed rows."""

from __future__ import annotations

import lzma
import re
import sqlite3
from functools import cache
from pathlib import Path

from helpers.scripts import load_script, run_script

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


RIGHT = """
    SELECT alpha, 100.0 * avg(coalesce(metric_values ->> 'exact_match', metric_values ->> 'acc'))
    FROM measurements
    JOIN points ON points.id = point
    JOIN documents ON documents.id = document
    WHERE points.run = ? AND rule = ? AND part = ?
    GROUP BY alpha ORDER BY alpha
"""


@cache
def open_rows(benchmark: str) -> sqlite3.Connection:
    database = sqlite3.connect(":memory:")
    database.deserialize(lzma.decompress((RESULTS / "bench" / benchmark / "results.sqlite.xz").read_bytes()))
    return database


def accuracy(benchmark: str, run: str, rule: str, alpha: float | None = 0.0) -> str:
    """Return the percent of right test documents; without `alpha` at the one that is best on validation."""
    rows = open_rows(benchmark)
    if alpha is None:
        validation = [row for row in rows.execute(RIGHT, (run, rule, "validation")) if row[0] > 0]
        alpha = max(validation, key=lambda row: row[1])[0]
    return f"{dict(rows.execute(RIGHT, (run, rule, 'test')))[alpha]:.1f}"


def test_the_table_of_the_readme() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    for start, benchmark, run, fits in (
        ("| demo family, new base larger |", "demo", "larger", False),
        ("| demo family, new base updated |", "demo", "updated", True),
        ("| SmolLM2-135M, SST-2, new base updated |", "smollm2", "sst2", True),
    ):
        expected = [
            accuracy(benchmark, f"{run}.ensemble", "base-change"),
            accuracy(benchmark, f"{run}.ensemble", "base-change", None),
            accuracy(benchmark, f"{run}.ensemble", "eft", None),
            accuracy(benchmark, f"{run}.patched", "eft") if fits else "does not fit",
            accuracy(benchmark, f"{run}.direct", "linear"),
        ]
        (line,) = (line for line in lines if line.startswith(start))
        assert [cell.strip(" *") for cell in line.split("|")[2:-1]] == expected
    tables = run_script("benchmarks/demo_family.py", "--table")
    (right,) = re.findall(r"\| target PT \|  \| \d+ of 1000 \| ([1-9][\d.]+) \(", tables)  # the last number counts
    assert f"right on {right} % if any wording counts" in " ".join(lines)


def test_the_picture_of_the_readme(tmp_path: Path) -> None:
    figure = load_script("docs/make_figure.py")
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    curves = figure.read_curves()
    base_change, eft = curves["base-change"]["test"], curves["eft"]["test"]
    best, best_eft = figure.chosen(curves["base-change"]), figure.chosen(curves["eft"])
    assert (
        f"Base-change rises from {base_change[0].percent:.1f} % at α = 0 to {best.percent:.1f} % at {best.alpha:g} and "
        f"falls to {base_change[-1].percent:.1f} % at 1.5; EFT rises from {eft[0].percent:.0f} to "
        f"{best_eft.percent:.1f} % at {best_eft.alpha:g}."
    ) in text
    for mode in ("light", "dark"):
        committed = (figure.IMAGES / f"curve-{mode}.svg").read_text("utf-8")
        drawn = figure.draw(mode, tmp_path).read_text("utf-8")
        # What is drawn: other versions of matplotlib differ in the rest of the file.
        assert re.findall(r' d="M ([^"]*)"', drawn) == re.findall(r' d="M ([^"]*)"', committed), (
            "run: docs/make_figure.py"
        )
