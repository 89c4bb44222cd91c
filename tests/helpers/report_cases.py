"""Rigged figures for the report: a sweep, a benchmark, failures, seeds, clusters, numbers that are not finite."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ensembler.engine.grid import GridPoint
from ensembler.evaluation.documents import Document
from ensembler.evaluation.figures import BY_VALIDATION, NAMES, CurvePoint, Difference, MethodFigure, Spread, TaskFigures
from ensembler.evaluation.results_file import Measured
from ensembler.evaluation.statistics import Interval, Selection, compare, metric_interval

NUM = 400


def right(num: int) -> list[float]:
    """Of NUM documents the first `num` answered rightly."""
    return [1.0] * num + [0.0] * (NUM - num)


def drawn(chance: float, seed: int) -> list[float]:
    """Of NUM documents some answered rightly."""
    draw = random.Random(seed)
    return [float(draw.random() < chance) for _ in range(NUM)]


def speed(median: float, low: float, high: float, num_rounds: int = 4) -> dict[str, Spread]:
    return {"tokens_per_second": Spread(median, low, high, num_rounds)}


def figures(
    rows: Mapping[str, Sequence[float]], p_holm: Mapping[str, float] | None = None, **changes: Any
) -> TaskFigures:
    """Methods by their rows; all are compared with the first, with the p of the rows or a given one."""
    first, *others = rows
    found = {name: compare(rows[name], rows[first]) for name in others}
    return TaskFigures(
        **{
            "experiment": "",
            "task": "gsm8k",
            "version": "3.0",
            "metric": "acc",
            "higher_is_better": True,
            "is_percent": True,
            "num_validation": 0,
            "num_test": NUM,
            "tests": "abc",
            "methods": tuple(
                MethodFigure(key, NAMES.get(key, key), "linear", test=metric_interval(values))
                for key, values in rows.items()
            ),
            "differences": tuple(
                Difference(key, first, one, (p_holm or {}).get(key, one.p_value)) for key, one in found.items()
            ),
            **changes,
        }
    )


def changed(task: TaskFigures, **settings: Any) -> TaskFigures:
    """The figures of a task with every method changed by `settings`: a value for all, or by key."""
    return replace(
        task,
        methods=tuple(
            replace(one, **{name: value[one.method] for name, value in settings.items() if one.method in value})
            for one in task.methods
        ),
    )


def sweep() -> TaskFigures:
    """Two rules over 16 α, each with the α that validation chose and with 1."""
    rules = {"base-change": 0.22, "eft": 0.12}
    alphas = [step / 10 for step in range(16)]
    curve = []
    for rule, lift in rules.items():
        for alpha in alphas:
            chance = 0.36 + lift * math.exp(-(((alpha - 0.7) / 0.5) ** 2)) - 0.1 * max(0.0, alpha - 1)
            test = drawn(chance, 1 + round(10 * alpha))
            validation = sum(drawn(chance, 50 + round(10 * alpha))[:200]) / 200
            curve.append((CurvePoint(rule, rule, alpha, metric_interval(test), validation), test))
    rows = {"source_ft": curve[0][1], "target_pt": drawn(0.21, 7)}
    for rule in rules:
        of_rule = {point.alpha: (point, test) for point, test in curve if point.rule == rule}
        rows[rule], rows[f"{rule} at 1"] = of_rule[0.7][1], of_rule[1.0][1]
    methods = []
    for key, values in rows.items():
        rule = key.removesuffix(" at 1")
        alpha = None if rule not in rules else 0.7 if rule == key else 1.0
        is_chosen = rule == key and rule in rules
        label = NAMES.get(key, key) if alpha is None else f"{rule} α = {alpha:g}"
        selection = Selection(0.7, 0.55, 0.8, 0.56, 0.54) if is_chosen else None
        by = BY_VALIDATION if is_chosen else None
        test = metric_interval(values)
        methods.append(
            MethodFigure(key, label, rule, alpha, by, selection, test, 0.025, {"acc_norm": test.estimate + 0.02})
        )
    pairs = [(rule, other) for rule in rules for other in ("source_ft", "target_pt", f"{rule} at 1")]
    differences = []
    for key, against in pairs:
        one = compare(rows[key], rows[against])
        p_holm = min(1.0, 6 * one.p_value)
        differences.append(Difference(key, against, one, p_holm, detectable=3.7 * one.difference.standard_error))
    return figures(
        {"source_ft": right(1)},
        methods=tuple(methods),
        differences=tuple(differences),
        curve=tuple(point for point, _ in curve),
        levels=("source_ft", "target_pt"),
        num_validation=200,
        notes=("8 examples in each prompt", "3 left out of validation since test has them too"),
    )


def benchmark() -> TaskFigures:
    """Eight methods with costs and published figures; pairs that are alike to within 2 points, or not shown to be."""
    chances = {
        "source_ft": 0.40,
        "source_pt": 0.15,
        "target_pt": 0.25,
        "base-change": 0.62,
        "eft": 0.52,
        "patch": 0.60,
        "patch+base-change": 0.63,
        "direct": 0.61,
    }
    rows = {key: drawn(chance, 3) for key, chance in chances.items()}
    alphas = {"base-change": 0.7, "eft": 1.0, "patch+base-change": 0.9}
    rates = {"source_ft": 41.0, "source_pt": 41.2, "target_pt": 40.1, "patch": 39.7, "direct": 39.9}
    task = figures(rows, experiment="llama", margin=2.0, source="Base-Change at Prediction (Chijiwa et al., 2024)")
    task = replace(task, differences=tuple(replace(each, detectable=0.067) for each in task.differences))
    extra = compare(rows["patch"], rows["direct"])
    unsure = compare(rows["base-change"], rows["patch"])
    more = (
        Difference("patch", "direct", extra, 0.4, 0.062, p_equivalent=0.003),
        Difference("base-change", "patch", unsure, 0.2, 0.062, p_equivalent=0.21),
    )
    return replace(
        changed(
            task,
            alpha=alphas,
            chosen_by={"base-change": BY_VALIDATION, "eft": "given", "patch+base-change": BY_VALIDATION},
            published={"source_ft": {"acc": 39.6}, "base-change": {"acc": 42.3, "f1": 0.5}},
            published_alpha={"base-change": 0.9},
            published_cost={"patch": {"peak_device_bytes": 2 * 2.0**30}},
            seeds={"direct": (0.60, 0.62, 0.61)},
            others={key: {"f1": chance - 0.1} for key, chance in chances.items()},
            cost={
                key: {
                    **speed(*(rates.get(key, 14.0) * scale for scale in (1, 0.96, 1.03))),
                    "first_token_seconds": Spread(0.031, 0.03, 0.034, 4),
                    "peak_device_bytes": Spread((14.2 if key in rates else 41.0) * 2**30, 0, 0, 4),
                    "setup_seconds": Spread(12.0, 11.0, 14.5, 4),
                }
                for key in chances
            },
        ),
        differences=(*task.differences, *more),
        num_validation=119,
    )


def failed() -> TaskFigures:
    """A method that failed, beside one that did not."""
    task = figures({"source_ft": right(200)}, task="boolq", not_measured=("speed and memory: there was no GPU",))
    error = "OutOfMemoryError: CUDA out of memory; tried to allocate 13.5 GiB on a device that has 4.2 GiB left"
    return replace(
        task, methods=(*task.methods, MethodFigure("base-change", "base-change", "base-change", error=error))
    )


def clustered() -> TaskFigures:
    """Documents in groups, and a margin of equivalence."""
    task = figures({"source_ft": right(200), "eft": right(204)}, cluster="author", num_clusters=37, margin=2.0)
    return replace(task, differences=(replace(task.differences[0], p_equivalent=0.012, detectable=0.04),))


def not_finite() -> TaskFigures:
    """Perplexities, where lower is better, of which some are infinite."""
    nowhere = Interval(math.inf, math.nan, math.nan, math.nan, NUM, "none: values are infinite")
    one_row = Interval(3.5, -math.inf, math.inf, math.nan, 1, "t")
    methods = (
        MethodFigure("source_ft", "source FT", "linear", test=one_row),
        MethodFigure("eft", "EFT", "eft", 0.5, "given", test=nowhere),
    )
    curve = [
        CurvePoint("eft", "eft", alpha, test, math.nan)
        for alpha, test in ((0.0, one_row), (0.5, nowhere), (1.0, one_row))
    ]
    comparison = replace(compare(right(2), right(1)), difference=replace(nowhere, estimate=-math.inf), p_value=math.nan)
    return figures(
        {"source_ft": right(1)},
        task="costs $1 <script>alert(1)</script>",
        metric="word_perplexity",
        higher_is_better=False,
        is_percent=False,
        methods=methods,
        differences=(Difference("eft", "source_ft", replace(comparison, test="none: values are infinite"), 1.0),),
        curve=tuple(curve),
        levels=("source_ft",),
    )


def answered(num: int = 60, *, images: bool = False) -> list[tuple[Document, dict[GridPoint, Measured]]]:
    """Documents of a two-way question, of which α = 1 turns those with an odd number to the right answer."""
    found = []
    for index in range(num):
        prompt = f"{index}.png" if images else f"<script>{index}</script> & is it yes or no?\nAnswer:" + " why" * 300
        document = Document("t", "test", index, {}, prompt, (), ("yes", "no"), "yes")
        rows = {
            GridPoint("eft", alpha): Measured(
                [[-1.0, True], [-2.0, False]],
                {"acc": float(alpha > 0 and index % 2)},
                {"": "yes" if alpha > 0 and index % 2 else "no"},
            )
            for alpha in (0.0, 1.0)
        }
        found.append((document, rows))
    return found
