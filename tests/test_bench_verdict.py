"""The verdict of a benchmark claims what the rows show and no more."""

from __future__ import annotations

import pytest

pytest.importorskip("scipy")

from ensembler.evaluation.bench.summary import BenchTask, MethodSummary, Spread
from ensembler.evaluation.bench.verdict import verdict
from ensembler.evaluation.statistics import compare, metric_interval
from ensembler.evaluation.summary import Difference

NUM = 400


def right(num: int) -> list[float]:
    return [1.0] * num + [0.0] * (NUM - num)


def speed(median: float, low: float, high: float, num_rounds: int = 3) -> dict[str, Spread]:
    return {"tokens_per_second": Spread(median, low, high, num_rounds)}


def make_task(
    rows: dict[str, list[float]],
    p_holm: dict[str, float] | None = None,
    costs: dict[str, dict[str, Spread]] | None = None,
) -> BenchTask:
    """Methods by their rows; all are compared with the first, with the p of the rows or a given one."""
    first, *others = rows
    found = {name: compare(rows[name], rows[first]) for name in others}
    differences = [Difference(name, first, one, (p_holm or {}).get(name, one.p_value)) for name, one in found.items()]
    methods = [
        MethodSummary(name, test=metric_interval(values), cost=(costs or {}).get(name, {}))
        for name, values in rows.items()
    ]
    return BenchTask("e", "t", "1", "acc", True, True, 0, NUM, "", tuple(methods), tuple(differences))


def test_a_significant_difference_is_told_with_its_interval() -> None:
    (said,) = verdict(make_task({"source_ft": right(200), "base-change": right(260)}))
    assert said.startswith("base-change is better than source FT by 15.0 points (")
    (said,) = verdict(make_task({"source_ft": right(260), "patch": right(200)}))
    assert said.startswith("the patch is worse than source FT by 15.0 points (")
    low, high = (float(edge) for edge in said.split("(")[1].rstrip(")").split(" to "))
    assert 0 < low < 15.0 < high


def test_a_difference_that_correction_takes_back_is_no_difference() -> None:
    rows = {"source_ft": right(200), "base-change": right(208), "patch": right(200)}
    assert compare(rows["base-change"], rows["source_ft"]).p_value < 0.05
    (said,) = verdict(make_task(rows, {"base-change": 0.06, "patch": 1.0}))
    assert said == "no difference seen between base-change and source FT; between the patch and source FT"


def test_where_lower_is_better() -> None:
    task = make_task({"source_ft": right(200), "eft": right(260)})
    (said,) = verdict(BenchTask(**{**vars(task), "higher_is_better": False}))
    assert said.startswith("EFT is worse than source FT by 15.0 points")


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        (speed(30, 29, 31), ["the patch decodes 3 × as fast as base-change"]),
        (speed(30, 10.5, 31), ["no difference in speed seen between the patch and base-change"]),
        (speed(30, 29, 31, num_rounds=2), []),
        ({}, []),
    ],
)
def test_a_ratio_of_speeds_needs_three_rounds_that_do_not_overlap(patch: dict[str, Spread], said: list[str]) -> None:
    costs = {"base-change": speed(10, 9, 11), "patch": patch}
    task = make_task({"base-change": right(200), "patch": right(200)}, costs=costs)
    assert verdict(task)[1:] == said


def test_methods_that_failed_are_compared_with_none() -> None:
    task = make_task({"source_ft": right(200)}, costs={"source_ft": speed(10, 9, 11)})
    failed = MethodSummary("base-change", error="RuntimeError: out of memory")
    assert verdict(BenchTask(**{**vars(task), "methods": (*task.methods, failed)})) == []
