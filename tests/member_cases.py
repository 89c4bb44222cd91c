"""Cases for the tests of the kernels: logits of families of models, and the three-way comparison of STYLE.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from ensembler_kernels import Combination
from torch import Tensor

WIDTHS = (31_999, 32_000, 32_016, 49_152, 128_256, 151_936)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMBERS = {  # members: (constant, slope)
    1: ((1.0,), (0.5,)),
    2: ((1.0, 0.0), (1.0, -1.0)),
    3: ((1.0, 0.0, 0.0), (0.0, 1.0, -1.0)),
    5: ((1.0, 0.25, 0.0, 0.0, -0.5), (0.0, 1.0, -1.0, 0.5, -0.5)),
}


def make_logits(
    rows: int, width: int, members: int, dtype: torch.dtype, *, seed: int = 0, forbidden: bool = False
) -> list[Tensor]:
    """Return logits of `members` that resemble one another; every other one is wider, as a padded vocabulary is."""
    generator = torch.Generator().manual_seed(seed)
    common = 4 * torch.randn(rows, width, generator=generator)
    found = []
    for i in range(members):
        z = common + torch.randn(rows, width, generator=generator)
        if forbidden:
            z[:, torch.randint(0, width, (1 + width // 100,), generator=generator)] = -torch.inf
        z = torch.nn.functional.pad(z, (0, 128 * (i % 2)), value=3.0)
        found.append(z.to(dtype))
    return found


def make_combination(members: int) -> Combination:
    """Return numbers of a rule for this many members."""
    return Combination(*NUMBERS[members])


def assert_three_way(actual: Tensor, reference: Tensor, truth: Tensor, tol: float) -> None:
    """Assert that the error of `actual` against the float64 `truth` is at most that of the `reference` + `tol`.

    `tol` is relative to numbers above 1. What is not finite has to be equal.
    """
    assert actual.shape == truth.shape
    finite = truth.isfinite()
    torch.testing.assert_close(actual[~finite].double(), truth[~finite].double(), rtol=0, atol=0, equal_nan=True)
    if finite.any():
        scale = truth[finite].abs().clamp(min=1.0)
        own = ((actual[finite].double() - truth[finite]).abs() / scale).max().item()
        other = ((reference[finite].double() - truth[finite]).abs() / scale).max().item()
        assert own <= other + tol, f"error {own:.3g}; the reference has {other:.3g}; tolerance {tol:.3g}"


def assert_greedy(actual: Tensor, best: Tensor, targets: Tensor, tol: float) -> None:
    """Assert flags (K, rows) where no other logit of `best` (K, rows, V) float64 is within `tol` of the largest."""
    top = best.topk(2, dim=-1)
    clear = top.values[..., 0] - top.values[..., 1] > tol
    expected = top.indices[..., 0] == targets
    assert torch.equal(actual[clear], expected[clear]), (actual, expected, clear)


def grids() -> Sequence[list[float]]:
    """Return α grids: equally spaced, not so, backwards, of one, longer than one run of the recurrence."""
    return [
        [k / 10 for k in range(16)],
        [0.0, 0.1, 0.5, 2.0],
        [1.5, 1.0, 0.5, 0.0],
        [0.7],
        [k / 20 for k in range(40)],
    ]
