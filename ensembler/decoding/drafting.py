"""Who drafts: one forward of the ensemble, or the text itself; and from which distribution.

The draft's distribution is the rule's combination with every absent role replaced by a present one, its stand-in:

    z_draft = Σ_r w_r(α) · z_s(r),   s(r) = r where r drafts, else the drafting role of the lowest slope.

Members that do not draft are thus taken to be like the denominator of the log-ratio: base-change drafted by source FT
and source PT is p_ft (target PT ≈ source PT), EFT is p_pt · (p_ft / p_pt)^α, and a member that drafts alone is itself.
An absent score (a reward) is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from ensembler_kernels import Combination, combine
from torch import Tensor, nn

from ensembler.errors import ConfigError
from ensembler.modeling import EnsembleForCausalLM, weights_for
from ensembler.rules import Rule
from ensembler.runners import Forward, Group

AUTO, NONE, NGRAM = "auto", "none", "ngram"
_LONGEST, _SHORTEST = 3, 2  # tokens that a place in the text has in common with its end, to be gone on with


@dataclass(frozen=True)
class DraftForward:
    """The forward that drafts; `how` combines its members' logits, in the order of `roles`."""

    forward: Forward
    others: tuple[Group, ...]
    roles: tuple[str, ...]
    how: Combination
    share: float

    def combine(self, logits: Mapping[str, Tensor], alpha: float | Tensor, device: torch.device, width: int) -> Tensor:
        """Return the draft's scores (rows, `width`), fp32 on `device`, from its members' logits (rows, V_member).

        Ids that the draft lacks are forbidden: another width than the ensemble's is cut or filled up.
        """
        ordered = [logits[role].to(device) for role in self.roles]
        scores = combine(ordered, weights_for(self.how, alpha, ordered[0]))
        return torch.nn.functional.pad(scores, (0, width - scores.shape[-1]), value=-torch.inf)


def find_draft(model: EnsembleForCausalLM, draft: str) -> DraftForward | None:
    """Return the forward that drafts for `draft`: a role, or 'auto' for the lightest, None if that is not light enough.

    Light enough: it reads less than half the bytes of weights that all others do. Raises ConfigError for a role that is
    not in the ensemble, or that gives no distribution.
    """
    check_draft(model.rule, draft)
    if model.world is not None or draft in (NONE, NGRAM):
        return None
    forwards = [forward for group in model.groups for forward in group]
    if draft == AUTO:
        drafting = [forward for forward in forwards if set(forward.roles) - model.rule.raw_roles]
        lightest = min(drafting, key=lambda forward: num_bytes(forward.model))
        found = _draft_forward(model, lightest)
        return found if found.share < 1 / 3 and found.others else None
    return _draft_forward(model, next(forward for forward in forwards if draft in forward.roles))


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
    """Bytes of weights that a forward reads."""
    tensors = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def _draft_forward(model: EnsembleForCausalLM, forward: Forward) -> DraftForward:
    others = (tuple(one for one in group if one is not forward) for group in model.groups)
    own = num_bytes(forward.model)
    total = sum(num_bytes(one.model) for group in model.groups for one in group)
    roles, how = _stand_ins(model.rule, model.combination, forward.roles)
    return DraftForward(forward, tuple(group for group in others if group), roles, how, own / total)


def _stand_ins(rule: Rule, how: Combination, present: Sequence[str]) -> tuple[tuple[str, ...], Combination]:
    """The drafting roles, that of the anchor first, and their numbers: each has those of the roles it stands for."""
    ordered = [role for role in rule.roles if role in present]
    distributions = [role for role in ordered if role not in rule.raw_roles]
    lowest = min(distributions, key=lambda role: rule.slope.get(role, 0.0))
    stands = {role: role if role in present else lowest for role in rule.roles}
    roles = tuple(sorted(ordered, key=lambda role: role != stands[rule.anchor]))
    constant, slope = dict.fromkeys(roles, 0.0), dict.fromkeys(roles, 0.0)
    for role in rule.roles:
        if role in present or role not in rule.raw_roles:
            constant[stands[role]] += rule.constant.get(role, 0.0)
            slope[stands[role]] += rule.slope.get(role, 0.0)
    return roles, Combination(
        constant=tuple(constant.values()),
        slope=tuple(slope.values()),
        shared=how.shared,
        neutral=how.neutral,
        raw=tuple(role in rule.raw_roles for role in roles),
        cutoff=how.cutoff,
    )


def look_up(text: Tensor, num: int) -> Tensor:
    """Return up to `num` tokens that followed when the end of `text` (positions,) last stood in it before.

    The end is its last three tokens, or two where three are nowhere else (prompt look-up: Saxena 2023).
    """
    for size in range(_LONGEST, _SHORTEST - 1, -1):
        if text.shape[0] <= size:
            continue
        places = (text[:-1].unfold(0, size, 1) == text[-size:]).all(-1).nonzero()
        if places.numel():
            start = int(places[-1]) + size
            return text[start : start + num].clone()
    return text[:0]
