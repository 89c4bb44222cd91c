"""A benchmark run into a folder: rows of all runs, costs by turns, summary. Goes on where it was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensembler.engine.devices import check_devices
from ensembler.errors import MissingExtraError, OutputError
from ensembler.evaluation.bench.bench import Bench, PlannedRun, answer
from ensembler.evaluation.bench.costs import FAILED, cost_id, make_load, measure_apart
from ensembler.evaluation.bench.methods import Method
from ensembler.evaluation.bench.summary import BenchTask, RowsByRun, chosen_alpha, summarise_bench
from ensembler.evaluation.changes import Answers, changed_by
from ensembler.evaluation.rows_folder import ROWS, Row, RowsFolder

Advance = Callable[[int], None]
_ERROR, _BEGUN = "error/", "begun/"
_MOST_LOSSES = 2  # without a new row in between


@dataclass
class BenchRunner:
    """Runs a planned benchmark into `out`, as one of `num_ranks` processes.

    The rows of a run are in runs/NAME; the folder itself has a row for each measurement and for each failure. Raises
    OutputError where the folder holds something else or another benchmark: the message names the difference.
    """

    bench: Bench
    out: Path
    command: str
    rank: int = 0
    num_ranks: int = 1

    def __post_init__(self) -> None:
        self._top = RowsFolder(self.out, self.bench.settings, rows_per_id=1, rank=self.rank)
        self._folders = {
            planned.name: self.bench.folder(self.out, planned, rank=self.rank) for planned in self.bench.runs
        }

    @property
    def num_examples(self) -> int:
        """How many examples all runs have that are not in place of others."""
        return sum(len(planned.sweep.ids) for planned in self.bench.runs if planned.instead_of is None)

    @property
    def errors(self) -> dict[str, str]:
        """What failed, by the name of the run: the last failure of each. A run that has all its rows did not fail."""
        rows = [row for name, (row,) in self._top.rows().items() if name.startswith(_ERROR)]
        answered = self._answered()
        return {row["run"]: row["error"] for row in rows if row["run"] not in answered}

    def answer(self, advance: Advance, report: Callable[[str, str], None]) -> None:
        """Make the rows of all runs. What fails is reported, by name and reason, and the others go on.

        Of several processes, one whose ensemble failed does all of what is in its place: the others may not know of it.
        Raises ConfigError for a device that is not there, OutputError for a folder that cannot be written to.
        """
        check_devices(files for planned in self.bench.runs for files in planned.checked.files.values())
        self._top.begin(self.command)
        if self.rank == 0:
            self._top.release()
        failed: set[str] = set()
        for planned in self.bench.runs:
            if planned.instead_of is not None and planned.instead_of not in failed:
                continue
            reason = self._try(planned, advance)
            if reason is not None:
                failed.add(planned.name)
                report(planned.name, reason)

    def _try(self, planned: PlannedRun, advance: Advance) -> str | None:
        """Make the rows of a run that are missing, and return why that failed, if it did."""
        num_done = len(self._folders[planned.name].rows())
        if num_done == len(planned.sweep.ids):
            self._answer(planned, advance)
            return None
        try:
            if self.num_ranks == 1:
                self._begin(planned.name, num_done)
            self._answer(planned, advance)
        except (OutputError, MissingExtraError):
            raise
        except BaseException as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self._note(f"{_ERROR}{planned.name}/{self.rank}/", run=planned.name, done=num_done, error=reason)
            if not isinstance(error, Exception):  # Ctrl-C, which ends everything
                raise
            return reason  # a model may raise anything; it is the row of this run
        return None

    def _begin(self, name: str, num_done: int) -> None:
        """Note that a run is begun, or raise MemoryError where the process was lost in it again and again.

        A process that the system ends for lack of memory says nothing, and the same command would end there for ever.
        """
        rows = [row for (row,) in self._top.rows().values() if row.get("run") == name and row["done"] == num_done]
        num_lost = sum(-1 if "error" in row else 1 for row in rows)
        if num_lost >= _MOST_LOSSES:
            raise MemoryError(
                f"the process was lost in it {num_lost} times without a new row, as where the system lacks memory; "
                f"to have it tried again take the lines {_BEGUN}{name} out of {self.out / ROWS}"
            )
        self._note(f"{_BEGUN}{name}/", run=name, done=num_done)

    def _answer(self, planned: PlannedRun, advance: Advance) -> None:
        folder = self._folders[planned.name]
        rank, num_ranks = (self.rank, self.num_ranks) if planned.instead_of is None else (0, 1)
        answer(planned, folder, self.command, rank=rank, num_ranks=num_ranks, advance=advance)

    def _note(self, prefix: str, **content: Any) -> None:
        """A row of this process, numbered after those of earlier attempts."""
        attempt = sum(1 for known in self._top.rows() if known.startswith(prefix))
        with self._top:
            self._top.append([{"id": f"{prefix}{attempt}", **content}])

    def costs(self, advance: Advance) -> None:
        """Measure every method in a process of its own, round after round of all methods, and append the rows."""
        rows, known = self._rows(), self._top.rows()
        with self._top:
            for number, planned, method in self._measurements():
                name, of_run = cost_id(planned, method, number), rows[planned.name]
                speed = planned.experiment.speed
                if speed is not None and name not in known and of_run is not None:
                    alpha = chosen_alpha(planned, method, planned.sweep.tasks[0], of_run)
                    found = measure_apart(make_load(planned, method, alpha, speed))
                    attempts = sum(1 for other in known if other.startswith(f"{name}{FAILED}"))
                    row = f"{name}{FAILED}{attempts}" if "error" in found else name
                    self._top.append([{"id": row, "alpha": alpha, **found}])
                advance(1)

    @property
    def num_measurements(self) -> int:
        """How many measurements all rounds have."""
        return len(list(self._measurements()))

    def summarise(self) -> list[BenchTask] | None:
        """Return the figures of all tasks; None while another process is at work, or where one was lost.

        Of several processes that finish together one alone gets them.
        """
        rows, errors = self._rows(), self.errors
        for planned in self.bench.runs:
            expected = planned.instead_of is None or planned.instead_of in errors
            if expected and rows[planned.name] is None and planned.name not in errors:
                return None
        if self.num_ranks > 1 and not self._top.claim():
            return None
        self._top.finish([])  # what several processes wrote becomes one file, in order
        for planned in self.bench.runs:
            if rows[planned.name] is not None:
                self._folders[planned.name].finish(planned.sweep.ids)
        return summarise_bench(self.bench, rows, {name: row for name, (row,) in self._top.rows().items()}, errors)

    def changed(self, task: BenchTask) -> list[dict[str, Any]]:
        """Return the images that each α of a task's methods changed, as `changed_by` has them; of texts none."""
        alphas = {method.method: method.alpha for method in task.methods}
        found = []
        for planned in self.bench.runs:
            is_of_images = planned.experiment.name == task.experiment and planned.sweep.has_pictures
            rows = self._rows_of(planned) if is_of_images else None
            if rows is None:
                continue
            examples = {row["id"]: row for row in planned.sweep.example_rows()}
            answers = Answers(task.task, task.metric, task.higher_is_better, rows, examples, planned.sweep.thumbnail)
            for method in planned.run.methods:
                alpha = alphas[method.name] if method.alone is None else None
                found.append(None if alpha is None else changed_by(answers, method.rule, alpha))
        return [one for one in found if one is not None]

    def _measurements(self) -> Iterator[tuple[int, PlannedRun, Method]]:
        """Round after round of all methods, so that drift hits all; each method by the run that has its rows."""
        answered = self._answered()
        served: dict[tuple[str, str], tuple[PlannedRun, Method]] = {}
        for planned in self.bench.runs:
            if planned.name in answered:
                for method in planned.run.methods:
                    served.setdefault((planned.experiment.name, method.name), (planned, method))
        rounds = [
            0 if planned.experiment.speed is None else planned.experiment.speed.rounds for planned, _ in served.values()
        ]
        for number in range(max(rounds, default=0)):
            for (planned, method), num in zip(served.values(), rounds, strict=True):
                if number < num:
                    yield number, planned, method

    def _answered(self) -> set[str]:
        return {name for name, rows in self._rows().items() if rows is not None}

    def _rows(self) -> RowsByRun:
        return {planned.name: self._rows_of(planned) for planned in self.bench.runs}

    def _rows_of(self, planned: PlannedRun) -> dict[str, list[Row]] | None:
        found = self._folders[planned.name].rows()
        ids = planned.sweep.ids
        return {name: found[name] for name in ids} if all(name in found for name in ids) else None
