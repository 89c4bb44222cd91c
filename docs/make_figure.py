"""Draw the README's picture, accuracy of the demo family against α, from the rows of its committed sweep.

    python docs/make_figure.py

writes docs/images/curve-light.svg and curve-dark.svg.
"""

from __future__ import annotations

import lzma
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from statsmodels.stats.proportion import proportion_confint

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "sweeps" / "demo" / "results.sqlite.xz"
IMAGES = ROOT / "docs" / "images"
INK = {"light": "#1a1d21", "dark": "#e6e8eb"}
COLOURS = {
    "light": {"base-change": "#1d9a6c", "eft": "#a259c4"},
    "dark": {"base-change": "#3fc796", "eft": "#c78be6"},
}
LABELS = {"base-change": "base-change", "eft": "EFT"}
QUERY = """
    SELECT points.rule, documents.part, points.alpha,
           sum(json_extract(metric_values, '$.exact_match') = 1), count(*)
    FROM measurements
    JOIN points ON points.id = measurements.point
    JOIN documents ON documents.id = measurements.document
    GROUP BY points.rule, documents.part, points.alpha
    ORDER BY points.alpha
"""


class Share(NamedTuple):
    """Right answers of one rule at one α."""

    alpha: float
    num_right: int
    num_rows: int

    @property
    def percent(self) -> float:
        """The share in percent."""
        return 100 * self.num_right / self.num_rows


def read_curves(rows: Path = ROWS) -> dict[str, dict[str, list[Share]]]:
    """Return shares in the order of α, by rule and then by part: "validation" or "test"."""
    database = sqlite3.connect(":memory:")
    database.deserialize(lzma.decompress(rows.read_bytes()))
    curves: dict[str, dict[str, list[Share]]] = {}
    for rule, part, *share in database.execute(QUERY):
        curves.setdefault(rule, {}).setdefault(part, []).append(Share(*share))
    return curves


def chosen(shares: Mapping[str, list[Share]]) -> Share:
    """Return the test share at the α that is best on validation; of equals the smallest α."""
    best = max(shares["validation"], key=lambda share: share.num_right)
    return next(share for share in shares["test"] if share.alpha == best.alpha)


def draw(mode: str, folder: Path = IMAGES) -> Path:
    """Write the picture for "light" or "dark" and return its path."""
    ink, curves = INK[mode], read_curves()
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.15}
    with mpl.rc_context({**style, **dict.fromkeys(inked, ink), "svg.hashsalt": "curve", "font.size": 11}):
        figure = Figure((7.2, 3.6), layout="constrained")
        axes = figure.subplots()
        for rule, shares in curves.items():
            colour, best, test = COLOURS[mode][rule], chosen(shares), shares["test"]
            alphas = [share.alpha for share in test]
            counts = [share.num_right for share in test]
            low, high = proportion_confint(counts, [share.num_rows for share in test], method="wilson")
            axes.fill_between(alphas, [100 * p for p in low], [100 * p for p in high], color=colour, alpha=0.2, lw=0)
            axes.plot(alphas, [share.percent for share in test], ".-", color=colour)
            axes.plot(best.alpha, best.percent, "*", markersize=15, color=colour, markeredgecolor=ink)
            label = f"{LABELS[rule]}, α = {best.alpha:g}: {best.percent:.1f} %"
            above = {"xytext": (0, 11), "textcoords": "offset points", "ha": "center"}
            axes.annotate(label, (best.alpha, best.percent), **above, color=colour)
        for rule, name, offset in (("base-change", "the old fine-tune alone", -13), ("eft", "the new base alone", 4)):
            percent = curves[rule]["test"][0].percent  # at α = 0
            axes.axhline(percent, color=ink, linestyle="--", lw=1, alpha=0.6)
            axes.annotate(f"{name}: {percent:.1f} %", (0, percent), (0, offset), textcoords="offset points")
        axes.set(xlabel="α", ylabel="exact match, % (1,000 test rows)", ylim=(-3, 90))
        path = folder / f"curve-{mode}.svg"
        folder.mkdir(exist_ok=True)
        figure.savefig(path, transparent=True, metadata={"Date": None})
    return path


if __name__ == "__main__":
    for each in INK:
        print(f"wrote {draw(each).relative_to(ROOT)}")
