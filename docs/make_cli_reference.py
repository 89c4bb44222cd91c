"""Write docs/cli.md from the `--help` of every command; a test checks that it is up to date."""

from __future__ import annotations

from pathlib import Path

import click

from ensembler.cli.main import cli

OUT = Path(__file__).parent / "cli.md"
WIDTH = 110


def reference() -> str:
    """Return the page: one section per command, with what its `--help` prints."""
    parts = ["# Command line", "Made from `--help` by `make docs`.", _section("ensembler", cli)]
    parts += [_section(f"ensembler {name}", command) for name, command in sorted(cli.commands.items())]
    return "\n\n".join(parts) + "\n"


def _section(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH)
    return f"## {name}\n\n```text\n{command.get_help(context)}\n```"


if __name__ == "__main__":
    OUT.write_text(reference(), encoding="utf-8")
    print(f"wrote {OUT}")
