"""Plans run into a store: what is missing is answered, measured and written by batches. Goes on where it stopped."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch

from ensembler.errors import MissingExtraError, OutputError, StoreError
from ensembler.evaluation.backends import Advance
from ensembler.evaluation.documents import Answer, Document
from ensembler.evaluation.ensemble_plan import AUTO, Plan
from ensembler.evaluation.methods import Study
from ensembler.evaluation.results_file import Measured
from ensembler.evaluation.store import Store

ERROR, BEGUN, BATCH_SIZE = "error", "begun", "batch size"  # kinds of notes
_MOST_LOSSES = 2  # without a new row in between


@dataclass
class Runner:
    """Answers plans into `store`, as process `rank` of `num_ranks`: every `num_ranks`-th batch is its own."""

    store: Store
    rank: int = 0
    num_ranks: int = 1

    def __post_init__(self) -> None:
        self._num_known = len(self.store.notes(ERROR))  # failures of earlier commands, which this one tries again

    def run(self, plan: Plan, advance: Advance, *, alone: bool = False) -> None:
        """Answer what is missing of a plan; `alone`: all of it, whatever other processes do.

        Raises EnsemblerError, or what torch raises without memory.
        """
        self.store.begin_run(plan.name, plan.grid, plan.documents())
        done = self.store.done(plan.name)
        advance(len(plan.names & done))
        if plan.names <= done:
            return
        rank, num_ranks = (0, 1) if alone else (self.rank, self.num_ranks)
        size = plan.options.batch_size

        def missing(size: int) -> list[list[Document]]:
            own = plan.batches(size)[rank::num_ranks]
            return [batch for batch in own if any(document.name not in done for document in batch)]

        if size != AUTO and not missing(int(size)):
            return
        try:
            with plan.answerer.open():
                self._answer(plan, missing(self._batch_size(plan) if size == AUTO else int(size)), done, advance)
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _batch_size(self, plan: Plan) -> int:
        """The size that the first process of the run found, which all keep to: rounding depends on it."""
        if not any(name == plan.name for name, _ in self.store.notes(BATCH_SIZE)):
            size = min(plan.answerer.largest_batch(document, plan.grid) for document in plan.longest)
            self.store.note(BATCH_SIZE, plan.name, {"size": size})
        return next(int(content["size"]) for name, content in self.store.notes(BATCH_SIZE) if name == plan.name)

    def _answer(
        self, plan: Plan, batches: Sequence[Sequence[Document]], done: frozenset[str], advance: Advance
    ) -> None:
        for batch, answered in zip(batches, plan.answerer.answer(batches, plan.grid), strict=True):
            rows = [
                (document.name, _measured(plan, document, by_point))
                for document, by_point in zip(batch, answered, strict=True)
                if document.name not in done
            ]
            self.store.add(plan.name, rows)
            advance(len(rows))

    def run_studies(self, studies: Iterable[Study], advance: Advance, report: Callable[[str, str], None]) -> None:
        """Answer all runs of several studies. A run that fails is noted and reported, and the others go on.

        Of several processes, one whose ensemble failed does all of what is in its place: the others may not know of it.
        Raises StoreError or OutputError for a store that cannot be written to or read, and MissingExtraError.
        """
        failed: set[str] = set()
        for plan in (plan for study in studies for plan in study.plans):
            instead_of = plan.run.instead_of
            if instead_of is not None and instead_of not in failed:
                continue
            reason = self._try(plan, advance, alone=instead_of is not None)
            if reason is not None:
                failed.add(plan.name)
                report(plan.name, reason)

    def _try(self, plan: Plan, advance: Advance, *, alone: bool) -> str | None:
        """Run a plan, and return why that failed, if it did."""
        try:
            self._note_beginning(plan)
            self.run(plan, advance, alone=alone)
        except (OutputError, StoreError, MissingExtraError):
            raise
        except BaseException as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.store.note(
                ERROR, plan.name, {"rank": self.rank, "done": len(self.store.done(plan.name)), "error": reason}
            )
            if not isinstance(error, Exception):  # Ctrl-C, which ends everything
                raise
            return reason  # a model may raise anything; it is the note of this run
        return None

    def _note_beginning(self, plan: Plan) -> None:
        """Note that a run is begun, or raise MemoryError where the process was lost in it again and again.

        A process that the system ends for lack of memory says nothing, and the same command would end there for ever.
        """
        if self.num_ranks > 1 or plan.is_finished(self.store):
            return
        num_done = len(self.store.done(plan.name))
        begun, failed = (
            [content for name, content in self.store.notes(kind) if name == plan.name and content["done"] == num_done]
            for kind in (BEGUN, ERROR)
        )
        lost = sum(not _is_alive(content.get("process")) for content in begun) - len(failed)
        if lost >= _MOST_LOSSES:
            raise MemoryError(
                f"the process was lost in it {lost} times without a new row, as where the system lacks memory; make "
                "room and run the same command again, or leave its methods out and give --output another folder"
            )
        self.store.note(BEGUN, plan.name, {"done": num_done, "process": _process()})

    def errors(self, studies: Iterable[Study]) -> dict[str, str]:
        """Return what failed since this runner was made, by the name of the run: the last failure of each."""
        plans = [plan for study in studies for plan in study.plans]
        unfinished = {plan.name for plan in plans if not plan.is_finished(self.store)}
        notes = self.store.notes(ERROR)[self._num_known :]
        return {name: content["error"] for name, content in notes if name in unfinished}

    def is_complete(self, studies: Iterable[Study], errors: Mapping[str, str]) -> bool:
        """Return whether each run is finished or failed, or is in place of one that did not fail."""
        return all(
            plan.name in errors or plan.is_finished(self.store)
            for study in studies
            for plan in study.plans
            if plan.run.instead_of is None or plan.run.instead_of in errors
        )


def _process() -> list[float]:
    """Return the start of the machine, the number of this process there and its start: no two processes share them."""
    return [psutil.boot_time(), os.getpid(), psutil.Process().create_time()]


def _is_alive(process: Sequence[float] | None) -> bool:
    """Return whether a process is at work on this machine, as where two commands go on with one store."""
    if process is None or process[0] != psutil.boot_time():
        return False
    try:
        return bool(psutil.Process(int(process[1])).create_time() == process[2])
    except psutil.NoSuchProcess:
        return False


def _measured(plan: Plan, document: Document, by_point: Sequence[Answer]) -> list[Measured]:
    """The measured answers at each point; many points answer alike, and are measured once."""
    known: dict[str, Measured] = {}
    rows = []
    for answers in by_point:
        key = repr(answers)
        if key not in known:
            known[key] = Measured(answers, *plan.measure(document, answers))
        rows.append(known[key])
    return rows
