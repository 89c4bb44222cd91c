"""The search for a placement: every way to put groups of members on devices, exhaustively; there are few of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from ensembler.planning.sizes import GroupSizes, logits_bytes
from ensembler.planning.spread import Pieces, Share, spread
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
