"""`ensembler bench`: keep the old fine-tune, decode with the ensemble, or port the patch?"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ensembler.cli.backend_options import backend_options
from ensembler.cli.image_notices import say_left_out
from ensembler.cli.options import DEMO
from ensembler.cli.ranks import naming_rank, use_own_gpu
from ensembler.cli.results import begin, finish
from ensembler.errors import RunError
from ensembler.launch import num_ranks, this_rank

if TYPE_CHECKING:
    from ensembler.evaluation.bench import Bench
    from ensembler.evaluation.recipe import Experiment
    from ensembler.evaluation.requirements import Requirement
    from ensembler.evaluation.store import Store
    from ensembler.serving.choice import BackendChoice


@contextmanager
def _warning_once(experiments: Sequence[Experiment]) -> Iterator[None]:
    """Show each warning about members once, though runs share them; not that a patch was made for another base."""
    all_models = [models for each in experiments for models in (each.models, *each.seeds)]
    patches = {("target_pt", models["patch"].model) for models in all_models if "patch" in models}
    shown: set[str] = set()

    def is_wanted(record: logging.LogRecord) -> bool:
        num_shown = len(shown)
        shown.add(record.getMessage())
        return len(shown) > num_shown and tuple(record.args or ())[:2] not in patches

    with ExitStack() as stack:
        for logger in map(logging.getLogger, ("ensembler.adapters", "ensembler.vision.towers")):
            logger.addFilter(is_wanted)
            stack.callback(logger.removeFilter, is_wanted)
        yield


class _RunByDefault(click.Group):
    """A group whose first word may be left out: `bench RECIPE` is `bench run RECIPE`."""

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
    """


@bench.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("bench"),
    show_default=True,
    metavar="DIR",
    help="The folder of the results.",
)
@click.option("--dry-run", is_flag=True, help="Check the recipe and say what would run; no weights are loaded.")
@click.option(
    "--confirm-run-unsafe-code", is_flag=True, help="Let tasks such as HumanEval run what a model wrote, unconfined."
)
@click.option(
    "--require", multiple=True, metavar="CONDITION", help='End with 1 unless it holds: "patch >= source_ft - 2".'
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@backend_options
def run(
    recipe: Path,
    output: Path,
    dry_run: bool,
    confirm_run_unsafe_code: bool,
    require: tuple[str, ...],
    as_json: bool,
    backend: BackendChoice,
) -> None:
    """Run all methods of RECIPE on the same examples and measure what each costs.

    RECIPE is a YAML file, or `demo` for that of the embedded family. DIR gets results.sqlite, summary.json, pictures
    and report.html. An interrupted benchmark goes on when the same command is run again. Started by accelerate launch
    or torchrun, each process takes some of the examples. With --backend vllm, each alpha is a pass of its own, and
    costs are not measured.

    \b
    ensembler bench demo --dry-run
    ensembler bench my-recipe.yaml --output my-results
    ensembler bench my-recipe.yaml --require "patch >= source_ft - 2"
    """
    from ensembler.demo import demo_recipe
    from ensembler.extras import require as require_package

    require_package("pydantic", "eval")
    from ensembler.evaluation.bench import Bench
    from ensembler.evaluation.recipe_file import read_recipe
    from ensembler.evaluation.requirements import Requirement
    from ensembler.evaluation.store import Store
    from ensembler.vision.bench import ImageExperiment, ImageModels

    content = read_recipe(demo_recipe() if str(recipe) == DEMO else recipe, {"images": ImageExperiment})
    requirements = [Requirement.parse(text, [each.methods for each in content.experiments]) for text in require]
    images = ImageModels()
    with _warning_once(content.experiments):
        planned = Bench(
            content,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
            backend=backend,
            models={ImageExperiment: images},
        )
        for task in images.loaded.values():
            say_left_out(task)
        if dry_run:
            from ensembler.cli.bench_plan import print_plan

            print_plan(planned)
            return
        store = Store(output, planned.settings)
        with naming_rank():
            _run(planned, store, requirements, as_json=as_json)


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
    with progress(planned.num_documents, shown=this_rank() == 0, label="examples", lines=True) as advance:
        runner.run_studies(
            planned.studies,
            advance,
            lambda name, reason: click.echo(f"{name} failed, the others go on: {reason}", err=True),
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
        click.echo(f"{text} holds", err=True)
    if any(failures.values()):
        raise RunError("; ".join(failure for found in failures.values() for failure in found))


def _measure(planned: Bench, store: Store) -> None:
    """Measure costs, where they are wanted and no other process is at work: speed is no speed then."""
    from ensembler.cli.tables import progress
    from ensembler.serving.choice import VLLM

    if all(experiment.speed is None for experiment in planned.recipe.experiments):
        return
    if planned.backend.name == VLLM:
        click.echo("speed and memory are those of the transformers backend: not measured with vLLM", err=True)
    elif num_ranks() > 1:
        if this_rank() == 0:
            click.echo("run the same command once without a launcher to measure speed and memory", err=True)
    else:
        from ensembler.evaluation.costs import measure_costs, plan_measurements

        wanted = plan_measurements(planned.studies, store)
        with progress(len(wanted), shown=True, label="measurements", lines=True) as advance:
            measure_costs(wanted, store, advance)


@bench.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
def compare(a: Path, b: Path, as_json: bool) -> None:
    """Put the results in folders A and B side by side.

    \b
    ensembler bench compare results-7b results-13b
    """
    from ensembler.cli.figures_tables import print_pairs
    from ensembler.evaluation.report import compare_folders

    pairs = compare_folders(a, b)
    if as_json:
        for pair in pairs:
            click.echo(json.dumps(pair, ensure_ascii=False))
    else:
        print_pairs(pairs, str(a), str(b))
