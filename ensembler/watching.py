"""NaN of members, looked at when the host reads the token anyway: one wait for the device per token, not two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from ensembler.cache import EnsembleCache, Roles
from ensembler.runners import found_nan, refuse_nan


class NanWatch(StoppingCriteria):  # type: ignore[misc,unused-ignore]
    """Ends all texts of a `generate` at the step in which a member computed NaN; `check` then raises.

    What was found stays on the device until the loop is over. The loop reads each step whether all texts have ended.
    """

    def __init__(self) -> None:
        self._found: Tensor | None = None
        self._dtypes: dict[str, torch.dtype] = {}
        self._undo: tuple[EnsembleCache, dict[Roles, int | Tensor]] | None = None

    def note(
        self,
        logits: Mapping[str, Tensor],
        combined: Tensor,
        cache: EnsembleCache | None,
        marks: dict[Roles, int | Tensor] | None,
    ) -> None:
        """Take up a step: member `logits` by role, `combined` (rows, positions, V), and where its cache was before.

        With NaN in it the combination becomes 0 in place: no token can be drawn from NaN.
        """
        self._found = found_nan(logits)
        self._dtypes = {role: values.dtype for role, values in logits.items()}
        self._undo = None if cache is None or marks is None else (cache, marks)
        combined.masked_fill_(self._found.any().to(combined.device), 0.0)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return whether the rows of `input_ids` end, (rows,) bool: all of them or none."""
        if self._found is None:
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        return self._found.any().to(input_ids.device).expand(input_ids.shape[0])

    def check(self) -> None:
        """Raise LogitsError naming the member whose NaN ended the texts; the cache is put back to before that step."""
        if self._found is None:
            return
        try:
            refuse_nan(self._found, self._dtypes)
        except Exception:  # whatever it is, the cache goes back first
            if self._undo is not None:
                cache, marks = self._undo
                cache.restore(marks)
            raise
