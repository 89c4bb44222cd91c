"""Propose devices for members within budgets: an exhaustive search, as there are few ways to place few members.

Members are quantised only where nothing else fits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby, product
from math import floor
from typing import Any

from ensembler.config import EnsembleConfig
from ensembler.errors import ConfigError, PlacementError
from ensembler.planning.member_sizes import measure
from ensembler.planning.sizes import BlockSizes, GroupSizes, Share, logits_bytes, show_size
from ensembler.preflight import CheckedEnsemble
from ensembler.quantization import Quantization

METHODS = (None, Quantization("bnb-8bit"), Quantization("bnb-nf4"))
HEADROOM = 0.1
"""Fraction of a budget that stays free for activations, the CUDA context (about 0.5 GiB) and the allocator's gaps."""

DEFAULT_CONTEXT = 4096
SPREAD = "sequential"
"""accelerate's strategy for a group on several devices: it fills one after another up to max_memory."""


@dataclass(frozen=True)
class Placement:
    """One way to place all groups: the device of each or, where it is spread, None and its shares; and the loads."""

    devices: tuple[str | None, ...]
    shares: Mapping[int, Mapping[str, Share]]
    loads: Mapping[str, int]

    def rank(self) -> tuple[Any, ...]:
        """Few spread groups first, then the smallest largest load: groups on different devices run at the same time."""
        return len(self.shares), sorted(self.loads.values(), reverse=True)


@dataclass(frozen=True)
class Search:
    """Placements of groups on devices of which `usable` bytes may be used, for texts of `context` tokens."""

    groups: Sequence[GroupSizes]
    usable: Mapping[str, int]
    context: int
    batch_size: int

    @cached_property
    def logits(self) -> dict[tuple[str, ...], int]:
        """Bytes of logits by the roles of a group."""
        return logits_bytes(self.groups, self.batch_size)

    def need(self, group: GroupSizes, method: Quantization | None) -> int:
        """Return bytes of a group on one device."""
        cache = group.cache_bytes(self.context, self.batch_size)
        return group.weight_bytes(method) + cache + self.logits[group.roles]

    def fits(self, methods: Sequence[Quantization | None]) -> bool:
        """Return whether there is a placement for these quantisations."""
        return any(True for _ in self.placements(methods))

    def placements(self, methods: Sequence[Quantization | None]) -> Iterator[Placement]:
        """Yield every placement that fits; of devices that are alike, only the first is tried."""
        needs = [self.need(group, method) for group, method in zip(self.groups, methods, strict=True)]
        if sum(needs) > sum(self.usable.values()):
            return
        for devices, whole in self._assign(needs, (), dict.fromkeys(self.usable, 0)):
            loads = dict(whole)
            shares: dict[int, Mapping[str, Share]] = {}
            for index in (index for index, device in enumerate(devices) if device is None):
                found = self._spread(index, methods[index], loads)
                if found is None:
                    break
                shares[index] = found
                for device, share in found.items():
                    loads[device] += share.num_bytes
            else:
                yield Placement(devices, shares, loads)

    def _assign(
        self, needs: Sequence[int], devices: tuple[str | None, ...], loads: Mapping[str, int]
    ) -> Iterator[tuple[tuple[str | None, ...], Mapping[str, int]]]:
        """Yield the devices of all groups (None: to be spread) and the loads, with `devices` of the first groups."""
        if len(devices) == len(needs):
            yield devices, loads
            return
        own, need = self.groups[len(devices)].device, needs[len(devices)]
        tried = set()
        for device, usable in self.usable.items():
            is_chosen = any(group.device == device for group in self.groups)
            kind = (usable, loads[device], device if is_chosen else device.partition(":")[0])
            if own in (None, device) and kind not in tried and loads[device] + need <= usable:
                tried.add(kind)
                yield from self._assign(needs, (*devices, device), {**loads, device: loads[device] + need})
        if own is None and len(self.usable) > 1:
            yield from self._assign(needs, (*devices, None), loads)

    def _spread(self, index: int, method: Quantization | None, loads: Mapping[str, int]) -> Mapping[str, Share] | None:
        group = self.groups[index]
        beside = group.adapter_bytes + self.logits[group.roles]
        room = {device: usable - loads[device] - beside for device, usable in self.usable.items()}
        blocks = BlockSizes.of(group.model.blocks, method, self.context, self.batch_size * len(group.roles))
        shares = blocks.spread(room)
        if shares is None or len(shares) < 2:
            return None
        return {device: replace(share, num_bytes=share.num_bytes + beside) for device, share in shares.items()}


