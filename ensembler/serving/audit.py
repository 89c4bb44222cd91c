"""Add counts of tokens by rule and α to the Prometheus metrics of vLLM's server. Nothing here imports vLLM.

A token is changed where the most probable one of the mixture is not the anchor's, whatever is sampled.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence

from ensembler.files import one_line
from ensembler.serving.middleware import App, Message, Receive, Send, engine_of
from ensembler.serving.token_counts import PointCount

METRICS = "/metrics"
_log = logging.getLogger(__name__)
READ = "read_audit"  # of AuditReader
_ABOUT = {
    "ensembler_tokens_total": "Number of tokens that were decoded at a rule and alpha.",
    "ensembler_changed_tokens_total": "Number of those whose most probable token is not the anchor's.",
}
_READ_SECONDS = 5  # below the time that Prometheus waits for an answer, 10 s
_NEGOTIATED = (b"accept", b"accept-encoding")

Counts = Mapping[tuple[str, str], tuple[int, int]]
"""Tokens and changed tokens by rule and α."""


async def read_counts(scope: Message) -> Counts:
    """Return the counts of all engines behind vLLM's server."""
    # collective_rpc of the engine itself drops what all data-parallel ranks but the first answer.
    core = engine_of(scope).engine_core
    workers = await core.call_utility_all_async("collective_rpc", READ, None, (), None)
    return add_counts([of_engine[0] for of_engine in workers])


def add_counts(engines: Sequence[Sequence[PointCount]]) -> Counts:
    """Return the sums over engines of rows (rule, α, tokens, changed tokens)."""
    sums: defaultdict[tuple[str, str], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for rule, alpha, tokens, changed in (row for rows in engines for row in rows):
        before = sums[rule, alpha]
        sums[rule, alpha] = (before[0] + tokens, before[1] + changed)
    return sums


def format_counts(counts: Counts) -> str:
    """Return the counts in the text format of Prometheus."""
    lines = []
    for number, (name, about) in enumerate(_ABOUT.items()):
        lines += [f"# HELP {name} {about}", f"# TYPE {name} counter"]
        for (rule, alpha), pair in counts.items():
            lines.append(f'{name}{{rule="{_escape(rule)}",alpha="{alpha}"}} {pair[number]}')
    return "\n".join(lines) + "\n"


class Audit:
    """Write the counts of tokens behind the server's own metrics; hand on everything else.

    `read`: gives the counts for the scope of a request. While the engine does not answer, as when it drains or died,
    the metrics are the server's own.
    """

    def __init__(self, app: App, read: Callable[[Message], Awaitable[Counts]] = read_counts) -> None:
        self._app = app
        self._read = read

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Hand on a request, and add to the answer where it asks for metrics."""
        asked = scope["type"] == "http" and scope["method"] == "GET"
        if not asked or scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/") != METRICS:
            await self._app(scope, receive, send)
            return
        try:
            more = format_counts(await asyncio.wait_for(self._read(scope), _READ_SECONDS)).encode()
        except Exception as error:  # whatever an engine that ends raises: the server's own metrics are still wanted
            _log.warning("tokens by alpha are left out of the metrics: %s", one_line(error) or type(error).__name__)
            more = b""
        # Neither compressed nor as OpenMetrics, which has an end: the server answers in its plain format.
        headers = [one for one in scope.get("headers", ()) if one[0].lower() not in _NEGOTIATED]
        await self._app({**scope, "headers": headers}, receive, _append_to_body(send, more))


def _append_to_body(send: Send, more: bytes) -> Send:
    """Return a `send` that writes `more` behind the body of an answer with status 200."""
    is_good = False

    async def send_appended(message: Message) -> None:
        nonlocal is_good
        if message["type"] == "http.response.start":
            is_good = message["status"] == 200
            message = {**message, "headers": _add_to_length(message["headers"], len(more))} if is_good else message
        elif is_good and not message.get("more_body", False):
            message = {**message, "body": message.get("body", b"") + more}
        await send(message)

    return send_appended


def _add_to_length(headers: Sequence[tuple[bytes, bytes]], num_bytes: int) -> list[tuple[bytes, bytes]]:
    return [
        (name, str(int(value) + num_bytes).encode() if name.lower() == b"content-length" else value)
        for name, value in headers
    ]


def _escape(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
