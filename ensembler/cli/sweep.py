"""`ensembler sweep`: a grid of α on tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ensembler.cli.backend_options import backend_options
from ensembler.cli.image_sweep import plan_images
from ensembler.cli.options import DEMO, EnsembleOptions, ensemble_options
from ensembler.cli.ranks import naming_rank, use_own_gpu
from ensembler.cli.results import begin, finish, read_batch_size
from ensembler.cli.task_options import TaskOptions, task_options
from ensembler.errors import ConfigError
from ensembler.launch import num_ranks, this_rank
from ensembler.rules import RULE_NAMES

if TYPE_CHECKING:
    from ensembler.evaluation.figures import TaskFigures
    from ensembler.evaluation.methods import Run
    from ensembler.evaluation.plan import Plan, PlanOptions
    from ensembler.evaluation.store import Store
    from ensembler.serving.choice import BackendChoice

NAME = "sweep"


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
@click.option("--cluster", metavar="FIELD", help="Count documents with one value of this field together (a passage).")
@click.option("--margin", type=float, metavar="M", help="Test if methods are alike to within M in the table's unit.")
@click.option("--batch-size", default="8", show_default=True, metavar="N|auto", help="Documents asked together.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of samples, draws and bootstrap.")
@click.option(
    "--log", "trackers", multiple=True, type=click.Choice(["wandb", "tensorboard"]), help="Also log the curve there."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("sweep"),
    show_default=True,
    metavar="DIR",
    help="The folder of the results.",
)
@click.option("--write-alpha", is_flag=True, help="Put the alpha of the one task and rule into the folder ENSEMBLE.")
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
    cluster: str | None,
    margin: float | None,
    batch_size: str,
    seed: int,
    trackers: tuple[str, ...],
    output: Path,
    write_alpha: bool,
    as_json: bool,
    backend: BackendChoice,
) -> None:
    """Choose alpha for ENSEMBLE on validation examples, and report it on others.

    All alphas and rules share the forwards of the members: a grid costs little more than one alpha. DIR gets
    results.sqlite, summary.json, pictures and report.html. An interrupted sweep goes on when the same command is run
    again. Started by accelerate launch or torchrun, each process takes some of the examples. With --backend vllm, each
    alpha is a pass of its own.

    \b
    ensembler sweep demo --validation validation --rules base-change,eft
    ensembler sweep my-ensemble --task winogrande --validation 200 --output winogrande --write-alpha
    ensembler sweep my-ensemble --data qa.jsonl --prompt "{question}" --answer "{answer}" --validation 100
    accelerate launch --num_processes 4 -m ensembler sweep my-ensemble --task gsm8k --validation train --device cuda
    ensembler sweep my-classifiers --images flowers --validation validation
    """
    names = tuple(name.strip() for name in rules.split(",")) if rules is not None else ()
    from ensembler.evaluation.methods import sweep_run
    from ensembler.evaluation.plan import PlanOptions
    from ensembler.evaluation.store import Store
    from ensembler.evaluation.tracking import check_trackers
    from ensembler.rules import parse_alphas

    grid = parse_alphas(alphas)
    options = PlanOptions(
        validation=validation,
        select=select,
        one_standard_error=one_standard_error,
        metric=tasks.metric_key,
        cluster=cluster,
        margin=margin,
        batch_size=read_batch_size(batch_size),
        seed=seed,
    )
    check_trackers(trackers)
    config = replace(given, rule=names[0] if names else None).load_config()
    run = sweep_run(NAME, config, names or (config.get_rule().name,), grid, chooses=options.chooses)
    if strict and images is None:
        raise ConfigError("--strict was given without --images; leave it out, or name a folder of images")
    if images is not None:
        plan = plan_images(run, images, tasks, options, backend, strict=strict)
    else:
        plan = _plan_texts(run, tasks, options, backend, is_demo=given.ensemble == DEMO)
    folder = _check_write(given, plan) if write_alpha else None
    store = Store(output, plan.settings)
    if this_rank() == 0:
        _say_choice(run, options)
    with naming_rank():
        _run(plan, store, trackers, folder, as_json=as_json)


def _plan_texts(run: Run, tasks: TaskOptions, options: PlanOptions, backend: BackendChoice, *, is_demo: bool) -> Plan:
    from ensembler.demo import demo_task
    from ensembler.evaluation.plan import Plan
    from ensembler.evaluation.text_answers import TextAnswerer
    from ensembler.preflight import check_ensemble

    checked = check_ensemble(run.config)
    limit = backend.shortest_context(checked)
    loaded = tasks.load(demo_task() if is_demo else None, None if limit is None else limit[1])
    answerer = TextAnswerer(checked, options.seed, backend)
    return Plan(run, checked, answerer, [task.for_model(answerer.model) for task in loaded], options)


def _check_write(given: EnsembleOptions, plan: Plan) -> Path:
    """Return the folder that the chosen α is to be written into. Raises ConfigError where there is no such, or no α."""
    if given.ensemble in (None, DEMO) or not Path(given.ensemble or "").is_dir():
        raise ConfigError("--write-alpha was given without a folder to write into; name the folder of an ensemble")
    for name in ("constant", "slope", "cutoff", "outside", "patch"):
        if getattr(given, name) not in (None, ()):
            raise ConfigError(f"--write-alpha was given with --{name}, which the folder does not have; leave one out")
    for what, num in (("tasks", len(plan.tasks)), ("rules", len(plan.run.rules))):
        if num > 1:
            raise ConfigError(
                f"--write-alpha was given with {num} {what}, and a folder has one alpha; give one of them"
            )
    if len(plan.run.alphas) > 1 and not plan.options.chooses:
        raise ConfigError("--write-alpha was given and nothing chooses alpha; add --validation or --select perplexity")
    return Path(given.ensemble or "")


def _write_alpha(folder: Path, task: TaskFigures) -> None:
    from ensembler.evaluation.recommendation import recommended
    from ensembler.folder import set_point

    (rule,) = task.rules
    chosen, pick = task.chosen(rule), recommended(task)
    assert chosen is not None
    assert chosen.alpha is not None
    set_point(folder, rule, chosen.alpha)
    other = "" if pick is None or pick == chosen else f"; the recommendation is another: {pick.title}"
    click.echo(f"{folder}: rule {rule} at alpha {chosen.alpha:g} is written into config.json{other}", err=True)


def _run(plan: Plan, store: Store, trackers: tuple[str, ...], folder: Path | None, *, as_json: bool) -> None:
    """Run what is missing, write and print the figures, and put the chosen α into `folder`."""
    from ensembler.cli.tables import progress
    from ensembler.evaluation.runner import Runner
    from ensembler.evaluation.study import sweep_study

    begin(store)
    runner = Runner(store, this_rank(), num_ranks())
    if this_rank() != 0 and plan.is_finished(store):
        return  # what was finished before is shown by the first
    if this_rank() == 0:
        _say_begin(plan, len(plan.names & store.done(NAME)))
    use_own_gpu()
    with progress(len(plan.names), shown=this_rank() == 0, label="examples", lines=True) as advance:
        runner.run(plan, advance)
    figures = finish(NAME, "", [sweep_study(plan)], runner, plan.settings, trackers=trackers, as_json=as_json)
    if figures is not None and folder is not None:
        _write_alpha(folder, figures[0])


def _say_choice(run: Run, options: PlanOptions) -> None:
    """Warn about likely mistakes before a long run."""
    if len(run.alphas) == 1:
        click.echo(f"one alpha, {run.alphas[0]:g}: there is nothing to choose", err=True)
    elif not options.chooses:
        click.echo(
            "no alpha will be chosen: --validation N (or a split), or --select perplexity, chooses one; the same "
            "command with it goes on from these rows",
            err=True,
        )


def _say_begin(plan: Plan, num_done: int) -> None:
    num, num_points, num_compared = len(plan.names), len(plan.grid), len(plan.grid) - len(plan.points)
    compared = f" ({num_compared} of them to compare with)" if num_compared else ""
    done = "" if not num_done else ", all are done" if num_done == num else f", {num_done:,} are done"
    click.echo(f"{num:,} examples at {num_points} points{compared}{done}", err=True)
    if num_ranks() > 1:
        click.echo(f"{num_ranks()} processes share the batches", err=True)
