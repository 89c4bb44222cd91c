"""The recommendation rests on differences that are shown, and is the cheapest where none is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("scipy")

from helpers.report_cases import NUM, benchmark, changed, clustered, failed, figures, not_finite, right, speed, sweep

from ensembler.evaluation.figures import BY_VALIDATION, CurvePoint, Difference, MethodFigure, Spread, TaskFigures
from ensembler.evaluation.statistics import Comparison, Interval, Selection, compare
from ensembler.evaluation.verdict import recommendation, recommended

ALPHAS = {"base-change": 0.7, "eft": 0.7}


def picked(task: TaskFigures) -> str | None:
    found = recommended(task)
    return None if found is None else found.method


def with_pair(task: TaskFigures, method: str, against: str, p_holm: float, **settings: Any) -> TaskFigures:
    """The figures with one more comparison: the estimates' difference, with a given p."""
    estimates = {one.method: one.test.estimate for one in task.methods if one.test is not None}
    size = estimates[method] - estimates[against]
    one = replace(compare(right(2), right(1)), difference=Interval(size, size - 0.1, size + 0.1, 0.01, NUM, "Newcombe"))
    return replace(task, differences=(*task.differences, Difference(method, against, one, p_holm, **settings)))


def test_what_is_shown_to_be_better_takes_the_place_of_source_ft() -> None:
    task = figures({"source_ft": right(200), "patch": right(260)})
    said = recommendation(task)
    assert said[0] == "deploy the patch"
    assert said[1].startswith("the patch is better than source FT by 15.0 points (")
    assert said[1].endswith(", p = 1.7e-18 after correction")


def test_a_difference_that_is_not_shown_moves_nothing() -> None:
    """Higher, significant before correction only, or untestable: source FT stays, and the output says so."""
    for rows, p_holm in ((260, 0.051), (208, 0.06), (260, math.nan)):
        task = figures({"source_ft": right(200), "patch": right(rows)}, {"patch": p_holm})
        said = recommendation(task)
        assert said[:3] == [
            "keep source FT as it is",
            "no method is shown to be better than source FT",
            "not shown to be better or worse than it: the patch",
        ]


def test_where_lower_is_better_the_lower_one_is_recommended() -> None:
    rows = {"source_ft": right(200), "patch": right(260), "direct": right(120)}
    assert picked(figures(rows)) == "patch"
    assert picked(figures(rows, higher_is_better=False)) == "direct"
    assert picked(figures({"source_ft": right(200), "patch": right(260)}, higher_is_better=False)) == "source_ft"


def test_the_cheapest_of_those_that_are_not_told_apart() -> None:
    """The ensemble is 1 point above the patch: no more than the test shows, and it costs three models."""
    rows = {"source_ft": right(200), "base-change": right(264), "direct": right(262), "patch": right(260)}
    task = changed(figures(rows), alpha={"base-change": 0.7})
    task = with_pair(task, "base-change", "patch", 0.3, detectable=0.05)
    said = recommendation(task)
    assert said[0] == "deploy the patch"
    assert "not shown to be better or worse than it: base-change, α = 0.7" in said
    assert "not tested against it, nor told apart by intervals: the directly tuned target" in said
    assert "a difference below 5.0 points to base-change, α = 0.7 may have gone unseen on 400 documents" in said
    shown = replace(task, differences=(*task.differences[:-1], replace(task.differences[-1], p_holm=0.01)))
    assert picked(shown) == "direct"
    direct = with_pair(shown, "base-change", "direct", 0.01)
    assert recommendation(direct)[0] == "deploy base-change, α = 0.7"


def test_a_rival_that_lost_to_another_is_not_recommended_for_being_cheap() -> None:
    """Target PT is better than source FT, and base-change better than both by intervals that do not overlap."""
    rows = {"source_ft": right(100), "target_pt": right(130), "base-change": right(300)}
    task = changed(figures(rows), alpha=ALPHAS)
    assert picked(task) == "base-change"
    assert "target PT" not in " ".join(recommendation(task))
    overlapping = changed(figures({**rows, "base-change": right(135)}), alpha=ALPHAS)
    assert picked(overlapping) == "target_pt"


