"""The numbers of one rule, for members in the order in which a call gives their logits."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Combination:
    """z = Σ_i constant_i · z_i + α · Σ_i slope_i · z_i, over the ids of member `anchor`.

    `shared`: ids from here on are not held by every member (None: the smallest width). They are forbidden, or with
    `neutral` get log-ratio 0. `raw` marks members that are scores and never normalised (None: there are none).
    `cutoff`: forbid tokens whose probability under the first sum is below `cutoff` · the largest one, where α ≠ 0.
    `reference.combine` is the definition. Raises ValueError.
    """

    constant: tuple[float, ...]
    slope: tuple[float, ...]
    shared: int | None = None
    neutral: bool = False
    raw: tuple[bool, ...] | None = None
    cutoff: float | None = None
    anchor: int = 0

    def __post_init__(self) -> None:
        for name in ("constant", "slope", "raw"):  # a dataclass that is frozen is also one that can be hashed
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else tuple(given))
        num_raw = len(self.constant) if self.raw is None else len(self.raw)
        if not 0 < len(self.constant) == len(self.slope) == num_raw:
            counts = f"{len(self.constant)} constants, {len(self.slope)} slopes, {num_raw} raw"
            raise ValueError(f"expected one constant and one slope per member, got {counts}")
        if not all(abs(number) < math.inf for number in (*self.constant, *self.slope)):
            raise ValueError(f"expected finite constants and slopes, got {self.constant} and {self.slope}")
        if self.shared is not None and self.shared < 1:
            raise ValueError(f"expected at least 1 shared id, got {self.shared}")
        if self.cutoff is not None and not 0 < self.cutoff <= 1:
            raise ValueError(f"expected a cutoff above 0 and at most 1, got {self.cutoff}")
        if not 0 <= self.anchor < len(self.constant):
            raise ValueError(f"expected an anchor in [0, {len(self.constant)}), got {self.anchor}")