@dataclass(frozen=True)
class PlacedGroup:
    """A group in a proposal. Bytes are of the whole group; `cache_per_token` is of one row of one member.

    `device` is None where nothing fits, and 'sequential', with `max_memory`, where it is spread. `chosen`: the
    quantisation is the plan's and not the user's.
    """

    roles: tuple[str, ...]
    model: str
    parameters: int
    dtype: str
    quantization: str | None
    chosen: bool
    device: str | None
    max_memory: dict[str, str] | None
    weight_bytes: int
    cache_per_token: int
    cache_bytes: int
    logits_bytes: int


@dataclass(frozen=True)
class PlannedDevice:
    """A device: its budget, the part of it that may be used, what the proposal uses, and for which roles; in bytes."""

    device: str
    budget: int
    usable: int
    used: int
    roles: tuple[str, ...]


@dataclass(frozen=True)
class Proposal:
    """The device of each group, for texts of `context` tokens and `batch_size` rows.

    `missing_bytes`: what every budget lacks where nothing fits even with 4 bits; 0 where it fits. `offload_bytes`: what
    would have to be in CPU memory or on disk instead, without quantisation. `plain_context`: tokens of the longest text
    for which the plan would quantise nothing, where `context` is longer than that; None where there is none.
    """

    context: int
    batch_size: int
    groups: tuple[PlacedGroup, ...]
    devices: tuple[PlannedDevice, ...]
    missing_bytes: int = 0
    offload_bytes: int = 0
    plain_context: int | None = None

    @property
    def fits(self) -> bool:
        """Return whether every group has a device."""
        return self.missing_bytes == 0

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping for JSON, with the options of the command line."""
        return {"fits": self.fits, **asdict(self), "flags": self.flags()}

    def flags(self) -> list[str]:
        """Return the options of `ensembler generate` that ask for this placement; none where nothing fits."""
        found: dict[str, dict[str, str]] = {"--device": {}, "--max-memory": {}, "--quantize": {}}
        groups = self._by_role() if self.fits else {}
        for role, group in groups.items():
            found["--device"][role] = str(group.device)
            if group.max_memory is not None:
                sizes = (f"{device}={size}" for device, size in group.max_memory.items())
                found["--max-memory"][role] = ",".join(sizes)
            if group.quantization is not None:
                found["--quantize"][role] = group.quantization.removeprefix("bnb-")
        words = []
        for option, values in found.items():
            is_alike = len(values) == len(groups) and len(set(values.values())) == 1
            given = list(values.values())[:1] if is_alike else [f"{role}={value}" for role, value in values.items()]
            words += [word for value in given for word in (option, value)]
        return words

    def advice(self) -> list[str]:
        """Return a sentence on how to do without quantisation, where shorter texts are all that it takes."""
        if self.plain_context is None:
            return []
        return [f"nothing has to be quantised with --context {self.plain_context} or less"]

    def apply(self, config: EnsembleConfig) -> None:
        """Write the placement into the members of `config`. Raises PlacementError where nothing fits."""
        if not self.fits:
            raise PlacementError(self.shortage())
        for role, group in self._by_role().items():
            member = config.members[role].placed(str(group.device))
            quantization = None if group.quantization is None else Quantization.parse(group.quantization)
            config.members[role] = replace(member, max_memory=group.max_memory, quantization=quantization)

    def _by_role(self) -> dict[str, PlacedGroup]:
        return {role: group for group in self.groups for role in group.roles}

    def shortage(self) -> str:
        """Return one line for a proposal that does not fit: by how much, and what would."""
        many = "the device lacks" if len(self.devices) == 1 else "each device lacks"
        shorter = "" if self.plain_context is None else f" (--context {self.plain_context} fits without quantisation)"
        return (
            f"these members do not fit, not even in 4 bits: {many} {show_size(self.missing_bytes)}; take larger "
            f"budgets, a smaller --context or --batch-size{shorter}, or leave {show_size(self.offload_bytes)} in CPU "
            "memory or on disk, which is slow (--device ROLE=auto --max-memory ROLE=cuda:0=SIZE,cpu=SIZE)"
        )


def plan(
    checked: CheckedEnsemble, budgets: Mapping[str, int], *, context: int | None = None, batch_size: int = 1
) -> Proposal:
    """Propose a placement for a checked ensemble, from configs and headers.

    `budgets`: bytes by device. `context`: tokens of a text with its answer; default: the shortest context of the
    members, at most 4096. A member's own quantisation stays; one that is on a device other than the default 'cpu' stays
    there. Raises ConfigError or MemberError.
    """
    shortest = checked.shortest_context
    limit = DEFAULT_CONTEXT if shortest is None else shortest[1]
    if context is not None and shortest is not None and context > limit:
        raise ConfigError(f"a context of {context:,} tokens was asked for; that of {shortest[0]} ends at {limit:,}")
    for role, member in checked.config.members.items():
        if isinstance(member.device_map, dict) or member.max_memory is not None:
            raise ConfigError(f"{role} is spread by hand already; leave out its device_map and max_memory for a plan")
    context = min(limit, DEFAULT_CONTEXT) if context is None else context
    return propose(measure(checked), budgets, context=context, batch_size=batch_size)


def propose(groups: Sequence[GroupSizes], budgets: Mapping[str, int], *, context: int, batch_size: int = 1) -> Proposal:
    """Propose a placement: nothing quantised if that fits (each group on one device, or else some on several), then as
    few bytes as possible in 4 bits, then as few as possible in 8.
    """
    for group in groups:
        if group.device is not None and group.device not in budgets:
            raise ConfigError(
                f"{' and '.join(group.roles)} is placed on {group.device}, which has no budget; there are: "
                f"{', '.join(budgets)}"
            )
    usable = {device: floor(size * (1 - HEADROOM)) for device, size in budgets.items()}
    search = Search(groups, usable, context, batch_size)
    choices = _choices(groups)
    (plain,) = choices[0]
    plain_context = 0
    for alike in choices:
        placed = ((methods, placement) for methods in alike for placement in search.placements(methods))
        found = min(placed, key=lambda pair: pair[1].rank(), default=None)
        if found is not None:
            return replace(_proposal(search, budgets, *found), plain_context=plain_context or None)
        if alike is choices[0]:  # the longest context that would do without quantisation, by bisection
            contexts = range(1, context)
            plain_context = bisect_left(contexts, True, key=lambda each: not replace(search, context=each).fits(plain))
    nothing = Placement((None,) * len(groups), {}, dict.fromkeys(budgets, 0))
    excess = sum(map(search.need, groups, plain)) - sum(usable.values())
    return replace(
        _proposal(search, budgets, plain, nothing),
        missing_bytes=_missing(search),
        offload_bytes=max(excess, 0),
        plain_context=plain_context or None,
    )


def _choices(groups: Sequence[GroupSizes]) -> list[list[tuple[Quantization | None, ...]]]:
    """Return the quantisations of all groups, the least harmful first, those of equal harm together.

    Harm is bytes in 4 bits, then bytes in 8. The user's own quantisations are not changed and do not count.
    """

    def harm(methods: tuple[Quantization | None, ...]) -> tuple[int, int]:
        num_bytes = {4: 0, 8: 0}
        for method, group in zip(methods, groups, strict=True):
            if method is not None and group.quantization is None:
                num_bytes[method.bits] += group.model.num_bytes()
        return num_bytes[4], num_bytes[8]

    options = [METHODS if group.quantization is None else (group.quantization,) for group in groups]
    harms = {methods: harm(methods) for methods in product(*options)}
    return [list(alike) for _, alike in groupby(sorted(harms, key=harms.__getitem__), key=harms.__getitem__)]


def _missing(search: Search) -> int:
    """Return bytes by which every budget would have to grow for the smallest quantisation to fit."""
    methods = [
        min(METHODS, key=group.weight_bytes) if group.quantization is None else group.quantization
        for group in search.groups
    ]

    def fits_with(num_bytes: int) -> bool:
        larger = {device: size + num_bytes for device, size in search.usable.items()}
        return replace(search, usable=larger).fits(methods)

    enough = sum(map(search.need, search.groups, methods))
    return floor(bisect_left(range(enough), True, key=fits_with) / (1 - HEADROOM)) + 1


def _proposal(
    search: Search, budgets: Mapping[str, int], methods: Sequence[Quantization | None], placement: Placement
) -> Proposal:
    groups = []
    roles: dict[str, list[str]] = {device: [] for device in budgets}
    for index, (group, method) in enumerate(zip(search.groups, methods, strict=True)):
        shares = placement.shares.get(index)
        device = placement.devices[index] if shares is None else SPREAD
        for used in shares or ([] if device is None else [device]):
            roles[used] += group.roles
        groups.append(
            PlacedGroup(
                roles=group.roles,
                model=group.name,
                parameters=group.model.parameters,
                dtype=group.model.dtype,
                quantization=None if method is None else str(method),
                chosen=method is not None and group.quantization is None,
                device=device,
                max_memory=None if shares is None else {name: share.limit for name, share in shares.items()},
                weight_bytes=group.weight_bytes(method, is_spread=shares is not None),
                cache_per_token=group.model.cache_per_token,
                cache_bytes=group.cache_bytes(search.context, search.batch_size),
                logits_bytes=search.logits[group.roles],
            )
        )
    devices = tuple(
        PlannedDevice(device, budget, search.usable[device], placement.loads[device], tuple(roles[device]))
        for device, budget in budgets.items()
    )
    return Proposal(search.context, search.batch_size, tuple(groups), devices)
