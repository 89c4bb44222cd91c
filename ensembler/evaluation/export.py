"""Give what a results file holds to other programs: as lines of JSON, or as a table in Parquet."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ensembler.errors import OutputError
from ensembler.evaluation.results_file import Results, dump
from ensembler.extras import require
from ensembler.files import write_whole

Record = tuple[Any, ...]


def lines(results: Results, what: str) -> Iterator[str]:
    """Yield each record of "rows", "documents", "notes" or "settings" as strict JSON, see `metric_values`."""
    names, records = _RECORDS[what]
    return (dump(dict(zip(names.split(), record, strict=True))) for record in records(results))


def write(results: Results, what: str, form: str, path: Path) -> None:
    """Write the records to a new file, "jsonl" or "parquet". Raises OutputError, or MissingExtraError for pyarrow.

    In Parquet, α is a number and all other columns are texts: what is nested is JSON.
    """
    if path.exists():
        raise OutputError(f"{path} exists already; give --output another name")
    write_whole(path, _parquet(results, what) if form == "parquet" else (f"{line}\n" for line in lines(results, what)))


def _parquet(results: Results, what: str) -> bytes:
    arrow, parquet = require("pyarrow", "eval"), require("pyarrow.parquet", "eval")
    names, records = _RECORDS[what][0].split(), _RECORDS[what][1](results)
    schema = arrow.schema([(name, arrow.float64() if name == "alpha" else arrow.string()) for name in names])
    content = io.BytesIO()
    with parquet.ParquetWriter(content, schema) as writer:
        while batch := list(islice(records, 5000)):
            columns = [[_flat(value) for value in column] for column in zip(*batch, strict=True)]
            writer.write_table(arrow.table(columns, schema=schema))
    return content.getvalue()


def _flat(value: Any) -> Any:
    return value if value is None or isinstance(value, str | float) else dump(value)


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
