"""A benchmark run into a folder: rows of all runs, costs by turns, summary. Goes on where it was interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ensembler.errors import EnsemblerError, InputError
from ensembler.evaluation.bench.bench import Bench, PlannedRun, answer, cost_id, make_load, measure_apart
from ensembler.evaluation.bench.methods import Method
from ensembler.evaluation.bench.summary import BenchTask, chosen_alpha, summarise_bench
from ensembler.evaluation.rows_folder import Row, RowsFolder

Advance = Callable[[int], None]


@dataclass
class BenchRunner:
    """Runs a planned benchmark into `out`, as one of `num_ranks` processes.

    Raises OutputError where the folder holds something else or another benchmark: the message names the difference.
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
        self.errors: dict[str, str] = {}

    @property
    def num_examples(self) -> int:
        """How many examples all runs have."""
        return sum(len(planned.sweep.ids) for planned in self.bench.runs)

    def answer(self, advance: Advance) -> None:
        """Make the rows of all runs; a run that fails is noted in `errors`, and the others go on."""
        self._top.begin(self.command, [])
        for planned in self.bench.runs:
            try:
                answer(
                    planned,
                    self._folders[planned.name],
                    self.command,
                    rank=self.rank,
                    num_ranks=self.num_ranks,
                    advance=advance,
                )
            except InputError:
                raise
            except (EnsemblerError, RuntimeError, MemoryError) as error:
                self.errors[planned.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

    def costs(self, advance: Advance) -> None:
        """Measure every method in a process of its own, round after round of all methods, and append the rows."""
        speed = self.bench.recipe.speed
        rows = self._rows()
        known = self._top.rows()
        if speed is None:
            return
        with self._top:
            for number, planned, method in self._measurements():
                name, of_run = cost_id(planned, method, number), rows[planned.name]
                if name not in known and of_run is not None:
                    alpha = chosen_alpha(planned, method, planned.sweep.tasks[0], of_run)
                    found = measure_apart(make_load(planned, method, alpha, speed))
                    self._top.append([{"id": name, "alpha": alpha, **found}])
                advance(1)

    @property
    def num_measurements(self) -> int:
        """How many measurements all rounds have."""
        return len(self._measurements())

    def summarise(self) -> list[BenchTask] | None:
        """Return the figures of all tasks; None while another process is at work, or where one was lost."""
        rows = self._rows()
        if any(found is None and name not in self.errors for name, found in rows.items()):
            return None
        return summarise_bench(self.bench, rows, {name: row for name, (row,) in self._top.rows().items()}, self.errors)

    def _measurements(self) -> list[tuple[int, PlannedRun, Method]]:
        """Round after round of all methods, so that drift hits all."""
        rounds = 0 if self.bench.recipe.speed is None else self.bench.recipe.speed.rounds
        methods = [(planned, method) for planned in self.bench.runs for method in planned.run.methods]
        return [(number, planned, method) for number in range(rounds) for planned, method in methods]

    def _rows(self) -> dict[str, dict[str, list[Row]] | None]:
        return {planned.name: self._folders[planned.name].finish(planned.sweep.ids) for planned in self.bench.runs}
