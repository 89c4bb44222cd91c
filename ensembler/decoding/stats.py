"""What decoding did and where its time went: `generate --stats`. Nothing is measured unless it is asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ensembler.decoding.pacing import Round
from ensembler.modeling import EnsembleForCausalLM
from ensembler.runners import Caches, Group, Runner, SerialRunner, Step

PHASES = ("prefill", "draft", "verify", "step", "combine", "sample")


@dataclass
class DecodingStats:
    """Counts of a run. `rounds` are those that drafted; a plain step is one token for each running text.

    `num_tokens` is left to who knows the texts. `draft`: who drafted, None for nobody; `plain_reason`: why nothing was
    drafted, or nothing any more; `undrafted`: batches that were decoded without any drafting, by reason.
    """

    draft: str | None = None
    plain_reason: str | None = None
    undrafted: dict[str, int] = field(default_factory=dict)
    num_tokens: int = 0
    num_rounds: int = 0
    num_round_tokens: int = 0
    num_round_texts: int = 0
    num_plain_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    members: dict[str, float] = field(default_factory=dict)

    def add_undrafted(self, reason: str) -> None:
        """Count a batch that `transformers` decodes."""
        self.plain_reason = reason
        self.undrafted[reason] = self.undrafted.get(reason, 0) + 1

    def add(self, done: Round) -> None:
        """Count a round, or a plain step."""
        if done.num_positions == 1:
            self.num_plain_steps += 1
            return
        self.num_rounds += 1
        self.num_round_tokens += done.num_tokens
        self.num_round_texts += done.num_rows
        self.num_drafted += done.num_drafted
        self.num_accepted += done.num_accepted

    def to_row(self) -> dict[str, Any]:
        """Return all of it, with what follows from it; seconds are rounded to microseconds."""
        row = asdict(self)
        phases = {name: self.phases[name] for name in PHASES if name in self.phases}
        phases["other"] = self.seconds - sum(phases.values())
        row["phases"] = {name: round(value, 6) for name, value in phases.items()}
        row["members"] = {name: round(value, 6) for name, value in self.members.items()}
        row["seconds"] = round(self.seconds, 6)
        return {
            **row,
            "acceptance": _ratio(self.num_accepted, self.num_drafted),
            "tokens_per_round": _ratio(self.num_round_tokens, self.num_round_texts),
            "tokens_per_second": _ratio(self.num_tokens, self.seconds),
        }


def _ratio(one: float, other: float) -> float | None:
    return round(one / other, 4) if other else None


class Meter:
    """Adds up seconds by phase and by member. On a GPU it waits for the device before it looks at the clock."""

    def __init__(self, stats: DecodingStats) -> None:
        self.stats = stats
        self._phase: str | None = None

    @contextmanager
    def watching(self, model: EnsembleForCausalLM) -> Iterator[None]:
        """Time all that happens inside, and the members of `model`."""
        runner, start = model.runner, _now()
        model.runner = TimedRunner(runner, self)
        try:
            yield
        finally:
            model.runner = runner
            self.stats.seconds += _now() - start

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as that of a phase; phases do not lie in each other."""
        start, self._phase = _now(), name
        try:
            yield
        finally:
            self._phase = None
            self.stats.phases[name] = self.stats.phases.get(name, 0.0) + _now() - start

    def forwards(self, num_positions: int) -> AbstractContextManager[None]:
        """The phase of members that run outside of one: plain decoding's."""
        return nullcontext() if self._phase is not None else self.phase("prefill" if num_positions > 1 else "step")

    @contextmanager
    def member(self, name: str) -> Iterator[None]:
        """Count the time inside as that of a member."""
        start = _now()
        try:
            yield
        finally:
            self.stats.members[name] = self.stats.members.get(name, 0.0) + _now() - start


class TimedRunner:
    """Runs what another runner runs, and tells a meter how long: each forward, or all where they run at once."""

    def __init__(self, runner: Runner, meter: Meter) -> None:
        self.runner = runner
        self._meter = meter

    def run(self, groups: Sequence[Group], step: Step, caches: Caches | None) -> dict[str, Tensor]:
        """Return the logits of every member by role."""
        serial = isinstance(self.runner, SerialRunner)
        pieces: list[list[Group]] = [[(one,)] for group in groups for one in group] if serial else [list(groups)]
        logits: dict[str, Tensor] = {}
        with self._meter.forwards(step.input_ids.shape[1]):
            for piece in pieces:
                name = "+".join(role for group in piece for forward in group for role in forward.roles)
                with self._meter.member(name):
                    logits |= self.runner.run(piece, step, caches)
        return logits


def timed(meter: Meter | None, name: str) -> AbstractContextManager[None]:
    """The phase of a meter, or nothing."""
    return nullcontext() if meter is None else meter.phase(name)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
