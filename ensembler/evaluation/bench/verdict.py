"""What a benchmark says, in words that claim no more than its rows show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ensembler.evaluation.bench.summary import BenchTask, MethodSummary
from ensembler.evaluation.formats import show_number
from ensembler.evaluation.statistics import LEVEL
from ensembler.evaluation.summary import Difference

ROUNDS_FOR_A_CLAIM = 3  # of fewer the range says nothing

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


def verdict(task: BenchTask) -> list[str]:
    """Return the sentences of one task: what is significant after Holm's correction, the rest, then speed."""
    clear = [each for each in task.differences if each.p_holm <= 1 - LEVEL]
    unclear = [each for each in task.differences if not each.p_holm <= 1 - LEVEL]
    return [*(_clear(each, task) for each in clear), *_unclear(unclear), *_speeds(task.methods)]


def _clear(each: Difference, task: BenchTask) -> str:
    interval = each.comparison.difference
    is_better = (interval.estimate > 0) == task.higher_is_better
    edges = sorted((abs(interval.low), abs(interval.high)))
    unit = " points" if task.is_percent else ""
    low, high = (show_number(edge, percent=task.is_percent) for edge in edges)
    return (
        f"{NAMES[each.method]} is {'better' if is_better else 'worse'} than {NAMES[each.against]} by "
        f"{show_number(abs(interval.estimate), percent=task.is_percent)}{unit} ({low} to {high})"
    )


def _unclear(differences: Sequence[Difference]) -> list[str]:
    if not differences:
        return []
    pairs = [f"{NAMES[each.method]} and {NAMES[each.against]}" for each in differences]
    return [f"no difference seen between {'; between '.join(pairs)}"]


def _speeds(methods: Sequence[MethodSummary]) -> Iterator[str]:
    """How fast the other ways are, over base-change; no ratio of speeds whose ranges over the rounds overlap."""
    by_name = {method.method: method for method in methods}
    base = by_name.get("base-change") or by_name.get("eft")
    if base is None:
        return
    for name in ("patch", "direct", "source_ft"):
        other = by_name.get(name)
        if other is None or "tokens_per_second" not in other.cost.keys() & base.cost.keys():
            continue
        fast, slow = other.cost["tokens_per_second"], base.cost["tokens_per_second"]
        if min(fast.num_rounds, slow.num_rounds) < ROUNDS_FOR_A_CLAIM:
            continue
        if fast.low <= slow.high and slow.low <= fast.high:
            yield f"no difference in speed seen between {NAMES[name]} and {NAMES[base.method]}"
            continue
        times = fast.median / slow.median
        yield f"{NAMES[name]} decodes {times:.2g} × as fast as {NAMES[base.method]}"
