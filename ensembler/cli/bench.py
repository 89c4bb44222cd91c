"""`ensembler bench`: keep the old fine-tune, decode with the ensemble, or port the patch?"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ensembler.cli.command_class import Command, log, section
from ensembler.cli.ensemble_options import DEMO
from ensembler.cli.evaluation_options import backend_options
from ensembler.cli.figures_output import begin, finish
from ensembler.cli.image_options import say_left_out
from ensembler.cli.option_groups import PATH, output_option, overwrite_option, strict_option, verify_option
from ensembler.cli.ranks import naming_rank, use_own_gpu
from ensembler.errors import RunError
from ensembler.launch import num_ranks, this_rank
from ensembler.planning.sizes import show_size

if TYPE_CHECKING:
    from ensembler.evaluation.benchmark import Bench
    from ensembler.evaluation.store import Store
    from ensembler.evaluation.verdict import Requirement
    from ensembler.serving.choice import BackendChoice

_DISAGREEMENTS = (0.05, 0.1, 0.3)  # shares of documents on which two methods differ: much alike, and not


def print_plan(bench: Bench) -> None:
    """Print members with their bytes, vocabulary contracts, tasks with their examples, and detectable differences."""
    from ensembler.cli.tables import console
    from ensembler.evaluation.documents import TEST, VALIDATION
    from ensembler.evaluation.methods import compared_pairs
    from ensembler.inspection import summarise

    out = console()
    planned = [(study, plan, plan.run) for study in bench.studies for plan in study.plans]
    for of_run, plan, run in planned:
        if run.instead_of is not None:
            continue
        summary = summarise(plan.checked)
        out.print(f"\n{plan.name}: {', '.join(method.key for method in run.methods)}", markup=False)
        out.print(f"  vocabulary {summary.vocabulary}, {summary.shared:,} shared ids", markup=False)
        for member in summary.members:
            size = "?" if member.num_bytes is None else show_size(member.num_bytes)
            adapter = "" if member.adapter is None else f" + {member.adapter}"
            out.print(f"  {member.role}: {member.model}{adapter}, {size}, {member.dtype}", markup=False)
        given = [method for method in run.methods if method.has_alpha and method.alpha is not None]
        if given:
            out.print("  " + ", ".join(f"{one.key} at alpha {one.alpha:g}" for one in given), markup=False)
        for task in plan.tasks:
            num = len(task.subsets[VALIDATION])
            chosen = f", alpha chosen of {len(of_run.alphas)} on {num:,} others" if run.chooses else ""
            num_test = len(task.subsets[TEST])
            out.print(f"  {task.task.name} ({task.metric.key}): {num_test:,} test examples{chosen}", markup=False)
    for study in bench.studies:
        if study.experiment is not None and (missing := study.experiment.missing_models):
            said = ", ".join(f"{method} (no {', no '.join(roles)})" for method, roles in missing.items())
            out.print(f"\n{study.name}, not possible with its models: {said}", markup=False)
    num = sum(len(compared_pairs(study.method_keys)) * len(study.plans[0].tasks) for study in bench.studies)
    out.print(f"\nDifferences of right and wrong seen in 80 of 100 cases, with {num} comparisons in all:", markup=False)
    for study in bench.studies:
        for task in study.plans[0].tasks:
            num_test = len(task.subsets[TEST])
            experiment, cluster = study.experiment, study.plans[0].options.cluster
            if not task.metric.is_percent:
                shown = f"not told before the run of {task.metric.key}"
            elif cluster is not None or (experiment is not None and experiment.seeds):
                shown = f"not told before the run of {'several seeds' if cluster is None else f'groups by {cluster}'}"
            else:
                shown = _shown(num_test, 0.05 / max(num, 1))
            out.print(f"  {study.name}, {task.task.name}, {num_test:,} test examples: {shown}", markup=False)


def _shown(num: int, level: float) -> str:
    from ensembler.evaluation.decisions import detectable_by

    found = [(share, detectable_by(num, share, level=level)) for share in _DISAGREEMENTS]
    shown = [(share, difference) for share, difference in found if difference <= share]
    said = ", ".join(f"{100 * difference:.1f} if on {100 * share:g} %" for share, difference in shown)
    none = f"none if the two disagree on {100 * _DISAGREEMENTS[-1]:g} % or less"
    return said.replace(" if on", " points if the two disagree on", 1) or none


@contextmanager
def _warning_once() -> Iterator[None]:
    """Show each warning about members once, though runs share them."""
    shown: set[str] = set()

    def is_wanted(record: logging.LogRecord) -> bool:
        num_shown = len(shown)
        shown.add(record.getMessage())
        return len(shown) > num_shown

    with ExitStack() as stack:
        for logger in map(logging.getLogger, ("ensembler.engine.members", "ensembler.vision.towers")):
            logger.addFilter(is_wanted)
            stack.callback(logger.removeFilter, is_wanted)
        yield


class _RunByDefault(click.Group):
    """A group whose first word may be left out: `bench RECIPE` is `bench run RECIPE`."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_RunByDefault)
