"""Draft tokens, by a member or from the text itself, and choose how many in each round."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from ensembler_kernels import Combination, Weights
from torch import Tensor, nn

from ensembler.decoding.choosing import Chooser, TokenRequest
from ensembler.decoding.rows import Row
from ensembler.engine.grid import Grid, make_combination
from ensembler.engine.model_runner import ModelRunner
from ensembler.errors import ConfigError
from ensembler.modeling import EnsembleForCausalLM
from ensembler.rules import Rule

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


class DraftSchedule:
    """Chooses the positions of the next round, at most `most`; `share`: the part of a plain step that a draft may cost.

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
        if not numbers or costs.wants_plain or self._lost > _MAY_LOSE * self._elapsed:
            return 1
        rates = {num: expected_tokens(num, self.acceptance) / costs.of(num) for num in (1, *numbers)}
        best = max(numbers, key=rates.__getitem__)
        if rates[best] > _MARGIN * rates[1]:
            self.reason = None
            return best
        pays = any(num / costs.of(num) > _MARGIN / costs.of(1) for num in numbers)
        self.reason = (
            f"acceptance {self.acceptance:.2f} does not pay for drafting" if pays else "no acceptance pays for drafting"
        )
        return 1

    def update(self, done: Round) -> None:
        """Take in the outcome and the cost of a round."""
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
        if num in self._seen_at:  # a first call captures, compiles or loads lazily: it says nothing about the others
            self._seconds.setdefault(num, deque(maxlen=_RECENT if num > 1 else _RECENT_PLAIN)).append(seconds)
        self._seen_at[num] = self._num_rounds

    def of(self, num: int) -> float:
        known = [one for one in self._seconds if one == 1 or self._num_rounds - self._seen_at[one] < _FORGET_AFTER]
        if not known:
            return self._guess(num)
        nearest = min((one for one in known if one > 1 or num == 1), key=lambda one: abs(one - num), default=1)
        return statistics.median(self._seconds[nearest]) * self._guess(num) / self._guess(nearest)

    def _guess(self, num: int) -> float:
        return self._share * num + (1 - self._share) * (1 + _EXTRA * (num - 1))


AUTO, NONE, NGRAM = "auto", "none", "ngram"
_LONGEST, _SHORTEST = 3, 2  # tokens at the end of a text that are looked up in it
_LOOK_EVERY = 8  # plain steps that ask the draft once, to learn whether it would be right


class Drafter:
    """Drafts tokens behind rows. `runner` drafts, and `others` verify; without one the texts' own repetitions draft.

    `share`: the fraction of all weight bytes that it reads.
    """

    def __init__(
        self,
        runner: ModelRunner | None,
        others: Sequence[ModelRunner] = (),
        share: float = 0.0,
        chooser: Chooser | None = None,
    ) -> None:
        self.runner = runner
        self.others = tuple(others)
        self.share = share
        self._chooser = chooser
        self._num_plain = 0

    @property
    def name(self) -> str:
        """Return the roles that draft, or 'ngram'."""
        return NGRAM if self.runner is None else self.runner.name

    def draft(self, logits: Mapping[str, Tensor], rows: Sequence[Row]) -> None:
        """Put a token behind the drafts of each row, from its members' logits (rows, 1, V) there."""
        assert self._chooser is not None
        # Of texts that share a row the first says what is drafted.
        requests = [
            TokenRequest(row.texts[0], row, len(row.drafts), index) for index, row in enumerate(rows) if row.texts
        ]
        for one, token in zip(requests, self._chooser.choose(logits, requests), strict=True):
            one.row.drafts.append(max(token, 0))

    def peek(self, logits: Mapping[str, Tensor], rows: Sequence[Row]) -> list[int] | None:
        """Return in some plain steps what the draft would have been, for each running row; None in the others."""
        self._num_plain += 1
        if self.runner is None or self._num_plain % _LOOK_EVERY != 1:
            return None
        self.draft(logits, rows)
        return [row.drafts.pop() for row in rows if row.texts]


