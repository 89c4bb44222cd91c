"""The command `ensembler`: its commands, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from typing import Any

import click

from ensembler import __version__
from ensembler.cli.bench import bench
from ensembler.cli.chat import chat
from ensembler.cli.classify import classify
from ensembler.cli.command_class import Interruption, Session
from ensembler.cli.create import create
from ensembler.cli.export import export
from ensembler.cli.generate import generate
from ensembler.cli.inspect import inspect
from ensembler.cli.lm_eval import lm_eval
from ensembler.cli.patch import patch
from ensembler.cli.plan import plan
from ensembler.cli.score import score
from ensembler.cli.serve import serve
from ensembler.cli.sweep import sweep
from ensembler.errors import ConfigError, EnsemblerError, RankError
from ensembler.launch import num_ranks, this_rank

SEVERAL_PROCESSES = ("bench", "generate", "lm-eval", "sweep")


@click.group(
    no_args_is_help=False,
    invoke_without_command=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
        "auto_envvar_prefix": "ENSEMBLER",  # ENSEMBLER_GENERATE_ALPHA=0.5
    },
)
@click.version_option(__version__, prog_name="ensembler")
@click.pass_context
def cli(context: click.Context) -> None:
    """Decode with several language models as if they were one.

    ENSEMBLE is a folder that `ensembler create` wrote, or `demo` for the embedded family, or is left out when the
    members are given by --source-ft, --source-pt and --target-pt.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
    elif num_ranks() > 1 and context.invoked_subcommand not in SEVERAL_PROCESSES:
        raise ConfigError(
            f"{num_ranks()} processes were started for {context.invoked_subcommand}, which runs in one; start it "
            "without a launcher"
        )


for command in (create, inspect, plan, generate, classify, score, sweep, bench, export, lm_eval, chat, serve, patch):
    cli.add_command(command)


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0, 2 for bad input, 1 for a failed run, 130 for Ctrl-C."""
    arguments = sys.argv[1:] if args is None else args
    _quiet_libraries()
    session = Session()
    try:
        code = _run(arguments, session)
    except (KeyboardInterrupt, click.Abort):
        code = _fail("interrupted", Interruption.exit_code)
    except EnsemblerError as error:
        reporter = error.reporter if isinstance(error, RankError) else 0
        code = _fail(str(error), error.exit_code, reporter)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = 2
    except click.ClickException as error:
        code = _fail(f"{error.format_message()}{_help_hint(error)}", 2)
    except BrokenPipeError:  # the reader of our output, head for one, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:  # a fault of ours or of a library below: one line too, the traceback on request
        code = _fail(f"{type(error).__name__}: {error} (add --debug for the traceback)", 1, reporter=this_rank())
    _leave(code if isinstance(code, int) else 0)


def _run(arguments: list[str], session: Session) -> Any:
    """Run the command line; print the traceback of what it raises where that was asked for."""
    try:
        return cli.main(arguments, prog_name="ensembler", standalone_mode=False, obj=session)
    except Exception:
        if session.debug:
            traceback.print_exc()
        raise


def _leave(code: int) -> None:
    """End the process; one of several that failed must not wait at its exit for peers that are gone."""
    if code and num_ranks() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _fail(message: str, code: int, reporter: int = 0) -> int:
    """Say the error; of several processes only `reporter` does."""
    if this_rank() == reporter:
        click.echo(f"Error: {' '.join(message.split())}", err=True)
    return code


def _help_hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f" See: {context.command_path} --help" if context is not None else ""


def _quiet_libraries() -> None:
    """Advice of the libraries below, and progress bars in a log, would drown our own lines; errors come through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