def bench() -> None:
    """Compare keeping the old fine-tune, decoding with the ensemble and porting the patch.

    \b
    ensembler bench RECIPE.yaml --output results
    ensembler bench compare results other-results
    ensembler bench expiry --floor 85 update-1 update-2 update-3
    """


_running = section("Benchmark")


@bench.command(is_resumable=True)
@click.argument("recipe", type=PATH)
@output_option(
    "--output",
    type=PATH,
    default=Path("bench"),
    show_default=True,
    metavar="DIR",
    help="The folder of the results; goes on where it stopped.",
)
@overwrite_option
@verify_option
@strict_option
@output_option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@_running("--dry-run", is_flag=True, help="Check the recipe and say what would run; no weights are loaded.")
@_running(
    "--confirm-run-unsafe-code", is_flag=True, help="Let tasks such as HumanEval run what a model wrote, unconfined."
)
@_running("--require", multiple=True, metavar="CONDITION", help='End with 1 unless it holds: "patch >= source_ft - 2".')
@backend_options
def run(
    recipe: Path,
    output: Path,
    overwrite: bool,
    verify_weights: bool,
    strict: bool,
    as_json: bool,
    dry_run: bool,
    confirm_run_unsafe_code: bool,
    require: tuple[str, ...],
    backend: BackendChoice,
) -> None:
    """Run all methods of RECIPE on the same examples and measure what each costs.

    RECIPE is a YAML file, or `demo` for that of the embedded family. DIR gets results.sqlite, summary.json, pictures
    and report.html. An interrupted benchmark goes on when the same command is run again. Started by accelerate launch
    or torchrun, each process takes some of the examples. With --backend vllm, costs are not measured.

    \b
    ensembler bench demo --dry-run
    ensembler bench my-recipe.yaml --output my-results
    ensembler bench my-recipe.yaml --require "patch >= source_ft - 2"
    """
    from ensembler.demo import demo_recipe
    from ensembler.extras import require as require_package

    require_package("pydantic", "eval")
    from ensembler.evaluation.benchmark import Bench
    from ensembler.evaluation.recipe_file import read_recipe
    from ensembler.evaluation.results_file import PATCHED
    from ensembler.evaluation.store import Store
    from ensembler.evaluation.transported import add_transported, check_transported
    from ensembler.evaluation.verdict import Requirement
    from ensembler.vision.answers import KINDS, ImageExperiment, ImageModels

    content = read_recipe(demo_recipe() if str(recipe) == DEMO else recipe, KINDS)
    requirements = [Requirement.parse(text, [each.methods for each in content.experiments]) for text in require]
    images = ImageModels(strict=strict)
    check_transported(content)
    if not dry_run:
        content = add_transported(content, output / PATCHED, _progress)
    with _warning_once():
        planned = Bench(
            content,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
            backend=backend,
            models={ImageExperiment: images},
            verify_weights=verify_weights,
        )
        for task in images.loaded.values():
            say_left_out(task)
        if dry_run:
            print_plan(planned)
            return
        store = Store(output, planned.settings, overwrite=overwrite)
        with naming_rank():
            _run(planned, store, requirements, as_json=as_json)


