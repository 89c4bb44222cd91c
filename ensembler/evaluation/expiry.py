"""Fit the decline of the patch's score over updates of the base, and date its crossing of a floor.

Each update has results of its own, which `ensembler bench` wrote with that base as target_pt. The same documents are
asked at every update, so a document is the independent unit: the line is fitted through each document's values, and
the mean of these lines is the least-squares line of the scores, with its cluster-robust error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ensembler.errors import ConfigError, OutputError
from ensembler.evaluation.documents import TEST
from ensembler.evaluation.figures import show_interval, show_number, show_p
from ensembler.evaluation.report import read_summary
from ensembler.evaluation.resampling import Numbers
from ensembler.evaluation.results_file import Results, open_results
from ensembler.evaluation.statistics import LEVEL, Interval, mean_interval, row_numbers, stats
from ensembler.extras import require

FEWEST = 3  # updates: two points lie on a line whatever the decline
_PATCH = "patch"
_POINTS = {"patch": ("linear", 0.0), "patched": ("eft", 0.0)}  # the patched target, by the run that answers for it


@dataclass(frozen=True)
class Decline:
    """The straight line through the scores of updates 1, 2, ...

    `slope`: the change of the score per update. `crossing`: the update at which the line meets the floor, with the
    interval of Fieller 1954 (JRSS B 16:175): all updates at which the line's own interval holds the floor. Its estimate
    is NaN where the line does not worsen, its end infinite where the interval of the slope holds 0; None where the
    score improves. `is_below`: where no decline is shown, whether the line is below the floor already: for sure at some
    update, or at the last one of a score that improves. `p_straight`: of the test that the scores lie on a straight
    line (Hotelling 1931); NaN where there is none.
    """

    slope: Interval
    crossing: Interval | None
    is_below: bool
    p_straight: float


@dataclass(frozen=True)
class Expiry:
    """The decline of the patch on one task; `floor` is in the unit of the table, all else in that of the rows."""

    experiment: str
    task: str
    metric: str
    is_percent: bool
    higher_is_better: bool
    floor: float
    folders: tuple[str, ...]
    bases: tuple[str, ...]
    scores: tuple[Interval, ...]
    decline: Decline
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Experiment and task; the task alone where they need no telling apart."""
        return self.task if self.experiment in ("", self.task) else f"{self.experiment}, {self.task}"


class _Update(NamedTuple):
    """One update's results of a task: the task and the patch as summary.json has them, and the values of documents."""

    folder: Path
    task: Mapping[str, Any]
    patch: Mapping[str, Any]
    values: Mapping[str, float]
    member: Mapping[str, Any]


def fit_decline(rows: Any, floor: float, *, higher_is_better: bool = True) -> Decline:
    """Return the line through the means of `rows` (updates, documents) and its crossing of `floor`.

    Raises ConfigError for fewer than three updates, and for rows that are no finite numbers.
    """
    table = row_numbers(rows)
    if len(table) < FEWEST:
        raise ConfigError(f"{len(table)} updates cannot show a decline; give the results of {FEWEST} or more")
    updates = np.arange(1.0, len(table) + 1)
    centred = updates - updates.mean()
    slopes = centred @ table / (centred @ centred)
    sign = 1.0 if higher_is_better else -1.0
    levels = table.mean(axis=0) - floor
    crossing, is_below = _crossing(sign * levels, sign * slopes, float(updates.mean()))
    return Decline(mean_interval(slopes), crossing, is_below, _p_straight(table, updates))


