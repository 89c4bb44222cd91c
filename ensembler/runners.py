"""Run the members on one input: one after another, or those on different devices at the same time."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ensembler.backbones import Backbone
from ensembler.errors import EnsemblerError, LogitsError, RunError
from ensembler.members import out_of_memory
from ensembler.sources import one_line
from ensembler.vocab import VocabularyContract


@dataclass(frozen=True)
class Step:
    """One input for all members.

    `input_ids` (rows, positions) int64; `attention_mask` (rows, past + positions) or None where nothing is padded;
    `position_ids` (rows or 1, positions) or None; `logits_to_keep`: how many last positions go through the
    head (0: all), or which.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    logits_to_keep: int | Tensor = 0

    def on(self, device: torch.device) -> Step:
        """The same on a device; nothing is copied where it is there already."""
        return Step(*(value.to(device) if isinstance(value, Tensor) else value for value in vars(self).values()))


@dataclass(frozen=True)
class Reader:
    """How one member reads ids: those from `num_held` on, which it does not hold, become `substitute` (None: it holds
    them all).
    """

    role: str
    num_held: int
    substitute: int | None

    def read(self, ids: Tensor) -> Tensor:
        """Return ids (rows, positions) as this member knows them."""
        return ids if self.substitute is None else torch.where(ids < self.num_held, ids, self.substitute)


class DecodeStep(Protocol):
    """What runs a model on those caches that it `takes`, called as the model is."""

    def takes(self, cache: Cache | None) -> bool: ...

    def __call__(self, **inputs: Any) -> Any: ...


@dataclass(frozen=True)
class Forward:
    """One forward of one model: for one member, or for several on a shared backbone, a block of rows for each.

    `accepts` names the arguments of the model's forward; `decode`, where it is compiled, runs it on static caches.
    """

    readers: tuple[Reader, ...]
    model: PreTrainedModel
    accepts: frozenset[str]
    backbone: Backbone | None = None
    decode: DecodeStep | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """The members that it serves, in the order of their rows."""
        return tuple(reader.role for reader in self.readers)

    @property
    def device(self) -> torch.device:
        """Where its inputs are wanted: of a model on several devices the first that computes."""
        places = getattr(self.model, "hf_device_map", None) or {}
        first = next((place for place in places.values() if str(place) not in ("cpu", "disk")), None)
        if first is not None:
            return torch.device("cuda", first) if isinstance(first, int) else torch.device(first)
        device: torch.device = torch.device("cpu") if places else self.model.device
        return device

    def run(self, step: Step, cache: Cache | None) -> dict[str, Tensor]:
        """Return the logits (rows, kept positions, V_member) of its members in their own dtype, on their device.

        `step` is on `device`. Raises RunError with the role where the model fails.
        """
        try:
            return self._run(step, cache)
        except EnsemblerError:
            raise
        except Exception as error:  # a model may raise anything; the user has to learn which of them it was
            roles = " and ".join(self.roles)
            if out_of_memory(error):
                raise RunError(
                    f"{roles} ran out of memory on {self.device} for {step.input_ids.shape[0]} rows; use a smaller "
                    "batch or another device (ensembler plan says what fits where)"
                ) from error
            cause = getattr(error, "inner_exception", error)  # torch.compile's own says only that a backend failed
            raise RunError(f"{roles} failed: {type(cause).__name__}: {one_line(cause)}") from error

    def _run(self, step: Step, cache: Cache | None) -> dict[str, Tensor]:
        num = len(self.readers)
        rows = step.input_ids.shape[0]
        keep = step.logits_to_keep
        optional = {
            "attention_mask": _repeated(step.attention_mask, num, rows),
            "position_ids": _repeated(step.position_ids, num, rows),
            "logits_to_keep": keep,
        }
        accepted = {name: value for name, value in optional.items() if name in self.accepts}
        ids = torch.cat([reader.read(step.input_ids) for reader in self.readers])
        decode = self.decode if self.decode is not None and self.decode.takes(cache) else self.model
        with nullcontext() if self.backbone is None else self.backbone.through(self.roles, num * rows):
            output = decode(input_ids=ids, past_key_values=cache, use_cache=cache is not None, **accepted)
        logits: Tensor = output.logits
        if "logits_to_keep" not in accepted:
            logits = logits[:, slice(-keep, None) if isinstance(keep, int) else keep]
        return dict(zip(self.roles, torch.split(logits, rows), strict=True))


Group = tuple[Forward, ...]
Caches = Mapping[tuple[str, ...], Cache]


def plan_forwards(
    models: Mapping[str, PreTrainedModel], backbones: Sequence[Backbone], contract: VocabularyContract
) -> list[Group]:
    """Return the forwards that serve `models` by role, those on the same weights together.

    There is one forward for each member, but one for all that a backbone batches. A view of a backbone that was
    compiled runs by itself, never at the same time as the others; one that was replaced is a group of its own.
    """
    groups: list[Group] = []
    for backbone in backbones:
        views = [role for role, model in models.items() if backbone.views.get(role) is _plain(model)]
        together = [role for role in views if backbone.batched and models[role] is backbone.views[role]]
        together = together if len(together) > 1 else []
        forwards = [_forward(together, backbone.model, contract, backbone)] if together else []
        forwards += [_forward([role], models[role], contract) for role in views if role not in together]
        groups.append(tuple(forwards))
    served = {role for group in groups for forward in group for role in forward.roles}
    groups += [(_forward([role], model, contract),) for role, model in models.items() if role not in served]
    order = list(models)
    return sorted((group for group in groups if group), key=lambda group: order.index(group[0].roles[0]))


