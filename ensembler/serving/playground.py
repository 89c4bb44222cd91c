"""A page in front of vLLM's server, on which people move α and see the next token change. Nothing here imports vLLM.

It is one file without external resources, and asks the server as any client does.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Callable, Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from ensembler.serving.middleware import App, Message, Receive, Send, answer, engine_of, rules_of
from ensembler.serving.request_points import ServedRules

PAGE, ABOUT = "/", "/ensembler"
_FILE = Path(__file__).with_name("playground.html")


def describe_served(scope: Message) -> dict[str, Any]:
    """Return what the page is told of the ensemble behind a request of vLLM's server."""
    return describe(rules_of(scope), engine_of(scope).vllm_config.model_config.served_model_name)


def describe(rules: ServedRules, model: str) -> dict[str, Any]:
    """Return the rules, the members that can be asked alone, the anchor's first, and the default rule and α, as JSON.

    `model`: the name that requests give.
    """
    alone = [name for name in rules.names if name in rules.roles]
    found = [rules.find(name) for name in rules.names if name not in alone]
    members = rules.checked.config.members
    return {
        "model": model,
        "rules": [rule.name for rule in found],
        "members": [
            {"role": role, "model": Path(members[role].model).name}  # whoever reaches the server is shown no paths
            for role in sorted(alone, key=lambda role: role != rules.own.anchor)
        ],
        "rule": rules.default.rule,
        "alpha": rules.default.alpha,
        "anchors": {rule.name: rule.anchor for rule in found},
        "formulas": {rule.name: rule.formula for rule in found},
    }


class Playground:
    """Answer GET / with the page and GET /ensembler with JSON about the ensemble; hand on everything else.

    `describe`: gives that JSON for the scope of a request.
    """

    def __init__(self, app: App, describe: Callable[[Message], Mapping[str, Any]] = describe_served) -> None:
        self._app = app
        self._describe = describe

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer what is asked of the page, or hand it on."""
        asked = None
        if scope["type"] == "http" and scope["method"] == "GET":
            asked = scope["path"].removeprefix(scope.get("root_path", ""))
        if asked == PAGE:
            body, policy = _page()
            await answer(send, 200, body, "text/html; charset=utf-8", (b"content-security-policy", policy), *_HEADERS)
        elif asked == ABOUT:
            about = json.dumps(self._describe(scope), ensure_ascii=False).encode()
            await answer(send, 200, about, "application/json", *_HEADERS)
        else:
            await self._app(scope, receive, send)


_HEADERS = (
    (b"cache-control", b"no-cache"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)


@cache
def _page() -> tuple[bytes, bytes]:
    """The page, and the policy that lets it run its own script and style alone and ask its own server alone."""
    text = _FILE.read_text(encoding="utf-8")
    policy = f"default-src 'none'; script-src {_inline(text, 'script')}; style-src {_inline(text, 'style')}; "
    policy += "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return text.encode(), policy.encode()


def _inline(page: str, tag: str) -> str:
    """The source of a policy that allows the page's one script or style by its hash."""
    found = re.findall(f"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
    return " ".join(f"'sha256-{b64encode(sha256(one.encode()).digest()).decode()}'" for one in found)
