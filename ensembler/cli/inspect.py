"""`ensembler inspect`: show the members of an ensemble, and the next tokens that they find probable."""

from __future__ import annotations

import json

import click

from ensembler.cli.command_class import Command, log
from ensembler.cli.ensemble_options import EnsembleOptions
from ensembler.cli.option_groups import ensemble_options, output_option, prompt_option


@click.command(cls=Command)
@ensemble_options()
@prompt_option("--prompt", metavar="TEXT", help="Show the most probable next tokens of every member after this text.")
@prompt_option("--top-k", type=click.IntRange(1), default=5, show_default=True, help="How many next tokens.")
@output_option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(given: EnsembleOptions, prompt: str | None, top_k: int, as_json: bool) -> None:
    """Show the members of ENSEMBLE, their weights at alpha, the vocabulary contract and the memory that they take.

    Without --prompt no weights are loaded and memory is predicted. With it, the next-token table shows where alpha
    moved the choice, and the memory in use stands beside the prediction.
    """
    from ensembler.cli import tables
    from ensembler.inspection import summarise
    from ensembler.preflight import check_ensemble

    checked = check_ensemble(given.load_config())
    ids = None
    if prompt is not None:
        from ensembler.decoding.prompts import Prompt, encode_prompts

        tokenizer = checked.require_tokenizer()
        ids = encode_prompts([Prompt(0, prompt, "--prompt")], tokenizer, context=checked.shortest_context)[0].ids
    summary = summarise(checked)
    for warning in summary.warnings:
        log.warning("Warning: %s", warning)
    if ids is not None:
        from ensembler.decoding.texts import next_tokens
        from ensembler.modeling import EnsembleForCausalLM

        model = EnsembleForCausalLM.from_checked(checked)
        summary = summary.with_actual(dict(model.members.items()))
    content = summary.to_dict()
    if not as_json:
        tables.print_summary(summary)
    if ids is not None:
        candidates = next_tokens(model, ids, top_k)
        content["next_tokens"] = {
            role: [{"token": tokenizer.decode([c.token]), "id": c.token, "probability": c.probability} for c in column]
            for role, column in candidates.items()
        }
        if not as_json:
            tables.print_next_tokens(candidates, tokenizer, anchor=model.rule.anchor, alpha=model.config.alpha)
    if as_json:
        click.echo(json.dumps(content, ensure_ascii=False, indent=2))