def test_a_recommendation_that_rests_on_intervals_says_so() -> None:
    task = replace(figures({"source_ft": right(100), "patch": right(300)}), differences=())
    said = recommendation(task)
    assert said[:2] == [
        "deploy the patch",
        "better than source FT by intervals that do not overlap, 75.0 (70.5 to 79.0) and 25.0 (21.0 to 29.5); "
        "no test compared them",
    ]


def test_a_difference_within_the_margin_is_none() -> None:
    task = figures({"source_ft": right(200), "patch": right(204)}, {"patch": 0.01}, margin=2.0)
    assert picked(task) == "patch"
    alike = replace(task, differences=(replace(task.differences[0], p_equivalent=0.01),))
    assert recommendation(alike)[:3] == [
        "keep source FT as it is",
        "no method is shown to be better than source FT",
        "shown to be as good to within 2 points: the patch",
    ]
    assert recommendation(clustered())[2] == "shown to be as good to within 2 points: EFT"


def test_without_source_ft_the_cheapest_stays() -> None:
    task = changed(figures({"base-change": right(204), "eft": right(202), "patch": right(200)}), alpha=ALPHAS)
    assert picked(replace(task, differences=())) == "patch"
    rows = {"base-change": right(300), "patch": right(200)}
    assert picked(changed(figures(rows), alpha=ALPHAS)) == "base-change"


def test_of_ensembles_the_validation_documents_choose_and_not_the_test() -> None:
    rows = {"source_ft": right(100), "base-change": right(205), "eft": right(200)}
    task = changed(figures(rows), alpha=ALPHAS)
    found = {}
    for key, metric in (("base-change", 0.4), ("eft", 0.5)):
        found[key] = Selection(0.7, metric, 0.7, metric, metric)
    task = changed(task, selection=found, chosen_by=dict.fromkeys(found, BY_VALIDATION))
    assert picked(task) == "eft"
    lower = {"source_ft": right(300), "base-change": right(205), "eft": right(200)}
    task = replace(changed(figures(lower, higher_is_better=False), alpha=ALPHAS))
    task = changed(task, selection=found, chosen_by=dict.fromkeys(found, BY_VALIDATION))
    assert picked(task) == "base-change"


def test_methods_that_failed_are_named() -> None:
    assert recommendation(failed()) == [
        "keep source FT as it is",
        "no other method has figures to compare it with",
        "not considered, since they failed: base-change",
        "cost: one model runs; speed and memory were not measured",
    ]
    all_failed = replace(failed(), methods=tuple(replace(one, test=None, error="x") for one in failed().methods))
    assert recommendation(all_failed) == ["none, since every method failed"]
    assert recommended(all_failed) is None


def test_all_others_may_be_worse() -> None:
    said = recommendation(figures({"source_ft": right(260), "patch": right(200)}))
    assert said[:2] == ["keep source FT as it is", "all others are shown to be worse"]


def test_figures_that_are_not_finite_are_no_reason() -> None:
    said = recommendation(not_finite())
    assert said[0] == "keep source FT as it is"
    assert "not shown to be better or worse than it: EFT, α = 0.5" in said
    assert not any(line.startswith("warning") for line in said)


def test_the_cost_stands_beside_that_of_source_ft() -> None:
    assert [line for line in recommendation(benchmark()) if line.startswith("cost")] == [
        "cost: one model runs; tokens/s 39.7 (source FT 41), peak device memory 14.20 GiB (source FT 14.20 GiB)"
    ]
    task = changed(figures({"source_ft": right(100), "eft": right(300)}), alpha=ALPHAS)
    memory = {"peak_host_bytes": Spread(3 * 2.0**30, 0, 0, 4)}
    measured = changed(task, cost={"eft": {**speed(14, 13, 15), **memory}})
    assert "cost: all members run; tokens/s 14, peak host memory 3.00 GiB" in recommendation(measured)


