"""The middleware in front of vLLM's server: what it rewrites, refuses, adds, and hands on as it came."""

from __future__ import annotations

import asyncio
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from ensembler.demo import demo_folder
from ensembler.folder import read
from ensembler.preflight import check_ensemble
from ensembler.serving.middleware import PointOfRequest
from ensembler.serving.request_points import ServedRules

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def rules() -> ServedRules:
    return ServedRules(check_ensemble(read(demo_folder())))


@pytest.fixture(autouse=True)
def _no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for vLLM, whose part has its tests where it is: test_vllm_failures.py and test_vllm_server.py."""
    stand_in = SimpleNamespace(end_failed_requests=lambda app, rules: None, require_key=lambda app, handle: handle)
    monkeypatch.setitem(sys.modules, "ensembler.serving.vllm_app", stand_in)  # type: ignore[arg-type]


def call(
    rules: ServedRules, body: bytes, path: str = COMPLETIONS, *, pieces: int = 1, method: str = "POST"
) -> tuple[bytes | None, list[dict[str, Any]]]:
    """Return the body that a server behind the middleware was given (None: it was not asked), and what was sent."""
    step = max(1, -(-len(body) // pieces))
    parts = [body[start : start + step] for start in range(0, len(body), step)] or [b""]
    waiting = [
        {"type": "http.request", "body": part, "more_body": number < len(parts) - 1}
        for number, part in enumerate(parts)
    ]
    seen: list[bytes] = []
    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    async def server(scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            seen.append(message["body"])
            more = message.get("more_body", False)
        length = dict(scope["headers"]).get(b"content-length")
        assert length is None or int(length) == len(b"".join(seen))
        assert method == "GET" or (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})

    engine = SimpleNamespace(
        vllm_config=SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(rules=rules)))
    )
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(b"content-length", str(len(body)).encode())],
        "app": SimpleNamespace(state=SimpleNamespace(engine_client=engine)),
    }
    asyncio.run(PointOfRequest(server)(scope, receive, send))
    return (b"".join(seen) if seen else None), sent


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/prefix/v1/responses", "/v1/messages"])
@pytest.mark.parametrize(
    ("body", "arguments", "headers"),
    [
        ({"alpha": 0.3}, {"alpha": 0.3}, ("base-change", "0.3")),
        ({"alpha": 0}, {"alpha": 0}, ("base-change", "0")),
        ({"alpha": None}, None, ("base-change", "0.8")),
        ({"rule": "eft", "alpha": 1}, {"alpha": 1, "rule": "eft"}, ("eft", "1")),
        ({"vllm_xargs": {"alpha": 2, "other": 1}}, {"alpha": 2, "other": 1}, ("base-change", "2")),
        ({"alpha": 2, "vllm_xargs": {"rule": "eft"}}, {"alpha": 2, "rule": "eft"}, ("eft", "2")),
        ({"alpha": 2, "vllm_xargs": {"alpha": 2}}, {"alpha": 2}, ("base-change", "2")),
        ({"model": "demo@alpha=1.5"}, {"alpha": 1.5}, ("base-change", "1.5")),
        ({"model": "demo"}, None, ("base-change", "0.8")),
        ({"model": "demo@alpha=1.5", "vllm_xargs": {"alpha": None}}, {"alpha": 1.5}, ("base-change", "1.5")),
        ({"rule": "target_pt"}, {"rule": "target_pt"}, ("target_pt", "0")),
    ],
)
def test_a_point_goes_where_vllm_takes_it(
    body: dict[str, Any], arguments: Any, headers: tuple[str, str], path: str, rules: ServedRules
) -> None:
    seen, sent = call(rules, json.dumps({"prompt": 'say "alpha"', **body}).encode(), path)
    assert seen is not None
    request = json.loads(seen)
    assert request.pop("vllm_xargs", None) == arguments
    assert request == {"prompt": 'say "alpha"', **({"model": body["model"]} if "model" in body else {})}
    found = dict(sent[0]["headers"])
    assert (found[b"ensembler-rule"].decode(), found[b"ensembler-alpha"].decode()) == headers
    assert found[b"x"] == b"y"


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"alpha": -1}, "alpha is -1"),
        ({"alpha": True}, "alpha is True; expected a finite number"),
        ({"vllm_xargs": {"alpha": True}}, "alpha is True"),
        ({"vllm_xargs": {"alpha_": 1}}, "did you mean alpha?"),
        ({"alhpa": 1}, "unknown key 'alhpa'; did you mean alpha?"),
        ({"cutoff": 1}, "cutoff cannot be set by a request"),
        ({"alpha": 1, "vllm_xargs": {"alpha": 2}}, "alpha is 1, and 2 under vllm_xargs; give it once"),
        ({"alpha": 1, "model": "demo@alpha=0.5"}, "alpha is 1, and 0.5 in the model's name; give one of them"),
        ({"rule": "reward"}, "rule is 'reward', which cannot be served"),
        ({"model": "demo@alpha=nan"}, "alpha is nan; expected a finite number"),
        ({"alpha": 1, "use_beam_search": True}, "use_beam_search was given; vLLM's beams ignore the alpha"),
        (dict.fromkeys(map(str, range(300))), "the body has 301 keys; expected at most 200"),
        ({"alpha": "x" * 10_000}, "alpha is 'xxxxx"),
        ({"alpha": [0, 1], "n": 2}, "a request has one alpha: send a request for each"),
    ],
)
def test_400_in_the_servers_place(body: dict[str, Any], message: str, pieces: int, rules: ServedRules) -> None:
    seen, sent = call(rules, json.dumps({"prompt": "x", **body}).encode(), pieces=pieces)
    assert seen is None
    assert sent[0]["status"] == 400
    error = json.loads(sent[1]["body"])["error"]
    assert message in error["message"]
    assert (error["type"], error["code"]) == ("BadRequestError", 400)


def test_nan_in_a_body_is_refused(rules: ServedRules) -> None:
    _, sent = call(rules, b'{"prompt": "x", "alpha": NaN}')
    assert sent[0]["status"] == 400


@pytest.mark.parametrize("body", [b'{"alpha": ', b'["alpha"]', b"", b"\xff", b'{"a":' * 99_999])
def test_a_body_that_is_no_json_object_is_left_to_the_server(body: bytes, rules: ServedRules) -> None:
    seen, sent = call(rules, body)
    assert seen == body or (seen, body) == (b"", b"")
    assert sent[0] == {"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]}


@pytest.mark.parametrize("path", ["/tokenize", "/v1/chat/completions/batch", "/invocations", "/inference/v1/generate"])
def test_paths_where_no_alpha_can_be_chosen(path: str, rules: ServedRules) -> None:
    body = json.dumps({"prompt": "x", "temperature": 0}).encode()
    assert call(rules, body, path)[0] == body
    for asked in ({"alpha": 1}, {"vllm_xargs": {"rule": "eft"}}, {"model": "demo@alpha=0.5"}):
        seen, sent = call(rules, json.dumps({"prompt": "x", **asked}).encode(), path)
        assert seen is None
        assert "cannot be chosen at this path; ask /v1/completions" in sent[1]["body"].decode()
    assert call(rules, b'{"alpha": 1}', method="GET")[0] == b'{"alpha": 1}'


def test_a_body_beyond_the_limit_is_refused(rules: ServedRules, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensembler.serving.middleware._MAX_BYTES", 8)
    seen, sent = call(rules, json.dumps({"prompt": "x", "alpha": 1}).encode(), pieces=5)
    assert (seen, sent[0]["status"]) == (None, 400)
    assert "the body is longer than" in sent[1]["body"].decode()
