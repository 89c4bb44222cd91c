"""A benchmark run into a folder: rows of all runs, costs by turns, summary. Goes on where it was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ensembler.errors import EnsemblerError, InputError
from ensembler.evaluation.bench.bench import Bench, PlannedRun, answer
from ensembler.evaluation.bench.costs import cost_id, make_load, measure_apart
from ensembler.evaluation.bench.methods import Method
from ensembler.evaluation.bench.summary import BenchTask, RowsByRun, chosen_alpha, summarise_bench
from ensembler.evaluation.rows_folder import RowsFolder

Advance = Callable[[int], None]
_ERROR = "error/"


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
        return sum(len(planned.sweep.ids) for planned in self.bench.runs if planned.run.instead_of is None)

    @property
    def errors(self) -> dict[str, str]:
        """What failed, by the name of the run: the last failure of each. A run that has all its rows did not fail."""
        rows = [row for name, (row,) in self._top.rows().items() if name.startswith(_ERROR)]
        answered = self._answered()
        return {row["run"]: row["error"] for row in rows if row["run"] not in answered}

    def answer(self, advance: Advance, report: Callable[[str, str], None]) -> None:
        """Make the rows of all runs. What fails is reported, by name and reason, and the others go on.

        Raises InputError for what no run can do anything about.
        """
        self._top.begin(self.command)
        if self.rank == 0:
            self._top.release()
        failed: set[str] = set()
        for planned in self.bench.runs:
            if (
                planned.run.instead_of is not None
                and f"{planned.experiment.name}.{planned.run.instead_of}" not in failed
            ):
                continue
            try:
                self._answer(planned, advance)
            except InputError:
                raise
            except (EnsemblerError, RuntimeError, MemoryError) as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                failed.add(planned.name)
                self._note_error(planned.name, reason)
                report(planned.name, reason)

    def _answer(self, planned: PlannedRun, advance: Advance) -> None:
        folder = self._folders[planned.name]
        answer(planned, folder, self.command, rank=self.rank, num_ranks=self.num_ranks, advance=advance)

    def _note_error(self, name: str, reason: str) -> None:
        """A row for this process's failure, after those of earlier attempts."""
        prefix = f"{_ERROR}{name}/{self.rank}/"
        attempt = sum(1 for known in self._top.rows() if known.startswith(prefix))
        with self._top:
            self._top.append([{"id": f"{prefix}{attempt}", "run": name, "error": reason}])

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
                    self._top.append([{"id": name, "alpha": alpha, **found}])
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
            expected = planned.run.instead_of is None
            if expected and rows[planned.name] is None and planned.name not in errors:
                return None
        if self.num_ranks > 1 and not self._top.claim():
            return None
        self._top.finish([])  # what several processes wrote becomes one file
        return summarise_bench(self.bench, rows, {name: row for name, (row,) in self._top.rows().items()}, errors)

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
        return {planned.name: self._folders[planned.name].finish(planned.sweep.ids) for planned in self.bench.runs}
