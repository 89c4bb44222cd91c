"""How figures are written for people: on the terminal and in reports alike."""

from __future__ import annotations

import math

from ensembler.evaluation.statistics import Comparison, Interval


def show_metric(name: str, *, percent: bool) -> str:
    """Return a metric's name with its unit."""
    return f"{name}, %" if percent else name


def show_interval(interval: Interval, *, percent: bool) -> str:
    """Return an estimate with its interval, where it has one."""
    estimate = show_number(interval.estimate, percent=percent)
    if math.isnan(interval.low):
        return estimate
    low, high = (show_number(edge, percent=percent) for edge in (interval.low, interval.high))
    return f"{estimate} ({low} to {high})"


def show_number(number: float, *, percent: bool) -> str:
    """Return one number: tenths of a percent, or four digits."""
    if not math.isfinite(number):
        return "?" if math.isnan(number) else str(number)
    return f"{100 * number:.1f}" if percent else f"{number:.4g}"


def show_difference(comparison: Comparison, *, percent: bool) -> str:
    """Return a difference with its sign and its interval."""
    interval = comparison.difference
    sign = "+" if interval.estimate > 0 else ""
    return sign + show_interval(interval, percent=percent)


def show_p(p_value: float) -> str:
    """Return a p value with two digits, as a power where it is small."""
    if math.isnan(p_value):
        return "?"
    return f"{p_value:.2g}" if p_value < 0.001 else f"{p_value:.3f}"
