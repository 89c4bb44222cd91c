"""The member set of an ensemble with several tokenizers: it gives logits in the anchor's ids, as any other does.

The anchor runs by tokens. In the place of the logits of all others stand log-probs of the text that the anchor's tokens
spell, so that whoever combines logits combines them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ensembler.engine.backbone import Backbone
from ensembler.engine.distributed import RankedMembers, RankedRows, World
from ensembler.engine.ensemble_cache import EnsembleCache
from ensembler.engine.member_set import MemberSet, Timer
from ensembler.engine.model_runner import ModelRunner, Step
from ensembler.engine.path_rows import PathRows
from ensembler.engine.prefill import Place
from ensembler.engine.row_cache import RowCache
from ensembler.engine.text_member import TextMember
from ensembler.engine.text_members import TextMembers
from ensembler.engine.text_plan import TextPlan
from ensembler.engine.text_question import States
from ensembler.engine.text_states import TextStates
from ensembler.errors import InputError
from ensembler.vocab import make_contract, read_vocabulary


class _Some(Mapping[str, Any]):
    """Some of the members of an ensemble, which may be replaced in it."""

    def __init__(self, models: Any, roles: Sequence[str]) -> None:
        self._models = models
        self._roles = roles

    def __getitem__(self, role: str) -> Any:
        return self._models[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)


class TextMemberSet(MemberSet):
    """Run the anchor, and the members of its tokenizer, by ids, and those of `text` by what its tokens spell.

    `by_ids` runs the former alone. With a `world` of several processes each runs its members, and all ask alike.
    """

    def __init__(self, plan: TextPlan, models: Any, backbones: Sequence[Backbone], world: World | None = None) -> None:
        self._others: list[MemberSet] = []
        own = _Some(models, [role for role in models if role not in plan.readers])
        super().__init__(own, backbones, plan.contract)
        self.roles = plan.roles
        kind = MemberSet if world is None else partial(RankedMembers, world)
        self.by_ids: MemberSet = kind(own, backbones, plan.contract)
        self._world = world
        members = {}
        for role, reader in plan.readers.items():
            here = [role] if role in models else []
            known = [read_vocabulary(role, reader.tokenizer, models[role].config) for role in here]
            alone = MemberSet(_Some(models, here), backbones, make_contract(known) if known else plan.contract)
            alone.graphs = None  # its steps have many shapes
            self._others.append(alone)
            rows = PathRows(alone, role) if world is None else RankedRows(world, alone, role)
            members[role] = TextMember(rows, reader.writer, reader.ends)
        self.text = TextMembers(plan, members)

    @property
    def timer(self) -> Timer | None:
        """The timer of each runner, of the other members too."""
        return self._timer

    @timer.setter
    def timer(self, timer: Timer | None) -> None:
        self._timer = timer
        for one in self._others:
            one.timer = timer

    def logits(
        self,
        step: Step,
        cache: EnsembleCache | RowCache | None = None,
        runners: Sequence[ModelRunner] | None = None,
    ) -> dict[str, Tensor]:
        """Return by role the logits (rows, kept positions, V_member) of the members by ids; without a cache completed.

        Raises InputError for a growing cache, which does not hold the texts.
        """
        if isinstance(cache, EnsembleCache):
            raise InputError(
                "an ensemble with different tokenizers keeps no cache of this kind: decode with generate, without "
                "beams and without a cache of your own, and call the model itself with use_cache=False"
            )
        run = partial(super().logits, step, cache, runners)
        own = run() if self._world is None else self._world.logits(step, self.contract.widths, run)
        if cache is not None:
            return own
        self.forget()
        places = _places(step, own[self.text.plan.anchor_role].shape[1])
        states = [state for _, of_row in groupby(places, key=attrgetter("row")) for state in self._along(list(of_row))]
        return self._completed(own, places, states)

    @torch.no_grad()
    def _along(self, places: Sequence[Place]) -> list[States]:
        """Return the states behind places of one text, in any order."""
        lengths = [len(one.ids) for one in places]
        longest = max(places, key=lambda one: len(one.ids))
        found = self.text.along(longest.ids, min(lengths))
        return [found[length - min(lengths)] for length in lengths]

    def completed(
        self,
        own: Mapping[str, Tensor],
        places: Sequence[Place],
        *,
        states: TextStates,
        points: Sequence[Mapping[str, float]] = (),
        is_greedy: bool = False,
    ) -> dict[str, Tensor]:
        """Return by role the anchor's logits, and log-probs for all others (rows, positions, V of the anchor).

        `own`: the logits of the members by ids, of which the `places` are wanted; `states`: of the loop that asks.
        `points`: the weights by role for which they are wanted; `is_greedy`: only the best token at each of these.
        """
        return self._completed(own, places, states.of(places), points, is_greedy=is_greedy)

    def forget(self) -> None:
        """Let go of what the members asked for text hold of earlier texts: their weights may have changed since."""
        for member in self.text.members.values():
            member.forget()

    @torch.no_grad()
    def _completed(
        self,
        own: Mapping[str, Tensor],
        places: Sequence[Place],
        states: Sequence[States],
        points: Sequence[Mapping[str, float]] = (),
        *,
        is_greedy: bool = False,
    ) -> dict[str, Tensor]:
        anchor = self.text.plan.anchor_role
        logits = own[anchor]
        others = [role for role in (*own, *self.text.members) if role != anchor]
        filled = {role: torch.zeros(logits.shape, device=logits.device) for role in others}
        rows, columns = [one.row for one in places], [one.column for one in places]
        wanted = {role: values[rows, columns] for role, values in own.items()}
        for role, values in self.text.log_probs(states, wanted, points, is_greedy=is_greedy).items():
            filled[role][rows, columns] = values
        return {anchor: logits} | filled


def _places(step: Step, num: int) -> list[Place]:
    """Return the places of the logits that are wanted, without those of padding."""
    rows = step.input_ids.tolist()
    if isinstance(step.logits_to_keep, Tensor):
        columns = [column % len(rows[0]) for column in step.logits_to_keep.tolist()]
    else:
        columns = list(range(len(rows[0]) - num, len(rows[0])))
    seen = step.attention_mask
    masks = [[1] * len(ids) for ids in rows] if seen is None else seen.tolist()
    return [
        Place(row, at, text, len(text))
        for row, (ids, mask) in enumerate(zip(rows, masks, strict=True))
        for at, column in enumerate(columns)
        if mask[column]
        for text in [[token for token, is_seen in zip(ids[: column + 1], mask, strict=False) if is_seen]]
    ]
