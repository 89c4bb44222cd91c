"""Tables of the docs, as the scripts that make them print them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield f"| {' | '.join(names)} |"
    yield f"|{'---|' * len(names)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
