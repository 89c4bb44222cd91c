"""The CUDA kernels through the host harness: the same bodies and indexing, thread by thread, without a GPU."""

from __future__ import annotations

import ctypes
import mmap
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from ensembler_kernels import cuda, reference
from ensembler_kernels.combination import Combination
from ensembler_kernels.cuda import build, library
from ensembler_kernels.weights import Weights
from helpers.kernel_cases import KernelCases
from helpers.member_cases import (
    BF16,
    COMBINATIONS,
    EVEN_TOL,
    FP16,
    FP32,
    RATIO,
    assert_same_draws,
    assert_same_scores,
    make_members,
    make_noise,
)
from torch import Tensor
from torch.testing import assert_close


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed: it builds the harness that runs the CUDA kernels' bodies on the host")
    return build.build_harness(tmp_path_factory.mktemp("harness") / "harness.so")


@pytest.fixture(scope="module")
def ops(harness: Path) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "HARNESS", harness)  # not the one that `make` may have left from other sources
        yield cuda


class TestCuda(KernelCases):
    pass


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("shift", range(9))
@pytest.mark.parametrize("other", [0, 3])
def test_rows_that_start_and_end_anywhere(ops: ModuleType, dtype: torch.dtype, shift: int, other: int) -> None:
    """Every alignment of the row's first element, with a member that is aligned otherwise beside it."""
    for width in (1, 7, 8, 9, 4097):
        logits = [
            torch.randn(2, offset + width).to(dtype)[:, offset:] for offset in (shift, shift + other, shift + 2 * other)
        ]
        weights, noise = Weights.of((RATIO, [0.5, 1.5])), make_noise(2, shift)
        assert_close(ops.combine(logits, weights, None), reference.combine(logits, weights))
        drawn = ops.combine_sample(logits, weights, None, torch.ones(1), noise)
        assert_same_draws(drawn, reference.combine_sample(logits, weights, None, torch.ones(1), noise))
        targets = torch.tensor([0, width - 1])
        scored = ops.combine_logprob(logits, weights, targets, None, False)
        assert_same_scores(scored, reference.combine_logprob(logits, weights, targets), EVEN_TOL)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("stride", [4097, 4100, 4104])
