"""Run the members on one input: the only way in which they run, whoever asks.

`MemberSet.logits(step, cache)` gives each member's own logits. Without a cache or on an EnsembleCache it runs them as
`transformers` runs a model; on a RowCache every row stands at positions of its own, and steps of few tokens can be
replayed as graphs or run compiled. How members are loaded and how logits are combined is not its business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from ensembler_kernels import Combination
from torch import Tensor
from transformers import PreTrainedModel

from ensembler.engine.backbone import Backbone
from ensembler.engine.cuda_graphs import CudaRecorder, StepGraphs, compile_steps, why_not_captured, why_not_compiled
from ensembler.engine.ensemble_cache import EnsembleCache
from ensembler.engine.forward import Forward, Step, check_nan, grouped, plain_model, plan_forwards
from ensembler.engine.grid import combine_members
from ensembler.engine.row_cache import Masks, RowCache, Slots, bucket, why_not_by_row
from ensembler.errors import InputError
from ensembler.vocab import VocabularyContract

MOST_STATIC = 16  # tokens per row of a step that is captured or compiled: single ones, and drafts that are verified
_plans = count(1)
Timer = Callable[[str], AbstractContextManager[None]]


class MemberSet:
    """The members of an ensemble, `models` by role in a mapping in which they may be replaced, and how they run.

    `timer`, where it is set, is given the name of each forward and times what happens inside. `graphs` are there on
    GPUs; None: every step is launched piece by piece.
    """

    def __init__(self, models: Any, backbones: Sequence[Backbone], contract: VocabularyContract) -> None:
        self.backbones = tuple(backbones)
        self.timer: Timer | None = None
        self.graphs: StepGraphs | None = StepGraphs(CudaRecorder) if torch.cuda.is_available() else None
        self._models = models
        self._contract = contract
        self._compiled: dict[int, Callable[..., Any]] | None = None
        self._backend: Any = None
        self._planned: tuple[list[PreTrainedModel], list[Forward], list[object]] = ([], [], [])
        self._streams: dict[torch.device, list[Any]] = {}
        self._kept: RowCache | None = None
        self._obstacles: dict[int, str | None] = {}
        self._plan = 0

    @property
    def forwards(self) -> list[Forward]:
        """The forwards of a step; planned anew when a model was replaced or its weights have moved."""
        models = list(self._models.values())
        known, planned, weights = self._planned
        is_same = len(known) == len(models) and all(one is other for one, other in zip(known, models, strict=True))
        if is_same and weights == _weights_of(planned):
            return planned
        planned = plan_forwards(dict(self._models.items()), self.backbones, self._contract)
        self._planned = models, planned, _weights_of(planned)
        self._kept, self._obstacles, self._plan = None, {}, next(_plans)
        if self.graphs is not None:
            self.graphs.clear()
        if self._compiled is not None:
            self.compile(self._backend)
        return planned

    def new_cache(self) -> EnsembleCache:
        """Return an empty growing cache."""
        return EnsembleCache.dynamic({forward.roles: forward.model for forward in self.forwards})

    def why_not_by_row(self) -> str | None:
        """Return which member cannot run on a RowCache, and why; None where all can."""
        for forward in self.forwards:
            reason = why_not_by_row(plain_model(forward.model))
            if reason is not None:
                return f"{' and '.join(forward.roles)} cannot keep a cache of rows: {reason}"
        return None

    def row_cache(self, num_rows: int, room: int, length: int | None = None) -> RowCache:
        """Return an empty RowCache for texts of at most `room` tokens, which begin with `length`: it may be reserved.

        Where steps are captured or compiled it has all of the room, and is the one that was kept, if that fits.
        """
        if not self.is_static:
            return self._make_cache(num_rows, min(room, bucket((length or room) + 1)))
        num_rows, room = bucket(num_rows, 1), bucket(room)
        kept, self._kept = self._kept, None  # nobody else gets it meanwhile
        if kept is None or kept.num_rows < num_rows or kept.room < room:
            del kept  # before the next is allocated
            return self._make_cache(num_rows, room)
        kept.empty()
        return kept

    def _make_cache(self, num_rows: int, room: int) -> RowCache:
        return RowCache([forward.roles for forward in self.forwards], num_rows, room, self._plan)

    def keep(self, cache: RowCache) -> None:
        """Keep a cache that nobody needs any more for the next call: graphs find its buffers where they were."""
        self._kept = cache if self.is_static else None

    @property
    def is_static(self) -> bool:
        """Return whether steps are captured or compiled, and so want inputs of few shapes."""
        return self._compiled is not None or (self.graphs is not None and bool(self._captured(self.forwards)))

    def compile(self, backend: Any) -> list[str]:
        """Compile each member's steps on a RowCache; return a line for each member that cannot be, which runs eagerly.

        Raises ConfigError where there is no C++ compiler.
        """
        self._backend, self._compiled, left_out = backend, {}, []
        if self.graphs is not None:
            self.graphs.clear()
        for forward in self.forwards:
            reason = why_not_compiled(forward.model, self.backbones)
            if reason is None:
                self._compiled[id(forward.model)] = compile_steps(forward.model, backend)
            else:
                left_out.append(f"{' and '.join(forward.roles)} runs without --compile: {reason}")
        self._kept = None
        return left_out

    def eager_forwards(self) -> dict[str, str]:
        """Return why forwards are not captured, by their names: what `--stats` says."""
        if self.graphs is None:
            return {}
        reasons = {forward.name: self.graphs.reason or self._why_not_captured(forward) for forward in self.forwards}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def logits(
        self,
        step: Step,
        cache: EnsembleCache | RowCache | None = None,
        forwards: Sequence[Forward] | None = None,
    ) -> dict[str, Tensor]:
        """Return the logits (rows, kept positions, V_member) of members by role, each on its member's device.

        `forwards`: which of them run (None: all). All of an EnsembleCache advances, or none of it; of a RowCache the
        caller sets the lengths. Raises RunError with the roles that failed, InputError for a cache of other members.
        """
        forwards = self.forwards if forwards is None else forwards
        if isinstance(cache, RowCache):
            return self._on_rows(step, cache, forwards)
        with self._advancing(cache):
            return self._as_transformers(step, cache, forwards)

    def combined(
        self, step: Step, cache: EnsembleCache | None, combination: Combination, alpha: float | Tensor
    ) -> Tensor:
        """Return the combination of all members (rows, kept positions, V), fp32, on the device of the first.

        `combination` takes them in the order of the vocabulary contract; `alpha` is a number or one for each row.
        Raises LogitsError naming the member that computed NaN; the cache is then as it was.
        """
        with self._advancing(cache):
            logits = self.logits(step, cache)
            combined = combine_members(logits, combination, alpha, self._contract)
            if combined.isnan().any():
                check_nan(logits)
        return combined

    def check_cache(self, cache: object) -> None:
        """Raise InputError unless `cache` is one for these members."""
        if not isinstance(cache, EnsembleCache | RowCache):
            raise InputError(
                f"past_key_values is a {type(cache).__name__}; an ensemble takes what its generate has returned, or an "
                "EnsembleCache as new_cache() makes it"
            )
        expected = {forward.roles for forward in self.forwards}
        if cache.parts.keys() != expected:
            found, wanted = (", ".join("+".join(roles) for roles in sorted(parts)) for parts in (cache.parts, expected))
            raise InputError(f"the cache is for {found}; the members run as {wanted}: make one with new_cache()")
        if isinstance(cache, RowCache) and cache.plan != self._plan:
            raise InputError("past_key_values was made by other members, or before they were moved; leave it out")

    @contextmanager
    def _advancing(self, cache: EnsembleCache | RowCache | None) -> Iterator[None]:
        """All of a cache advances inside, or none of it; a RowCache has its lengths set by the loop."""
        if cache is None or isinstance(cache, RowCache):
            yield
            return
        self.check_cache(cache)
        marks = cache.marks()
        try:
            yield
        except BaseException:
            cache.restore(marks)
            raise

    def _as_transformers(
        self, step: Step, cache: EnsembleCache | None, forwards: Sequence[Forward]
    ) -> dict[str, Tensor]:
        steps = {device: step.on(device) for device in {forward.device for forward in forwards}}
        logits: dict[str, Tensor] = {}
        for forward in sorted(forwards, key=lambda forward: forward.device.type == "cpu"):  # launches do not wait
            with self._timed(forward.name):
                here = steps[forward.device]
                own = None if cache is None else cache.parts[forward.roles]
                logits |= forward.run(here, here.attention_mask, own)
        return _in_order(logits, forwards)

    # -- on a RowCache ------------------------------------------------------------------------------------------------

    def _on_rows(self, step: Step, cache: RowCache, forwards: Sequence[Forward]) -> dict[str, Tensor]:
        positions = step.position_ids
        if positions is None:
            raise InputError("a row cache needs position_ids, which say where each token stands")
        last = int(positions.max())
        if last >= cache.room:
            raise InputError(f"a token stands at position {last} of a cache with room for {cache.room}")
        is_small = step.first_row == 0 and step.logits_to_keep == 0 and positions.shape[1] <= MOST_STATIC
        static = self._static(forwards) if is_small else []
        eager = [forward for forward in forwards if forward not in static]
        logits: dict[str, Tensor] = {}
        if static:
            padded = step.padded(min(bucket(positions.shape[0], 1), cache.num_rows), bucket(positions.shape[1], 1))
            logits |= self._run_static(padded, cache, static, positions.shape)
        for device in _devices(eager):
            own = [forward for forward in eager if forward.device == device]
            logits |= self._run_eager(step, cache, own, device)
        return _in_order(logits, forwards)

    def _run_eager(
        self, step: Step, cache: RowCache, forwards: Sequence[Forward], device: torch.device
    ) -> dict[str, Tensor]:
        assert step.position_ids is not None
        here = step.on(device)
        assert here.position_ids is not None
        slots = Slots.of(step.position_ids, here.position_ids, cache.room, step.first_row)
        masks = Masks(here.position_ids, slots)
        here = replace(here, position_ids=here.position_ids.clamp(min=0))
        logits: dict[str, Tensor] = {}
        for forward in forwards:
            with self._timed(forward.name):
                logits |= self._run_one(forward, here, cache, slots, masks)
        return logits

    def _run_one(self, forward: Forward, step: Step, cache: RowCache, slots: Slots, masks: Masks) -> dict[str, Tensor]:
        part = cache.parts[forward.roles]
        part.at = slots
        call = None if self._compiled is None or not slots.is_static else self._compiled.get(id(forward.model))
        model = plain_model(forward.model)
        # Prompts that begin together need none: transformers' attention is causal, and skips what no token sees.
        is_whole = slots.start == 0 and slots.num > MOST_STATIC
        mask = None if is_whole else masks.of(forward.mask_kind)
        # Single tokens that are launched need it not: there transformers copies nothing either.
        is_few = slots.is_static or 1 < step.input_ids.shape[1] <= MOST_STATIC
        try:
            with grouped(model) if is_few else nullcontext():
                return forward.run(step, mask, part, call)
        finally:
            part.at = None  # it may hold memory of a graph

    def _static(self, forwards: Sequence[Forward]) -> list[Forward]:
        """The forwards whose small steps are captured or compiled."""
        captured = self._captured(forwards)
        compiled = self._compiled or {}
        return [forward for forward in forwards if forward in captured or id(forward.model) in compiled]

    def _captured(self, forwards: Sequence[Forward]) -> list[Forward]:
        if self.graphs is None or self.graphs.reason is not None:
            return []
        return [forward for forward in forwards if self._why_not_captured(forward) is None]

    def _why_not_captured(self, forward: Forward) -> str | None:
        """Looked up once for each model: it walks through its modules."""
        if id(forward.model) not in self._obstacles:
            self._obstacles[id(forward.model)] = why_not_captured(forward.model)
        return self._obstacles[id(forward.model)]

    def _run_static(
        self, step: Step, cache: RowCache, forwards: Sequence[Forward], shape: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """Run a step of padded shape, graph by graph: one for each device, all launched before any is waited for."""
        assert step.position_ids is not None
        length = min(bucket(int(step.position_ids.max()) + 1), cache.room)
        captured = self._captured(forwards)
        logits: dict[str, Tensor] = {}
        for device in _devices(forwards):
            own = [forward for forward in forwards if forward.device == device]

            def run(
                ids: Tensor, positions: Tensor, own: Sequence[Forward] = own, device: torch.device = device
            ) -> dict[str, Tensor]:
                return self._run_parallel(ids, positions, cache, own, device, length)

            with self._timed("+".join(forward.name for forward in own)):
                if self.graphs is not None and all(forward in captured for forward in own):
                    key = (cache.version, step.input_ids.shape, length, *(forward.roles for forward in own))
                    logits |= self.graphs.run(key, run, (step.input_ids, step.position_ids), device)
                else:
                    logits |= run(step.input_ids.to(device), step.position_ids.to(device))
        return {role: values[: shape[0], : shape[1]] for role, values in logits.items()}

    def _run_parallel(
        self,
        ids: Tensor,
        positions: Tensor,
        cache: RowCache,
        forwards: Sequence[Forward],
        device: torch.device,
        length: int,
    ) -> dict[str, Tensor]:
        """Run forwards of one device on inputs that stay where they are; on a GPU each on a stream of its own."""
        slots = Slots.static(positions, cache.room, length)
        masks = Masks(positions, slots)
        step = Step(ids, position_ids=positions.clamp(min=0))
        if device.type != "cuda" or len(forwards) == 1:
            runs = [self._run_one(forward, step, cache, slots, masks) for forward in forwards]
            return {role: values for run in runs for role, values in run.items()}
        for forward in forwards:
            masks.of(forward.mask_kind)  # made before the streams part
        here = torch.cuda.current_stream(device)
        logits: dict[str, Tensor] = {}
        streams = self._streams.setdefault(device, [])
        streams += [torch.cuda.Stream(device) for _ in forwards[len(streams) :]]  # type: ignore[no-untyped-call]
        for forward, stream in zip(forwards, streams, strict=False):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                logits |= self._run_one(forward, step, cache, slots, masks)
        for stream in streams[: len(forwards)]:
            here.wait_stream(stream)
        return logits  # the streams wait for `here` before they write again

    def _timed(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.timer is None else self.timer(name)


def _weights_of(forwards: Sequence[Forward]) -> list[object]:
    """Return the address and dtype of the weights of each forward: graphs and compiled steps have them by address."""
    probes = [forward.probe for forward in forwards if forward.probe is not None]
    return [(probe.data_ptr(), probe.dtype, probe.device) for probe in probes]


def _devices(forwards: Sequence[Forward]) -> list[torch.device]:
    """The devices of forwards, GPUs first."""
    return sorted({forward.device for forward in forwards}, key=lambda device: (device.type == "cpu", str(device)))


def _in_order(logits: Mapping[str, Tensor], forwards: Sequence[Forward]) -> dict[str, Tensor]:
    return {role: logits[role] for forward in forwards for role in forward.roles}
