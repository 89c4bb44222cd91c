"""Choice of an implementation, bad input, errors as values, torch.compile, gradients and memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from ensembler_kernels import (
    Combination,
    Weights,
    check_sampled,
    check_scored,
    combine,
    combine_logprob,
    combine_sample,
    custom_ops,
    implementations,
    make_noise,
    reference,
)
from ensembler_kernels.checks import check_targets
from ensembler_kernels.scratch import Scratch
from helpers.member_cases import FP32, INF, NAN, RATIO, assert_same_draws, assert_same_scores, make_logits, rules
from torch import Tensor
from torch.testing import assert_close

HOW = Combination((1.0, 0.0), (0.0, 1.0))
HALF = Weights.of((HOW, 0.5))
CPU = torch.device("cpu")
TWO = [torch.zeros(2, 4), torch.zeros(2, 4)]
TARGETS = torch.zeros(2, dtype=torch.int64)
NOISE = make_noise(0, [0, 1])


def test_on_a_cpu_plain_torch_is_chosen_and_impl_wins() -> None:
    assert implementations.chosen(None, CPU) is implementations.load("torch")
    assert implementations.chosen("reference", CPU) is reference
    with pytest.raises(ValueError, match=r"impl: expected one of reference, torch, triton, cuda, got 'fast'"):
        combine(TWO, HALF, impl="fast")


@pytest.mark.parametrize("name", sorted(implementations.MODULES))
def test_an_implementation_that_cannot_run_says_why_in_a_line(name: str) -> None:
    reason = implementations.why_not(name, CPU)
    if reason is None:
        combine(TWO, HALF, impl=name)
        return
    assert reason
    assert "\n" not in reason
    with pytest.raises(RuntimeError, match=f"impl='{name}' cannot run on cpu: "):
        combine(TWO, HALF, impl=name)


@pytest.mark.parametrize(("failing", "taken"), [((), "triton"), (("triton",), "cuda"), (("triton", "cuda"), "torch")])
def test_where_a_kernel_cannot_be_launched_the_next_is_taken(
    monkeypatch: pytest.MonkeyPatch, failing: tuple[str, ...], taken: str
) -> None:
    """Once, with one warning that says why."""
    launched: list[str] = []

    def failed_launch(name: str, device: torch.device) -> str | None:
        launched.append(name)
        return "cannot launch a kernel (no C compiler)" if name in failing else None

    monkeypatch.setattr(implementations, "why_not", lambda name, device: None)
    monkeypatch.setattr(implementations, "_failed_launch", failed_launch)
    monkeypatch.setattr(implementations, "load", ModuleType)
    implementations.fastest.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            names = {implementations.chosen(None, torch.device("cuda", 0)).__name__ for _ in range(3)}
    finally:
        implementations.fastest.cache_clear()
    assert names == {taken}
    assert launched == ["triton", "cuda"][: len(failing) + (taken != "torch")]
    assert len(caught) == bool(failing)
    for name in failing:
        assert f"{name} cannot launch a kernel (no C compiler)" in str(caught[0].message)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a call reaches an implementation."""
    for name in ("combine", "combine_sample", "combine_logprob"):
        monkeypatch.setattr(custom_ops, name, lambda *arguments: pytest.fail("an implementation was called"))


