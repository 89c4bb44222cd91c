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
from kernel_cases import BF16, COMBINATIONS, FP16, FP32, RATIO, KernelCases, make_members
from torch import Tensor


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
        alpha = torch.tensor([0.5, 1.5])
        torch.testing.assert_close(ops.combine(logits, RATIO, alpha), reference.combine(logits, RATIO, alpha))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("stride", [4097, 4100, 4104])
def test_all_but_the_edges_of_a_row_is_read_by_vectors(
    ops: ModuleType, harness: Path, dtype: torch.dtype, stride: int
) -> None:
    """Rows that start at every alignment, as those of an odd vocabulary do: two slots per row and member are edges."""
    rows, width, loads = 8, 4090, ctypes.CDLL(str(harness)).ens_loads
    logits = [torch.randn(rows, stride).to(dtype)[:, :width] for _ in range(3)]
    by_vector, by_value = ctypes.c_int64(), ctypes.c_int64()
    loads(ctypes.byref(by_vector), ctypes.byref(by_value))
    ops.combine(logits, RATIO, torch.ones(rows))
    loads(ctypes.byref(by_vector), ctypes.byref(by_value))
    assert by_value.value <= 2 * rows * len(logits)
    assert by_vector.value >= (width // 8 - 1) * rows * len(logits)


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
        alpha, how = torch.ones(1), Combination((1, 0), (0, 1), neutral=True, cutoff=0.01)
        wide = torch.randn(1, width + 9).to(dtype)
        for logits in ([at_end, at_end], [wide, at_end]):
            torch.testing.assert_close(ops.combine(logits, how, alpha), reference.combine(logits, how, alpha))
            ops.combine_sample(logits, how, alpha, torch.ones(1), torch.tensor(3))
            ops.combine_logprob(logits, how, alpha, torch.tensor([0]))
    finally:
        libc.mprotect(guard, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.parametrize("how", COMBINATIONS.values(), ids=COMBINATIONS)
def test_threads_of_a_phase_do_not_depend_on_each_other(ops: ModuleType, harness: Path, how: Combination) -> None:
    """Every phase with its threads last to first gives the same bits: what a race or a missing barrier would not."""
    reverse = ctypes.CDLL(str(harness)).ens_reverse_threads
    logits = make_members(len(how.constant), 2, (4100, 4097), (BF16, FP32))
    alpha, targets = torch.tensor([0.5, 1.5]), torch.tensor([0, 98])

    def results() -> list[Tensor]:
        sampled = ops.combine_sample(logits, how, alpha, torch.tensor([1.0, 0.0]), torch.tensor(3))
        return [ops.combine(logits, how, alpha), *sampled, *ops.combine_logprob(logits, how, alpha, targets)]

    forward = results()
    reverse(1)
    try:
        backward = results()
    finally:
        reverse(0)
    for one, other in zip(forward, backward, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("width", [31999, 128256, 152064])
def test_wide_rows(ops: ModuleType, width: int) -> None:
    logits = make_members(3, 1, (width,), (BF16,))
    arguments = (logits, RATIO, torch.tensor([0.7]), torch.tensor([0.8]), torch.tensor(11))
    assert torch.equal(ops.combine_sample(*arguments)[0], reference.combine_sample(*arguments)[0])
    alphas, targets = torch.tensor([0.0, 0.7]), torch.tensor([width - 1])
    torch.testing.assert_close(
        ops.combine_logprob(logits, RATIO, alphas, targets)[0],
        reference.combine_logprob(logits, RATIO, alphas, targets, dtype=torch.float64)[0].float(),
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
    with pytest.raises(ValueError, match="at most 8 members, got 9"):
        ops.combine([torch.zeros(1, 4)] * 9, Combination((1,) * 9, (0,) * 9), torch.zeros(1))
