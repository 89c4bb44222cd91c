"""`ensembler chat`: a conversation in the terminal, or with the lines of a pipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ensembler.cli.chat_commands import run_command
from ensembler.cli.options import EnsembleOptions, decoding_options, ensemble_options
from ensembler.errors import ConfigError, InputError, PromptError

if TYPE_CHECKING:
    from ensembler.decoding.conversation import Conversation
    from ensembler.decoding.options import DecodingOptions


@click.command()
@ensemble_options()
@decoding_options
@click.option("--system", metavar="TEXT", help="The system message.")
@click.pass_context
def chat(context: click.Context, given: EnsembleOptions, decoding: DecodingOptions, system: str | None) -> None:
    """Talk with ENSEMBLE in the anchor's chat template.

    Each line of standard input is a message, or a command: /help lists them. Ctrl-C ends an answer; at the prompt, or
    a second time, it ends the chat, as Ctrl-D and /exit do.
    """
    if decoding.num_return_sequences > 1 or decoding.num_beams > 1:
        raise ConfigError("chat gives one answer a turn; leave --num-return-sequences and --num-beams out")
    from ensembler.cli.stats import say_why_plain
    from ensembler.decoding.conversation import Conversation
    from ensembler.decoding.drafting import check_draft
    from ensembler.decoding.prompts import chat_ids
    from ensembler.modeling import EnsembleForCausalLM
    from ensembler.preflight import check_ensemble

    checked = check_ensemble(given.load_config())
    check_draft(checked.config.get_rule(), decoding.draft)
    tokenizer = checked.require_tokenizer()
    chat_ids(tokenizer, [{"role": "user", "content": "?"}])  # refuses a missing template before weights are loaded
    model = EnsembleForCausalLM.from_checked(checked)
    conversation = Conversation(model, tokenizer, decoding, system=system)
    click.echo(f"{conversation.rule.name} at alpha {conversation.alpha:g}; /help lists the commands", err=True)
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
