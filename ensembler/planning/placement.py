"""Propose devices for members within budgets: an exhaustive search, as there are few ways to place few members.

Members are quantised only where nothing else fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import floor
from typing import Any

from ensembler.config import EnsembleConfig
from ensembler.errors import ConfigError, PlacementError
from ensembler.planning.budgets import show_size
from ensembler.planning.member_sizes import Pieces, Share, measure, spread
from ensembler.planning.sizes import GroupSizes, logits_bytes
from ensembler.preflight import CheckedEnsemble
from ensembler.quantization import Quantization

METHODS = (None, Quantization("bnb-8bit"), Quantization("bnb-nf4"))


@dataclass(frozen=True)
class Placement:
    """One way to place all groups: for each a device or, where it is spread, None and its shares; and the loads."""

    places: tuple[str | None, ...]
    shares: Mapping[int, Mapping[str, Share]]
    loads: Mapping[str, int]

    def rank(self) -> tuple[Any, ...]:
        """Few spread groups first, then the smallest largest load: groups on different devices run at the same time."""
        return len(self.shares), sorted(self.loads.values(), reverse=True)


class Search:
    """Places for groups on devices of which `usable` bytes may be used."""

    def __init__(self, groups: Sequence[GroupSizes], usable: Mapping[str, int], context: int, batch_size: int) -> None:
        self.groups = groups
        self.usable = usable
        self.context = context
        self.batch_size = batch_size
        self._pieces: dict[tuple[int, Quantization | None], Pieces] = {}
        self.logits = [logits_bytes(groups, batch_size)[group.roles] for group in groups]
        self.caches = [group.cache_bytes(context, batch_size) for group in groups]

    def with_more(self, num_bytes: int) -> Search:
        """The same with more room on every device."""
        other = copy(self)
        other.usable = {device: size + num_bytes for device, size in self.usable.items()}
        return other

    def need(self, index: int, method: Quantization | None) -> int:
        """Bytes of a group on one device."""
        return self.groups[index].weight_bytes(method) + self.caches[index] + self.logits[index]

    def best(self, methods: Sequence[Quantization | None]) -> Placement | None:
        """The best placement for these quantisations, or None."""
        return min(self.placements(methods), key=Placement.rank, default=None)

    def placements(self, methods: Sequence[Quantization | None]) -> Iterator[Placement]:
        """Every placement that fits; of devices that are alike, only the first is tried."""
        needs = [self.need(index, method) for index, method in enumerate(methods)]
        if sum(needs) > sum(self.usable.values()):
            return
        for places in self._places(needs, (), dict.fromkeys(self.usable, 0)):
            loads = dict.fromkeys(self.usable, 0)
            for place, need in zip(places, needs, strict=True):
                if place is not None:
                    loads[place] += need
            shares: dict[int, Mapping[str, Share]] = {}
            for index in (index for index, place in enumerate(places) if place is None):
                found = self._spread(index, methods[index], loads)
                if found is None:
                    break
                shares[index] = found
                for device, share in found.items():
                    loads[device] += share.num_bytes
            else:
                yield Placement(places, shares, loads)

    def _places(
        self, needs: Sequence[int], places: tuple[str | None, ...], loads: dict[str, int]
    ) -> Iterator[tuple[str | None, ...]]:
        if len(places) == len(needs):
            yield places
            return
        own = self.groups[len(places)].device
        tried = set()
        for device, usable in self.usable.items():
            fixed = any(group.device == device for group in self.groups)
            kind = (usable, loads[device], device if fixed else device.partition(":")[0])
            if own not in (None, device) or kind in tried or loads[device] + needs[len(places)] > usable:
                continue
            tried.add(kind)
            more = {**loads, device: loads[device] + needs[len(places)]}
            yield from self._places(needs, (*places, device), more)
        if own is None and len(self.usable) > 1:
            yield from self._places(needs, (*places, None), loads)

    def _spread(self, index: int, method: Quantization | None, loads: Mapping[str, int]) -> Mapping[str, Share] | None:
        group = self.groups[index]
        beside = group.adapter_bytes + self.logits[index]
        room = {device: usable - loads[device] - beside for device, usable in self.usable.items()}
        if (index, method) not in self._pieces:
            rows = self.batch_size * len(group.roles)
            self._pieces[index, method] = Pieces.of(group.model.blocks, method, context=self.context, rows=rows)
        shares = spread(self._pieces[index, method], room)
        if shares is None or len(shares) < 2:
            return None
        return {device: replace(share, num_bytes=share.num_bytes + beside) for device, share in shares.items()}


HEADROOM = 0.1
"""Fraction of a budget that stays free for activations, the CUDA context (about 0.5 GiB) and the allocator's gaps."""

