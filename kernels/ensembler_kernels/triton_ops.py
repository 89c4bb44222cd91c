"""The three operations by Triton kernels. It knows nothing of rules, models or tokenizers.

A row is split over programs of one block of token ids each, so that one row fills a GPU. `combine` writes its block;
the other two write one partial result per block, which a second kernel merges. Every logit is read once, but for two
options that need a number of the whole row first: `neutral` reads the members of the ratio once more for their
normalisers, `cutoff` all members once more for the anchor's largest logit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton  # type: ignore[import-untyped]  # Triton has no type stubs
from torch import Tensor

from ensembler_kernels import triton_kernels as kernels
from ensembler_kernels.combination import Combination
from ensembler_kernels.triton_configs import PREPASS_BLOCK, row_bucket


def unavailable(device: torch.device) -> str | None:
    """Why Triton cannot run on `device`, or None if it can."""
    if device.type == "cuda" or triton.knobs.runtime.interpret:
        return None
    return f"Triton kernels run on a GPU, got device {device} (TRITON_INTERPRET=1 interprets them on the CPU)"


def combine(logits: Sequence[Tensor], how: Combination, alpha: Tensor) -> Tensor:
    """The combined logits, fp32, contiguous, of the anchor's shape; see `reference.combine`."""
    call = _Call(logits, how)
    out = torch.empty(logits[0].shape, dtype=torch.float32, device=logits[0].device)
    alpha = alpha.contiguous()
    thresholds = call.thresholds(alpha, per_row=True)
    call.launch(
        kernels.combine_kernel, call.grid, call.members, call.normalisers, thresholds, alpha, out,
        call.width, call.row_bucket, call.positions, call.shared, call.held, **call.constants,
    )  # fmt: skip
    return out


