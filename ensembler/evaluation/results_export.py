"""Give results to other programs: lines of JSON, a table in Parquet, curves of Weights & Biases or TensorBoard."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from ensembler.errors import ConfigError, OutputError
from ensembler.evaluation.figures import TaskFigures
from ensembler.evaluation.results_file import Results, dump
from ensembler.extras import require
from ensembler.files import check_not_input, write_whole

Record = tuple[Any, ...]


def lines(results: Results, what: str) -> Iterator[str]:
    """Yield each record of "rows", "documents", "notes" or "settings" as strict JSON, see `metric_values`."""
    names, records = _RECORDS[what]
    return (dump(dict(zip(names.split(), record, strict=True))) for record in records(results))


def write(results: Results, what: str, form: str, path: Path, *, overwrite: bool = False) -> None:
    """Write the records to a file, "jsonl" or "parquet"; to a new one unless `overwrite`.

    Raises OutputError, or MissingExtraError for pyarrow.

    In Parquet, α is a number and all other columns are texts: what is nested is JSON.
    """
    check_not_input(path, results.file)
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already; give --output another name, or add --overwrite")
    write_whole(path, _parquet(results, what) if form == "parquet" else (f"{line}\n" for line in lines(results, what)))


def _parquet(results: Results, what: str) -> bytes:
    arrow, parquet = require("pyarrow", "eval"), require("pyarrow.parquet", "eval")
    names, records = _RECORDS[what][0].split(), _RECORDS[what][1](results)
    schema = arrow.schema([(name, arrow.float64() if name == "alpha" else arrow.string()) for name in names])
    content = io.BytesIO()
    with parquet.ParquetWriter(content, schema) as writer:
        while batch := list(islice(records, 5000)):
            columns = [
                [value if value is None or isinstance(value, str | float) else dump(value) for value in column]
                for column in zip(*batch, strict=True)
            ]
            writer.write_table(arrow.table(columns, schema=schema))
    return content.getvalue()


def _rows(results: Results) -> Iterator[Record]:
    for run in results.runs():
        points = results.points(run)
        documents = {name: (task, name, part) for name, task, part, *_ in results.documents(run)}
        for name, measured in results.rows(run):
            for point, (answers, values, predictions) in zip(points, measured, strict=True):
                yield run, *documents[name], *point, values, predictions, answers


def _documents(results: Results) -> Iterator[Record]:
    return ((run, *document) for run in results.runs() for document in results.documents(run))


_RECORDS: dict[str, tuple[str, Callable[[Results], Iterator[Record]]]] = {
    "rows": ("run task document part rule alpha values predictions answers", _rows),
    "documents": ("run document task part prompt choices gold", _documents),
    "notes": ("kind name content", lambda results: iter(results.all_notes())),
    "settings": ("command settings", lambda results: iter([(results.command, results.settings)])),
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for one whose library is not installed, before anything is run."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(
                f"--log {name} needs its library, which is not installed; install it with: pip install {name}"
            )


def log_curves(names: Sequence[str], folder: Path, tasks: Sequence[TaskFigures], settings: Mapping[str, Any]) -> None:
    """Log the metric of each task, rule and α with its interval, and to W&B the α that was chosen."""
    if "wandb" in names:
        import wandb

        with wandb.init(project="ensembler", name=folder.name, dir=str(folder), config=dict(settings)) as run:
            run.define_metric("*", step_metric="alpha")
            for name, alpha, value in _scalars(tasks):
                run.log({"alpha": alpha, name: value})
            for task in tasks:
                for method in task.methods:
                    if method.chosen_by is not None:
                        run.summary[f"{task.name}/{method.method}/chosen alpha"] = method.alpha
    if "tensorboard" in names:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder / "tensorboard")) as writer:
            for name, alpha, value in _scalars(tasks):
                writer.add_scalar(name, value, round(1000 * alpha))  # TensorBoard knows whole steps only


def _scalars(tasks: Sequence[TaskFigures]) -> Iterator[tuple[str, float, float]]:
    """Names with the α and the value of each point, by α."""
    for task in tasks:
        for point in sorted(task.curve, key=lambda one: one.alpha):
            test = {"test": point.test.estimate, "test low": point.test.low, "test high": point.test.high}
            for name, value in {**test, "validation": point.validation}.items():
                if value is not None:
                    yield f"{task.name}/{task.metric}/{point.rule}/{name}", point.alpha, value
