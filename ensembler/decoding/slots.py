"""What the members have read of each text: their cache, which of its slots count, and the position that comes next.

Rows accept different numbers of drafted tokens. What was rejected is cropped where all rows agree; else every row is
shifted to the right, so that all end together: what is left over on the left is padding, as in any batch of prompts.
It does not know tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ensembler.cache import EnsembleCache
from ensembler.runners import Step


class Slots:
    """The cache of running rows. `mask` (rows, slots) int64 or None where nothing is padded; `positions` (rows or 1,
    slots) of the prompts.
    """

    def __init__(self, cache: EnsembleCache, mask: Tensor | None, positions: Tensor, num_rows: int) -> None:
        self.cache = cache
        self._mask = mask
        self._next = (positions[:, -1] + 1).expand(num_rows).clone()
        self._num = positions.shape[1]
        firsts = [0] * num_rows if mask is None else mask.long().argmax(-1).tolist()
        self._firsts: list[int] = firsts  # where each row's text begins

    def step(self, ids: Tensor, num_fed: int = 0, logits_to_keep: int = 0) -> Step:
        """Return the input `ids` (rows, n) for members that have read `num_fed` tokens since the last `keep`."""
        num = num_fed + ids.shape[1]
        mask = None if self._mask is None else torch.nn.functional.pad(self._mask, (0, num), value=1)
        positions = self._next[:, None] + torch.arange(num_fed, num, device=self._next.device)
        return Step(ids, mask, positions, logits_to_keep)

    def keep(self, num_fed: int, kept: Sequence[int], goes_on: Sequence[int]) -> None:
        """Forget all but the first `kept` of the `num_fed` tokens that each row was fed, and rows not in `goes_on`."""
        if not goes_on:
            if len(kept) == 1:  # a cache that was given can be gone on with
                self._crop(num_fed - kept[0])
            return
        some_ended = len(goes_on) < len(kept)
        if some_ended:
            self._select(torch.tensor(goes_on))
        kept = [kept[row] for row in goes_on]
        self._firsts = [self._firsts[row] for row in goes_on]
        self._next += torch.tensor(kept, device=self._next.device)
        # Where the longest text has ended, what it needed on the left is cut: slots stay within the longest text.
        if min(kept) == max(kept) and not (some_ended and min(self._firsts) > 0):
            self._crop(num_fed - kept[0])
            self._num += kept[0]
            if self._mask is not None:
                self._mask = torch.nn.functional.pad(self._mask, (0, kept[0]), value=1)
        else:
            self._align(kept)

    def _crop(self, num: int) -> None:
        for layer in self.cache.layers if num else ():
            layer.crop(-num)

    def _select(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self._next = self._next[rows.to(self._next.device)]
        if self._mask is not None:
            self._mask = self._mask[rows.to(self._mask.device)]

    def _align(self, kept: Sequence[int]) -> None:
        """Let all rows end at the right, and cut the padding that all have on the left."""
        ends = torch.tensor([self._num + num for num in kept])
        firsts = torch.tensor(self._firsts)
        length = int((ends - firsts).max())
        self.cache.align(ends, length)
        if self._mask is None:
            self._mask = torch.ones(len(kept), self._num, dtype=torch.int64, device=self._next.device)
        source = ends[:, None] - length + torch.arange(length)
        padded = torch.nn.functional.pad(self._mask, (0, max(kept)), value=1)
        source = source.to(padded.device)
        self._mask = padded.gather(1, source.clamp(min=0)) * (source >= 0)
        self._firsts = (firsts - ends + length).clamp(min=0).tolist()
        self._num = length
