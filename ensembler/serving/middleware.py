"""Read `alpha` and `rule` in the bodies of requests, where vLLM would ignore them, before its server reads the rest.

The rules that may be asked for are those of the engine behind the server.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ensembler.engine.grid import GridPoint
from ensembler.errors import ConfigError
from ensembler.serving.request_points import ALPHA, KEYS, ServedRules, check_key, shown

XARGS = "vllm_xargs"  # where vLLM takes what its plugins know
_DECODING = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
_MAX_BYTES = 64 * 2**20
_MAX_KEYS = 200  # of a body: each is compared with ours
_AT_ALPHA = "@alpha="

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def alias(name: str, alpha: float) -> str:
    """Return the name under which a model is served at an α of its own: 'math@alpha=0.5'."""
    return f"{name}{_AT_ALPHA}{alpha:g}"


def engine_of(scope: Message) -> Any:
    """Return the client of vLLM's engine, which its server keeps beside the application."""
    return scope["app"].state.engine_client


def rules_of(scope: Message) -> ServedRules:
    """Return what requests to this server may ask for."""
    rules: ServedRules = engine_of(scope).vllm_config.model_config.hf_config.rules
    return rules


class PointOfRequest:
    """Move the rule and α of a request to where vLLM takes them; answer 400 to what cannot be had.

    The answer's headers `ensembler-rule` and `ensembler-alpha` say what it was decoded with.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._handle: App | None = None
        self._rules: ServedRules

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Hand on a request, with its body rewritten where it asks for texts."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._handle is None:  # the first request: before it, nothing is known of the engine
            from ensembler.serving.vllm_app import end_failed_requests, require_key  # vLLM, which runs where this does

            self._rules = rules_of(scope)
            end_failed_requests(scope["app"], self._rules)
            self._handle = require_key(scope["app"], self._rewrite)
        await self._handle(scope, receive, send)

    async def _rewrite(self, scope: Message, receive: Receive, send: Send) -> None:
        """Hand on a request whose key the server accepts: nothing is read for others."""
        messages, is_whole = await _read(receive)
        point = None
        try:
            if not is_whole and messages[-1]["type"] == "http.request":
                raise ConfigError(f"the body is longer than {_MAX_BYTES >> 20} MiB; send several requests")
            if is_whole:
                body = b"".join(message.get("body", b"") for message in messages)
                body, point = read_body(body, self._rules, decodes=scope["path"].endswith(_DECODING))
                messages, scope = [{"type": "http.request", "body": body}], _with_length(scope, len(body))
        except ConfigError as error:
            await answer(send, 400, bad_request(str(error)), "application/json")
            return

        async def receive_again() -> Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, receive_again, send if point is None else _with_point(send, point))


def read_body(body: bytes, rules: ServedRules, *, decodes: bool) -> tuple[bytes, GridPoint | None]:
    """Return the body as vLLM takes it, and the point that the request asks for.

    It stays as it is where it is no JSON object, which the server refuses, and for paths where α cannot be chosen.
    Raises ConfigError for a rule or α that cannot be had, for misspelt keys, and for beams, which vLLM runs without.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return body, None
    if not isinstance(request, dict):
        return body, None
    if not decodes:
        _check_no_point(request)
        return body, None
    if len(request) > _MAX_KEYS:
        raise ConfigError(f"the body has {len(request):,} keys; expected at most {_MAX_KEYS}")
    for key in request:
        check_key(key)
    nested = request.get(XARGS)
    arguments = dict(nested) if isinstance(nested, dict) else {}
    for key in KEYS:
        given = request.pop(key, None)
        if given is not None and arguments.get(key) not in (None, given):
            raise ConfigError(f"{key} is {shown(given)}, and {shown(arguments[key])} under {XARGS}; give it once")
        if given is not None:
            arguments[key] = given
    _add_alias(request.get("model"), arguments)
    if request.get("use_beam_search"):
        raise ConfigError("use_beam_search was given; vLLM's beams ignore the alpha of a request: leave it out")
    point = rules.point_of(arguments)
    rules.check_ends(point)
    asked = {key: value for key, value in arguments.items() if value is not None}
    if asked and (nested is None or isinstance(nested, dict)):
        request[XARGS] = asked
    return json.dumps(request).encode(), point


def _check_no_point(request: dict[str, Any]) -> None:
    """Raise ConfigError where a request to another path asks for an α or a rule, in any of the ways there are."""
    nested, model = request.get(XARGS), request.get("model")
    given = [key for key in KEYS if key in request or (isinstance(nested, dict) and key in nested)]
    if given or (isinstance(model, str) and _AT_ALPHA in model):
        key = given[0] if given else ALPHA
        raise ConfigError(f"{key} cannot be chosen at this path; ask {', '.join(_DECODING[:2])} or leave it out")


def _add_alias(model: object, arguments: dict[str, Any]) -> None:
    """Take α from the model's name where that has one. Raises ConfigError where the request has another."""
    if not isinstance(model, str) or _AT_ALPHA not in model:
        return
    text = model.rpartition(_AT_ALPHA)[2]
    try:
        alpha = float(text)
    except ValueError:
        return  # the server knows no such model
    given = arguments.get(ALPHA)
    if given is not None and given != alpha:
        raise ConfigError(f"alpha is {shown(given)}, and {text[:40]} in the model's name; give one of them")
    arguments[ALPHA] = alpha


async def _read(receive: Receive) -> tuple[list[Message], bool]:
    """Return the messages of a body, and whether they are all: not where it is too long, or its client left."""
    messages: list[Message] = []
    num_bytes = 0
    while num_bytes < _MAX_BYTES:
        messages.append(await receive())
        if messages[-1]["type"] != "http.request":
            return messages, False
        if not messages[-1].get("more_body", False):
            return messages, True
        num_bytes += len(messages[-1].get("body", b""))
    return messages, False


def _with_length(scope: Message, num_bytes: int) -> Message:
    """Return the scope of a request with the length of its new body."""
    headers = [(name, value) for name, value in scope.get("headers", ()) if name.lower() != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(num_bytes).encode())]}


def _with_point(send: Send, point: GridPoint) -> Send:
    """Return a `send` that puts the point into the headers of the answer, if that is no error."""
    more = [(b"ensembler-rule", point.rule.encode()), (b"ensembler-alpha", f"{point.alpha:g}".encode())]

    async def send_named(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] < 400:
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await send(message)

    return send_named


async def answer(send: Send, status: int, body: bytes, content_type: str, *headers: tuple[bytes, bytes]) -> None:
    """Send a whole answer over HTTP."""
    named = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": named})
    await send({"type": "http.response.body", "body": body})


def bad_request(message: str) -> bytes:
    """Return the body of a 400 as vLLM and OpenAI write it."""
    return json.dumps({"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}).encode()