def combine_sample(
    logits: Sequence[Tensor], how: Combination, alpha: Tensor, temperature: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens (rows,) int64, −1 where everything is forbidden, and log-probs (rows,) fp32; the row is never written."""
    call = _Call(logits, how)
    kernel = kernels.sample_kernel
    splits = call.most_splits(kernel)
    partial = call.empty(call.rows, 4, splits)
    partial_ids = call.empty(call.rows, splits, dtype=torch.int32)
    alpha, temperature, seed = alpha.contiguous(), temperature.contiguous(), seed.to(call.device)
    thresholds = call.thresholds(alpha, per_row=True)
    call.launch(
        kernel, call.grid, call.members, call.normalisers, thresholds, alpha, temperature, seed, partial, partial_ids,
        call.width, call.row_bucket, call.shared, call.held, splits, **call.constants,
    )  # fmt: skip
    used = call.used_splits()
    tokens, logprobs = call.empty(call.rows, dtype=torch.int64), call.empty(call.rows)
    call.launch(
        kernels.sample_merge_kernel, (call.rows,), partial, partial_ids, tokens, logprobs, splits, used,
        SPLITS=triton.next_power_of_2(used),
    )  # fmt: skip
    return tokens, logprobs


def combine_logprob(
    logits: Sequence[Tensor], how: Combination, alphas: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probs (K, rows) fp32 of `targets`, and whether each is the most likely token; members are read once."""
    call = _Call(logits, how)
    kernel = kernels.logprob_kernel
    splits = call.most_splits(kernel)
    alphas, targets = alphas.contiguous(), targets.contiguous()
    num_alphas = alphas.shape[0]
    partial = call.empty(num_alphas, call.rows, 2, splits)
    partial_ids = call.empty(num_alphas, call.rows, splits, dtype=torch.int32)
    at_target = call.empty(num_alphas, call.rows)
    thresholds = call.thresholds(alphas, per_row=False)
    call.launch(
        kernel, call.grid, call.members, call.normalisers, thresholds, alphas, targets, partial, partial_ids, at_target,
        call.width, call.row_bucket, call.shared, call.held, num_alphas, splits, **call.constants,
    )  # fmt: skip
    used = call.used_splits()
    logprobs, greedy = call.empty(num_alphas, call.rows), call.empty(num_alphas, call.rows, dtype=torch.bool)
    call.launch(
        kernels.logprob_merge_kernel, (call.rows, num_alphas), partial, partial_ids, at_target, targets,
        logprobs, greedy, splits, used, SPLITS=triton.next_power_of_2(used),
    )  # fmt: skip
    return logprobs, greedy


class _Call:
    """What all kernels of one call are told about the members: (rows, V_i) or (rows, positions, V_i) each."""

    def __init__(self, logits: Sequence[Tensor], how: Combination) -> None:
        anchor = logits[0]
        self.device = anchor.device
        self.width = anchor.shape[-1]
        self.positions = anchor.shape[1] if anchor.dim() == 3 else 1
        self.rows = anchor.shape[0] * self.positions  # of the grid: every position is one
        self.row_bucket = row_bucket(self.rows)
        self._block = self.width
        self.shared, self.held = how.shared_width(logits), how.held_width(logits)
        self._cutoff = how.cutoff
        readable = [z if z.stride(-1) == 1 or z.shape[-1] == 1 else z.contiguous() for z in logits]
        self.members = tuple(
            (z, *_strides(z), constant, slope)
            for z, constant, slope in zip(readable, how.constant, how.slope, strict=True)
        )
        slopes = how.normalised_slope if how.normalises(logits) else (0.0,) * len(logits)
        self.normalisers = self._normalise(slopes) if any(slopes) else anchor
        self._sums: dict[str, Any] = {
            "IN_BASE": _bits(how.constant),
            "IN_RATIO": _bits(how.slope),
            "NORMALISED": any(slopes),
        }

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of the three kernels that the autotuner launches."""
        return {**self._sums, "CUT": self._cutoff is not None, "NUM_MEMBERS": len(self.members)}

    def grid(self, meta: dict[str, Any]) -> tuple[int, int]:
        """The grid for the block of a configuration; the last one asked for is the one that is launched."""
        self._block = meta["BLOCK"]
        return self.rows, triton.cdiv(self.width, self._block)

    def launch(self, kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        """Queue a kernel on the current stream of the members' device, which may not be the current device."""
        if not self.rows:
            return
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            # no fused multiply-add: one rounding per operation, as in the reference; the kernels wait for memory anyway
            kernel[grid](*arguments, **constants, enable_fp_fusion=False)

    def most_splits(self, kernel: Any) -> int:
        """Blocks per row under the smallest block that the autotuner may choose: room for partial results."""
        smallest: int = min(config.kwargs["BLOCK"] for config in kernel.configs)
        return -(-self.width // smallest)

    def used_splits(self) -> int:
        """Blocks per row of this call's own launch: the autotuner's last choice may be another thread's."""
        return -(-self.width // self._block)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def thresholds(self, alphas: Tensor, *, per_row: bool) -> Tensor:
        """(num_alphas, rows): the anchor logit below which a token is forbidden; unread without a cutoff."""
        if self._cutoff is None:
            return alphas
        splits, num_alphas = triton.cdiv(self.width, PREPASS_BLOCK), 1 if per_row else alphas.shape[0]
        partial = self.empty(num_alphas, self.rows, splits)
        self.launch(
            kernels.anchor_max_kernel, (self.rows, splits), self.members, self.normalisers,
            alphas, int(not per_row), int(per_row), partial,
            self.positions, self.shared, self.held, num_alphas, splits, **self._sums, BLOCK=PREPASS_BLOCK,
        )  # fmt: skip
        largest = partial.amax(-1)
        return largest.masked_fill(largest == math.inf, math.nan) + math.log(self._cutoff)

    def _normalise(self, slopes: Sequence[float]) -> Tensor:
        """(rows,): Σ slope · log Σ exp of the shared logits."""
        splits = triton.cdiv(self.shared, PREPASS_BLOCK)
        partial = self.empty(self.rows, len(slopes), splits)
        self.launch(
            kernels.normaliser_kernel, (self.rows, splits), self.members, partial, self.positions, self.shared, splits,
            IN_NORMALISER=_bits(slopes), NUM_MEMBERS=len(slopes), BLOCK=PREPASS_BLOCK,
        )  # fmt: skip
        total = self.empty(self.rows).zero_()
        for slope, log_sum in zip(slopes, partial.logsumexp(-1).unbind(-1), strict=True):
            if slope:  # one with none is not looked at: its log-sum may be infinite
                total += slope * log_sum
        return total


def _strides(z: Tensor) -> tuple[int, int]:
    """Row and position stride in elements; 0 where there is one row, because 0 keeps every load aligned."""
    row = z.stride(0) if z.shape[0] > 1 else 0
    return row, z.stride(1) if z.dim() == 3 and z.shape[1] > 1 else 0


def _bits(weights: Sequence[float]) -> int:
    """Bit i is set where weight i is not 0."""
    return sum(1 << i for i, weight in enumerate(weights) if weight)
