"""`ensembler export`: the results of a sweep or a benchmark for other programs."""

from __future__ import annotations

from pathlib import Path

import click

from ensembler.cli.command_class import Command
from ensembler.cli.option_groups import PATH, output_option, replace_option
from ensembler.errors import ConfigError


@click.command(cls=Command)
@click.argument("run", type=PATH, metavar="RUN")
@output_option(
    "--what",
    type=click.Choice(["rows", "documents", "notes", "settings"]),
    default="rows",
    show_default=True,
    help="Answers and metrics, questions, costs and failures, or what all of it depends on.",
)
@output_option("--output", type=PATH, metavar="FILE", help="The file to write.  [default: print]")
@replace_option
@output_option(
    "--format",
    "form",
    type=click.Choice(["jsonl", "parquet"]),
    default="jsonl",
    show_default=True,
    help="Lines of JSON, or a table, whose nested columns are JSON; parquet needs --output and pyarrow.",
)
def export(run: Path, what: str, output: Path | None, overwrite: bool, form: str) -> None:
    """Print the results of RUN, the folder of a sweep or a benchmark, as lines of JSON.

    There is a row for each document at each point (a rule at an alpha). An infinity is {"float": "-inf"}.

    \b
    ensembler export sweep | jq .values.acc
    ensembler export sweep --format parquet --output sweep.parquet
    """
    from ensembler.evaluation.results_export import lines, write
    from ensembler.evaluation.results_file import open_results

    if form == "parquet" and output is None:
        raise ConfigError("parquet is a binary file and not for printing; give --output a file, or --format jsonl")
    with open_results(run) as results:
        if output is not None:
            write(results, what, form, output, overwrite=overwrite)
            return
        for line in lines(results, what):
            click.echo(line)