def _crossing(levels: Numbers, slopes: Numbers, middle: float) -> tuple[Interval | None, bool]:
    """Return where the mean line `levels` + `slopes` · (x − `middle`) meets 0, and whether it is below 0 for sure.

    The interval's edges are the roots of A u² + 2 B u + C with u = x − `middle`.
    """
    num, slope = len(levels), mean_interval(slopes)
    a, b = float(levels.mean()), slope.estimate
    if slope.low > 0 or (b >= 0 and slope.standard_error == 0):
        return None, a + b * (middle - 1) < 0
    estimate = middle - a / b if b < 0 else math.nan
    low, high, is_below = -math.inf, math.inf, False
    if num > 1:
        reach = float(stats.t.ppf((1 + LEVEL) / 2, num - 1)) ** 2 / num
        (vaa, vab), (_, vbb) = np.cov(levels, slopes)
        big_a, big_b, big_c = b * b - reach * vbb, a * b - reach * vab, a * a - reach * vaa
        root = math.sqrt(max(big_b * big_b - big_a * big_c, 0.0))
        if slope.standard_error == 0:
            low = high = math.nan
        elif big_a > 0:
            low, high = middle + (-big_b - root) / big_a, middle + (-big_b + root) / big_a
        elif root > 0 and big_a < 0:  # between the roots the line is shown to be on one side of 0
            is_below = a - b * big_b / big_a < 0
            low = -math.inf if is_below else middle + (-big_b - root) / big_a
    return Interval(estimate, low, high, math.nan, num, "Fieller", num - 1), is_below


def _p_straight(table: Numbers, updates: Numbers) -> float:
    """Return p of 'the mean scores lie on a straight line', by Hotelling's T² of what no line explains."""
    line = np.stack([np.ones_like(updates), updates])
    rest = table.T @ require("scipy.linalg", "eval").null_space(line)
    num, width = rest.shape
    if num <= width:
        return math.nan
    covariance = np.atleast_2d(np.cov(rest, rowvar=False))
    if np.linalg.matrix_rank(covariance) < width:
        return math.nan
    mean = rest.mean(axis=0)
    t_squared = num * float(mean @ np.linalg.solve(covariance, mean))
    return float(stats.f.sf(t_squared * (num - width) / (width * (num - 1)), width, num - width))


def find_expiries(folders: Sequence[Path], floor: float) -> list[Expiry]:
    """Return the decline of the patch on every task that all folders have; they are updates 1, 2, ... in this order.

    `floor` is in the unit of the table: per cent for shares of right answers. Raises ConfigError for fewer than three
    folders, for a floor out of range, and for one base, other documents or another patch; OutputError for a folder
    without finished results of the patch.
    """
    if len(folders) < FEWEST:
        have = "one update" if len(folders) == 1 else f"{len(folders)} updates"
        raise ConfigError(f"{have} cannot show a decline; give the results of {FEWEST} or more, in the order of time")
    by_folder = [_tasks(folder) for folder in folders]
    if all(len({experiment for experiment, *_ in tasks}) == 1 for tasks in by_folder):  # then names tell nothing apart
        by_folder = [{("", *rest): found for (_, *rest), found in tasks.items()} for tasks in by_folder]
    shared = [key for key in by_folder[0] if all(key in tasks for tasks in by_folder)]
    if not shared:
        have = "; ".join(
            f"{folder} has {', '.join(' '.join(filter(None, key)) for key in tasks)}"
            for folder, tasks in zip(folders, by_folder, strict=True)
        )
        raise OutputError(f"the patch is in all folders on no task by one metric: {have}; run the same tasks each time")
    return [
        _expiry(key[0], [_update(one, *tasks[key]) for one, tasks in zip(folders, by_folder, strict=True)], floor)
        for key in shared
    ]


def _tasks(folder: Path) -> dict[tuple[str, ...], tuple[Any, Any]]:
    """Return the tasks of a folder that have the patch, each with the patch's figures, by experiment, name and metric.

    Raises OutputError where there is none.
    """
    found: dict[tuple[str, ...], tuple[Any, Any]] = {
        (task["experiment"], task["task"], task["metric"]): (task, method)
        for task in read_summary(folder)
        for method in task["methods"]
        if method["method"] == _PATCH
    }
    if not found:
        raise OutputError(f"{folder} has no method {_PATCH!r}; add it to the recipe's methods and run that again")
    return found


