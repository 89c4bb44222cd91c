"""`ensembler sweep`: a grid of α on tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ensembler.cli.backend_options import backend_options
from ensembler.cli.image_sweep import plan_images
from ensembler.cli.options import DEMO, EnsembleOptions, ensemble_options
from ensembler.cli.ranks import naming_rank, this_command, use_own_gpu
from ensembler.cli.task_options import TaskOptions, task_options
from ensembler.launch import num_ranks, this_rank
from ensembler.rules import RULE_NAMES

if TYPE_CHECKING:
    from ensembler.evaluation.answering import Chunk
    from ensembler.evaluation.rows_folder import RowsFolder
    from ensembler.evaluation.sweep import Sweep, SweepOptions
    from ensembler.serving.choice import BackendChoice


@click.command()
@ensemble_options(point=False)
@click.option("--rules", metavar="RULE,...", help=f"Of {', '.join(RULE_NAMES)}.  [default: the ensemble's]")
@click.option(
    "--alphas", default="0:1.5:0.1", show_default=True, metavar="GRID", help="FIRST:LAST:STEP, both ends in; or A,B,..."
)
@task_options
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="For image classifiers, in place of --task: [SPLIT/]class/xxx.png, or a folder of `datasets`.",
)
@click.option("--strict", is_flag=True, help="With --images: stop at an image that cannot be read.")
@click.option(
    "--validation", metavar="N|SPLIT", help="Choose alpha on N examples, or on another split; the rest reports it."
)
@click.option(
    "--select",
    type=click.Choice(["metric", "perplexity"]),
    default="metric",
    show_default=True,
    help="Choose alpha by the validation metric, or without labels by the likelihood of the reported prompts.",
)
@click.option("--one-standard-error", is_flag=True, help="Choose the alpha nearest 0 within one of the best.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Examples run together.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of samples, draws and bootstrap.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("sweep"),
    show_default=True,
    metavar="DIR",
    help="The folder of the results.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@backend_options
def sweep(
    given: EnsembleOptions,
    rules: str | None,
    alphas: str,
    tasks: TaskOptions,
    images: Path | None,
    strict: bool,
    validation: str | None,
    select: str,
    one_standard_error: bool,
    batch_size: int,
    seed: int,
    output: Path,
    as_json: bool,
    backend: BackendChoice,
) -> None:
    """Choose alpha for ENSEMBLE on validation examples, and report it on others.

    All alphas and rules share the forwards of the members: a grid costs little more than one alpha. DIR gets
    rows.jsonl, summary.json, sweep.png and report.html. An interrupted sweep goes on when the same command is run
    again. Started by accelerate launch or torchrun, each process takes some of the examples. With --backend vllm, each
    alpha is a pass of its own.

    \b
    ensembler sweep demo --validation validation --rules base-change,eft
    ensembler sweep my-ensemble --task winogrande --validation 200 --output winogrande
    ensembler sweep my-ensemble --data qa.jsonl --prompt "{question}" --answer "{answer}" --validation 100
    accelerate launch --num_processes 4 -m ensembler sweep my-ensemble --task gsm8k --validation train --device cuda
    ensembler sweep my-classifiers --images flowers --validation validation
    """
    names = tuple(name.strip() for name in rules.split(",")) if rules is not None else ()
    from ensembler.demo import demo_task
    from ensembler.evaluation.rows_folder import RowsFolder
    from ensembler.evaluation.sweep import Sweep, SweepOptions
    from ensembler.preflight import check_ensemble
    from ensembler.rules import parse_alphas

    options = SweepOptions(
        rules=names,
        alphas=parse_alphas(alphas),
        validation=validation,
        select=select,
        one_standard_error=one_standard_error,
        metric=tasks.metric_key,
        batch_size=batch_size,
        seed=seed,
        backend=backend,
    )
    config = replace(given, rule=names[0] if names else None).load_config()
    if not names:
        options = replace(options, rules=(config.get_rule().name,))
    if images is not None:
        plan = plan_images(config, images, tasks, options, strict=strict)
    else:
        checked = check_ensemble(config)
        limit = backend.shortest_context(checked)
        loaded = tasks.load(demo_task() if given.ensemble == DEMO else None, None if limit is None else limit[1])
        plan = Sweep(checked, loaded, options)
    folder = RowsFolder(output, plan.settings, rows_per_id=len(plan.grid), rank=this_rank())
    if this_rank() == 0:
        _say_choice(options)
    with naming_rank():
        folder.begin(this_command(), plan.example_rows())
        if this_rank() == 0:
            folder.release()
        done = frozenset(folder.rows())
        chunks = plan.unfinished(done, rank=this_rank(), num_ranks=num_ranks())
        if chunks:
            _run(plan, folder, chunks, done)
        if not done.issuperset(plan.ids) or this_rank() == 0:  # what was finished before is told by the first
            _finish(plan, folder, as_json=as_json)


def _run(plan: Sweep, folder: RowsFolder, chunks: list[Chunk], done: frozenset[str]) -> None:
    from ensembler.cli.tables import progress

    if this_rank() == 0:
        _say_begin(plan, chunks, done)
    use_own_gpu()
    num_examples = sum(len(chunk.examples) for chunk in chunks)
    shown = this_rank() == 0
    with (
        plan.open() as backend,
        folder,
        progress(num_examples, shown=shown, label="examples", lines=True) as advance,
    ):
        for num in plan.run(backend, folder, chunks, done):
            advance(num)


def _say_choice(options: SweepOptions) -> None:
    """Say what may have been meant otherwise, before it takes hours."""
    if len(options.alphas) == 1:
        click.echo(f"one alpha, {options.alphas[0]:g}: there is nothing to choose", err=True)
    elif options.validation is None and not options.by_perplexity:
        click.echo(
            "no alpha will be chosen: --validation N (or a split), or --select perplexity, chooses one; the same "
            "command with it goes on from these rows",
            err=True,
        )


def _say_begin(plan: Sweep, chunks: list[Chunk], done: frozenset[str]) -> None:
    known = f", {len(done):,} are done" if done else ""
    click.echo(f"{len(plan.ids):,} examples at {len(plan.grid)} points{known}", err=True)
    if num_ranks() > 1:
        click.echo(f"{num_ranks()} processes; this one has {len(chunks):,} batches", err=True)


def _finish(plan: Sweep, folder: RowsFolder, *, as_json: bool) -> None:
    """Of several processes the last one to finish has all rows."""
    from ensembler.cli.sweep_tables import print_sweep
    from ensembler.evaluation.report import write_results
    from ensembler.evaluation.summary import summarise

    rows = folder.finish(plan.ids)
    if rows is not None and num_ranks() > 1 and not folder.claim():
        return
    if rows is None:
        if this_rank() == 0:
            click.echo(
                "this process is done, others are not: the last one writes the summary; if one was lost, run the same "
                "command again",
                err=True,
            )
        return
    summaries = summarise(plan, rows)
    write_results(plan, folder, rows, summaries)
    if as_json:
        click.echo((folder.path / "summary.json").read_text(encoding="utf-8"), nl=False)
    else:
        print_sweep(summaries)
    folder.release()
    click.echo(f"{folder.path}: rows.jsonl, summary.json, sweep.png, report.html", err=True)
