"""`ensembler chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from ensembler.cli.options import EnsembleOptions, decoding_options, ensemble_options
from ensembler.errors import ConfigError, PromptError

if TYPE_CHECKING:
    from ensembler.decoding.options import DecodingOptions

_HELP = "an empty line or /exit ends, /reset forgets the conversation"


@click.command()
@ensemble_options()
@decoding_options
@click.option("--system", metavar="TEXT", help="The system message.")
def chat(given: EnsembleOptions, decoding: DecodingOptions, system: str | None) -> None:
    """Talk with ENSEMBLE in the anchor's chat template.

    Lines are read from standard input; an empty line or /exit ends, /reset forgets the conversation.
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
    click.echo(f"{model.config.rule} at alpha {model.config.alpha:g}; {_HELP}", err=True)
    while True:
        click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline().strip()
        if line in ("", "/exit"):
            say_why_plain(decoding.draft, conversation.decoder.stats)
            return
        if line == "/reset":
            conversation.reset()
            continue
        try:
            conversation.reply(line)
        except PromptError as error:
            click.echo(f"Error: {error} (or /reset)", err=True)
