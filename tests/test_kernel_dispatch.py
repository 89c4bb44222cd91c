"""Choice of an implementation, bad input, torch.compile, inference mode, gradients and memory."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from ensembler_kernels import Combination, combine, combine_logprob, combine_sample, reference
from ensembler_kernels.implementations import MODULES, chosen, why_not
from member_cases import make_combination, make_logits
from torch.testing import assert_close

INF, NAN = math.inf, math.nan
HOW = Combination((1.0, 0.0), (0.0, 1.0))
CPU = torch.device("cpu")
TWO = [torch.zeros(2, 4), torch.zeros(2, 4)]
TARGETS = torch.zeros(2, dtype=torch.int64)


def test_on_a_cpu_plain_torch_is_chosen_and_impl_wins() -> None:
    assert chosen(None, CPU) == "torch"
    assert chosen("reference", CPU) == "reference"
    with pytest.raises(ValueError, match=r"impl: expected one of reference, torch, triton, cuda, got 'fast'"):
        combine(TWO, HOW, 0.5, impl="fast")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_an_implementation_that_cannot_run_says_why_in_a_line(name: str) -> None:
    reason = why_not(name, CPU)
    if reason is None:
        combine(TWO, HOW, 0.5, impl=name)
        return
    assert reason
    assert "\n" not in reason
    with pytest.raises(RuntimeError, match=f"impl='{name}' cannot run on cpu: "):
        combine(TWO, HOW, 0.5, impl=name)


@pytest.mark.parametrize(
    ("logits", "alpha", "message"),
    [
        (TWO[:1], 0.5, r"expected logits of 2 members, got 1"),
        ([torch.zeros(4), torch.zeros(4)], 0.5, r"expected logits \(rows, V\) or \(rows, positions, V\), got shape"),
        ([TWO[0], torch.zeros(3, 4)], 0.5, r"member 1: expected shape \(2, V\) as the anchor has, got \(3, 4\)"),
        ([TWO[0], torch.zeros(2, 1, 4)], 0.5, r"member 1: expected shape \(2, V\)"),
        ([TWO[0], torch.zeros(2, 0)], 0.5, r"member 1: expected shape \(2, V\)"),
        ([TWO[0], TWO[1].double()], 0.5, r"member 1: expected float32, bfloat16 or float16, got torch.float64"),
        ([TWO[0], TWO[1].long()], 0.5, r"member 1: expected float32, bfloat16 or float16, got torch.int64"),
        ([TWO[0], TWO[1].to("meta")], 0.5, r"member 1: expected the anchor's device cpu, got meta"),
        (TWO, NAN, r"alpha: expected a finite float32 number, got nan"),
        (TWO, 1e39, r"alpha: expected a finite float32 number, got 1e\+39"),
        (TWO, torch.zeros(3), r"alpha: expected a number or one value per row, shape \(2,\), got shape \(3,\)"),
        (TWO, torch.zeros(2, 1), r"alpha: expected a number or one value per row"),
    ],
)
def test_bad_logits_and_alpha(logits: list[torch.Tensor], alpha: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine(logits, HOW, alpha)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"targets: expected one per row, shape \(2,\), got shape \(3,\)"),
        (torch.zeros(2, dtype=torch.int32), r"targets: expected int64, got torch.int32"),
        (torch.tensor([0, 4]), r"targets: expected ids in \[0, 4\), got 4 in row 1"),
        (torch.tensor([-1, 0]), r"targets: expected ids in \[0, 4\), got -1 in row 0"),
        (TARGETS.to("meta"), r"targets: expected the anchor's device cpu, got meta"),
    ],
)
def test_bad_targets(targets: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine_logprob(TWO, HOW, [0.5], targets)


@pytest.mark.parametrize("alphas", [[], torch.zeros(0), torch.zeros(2, 2)])
def test_bad_grid(alphas: Any) -> None:
    with pytest.raises(ValueError, match=r"alphas: expected a grid of shape \(K,\)"):
        combine_logprob(TWO, HOW, alphas, TARGETS)


def test_bad_temperature_and_seed() -> None:
    for temperature in (-0.1, NAN, torch.tensor([0.5, -1.0])):
        with pytest.raises(ValueError, match=r"temperature: expected"):
            combine_sample(TWO, HOW, 0.5, temperature=temperature, seed=0)
    for seed in (2**64, -(2**63) - 1, torch.zeros(2, dtype=torch.int64), torch.tensor(0.5)):
        with pytest.raises(ValueError, match=r"seed: expected"):
            combine_sample(TWO, HOW, 0.5, temperature=1.0, seed=seed)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"constant": (), "slope": ()}, r"expected one constant and one slope per member, got 0 constants, 0 slopes"),
        ({"constant": (1,), "slope": (1, 2)}, r"got 1 constants, 2 slopes, 1 raw"),
        ({"constant": (1,), "slope": (NAN,)}, r"expected finite constants and slopes"),
        ({"constant": (1,), "slope": (0,), "shared": 0}, r"expected at least 1 shared id, got 0"),
        ({"constant": (1,), "slope": (0,), "cutoff": 1.5}, r"expected a cutoff above 0 and at most 1, got 1.5"),
    ],
)
def test_bad_combination(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Combination(**numbers)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_token_is_named(impl: str, temperature: float) -> None:
    logits = [torch.tensor([[0.0, 1.0], [-INF, -INF]]), torch.zeros(2, 2)]
    with pytest.raises(ValueError, match=r"row 1 has no token to choose: all its combined logits are -inf"):
        combine_sample(logits, HOW, 0.5, temperature=temperature, seed=0, impl=impl)
    with pytest.raises(ValueError, match=r"row 1 at alpha 0.5: all its combined logits are -inf, or one"):
        combine_logprob(logits, HOW, [0.5, 1.0], TARGETS, impl=impl)
    logits[0][1, 0] = NAN
    with pytest.raises(ValueError, match="row 1 holds NaN"):
        combine_sample(logits, HOW, 0.5, temperature=temperature, seed=0, impl=impl)


def test_no_rows() -> None:
    none = [torch.zeros(0, 4), torch.zeros(0, 4)]
    assert combine(none, HOW, 0.5).shape == (0, 4)
    assert combine_sample(none, HOW, 0.5, temperature=1.0, seed=0)[0].shape == (0,)
    assert combine_logprob(none, HOW, [0.5, 1.0], torch.zeros(0, dtype=torch.int64))[0].shape == (2, 0)


def all_three(logits: list[torch.Tensor], alpha: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    how, targets = make_combination(3), torch.arange(logits[0].shape[0])
    return (
        combine(logits, how, alpha),
        *combine_sample(logits, how, alpha, temperature=0.7, seed=seed),
        *combine_logprob(logits, how, torch.stack([alpha, 2 * alpha, 3 * alpha]), targets),
    )


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_compiled_equals_eager(mode: Any) -> None:
    """One graph without breaks, by inductor, on a shape whose number of rows changes."""
    compiled = torch.compile(all_three, fullgraph=True, dynamic=True)
    for rows in (2, 3):
        logits = make_logits(rows, 11, 3, torch.float32, seed=rows)
        given = logits, torch.tensor(0.5), torch.tensor(3)
        with mode():
            for actual, expected in zip(compiled(*given), all_three(*given), strict=True):
                assert_close(actual, expected)


def test_ops_are_registered_properly() -> None:
    logits, alpha = [z.requires_grad_() for z in make_logits(2, 11, 3, torch.float32)], torch.rand(2)
    numbers = ((1.0, 0.0, 0.0), (0.0, 1.0, -1.0), None, False, None, None, "torch")
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    ops = torch.ops.ensembler
    torch.library.opcheck(ops.combine.default, (logits, alpha, *numbers), test_utils=tests)
    targets = torch.tensor([1, 2])
    torch.library.opcheck(ops.combine_logprob.default, (logits, alpha, targets, *numbers), test_utils=tests)
    plain = [z.detach() for z in logits]
    given = (plain, alpha, torch.ones(2), torch.tensor(1), *numbers)
    torch.library.opcheck(ops.combine_sample.default, given, test_utils=tests)


@pytest.mark.parametrize("neutral", [False, True])
def test_gradients_are_those_of_the_reference(neutral: bool) -> None:
    how, targets = Combination((1, 0, 0), (0, 1, -1), 9, neutral=neutral), torch.tensor([1, 2])
    found = []
    for ours in (True, False):
        logits = [z.requires_grad_() for z in make_logits(2, 11, 3, torch.float32)]
        alpha = torch.tensor([0.5, 2.0], requires_grad=True)
        if ours:
            z, (logprobs, _) = combine(logits, how, alpha), combine_logprob(logits, how, alpha, targets)
        else:
            z = reference.combine(logits, how, alpha)
            logprobs, _ = reference.combine_logprob(logits, how, alpha, targets)
        loss = torch.nn.functional.cross_entropy(z, targets) + logprobs.sum()
        found.append(torch.autograd.grad(loss, [*logits, alpha]))
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected)


def test_combine_takes_the_memory_of_one_result() -> None:
    """The peak over (4, 64, 32000): six temporaries of the result's size would be 200 MB."""
    code = """
import resource, torch
from ensembler_kernels import Combination, combine
torch.set_num_threads(1)
how = Combination((1.0, 0.0, 0.0), (0.0, 1.0, -1.0))
combine([torch.zeros(1, 1, 32000)] * 3, how, 0.5)
logits = [torch.zeros(4, 64, 32000, dtype=torch.bfloat16) for _ in range(3)]
for z in logits:
    z.fill_(1.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = combine(logits, how, 0.5)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(grown / (result.numel() * 4))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.25, f"grew by {done.stdout.strip()} results"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_in_tensors_too(bad: float) -> None:
    logits, how = make_logits(2, 11, 3, torch.float32), make_combination(3)
    numbers = torch.tensor([0.5, bad])
    with pytest.raises(ValueError, match="alpha: expected finite"):
        combine(logits, how, numbers)
    with pytest.raises(ValueError, match="alphas: expected finite"):
        combine_logprob(logits, how, numbers, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="temperature: expected"):
        combine_sample(logits, how, 0.5, temperature=torch.tensor([bad, 1.0]), seed=0)


def test_a_first_sum_without_members_is_zero() -> None:
    logits = [torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 1.0]])]
    for impl in ("reference", "torch"):
        actual = combine(logits, Combination((0.0, 0.0), (1.0, -1.0), neutral=True), 2.0, impl=impl)
        assert actual.tolist() == [[-6.0, 2.0]]


def test_numbers_that_change_between_calls_compile() -> None:
    logits, how = make_logits(2, 11, 3, torch.float32), make_combination(3)

    def both(alpha: float, seed: int) -> tuple[torch.Tensor, ...]:
        return combine(logits, how, alpha), *combine_sample(logits, how, alpha, temperature=0.7, seed=seed)

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.inference_mode():
        for alpha, seed in ((0.5, 3), (0.7, 4), (1.2, 5)):
            for actual, expected in zip(compiled(alpha, seed), both(alpha, seed), strict=True):
                assert_close(actual, expected)
