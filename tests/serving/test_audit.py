"""Counts of tokens in the metrics, without a server: which answers they are added to, and how tokens are counted."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ensembler_kernels import Combination, Weights

from ensembler.engine.grid import GridPoint
from ensembler.serving.audit import Audit, add_counts
from ensembler.serving.token_counts import MOST_POINTS, TokenCounts, at_anchor, number_tokens

THEIRS = b'vllm:requests{engine="0"} 3.0\n'
OURS = """# HELP ensembler_tokens_total Number of tokens that were decoded at a rule and alpha.
# TYPE ensembler_tokens_total counter
ensembler_tokens_total{rule="base-change",alpha="0.7"} 123
ensembler_tokens_total{rule="a\\"b",alpha="0"} 7
# HELP ensembler_changed_tokens_total Number of those whose most probable token is not the anchor's.
# TYPE ensembler_changed_tokens_total counter
ensembler_changed_tokens_total{rule="base-change",alpha="0.7"} 45
ensembler_changed_tokens_total{rule="a\\"b",alpha="0"} 0
"""


def ask(
    path: str = "/metrics",
    *,
    method: str = "GET",
    status: int = 200,
    chunks: int = 1,
    root: str = "",
    error: Exception | None = None,
) -> tuple[dict[bytes, bytes], bytes, dict[bytes, bytes]]:
    """Return the headers and body of the answer, and the headers that the server behind was given."""
    sent: list[Any] = []
    seen: dict[bytes, bytes] = {}
    asked: list[tuple[Any, ...]] = []

    async def server(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope["headers"])
        length = [(b"Content-Length", str(len(THEIRS)).encode())] if chunks == 1 else []
        await send({"type": "http.response.start", "status": status, "headers": [*length, (b"x", b"y")]})
        step = -(-len(THEIRS) // chunks)
        for start in range(0, len(THEIRS), step):
            more = start + step < len(THEIRS)
            await send({"type": "http.response.body", "body": THEIRS[start : start + step], "more_body": more})

    async def send(message: Any) -> None:
        sent.append(message)

    async def answer_all(*given: Any) -> Any:
        asked.append(given)
        if error is not None:
            raise error
        one = [["base-change", "0.7", 100, 40], ['a"b', "0", 7, 0]]
        return [[one, [["base-change", "0.7", 0, 0]]], [[["base-change", "0.7", 23, 5]]]]

    engine = SimpleNamespace(engine_core=SimpleNamespace(call_utility_all_async=answer_all))
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "root_path": root,
        "headers": [(b"accept", b"application/openmetrics-text"), (b"Accept-Encoding", b"gzip"), (b"host", b"here")],
        "app": SimpleNamespace(state=SimpleNamespace(engine_client=engine)),
    }
    asyncio.run(Audit(server)(scope, lambda: None, send))  # type: ignore[arg-type,return-value]
    assert len(asked) == (b"accept" not in seen)
    return dict(sent[0]["headers"]), b"".join(one["body"] for one in sent[1:]), seen


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize(("path", "root"), [("/metrics", ""), ("/metrics/", ""), ("/v/metrics", "/v")])
def test_counts_of_all_engines_stand_behind_the_servers_own(path: str, root: str, chunks: int) -> None:
    headers, body, seen = ask(path, chunks=chunks, root=root)
    assert body == THEIRS + OURS.encode()
    assert headers == {b"x": b"y"} | ({b"Content-Length": str(len(body)).encode()} if chunks == 1 else {})
    assert seen == {b"host": b"here"}  # so that the answer is neither gzip nor OpenMetrics


@pytest.mark.parametrize("given", [{"path": "/v1/models"}, {"method": "POST"}, {"path": "/metricsx"}])
def test_other_requests_are_handed_on(given: dict[str, str]) -> None:
    headers, body, seen = ask(**given)  # type: ignore[arg-type]
    assert body == THEIRS
    assert headers[b"Content-Length"] == str(len(THEIRS)).encode()
    assert seen[b"accept"]


def test_an_error_stays_as_it_is() -> None:
    headers, body, _ = ask(status=500)
    assert body == THEIRS
    assert headers[b"Content-Length"] == str(len(THEIRS)).encode()


def test_while_the_engine_does_not_answer_the_metrics_are_the_servers_own(caplog: pytest.LogCaptureFixture) -> None:
    headers, body, _ = ask(error=RuntimeError("EngineCore encountered an issue.\nSee the log"))
    assert body == THEIRS
    assert headers[b"Content-Length"] == str(len(THEIRS)).encode()
    assert "left out of the metrics: EngineCore encountered an issue." in caplog.text


def test_a_counter_without_samples_is_valid() -> None:
    assert add_counts([[], []]) == {}


def test_the_first_logits_of_a_step_are_counted_where_a_token_has_a_number() -> None:
    counts = TokenCounts("cpu")
    numbers = [counts.number_of(GridPoint("eft", alpha)) for alpha in (0.5, 0.5000000001, 2.0, -0.0, 0.0)]
    assert numbers == [1, 1, 2, 3, 3]
    combined = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [torch.nan, 0.0], [0.0, 1.0]])
    anchor = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    given = (torch.tensor([1.0, 1.0, 2.0, 2.0, 0.0]), combined, anchor, torch.tensor([False] * 3 + [True, False]))
    assert not counts.is_due  # a trial run begins no step
    assert [row[2:] for row in counts.read()] == [(0, 0)] * 3
    for _ in range(2):
        counts.begin_step()
        assert counts.is_due
        counts.add(*given)
        assert not counts.is_due  # log-probs of prompts come behind
    assert counts.read() == [("eft", "0.5", 4, 2), ("eft", "2", 4, 2), ("eft", "0", 0, 0)]


def test_the_first_points_have_numbers_before_any_request() -> None:
    counts = TokenCounts("cpu", [GridPoint("eft", 0.8), GridPoint("eft", 0.0)])
    assert [counts.number_of(GridPoint("eft", alpha)) for alpha in (2.0, 0.0, 0.8)] == [3, 2, 1]
    assert counts.read() == [("eft", "0.8", 0, 0), ("eft", "0", 0, 0), ("eft", "2", 0, 0)]


def test_points_behind_the_255th_are_counted_together() -> None:
    counts = TokenCounts("cpu")
    numbers = [counts.number_of(GridPoint("eft", float(alpha))) for alpha in range(300)]
    assert numbers == [*range(1, MOST_POINTS + 1), *[MOST_POINTS + 1] * 45]
    assert counts.number_of(GridPoint("eft", 3.0)) == 4
    counts.begin_step()
    counts.add(torch.tensor([256.0, 255.0]), torch.eye(2), torch.eye(2), torch.zeros(2, dtype=torch.bool))
    assert counts.read()[-2:] == [("eft", "254", 1, 0), ("other", "other", 1, 0)]


def test_tokens_before_the_last_known_one_have_no_number() -> None:
    rows = torch.tensor([[0.5, 0.25, 7.0, 4.0]]).repeat(4, 1)
    found = number_tokens(rows, torch.tensor([0, 3, 4, 5]))
    assert found.tolist() == [[0.5, 0.25, 0], [0.5, 0.25, 0], [0.5, 0.25, 7], [0.5, 0.25, 7]]


def test_weights_at_the_anchor_differ_in_alpha_alone() -> None:
    weights = Weights.of((Combination((1.0, 0.0), (-1.0, 1.0), anchor=0, cutoff=0.1), [0.5, 2.0]))
    plain = at_anchor(weights)
    assert plain.alphas.tolist() == [0, 0]
    assert weights.alphas.tolist() == [0.5, 2]
    plain.table[:, 4] = weights.alphas
    assert torch.equal(plain.table, weights.table)
