"""The member set of an ensemble with several tokenizers: it gives logits in the anchor's ids, as any other does.

The anchor runs by tokens. In the place of the logits of all others stand log-probs of the text that the anchor's tokens
spell, so that whoever combines logits combines them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ensembler.engine.backbone import Backbone
from ensembler.engine.ensemble_cache import EnsembleCache
from ensembler.engine.member_set import MemberSet, Timer
from ensembler.engine.model_runner import ModelRunner, Step
from ensembler.engine.row_cache import RowCache
from ensembler.engine.text_member import TextMember
from ensembler.engine.text_members import TextMembers
from ensembler.engine.text_plan import TextPlan
from ensembler.errors import InputError
from ensembler.vocab import VocabularyContract, make_contract, read_vocabulary


class TextMemberSet(MemberSet):
    """Run the anchor, and the members of its tokenizer, by ids, and those of `text` by what its tokens spell.

    `by_ids` runs the former alone.
    """

    def __init__(
        self, plan: TextPlan, models: Mapping[str, Any], backbones: Sequence[Backbone], contract: VocabularyContract
    ) -> None:
        self._others: list[MemberSet] = []
        own = {role: model for role, model in models.items() if role not in plan.readers}
        super().__init__(own, backbones, contract)
        self.by_ids = MemberSet(own, backbones, plan.contract)
        members = {}
        for role, reader in plan.readers.items():
            vocabulary = make_contract([read_vocabulary(role, reader.tokenizer, models[role].config)])
            alone = MemberSet({role: models[role]}, backbones, vocabulary)
            self._others.append(alone)
            members[role] = TextMember(alone, reader.writer, reader.ends)
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
        *,
        points: Sequence[Mapping[str, float]] = (),
        is_greedy: bool = False,
    ) -> dict[str, Tensor]:
        """Return by role the anchor's logits, and log-probs for all others, (rows, kept positions, V of the anchor).

        `points`: the weights by role for which they are wanted; `is_greedy`: only the best token at each of these.
        Raises InputError for a growing cache, which does not hold the texts.
        """
        own = super().logits(step, cache, runners)
        logits = own[self.text.plan.anchor_role]
        kept = _kept_texts(step, cache, logits.shape[1])
        others = [role for role in (*own, *self.text.members) if role != self.text.plan.anchor_role]
        filled = {role: torch.zeros(logits.shape, device=logits.device) for role in others}
        if kept:
            rows, columns = ([one[axis] for one in kept] for axis in (0, 1))
            if isinstance(cache, RowCache):
                most = 2 * cache.num_rows * logits.shape[1] + 2
                states = [self.text.states_of(ids, most) for _, _, ids in kept]
            else:
                texts = [[ids for _, _, ids in of_row] for _, of_row in groupby(kept, key=lambda one: one[0])]
                states = [one for of_row in texts for one in self.text.along(of_row[-1], len(of_row[0]))]
            own = {role: values[rows, columns] for role, values in own.items()}
            for role, values in self.text.log_probs(states, own, points, is_greedy=is_greedy).items():
                filled[role][rows, columns] = values
        return {self.text.plan.anchor_role: logits} | filled

    def read(self, step: Step, cache: RowCache, runners: Sequence[ModelRunner] | None = None) -> dict[str, Tensor]:
        """Read tokens of the anchor into a cache: other members read texts, as far as they are asked about them."""
        return super().logits(step, cache, runners)


def _kept_texts(step: Step, cache: EnsembleCache | RowCache | None, num: int) -> list[tuple[int, int, list[int]]]:
    """Return row and column of the logits that are wanted, and the ids up to there; none for parts of a prompt."""
    if isinstance(cache, EnsembleCache):
        raise InputError(
            "members with other tokenizers run in the decode loop, which this call does not use: decode with generate, "
            "without beams and without a cache of your own"
        )
    rows = step.input_ids.tolist()
    if isinstance(step.logits_to_keep, Tensor):
        columns = step.logits_to_keep.tolist()
    else:
        columns = list(range(len(rows[0]) - num, len(rows[0])))
    if not isinstance(cache, RowCache):
        seen = step.attention_mask
        masks = [[1] * len(ids) for ids in rows] if seen is None else seen.tolist()
        return [
            (row, at, [token for token, is_seen in zip(ids[: column + 1], mask, strict=False) if is_seen])
            for row, (ids, mask) in enumerate(zip(rows, masks, strict=True))
            for at, column in enumerate(columns)
            if mask[column]
        ]
    assert step.position_ids is not None
    positions = step.position_ids
    if step.lengths is not None and bool((positions[:, -1:] + 1 < step.lengths).any()):
        return []
    found = []
    for row, (ids, at_row) in enumerate(zip(rows, positions.tolist(), strict=True)):
        first = next((column for column, position in enumerate(at_row) if position >= 0), len(ids))
        before = list(cache.texts[step.first_row + row][: at_row[first]]) if first < len(ids) else []
        for at, column in enumerate(columns):
            if column >= first and at_row[column] >= 0:
                found.append((row, at, before + ids[first : column + 1]))
    return found
