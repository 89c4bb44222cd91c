"""An ASGI middleware for vLLM's server: a request that asks for another α is refused, in place of being misread.

vLLM leaves out what it does not know from a request; an α that is silently not used would be a wrong answer.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

KEYS = ("alpha", "rule", "cutoff")
_NESTED = ("vllm_xargs", "chat_template_kwargs")  # where clients put what a server may know
_MOST_BYTES = 64 * 2**20


class RefuseAlpha:
    """Answers 400 to a JSON body with one of `KEYS`, and hands on everything else unchanged."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Read the body of a POST, look at it, and give it to the server again."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        read: list[Message] = []
        num_bytes = 0
        while num_bytes < _MOST_BYTES:
            message = await receive()
            read.append(message)
            num_bytes += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body", False):
                break
        key = asked_for(b"".join(message.get("body", b"") for message in read))
        if key is not None:
            await _refuse(key, send)
            return

        async def again() -> Message:
            return read.pop(0) if read else await receive()

        await self._app(scope, again, send)


def asked_for(body: bytes) -> str | None:
    """Return the key of the ensemble that a request's body would change, or None."""
    try:
        request = json.loads(body) if any(f'"{key}"'.encode() in body for key in KEYS) else None
    except ValueError:
        return None  # the server has its own words for that
    if not isinstance(request, dict):
        return None
    places = [request, *(request[name] for name in _NESTED if isinstance(request.get(name), dict))]
    return next((key for place in places for key in KEYS if key in place), None)


async def _refuse(key: str, send: Send) -> None:
    message = (
        f"{key} cannot be set by a request: it is fixed when the server starts (ensembler serve FOLDER --alpha A); run "
        "one server for each alpha, on ports of their own"
    )
    error = {"message": message, "type": "BadRequestError", "param": key, "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
