"""How figures are written for people: on the terminal and in reports alike."""

from __future__ import annotations

import math

from ensembler.evaluation.statistics import Comparison, Interval


def show_interval(interval: Interval) -> str:
    """Return an estimate with its interval: accuracies in percent, other metrics as they are."""
    low, high = show_number(interval.low, interval), show_number(interval.high, interval)
    return f"{show_number(interval.estimate, interval)} ({low} to {high})"


def show_metric(name: str, like: Interval) -> str:
    """Return a metric's name with its unit."""
    return f"{name}, %" if _is_percent(like) else name


def _is_percent(interval: Interval) -> bool:
    return interval.method in ("Wilson", "Newcombe")


def show_number(number: float, like: Interval) -> str:
    """Return one number in the unit of an interval: tenths of a percent where it counts right and wrong."""
    if not math.isfinite(number):
        return "?" if math.isnan(number) else str(number)
    if _is_percent(like):
        return f"{100 * number:.1f}"
    return f"{number:.4g}"


def show_difference(comparison: Comparison) -> str:
    """Return a difference with its sign and its interval."""
    interval = comparison.difference
    sign = "+" if interval.estimate > 0 else ""
    return sign + show_interval(interval)


def show_p(p_value: float) -> str:
    """Return a p value with two digits, as a power where it is small."""
    if math.isnan(p_value):
        return "?"
    return f"{p_value:.2g}" if p_value < 0.001 else f"{p_value:.3f}"