def test_all_but_the_edges_of_a_row_is_read_by_vectors(
    ops: ModuleType, harness: Path, dtype: torch.dtype, stride: int
) -> None:
    """Rows that start at every alignment, as those of an odd vocabulary do: two slots per row and member are edges."""
    rows, width, loads = 8, 4090, ctypes.CDLL(str(harness)).ens_loads
    logits, weights = [torch.randn(rows, stride).to(dtype)[:, :width] for _ in range(3)], Weights.of((RATIO, 1.0))
    by_vector, by_value = ctypes.c_int64(), ctypes.c_int64()
    for operation, arguments in (
        (ops.combine, (None,)),
        (ops.combine_sample, (None, None, None)),
        (ops.combine_logprob, (torch.zeros(rows, dtype=torch.int64), None, False)),
    ):
        loads(ctypes.byref(by_vector), ctypes.byref(by_value))
        operation(logits, weights, *arguments)
        loads(ctypes.byref(by_vector), ctypes.byref(by_value))
        assert by_value.value <= 2 * rows * len(logits)
        assert (width // 8 - 1) * rows * len(logits) <= by_vector.value <= (width // 8 + 1) * rows * len(logits)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("width", [1, 15, 1000, 2048, 2049])
def test_nothing_is_read_past_the_end_of_a_row(ops: ModuleType, dtype: torch.dtype, width: int) -> None:
    """The row ends where the next page may not be read: a load past it would end the process."""
    libc = ctypes.CDLL(None)
    length = 4 * mmap.PAGESIZE
    pages = mmap.mmap(-1, length + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    guard = ctypes.c_void_p(start + length)
    assert libc.mprotect(guard, mmap.PAGESIZE, mmap.PROT_EXEC & 0) == 0  # PROT_NONE
    try:
        size = torch.empty((), dtype=dtype).element_size()
        at_end = torch.frombuffer(pages, dtype=dtype, count=width, offset=length - width * size).view(1, -1)
        at_end.normal_()
        wide = torch.randn(1, width + 9).to(dtype)
        for how in (Combination((1, 0), (0, 1), neutral=True, cutoff=0.01), Combination((1, 0), (0, 1))):
            one, grid = Weights.of((how, 1.0)), Weights.of((how, [0.0, 0.5, 1.0]))
            for logits in ([at_end, at_end], [wide, at_end]):
                assert_close(ops.combine(logits, one, None), reference.combine(logits, one))
                ops.combine_sample(logits, one, None, torch.ones(1), make_noise(1))
                ops.combine_logprob(logits, grid, torch.tensor([width - 1]), None, True)
    finally:
        libc.mprotect(guard, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)


def results(ops: ModuleType, logits: list[Tensor], how: Combination) -> list[Tensor]:
    """What all three operations give for two rows, evenly spaced points and others."""
    grids = Weights.of((how, [0.5, 1.0, 1.5])), Weights.of((how, [0.5, 0.6, 1.5])), Weights.of((how, [0.5, 1.5]))
    rows, targets = torch.tensor([1, 0, 1], dtype=torch.int32), torch.tensor([0, 98])
    warmth = torch.tensor([1.0, 0.0, 0.7]), make_noise(3)
    found = [ops.combine(logits, grids[2], None), *ops.combine_sample(logits, grids[0], rows, *warmth)]
    return found + [part for grid in grids for part in ops.combine_logprob(logits, grid, targets, None, True)]


@pytest.mark.parametrize("how", COMBINATIONS.values(), ids=COMBINATIONS)
def test_threads_of_a_phase_do_not_depend_on_each_other(ops: ModuleType, harness: Path, how: Combination) -> None:
    """Every phase with its threads last to first gives the same bits: what a race or a missing barrier would not."""
    reverse = ctypes.CDLL(str(harness)).ens_reverse_threads
    logits = make_members(len(how.constant), 2, (4100, 4097), (BF16, FP32))
    forward = results(ops, logits, how)
    reverse(1)
    try:
        backward = results(ops, logits, how)
    finally:
        reverse(0)
    for one, other in zip(forward, backward, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("allowed", [True, False])
def test_blocks_may_take_any_number_of_tiles(ops: ModuleType, monkeypatch: pytest.MonkeyPatch, allowed: bool) -> None:
    """One block for all tiles of a row, or one for each: the same tokens and flags, log-probs to rounding.

    The second time the same, which it would not be if the counters were not back at 0. Logits without forbidden ids
    take the recurrence over points, those with some the exponentials.
    """
    logits = make_members(3, 2, (9001, 9000), (BF16, FP32))
    if allowed:
        logits = [z.clamp(min=-9.0) for z in logits]
    expected = None
    for blocks in (1, 8, 15, 1056):
        monkeypatch.setattr(library, "MAX_BLOCKS", blocks)
        actual = results(ops, logits, RATIO)
        for one, other in zip(actual, results(ops, logits, RATIO), strict=True):
            assert torch.equal(one, other)
        for one, other in zip(actual, expected or actual, strict=True):
            assert_close(one, other, rtol=EVEN_TOL, atol=EVEN_TOL)
            assert one.is_floating_point() or torch.equal(one, other)
        expected = actual


def test_an_even_grid_over_allowed_ids(ops: ModuleType) -> None:
    """The recurrence, at targets that are the best everywhere, somewhere and nowhere."""
    logits = [z.clamp(min=-20.0) for z in make_members(3, 2, (3001, 2999), (BF16, FP32))]
    for alphas in (torch.linspace(0, 1.5, 16), torch.linspace(-1, 1, 32), torch.linspace(2, 0, 70)):
        weights = Weights.of((RATIO, alphas))
        best = torch.stack([reference.combine(logits, Weights.of((RATIO, a))).argmax(-1) for a in alphas[::7]])
        for targets in (*best, torch.tensor([5, 2998])):
            actual = ops.combine_logprob(logits, weights, targets, None, False)
            truth = reference.combine_logprob(logits, weights, targets, dtype=torch.float64)
            assert_close(actual.logprobs.double(), truth.logprobs, rtol=EVEN_TOL, atol=EVEN_TOL, check_dtype=False)
            assert torch.equal(actual.greedy, reference.combine_logprob(logits, weights, targets).greedy)


def test_more_runs_than_a_launch_holds(ops: ModuleType) -> None:
    """A table that was made on a device is one run for each of its rows."""
    logits, targets = make_members(3, 2, (1500,), (FP32,)), torch.tensor([0, 98])
    points = Weights.of((RATIO, torch.linspace(0, 2, 70)))
    actual = ops.combine_logprob(logits, points.replace_table(points.table), targets, None, True)
    assert_same_scores(actual, ops.combine_logprob(logits, points, targets, None, True), EVEN_TOL)


@pytest.mark.parametrize("width", [31999, 128256, 152064])
def test_wide_rows(ops: ModuleType, width: int) -> None:
    logits = make_members(3, 1, (width,), (BF16,))
    arguments = (logits, Weights.of((RATIO, 0.7)), None, torch.tensor([0.8]), make_noise(1))
    assert_same_draws(ops.combine_sample(*arguments), reference.combine_sample(*arguments))
    weights, targets = Weights.of((RATIO, [0.0, 0.7])), torch.tensor([width - 1])
    assert_close(
        ops.combine_logprob(logits, weights, targets, None, False).logprobs,
        reference.combine_logprob(logits, weights, targets, dtype=torch.float64).logprobs.float(),
        rtol=2e-6,
        atol=2e-5,
    )


def test_what_cannot_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "missing.so")
    assert "build.py" in str(cuda.unavailable(torch.device("cuda")))
    assert "NVIDIA" in str(cuda.unavailable(torch.device("meta")))
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    monkeypatch.setattr(library, "HARNESS", broken)
    assert "broken.so" in str(cuda.unavailable(torch.device("cpu")))


def test_more_members_than_the_interface_holds_are_refused(ops: ModuleType) -> None:
    weights = Weights.of((Combination((1,) * 9, (0,) * 9), 0.0))
    with pytest.raises(ValueError, match="at most 8 members, got 9"):
        ops.combine([torch.zeros(1, 4)] * 9, weights, None)
