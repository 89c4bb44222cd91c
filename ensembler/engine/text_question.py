"""One question to members that are asked for text: the continuations that are compared, and what is known of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from numpy.typing import NDArray

from ensembler.engine.text_cover import Bounds, Path
from ensembler.engine.text_member import Continuation, TextMember, TextState

States = dict[str, TextState]
"""The state of each member, by role, behind one text."""
Array = NDArray[np.float64]
_ROUNDING = 1e-9
_MOST_OPEN = 0.99  # of a candidate that is to be evaluated before others are looked at


@dataclass(frozen=True)
class Scores:
    """The scores of candidates at some points, as far as members by ids decide them, and the weights of all others.

    `base` (points, candidates); `rest` (points,): the best of all other tokens; `slopes` (points,) by role. `groups`:
    the roles that share a tokenizer, and so ways to write a text.
    """

    base: Array
    rest: Array
    slopes: Mapping[str, Array]
    groups: Sequence[Sequence[str]]

    @property
    def has_wide(self) -> bool:
        """Return whether an upper bound of each role's probability bounds the scores.

        It tells nothing of a divisor, nor of a ratio of members that share a tokenizer.
        """
        return all(len(group) == 1 for group in self.groups) and all((one >= 0).all() for one in self.slopes.values())

    def at(self, log_probs: Mapping[str, Array]) -> Array:
        """Return the scores (points, candidates) for log-probs (candidates,) by role."""
        scores = self.base.copy()
        for group in self.groups:
            scores += self._ratio(group, log_probs)
        return scores

    def between(self, low: Mapping[str, Array], high: Mapping[str, Array]) -> tuple[Array, Array]:
        """Return the lowest and the highest scores (points, candidates) for log-probs between bounds, by role.

        What is open counts alike for members that share a tokenizer: nothing would bound their ratio else.
        """
        least, most = self.base.copy(), self.base.copy()
        for group in self.groups:
            one, other = self._ratio(group, high), self._ratio(group, low)
            is_open = np.any([np.isinf(low[role]) & np.isfinite(high[role]) for role in group], axis=0)
            total = np.sum([self.slopes[role] for role in group], axis=0)[:, None]
            limit = np.where(np.abs(total) < _ROUNDING, one, np.where(total > 0, -np.inf, np.inf))
            other = np.where(is_open, limit, other)
            least, most = _added(least, np.minimum(one, other)), _added(most, np.maximum(one, other))
        return least, most

    def _ratio(self, group: Sequence[str], log_probs: Mapping[str, Array]) -> Array:
        """Return what a group adds (points, candidates): 0 where it is undefined, as the kernels count it."""
        ratio = np.zeros_like(self.base)
        with np.errstate(invalid="ignore"):
            for role in group:
                slopes = self.slopes[role][:, None]
                ratio += np.where(slopes == 0, 0.0, slopes * log_probs[role])
        ratio[np.isnan(ratio) | (ratio == np.inf)] = 0.0
        return ratio


def _added(one: Array, other: Array) -> Array:
    """Return the sum of scores; what is forbidden on either side stays so."""
    with np.errstate(invalid="ignore"):
        found = one + other
    found[np.isnan(found)] = -np.inf
    return found


@dataclass
class Question:
    """The continuations of one text that are compared, and what is known of them by role.

    `scores`: None for a text that is given, where nothing is compared. `is_greedy`: the best one is enough.
    """

    states: States
    candidates: Sequence[Continuation]
    scores: Scores | None = None
    is_greedy: bool = False
    bounds: dict[str, list[Bounds]] = field(default_factory=dict)
    begun: dict[str, Bounds] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._narrow = np.ones(len(self.candidates), dtype=bool)

    def update(self, members: Mapping[str, TextMember], changed: Iterable[str]) -> None:
        """Compute the bounds of the roles that have changed; where the best is enough, wide ones at first."""
        everything = range(len(self.candidates))
        self._narrow[:] = not (self.is_greedy and self.scores is not None and self.scores.has_wide)
        for role in changed:
            self.begun[role] = members[role].begun(self.states[role])
            self.bounds[role] = [self._bounds(members[role], at) for at in everything]
        self.narrow(members)

    def narrow(self, members: Mapping[str, TextMember], *, is_last: bool = False) -> None:
        """Compute the narrow bounds of candidates that may be the best, the highest first, and ever more of them.

        It stops at one that is nearly all open, which is to be evaluated before others are looked at, unless `is_last`.
        """
        while not self._narrow.all():
            best, most = self._best()
            may_win = most >= best[:, None]
            known = np.where(may_win & self._narrow, most, -np.inf)
            is_open = [bool(np.isfinite(row.max())) and self._is_open(int(row.argmax())) for row in known]
            waiting = np.flatnonzero(may_win.any(0) & ~self._narrow)
            if not len(waiting) or (not is_last and self._narrow.any() and all(is_open)):
                break
            wanted = sorted(waiting.tolist(), key=most.max(0).__getitem__, reverse=True)[: int(self._narrow.sum()) + 1]
            self._narrow[wanted] = True
            for role, at in product(members, wanted):
                self.bounds[role][at] = self._bounds(members[role], at)

    def _bounds(self, member: TextMember, at: int) -> Bounds:
        one = self.candidates[at]
        if one.is_impossible:
            return Bounds()
        find = member.bounds if self._narrow[at] else member.ceiling
        return find(self.states[member.role], one)

    def _is_open(self, at: int) -> bool:
        return any(sum(of_role[at].open.values()) > _MOST_OPEN * of_role[at].high for of_role in self.bounds.values())

    def log_probs(self, role: str, bound: str = "middle") -> Array:
        """Return the log-probs (candidates,) of a role, or the lower or upper ones: 'low', 'high'."""
        values = np.array([getattr(one, bound) for one in self.bounds[role]], dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Array = np.log(values) - np.log(self.begun[role].middle)
        return found

    @property
    def is_certain(self) -> bool:
        """Return whether at each point at most one candidate may still be the best."""
        best, most = self._best()
        return bool(np.all((most >= best[:, None]).sum(1) <= 1))

    def _best(self) -> tuple[Array, Array]:
        """Return the score (points,) that some token certainly has, and the highest scores (points, candidates)."""
        assert self.scores is not None
        if not all(one.middle > 0 for one in self.begun.values()):
            return np.full(len(self.scores.rest), -np.inf), np.full(self.scores.base.shape, np.inf)
        low, high = ({role: self.log_probs(role, bound) for role in self.bounds} for bound in ("low", "high"))
        least, most = self.scores.between(low, high)
        return np.maximum(self.scores.rest, least.max(1, initial=-np.inf)), most

    def weights(self) -> Array:
        """Return how much each candidate matters (candidates,), 1 in all: as it is drawn, or as it may be the best."""
        num = len(self.candidates)
        if self.scores is None:
            return np.full(num, 1 / max(1, num))
        if self.is_greedy:
            best, most = self._best()
            may_win = most >= best[:, None]
            is_open = may_win.sum(1) > 1
            most = np.where(may_win & self._narrow, most, -np.inf)
            most = most[is_open] if is_open.any() else most
            return np.bincount(most.argmax(1), minlength=num) / len(most)
        scores = self.scores.at({role: self.log_probs(role) for role in self.bounds})
        drawn = np.exp(scores - scores.max(1, keepdims=True, initial=np.finfo(float).min))
        total = drawn.sum(1, keepdims=True)
        mean: Array = (drawn / np.where(total > 0, total, 1)).mean(0)
        return mean

    def open_paths(self, role: str, weights: Array, tolerance: float = 0.0) -> dict[Path, float]:
        """Return the share that is open, by path of a role: of the candidates, in their mean by `weights`, and of R(x).

        Either counts where it is more than `tolerance`; R(x) does not where the best candidate alone is wanted.
        """
        found: dict[Path, float] = {}
        for weight, bounds in zip(weights.tolist(), self.bounds[role], strict=True):
            if bounds.open and weight > 0:
                for path, mass in bounds.open.items():
                    found[path] = found.get(path, 0.0) + weight * mass / bounds.high
        if sum(found.values()) <= tolerance:
            found = {}
        begun = self.begun[role]
        if not self.is_greedy and sum(begun.open.values()) > tolerance * begun.high:
            for path, mass in begun.open.items():
                found[path] = found.get(path, 0.0) + mass / begun.high
        return found
