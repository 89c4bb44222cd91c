"""The operations by the CUDA library, one launch each, queued on torch's current stream. It knows nothing of rules.

Every logit is read once, but for what needs a number of the whole row first: `neutral` and log Z read the members once
more for their normalisers, a cut-off reads all members once more for the largest first sum. Nothing waits for the
device, and all launches can be captured in a CUDA graph. On the CPU the host harness runs the same kernel bodies, for
tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ensembler_kernels.cuda import library
from ensembler_kernels.results import Sampled, Scored
from ensembler_kernels.scratch import Scratch
from ensembler_kernels.weights import Weights

_scratch = Scratch()


def unavailable(device: torch.device) -> str | None:
    """Return why the kernels cannot run on `device`, or None if they can."""
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


def combine(logits: Sequence[Tensor], weights: Weights, rows: Tensor | None) -> Tensor:
    """Return the combined logits, fp32, contiguous, (outputs, V); see `reference.combine`."""
    call = _Call(logits, weights, rows)
    problem = call.problem
    out = call.empty(problem.outputs, problem.width)
    problem.out = out.data_ptr()
    call.launch("combine")
    return out


def combine_sample(
    logits: Sequence[Tensor],
    weights: Weights,
    rows: Tensor | None,
    temperature: Tensor | None,
    noise: Tensor | None,
) -> Sampled:
    """Return tokens and log-probs; z is never written; see `reference.combine_sample`."""
    call = _Call(logits, weights, rows)
    problem = call.problem
    tokens, logprobs = call.empty(problem.outputs, dtype=torch.int64), call.empty(problem.outputs)
    if temperature is not None and noise is not None:
        problem.temperature, problem.noise = temperature.data_ptr(), noise.data_ptr()
        problem.temperature_stride = 0 if temperature.shape[0] == 1 else 1
    count = call.library.best_floats * problem.outputs * problem.splits
    partials, counters = _scratch.take(call.device, count, problem.outputs)
    problem.partials, problem.counters = partials.data_ptr(), counters.data_ptr()
    problem.tokens, problem.logprobs = tokens.data_ptr(), logprobs.data_ptr()
    call.launch("sample")
    return Sampled(tokens, logprobs)


def combine_logprob(
    logits: Sequence[Tensor], weights: Weights, targets: Tensor, rows: Tensor | None, log_z: bool
) -> Scored:
    """Return log-probs (K, n), and whether each target is the most likely token; see `reference.combine_logprob`."""
    call = _Call(logits, weights, rows, per_point=True)
    problem, points = call.problem, len(weights)
    shape = points, problem.outputs
    logprobs, greedy = call.empty(*shape), call.empty(*shape, dtype=torch.bool)
    totals = call.empty(*shape) if log_z else None
    problem.logprobs, problem.greedy = logprobs.data_ptr(), greedy.data_ptr()
    problem.totals = None if totals is None else totals.data_ptr()
    problem.targets = targets.data_ptr()
    for start in range(0, len(weights.runs), library.MAX_RUNS):
        runs = weights.runs[start : start + library.MAX_RUNS]
        for i, run in enumerate(runs):
            problem.runs[i] = library.Run(run.first, run.count, int(run.step != 0))
        problem.layers = len(runs)
        pairs = len(runs) * problem.outputs
        splits = problem.splits = call.library.num_splits(pairs, problem.width)
        sums = 2 * points * problem.outputs * splits
        partials, counters = _scratch.take(call.device, sums + pairs * splits, pairs)
        problem.partials, problem.beaten = partials.data_ptr(), partials[sums:].data_ptr()  # beaten: 32-bit masks
        problem.counters = counters.data_ptr()
        call.launch("logprob")
    if totals is not None:
        totals -= weights.log_normalisers(call.log_sums(call.widths), rows, call.widths)
    return Scored(logprobs, greedy, totals)


class _Call:
    """The arguments of the kernels of one call, and the tensors that they point to.

    `per_point`: every row of the table counts for every output.
    """

    def __init__(
        self, logits: Sequence[Tensor], weights: Weights, rows: Tensor | None, *, per_point: bool = False
    ) -> None:
        if len(logits) > library.MAX_MEMBERS:
            raise ValueError(f"the CUDA kernels take at most {library.MAX_MEMBERS} members, got {len(logits)}")
        anchor = logits[0]
        self.device = anchor.device
        self.library = library.load(library.path_for(self.device))
        self._logits = [z if z.stride(-1) == 1 or z.shape[-1] == 1 else z.contiguous() for z in logits]
        self._weights, self._rows = weights, rows
        self.widths = [z.shape[-1] for z in logits]
        positions = anchor.shape[1] if anchor.dim() == 3 else 1
        num_rows, columns = anchor.shape[0] * positions, weights.table.shape[1]
        self.problem = library.Problem(
            num_members=len(logits),
            dtype=library.dtype_code({z.dtype for z in logits}),
            outputs=num_rows if rows is None else rows.shape[0],
            layers=1,
            num_rows=num_rows,
            positions=positions,
            width=weights.width(self.widths),
            shared=weights.shared_width(self.widths),
            held=weights.held_width(self.widths),
            raw=sum(1 << i for i, is_raw in enumerate(weights.raw) if is_raw),
            table_stride=0 if per_point or weights.table.shape[0] == 1 else columns,
            point_stride=columns if per_point else 0,
            table=weights.table.data_ptr(),
            rows=None if rows is None else rows.data_ptr(),
        )
        for i, (z, limit) in enumerate(zip(self._logits, weights.limits(self.widths), strict=True)):
            position_stride = z.stride(1) if z.dim() == 3 else 0
            self.problem.members[i] = library.Member(
                z.data_ptr(), z.stride(0), position_stride, limit, library.dtype_code({z.dtype})
            )
        if weights.normalises(self.widths):
            self._normalisers = self.log_sums([self.problem.shared] * len(logits))
            self.problem.log_sums = self._normalisers.data_ptr()
        self.problem.splits = self.library.num_splits(self.problem.outputs, self.problem.width)
        if weights.cuts:
            self._thresholds = self._find_thresholds(len(weights) if per_point else 1)
            self.problem.thresholds = self._thresholds.data_ptr()

    def launch(self, name: str) -> None:
        self.library.launch(name, self.problem, self.device)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def log_sums(self, limits: Sequence[int]) -> Tensor:
        """Return log Σ exp of the first `limits` ids of every member, (rows, members)."""
        problem = library.Problem.from_buffer_copy(self.problem)
        problem.outputs, problem.width = problem.num_rows, max(limits)
        problem.rows = problem.table = problem.log_sums = problem.thresholds = None
        problem.layers, problem.splits = 1, self.library.num_splits(problem.outputs, problem.width)
        for i, limit in enumerate(limits):
            problem.members[i].limit = limit
        partial = self.empty(problem.outputs, len(limits), problem.splits)
        problem.out = partial.data_ptr()
        self.library.launch("normaliser", problem, self.device)
        return partial.logsumexp(-1)

    def _find_thresholds(self, layers: int) -> Tensor:
        """Return the first sum below which a token is forbidden, (layers, outputs)."""
        problem = library.Problem.from_buffer_copy(self.problem)
        problem.layers = layers
        partial = self.empty(layers, problem.outputs, problem.splits)
        problem.out = partial.data_ptr()
        self.library.launch("threshold", problem, self.device)
        largest = partial.amax(-1)
        cutoffs = self._weights.table[:, -1]
        return largest.masked_fill_(largest == math.inf, math.nan).add_(
            cutoffs.unsqueeze(1) if problem.point_stride else cutoffs
        )
