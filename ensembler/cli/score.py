"""`ensembler score`: log-probs of given continuations."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensembler.cli.options import EnsembleOptions, ensemble_options
from ensembler.errors import ConfigError, PromptError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ensembler.decoding.results import ResultsFile
    from ensembler.engine.grid import GridPoint
    from ensembler.evaluation.batches import Batch
    from ensembler.evaluation.logits_folder import LogitsFolder
    from ensembler.evaluation.scoring import ScoredRequest
    from ensembler.preflight import CheckedEnsemble

    # Begins scoring and yields batches; it calls its argument with the number of lines that a member has finished.
    Start = Callable[[Callable[[int], None]], Iterator[list[ScoredRequest]]]


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
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line per line of --data.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the JSON lines to a file, in input order.")
@click.option("--resume", is_flag=True, help="Go on with an --output file that was interrupted.")
@click.option("--overwrite", is_flag=True, help="Replace the --output file if it exists.")
def score(
    given: EnsembleOptions,
    alphas: tuple[float, ...],
    data: Path,
    skip_bad: bool,
    batch_size: int,
    offline_members: bool,
    per_token: bool,
    as_json: bool,
    output: Path | None,
    resume: bool,
    overwrite: bool,
) -> None:
    """Tell how probable given texts are under ENSEMBLE: log-probs and perplexity, for one alpha or several.

    \b
    ensembler score math --data questions.jsonl --alpha 0 --alpha 0.5 --alpha 1
    ensembler score math --data questions.jsonl --output scores.jsonl --offline-members
    """
    if output is None and (resume or overwrite or offline_members):
        option = "resume" if resume else "overwrite" if overwrite else "offline-members"
        raise ConfigError(f"--{option} was given without --output; name the file")
    if per_token and output is None and not as_json:
        raise ConfigError("--per-token was given without --json or --output; the table has no room for tokens")
    from ensembler.decoding.results import ResultsFile, check_output
    from ensembler.engine.grid import make_grid
    from ensembler.evaluation.batches import can_share_contexts, make_batches
    from ensembler.evaluation.logits_folder import LogitsFolder
    from ensembler.evaluation.requests import encode_questions, read_questions
    from ensembler.evaluation.scoring import fingerprint
    from ensembler.preflight import check_ensemble

    skip = (lambda message: click.echo(f"skipped: {message}", err=True)) if skip_bad else None
    questions = read_questions(data, skip=skip)
    if output is not None:
        check_output(output, resume=resume, overwrite=overwrite)
        if output.exists() and output.samefile(data):
            raise ConfigError(f"--output is the file of the data, {data}; choose another name")
    checked = check_ensemble(given.load_config())
    rule = checked.config.get_rule()
    grid = make_grid([rule.name], alphas or [checked.config.alpha])
    tokenizer = checked.require_tokenizer()
    requests = encode_questions(questions, tokenizer, context=checked.shortest_context, skip=skip)
    if not requests:
        raise PromptError("no line is left to score; mend the skipped lines")
    batches = make_batches(requests, batch_size, share_contexts=can_share_contexts(checked.model_configs.values()))
    results, done = None, frozenset[int]()
    if output is not None:
        run = fingerprint(checked.config, requests, grid, batch_size=batch_size, per_token=per_token)
        results = ResultsFile(output, run, resume=resume, overwrite=overwrite)
        done = results.done
    folder = None
    if offline_members:
        folder = LogitsFolder(Path(f"{output}.members"), run, resume=resume, overwrite=overwrite)
    num_rounds, start = _scorer(checked, batches, grid, folder, done)
    with results or nullcontext():
        num_steps = num_rounds * (len(requests) - len(done))
        shown = tokenizer if per_token else None
        _score(start, [point.alpha for point in grid], results, num_steps, shown, as_json=as_json)


def _score(
    start: Start,
    alphas: list[float],
    results: ResultsFile | None,
    num_steps: int,
    tokenizer: Any | None,
    *,
    as_json: bool,
) -> None:
    """Hand on each row at once; a table, which has no other place to go, is printed at the end in input order."""
    from ensembler.cli.tables import print_scores, progress

    waiting: list[ScoredRequest] = []
    began, num_lines, num_tokens = time.perf_counter(), 0, 0
    with progress(num_steps, shown=True, label="scoring") as advance:
        for scored in (one for batch in start(advance) for one in batch):
            row = scored.to_row(alphas, tokenizer)
            if results is not None:
                results.append(row)
            if as_json:
                click.echo(json.dumps(row, ensure_ascii=False))
            elif results is None:
                waiting.append(scored)
            num_lines += 1
            num_tokens += sum(score.num_tokens for score in scored.scores)
            advance(1)
    if waiting:
        print_scores(sorted(waiting, key=lambda scored: scored.request.number), alphas)
    seconds = time.perf_counter() - began
    click.echo(f"lines: {num_lines}, tokens: {num_tokens}, seconds: {seconds:.1f}", err=True)


def _scorer(
    checked: CheckedEnsemble,
    batches: list[Batch],
    grid: list[GridPoint],
    folder: LogitsFolder | None,
    done: frozenset[int],
) -> tuple[int, Start]:
    """How often the lines are gone over, and what starts it: all members at once, or one after another by `folder`."""
    if folder is None:
        from ensembler.evaluation.scoring import score_together
        from ensembler.modeling import EnsembleForCausalLM

        model = EnsembleForCausalLM.from_checked(checked)
        return 1, lambda advance: score_together(model, batches, grid, done=done)
    from ensembler.evaluation.offline import OfflineScoring
    from ensembler.planning.budgets import show_size

    offline = OfflineScoring(checked, batches, folder, done=done)
    offline.check_space()
    click.echo(f"{folder.path} will take {show_size(offline.num_bytes)} until the scores are complete", err=True)
    return 1 + offline.num_groups, lambda advance: offline.run(grid, advance=advance)
