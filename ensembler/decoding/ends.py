"""Find the ends of texts: at an end token, at their most tokens, or where a criterion of `transformers` says so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from ensembler.decoding.rows import Row


class Ends:
    """`ids` end a text; `criteria` are asked too: called with texts (rows, positions) int64, they say which end.

    `whole`: criteria see the prompt before the new tokens, with its padding; else the new tokens alone.
    """

    def __init__(
        self,
        ids: Collection[int],
        criteria: Sequence[Callable[..., Tensor]] = (),
        *,
        whole: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self._ids = frozenset(ids)
        self._criteria = StoppingCriteriaList(criteria)
        self._whole = whole
        self._device = device

    def ended(self, grown: Sequence[tuple[Row, Sequence[int]]]) -> list[bool]:
        """Return whether each row ends with the last of the tokens that it has gained."""
        found = [tokens[-1] in self._ids or len(tokens) >= row.room for row, tokens in grown]
        if self._criteria:
            texts = [[*(row.columns if self._whole else ()), *row.new_ids, *tokens] for row, tokens in grown]
            for length in {len(text) for text in texts}:
                which = [index for index, text in enumerate(texts) if len(text) == length]
                ids = torch.tensor([texts[index] for index in which], device=self._device)
                for index, is_end in zip(which, self._criteria(ids, None).tolist(), strict=True):
                    found[index] = found[index] or is_end
        return found