def _update(folder: Path, task: Mapping[str, Any], patch: Mapping[str, Any]) -> _Update:
    """Read the values of the patch on a task; of several seeds of training each document's mean."""
    if patch["test"] is None:
        raise OutputError(f"{folder}: the patch failed on {task['task']} ({patch['error']}); run its command again")
    with open_results(folder) as results:
        found = list(_seeds(results, task))
        runs = results.settings["runs"]
        member = runs[found[0][0]]["ensemble"]["members"]["target_pt"] if found else {}
    if not found:
        raise OutputError(f"{folder} holds no finished answers of the patch on {task['task']}; run its command again")
    by_seed = [values for _, values in found]
    if not _is_mean([value for values in by_seed for value in values.values()], patch["test"]["estimate"]):
        raise OutputError(
            f"{folder}: {task['metric']} of {task['task']} is no mean of finite numbers over documents, so no line is "
            "fitted to it; give the recipe another metric (metric: acc) and run it again, which asks nothing anew"
        )
    names = [name for name in by_seed[0] if all(name in values for values in by_seed)]
    return _Update(
        folder, task, patch, {name: sum(one[name] for one in by_seed) / len(by_seed) for name in names}, member
    )


def _is_mean(values: Sequence[Any], estimate: float | None) -> bool:
    """Return whether the metric is the mean of the documents' values, and not another aggregate of them, as F1 is."""
    is_numeric = bool(values) and all(isinstance(value, int | float) for value in values)
    return is_numeric and estimate is not None and math.isclose(np.mean(values), estimate, rel_tol=1e-6, abs_tol=1e-9)