@pytest.mark.parametrize(
    ("margin", "estimate", "detectable", "said"),
    [
        (
            2.0,
            0.0,
            0.06,
            "400 documents do not show a difference of 2.0 points to the patch; about 3,600 documents would",
        ),
        (2.0, 0.0, 0.02, None),
        (
            None,
            0.03,
            0.06,
            "the patch is ahead by 3.0 points, which 400 documents do not show; about 1,600 documents would",
        ),
        (None, 0.009, 0.06, None),  # within its standard error
        (None, -0.03, 0.06, None),  # behind
        (None, 0.03, math.nan, None),
    ],
)
def test_the_number_of_documents_that_would_show_it(
    margin: float | None, estimate: float, detectable: float, said: str | None
) -> None:
    task = figures({"source_ft": right(200), "patch": right(200)}, margin=margin)
    difference = Interval(estimate, estimate - 0.05, estimate + 0.05, 0.01, NUM, "Newcombe")
    each = replace(task.differences[0], comparison=Comparison(difference, 0.5, "exact McNemar"), detectable=detectable)
    for method, against, sign in (("patch", "source_ft", 1), ("source_ft", "patch", -1)):
        interval = replace(difference, estimate=sign * estimate)
        turned = replace(each, method=method, against=against, comparison=replace(each.comparison, difference=interval))
        found = [line for line in recommendation(replace(task, differences=(turned,))) if line.startswith("warning")]
        assert found == ([] if said is None else [f"warning: {said}"])


def test_seeds_need_more_than_documents() -> None:
    task = changed(figures({"source_ft": right(200), "direct": right(210)}), seeds={"direct": (0.5, 0.55)})
    difference = Interval(0.03, -0.02, 0.08, 0.02, NUM, "seeds × documents")
    one = Difference("direct", "source_ft", Comparison(difference, 0.2, "seeds × documents t"), 0.2, 0.06)
    said = recommendation(replace(task, differences=(one,)))
    assert said[-1] == (
        "warning: the directly tuned target is ahead by 3.0 points, which 400 documents do not show; "
        "more documents and seeds of training would"
    )


def test_documents_too_few_for_any_difference() -> None:
    task = figures({"source_ft": right(200), "patch": right(201)})
    task = replace(task, num_test=3, differences=(replace(task.differences[0], detectable=math.inf),))
    assert "3 documents are too few to show a difference of any size" in recommendation(task)


def edges(alpha: float, *, chosen_by: str | None = BY_VALIDATION) -> list[str]:
    task = changed(sweep(), alpha={"base-change": alpha}, chosen_by={"base-change": chosen_by})
    return [line for line in recommendation(task) if line.startswith("warning: base-change: alpha")]


def test_an_alpha_at_the_edge_of_the_grid_is_a_warning() -> None:
    last = (
        "warning: base-change: alpha 1.5 was chosen, at the edge of the grid (0 to 1.5); a better one may lie beyond it"
    )
    assert edges(1.5) == [last]
    assert edges(0.0) == ["warning: base-change: alpha 0 was chosen, which is its anchor alone"]
    assert edges(1.4) == edges(0.1) == []
    assert edges(1.5, chosen_by="given") == edges(1.5, chosen_by=None) == []


def curve_of(*estimates: float, reach: float) -> list[str]:
    task = figures({"source_ft": right(200)})
    points = [
        CurvePoint("eft", "eft", alpha / 2, Interval(one, one - reach, one + reach, 0.01, NUM, "t"))
        for alpha, one in enumerate(estimates)
    ]
    method = MethodFigure("eft", "EFT", "eft", 0.5, "given", test=points[0].test)
    shown = replace(task, methods=(*task.methods, method), curve=tuple(points))
    return [line for line in recommendation(shown) if line.startswith("warning")]


def test_a_flat_curve_is_a_warning() -> None:
    flat = ["warning: eft: the curve is flat: the interval at every alpha holds the figure at alpha 0"]
    assert curve_of(0.50, 0.54, 0.46, reach=0.05) == flat
    assert curve_of(0.50, 0.54, 0.44, reach=0.05) == []
    assert curve_of(0.50, 0.54, 0.46, reach=math.nan) == []
    assert curve_of(0.50, reach=0.05) == []
