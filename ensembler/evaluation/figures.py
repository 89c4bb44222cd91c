"""The figures of one task, and the texts and tables that the terminal and the page show of them. Computes none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ensembler.evaluation.statistics import Comparison, Interval, Selection
from ensembler.planning.sizes import show_digits, show_size

BY_VALIDATION, BY_PERPLEXITY, GIVEN = "validation", "prompt perplexity", "given"

METHODS: Mapping[str, tuple[str, ...]] = {
    "source_ft": ("source_ft",),
    "source_pt": ("source_pt",),
    "target_pt": ("target_pt",),
    "base-change": ("source_ft", "source_pt", "target_pt"),
    "eft": ("source_ft", "source_pt", "target_pt"),
    "patch": ("target_pt", "patch"),
    "patch+base-change": ("source_ft", "source_pt", "target_pt", "patch"),
    "direct": ("direct",),
}
"""The methods that can be compared, and the roles that each needs. `patch`: θ′ + Δθ_i (PortLLM, eq. 6);
`patch+base-change`: that as the target of base-change; `direct`: the target fine-tuned itself."""

TRANSPORTED: Mapping[str, tuple[str, ...]] = {
    "patch:orthogonal": ("source_pt", "target_pt", "patch"),
    "patch:sign-mask": ("target_pt", "patch"),
    "patch:procrustes": ("source_pt", "target_pt", "patch"),
}
"""The patch carried by another transport than addition, and the roles that each needs; run where a recipe names it."""

ALL_METHODS: Mapping[str, tuple[str, ...]] = {**METHODS, **TRANSPORTED}

ROLES = ("source_ft", "source_pt", "target_pt", "patch", "direct")
TUNED = ("base-change", "eft", "patch+base-change")  # methods with an α

# The labels of a benchmark's methods, and of members.
NAMES = {
    "source_ft": "source FT",
    "source_pt": "source PT",
    "target_pt": "target PT",
    "base-change": "base-change",
    "eft": "EFT",
    "patch": "the patch",
    "patch+base-change": "base-change with the patched target",
    "patch:orthogonal": "the orthogonal patch",
    "patch:sign-mask": "the sign-masked patch",
    "patch:procrustes": "the patch by Procrustes",
    "direct": "the directly tuned target",
}
# What is measured of a method, by its name in results and with its unit in tables.
COSTS = {
    "tokens_per_second": "tokens/s",
    "examples_per_second": "examples/s",
    "first_token_seconds": "first token, ms",
    "peak_device_bytes": "peak device memory",
    "peak_host_bytes": "peak host memory",
    "weight_bytes": "weights",
    "setup_seconds": "set-up, s",
}


@dataclass(frozen=True)
class CurvePoint:
    """The metric of a rule at one α: on the test documents with its interval, and on those that choose α.

    `method`: the key of the method that is the rule with these members. Of several seeds of training it is that of the
    first.
    """

    method: str
    rule: str
    alpha: float
    test: Interval
    validation: float | None = None


@dataclass(frozen=True)
class Spread:
    """A cost over the rounds of measuring: median, smallest and largest of how many."""

    median: float
    low: float
    high: float
    num_rounds: int


@dataclass(frozen=True)
class MethodFigure:
    """One method on one task.

    `method` is its key, `label` its name for people. `alpha` is None of a method without one; `chosen_by` says what
    chose it: "validation", "prompt perplexity" or "given". `test`: the metric on the test documents, None where the
    method failed with `error`; `standard_error` is lm-eval's, None of several seeds of training; `others` are other
    metrics by key. `seeds`: the metric of each seed of training, where there are several. `published` figures and costs
    are a paper's, in the unit of the table. `cost`: by name, see `COSTS`.
    """

    method: str
    label: str
    rule: str
    alpha: float | None = None
    chosen_by: str | None = None
    selection: Selection | None = None
    test: Interval | None = None
    standard_error: float | None = None
    others: Mapping[str, float] = field(default_factory=dict)
    seeds: tuple[float, ...] = ()
    published: Mapping[str, float] = field(default_factory=dict)
    published_alpha: float | None = None
    cost: Mapping[str, Spread] = field(default_factory=dict)
    published_cost: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def name(self) -> str:
        """The label without α, which several methods may have alike."""
        return self.label.partition(" α = ")[0]

    @property
    def title(self) -> str:
        """The name with α."""
        return self.name if self.alpha is None else f"{self.name}, α = {self.alpha:g}"


@dataclass(frozen=True)
class Difference:
    """Two methods, by key, on the same test documents.

    `p_holm`: corrected over all comparisons of the run; NaN where this one could not be tested. `detectable`: the
    smallest difference that these documents would have shown in 80 of 100 cases at the corrected level; NaN where it
    cannot be told. `p_equivalent`: of the test that the two are alike to within the margin, corrected over all such
    tests; None without a margin.
    """

    method: str
    against: str
    comparison: Comparison
    p_holm: float
    detectable: float = math.nan
    p_equivalent: float | None = None


@dataclass(frozen=True)
class TaskFigures:
    """All figures of one task.

    `is_percent`: the metric is a share of right answers, told in percent. `margin`: in the unit of the table.
    `tests`: a hash of the documents that are reported. `levels`: the keys of the methods that are members by
    themselves. `notes`: what a reader should know; `not_measured`: what is missing, and why.
    """

    experiment: str
    task: str
    version: str
    metric: str
    higher_is_better: bool
    is_percent: bool
    num_validation: int
    num_test: int
    tests: str
    methods: tuple[MethodFigure, ...]
    differences: tuple[Difference, ...]
    curve: tuple[CurvePoint, ...] = ()
    levels: tuple[str, ...] = ()
    cluster: str | None = None
    num_clusters: int | None = None
    margin: float | None = None
    source: str = ""
    notes: tuple[str, ...] = ()
    not_measured: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Experiment and task; the task alone where there is but one experiment, or both are called alike."""
        return self.task if self.experiment in ("", self.task) else f"{self.experiment}, {self.task}"

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules of the curve."""
        return tuple(dict.fromkeys(point.rule for point in self.curve))

    def method(self, key: str) -> MethodFigure:
        """Return the figure of a method by its key."""
        return next(method for method in self.methods if method.method == key)

    def chosen(self, rule: str) -> MethodFigure | None:
        """Return the method of a rule of the curve, where its α was chosen or given; else None."""
        keys = {point.method for point in self.curve if point.rule == rule}
        found = (method for method in self.methods if method.method in keys and method.chosen_by is not None)
        return next(found, None)

    def compared(self, a: str, b: str) -> Difference | None:
        """Return the comparison of two methods, given by their keys, in either order; None where there is none."""
        return next((each for each in self.differences if {each.method, each.against} == {a, b}), None)

    def label(self, key: str) -> str:
        """Return the label of a method by its key."""
        return self.method(key).label


_DIFFERENCE, _P_HOLM = "difference (95 % interval)", "p (Holm)"

Table = list[dict[str, str]]
"""Rows with the same columns."""


def show_number(number: float | None, *, percent: bool = False) -> str:
    """Return one number: tenths of a percent, or three significant digits; "?" of NaN, "" of None."""
    if number is None:
        return ""
    return (f"{100 * number:z.1f}" if percent else show_digits(number)).replace("nan", "?")


def show_interval(interval: Interval, *, percent: bool) -> str:
    """Return an estimate with its interval, where it has one."""
    edges = (interval.estimate, interval.low, interval.high)
    estimate, low, high = (show_number(edge, percent=percent) for edge in edges)
    return estimate if low in ("", "?") else f"{estimate} ({low} to {high})"


def show_points(number: float, task: TaskFigures) -> str:
    """Return a difference of a task's metric with its unit."""
    return show_number(number, percent=task.is_percent) + (" points" if task.is_percent else "")


