"""`ensembler bench`: keep the old fine-tune, decode with the ensemble, or port the patch?"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ensembler.cli.backend_options import backend_options
from ensembler.cli.image_notices import say_left_out
from ensembler.cli.options import DEMO
from ensembler.cli.ranks import naming_rank, this_command, use_own_gpu
from ensembler.errors import RunError
from ensembler.launch import num_ranks, this_rank

if TYPE_CHECKING:
    from ensembler.evaluation.bench.bench import Bench
    from ensembler.evaluation.bench.recipe import Recipe
    from ensembler.serving.choice import BackendChoice
    from ensembler.vision.bench import ImagePlanner


class _SayOnce(logging.Filter):
    """Runs that share members are checked one after another: what is noticed of them is said once."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self._said
        self._said.add(message)
        return is_new


@contextmanager
def _saying_once(*loggers: str) -> Iterator[None]:
    """Say what these loggers notice once each."""
    once = _SayOnce()
    for name in loggers:
        logging.getLogger(name).addFilter(once)
    try:
        yield
    finally:
        for name in loggers:
            logging.getLogger(name).removeFilter(once)


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
@click.option("--allow-code-execution", is_flag=True, help="Let tasks such as HumanEval run what a model wrote.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@backend_options
def run(
    recipe: Path, output: Path, dry_run: bool, allow_code_execution: bool, as_json: bool, backend: BackendChoice
) -> None:
    """Run all methods of RECIPE on the same examples and measure what each costs.

    RECIPE is a YAML file, or `demo` for that of the embedded family. DIR gets the rows, summary.json, pictures and
    report.html. An interrupted benchmark goes on when the same command is run again. Started by accelerate launch or
    torchrun, each process takes some of the examples. With --backend vllm, each alpha is a pass of its own, and costs
    are not measured.

    \b
    ensembler bench demo --dry-run
    ensembler bench my-recipe.yaml --output my-results
    """
    from ensembler.demo import demo_recipe
    from ensembler.evaluation.bench.bench import Bench
    from ensembler.evaluation.bench.recipe_file import read_recipe

    content = read_recipe(demo_recipe() if str(recipe) == DEMO else recipe)
    planner = _image_planner(content)
    with _saying_once("ensembler.adapters", "ensembler.vision.loading"):
        planned = Bench(content, allow_code_execution=allow_code_execution, backend=backend, image_planner=planner)
        for task in () if planner is None else planner.tasks:
            say_left_out(task)
        if dry_run:
            from ensembler.cli.bench_tables import print_plan

            print_plan(planned)
            return
        with naming_rank():
            _run(planned, output, as_json=as_json)


def _image_planner(recipe: Recipe) -> ImagePlanner | None:
    """What plans experiments on images, where there are any: it needs packages that texts do not."""
    if all(experiment.images is None for experiment in recipe.experiments):
        return None
    from ensembler.vision.bench import ImagePlanner

    return ImagePlanner()


def _run(planned: Bench, output: Path, *, as_json: bool) -> None:
    from ensembler.cli.bench_tables import print_bench
    from ensembler.cli.tables import progress
    from ensembler.evaluation.bench.report import SUMMARY, write_bench
    from ensembler.evaluation.bench.running import BenchRunner
    from ensembler.serving.choice import VLLM

    use_own_gpu()
    runner = BenchRunner(planned, output, this_command(), this_rank(), num_ranks())
    with progress(runner.num_examples, shown=this_rank() == 0, label="examples", lines=True) as advance:
        runner.answer(advance, lambda name, reason: click.echo(f"{name} failed, the others go on: {reason}", err=True))
    has_speed = any(experiment.speed is not None for experiment in planned.recipe.experiments)
    if has_speed and planned.backend.name == VLLM:
        click.echo("speed and memory are those of the transformers backend: not measured with vLLM", err=True)
    elif has_speed and num_ranks() == 1:
        with progress(runner.num_measurements, shown=True, label="measurements", lines=True) as advance:
            runner.costs(advance)
    elif has_speed and this_rank() == 0:  # speed is no speed while other processes are at work
        click.echo("run the same command once without a launcher to measure speed and memory", err=True)
    tasks = runner.summarise()
    if tasks is None:
        if this_rank() == 0:
            click.echo(
                "this process is done, others are not: the last one writes the summary; if one was lost, run the same "
                "command again",
                err=True,
            )
        return
    settings = planned.settings
    files = write_bench(
        output, planned.recipe, tasks, command=runner.command, settings=settings, changed=runner.changed
    )
    if as_json:
        click.echo((output / SUMMARY).read_text(encoding="utf-8"), nl=False)
    else:
        print_bench(tasks)
    click.echo(f"{output}: runs/, rows.jsonl, {', '.join(files)}", err=True)
    if all(method.test is None for task in tasks for method in task.methods):
        raise RunError(f"every method failed, the first with {tasks[0].methods[0].error}")


@bench.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
def compare(a: Path, b: Path, as_json: bool) -> None:
    """Put the results in folders A and B side by side.

    \b
    ensembler bench compare results-7b results-13b
    """
    from dataclasses import asdict

    from ensembler.cli.bench_tables import print_pairs
    from ensembler.evaluation.bench.comparing import compare_folders

    pairs = compare_folders(a, b)
    if as_json:
        for pair in pairs:
            click.echo(json.dumps(asdict(pair), ensure_ascii=False))
    else:
        print_pairs(pairs, str(a), str(b))