def refused(message: str, logits: Any, weights: Any = HALF, rows: Any = None) -> None:
    """All three operations refuse logits, weights and rows with a message."""
    outputs = 2 if rows is None else len(rows)
    noise, targets = make_noise(0, range(outputs)), torch.zeros(outputs, dtype=torch.int64)
    for operation in (
        lambda: combine(logits, weights, rows),
        lambda: combine_sample(logits, weights, rows, noise=noise),
        lambda: combine_logprob(logits, weights, targets, rows),
    ):
        with pytest.raises(ValueError, match=message):
            operation()


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (TWO[:1], r"expected logits of 2 members, got 1"),
        ([torch.zeros(4), torch.zeros(4)], r"expected logits \(rows, V\) or \(rows, positions, V\), got shape"),
        ([TWO[0], torch.zeros(3, 4)], r"member 1: expected shape \(2, V\) as .*, got \(3, 4\)"),
        ([TWO[0], torch.zeros(2, 1, 4)], r"member 1: expected shape \(2, V\)"),
        ([TWO[0], torch.zeros(2, 0)], r"member 1: expected shape \(2, V\)"),
        ([TWO[0], TWO[1].double()], r"member 1: expected float32, bfloat16 or float16, got torch.float64"),
        ([TWO[0], TWO[1].long()], r"member 1: expected float32, bfloat16 or float16, got torch.int64"),
        ([TWO[0], TWO[1].to("meta")], r"member 1: expected the device of the first, cpu, got meta"),
        ([z.to("meta") for z in TWO], r"weights: expected the logits' device meta, got cpu"),
    ],
)
def test_bad_logits(logits: list[Tensor], message: str) -> None:
    refused(message, logits)


def test_logits_are_looked_at_again_when_they_change() -> None:
    """The first call has found good ones; others with the same weights are refused even so."""
    weights = Weights.of((HOW, 0.5))
    combine(TWO, weights)
    refused("member 1: expected shape", [TWO[0], torch.zeros(3, 4)], weights)
    refused("member 1: expected float32", [TWO[0], TWO[1].double()], weights)
    refused("expected logits of 2 members, got 3", [*TWO, TWO[0]], weights)
    combine(TWO, weights)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([0, 2]), r"rows: expected numbers in \[0, 2\), got 2 at 1"),
        (torch.tensor([-1, 0], dtype=torch.int32), r"rows: expected numbers in \[0, 2\), got -1 at 0"),
        (torch.tensor([0.0, 1.0]), r"rows: expected int32 or int64 \(outputs,\) on cpu, got torch.float32"),
        (torch.tensor([[0, 1]]), r"rows: expected int32 or int64 \(outputs,\) on cpu, got torch.int64 \(1, 2\)"),
        (torch.tensor([0, 1]).to("meta"), r"rows: expected .* on cpu, got .* on meta"),
    ],
)
def test_bad_rows(rows: Tensor, message: str) -> None:
    refused(message, TWO, rows=rows)


@pytest.mark.usefixtures("nothing_runs")
def test_a_number_of_weights_that_does_not_fit() -> None:
    three = Weights.of((HOW, [0.0, 0.5, 1.0]))
    for logits, rows, outputs in (
        (TWO, None, 2),
        (TWO, torch.tensor([0, 1, 1, 0]), 4),
        ([torch.zeros(2, 2, 4)] * 2, None, 4),
    ):
        message = f"weights: expected 1 row, or one for each of {outputs} outputs, got 3"
        with pytest.raises(ValueError, match=message):
            combine(logits, three, rows)
        with pytest.raises(ValueError, match=message):
            combine_sample(logits, three, rows)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("targets", "rows", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), None, r"targets: expected one per row, shape \(2,\), got shape \(3,\)"),
        (TARGETS, torch.tensor([0]), r"targets: expected one per row, shape \(1,\), got shape \(2,\)"),
        (torch.zeros(2, dtype=torch.int32), None, r"targets: expected int64, got torch.int32"),
        (torch.tensor([0, 4]), None, r"targets: expected .* in \[0, 4\), got 4"),
        (torch.tensor([-1, 0]), None, r"targets: expected .* in \[0, 4\), got -1"),
        (TARGETS.to("meta"), None, r"targets: expected the logits' device cpu, got meta"),
    ],
)
def test_bad_targets(targets: Tensor, rows: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine_logprob(TWO, HALF, targets, rows)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    "temperature",
    [-0.1, NAN, INF, *map(torch.tensor, ([0.5, -1.0], [NAN, 1.0], [1.0, INF], [1.0, 1.0, 1.0], [[1.0], [1.0]]))],
)
def test_bad_temperature(temperature: Any) -> None:
    with pytest.raises(ValueError, match=r"temperature: expected"):
        combine_sample(TWO, HALF, temperature=temperature, noise=NOISE)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("noise", [NOISE[:1], NOISE[:, :3], NOISE[0], NOISE.int(), NOISE.double(), NOISE.to("meta")])