def show_cost(name: str, value: float) -> str:
    """Return a cost, given by its name in `COSTS`, in the unit of tables."""
    if name.endswith("_bytes"):
        return show_size(value)
    return show_number(1000 * value if name == "first_token_seconds" else value)


def show_p(p_value: float | None) -> str:
    """Return a p value with two digits, as a power where it is small; "?" of NaN, "" of None."""
    if p_value is None:
        return ""
    return (f"{p_value:.2g}" if p_value < 0.001 else f"{p_value:.3f}").replace("nan", "?")


def show_margin(task: TaskFigures) -> str:
    """Return the margin of equivalence with its unit."""
    return f"{task.margin or 0:g} {'points' if task.is_percent else f'in {task.metric}'}"


def metric_name(task: TaskFigures) -> str:
    """Return the metric's name with its unit."""
    return f"{task.metric}, %" if task.is_percent else task.metric


def heading(task: TaskFigures) -> str:
    """Return how many documents there were, and where published figures come from."""
    text = f"{task.num_test:,} test documents"
    if task.cluster is not None:
        text += f" in {task.num_clusters or 0:,} groups by {task.cluster}, on which intervals and tests rest"
    if task.num_validation:
        text += f"; {task.num_validation:,} others chose alpha"
    is_versioned = task.version not in ("Yaml", "None")  # lm-eval's words for none
    text += f". Version {task.version} of the task, metric" if is_versioned else ". Metric"
    text += f" {task.metric}." if task.higher_is_better else f" {task.metric} (lower is better)."
    return f"{text} Published figures: {task.source}." if task.source else text


