"""`ensembler score`: log-probs of given continuations, or the most probable tokens in their places."""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensembler.cli.command_class import Command, log, section
from ensembler.cli.ensemble_options import EnsembleOptions
from ensembler.cli.option_groups import (
    PATH,
    ensemble_options,
    output_option,
    overwrite_option,
    strict_option,
    verify_option,
)
from ensembler.errors import ConfigError
from ensembler.planning.sizes import show_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence, Set

    from ensembler.decoding.output_file import OutputFile
    from ensembler.engine.grid import GridPoint
    from ensembler.evaluation.backends import Advance
    from ensembler.evaluation.requests import ScoringRequest
    from ensembler.evaluation.scoring import ScoredRequest
    from ensembler.evaluation.top_k import TopKWriter
    from ensembler.modeling import EnsembleForCausalLM


_scoring, _speed = section("Scores"), section("Speed")


@click.command(cls=Command, is_resumable=True)
@ensemble_options(several=True)
@output_option(
    "--data",
    required=True,
    type=PATH,
    metavar="FILE",
    help='JSON lines: {"text": "..."}, or {"prompt": "...", "continuation": "..."}, or with "choices": ["...", ...].',
)
@output_option("--output", type=PATH, metavar="FILE", help="Write JSON lines in input order; goes on where it stopped.")
@overwrite_option
@verify_option
@strict_option
@output_option("--json", "as_json", is_flag=True, help="Print a JSON line for each of --data, in input order.")
@_scoring("--per-token", is_flag=True, help="Add the tokens and the log-prob of each to the JSON lines.")
@_scoring(
    "--top-k-logits",
    type=click.IntRange(1),
    metavar="N",
    help="Write the N most probable tokens at each position, at one alpha, to the folder --output: for distillation.",
)
@_speed("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Sequences scored together.")
@_speed("--offline-members", is_flag=True, help="Load one member at a time; its logits wait beside --output.")
def score(
    given: EnsembleOptions,
    rules: tuple[str, ...],
    alphas: tuple[float, ...],
    data: Path,
    output: Path | None,
    overwrite: bool,
    verify_weights: bool,
    strict: bool,
    as_json: bool,
    per_token: bool,
    top_k_logits: int | None,
    batch_size: int,
    offline_members: bool,
) -> None:
    """Tell how probable given texts are under ENSEMBLE: log-probs and perplexity, at one point or several.

    \b
    ensembler score math --data questions.jsonl --alpha 0,0.5,1
    ensembler score math --data questions.jsonl --rule base-change,eft --output scores.jsonl --offline-members
    ensembler score math --data texts.jsonl --alpha 0.8 --top-k-logits 50 --output teacher
    """
    options = {
        "overwrite": overwrite,
        "verify-weights": verify_weights,
        "offline-members": offline_members,
        "per-token": per_token,
    }
    options |= {"top-k-logits": top_k_logits is not None, "json": as_json}
    num_points = max(len(rules), 1) * max(len(alphas), 1)
    _check_options([option for option, is_given in options.items() if is_given], output, num_points)
    from ensembler.decoding.output_file import OutputFile, check_output
    from ensembler.engine.grid import make_grid
    from ensembler.evaluation.backends import TransformersBackend
    from ensembler.evaluation.offline import LogitsFolder, OfflineScorer
    from ensembler.evaluation.provenance import describe_ensemble
    from ensembler.evaluation.request_batches import can_share_contexts, make_batches
    from ensembler.evaluation.requests import read_requests
    from ensembler.evaluation.scoring import run_settings
    from ensembler.evaluation.top_k import TopKWriter
    from ensembler.files import check_not_input
    from ensembler.modeling import EnsembleForCausalLM
    from ensembler.preflight import check_ensemble

    skip = None if strict else (lambda message: log.warning("skipped: %s", message))
    if output is not None:
        check_not_input(output, data)
        if top_k_logits is None:
            check_output(output)
    checked = check_ensemble(given.load_config())
    rule = checked.config.get_rule()
    points = make_grid(rules or (rule.name,), alphas or (checked.config.alpha,))
    tokenizer = checked.require_tokenizer()
    requests = read_requests(data, tokenizer, context=checked.shortest_context, skip=skip)
    _warn_of_seams(requests)
    settings: dict[str, Any] = {"batch_size": batch_size, "per_token": per_token, "top_k": top_k_logits}
    if output is not None:
        described = describe_ensemble(checked, verify_weights=verify_weights)
        settings |= {key: described[key] for key in ("vocabulary", "verify_weights", "members")}
        settings = run_settings(checked.config, requests, points, settings)
    if top_k_logits is not None and checked.contract.is_text:
        raise ConfigError(
            "the members have different tokenizers, and give no logits of all tokens; leave out --top-k-logits"
        )
    if top_k_logits is not None and output is not None:
        folder = LogitsFolder(output, settings, overwrite=overwrite)
        writer = TopKWriter(requests, top_k_logits, checked.contract.widths[rule.anchor], folder)
        log.info("%s will take %s", output, show_size(writer.check_space()))
        _write_top_k(EnsembleForCausalLM.from_checked(checked), writer, points[0], batch_size)
        return
    batches = make_batches(requests, batch_size, share_contexts=can_share_contexts(checked.model_configs.values()))
    results = None if output is None else OutputFile(output, settings, overwrite=overwrite)
    done = frozenset[int]() if results is None else results.done
    batches = [batch for batch in batches if any(one.number not in done for one in batch.requests)]
    num_steps = sum(len(batch.requests) for batch in batches)
    scorer: TransformersBackend | OfflineScorer
    if offline_members:
        folder = LogitsFolder(Path(f"{output}.members"), settings, overwrite=overwrite)
        scorer = OfflineScorer(checked, folder)
        num_steps *= scorer.num_rounds
        num_bytes = scorer.check_space(batches)
        log.info("%s will take %s until the scores are complete", folder.path, show_size(num_bytes))
    else:
        scorer = TransformersBackend(EnsembleForCausalLM.from_checked(checked))
    start = partial(scorer.score, batches, points)
    with results or nullcontext():
        tokens = tokenizer if per_token else None
        kind = checked.contract.kind
        _score(start, num_steps, done, points, results, requests, tokens, vocabulary=kind, as_json=as_json)