def _seeds(results: Results, task: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield for each seed of training the run that answers for the patch, and its values of the test documents."""
    runs = re.compile(rf"{re.escape(task['experiment'])}\.(patched|patch)(\.seed\d+)?")
    known: set[str | None] = set()
    for run in results.runs():
        match = runs.fullmatch(run)
        if match is None or match[2] in known:
            continue
        points, done = results.points(run), results.done(run)
        names = [name for name, of, part, *_ in results.documents(run) if part == TEST and of == task["task"]]
        if _POINTS[match[1]] not in points or not done.issuperset(names):
            continue
        known.add(match[2])
        column, values = points.index(_POINTS[match[1]]), results.values(run, task["metric"])
        found = {name: values[name][column] for name in names if name in values}
        yield run, {name: value for name, value in found.items() if value is not None}


def _expiry(experiment: str, updates: Sequence[_Update], floor: float) -> Expiry:
    first = updates[0]
    task, percent = first.task, bool(first.task["is_percent"])
    if not math.isfinite(floor) or (percent and not 1 <= floor <= 100):
        unit = f"a number from 1 to 100, since {task['metric']} is in per cent" if percent else "a finite number"
        raise ConfigError(f"--floor is {floor:g}; expected {unit}")
    _check_alike(updates)
    names = [name for name in first.values if all(name in one.values for one in updates)]
    if not names:
        raise ConfigError(f"no document of {task['task']} has {task['metric']} at every update; run the same documents")
    rows = [[one.values[name] for name in names] for one in updates]
    decline = fit_decline(rows, floor / 100 if percent else floor, higher_is_better=task["higher_is_better"])
    return Expiry(
        experiment,
        task["task"],
        task["metric"],
        percent,
        bool(task["higher_is_better"]),
        floor,
        tuple(str(one.folder) for one in updates),
        tuple(str(one.member.get("model")) for one in updates),
        tuple(_score(one.patch["test"]) for one in updates),
        decline,
        tuple(_notes(updates, decline, len(names))),
    )


def _score(test: Mapping[str, Any]) -> Interval:
    """Return an interval of summary.json, whose null is a number that is not finite."""
    edges = ("estimate", "low", "high", "standard_error")
    return Interval(**{**test, **{name: math.nan for name in edges if test[name] is None}})


def _check_alike(updates: Sequence[_Update]) -> None:
    """Raise ConfigError unless all updates have the documents and the patch of the first, and bases of their own."""
    first = updates[0]
    bases: dict[object, Path] = {}
    for one in updates:
        if one.task["tests"] != first.task["tests"]:
            raise ConfigError(
                f"{one.folder} was tested on other documents of {one.task['task']} than {first.folder}, or with other "
                "prompts; run the same tasks, limit, validation and fewshot for every update"
            )
        if one.member.get("adapter_sha256") != first.member.get("adapter_sha256"):
            raise ConfigError(f"{one.folder} is of another patch than {first.folder}; give results of one patch")
        base = one.member.get("fingerprint") or (one.member.get("model"), one.member.get("commit"))
        if base in bases:
            raise ConfigError(f"{bases[base]} and {one.folder} are of the same base; give each update's results once")
        bases[base] = one.folder


def _notes(updates: Sequence[_Update], decline: Decline, num: int) -> Iterator[str]:
    task = updates[0].task
    if decline.p_straight <= 1 - LEVEL:
        yield (
            f"the scores do not lie on a straight line (p = {show_p(decline.p_straight)}): updates differ by more than "
            "the documents explain, so the line is a rough guess"
        )
    if task["cluster"] is not None:
        yield f"documents count one by one here, not in groups by {task['cluster']}, so the intervals may be too narrow"
    if updates[0].patch["seeds"]:
        yield "the values are means over the seeds of training; the intervals do not cover other seeds"
    if num < task["num_test"]:
        yield f"{task['num_test'] - num:,} documents without {task['metric']} are left out"


def tell_expiry(expiry: Expiry) -> str:
    """Say in one sentence how the patch declines and when it crosses the floor."""
    decline, crossing = expiry.decline, expiry.decline.crossing
    unit = " %" if expiry.is_percent else ""
    on, floor = f"on {expiry.name} the patch", f"the floor of {expiry.floor:g}{unit}"
    below = "below" if expiry.higher_is_better else "above"
    if crossing is None:
        improves = f"improves by {_per_update(expiry)}" if decline.slope.estimate else "neither declines nor improves"
        return f"{on} {improves}, so no crossing of {floor} is in sight" + (
            f"; it is {below} already" if decline.is_below else ""
        )
    if decline.slope.low <= 0 <= decline.slope.high:
        change = f"its score changes by {_per_update(expiry, absolute=False)}"
        text = f"{on} shows no decline ({change}), so no crossing of {floor} can be dated"
        return f"{text}; " + (f"it is {below} already" if decline.is_below else _open_interval(crossing, below))
    text, at = f"{on} declines by {_per_update(expiry)}", f"{show_number(crossing.estimate)} updates"
    edges = [show_number(edge) for edge in (crossing.low, crossing.high)]
    interval = "" if math.isnan(crossing.low) else f" (95 % interval {edges[0]} to {edges[1]})"
    num = len(expiry.scores)
    if crossing.estimate < 1:
        return f"{text} and is {below} {floor} from the first update on"
    where = f"within the {num}" if crossing.estimate <= num else f"an extrapolation beyond the {num}"
    return f"{text} and crosses {floor} at {at}{interval}, {where} that were measured"


def _per_update(expiry: Expiry, *, absolute: bool = True) -> str:
    """Return the slope with its interval and unit; `absolute`: its size, whatever its sign."""
    slope = expiry.decline.slope
    if absolute and slope.estimate < 0:
        slope = replace(slope, estimate=-slope.estimate, low=-slope.high, high=-slope.low)
    shown = show_interval(slope, percent=expiry.is_percent)
    return f"{shown} points per update" if expiry.is_percent else f"{shown} per update"


def _open_interval(crossing: Interval, below: str) -> str:
    """Say where the line of an unclear decline would meet the floor, and how far the interval of that reaches."""
    of_line = f"its line would meet it at {show_number(crossing.estimate)} updates, and "
    if math.isnan(crossing.estimate):
        of_line = ""
    elif crossing.estimate < 1:
        of_line = f"its line is {below} it from the first update on, and "
    begin = f"begins at {show_number(crossing.low)} and has" if math.isfinite(crossing.low) else "has no beginning and"
    return f"{of_line}the interval of the crossing {begin} no end"