def method_table(task: TaskFigures) -> Table:
    """Return a row for each method: α, the metric, the difference to the method that all are compared with."""
    return _without_empty([dict(_method_cells(method, task)) for method in task.methods])


def cost_table(task: TaskFigures) -> Table:
    """Return a row for each method with a cost."""
    used = {name for method in task.methods for name in (*method.cost, *method.published_cost)}
    costs = {name: label for name, label in COSTS.items() if name in used}
    methods = [method for method in task.methods if method.cost or method.published_cost]
    return [{"method": one.title, **{label: _cost(name, one) for name, label in costs.items()}} for one in methods]


def difference_table(task: TaskFigures) -> Table:
    """Return a row for each comparison."""
    return _without_empty([_difference_cells(each, task) for each in task.differences])


def _without_empty(rows: Table) -> Table:
    """Leave out the columns that no row fills."""
    filled = {name for row in rows for name, cell in row.items() if cell}
    return [{name: cell for name, cell in row.items() if name in filled} for row in rows]


def _method_cells(method: MethodFigure, task: TaskFigures) -> Iterator[tuple[str, str]]:
    percent = task.is_percent
    alpha = show_number(method.alpha) if method.chosen_by is None else f"{method.alpha:g} ({method.chosen_by})"
    yield "method", method.name
    published = "" if method.published_alpha is None else f"published {method.published_alpha:g}"
    yield "α", "; ".join(filter(None, (alpha, published)))
    found = f"failed: {method.error}" if method.test is None else show_interval(method.test, percent=percent)
    yield f"{metric_name(task)} (95 % interval)", found
    yield f"without {task.metric}", "" if method.test is None else _left_out(method.test, task)
    yield "published", show_number(method.published.get(task.metric))
    yield "by seed", ", ".join(show_number(seed, percent=percent) for seed in method.seeds)
    if task.differences:
        against = task.differences[0].against
        compared = {each.method: _difference_cells(each, task) for each in task.differences if each.against == against}
        cells = compared.get(method.method, {})
        yield f"− {task.label(against)}", cells.get(_DIFFERENCE, "")
        yield _P_HOLM, cells.get(_P_HOLM, "")
    for key in dict.fromkeys(key for one in task.methods for key in (*one.others, *one.published)):
        if key != task.metric:
            yield key, show_number(method.others.get(key))
            yield f"{key}, published", show_number(method.published.get(key))


def _difference_cells(each: Difference, task: TaskFigures) -> dict[str, str]:
    difference, percent = each.comparison.difference, task.is_percent
    sign = "+" if difference.estimate > 0 else ""
    return {
        "compared on the same documents": f"{task.label(each.method)} − {task.label(each.against)}",
        _DIFFERENCE: sign + show_interval(difference, percent=percent),
        "p": show_p(each.comparison.p_value),
        _P_HOLM: show_p(each.p_holm),
        "test": each.comparison.test,
        f"without {task.metric}": _left_out(difference, task),
        "would have shown": show_number(each.detectable if math.isfinite(each.detectable) else None, percent=percent),
        f"p of alike to within {show_margin(task)}": show_p(each.p_equivalent),
    }


def _left_out(interval: Interval, task: TaskFigures) -> str:
    num = task.num_test - interval.num_rows
    return f"{num:,} documents" if num else ""


def _cost(name: str, method: MethodFigure) -> str:
    """The median; its range, but of sizes, which vary little; and the published one behind it."""
    texts = []
    if spread := method.cost.get(name):
        low, high = show_cost(name, spread.low), show_cost(name, spread.high)
        texts.append(show_cost(name, spread.median) + ("" if name.endswith("_bytes") else f" ({low} to {high})"))
    if name in method.published_cost:
        texts.append(f"published {show_cost(name, method.published_cost[name])}")
    return "; ".join(texts)
