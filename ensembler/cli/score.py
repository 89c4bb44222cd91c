"""`ensembler score`: log-probs of given continuations, or the most probable tokens in their places."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensembler.cli.options import EnsembleOptions, ensemble_options
from ensembler.cli.tables import print_scores, progress
from ensembler.errors import ConfigError
from ensembler.planning.budgets import show_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence, Set

    from ensembler.decoding.results import ResultsFile
    from ensembler.engine.grid import GridPoint
    from ensembler.evaluation.backends import Advance
    from ensembler.evaluation.requests import ScoringRequest
    from ensembler.evaluation.scoring import ScoredRequest
    from ensembler.evaluation.top_k import TopKWriter
    from ensembler.modeling import EnsembleForCausalLM


@click.command()
@ensemble_options(grid=True)
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help='JSON lines: {"text": "..."}, or {"prompt": "...", "continuation": "..."}, or with "choices": ["...", ...].',
)
@click.option("--skip-bad", is_flag=True, help="Go on over lines of --data that cannot be scored.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Sequences scored together.")
@click.option("--offline-members", is_flag=True, help="Load one member at a time; its logits wait beside --output.")
@click.option("--per-token", is_flag=True, help="Add the tokens and the log-prob of each to the JSON lines.")
@click.option(
    "--top-k-logits",
    type=click.IntRange(1),
    metavar="N",
    help="Write the N most probable tokens at each position, at one alpha, to the folder --output: for distillation.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line per line of --data.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the JSON lines to a file, in input order.")
@click.option("--resume", is_flag=True, help="Go on with an --output that was interrupted.")
@click.option("--overwrite", is_flag=True, help="Replace the --output if it exists.")
def score(
    given: EnsembleOptions,
    alphas: tuple[float, ...],
    data: Path,
    skip_bad: bool,
    batch_size: int,
    offline_members: bool,
    per_token: bool,
    top_k_logits: int | None,
    as_json: bool,
    output: Path | None,
    resume: bool,
    overwrite: bool,
) -> None:
    """Tell how probable given texts are under ENSEMBLE: log-probs and perplexity, for one alpha or several.

    \b
    ensembler score math --data questions.jsonl --alpha 0 --alpha 0.5 --alpha 1
    ensembler score math --data questions.jsonl --output scores.jsonl --offline-members
    ensembler score math --data texts.jsonl --alpha 0.8 --top-k-logits 50 --output teacher
    """
    options = {"resume": resume, "overwrite": overwrite, "offline-members": offline_members, "per-token": per_token}
    options |= {"top-k-logits": top_k_logits is not None, "json": as_json}
    _check_options([option for option, is_given in options.items() if is_given], output, len(alphas))
    from ensembler.decoding.results import ResultsFile, check_output
    from ensembler.engine.grid import make_grid
    from ensembler.evaluation.backends import TransformersBackend
    from ensembler.evaluation.batches import can_share_contexts, make_batches
    from ensembler.evaluation.logits_folder import LogitsFolder
    from ensembler.evaluation.offline import OfflineScorer
    from ensembler.evaluation.requests import read_requests
    from ensembler.evaluation.scoring import fingerprint
    from ensembler.evaluation.top_k import TopKWriter
    from ensembler.modeling import EnsembleForCausalLM
    from ensembler.preflight import check_ensemble

    skip = (lambda message: click.echo(f"skipped: {message}", err=True)) if skip_bad else None
    if output is not None and top_k_logits is None:
        check_output(output, resume=resume, overwrite=overwrite)
        if output.resolve() == data.resolve():
            raise ConfigError(f"--output is the file of the data, {data}; choose another name")
    checked = check_ensemble(given.load_config())
    rule = checked.config.get_rule()
    alphas = alphas or (checked.config.alpha,)
    points = make_grid([rule.name], alphas)
    tokenizer = checked.require_tokenizer()
    requests = read_requests(data, tokenizer, context=checked.shortest_context, skip=skip)
    _warn_of_spaces(requests)
    settings = {"batch_size": batch_size, "per_token": per_token, "top_k": top_k_logits}
    run = fingerprint(checked.config, requests, points, settings)
    if top_k_logits is not None and output is not None:
        folder = LogitsFolder(output, run, resume=resume, overwrite=overwrite)
        writer = TopKWriter(requests, top_k_logits, checked.contract.widths[rule.anchor], folder)
        click.echo(f"{output} will take {show_size(writer.check_space())}", err=True)
        _write_top_k(EnsembleForCausalLM.from_checked(checked), writer, points[0], batch_size)
        return
    batches = make_batches(requests, batch_size, share_contexts=can_share_contexts(checked.model_configs.values()))
    results = None if output is None else ResultsFile(output, run, resume=resume, overwrite=overwrite)
    done = frozenset[int]() if results is None else results.done
    batches = [batch for batch in batches if any(one.number not in done for one in batch.requests)]
    num_steps = sum(len(batch.requests) for batch in batches)
    scorer: TransformersBackend | OfflineScorer
    if offline_members:
        folder = LogitsFolder(Path(f"{output}.members"), run, resume=resume, overwrite=overwrite)
        scorer = OfflineScorer(checked, folder)
        num_steps *= scorer.num_rounds
        num_bytes = scorer.check_space(batches)
        click.echo(f"{folder.path} will take {show_size(num_bytes)} until the scores are complete", err=True)
    else:
        scorer = TransformersBackend(EnsembleForCausalLM.from_checked(checked))
    start = partial(scorer.score, batches, points)
    with results or nullcontext():
        _score(start, num_steps, done, alphas, results, tokenizer if per_token else None, as_json=as_json)


def _check_options(given: list[str], output: Path | None, num_alphas: int) -> None:
    """Raise ConfigError for options that do not go together."""
    for option in ("resume", "overwrite", "offline-members", "top-k-logits"):
        if option in given and output is None:
            what = "folder" if option == "top-k-logits" else "file"
            raise ConfigError(f"--{option} was given without --output; name the {what}")
    if "per-token" in given and "json" not in given and output is None:
        raise ConfigError("--per-token was given without --json or --output; the table has no room for tokens")
    if "top-k-logits" in given:
        for option in ("offline-members", "per-token", "json"):
            if option in given:
                raise ConfigError(f"--top-k-logits was given with --{option}, which it does not know; leave one out")
        if num_alphas > 1:
            raise ConfigError(
                f"--top-k-logits was given with {num_alphas} alphas; a teacher has one: give --alpha once"
            )


def _warn_of_spaces(requests: Sequence[ScoringRequest]) -> None:
    """Warn of prompts that end in white space: a continuation that begins with a space has two then."""
    moved = [one.source for one in requests if one.has_moved_space]
    if moved:
        click.echo(
            f"white space at the end of {len(moved):,} of {len(requests):,} prompts was moved to the continuations, as "
            f"in lm-eval (the first: {moved[0]}); end a prompt with a word, and begin its continuation with the space",
            err=True,
        )


def _score(
    start: Callable[[Advance], Iterator[list[ScoredRequest]]],
    num_steps: int,
    done: Set[int],
    alphas: Sequence[float],
    results: ResultsFile | None,
    tokenizer: Any | None,
    *,
    as_json: bool,
) -> None:
    """Hand on each row at once; a table, which has no other place to go, is printed at the end in input order."""
    waiting: list[ScoredRequest] = []
    began, num_lines, num_tokens = time.perf_counter(), 0, 0
    with progress(num_steps, shown=True, label="scoring") as advance:
        for scored in (one for batch in start(advance) for one in batch if one.request.number not in done):
            row = scored.to_row(alphas, tokenizer)
            if results is not None:
                results.append(row)
            if as_json:
                click.echo(json.dumps(row, ensure_ascii=False))
            elif results is None:
                waiting.append(scored)
            num_lines += 1
            num_tokens += sum(score.num_tokens for score in scored.scores)
    if waiting:
        print_scores(sorted(waiting, key=lambda scored: scored.request.number), alphas)
    seconds = time.perf_counter() - began
    click.echo(f"lines: {num_lines}, tokens: {num_tokens}, seconds: {seconds:.1f}", err=True)


def _write_top_k(model: EnsembleForCausalLM, writer: TopKWriter, point: GridPoint, batch_size: int) -> None:
    """Write what is missing in the folder."""
    missing = [sequence for shard in writer.missing.values() for sequence in shard]
    began = time.perf_counter()
    with progress(len(missing), shown=True, label="sequences") as advance:
        writer.write(model, point, batch_size=batch_size, advance=advance)
    num_tokens, seconds = sum(len(one.continuations[0]) for one in missing), time.perf_counter() - began
    click.echo(f"sequences: {len(missing)}, tokens: {num_tokens}, seconds: {seconds:.1f}", err=True)
