"""`ensembler sweep`: a grid of α on tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ensembler.cli.command_class import Command, log, section
from ensembler.cli.ensemble_options import DEMO, EnsembleOptions
from ensembler.cli.evaluation_options import TaskOptions, backend_options, task_options, tasks_section
from ensembler.cli.figures_output import begin, finish, read_batch_size
from ensembler.cli.image_options import plan_images
from ensembler.cli.option_groups import (
    PATH,
    ensemble_options,
    output_option,
    overwrite_option,
    strict_option,
    verify_option,
)
from ensembler.cli.ranks import naming_rank, use_own_gpu
from ensembler.errors import ConfigError
from ensembler.launch import num_ranks, this_rank

if TYPE_CHECKING:
    from ensembler.evaluation.ensemble_plan import Plan, PlanOptions
    from ensembler.evaluation.figures import TaskFigures
    from ensembler.evaluation.methods import Run
    from ensembler.evaluation.store import Store
    from ensembler.serving.choice import BackendChoice

NAME, ALPHAS = "sweep", "0:1.5:0.1"


_choice, _statistics, _speed = section("Choice of alpha"), section("Statistics"), section("Speed")


@click.command(cls=Command, is_resumable=True)
@ensemble_options(several=True, default_alpha=ALPHAS)
@task_options
@tasks_section(
    "--images",
    type=PATH,
    metavar="DIR",
    help="For image classifiers, in place of --task: [SPLIT/]class/xxx.png, or a folder of `datasets`.",
)
@_choice(
    "--validation", metavar="N|SPLIT", help="Choose alpha on N examples, or on another split; the rest reports it."
)
@_choice(
    "--select",
    type=click.Choice(["metric", "perplexity"]),
    default="metric",
    show_default=True,
    help="Choose alpha by the validation metric, or without labels by the likelihood of the reported prompts.",
)
@_choice("--one-standard-error", is_flag=True, help="Choose the alpha nearest 0 within one of the best.")
@_statistics("--cluster", metavar="FIELD", help="Count documents with one value of this field together (a passage).")
@_statistics("--margin", type=float, metavar="M", help="Test if methods are alike to within M in the table's unit.")
@_speed("--batch-size", default="8", show_default=True, metavar="N|auto", help="Documents asked together.")
@_statistics("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of samples, draws and bootstrap.")
@output_option(
    "--output",
    type=PATH,
    default=Path("sweep"),
    show_default=True,
    metavar="DIR",
    help="The folder of the results; goes on where it stopped.",
)
@overwrite_option
@verify_option
@strict_option
@output_option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@output_option(
    "--log", "trackers", multiple=True, type=click.Choice(["wandb", "tensorboard"]), help="Also log the curve there."
)
@_choice("--write-alpha", is_flag=True, help="Put the alpha of the one task and rule into the folder ENSEMBLE.")
@backend_options
def sweep(
    given: EnsembleOptions,
    rules: tuple[str, ...],
    alphas: tuple[float, ...],
    tasks: TaskOptions,
    images: Path | None,
    validation: str | None,
    select: str,
    one_standard_error: bool,
    cluster: str | None,
    margin: float | None,
    batch_size: str,
    seed: int,
    output: Path,
    overwrite: bool,
    verify_weights: bool,
    strict: bool,
    as_json: bool,
    trackers: tuple[str, ...],
    write_alpha: bool,
    backend: BackendChoice,
) -> None:
    """Choose alpha for ENSEMBLE on validation examples, and report it on others.

    All alphas and rules share the forwards of the members: a grid costs little more than one alpha. DIR gets
    results.sqlite, summary.json, pictures and report.html. An interrupted sweep goes on when the same command is run
    again. Started by accelerate launch or torchrun, each process takes some of the examples. With --backend vllm, all
    alphas are requests of one run.

    \b
    ensembler sweep demo --validation validation --rule base-change,eft
    ensembler sweep my-ensemble --task winogrande --validation 200 --output winogrande --write-alpha
    ensembler sweep my-ensemble --data qa.jsonl --prompt "{question}" --answer "{answer}" --validation 100
    accelerate launch --num_processes 4 -m ensembler sweep my-ensemble --task gsm8k --validation train --device cuda
    ensembler sweep my-classifiers --images flowers --validation validation
    """
    from ensembler.evaluation.ensemble_plan import PlanOptions
    from ensembler.evaluation.methods import sweep_run
    from ensembler.evaluation.results_export import check_trackers
    from ensembler.evaluation.store import Store
    from ensembler.rules import parse_alphas

    options = PlanOptions(
        validation=validation,
        select=select,
        one_standard_error=one_standard_error,
        metric=tasks.metric_key,
        cluster=cluster,
        margin=margin,
        batch_size=read_batch_size(batch_size),
        seed=seed,
        verify_weights=verify_weights,
    )
    check_trackers(trackers)
    config = replace(given, alpha=None).load_config()
    grid = alphas or parse_alphas(ALPHAS)
    run = sweep_run(NAME, config, rules or (config.get_rule().name,), grid, chooses=options.chooses)
    if images is not None:
        plan = plan_images(run, images, tasks, options, backend, strict=strict)
    else:
        plan = _plan_texts(run, replace(tasks, strict=strict), options, backend, is_demo=given.ensemble == DEMO)
    folder = _check_write(given, plan) if write_alpha else None
    store = Store(output, plan.settings, overwrite=overwrite)
    if this_rank() == 0:
        _say_choice(run, options)
    with naming_rank():
        _run(plan, store, trackers, folder, as_json=as_json)


def _plan_texts(run: Run, tasks: TaskOptions, options: PlanOptions, backend: BackendChoice, *, is_demo: bool) -> Plan:
    from ensembler.demo import demo_task
    from ensembler.evaluation.ensemble_plan import Plan
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
    for name in ("constant", "slope", "cutoff", "outside", "allow_renamed_special", "patch"):
        if getattr(given, name) not in (None, ()):
            option = name.replace("_", "-")
            raise ConfigError(f"--write-alpha was given with --{option}, which the folder does not have; leave one out")
    for what, num in (("tasks", len(plan.tasks)), ("rules", len(plan.run.rules))):
        if num > 1:
            raise ConfigError(
                f"--write-alpha was given with {num} {what}, and a folder has one alpha; give one of them"
            )
    if len(plan.run.alphas) > 1 and not plan.options.chooses:
        raise ConfigError("--write-alpha was given and nothing chooses alpha; add --validation or --select perplexity")
    return Path(given.ensemble or "")


def _write_alpha(folder: Path, task: TaskFigures) -> None:
    from ensembler.evaluation.verdict import recommended
    from ensembler.folder import set_point

    (rule,) = task.rules
    chosen, pick = task.chosen(rule), recommended(task)
    assert chosen is not None
    assert chosen.alpha is not None
    set_point(folder, rule, chosen.alpha)
    other = "" if pick is None or pick == chosen else f"; the recommendation is another: {pick.title}"
    log.info("%s: rule %s at alpha %g is written into config.json%s", folder, rule, chosen.alpha, other)


def _run(plan: Plan, store: Store, trackers: tuple[str, ...], folder: Path | None, *, as_json: bool) -> None:
    """Run what is missing, write and print the figures, and put the chosen α into `folder`."""
    from ensembler.cli.tables import progress
    from ensembler.evaluation.methods import sweep_study
    from ensembler.evaluation.runner import Runner

    begin(store)
    runner = Runner(store, this_rank(), num_ranks())
    if this_rank() != 0 and plan.is_finished(store):
        return  # what was finished before is shown by the first
    if this_rank() == 0:
        _say_begin(plan, len(plan.names & store.done(NAME)))
    use_own_gpu()
    with progress(len(plan.names), label="examples") as advance:
        runner.run(plan, advance)
    figures = finish(NAME, "", [sweep_study(plan)], runner, plan.settings, trackers=trackers, as_json=as_json)
    if figures is not None and folder is not None:
        _write_alpha(folder, figures[0])


def _say_choice(run: Run, options: PlanOptions) -> None:
    """Warn about likely mistakes before a long run."""
    if len(run.alphas) == 1:
        log.info("one alpha, %g: there is nothing to choose", run.alphas[0])
    elif not options.chooses:
        log.info(
            "no alpha will be chosen: --validation N (or a split), or --select perplexity, chooses one; the same "
            "command with it goes on from these rows"
        )


def _say_begin(plan: Plan, num_done: int) -> None:
    num, num_points, num_compared = len(plan.names), len(plan.grid), len(plan.grid) - len(plan.points)
    compared = f" ({num_compared} of them to compare with)" if num_compared else ""
    done = "" if not num_done else ", all are done" if num_done == num else f", {num_done:,} are done"
    log.info("%s examples at %d points%s%s", f"{num:,}", num_points, compared, done)
    if num_ranks() > 1:
        log.info("%d processes share the batches", num_ranks())
