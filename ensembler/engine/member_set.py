"""Run the members on one input: the only way in which they run, whoever asks.

`MemberSet.logits(step, cache)` gives each member's own logits. Without a cache or on an EnsembleCache it runs them as
`transformers` runs a model; on a RowCache every row stands at positions of its own, and steps of few tokens can be
replayed as graphs or run compiled. How members are loaded and how logits are combined is not its business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch
from ensembler_kernels import Combination
from torch import Tensor
from transformers import DynamicCache

from ensembler.engine.backbone import Backbone
from ensembler.engine.cuda_graphs import CudaRecorder, StepGraphs, compile_steps, why_not_compiled
from ensembler.engine.devices import send
from ensembler.engine.ensemble_cache import EnsembleCache, has_cache
from ensembler.engine.grid import combine_members
from ensembler.engine.model_runner import ModelRunner, Step, check_nan, grouped, plain_model, plan_runners
from ensembler.engine.row_cache import Masks, RowCache, Slots, bucket, why_not_by_row
from ensembler.engine.scaled_positions import PositionScale, text_lengths
from ensembler.errors import InputError
from ensembler.vocab import VocabularyContract

MOST_STATIC = 16  # tokens per row of a step that is captured or compiled: single ones, and drafts that are verified
_plans = count(1)
Timer = Callable[[str], AbstractContextManager[None]]


class MemberSet:
    """The members of an ensemble, `models` by role in a mapping in which they may be replaced, and how they run.

    `roles`: in the order that combinations take. `timer`, where it is set, is given the name of each runner and times
    what happens inside. `graphs` are there on GPUs; None: every step is launched piece by piece.
    """

    def __init__(self, models: Any, backbones: Sequence[Backbone], contract: VocabularyContract) -> None:
        self.backbones = tuple(backbones)
        self.timer: Timer | None = None
        self.graphs: StepGraphs | None = StepGraphs(CudaRecorder) if torch.cuda.is_available() else None
        self._models = models
        self.contract = contract
        self.roles = tuple(contract.widths)
        self._compiled: dict[int, Callable[..., Any]] | None = None
        self._backend: Any = None
        self._planned: list[ModelRunner] = []
        self._planned_for: list[object] = []
        self._plan = 0
        self._streams: dict[torch.device, list[Any]] = {}
        self._kept: RowCache | None = None

    @property
    def runners(self) -> list[ModelRunner]:
        """The runners of the members; planned anew when a model was replaced or its weights have moved."""
        if torch.compiler.is_compiling():  # traced weights have no address, and must not be kept
            return self._planned or plan_runners(dict(self._models.items()), self.backbones, self.contract)
        if not self._planned or self._planned_for != self._models_and_weights():
            self._planned = plan_runners(dict(self._models.items()), self.backbones, self.contract)
            self._planned_for = self._models_and_weights()
            self._kept, self._plan = None, next(_plans)
            if self.graphs is not None:
                self.graphs.clear()
            if self._compiled is not None:
                self.compile(self._backend)
        return self._planned

    def _models_and_weights(self) -> list[object]:
        """Identify the models, and the memory of their weights: graphs and compiled steps have those by address."""
        probes = [runner.probe for runner in self._planned if runner.probe is not None]
        weights = [(probe.data_ptr(), probe.dtype, probe.device) for probe in probes]
        return [*map(id, self._models.values()), *weights]

    def new_cache(self) -> EnsembleCache | None:
        """Return an empty growing cache for each model, with sliding windows as its config says.

        None where a member takes no cache: all of them read each text again at every token then.
        """
        if not all(map(has_cache, self.runners)):
            return None
        return EnsembleCache({one.roles: DynamicCache(config=one.model.config) for one in self.runners})

    def why_not_by_row(self) -> str | None:
        """Return which member cannot run on a RowCache, and why; None where all can."""
        for runner in self.runners:
            reason = why_not_by_row(plain_model(runner.model))
            if reason is not None:
                return f"{' and '.join(runner.roles)} cannot keep a cache of rows: {reason}"
        return None

    def row_cache(self, num_rows: int, room: int, length: int | None = None) -> RowCache:
        """Return an empty RowCache for texts of at most `room` tokens, which begin with `length`: it may be reserved.

        Where steps are captured or compiled it has all of the room, and is the one that was kept, if that fits.
        """
        if self.is_static:
            num_rows, room = bucket(num_rows, 1), bucket(room)
        else:
            room = min(room, bucket((length or room) + 1))
        kept, self._kept = self._kept, None  # nobody else gets it meanwhile
        if kept is not None and kept.num_rows >= num_rows and kept.room >= room:
            kept.empty()
            return kept
        del kept  # before the next is allocated
        return self.new_row_cache(num_rows, room)

    def new_row_cache(self, num_rows: int, room: int) -> RowCache:
        """Return an empty RowCache of exactly this size."""
        return RowCache([one.roles for one in self.runners], num_rows, room, self._plan, self.scales)

    @property
    def scales(self) -> list[PositionScale]:
        """The scales of the members whose positions depend on the length of a text."""
        return [runner.scale for runner in self.runners if runner.scale is not None]

    def keep(self, cache: RowCache) -> None:
        """Keep a cache that nobody needs any more for the next call: graphs find its buffers where they were."""
        self._kept = cache if self.is_static else None

    @property
    def is_static(self) -> bool:
        """Return whether steps are captured or compiled, and so want inputs of few shapes."""
        return self._compiled is not None or (self.graphs is not None and bool(self._captured(self.runners)))

    def compile(self, backend: Any) -> list[str]:
        """Compile each member's steps on a RowCache; return a line for each member that cannot be, which runs eagerly.

        Raises ConfigError where there is no C++ compiler.
        """
        self._backend, self._compiled, left_out = backend, {}, []
        if self.graphs is not None:
            self.graphs.clear()
        for runner in self.runners:
            reason = why_not_compiled(runner.model, self.backbones)
            if reason is None:
                self._compiled[id(runner.model)] = compile_steps(runner.model, backend)
            else:
                left_out.append(f"{' and '.join(runner.roles)} runs without --compile: {reason}")
        self._kept = None
        return left_out

    def why_eager(self) -> dict[str, str]:
        """Return why models are not captured as CUDA graphs, by their runners' names: for `--stats`."""
        if self.graphs is None:
            return {}
        reasons = {runner.name: self.graphs.reason or runner.why_not_captured for runner in self.runners}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def logits(
        self,
        step: Step,
        cache: EnsembleCache | RowCache | None = None,
        runners: Sequence[ModelRunner] | None = None,
    ) -> dict[str, Tensor]:
        """Return the logits (rows, kept positions, V_member) of members by role, each on its member's device.

        `runners`: which of them run (None: all). All of an EnsembleCache advances, or none of it; of a RowCache the
        caller sets the lengths. Raises RunError with the roles that failed, InputError for a cache of other members.
        """
        runners = self.runners if runners is None else runners
        if isinstance(cache, RowCache):
            return self._on_rows(step, cache, runners)
        with self._advancing(cache):
            return self._as_transformers(step, cache, runners)

    def combined(
        self, step: Step, cache: EnsembleCache | None, combination: Combination, alpha: float | Tensor
    ) -> Tensor:
        """Return the combination of all members (rows, kept positions, V), fp32, on the device of the first.

        `combination` takes them in the order of `roles`; `alpha` is a number or one for each row.
        Raises LogitsError naming the member that computed NaN; the cache is then as it was.
        """
        with self._advancing(cache):
            logits = self.logits(step, cache)
            combined = combine_members(logits, combination, alpha, self.roles)
            if not torch.compiler.is_compiling() and combined.isnan().any():  # a traced value is not known
                check_nan(logits)
        return combined

    def check_cache(self, cache: object) -> None:
        """Raise InputError unless `cache` is one for these members."""
        if not isinstance(cache, EnsembleCache | RowCache):
            raise InputError(
                f"past_key_values is a {type(cache).__name__}; an ensemble takes what its generate has returned, or an "
                "EnsembleCache as new_cache() makes it"
            )
        expected = {runner.roles for runner in self.runners}
        if cache.caches.keys() != expected:
            found, wanted = (
                ", ".join("+".join(roles) for roles in sorted(known)) for known in (cache.caches, expected)
            )
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
        lengths = cache.lengths()
        try:
            yield
        except BaseException:
            cache.restore(lengths)
            raise

    def _as_transformers(
        self, step: Step, cache: EnsembleCache | None, runners: Sequence[ModelRunner]
    ) -> dict[str, Tensor]:
        steps = {device: step.to(device) for device in {runner.device for runner in runners}}
        logits: dict[str, Tensor] = {}
        for runner in sorted(runners, key=lambda runner: runner.device.type == "cpu"):  # launches do not wait
            with self._timed(runner.name):
                here = steps[runner.device]
                own = None if cache is None else cache.caches[runner.roles]
                if cache is not None and cache.rereading is not None and runner.roles not in cache.rereading.roles:
                    here = here.last(cache.rereading.num_new)
                if runner.rotaries and here.lengths is None:
                    here = replace(here, lengths=_lengths_of_step(here, own))
                moved = here if has_cache(runner) else here.without_left_padding()
                found = runner.run(moved, moved.attention_mask, own)
                logits |= found if moved is here else {role: here.moved_back(values) for role, values in found.items()}
        if cache is not None:
            num = step.input_ids.shape[1]
            if cache.rereading is not None:
                num, cache.rereading = cache.rereading.num_new, None
                logits = {role: values[:, -num:] for role, values in logits.items()}
            cache.num_tokens += num
        return _in_order(logits, runners)

    # -- on a RowCache ------------------------------------------------------------------------------------------------

    def _on_rows(self, step: Step, cache: RowCache, runners: Sequence[ModelRunner]) -> dict[str, Tensor]:
        positions = step.position_ids
        if positions is None:
            raise InputError("a row cache needs position_ids, which say where each token stands")
        last = int(positions.max())
        if last >= cache.room:
            raise InputError(f"a token stands at position {last} of a cache with room for {cache.room}")
        static: list[ModelRunner] = []
        if step.first_row == 0 and step.logits_to_keep == 0 and positions.shape[1] <= MOST_STATIC:
            captured, compiled = self._captured(runners), self._compiled or {}
            static = [runner for runner in runners if runner in captured or id(runner.model) in compiled]
        logits: dict[str, Tensor] = {}
        if static:
            padded = step.padded(min(bucket(positions.shape[0], 1), cache.num_rows), bucket(positions.shape[1], 1))
            logits |= self._run_static(padded, cache, static, positions.shape)
        eager = [runner for runner in runners if runner not in static]
        if step.lengths is None and any(runner.scale for runner in eager):
            self._reread(step, cache, eager)
            step = replace(step, lengths=positions + 1)
        logits |= self._run_eagerly(step, cache, eager)
        cache.longest = max(cache.longest, last + 1)
        return _in_order(logits, runners)

    def _run_eagerly(self, step: Step, cache: RowCache, runners: Sequence[ModelRunner]) -> dict[str, Tensor]:
        positions = step.position_ids
        assert positions is not None
        logits: dict[str, Tensor] = {}
        for device, eager in _by_device(runners):
            here = send(positions, device)
            slots = Slots.of(positions, here, cache.room, step.first_row)
            masks = Masks(here, slots)
            own = replace(step, position_ids=here.clamp(min=0)).to(device)
            for runner in eager:
                with self._timed(runner.name):
                    logits |= self._run_one(runner, own, cache, slots, masks)
        return logits

    def _reread(self, step: Step, cache: RowCache, runners: Sequence[ModelRunner]) -> None:
        """Read rows anew that pass the length at which the models' own `generate` drops their cache."""
        assert step.position_ids is not None
        for runner in runners:
            if runner.scale is None or runner.scale.reread_at is None:
                continue
            num = runner.scale.reread_at
            for row, position in enumerate(step.position_ids[:, 0].tolist(), start=step.first_row):
                if position == num:
                    ids, positions = torch.tensor([list(cache.texts[row][:num])]), torch.arange(num)[None]
                    again = Step(ids, None, positions, 1, row, lengths=torch.tensor([[num + 1]]))
                    self._run_eagerly(again, cache, [runner])

    def _run_one(
        self, runner: ModelRunner, step: Step, cache: RowCache, slots: Slots, masks: Masks
    ) -> dict[str, Tensor]:
        own = cache.caches[runner.roles]
        own.slots = slots
        call = None if self._compiled is None or not slots.is_static else self._compiled.get(id(runner.model))
        model = plain_model(runner.model)
        # Prompts that begin together need none: transformers' attention is causal, and skips what no token sees.
        is_whole = slots.start == 0 and slots.num > MOST_STATIC
        mask = None if is_whole else masks.of(runner.mask_kind)
        # Single tokens that are launched need it not: there transformers copies nothing either.
        is_few = slots.is_static or 1 < step.input_ids.shape[1] <= MOST_STATIC
        try:
            with grouped(model) if is_few else nullcontext():
                return runner.run(step, mask, own, call)
        finally:
            own.slots = None  # it may hold memory of a graph

    def _captured(self, runners: Sequence[ModelRunner]) -> list[ModelRunner]:
        if self.graphs is None or self.graphs.reason is not None:
            return []
        return [runner for runner in runners if runner.why_not_captured is None]

    def _run_static(
        self, step: Step, cache: RowCache, runners: Sequence[ModelRunner], shape: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """Run a step of padded shape, graph by graph: one for each device, all launched before any is waited for."""
        assert step.position_ids is not None
        length = min(bucket(int(step.position_ids.max()) + 1), cache.room)
        captured = self._captured(runners)
        logits: dict[str, Tensor] = {}
        for device, own in _by_device(runners):
            run = partial(self._run_parallel, cache, own, length)
            with self._timed("+".join(runner.name for runner in own)):
                if self.graphs is not None and all(runner in captured for runner in own):
                    key = (cache.version, step.input_ids.shape, length, *(runner.roles for runner in own))
                    logits |= self.graphs.run(key, run, (step.input_ids, step.position_ids), device)
                else:
                    logits |= run(step.input_ids.to(device), step.position_ids.to(device))
        return {role: values[: shape[0], : shape[1]] for role, values in logits.items()}

    def _run_parallel(
        self, cache: RowCache, runners: Sequence[ModelRunner], length: int, ids: Tensor, positions: Tensor
    ) -> dict[str, Tensor]:
        """Run models of one device on inputs that stay where they are; on a GPU each on a stream of its own."""
        device = runners[0].device
        slots = Slots.static(positions, cache.room, length)
        masks = Masks(positions, slots)
        step = Step(ids, position_ids=positions.clamp(min=0))
        logits: dict[str, Tensor] = {}
        if device.type != "cuda" or len(runners) == 1:
            for runner in runners:
                logits |= self._run_one(runner, step, cache, slots, masks)
            return logits
        for runner in runners:
            masks.of(runner.mask_kind)  # made before the streams begin
        here = torch.cuda.current_stream(device)
        streams = self._streams.setdefault(device, [])
        streams += [torch.cuda.Stream(device) for _ in runners[len(streams) :]]  # type: ignore[no-untyped-call]
        for runner, stream in zip(runners, streams, strict=False):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                logits |= self._run_one(runner, step, cache, slots, masks)
        for stream in streams[: len(runners)]:
            here.wait_stream(stream)
        return logits  # the streams wait for `here` before they write again

    def _timed(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.timer is None else self.timer(name)


def _lengths_of_step(step: Step, cache: Any) -> Tensor:
    num, mask = step.input_ids.shape[1], step.attention_mask
    num_past = mask.shape[1] - num if mask is not None else 0 if cache is None else int(cache.get_seq_length())
    return text_lengths(num, num_past, step.position_ids, mask)


def _by_device(runners: Sequence[ModelRunner]) -> list[tuple[torch.device, list[ModelRunner]]]:
    """Return the runners of each device, GPUs first."""
    devices = sorted({runner.device for runner in runners}, key=lambda device: (device.type == "cpu", str(device)))
    return [(device, [runner for runner in runners if runner.device == device]) for device in devices]


def _in_order(logits: Mapping[str, Tensor], runners: Sequence[ModelRunner]) -> dict[str, Tensor]:
    return {role: logits[role] for runner in runners for role in runner.roles}