def _check_options(given: list[str], output: Path | None, num_points: int) -> None:
    """Raise ConfigError for options that do not go together."""
    for option in ("overwrite", "verify-weights", "offline-members", "top-k-logits"):
        if option in given and output is None:
            what = "folder" if option == "top-k-logits" else "file"
            raise ConfigError(f"--{option} was given without --output; name the {what}")
    if "per-token" in given and "json" not in given and output is None:
        raise ConfigError("--per-token was given without --json or --output; the table has no room for tokens")
    if "top-k-logits" in given:
        for option in ("offline-members", "per-token", "json"):
            if option in given:
                raise ConfigError(f"--top-k-logits was given with --{option}, which it does not know; leave one out")
        if num_points > 1:
            raise ConfigError(
                f"--top-k-logits was given with {num_points} points; a teacher is one: give one --rule and one --alpha"
            )


def _warn_of_seams(requests: Sequence[ScoringRequest]) -> None:
    """Warn of prompts that end in white space, which a continuation may have twice then, or within a token."""
    moved = [one.source for one in requests if one.has_moved_space]
    if moved:
        log.warning(
            "white space at the end of %d of %d prompts was moved to the continuations, as in lm-eval (the first: %s); "
            "end a prompt with a word, and begin its continuation with the space",
            len(moved),
            len(requests),
            moved[0],
        )
    merged = [one.source for one in requests if one.is_merged]
    if merged:
        log.warning(
            "in %d of %d lines a token spans the end of the prompt, so what the continuation begins with is not "
            "scored, as in lm-eval (the first: %s; --per-token shows the tokens); end a prompt where a word ends",
            len(merged),
            len(requests),
            merged[0],
        )


def _score(
    start: Callable[[Advance], Iterator[list[ScoredRequest]]],
    num_steps: int,
    done: Set[int],
    points: Sequence[GridPoint],
    results: OutputFile | None,
    requests: Sequence[ScoringRequest],
    tokenizer: Any | None,
    *,
    vocabulary: str,
    as_json: bool,
) -> None:
    """Write each row at once and print JSON in input order; a table is printed at the end."""
    from ensembler.cli.printing import InOrder, json_line, with_fields
    from ensembler.cli.tables import print_scores, progress

    for_table: list[ScoredRequest] = []
    began, num_lines, num_tokens = time.perf_counter(), 0, 0
    in_order = InOrder(one.number for one in requests if one.number not in done)
    with progress(num_steps, label="scoring") as advance, in_order:
        for scored in (one for batch in start(advance) for one in batch if one.request.number not in done):
            row = with_fields(scored.to_row(points, tokenizer), scored.request.fields)
            if results is not None:
                results.append(row)
            if as_json:
                in_order.add(row["number"], partial(click.echo, json_line(row, vocabulary)))
            elif results is None:
                for_table.append(scored)
            num_lines += 1
            num_tokens += sum(score.num_tokens for score in scored.scores)
    if for_table:
        print_scores(sorted(for_table, key=lambda scored: scored.request.number), points)
    log.info("lines: %d, tokens: %d, seconds: %.1f", num_lines, num_tokens, time.perf_counter() - began)


def _write_top_k(model: EnsembleForCausalLM, writer: TopKWriter, point: GridPoint, batch_size: int) -> None:
    """Write what is missing in the folder."""
    missing = [sequence for shard in writer.missing.values() for sequence in shard]
    from ensembler.cli.tables import progress

    began = time.perf_counter()
    with progress(len(missing), label="sequences") as advance:
        writer.write(model, point, batch_size=batch_size, advance=advance)
    num_tokens, seconds = sum(len(one.continuations[0]) for one in missing), time.perf_counter() - began
    log.info("sequences: %d, tokens: %d, seconds: %.1f", len(missing), num_tokens, seconds)
