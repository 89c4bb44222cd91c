"""Choose the number of drafted tokens of a round: the one that makes most tokens per second, from what was measured.

A round of k positions gives E(k, a) = (1 − a^k) / (1 − a) tokens where a drafted token is accepted with probability a.
A round of one is a plain step. It does not know what is drafted, nor how.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

_WINDOW = 64  # drafted tokens that the acceptance is measured on
_SEEDS = (1.5, 2.0)  # accepted and drafted tokens that are taken for granted at the start
_RECENT = 5  # rounds whose median a cost is
_RECENT_PLAIN = 15  # the same of plain steps: where nothing is drafted, five of them pass in no time
_WARM_UP = 2  # plain steps at the start
_PLAIN_EVERY = 24  # rounds between two plain steps, so that their cost stays known
_PLAIN_EARLY = 6  # the same as long as few were measured: the first steps of a process are slow
_FORGET_AFTER = 256  # rounds after which the cost of a number that is not drafted is doubted
_MARGIN = 1.03  # by how much drafting has to promise more than a plain step
_MAY_LOSE = 0.02  # share of the time that rounds may lose against plain steps
_CREDIT = 8  # plain steps that rounds may have won and lose again: no streak of bad luck ends drafting that pays
_EXTRA = 0.1  # a further position of a verification in steps, as long as none was measured


@dataclass(frozen=True)
class Round:
    """One round: the positions that it read of each of its rows, the tokens that these got together, its seconds.

    `num_drafted` counts drafted tokens that were looked at, `num_accepted` those of them that stayed.
    """

    num_positions: int
    num_rows: int
    num_tokens: int
    num_drafted: int
    num_accepted: int
    seconds: float


def expected_tokens(num: int, acceptance: float) -> float:
    """Return E(k, a) = 1 + a + ... + a^(k − 1)."""
    return float(num) if acceptance >= 1 else (1 - acceptance**num) / (1 - acceptance)


class Pace:
    """Chooses the positions of the next round, at most `most`. `share`: the draft's part of a plain step, guessed.

    Costs are known for each number of rows in powers of two. Rounds that lost against plain steps are made up for
    before another one is risked: drafting that does not pay costs at most `_MAY_LOSE` of the time, one round, and
    `_CREDIT` plain steps that it won before.
    """

    def __init__(self, most: int, share: float) -> None:
        self._most = most
        self._share = share
        self._accepted, self._drafted = _SEEDS
        self._costs: dict[int, _Costs] = {}
        self._lost = 0.0
        self._elapsed = 0.0
        self.reason: str | None = None

    @property
    def acceptance(self) -> float:
        """The probability that a drafted token is accepted, over the recent ones."""
        return self._accepted / self._drafted

    def next_round(self, num_rows: int, room: int) -> int:
        """Return the positions of the next round: 1 is a plain step."""
        costs = self._costs_of(num_rows)
        numbers = range(2, min(self._most, room) + 1)
        if not numbers or costs.wants_plain:
            return 1
        if self._lost > _MAY_LOSE * self._elapsed:
            return 1
        best = max(numbers, key=lambda num: self._rate(costs, num))
        if self._rate(costs, best) > _MARGIN * self._rate(costs, 1):
            self.reason = None
            return best
        pays = any(num / costs.of(num) > _MARGIN / costs.of(1) for num in numbers)
        self.reason = (
            f"acceptance {self.acceptance:.2f} does not pay for drafting" if pays else "no acceptance pays for drafting"
        )
        return 1

    def saw(self, done: Round) -> None:
        """Note what a round came to and cost."""
        decay = (1 - 1 / _WINDOW) ** done.num_drafted
        self._accepted = self._accepted * decay + done.num_accepted
        self._drafted = self._drafted * decay + done.num_drafted
        costs = self._costs_of(done.num_rows)
        costs.add(done.num_positions, done.seconds)
        self._elapsed += done.seconds
        if done.num_positions > 1:
            # By the median: a round that something else held up says nothing about drafting.
            lost = costs.of(done.num_positions) - done.num_tokens / done.num_rows * costs.of(1)
            self._lost = max(self._lost + lost, -_CREDIT * costs.of(1))

    def _rate(self, costs: _Costs, num: int) -> float:
        return expected_tokens(num, self.acceptance) / costs.of(num)

    def _costs_of(self, num_rows: int) -> _Costs:
        return self._costs.setdefault(num_rows.bit_length(), _Costs(self._share))


class _Costs:
    """Seconds of a round by its positions: measured, or scaled from the nearest number that was."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._seconds: dict[int, deque[float]] = {}
        self._seen_at: dict[int, int] = {}
        self._num_rounds = 0
        self._num_plain = 0

    @property
    def wants_plain(self) -> bool:
        """Return whether the cost of a plain step is not known, or not any more."""
        every = _PLAIN_EARLY if self._num_plain < _RECENT else _PLAIN_EVERY
        return self._num_plain < _WARM_UP or self._num_rounds - self._seen_at[1] >= every

    def add(self, num: int, seconds: float) -> None:
        self._num_rounds += 1
        self._num_plain += num == 1
        first = num not in self._seen_at
        self._seen_at[num] = self._num_rounds
        if first:  # a first call captures, compiles or loads lazily: it says nothing about those that follow
            return
        self._seconds.setdefault(num, deque(maxlen=_RECENT if num > 1 else _RECENT_PLAIN)).append(seconds)

    def of(self, num: int) -> float:
        known = [one for one in self._seconds if one == 1 or self._num_rounds - self._seen_at[one] < _FORGET_AFTER]
        if not known:
            return self._guess(num)
        nearest = min((one for one in known if one > 1 or num == 1), key=lambda one: abs(one - num), default=1)
        return statistics.median(self._seconds[nearest]) * self._guess(num) / self._guess(nearest)

    def _guess(self, num: int) -> float:
        return self._share * num + (1 - self._share) * (1 + _EXTRA * (num - 1))
