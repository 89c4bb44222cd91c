"""The figures of one task, as a table, a page and summary.json show them. Holds numbers; computes none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ensembler.evaluation.statistics import Comparison, Interval, Selection

BY_VALIDATION, BY_PERPLEXITY, GIVEN = "validation", "prompt perplexity", "given"

# The labels of a benchmark's methods, and of members.
NAMES = {
    "source_ft": "source FT",
    "source_pt": "source PT",
    "target_pt": "target PT",
    "base-change": "base-change",
    "eft": "EFT",
    "patch": "the patch",
    "patch+base-change": "base-change with the patched target",
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
