"""Write docs/cli.md from the `--help` of every command; a test checks that it is up to date."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from ensembler.cli.main import cli

OUT = Path(__file__).parent / "cli.md"
WIDTH = 110


def reference() -> str:
    """Return the page: one section per command, with what its `--help` prints."""
    top = click.Context(cli, info_name="ensembler", terminal_width=WIDTH, help_option_names=["-h", "--help"])
    parts = ["# Command line", "Made from `--help` by `make docs`.", *map(_section, _contexts(top))]
    return "\n\n".join(parts) + "\n"


def _contexts(context: click.Context) -> Iterator[click.Context]:
    """A command and, below a group, its commands."""
    yield context
    if isinstance(context.command, click.Group):
        for name, command in sorted(context.command.commands.items()):
            yield from _contexts(click.Context(command, info_name=name, parent=context))


def _section(context: click.Context) -> str:
    return f"## {context.command_path}\n\n```text\n{context.command.get_help(context)}\n```"


if __name__ == "__main__":
    OUT.write_text(reference(), encoding="utf-8")
    print(f"wrote {OUT}")