DEFAULT_CONTEXT = 4096
SPREAD = "sequential"
"""accelerate's strategy for a group on several devices: it fills one after another up to max_memory."""


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
        """Return whether every group has its place."""
        return self.missing_bytes == 0

    def to_dict(self) -> dict[str, Any]:
        """The same as a mapping for JSON, with the flags that say it on the command line."""
        return {"fits": self.fits, **asdict(self), "flags": self.flags()}

    def flags(self) -> list[str]:
        """Return the options of `ensembler generate` that ask for this placement; none where nothing fits."""
        found: dict[str, dict[str, str]] = {"--device": {}, "--max-memory": {}, "--quantize": {}}
        for role, group in self._by_role() if self.fits else ():
            found["--device"][role] = str(group.device)
            if group.max_memory is not None:
                sizes = (f"{device}={size}" for device, size in group.max_memory.items())
                found["--max-memory"][role] = ",".join(sizes)
            if group.quantization is not None:
                found["--quantize"][role] = group.quantization.removeprefix("bnb-")
        return [word for option, values in found.items() for word in self._option(option, values)]

    def _option(self, option: str, values: Mapping[str, str]) -> Iterator[str]:
        """The words that give `values` by role: one value for all where they are alike."""
        different = set(values.values())
        if len(different) == 1 and len(values) == len(list(self._by_role())):
            yield from (option, *different)
            return
        for role, value in values.items():
            yield from (option, f"{role}={value}")

    def advice(self) -> list[str]:
        """Return a sentence on how to do without quantisation, where shorter texts are all that it takes."""
        if self.plain_context is None:
            return []
        return [f"nothing has to be quantised with --context {self.plain_context} or less"]

    def apply(self, config: EnsembleConfig) -> None:
        """Write the placement into the members of `config`. Raises PlacementError where nothing fits."""
        if not self.fits:
            raise PlacementError(self.shortage())
        for role, group in self._by_role():
            member = config.members[role].placed(str(group.device))
            quantization = None if group.quantization is None else Quantization.parse(group.quantization)
            config.members[role] = replace(member, max_memory=group.max_memory, quantization=quantization)

    def _by_role(self) -> Iterator[tuple[str, PlacedGroup]]:
        return ((role, group) for group in self.groups for role in group.roles)

    def shortage(self) -> str:
        """One line for a proposal that does not fit: by how much, and what would."""
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
    search = Search(
        groups, {device: floor(size * (1 - HEADROOM)) for device, size in budgets.items()}, context, batch_size
    )
    plain, *others = _choices(groups)
    found = search.best(plain)
    if found is not None:
        return _proposal(search, budgets, plain, found)
    plain_context = _longest_context(search, plain)
    for methods in others:
        found = search.best(methods)
        if found is not None:
            return replace(_proposal(search, budgets, methods, found), plain_context=plain_context)
    nothing = Placement((None,) * len(groups), {}, dict.fromkeys(budgets, 0))
    excess = sum(search.need(i, method) for i, method in enumerate(plain)) - sum(search.usable.values())
    return replace(
        _proposal(search, budgets, plain, nothing),
        missing_bytes=_missing(search),
        offload_bytes=max(excess, 0),
        plain_context=plain_context,
    )


def _choices(groups: Sequence[GroupSizes]) -> list[tuple[Quantization | None, ...]]:
    """The quantisations of all groups, the least harmful first; what the user chose is not changed."""

    def harm(methods: tuple[Quantization | None, ...]) -> tuple[int, int]:
        added = [
            (method.bits, group.model.num_bytes())
            for method, group in zip(methods, groups, strict=True)
            if method is not None and group.quantization is None
        ]
        return sum(size for bits, size in added if bits == 4), sum(size for bits, size in added if bits == 8)

    options = [METHODS if group.quantization is None else (group.quantization,) for group in groups]
    return sorted(product(*options), key=harm)


def _longest_context(search: Search, methods: Sequence[Quantization | None]) -> int | None:
    """The most tokens, fewer than the search has, of texts that fit with these quantisations; None if none do."""
    low, high = 0, search.context
    while high - low > 1:
        middle = (low + high) // 2
        shorter = Search(search.groups, search.usable, middle, search.batch_size)
        fits = any(True for _ in shorter.placements(methods))
        low, high = (middle, high) if fits else (low, middle)
    return low or None


def _missing(search: Search) -> int:
    """Bytes by which every budget would have to grow for the smallest quantisation to fit."""
    methods = [
        min(METHODS, key=group.weight_bytes) if group.quantization is None else group.quantization
        for group in search.groups
    ]
    low, high = 0, sum(search.need(index, method) for index, method in enumerate(methods))
    while high - low > 1:
        middle = (low + high) // 2
        fits = any(True for _ in search.with_more(middle).placements(methods))
        low, high = (low, middle) if fits else (middle, high)
    return floor(high / (1 - HEADROOM)) + 1


def _proposal(
    search: Search, budgets: Mapping[str, int], methods: Sequence[Quantization | None], placement: Placement
) -> Proposal:
    groups = []
    uses: dict[str, list[str]] = {device: [] for device in budgets}
    for index, (group, method) in enumerate(zip(search.groups, methods, strict=True)):
        shares = placement.shares.get(index)
        place = placement.places[index] if shares is None else SPREAD
        for device in shares or ([place] if place is not None else []):
            uses[device] += group.roles
        groups.append(
            PlacedGroup(
                roles=group.roles,
                model=group.name,
                parameters=group.model.parameters,
                dtype=group.model.dtype,
                quantization=None if method is None else str(method),
                chosen=method is not None and group.quantization is None,
                device=place,
                max_memory=None if shares is None else {device: share.limit for device, share in shares.items()},
                weight_bytes=group.weight_bytes(method, spread=shares is not None),
                cache_per_token=group.model.cache_per_token,
                cache_bytes=search.caches[index],
                logits_bytes=search.logits[index],
            )
        )
    devices = tuple(
        PlannedDevice(device, budget, search.usable[device], placement.loads[device], tuple(uses[device]))
        for device, budget in budgets.items()
    )
    return Proposal(search.context, search.batch_size, tuple(groups), devices)