class Runner(Protocol):
    """How the groups are run. `run` returns the logits of every member by role; `caches` are by the forwards' roles."""

    def run(self, groups: Sequence[Group], step: Step, caches: Caches | None) -> dict[str, Tensor]: ...


class SerialRunner:
    """One group after another."""

    def run(self, groups: Sequence[Group], step: Step, caches: Caches | None) -> dict[str, Tensor]:
        """Return the logits of every member. Raises RunError with the role that failed."""
        steps = _steps(groups, step)
        return {
            role: logits for group in groups for role, logits in _run_group(group, steps, caches, stream=None).items()
        }


class ThreadsRunner:
    """All groups at the same time, each in a thread and, on a GPU, a stream of its own.

    Threads live as long as a step. The host does not wait for the GPUs: their streams wait for each other.
    """

    def __init__(self) -> None:
        self._streams: dict[tuple[str, ...], Any] = {}

    def run(self, groups: Sequence[Group], step: Step, caches: Caches | None) -> dict[str, Tensor]:
        """Return the logits of every member. Where groups fail, all have stopped when the first error is raised."""
        steps = _steps(groups, step)
        inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()  # all are a thread's own
        kinds = {device.type for device in steps}
        casts = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]

        def run(group: Group, stream: Any | None) -> dict[str, Tensor]:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad), ExitStack() as stack:
                for kind, dtype in casts:
                    stack.enter_context(torch.autocast(kind, dtype))
                return _run_group(group, steps, caches, stream=stream)

        with ThreadPoolExecutor(len(groups)) as executor:
            # Streams wait for the caller's current one, which another thread does not see.
            running = [executor.submit(run, group, self._stream(group)) for group in groups]
        logits = {role: values for future in running for role, values in future.result().items()}
        for group in groups:
            self._join(group, logits)
        return logits

    def _stream(self, group: Group) -> Any | None:
        """The group's own stream, which starts when its inputs are there; None on a CPU."""
        device = group[0].device
        if device.type != "cuda":
            return None
        if group[0].roles not in self._streams:
            self._streams[group[0].roles] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[group[0].roles]
        stream.wait_stream(torch.cuda.current_stream(device))
        return stream

    def _join(self, group: Group, logits: Mapping[str, Tensor]) -> None:
        """Let what follows on the device wait for the group's stream, and hold the logits' memory until then."""
        stream = self._streams.get(group[0].roles)
        if stream is None:
            return
        current = torch.cuda.current_stream(group[0].device)
        current.wait_stream(stream)
        for role in (role for forward in group for role in forward.roles):
            logits[role].record_stream(current)


def choose_runner(groups: Sequence[Group]) -> Runner:
    """Threads where members are on different devices; on one device they would only wait for each other."""
    devices = {forward.device for group in groups for forward in group}
    return ThreadsRunner() if len(devices) > 1 else SerialRunner()


def check_nan(logits: Mapping[str, Tensor]) -> None:
    """Raise LogitsError naming the member that computed NaN; `logits` by role, on any devices."""
    refuse_nan(found_nan(logits), {role: values.dtype for role, values in logits.items()})


def found_nan(logits: Mapping[str, Tensor]) -> Tensor:
    """Return which members computed NaN, (members,) bool on the device of the first; the host does not wait."""
    device = next(iter(logits.values())).device
    return torch.stack([values.isnan().any().to(device) for values in logits.values()])


def refuse_nan(found: Tensor, dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise LogitsError naming the first member of `found`; `dtypes` of their logits by role, in its order."""
    for (role, dtype), is_nan in zip(dtypes.items(), found.tolist(), strict=True):
        if is_nan:
            raise LogitsError(f"{role} computed NaN logits in {dtype}; try another dtype for it")


def _run_group(
    group: Group, steps: Mapping[torch.device, Step], caches: Caches | None, *, stream: Any | None
) -> dict[str, Tensor]:
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        runs = [
            forward.run(steps[forward.device], None if caches is None else caches[forward.roles]) for forward in group
        ]
    return {role: logits for run in runs for role, logits in run.items()}


def _steps(groups: Sequence[Group], step: Step) -> dict[torch.device, Step]:
    """The input on every device, sent once to each."""
    return {device: step.on(device) for device in {forward.device for group in groups for forward in group}}


def _forward(
    roles: Sequence[str], model: PreTrainedModel, contract: VocabularyContract, backbone: Backbone | None = None
) -> Forward:
    accepts = frozenset(inspect.signature(_plain(model).forward).parameters)
    return Forward(tuple(make_reader(role, contract) for role in roles), model, accepts, backbone)


def _plain(model: Any) -> Any:
    """The model that torch.compile wrapped, which hides the arguments of its forward; any other as it is."""
    return getattr(model, "_orig_mod", model)


def make_reader(role: str, contract: VocabularyContract) -> Reader:
    """Return how the member in this role reads ids."""
    lacks_some = contract.held[role] < max(contract.held.values())
    return Reader(role, contract.held[role], contract.substitutes[role] if lacks_some else None)


def _repeated(tensor: Tensor | None, num: int, rows: int) -> Tensor | None:
    """One block of rows for each member; a tensor of one row for many serves all blocks as it is."""
    if tensor is None or num == 1 or tensor.shape[0] != rows:
        return tensor
    return tensor.repeat(num, *[1] * (tensor.dim() - 1))