def test_bad_noise(noise: Tensor) -> None:
    with pytest.raises(ValueError, match=r"noise: expected int64 \(2, 4\) on cpu, got"):
        combine_sample(TWO, HALF, noise=noise)


# -- what calls return -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("noise", [None, NOISE], ids=["greedy", "drawn"])
def test_errors_are_values_that_a_check_reads(impl: str, noise: Tensor | None) -> None:
    logits = [torch.tensor([[0.0, 1.0], [-INF, -INF]]), torch.zeros(2, 2)]
    sampled = combine_sample(logits, HALF, noise=noise, impl=impl)
    assert (sampled.tokens < 0).tolist() == [False, True]
    with pytest.raises(ValueError, match="output 1 has no token to choose: all its combined logits are -inf"):
        check_sampled(sampled)
    grid = Weights.of((HOW, [0.5, 1.0]))
    scored = combine_logprob(logits, grid, TARGETS, impl=impl)
    assert scored.logprobs.isnan().tolist() == [[False, True]] * 2
    with pytest.raises(ValueError, match=r"target 1 has no log-prob at point 0 \(alpha 0.5\): all combined logits"):
        check_scored(scored, grid.alphas)
    logits[0][1, 0] = NAN
    with pytest.raises(ValueError, match="output 1 holds NaN"):
        check_sampled(combine_sample(logits, HALF, noise=noise, impl=impl))
    whole = torch.tensor([0, 0])
    check_sampled(combine_sample(logits, HALF, whole, noise=noise, impl=impl))
    check_scored(combine_logprob(logits, grid, TARGETS, whole, impl=impl), grid.alphas)


def test_results_have_the_shape_of_the_anchor_or_one_row_per_output() -> None:
    logits = [z.view(2, 3, -1) for z in make_logits(6, 11, 3, FP32)]
    weights = Weights.of((RATIO, 0.5))
    z = combine(logits, weights)
    assert z.shape == (2, 3, 11)
    for dtype in (torch.int32, torch.int64):
        taken = combine(logits, weights, torch.tensor([5, 0], dtype=dtype))
        assert torch.equal(taken, torch.stack([z[1, 2], z[0, 0]]))
    assert combine_sample(logits, weights, noise=make_noise(0, range(6))).tokens.shape == (6,)


def test_no_rows() -> None:
    none = [torch.zeros(0, 4), torch.zeros(0, 4)]
    assert combine(none, HALF).shape == (0, 4)
    assert combine([z.view(0, 3, 4) for z in none], HALF).shape == (0, 3, 4)
    assert combine_sample(none, HALF, noise=make_noise(0, [])).tokens.shape == (0,)
    assert combine_logprob(none, HALF, TARGETS[:0]).logprobs.shape == (1, 0)


def test_temperature_is_a_number_or_a_tensor() -> None:
    logits, weights, noise = make_logits(2, 301, 3, FP32), Weights.of((RATIO, 0.5)), make_noise(1, [3, 4])
    expected = combine_sample(logits, weights, temperature=torch.full((2,), 0.7), noise=noise)
    for temperature in (0.7, torch.tensor(0.7), torch.tensor([0.7]), torch.tensor([0.7, 0.7]).double()):
        assert_same_draws(combine_sample(logits, weights, temperature=temperature, noise=noise), expected)
    assert_same_draws(combine_sample(logits, weights, temperature=0, noise=noise), combine_sample(logits, weights))


# -- torch.compile and autograd ----------------------------------------------------------------------------------------


