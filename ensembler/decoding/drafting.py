"""Draft tokens: by one forward of a member of the ensemble, or from the text itself.

The draft's scores are the rule's combination with every absent role replaced by a present one, its stand-in:

    z_draft = Σ_r w_r(α) · z_s(r),   s(r) = r where r drafts, else the drafting role of the lowest slope.

Members that do not draft are thus taken to be like the denominator of the log-ratio: base-change drafted by source FT
and source PT is p_ft (target PT ≈ source PT), EFT is p_pt · (p_ft / p_pt)^α, and a member that drafts alone is itself.
An absent score (a reward) is left out. The token is chosen as the ensemble's is, with the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

from ensembler_kernels import Combination, Weights
from torch import Tensor, nn

from ensembler.decoding.choosing import Asked, Chooser
from ensembler.decoding.rows import Row
from ensembler.engine.forward import Forward
from ensembler.engine.grid import Grid, make_combination
from ensembler.errors import ConfigError
from ensembler.modeling import EnsembleForCausalLM
from ensembler.rules import Rule

AUTO, NONE, NGRAM = "auto", "none", "ngram"
_LONGEST, _SHORTEST = 3, 2  # tokens that a place in the text has in common with its end, to be gone on with
_LOOK_EVERY = 8  # plain steps that ask the draft once, to learn whether it would be right


class Drafter:
    """Drafts tokens behind rows. `forward` drafts, and `others` verify; without one the texts' own repetitions do.

    `share`: its part of the bytes that all forwards read.
    """

    def __init__(
        self,
        forward: Forward | None,
        others: Sequence[Forward] = (),
        share: float = 0.0,
        chooser: Chooser | None = None,
    ) -> None:
        self.forward = forward
        self.others = tuple(others)
        self.share = share
        self._chooser = chooser
        self._num_plain = 0

    @property
    def name(self) -> str:
        """Return the roles that draft, or 'ngram'."""
        return NGRAM if self.forward is None else self.forward.name

    def draft(self, logits: Mapping[str, Tensor], rows: Sequence[Row]) -> None:
        """Put a token behind the drafts of each row, from its members' logits (rows, 1, V) there."""
        assert self._chooser is not None
        running = [(place, row) for place, row in enumerate(rows) if row.texts]
        # Of texts that share a row the first says what is drafted.
        asked = [Asked(row.texts[0], row, len(row.drafts), place) for place, row in running]
        for (_, row), token in zip(running, self._chooser.choose(logits, asked), strict=True):
            row.drafts.append(max(token, 0))

    def peek(self, logits: Mapping[str, Tensor], rows: Sequence[Row]) -> list[int] | None:
        """Return in some plain steps what the draft would have been, for each running row; None in the others."""
        self._num_plain += 1
        if self.forward is None or self._num_plain % _LOOK_EVERY != 1:
            return None
        self.draft(logits, rows)
        return [row.drafts.pop() for row in rows if row.texts]


def find_drafter(
    model: EnsembleForCausalLM, draft: str, grid: Grid, make_chooser: Callable[[Grid], Chooser]
) -> Drafter | str:
    """Return who drafts for `draft`, or why nobody does: a role, 'ngram', or 'auto' for the lightest forward.

    `grid` is what is decoded; `make_chooser` makes what chooses tokens at other weights, with the same noise. Auto
    takes a forward that reads less than half the bytes of weights that all others do. Raises ConfigError for a role
    that is not in the ensemble, or that gives no distribution.
    """
    check_draft(model.rule, draft)
    forwards = model.member_set.forwards
    if draft == NONE:
        return "no draft was wanted"
    if model.world is not None:
        return "several processes share the members"
    if len(forwards) == 1:
        return "all members run in one forward, so that there is none to verify"
    if draft == NGRAM:
        return Drafter(None)
    if draft == AUTO:
        drafting = [forward for forward in forwards if set(forward.roles) - model.rule.raw_roles]
        found = min(drafting, key=lambda forward: num_bytes(forward.model))
    else:
        found = next(forward for forward in forwards if draft in forward.roles)
    share = num_bytes(found.model) / sum(num_bytes(forward.model) for forward in forwards)
    if draft == AUTO and share >= 1 / 3:
        return "no member is light enough to draft for the others"
    others = [forward for forward in forwards if forward is not found]
    return Drafter(found, others, share, make_chooser(_draft_grid(model, grid, found.roles)))


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
    return Grid(grid.points, roles, Weights.of(*numbers), grid.runs).on(model.device)


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
    own = make_combination(rule, model.contract, model.config.outside)
    return Combination(
        constant=tuple(constant.values()),
        slope=tuple(slope.values()),
        shared=own.shared,
        neutral=own.neutral,
        raw=tuple(role in rule.raw_roles for role in roles),
        cutoff=own.cutoff,
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
