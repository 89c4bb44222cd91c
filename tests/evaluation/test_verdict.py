"""The verdict claims what the figures show and no more."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

pytest.importorskip("scipy")

from helpers.report_cases import benchmark, changed, clustered, failed, figures, not_finite, right, speed, sweep

from ensembler.evaluation.figures import BY_PERPLEXITY, CurvePoint, MethodFigure, Spread, difference_table, method_table
from ensembler.evaluation.statistics import Selection, compare
from ensembler.evaluation.verdict import verdict


def test_a_significant_difference_is_told_with_its_interval() -> None:
    (said,) = verdict(figures({"source_ft": right(200), "base-change": right(260)}))
    assert said.startswith("base-change is better than source FT by 15.0 points (")
    (said,) = verdict(figures({"source_ft": right(260), "patch": right(200)}))
    assert said.startswith("the patch is worse than source FT by 15.0 points (")
    low, high = (float(edge) for edge in said.split("(")[1].rstrip(")").split(" to "))
    assert 0 < low < 15.0 < high


def test_an_interval_that_holds_0_keeps_its_sign() -> None:
    """McNemar's test and Newcombe's interval may disagree at the edge."""
    task = figures({"source_ft": right(200), "eft": right(190)}, {"eft": 0.04})
    each = task.differences[0]
    interval = replace(each.comparison.difference, low=-0.055, high=0.005)
    task = replace(task, differences=(replace(each, comparison=replace(each.comparison, difference=interval)),))
    assert verdict(task) == ["EFT is worse than source FT by 2.5 points (-0.5 to 5.5)"]


def test_a_difference_that_correction_takes_back_is_no_difference() -> None:
    rows = {"source_ft": right(200), "base-change": right(208), "patch": right(200)}
    assert compare(rows["base-change"], rows["source_ft"]).p_value < 0.05
    task = figures(rows, {"base-change": 0.06, "patch": 1.0})
    assert verdict(task) == [
        "no difference seen between base-change and source FT",
        "no difference seen between the patch and source FT",
    ]
    each = replace(task.differences[0], detectable=0.0621)
    assert verdict(replace(task, differences=(each,))) == [
        "no difference seen between base-change and source FT; these 400 documents would have shown one of 6.2 points"
    ]


def test_documents_without_the_metric_would_have_shown_nothing() -> None:
    rows = {"source_ft": right(200)[:390], "patch": right(199)[:390]}
    task = figures(rows)
    each = replace(task.differences[0], detectable=0.0621)
    (said,) = verdict(replace(task, differences=(each,)))
    assert said.endswith("; these 390 documents would have shown one of 6.2 points")
    assert [row["without acc"] for row in (*method_table(task), *difference_table(task))] == ["10 documents"] * 3
    assert "without acc" not in method_table(figures({"source_ft": right(200)}))[0]


def test_a_margin_is_told_with_its_unit() -> None:
    task = figures({"source_ft": right(200), "eft": right(204)}, margin=2.0)
    task = replace(task, differences=(replace(task.differences[0], p_equivalent=0.012),))
    assert verdict(task) == ["EFT is as good as source FT to within 2 points, p = 0.012"]
    other = replace(task, is_percent=False, metric="perplexity")
    assert verdict(other) == ["EFT is as good as source FT to within 2 in perplexity, p = 0.012"]
    assert difference_table(other)[0]["p of alike to within 2 in perplexity"] == "0.012"


def test_where_lower_is_better() -> None:
    (said,) = verdict(figures({"source_ft": right(200), "eft": right(260)}, higher_is_better=False))
    assert said.startswith("EFT is worse than source FT by 15.0 points")


def test_what_is_alike_to_within_the_margin_and_what_is_not_shown_to_be() -> None:
    said = verdict(benchmark())
    assert "the patch is as good as the directly tuned target to within 2 points, p = 0.003" in said
    unsure = (
        "no difference seen between base-change and the patch; these 400 documents would have shown one of 6.2 points; "
        "base-change is not shown to be as good as the patch to within 2 points, p = 0.210"
    )
    assert unsure in said
    assert verdict(clustered()) == ["EFT is as good as source FT to within 2 points, p = 0.012"]


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        (speed(30, 29, 31), ["the patch decodes 3 × as fast as base-change"]),
        (speed(30, 10.5, 31), ["no difference in speed seen between the patch and base-change"]),
        (speed(30, 29, 31, num_rounds=3), []),
        ({}, []),
    ],
)
def test_a_ratio_of_speeds_needs_four_rounds_that_do_not_overlap(patch: dict[str, Spread], said: list[str]) -> None:
    task = figures({"base-change": right(200), "patch": right(200)})
    assert verdict(changed(task, cost={"base-change": speed(10, 9, 11), "patch": patch}))[1:] == said


def test_methods_that_failed_are_compared_with_none() -> None:
    assert verdict(failed()) == ["base-change failed, so nothing is said of it"]


def test_what_is_infinite_was_not_tested() -> None:
    said = verdict(not_finite())
    assert said[0] == "the difference between EFT and source FT could not be tested (none: values are infinite)"


def test_the_choice_of_alpha_is_told() -> None:
    task = sweep()
    one = "base-change: alpha 0.7 was chosen on 200 validation documents"
    assert f"{one}, within one standard error of the best, alpha 0.8" in verdict(task)
    best = changed(task, selection={"base-change": Selection(0.7, 0.5, 0.7, 0.5, 0.5)})
    assert one in verdict(best)
    by_prompts = changed(best, chosen_by={"base-change": BY_PERPLEXITY})
    line = (
        "base-change: alpha 0.7 was chosen without labels: it gives the prompts the highest likelihood (perplexity 0.5)"
    )
    assert line in verdict(by_prompts)


@pytest.mark.parametrize(("num_alphas", "said"), [(1, "eft: its alpha was the only"), (3, "eft: no alpha was chosen")])
def test_a_curve_without_a_choice_is_told(num_alphas: int, said: str) -> None:
    task = figures({"source_ft": right(200)})
    test = task.methods[0].test
    assert test is not None
    at_one = MethodFigure("eft at 1", "eft α = 1", "eft", 1.0, test=test)
    curve = tuple(CurvePoint("eft", "eft", float(alpha), test, math.nan) for alpha in range(num_alphas))
    (line,) = verdict(replace(task, methods=(*task.methods, at_one), curve=curve))
    assert line.startswith(said)