def all_three(logits: list[Tensor], weights: Weights, noise: Tensor, temperature: float) -> tuple[Any, ...]:
    targets, rows = torch.arange(logits[0].shape[0]), torch.arange(logits[0].shape[0]).flip(0)
    sampled = combine_sample(logits, weights, rows, temperature=temperature, noise=noise)
    return combine(logits, weights), sampled, combine_logprob(logits, weights, targets, rows, log_z=True)


def assert_all_close(actual: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert_close(actual[0], expected[0])
    assert_same_draws(actual[1], expected[1])
    assert_same_scores(actual[2], expected[2], 1e-5)
    assert_close(actual[2].log_z, expected[2].log_z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_compiled_equals_eager(mode: Any) -> None:
    """One graph without breaks, by inductor, on a shape whose number of rows changes."""
    compiled = torch.compile(all_three, fullgraph=True, dynamic=True)
    for rows in (2, 3):
        logits = make_logits(rows, 11, 3, FP32, seed=rows)
        given = logits, Weights.of((RATIO, 0.5)), make_noise(3, range(rows)), 0.7
        with mode():
            assert_all_close(compiled(*given), all_three(*given))


def test_numbers_that_change_between_calls_compile() -> None:
    logits, noise = make_logits(2, 11, 3, FP32), make_noise(3, [0, 1])

    def made_inside(alpha: float, temperature: float, noise: Tensor) -> tuple[Any, ...]:
        return all_three(logits, Weights.of((RATIO, alpha)), noise, temperature)

    compiled = torch.compile(made_inside, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.inference_mode():
        for alpha, temperature in ((0.5, 0.7), (0.7, 0.9), (1.2, 1.3)):
            given = alpha, temperature, noise + int(10 * alpha)
            assert_all_close(compiled(*given), made_inside(*given))


def test_ops_are_registered_properly() -> None:
    logits, weights = [z.requires_grad_() for z in make_logits(2, 11, 3, FP32)], Weights.of(*rules())
    numbers, rows = (*custom_ops._flat(weights), "torch"), torch.tensor([1, 0, 0, 1, 1, 0, 1], dtype=torch.int32)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    ops, targets = torch.ops.ensembler, torch.arange(7)
    for given_rows in (rows, None):
        table = weights.table if given_rows is not None else weights.table[:1]
        torch.library.opcheck(ops.combine.default, (logits, table, given_rows, *numbers), test_utils=tests)
    for log_z in (False, True):
        given = (logits, weights.table, rows, targets, log_z, *numbers)
        torch.library.opcheck(ops.combine_logprob.default, given, test_utils=tests)
    plain = [z.detach() for z in logits]
    for warmth in ((torch.ones(7), make_noise(0, range(7))), (None, None)):
        given = (plain, weights.table, rows, *warmth, *numbers)
        torch.library.opcheck(ops.combine_sample.default, given, test_utils=tests)


@pytest.mark.parametrize("log_z", [False, True])
@pytest.mark.parametrize("neutral", [False, True])
def test_gradients_are_those_of_the_reference(neutral: bool, log_z: bool) -> None:
    targets, rows, found = torch.tensor([1, 2, 0]), torch.tensor([1, 0, 1]), []
    for ours in (True, False):
        logits = [z.requires_grad_() for z in make_logits(2, 11, 3, FP32)]
        alpha = torch.tensor([0.5, 2.0, 1.0], requires_grad=True)
        weights = Weights.of((Combination(RATIO.constant, RATIO.slope, 9, neutral=neutral), alpha))
        if ours:
            z, scored = combine(logits, weights, rows), combine_logprob(logits, weights, targets, rows, log_z=log_z)
        else:
            z, scored = (
                reference.combine(logits, weights, rows),
                reference.combine_logprob(logits, weights, targets, rows, log_z),
            )
        loss = torch.nn.functional.cross_entropy(z, targets) + scored.logprobs.sum()
        loss = loss + (scored.log_z.square().sum() if log_z else 0.0)
        found.append(torch.autograd.grad(loss, [*logits, alpha]))
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected)
        assert actual.abs().sum() > 0


@pytest.mark.parametrize("rows", ["None", "torch.arange(256, dtype=torch.int32)"])
def test_combine_takes_the_memory_of_one_result(rows: str) -> None:
    """The peak over (4, 64, 32000): six temporaries of the result's size would be 200 MB."""
    code = f"""
import resource, torch
from ensembler_kernels import Combination, Weights, combine
torch.set_num_threads(1)
weights = Weights.of((Combination((1.0, 0.0, 0.0), (0.0, 1.0, -1.0)), 0.5))
combine([torch.zeros(1, 1, 32000)] * 3, weights)
logits = [torch.zeros(4, 64, 32000, dtype=torch.bfloat16) for _ in range(3)]
for z in logits:
    z.fill_(1.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = combine(logits, weights, {rows})
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(grown / (result.numel() * 4))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.25, f"grew by {done.stdout.strip()} results"


def test_a_draw_from_logits_that_require_a_gradient() -> None:
    logits = [z.requires_grad_() for z in make_logits(2, 11, 3, torch.float32)]
    weights = Weights.of((RATIO, torch.tensor([0.5], requires_grad=True)))
    noise = make_noise(1, [0, 1])
    sampled = combine_sample(logits, weights, temperature=0.7, noise=noise)
    assert torch.equal(
        sampled.tokens, combine_sample(logits, weights, temperature=0.7, noise=noise, impl="reference")[0]
    )
    assert not sampled.logprobs.requires_grad


def test_targets_of_any_stride() -> None:
    logits, targets = make_logits(4, 50, 3, torch.float32), (torch.arange(12).view(4, 3) * 4)[:, 0]
    weights = Weights.of((RATIO, 0.5))
    assert_close(combine_logprob(logits, weights, targets), combine_logprob(logits, weights, targets.clone()))
    assert check_targets(targets, logits, weights, None).is_contiguous()


@pytest.mark.parametrize(("weights", "rows", "message"), [
    (RATIO, None, "weights: expected Weights, got a Combination"),
    (None, [0, 1], "rows: expected a tensor of int32 or int64"),
])  # fmt: skip
def test_what_is_no_tensor_is_refused_in_words(weights: Any, rows: Any, message: str) -> None:
    weights = Weights.of((RATIO, 0.5)) if weights is None else weights
    with pytest.raises(ValueError, match=message):
        combine(make_logits(2, 11, 3, torch.float32), weights, rows)
    with pytest.raises(ValueError, match="expected pairs"):
        Weights.of(RATIO, 0.5)  # type: ignore[arg-type]


def test_scratch_that_is_captured_is_aligned_and_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with what it asks of torch replaced: counters are cut from a pool, or set to 0 by the graph."""
    capturing = False
    pool, allocate = Scratch(), torch.empty
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch, "empty", lambda *sizes, **given: allocate(*sizes))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda size, **given: zeros(size, dtype=torch.int32))
    gpu = torch.device("cuda", 0)
    kept = pool.take(gpu, 100, 10)
    assert all(one is other for one, other in zip(kept, pool.take(gpu, 50, 5), strict=True))
    assert pool.take(gpu, 200, 10)[0].shape[0] == 200
    capturing = True
    found = [pool.take(gpu, 100, num)[1] for num in (1, 1, 8, 5, 3)]
    starts = [one.data_ptr() for one in found]
    assert [(start - starts[0]) % 16 for start in starts] == [0] * 5
    for one, other in itertools.pairwise(found):
        assert one.data_ptr() + 4 * len(one) <= other.data_ptr()
    assert all(not one.any() for one in found)
    assert pool.take(gpu, 100, 1 << 20)[1].shape[0] == 1 << 20  # more than the pool has