def _progress(total: int, label: str) -> AbstractContextManager[Callable[[int], None]]:
    from ensembler.cli.tables import progress

    return progress(total, label=label)


def _run(planned: Bench, store: Store, requirements: Sequence[Requirement], *, as_json: bool) -> None:
    from ensembler.cli.tables import progress
    from ensembler.engine.devices import check_devices
    from ensembler.evaluation.runner import Runner

    plans = [plan for study in planned.studies for plan in study.plans]
    check_devices(files for plan in plans for files in plan.checked.files.values())
    use_own_gpu()
    begin(store)
    runner = Runner(store, this_rank(), num_ranks())
    if this_rank() and runner.is_complete(planned.studies, {}):
        return  # what was finished before is shown by the first
    with progress(planned.num_documents, label="examples") as advance:
        runner.run_studies(
            planned.studies,
            advance,
            lambda name, reason: log.warning("%s failed, the others go on: %s", name, reason),
        )
    _measure(planned, store)
    figures = finish(
        planned.recipe.name, planned.recipe.description, planned.studies, runner, planned.settings, as_json=as_json
    )
    if figures is None:
        return
    if all(method.test is None for task in figures for method in task.methods):
        raise RunError(f"every method failed, the first with {figures[0].methods[0].error}")
    failures = {requirement.text: requirement.failures(figures) for requirement in requirements}
    for text in (text for text, found in failures.items() if not found):
        log.info("%s holds", text)
    if any(failures.values()):
        raise RunError("; ".join(failure for found in failures.values() for failure in found))


def _measure(planned: Bench, store: Store) -> None:
    """Measure costs, where they are wanted and no other process is at work: speed is no speed then."""
    from ensembler.cli.tables import progress
    from ensembler.serving.choice import VLLM

    if all(experiment.speed is None for experiment in planned.recipe.experiments):
        return
    if planned.backend.name == VLLM:
        log.info("speed and memory are those of the transformers backend: not measured with vLLM")
    elif num_ranks() > 1:
        if this_rank() == 0:
            log.info("run the same command once without a launcher to measure speed and memory")
    else:
        from ensembler.evaluation.costs import measure_costs, plan_measurements

        wanted = plan_measurements(planned.studies, store)
        with progress(len(wanted), label="measurements") as advance:
            measure_costs(wanted, store, advance)


@bench.command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@output_option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
def compare(a: Path, b: Path, as_json: bool) -> None:
    """Put the results in folders A and B side by side.

    \b
    ensembler bench compare results-7b results-13b
    """
    from ensembler.cli.figures_output import print_pairs
    from ensembler.evaluation.report import compare_folders

    pairs = compare_folders(a, b)
    if as_json:
        for pair in pairs:
            click.echo(json.dumps(pair, ensure_ascii=False))
    else:
        print_pairs(pairs, str(a), str(b))


@bench.command()
@click.argument("results", type=PATH, nargs=-1, required=True)
@_running("--floor", type=float, required=True, help="The lowest score to accept, as tables show it: 85 is 85 %.")
@output_option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
def expiry(results: tuple[Path, ...], floor: float, as_json: bool) -> None:
    """Fit the decline of the patch over updates of the base and say when it crosses a floor.

    RESULTS are the folders of three or more benchmarks in the order of time, each with another base as target_pt, and
    with the same patch and tasks.

    \b
    ensembler bench expiry --floor 85 update-1 update-2 update-3
    """
    from ensembler.extras import require as require_package

    require_package("pydantic", "eval")
    from ensembler.cli.figures_output import print_expiries
    from ensembler.evaluation.expiry import find_expiries, tell_expiry
    from ensembler.evaluation.report import json_text

    found = find_expiries(results, floor)
    if as_json:
        for one in found:
            click.echo(json_text({**vars(one), "sentence": tell_expiry(one)}))
    else:
        print_expiries(found)
