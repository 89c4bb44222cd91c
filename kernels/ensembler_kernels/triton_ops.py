"""The operations by Triton kernels, one launch each. It knows nothing of rules, models or tokenizers.

Every logit is read once, but for what needs a number of the whole row first: `neutral` and log Z read the members once
more for their normalisers, a cut-off reads all members once more for the largest first sum. Nothing waits for the
device, and all launches can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton  # type: ignore[import-untyped]  # Triton has no type stubs
from torch import Tensor

from ensembler_kernels import triton_kernels as kernels
from ensembler_kernels.results import Sampled, Scored
from ensembler_kernels.scratch import Scratch
from ensembler_kernels.triton_configs import launch
from ensembler_kernels.weights import Run, Weights

_scratch = Scratch()


def unavailable(device: torch.device) -> str | None:
    """Return the reason why Triton cannot run on `device`, or None if it can."""
    if device.type == "cuda" or triton.knobs.runtime.interpret:
        return None
    return f"Triton kernels run on a GPU, got device {device} (TRITON_INTERPRET=1 interprets them on the CPU)"


def combine(logits: Sequence[Tensor], weights: Weights, rows: Tensor | None) -> Tensor:
    """The combined logits, fp32, contiguous, (outputs, V); see `reference.combine`."""
    call = _Call(logits, weights, rows)
    out = torch.empty((call.outputs, call.width), device=call.device)
    block, warps, splits = launch("combine", call.outputs, call.width)
    _run(
        kernels.combine_kernel, call.device, (call.outputs, splits), warps, call.members, call.table, call.rows,
        *call.prepass(), out, call.table_stride, call.num_rows, call.positions, call.width, call.shared, call.held,
        call.has_rows, call.raw, call.normalised, call.cuts, block,
    )  # fmt: skip
    return out


def combine_sample(
    logits: Sequence[Tensor],
    weights: Weights,
    rows: Tensor | None,
    temperature: Tensor | None,
    noise: Tensor | None,
) -> Sampled:
    """Tokens and log-probs; z is never written; see `reference.combine_sample`."""
    call = _Call(logits, weights, rows)
    block, warps, splits = launch("sample", call.outputs, call.width)
    tokens = torch.empty(call.outputs, dtype=torch.int64, device=call.device)
    logprobs = torch.empty(call.outputs, device=call.device)
    partial, counters = _scratch.take(call.device, 5 * call.outputs * splits, call.outputs)
    most_splits = triton.next_power_of_2(-(-call.width // block))  # of any number of outputs: one kernel serves all
    stride = 0 if temperature is None or temperature.shape[0] == 1 else 1
    _run(
        kernels.sample_kernel, call.device, (call.outputs, splits), warps, call.members, call.table, call.rows,
        *call.prepass(), call.table if temperature is None else temperature, call.table if noise is None else noise,
        partial, counters, tokens, logprobs, call.table_stride, stride, call.num_rows, call.positions,
        call.width, call.shared, call.held, splits, -(-call.width // (block * splits)),
        call.has_rows, call.raw, call.normalised, call.cuts, noise is not None, block, most_splits,
    )  # fmt: skip
    return Sampled(tokens, logprobs)


def combine_logprob(
    logits: Sequence[Tensor], weights: Weights, targets: Tensor, rows: Tensor | None, log_z: bool
) -> Scored:
    """Log-probs (K, n) of `targets`, and whether each is the most likely token; see `reference.combine_logprob`."""
    call = _Call(logits, weights, rows)
    points, num = len(weights), call.outputs
    block, warps, splits = launch("logprob", num, call.width)
    runs = weights.runs
    numbers, steps, longest = _runs(runs, call.device)
    logprobs = torch.empty((points, num), device=call.device)
    greedy = torch.empty((points, num), dtype=torch.bool, device=call.device)
    totals = torch.empty_like(logprobs) if log_z else logprobs
    pairs = len(runs) * num
    partial, counters = _scratch.take(call.device, (2 * points * num + pairs) * splits, pairs)
    _run(
        kernels.logprob_kernel, call.device, (num, splits, len(runs)), warps, call.members, call.table,
        call.rows, *call.prepass(points), targets, numbers, steps, partial, counters, logprobs, greedy, totals,
        num, points, call.num_rows, call.positions, call.width, call.shared, call.held, splits,
        call.has_rows, call.raw, call.normalised, call.cuts, log_z, block, triton.next_power_of_2(splits), longest,
    )  # fmt: skip
    if not log_z:
        return Scored(logprobs, greedy, None)
    widths = [z.shape[-1] for z in logits]
    return Scored(logprobs, greedy, totals - weights.log_normalisers(call.log_sums(widths), rows, widths))


class _Call:
    """The arguments of one call: (rows, V_i) or (rows, positions, V_i) of each member, and its weights."""

    def __init__(self, logits: Sequence[Tensor], weights: Weights, rows: Tensor | None) -> None:
        anchor = logits[0]
        self._logits = logits
        self.device, self.table = anchor.device, weights.table
        widths = tuple([z.shape[-1] for z in logits])
        known: tuple[int, int, int, tuple[int, ...], bool, int] | None = weights.known.get(widths)
        if known is None:
            known = weights.known[widths] = (
                weights.width(widths), weights.shared_width(widths), weights.held_width(widths),
                weights.limits(widths), weights.normalises(widths),
                sum(1 << i for i, is_raw in enumerate(weights.raw) if is_raw),
            )  # fmt: skip
        self.width, self.shared, self.held, self._limits, self.normalised, self.raw = known
        self.positions = anchor.shape[1] if anchor.dim() == 3 else 1
        self.num_rows = anchor.shape[0] * self.positions
        self.outputs = self.num_rows if rows is None else rows.shape[0]
        self.has_rows, self.rows = rows is not None, self.table if rows is None else rows
        self.table_stride = 0 if self.table.shape[0] == 1 else self.table.shape[1]
        self.cuts, self.members = weights.cuts, _members(logits, self._limits)

    def prepass(self, points: int | None = None) -> tuple[Tensor, Tensor]:
        """Return log-sums of members (rows, members) and thresholds (outputs,), where they are needed.

        With `points`, thresholds (points, outputs): every row of the table for every output.
        """
        log_sums = self.log_sums((self.shared,) * len(self.members)) if self.normalised else self.table
        if not self.cuts:
            return log_sums, self.table
        table, rows, stride = self.table, self.rows, self.table_stride
        if points is not None:
            if not self.has_rows:
                rows = torch.arange(self.outputs, dtype=torch.int32, device=self.device)
            table, rows, stride = table.repeat_interleave(self.outputs, 0), rows.repeat(points), table.shape[1]
        outputs = self.outputs * (1 if points is None else points)
        block, warps, splits = launch("prepass", outputs, self.width)
        partial = torch.empty((outputs, splits), device=self.device)
        _run(
            kernels.threshold_kernel, self.device, (outputs, splits), warps, self.members, table, rows, log_sums,
            partial, stride, self.num_rows, self.positions, self.shared, self.held, splits,
            self.has_rows or points is not None, self.raw, self.normalised, block,
        )  # fmt: skip
        largest = partial.amax(-1)
        return log_sums, largest.masked_fill_(largest == math.inf, math.nan).add_(table[:, -1])

    def log_sums(self, limits: Sequence[int]) -> Tensor:
        """Return log Σ exp of the first `limits` ids of every member, (rows, members)."""
        block, warps, splits = launch("prepass", self.num_rows, max(limits))
        partial = torch.empty((self.num_rows, len(limits), splits), device=self.device)
        _run(
            kernels.normaliser_kernel, self.device, (self.num_rows, splits), warps, _members(self._logits, limits),
            partial, self.num_rows, self.positions, splits, block,
        )  # fmt: skip
        return partial.logsumexp(-1)


def _members(logits: Sequence[Tensor], limits: Sequence[int]) -> tuple[tuple[Any, ...], ...]:
    """Return the arguments of each member. A stride of 0 where there is one row keeps every load aligned."""
    members = []
    for z, limit in zip(logits, limits, strict=True):
        shape, strides = z.shape, z.stride()
        if strides[-1] != 1 and shape[-1] > 1:
            z = z.contiguous()
            strides = z.stride()
        row = strides[0] if shape[0] > 1 else 0
        members.append((z, row, strides[1] if len(shape) == 3 and shape[1] > 1 else 0, limit))
    return tuple(members)


@lru_cache(maxsize=64)
def _runs(runs: tuple[Run, ...], device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Return first and count of every run (R, 2) int32, steps (R,), and the longest count up to a power of two."""
    numbers = torch.tensor([[run.first, run.count] for run in runs], dtype=torch.int32, device=device)
    steps = torch.tensor([run.step for run in runs], device=device)
    return numbers, steps, triton.next_power_of_2(max(run.count for run in runs))


def _run(kernel: Any, device: torch.device, grid: tuple[int, ...], num_warps: int, *arguments: Any) -> None:
    """Queue a kernel on the current stream of the members' device, which may not be the current device."""
    if not grid[0]:
        return
    # no fused multiply-add: one rounding per operation, as in the reference; the kernels wait for memory anyway
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*arguments, num_warps=num_warps, enable_fp_fusion=False)
        return
    with torch.cuda.device(device):
        kernel[grid](*arguments, num_warps=num_warps, enable_fp_fusion=False)
