"""What is combined: the numbers of a rule, and what they say about members of different widths.

An implementation is a module (`reference`, `torch_ops`, `triton_ops`, `cuda`) with these functions. `dispatch` has
checked the arguments: logits on one device, (rows, V_i) but for `combine`, which takes (rows, positions, V_i) as well,
any strides, fp32, bf16 or fp16 mixed; `alpha` and `temperature` fp32 (rows,), `alphas` fp32 (K,), `targets` int64
(rows,), all on that device; `seed` an int64 tensor without dimensions on the CPU or on that device.

    unavailable(device) -> str | None                           the reason why it cannot run there, in one line
    combine(logits, how, alpha) -> Tensor                       fp32, contiguous, of the anchor's shape
    combine_sample(logits, how, alpha, temperature, seed)       tokens (rows,) int64: −1 where everything is −inf;
                                                                logprobs (rows,) fp32: NaN where the row holds NaN
    combine_logprob(logits, how, alphas, targets)               logprobs (K, rows) fp32: NaN where the row holds NaN or
                                                                everything is −inf; greedy (K, rows) bool
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Combination:
    """z = Σ_i constant_i · z_i + α · Σ_i slope_i · z_i, member 0 being the anchor, whose width is the result's.

    `shared`: ids from here on are not held by every member (None: the smallest width). They are forbidden, or with
    `neutral` get log-ratio 0. `raw` marks members that are scores and never normalised (None: there are none).
    `cutoff`: forbid tokens whose anchor probability is below `cutoff` · the largest one, in rows with α ≠ 0.
    `reference.combine` says what the parts mean. Raises ValueError.
    """

    constant: tuple[float, ...]
    slope: tuple[float, ...]
    shared: int | None = None
    neutral: bool = False
    raw: tuple[bool, ...] | None = None
    cutoff: float | None = None

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

    @property
    def normalised_slope(self) -> tuple[float, ...]:
        """The slope of every member that is a distribution, 0 for the others."""
        if self.raw is None:
            return self.slope
        return tuple(0.0 if is_raw else slope for slope, is_raw in zip(self.slope, self.raw, strict=True))

    def shared_width(self, logits: Sequence[Tensor]) -> int:
        """The number of ids that all members hold."""
        width = min(z.shape[-1] for z in logits)
        return width if self.shared is None else min(self.shared, width)

    def normalises(self, logits: Sequence[Tensor]) -> bool:
        """Whether members of the log-ratio are normalised over the shared ids before they are combined."""
        return self.neutral and self.shared_width(logits) < logits[0].shape[-1]

    def held_width(self, logits: Sequence[Tensor]) -> int:
        """The number of ids that may be permitted: with `neutral`, all that the members of the first sum hold."""
        if not self.neutral:
            return self.shared_width(logits)
        held = (z.shape[-1] for z, weight in zip(logits, self.constant, strict=True) if weight)
        return min([logits[0].shape[-1], *held])
