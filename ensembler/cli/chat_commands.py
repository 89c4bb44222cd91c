"""The commands that a line of `ensembler chat` may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ensembler.errors import ConfigError

if TYPE_CHECKING:
    from ensembler.decoding.conversation import Conversation


@dataclass(frozen=True)
class _Command:
    """A command within a chat. `argument` is the name of its argument, empty where it takes none."""

    run: Callable[[Conversation, str], None]
    argument: str
    meaning: str


def run_command(conversation: Conversation, line: str) -> None:
    """Run the command of a line that begins with /; raise InputError for one that is not known or cannot be done."""
    name, _, argument = line[1:].partition(" ")
    argument = argument.strip()
    command = _COMMANDS.get(name)
    if command is None:
        (nearest,) = get_close_matches(name, _COMMANDS, n=1, cutoff=0)
        raise ConfigError(
            f"there is no command /{name}; the nearest is /{nearest}, /help lists all, and // begins a text with /"
        )
    if bool(argument) != bool(command.argument):
        found = repr(argument) if argument else "nothing"
        raise ConfigError(f"/{name} was given {found}; expected {f'/{name} {command.argument}'.strip()}")
    command.run(conversation, argument)


def _help(conversation: Conversation, _: str) -> None:
    for name, command in _COMMANDS.items():
        click.echo(f"  {f'/{name} {command.argument}':12}  {command.meaning}", err=True)
    click.echo("  //text        Send a message that begins with /.", err=True)
    _say_point(conversation)


def _alpha(conversation: Conversation, argument: str) -> None:
    try:
        alpha = float(argument)
    except ValueError as error:
        raise ConfigError(f"alpha is {argument!r}; expected a number, as in /alpha 0.5") from error
    conversation.change(alpha=alpha)
    _say_point(conversation)


def _rule(conversation: Conversation, argument: str) -> None:
    conversation.change(rule=argument)
    _say_point(conversation)


def _say_point(conversation: Conversation) -> None:
    click.echo(f"the next answer: {conversation.rule.name} at alpha {conversation.alpha:g}", err=True)


def _reset(conversation: Conversation, _: str) -> None:
    conversation.reset()
    click.echo("conversation forgotten", err=True)


def _save(conversation: Conversation, argument: str) -> None:
    path = Path(argument).expanduser()
    conversation.save(path)
    click.echo(f"messages: {len(conversation.messages)}, written to {path}", err=True)


def _explain(conversation: Conversation, _: str) -> None:
    from ensembler.cli.tables import print_explained

    print_explained(conversation.explain(), conversation.tokenizer)


def _exit(*_: object) -> None:
    raise EOFError


_COMMANDS = {
    "help": _Command(_help, "", "List the commands."),
    "alpha": _Command(_alpha, "A", "Answer at this alpha from now on; 0 is the anchor."),
    "rule": _Command(_rule, "R", "Answer by this rule of the same members from now on."),
    "reset": _Command(_reset, "", "Forget the conversation; the system message, the rule and alpha stay."),
    "save": _Command(_save, "FILE", "Write the messages to a new file, as JSON lines."),
    "explain": _Command(_explain, "", "Mark the tokens of the last answer that are not the anchor's choice."),
    "exit": _Command(_exit, "", "End the chat."),
}