def find_drafter(
    model: EnsembleForCausalLM, draft: str, grid: Grid, make_chooser: Callable[[Grid], Chooser]
) -> Drafter | str:
    """Return who drafts for `draft`, or why nobody does: a role, 'ngram', or 'auto' for the lightest runner.

    `grid` is what is decoded; `make_chooser` makes what chooses tokens at other weights, with the same noise. Auto
    takes a runner that reads less than half the bytes of weights that all others do. Raises ConfigError for a role
    that is not in the ensemble, or that gives no distribution.
    """
    check_draft(model.rule, draft)
    runners = model.member_set.runners
    if draft == NONE:
        return "no draft was wanted"
    if model.world is not None:
        return "several processes share the members"
    if model.contract.is_text and draft == AUTO:
        return "members have different tokenizers"
    if len(runners) == 1 and not model.contract.is_text:
        return "all members run in one forward, so that there is none to verify"
    if draft == NGRAM:
        return Drafter(None)
    sizes = {runner: num_bytes(runner.model) for runner in runners}
    if draft == AUTO:
        drafting = [runner for runner in runners if set(runner.roles) - model.rule.raw_roles]
        found = min(drafting, key=sizes.__getitem__)
    else:
        found = _runner_of(model, draft)
    asked = [model.members[role] for role in model.members if all(role not in one.roles for one in runners)]
    share = sizes[found] / (sum(sizes.values()) + sum(map(num_bytes, asked)))
    if draft == AUTO and share >= 1 / 3:
        return "no member is light enough to draft for the others"
    others = [runner for runner in runners if runner is not found]
    return Drafter(found, others, share, make_chooser(_draft_grid(model, grid, found.roles)))


def _runner_of(model: EnsembleForCausalLM, role: str) -> ModelRunner:
    """Return the runner of a role; raise ConfigError for a member with another tokenizer than the anchor."""
    runners = model.member_set.runners
    found = next((runner for runner in runners if role in runner.roles), None)
    if found is None:
        expected = ", ".join((NGRAM, *(role for runner in runners for role in runner.roles)))
        raise ConfigError(
            f"draft is {role!r}, which has another tokenizer than the anchor; expected one of: {expected}"
        )
    return found


def check_draft(rule: Rule, draft: str) -> None:
    """Raise ConfigError for a draft that is neither a word of these nor a role that can draft."""
    if draft in (AUTO, NONE, NGRAM):
        return
    if draft not in rule.roles:
        expected = ", ".join((AUTO, NONE, NGRAM, *rule.roles))
        raise ConfigError(f"draft is {draft!r}, which is no role of this ensemble; expected one of: {expected}")
    if draft in rule.raw_roles:
        raise ConfigError(f"draft is {draft!r}, which gives scores and no distribution; choose another role")


def num_bytes(model: nn.Module) -> int:
    """Return the bytes of weights that a forward reads."""
    tensors = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def _draft_grid(model: EnsembleForCausalLM, grid: Grid, present: Sequence[str]) -> Grid:
    """The same points for the logits of the members that draft alone."""
    roles = tuple(role for role in model.rule.roles if role in present)
    numbers = [(_stand_ins(model, rule, roles), list(alphas)) for rule, alphas in grid.runs]
    return replace(grid, roles=roles, weights=Weights.of(*numbers)).to(model.device)


def _stand_ins(model: EnsembleForCausalLM, rule: Rule, roles: Sequence[str]) -> Combination:
    """The numbers of the drafting `roles`: each has its own, and those of the roles that it stands for."""
    distributions = [role for role in roles if role not in rule.raw_roles]
    lowest = min(distributions, key=lambda role: rule.slope.get(role, 0.0))
    stands = {role: role if role in roles else lowest for role in rule.roles}
    constant, slope = dict.fromkeys(roles, 0.0), dict.fromkeys(roles, 0.0)
    for role in rule.roles:
        if role in roles or role not in rule.raw_roles:
            constant[stands[role]] += rule.constant.get(role, 0.0)
            slope[stands[role]] += rule.slope.get(role, 0.0)
    return replace(
        make_combination(rule, model.member_set.contract, model.config.outside),
        constant=tuple(constant.values()),
        slope=tuple(slope.values()),
        raw=tuple(role in rule.raw_roles for role in roles),
        anchor=roles.index(stands[rule.anchor]),
    )


def look_up(ids: Sequence[int], num: int) -> list[int]:
    """Return up to `num` tokens that followed when the end of a text `ids` last stood in it before.

    The end is its last three tokens, or two where three are nowhere else (prompt look-up: Saxena 2023).
    """
    for size in range(_LONGEST, _SHORTEST - 1, -1):
        end = list(ids[-size:])
        for start in range(len(ids) - size - 1, -1, -1):
            if ids[start] == end[0] and list(ids[start : start + size]) == end:
                return list(ids[start + size : start + size + num])
    return []
