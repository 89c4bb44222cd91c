"""`ensembler chat`: a conversation in the terminal, or with the lines of a pipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensembler.cli.command_class import Command, log
from ensembler.cli.ensemble_options import EnsembleOptions
from ensembler.cli.option_groups import TEMPLATE_KWARGS, decoding_options, ensemble_options, prompt_option
from ensembler.errors import ConfigError, InputError, PromptError

if TYPE_CHECKING:
    from ensembler.decoding.conversation import Conversation
    from ensembler.decoding.decoding_options import DecodingOptions


@dataclass(frozen=True)
class _ChatCommand:
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
    "help": _ChatCommand(_help, "", "List the commands."),
    "alpha": _ChatCommand(_alpha, "A", "Answer at this alpha from now on; 0 is the anchor."),
    "rule": _ChatCommand(_rule, "R", "Answer by this rule of the same members from now on."),
    "reset": _ChatCommand(_reset, "", "Forget the conversation; the system message, the rule and alpha stay."),
    "save": _ChatCommand(_save, "FILE", "Write the messages to a new file, as JSON lines."),
    "explain": _ChatCommand(_explain, "", "Mark the tokens of the last answer that are not the anchor's choice."),
    "exit": _ChatCommand(_exit, "", "End the chat."),
}


@click.command(cls=Command)
@ensemble_options()
@decoding_options
@prompt_option("--system", metavar="TEXT", help="The system message.")
@prompt_option("--chat-template-kwargs", **TEMPLATE_KWARGS)
@click.pass_context
def chat(
    context: click.Context,
    given: EnsembleOptions,
    decoding: DecodingOptions,
    system: str | None,
    chat_template_kwargs: dict[str, Any] | None,
) -> None:
    """Talk with ENSEMBLE in the anchor's chat template.

    Each line of standard input is a message, or a command: /help lists them. Ctrl-C ends an answer; at the prompt, or
    a second time, it ends the chat, as Ctrl-D and /exit do.
    """
    if decoding.num_return_sequences > 1 or decoding.num_beams > 1:
        raise ConfigError("chat gives one answer a turn; leave --num-return-sequences and --num-beams out")
    from ensembler.cli.printing import say_why_plain
    from ensembler.decoding.conversation import Conversation
    from ensembler.decoding.drafting import check_draft
    from ensembler.decoding.prompts import chat_ids
    from ensembler.modeling import EnsembleForCausalLM
    from ensembler.preflight import check_ensemble

    checked = check_ensemble(given.load_config())
    check_draft(checked.config.get_rule(), decoding.draft)
    tokenizer = checked.require_tokenizer()
    # Refuses a missing template, or one without such variables, before weights are loaded.
    chat_ids(tokenizer, [{"role": "user", "content": "?"}], chat_template_kwargs)
    model = EnsembleForCausalLM.from_checked(checked)
    conversation = Conversation(model, tokenizer, decoding, system=system, template_kwargs=chat_template_kwargs)
    log.info("%s at alpha %g; /help lists the commands", conversation.rule.name, conversation.alpha)
    code = 0
    try:
        _talk(conversation)
    except KeyboardInterrupt:
        click.echo("\nchat ended", err=True)
        code = 128 + signal.SIGINT
    say_why_plain(decoding.draft, conversation.decoder.stats)
    context.exit(code)


def _talk(conversation: Conversation) -> None:
    """Answer line by line, up to /exit or the end of the input; say what cannot be done, and go on."""
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            click.echo("> ", nl=False, err=True)
        try:
            line = input().strip()
            if line.startswith("/") and not line.startswith("//"):
                run_command(conversation, line)
            elif line:
                _reply(conversation, line[1:] if line.startswith("//") else line)
        except EOFError:
            click.echo(nl=is_terminal, err=True)  # behind the prompt
            return
        except InputError as error:
            click.echo(f"Error: {error}", err=True)


def _reply(conversation: Conversation, text: str) -> None:
    try:
        with _stopped_by_ctrl_c(conversation):
            conversation.reply(text)
    except PromptError as error:
        raise PromptError(f"{error} (or /reset)") from error
    if conversation.answer is not None and conversation.answer.was_stopped:
        click.echo("answer stopped; Ctrl-C again ends the chat", err=True)


@contextmanager
def _stopped_by_ctrl_c(conversation: Conversation) -> Iterator[None]:
    """Let Ctrl-C end the answer inside at its next token; a second one is a KeyboardInterrupt."""

    def stop(*ignored: Any) -> None:
        signal.signal(signal.SIGINT, before)
        conversation.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
