"""Print what `generate --stats` measured, on standard error: a small table, or one JSON line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import click

from ensembler.cli.tables import console, plain_table
from ensembler.decoding.drafting import AUTO, NONE
from ensembler.decoding.stats import DecodingStats


def say_why_plain(draft: str, stats: DecodingStats) -> None:
    """Say, a line for each reason, why a draft that was asked for did not come about, or was given up."""
    if draft in (AUTO, NONE):
        return
    for reason, num_batches in stats.by_transformers.items():
        click.echo(f"decoded plainly: {reason}{_times(num_batches)}", err=True)
    if stats.plain_reason is not None:
        what = "drafting was given up" if stats.num_rounds else "nothing was drafted"
        click.echo(f"{what}: {stats.plain_reason}", err=True)


def print_stats(stats: DecodingStats, *, as_json: bool) -> None:
    """Print seconds by phase and member, and what came of drafting."""
    row = stats.to_row()
    if as_json:
        click.echo(json.dumps({"stats": row}), err=True)
        return
    lines = [*_seconds("phase", row["phases"], stats.seconds), *_seconds("member", row["members"], stats.seconds)]
    console(stderr=True).print(plain_table(("", "", "seconds", "share"), lines))
    for line in _counts(row):
        click.echo(line, err=True)


def _seconds(kind: str, parts: Mapping[str, float], total: float) -> Iterator[tuple[str, str, str, str]]:
    for name, seconds in parts.items():
        yield kind, name, f"{seconds:.3f}", f"{seconds / total:.1%}" if total else ""
        kind = ""


def _counts(row: Mapping[str, Any]) -> Iterator[str]:
    yield f"tokens/s: {_number(row['tokens_per_second'])}, plain steps: {row['num_plain_steps']}"
    if row["draft"] is not None:
        yield (
            f"draft: {row['draft']}, rounds: {row['num_rounds']}, "
            f"tokens per round: {_number(row['tokens_per_round'])}, acceptance: {_number(row['acceptance'])}"
        )
    reasons: dict[str, int] = row["by_transformers"]
    for reason, num_batches in reasons.items():
        yield f"by transformers' own loop: {reason}{_times(num_batches)}"
    if row["plain_reason"] is not None:
        yield f"plain: {row['plain_reason']}"
    for name, reason in row["eager"].items():
        yield f"without CUDA graphs: {name}, {reason}"


def _times(num_batches: int) -> str:
    return f" ({num_batches} batches)" if num_batches > 1 else ""


def _number(value: object) -> str:
    return "-" if value is None else f"{value:.2f}"
