"""Count what decoding does and time it, for `generate --stats`. Nothing is measured unless it is asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ensembler.decoding.drafting import Round
from ensembler.engine.text_member_set import TextMemberSet
from ensembler.modeling import EnsembleForCausalLM

PHASES = ("prefill", "draft", "verify", "step", "choose")


@dataclass
class DecodingStats:
    """Counts of a run. `num_rounds` are those that drafted; a plain step is one token for each running text.

    `num_tokens` is left to who knows the texts; `num_rows`: those of all steps together. `draft`: who drafted, None for
    nobody; `plain_reason`: why nothing was drafted, or nothing any more; `by_transformers`: why `transformers`' own
    loop decoded, with the number of batches; `text`: what members with other tokenizers did; `eager`: why models were
    not captured as CUDA graphs, by their names.
    """

    draft: str | None = None
    plain_reason: str | None = None
    by_transformers: dict[str, int] = field(default_factory=dict)
    eager: dict[str, str] = field(default_factory=dict)
    num_tokens: int = 0
    num_rounds: int = 0
    num_round_tokens: int = 0
    num_round_texts: int = 0
    num_plain_steps: int = 0
    num_rows: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    seconds: float = 0.0
    text: dict[str, Any] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    members: dict[str, float] = field(default_factory=dict)

    def add_batch_of_transformers(self, reason: str) -> None:
        """Count a batch that `transformers` decodes."""
        self.by_transformers[reason] = self.by_transformers.get(reason, 0) + 1

    def add(self, done: Round) -> None:
        """Count a round, or a plain step."""
        self.num_rows += done.num_rows
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
        row = {name: value for name, value in asdict(self).items() if name not in ("phases", "members", "seconds")}
        if self.seconds:  # it was timed
            phases = {name: self.phases[name] for name in PHASES if name in self.phases}
            phases["other"] = self.seconds - sum(phases.values())
            row["phases"] = {name: round(value, 6) for name, value in phases.items()}
            row["members"] = {name: round(value, 6) for name, value in self.members.items()}
            row["seconds"] = round(self.seconds, 6)
        return {
            **row,
            "rows_per_step": _ratio(self.num_rows, self.num_plain_steps + self.num_rounds),
            "acceptance": _ratio(self.num_accepted, self.num_drafted),
            "tokens_per_round": _ratio(self.num_round_tokens, self.num_round_texts),
            "tokens_per_second": _ratio(self.num_tokens, self.seconds),
        }


def _ratio(one: float, other: float) -> float | None:
    return round(one / other, 4) if other else None


class Meter:
    """Adds up seconds by phase and by member. On GPUs it waits for all of them before it looks at the clock."""

    def __init__(self, stats: DecodingStats) -> None:
        self.stats = stats
        self._phase: str | None = None

    @contextmanager
    def watching(self, model: EnsembleForCausalLM) -> Iterator[None]:
        """Time all that happens inside, and the members of `model`."""
        start = _now()
        model.member_set.timer = self.member
        try:
            yield
        finally:
            model.member_set.timer = None
            self.stats.eager = model.member_set.why_eager()
            if isinstance(model.member_set, TextMemberSet):
                self.stats.text = model.member_set.text.describe()
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

    @contextmanager
    def member(self, name: str) -> Iterator[None]:
        """Count the time inside as that of a model; outside of a phase it is a step of `transformers`' own loop."""
        start = _now()
        with nullcontext() if self._phase is not None else self.phase("step"):
            yield
        self.stats.members[name] = self.stats.members.get(name, 0.0) + _now() - start


def timed(meter: Meter | None, name: str) -> AbstractContextManager[None]:
    """The phase of a meter, or nothing."""
    return nullcontext() if meter is None else meter.phase(name)


def _now() -> float:
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)
    return time.perf_counter()
