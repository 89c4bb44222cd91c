"""The needs of our middleware in the process of vLLM's server: its check of keys, and errors of failed members."""

from __future__ import annotations

from typing import Any

from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from ensembler.serving.middleware import App
from ensembler.serving.request_points import ServedRules
from ensembler.serving.vllm_failures import end_with_error


def end_failed_requests(app: Any, rules: ServedRules) -> None:
    """Have the server's engine end requests with an error where a member computed NaN."""
    engine = app.state.engine_client
    engine.generate = end_with_error(engine.generate, rules)


def require_key(app: Any, handle: App) -> App:
    """Return `handle` behind the server's own check of keys, if it has any.

    vLLM puts our middleware in front of its check: without this, whoever has no key could have long bodies read.
    """
    keys = [key for key in (app.state.args.api_key or [envs.VLLM_API_KEY]) if key]
    return AuthenticationMiddleware(handle, tokens=keys) if keys else handle
