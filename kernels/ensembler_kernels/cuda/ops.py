"""The three operations by the CUDA library, queued on torch's current stream. It knows nothing of rules or models.

Every logit is read once, but for what needs a number of the whole row first: `neutral` reads the members of the ratio
once more for their normalisers, `cutoff` all members once more for the anchor's largest logit; and a grid of more than
32 α is read once per 32. On the CPU the host harness runs the same kernel bodies, for tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ensembler_kernels.combination import Combination
from ensembler_kernels.cuda import library


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`, or None if they can."""
    if device.type not in ("cuda", "cpu"):
        return f"CUDA kernels run on an NVIDIA GPU, got device {device}"
    path = library.path_for(device)
    harness = " --harness" if device.type == "cpu" else ""
    if not path.exists():
        return f"not built for {device.type}: run python {path.parent.parent / 'build.py'}{harness}"
    try:
        library.load(path)
    except OSError as error:
        return str(error)
    return None


def combine(logits: Sequence[Tensor], how: Combination, alpha: Tensor) -> Tensor:
    """The combined logits, fp32, contiguous, of the anchor's shape; see `reference.combine`."""
    call = _Call(logits, how, alpha, per_row=True)
    out = torch.empty(logits[0].shape, dtype=torch.float32, device=call.device)
    call.run("ens_combine", out)
    return out


def combine_sample(
    logits: Sequence[Tensor], how: Combination, alpha: Tensor, temperature: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens (rows,) int64, −1 where everything is forbidden, and log-probs (rows,) fp32; the row is never written."""
    call = _Call(logits, how, alpha, per_row=True)
    tokens, logprobs = call.empty(call.rows, dtype=torch.int64), call.empty(call.rows)
    call.run("ens_sample", temperature.contiguous(), seed.to(call.device), call.partials(), tokens, logprobs)
    return tokens, logprobs


def combine_logprob(
    logits: Sequence[Tensor], how: Combination, alphas: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probs (K, rows) fp32 of `targets`, and whether each is the most likely token."""
    grids = [alphas[k : k + library.MAX_ALPHAS] for k in range(0, alphas.shape[0], library.MAX_ALPHAS)]
    parts = [_logprob_part(logits, how, grid, targets.contiguous()) for grid in grids]
    return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([greedy for _, greedy in parts])


def _logprob_part(logits: Sequence[Tensor], how: Combination, alphas: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`combine_logprob` of at most 32 α, from one read."""
    call = _Call(logits, how, alphas, per_row=False)
    shape = (alphas.shape[0], call.rows)
    at_target, logprobs, greedy = call.empty(*shape), call.empty(*shape), call.empty(*shape, dtype=torch.bool)
    call.run("ens_logprob", targets, call.partials(), at_target, logprobs, greedy)
    return logprobs, greedy


class _Call:
    """One problem: the members, (rows, V_i) or (rows, positions, V_i) each, and what the pre-passes found."""

    def __init__(self, logits: Sequence[Tensor], how: Combination, alphas: Tensor, *, per_row: bool) -> None:
        if len(logits) > library.MAX_MEMBERS:
            raise ValueError(f"expected at most {library.MAX_MEMBERS} members, got {len(logits)}")
        anchor = logits[0]
        self.device = anchor.device
        self._library = library.load(library.path_for(self.device))
        positions = anchor.shape[1] if anchor.dim() == 3 else 1
        self.rows = anchor.shape[0] * positions  # of the grid: every position is one
        self._splits = self._library.num_splits(anchor.shape[-1])
        normalised = how.normalised_slope if how.normalises(logits) else (0.0,) * len(logits)
        self._readable = [z if z.stride(-1) == 1 or z.shape[-1] == 1 else z.contiguous() for z in logits]
        self._alphas = alphas.contiguous()
        self._problem = library.Problem(
            num_members=len(logits),
            dtype=library.dtype_code({z.dtype for z in logits}),
            rows=self.rows,
            positions=positions,
            width=anchor.shape[-1],
            shared=how.shared_width(logits),
            held=how.held_width(logits),
            num_alphas=1 if per_row else alphas.shape[0],
            alpha_step=0 if per_row else 1,
            row_step=1 if per_row else 0,
            alphas=self._alphas.data_ptr(),
        )
        for i, z in enumerate(self._readable):
            self._problem.members[i] = _member(z, how.constant[i], how.slope[i], bool(normalised[i]))
        self._normalisers = self._normalise(normalised)
        self._thresholds = self._threshold(how.cutoff)

    def run(self, name: str, *tensors: Tensor) -> None:
        if self.rows:  # CUDA refuses an empty grid
            self._library.call(name, self._problem, *tensors)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def partials(self) -> Tensor:
        """Room for one partial result per (α, row, split)."""
        count = self._problem.num_alphas * self.rows * self._splits
        return self.empty(count * self._library.partial_size, dtype=torch.uint8)

    def _normalise(self, slopes: Sequence[float]) -> Tensor | None:
        """(rows,): Σ slope · log Σ exp of the shared logits, where members are normalised."""
        if not any(slopes):
            return None
        partial = self.empty(self.rows, library.MAX_MEMBERS, self._splits)
        self.run("ens_normalisers", partial)
        total = self.empty(self.rows).zero_()
        for slope, log_sum in zip(slopes, partial.logsumexp(-1).unbind(-1), strict=False):
            if slope:  # the others were not written
                total += slope * log_sum
        self._problem.normalisers = total.data_ptr()
        return total

    def _threshold(self, cutoff: float | None) -> Tensor | None:
        """(num_alphas, rows): the anchor logit below which a token is forbidden."""
        if cutoff is None:
            return None
        partial = self.empty(self._problem.num_alphas, self.rows, self._splits)
        self.run("ens_anchor_max", partial)
        largest = partial.amax(-1)
        thresholds = largest.masked_fill(largest == math.inf, math.nan) + math.log(cutoff)
        self._problem.thresholds = thresholds.data_ptr()
        return thresholds


def _member(z: Tensor, constant: float, slope: float, in_normaliser: bool) -> library.Member:
    return library.Member(
        data=z.data_ptr(),
        row_stride=z.stride(0),
        position_stride=z.stride(1) if z.dim() == 3 else 0,
        constant=constant,
        slope=slope,
        dtype=library.dtype_code({z.dtype}),
        in_normaliser=in_normaliser,
    )
