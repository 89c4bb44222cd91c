"""The operations as torch.library custom ops: what torch.compile traces, and what autograd goes through.

An eager call without gradients goes straight to the implementation; an op costs tens of microseconds more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ensembler_kernels import implementations, reference
from ensembler_kernels.results import Sampled, Scored
from ensembler_kernels.weights import Run, Weights


def combine(logits: Sequence[Tensor], weights: Weights, rows: Tensor | None, impl: str | None) -> Tensor:
    """`reference.combine` on checked arguments; of the anchor's leading shape where every row is an output."""
    if _is_traced(logits, weights):
        z: Tensor = _combine(list(logits), weights.table, rows, *_flat(weights), impl)
    else:
        z = implementations.chosen(impl, logits[0].device).combine(logits, weights, rows)
    return z if rows is not None or logits[0].dim() == 2 else z.view(*logits[0].shape[:-1], z.shape[-1])


def combine_sample(
    logits: Sequence[Tensor],
    weights: Weights,
    rows: Tensor | None,
    temperature: Tensor | None,
    noise: Tensor | None,
    impl: str | None,
) -> Sampled:
    """`reference.combine_sample` on checked arguments."""
    if _is_traced(logits, weights):  # a draw has no gradient
        logits, weights = [z.detach() for z in logits], replace(weights, table=weights.table.detach())
    if torch.compiler.is_compiling():
        return Sampled(*_sample(logits, weights.table, rows, temperature, noise, *_flat(weights), impl))
    sampled: Sampled = implementations.chosen(impl, logits[0].device).combine_sample(
        logits, weights, rows, temperature, noise
    )
    return sampled


def combine_logprob(
    logits: Sequence[Tensor], weights: Weights, targets: Tensor, rows: Tensor | None, log_z: bool, impl: str | None
) -> Scored:
    """`reference.combine_logprob` on checked arguments."""
    if not _is_traced(logits, weights):
        module = implementations.chosen(impl, logits[0].device)
        scored: Scored = module.combine_logprob(logits, weights, targets, rows, log_z)
        return scored
    logprobs, greedy, totals = _logprob(list(logits), weights.table, rows, targets, log_z, *_flat(weights), impl)
    return Scored(logprobs, greedy, totals if log_z else None)


def _is_traced(logits: Sequence[Tensor], weights: Weights) -> bool:
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and (weights.table.requires_grad or any(z.requires_grad for z in logits))


def _flat(weights: Weights) -> tuple[Any, ...]:
    """The fields of `weights` but for the table, as an op's schema takes them; `_weights` is the inverse."""
    runs = [float(number) for run in weights.runs for number in (run.first, run.count, run.step)]
    return (weights.shared, weights.neutral, list(weights.raw), list(weights.anchors), weights.cuts, runs)


def _weights(
    table: Tensor,
    shared: int | None,
    neutral: bool,
    raw: Sequence[bool],
    anchors: Sequence[int],
    cuts: bool,
    runs: Sequence[float],
) -> Weights:
    triples = zip(runs[::3], runs[1::3], runs[2::3], strict=True)
    kept = tuple(Run(int(first), int(count), step) for first, count, step in triples)
    return Weights(table, len(raw), shared, neutral, tuple(raw), tuple(anchors), cuts, kept)


@torch.library.custom_op("ensembler::combine", mutates_args=())
def _combine(
    logits: Sequence[Tensor],
    table: Tensor,
    rows: Tensor | None,
    shared: int | None,
    neutral: bool,
    raw: Sequence[bool],
    anchors: Sequence[int],
    cuts: bool,
    runs: Sequence[float],
    impl: str | None,
) -> Tensor:
    weights = _weights(table, shared, neutral, raw, anchors, cuts, runs)
    z: Tensor = implementations.chosen(impl, table.device).combine(logits, weights, rows)
    return z


@torch.library.custom_op("ensembler::combine_sample", mutates_args=())
def _sample(
    logits: Sequence[Tensor],
    table: Tensor,
    rows: Tensor | None,
    temperature: Tensor | None,
    noise: Tensor | None,
    shared: int | None,
    neutral: bool,
    raw: Sequence[bool],
    anchors: Sequence[int],
    cuts: bool,
    runs: Sequence[float],
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    weights = _weights(table, shared, neutral, raw, anchors, cuts, runs)
    tokens, logprobs = implementations.chosen(impl, table.device).combine_sample(
        logits, weights, rows, temperature, noise
    )
    return tokens, logprobs


@torch.library.custom_op("ensembler::combine_logprob", mutates_args=())
def _logprob(
    logits: Sequence[Tensor],
    table: Tensor,
    rows: Tensor | None,
    targets: Tensor,
    log_z: bool,
    shared: int | None,
    neutral: bool,
    raw: Sequence[bool],
    anchors: Sequence[int],
    cuts: bool,
    runs: Sequence[float],
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = _weights(table, shared, neutral, raw, anchors, cuts, runs)
    module = implementations.chosen(impl, table.device)
    logprobs, greedy, totals = module.combine_logprob(logits, weights, targets, rows, log_z)
    return logprobs, greedy, torch.empty_like(logprobs[:0]) if totals is None else totals


def _num_outputs(logits: Sequence[Tensor], rows: Tensor | None) -> int:
    return logits[0].numel() // logits[0].shape[-1] if rows is None else rows.shape[0]


@_combine.register_fake
def _(logits: Sequence[Tensor], table: Tensor, rows: Tensor | None, *numbers: Any) -> Tensor:
    width = _weights(table, *numbers[:-1]).width([z.shape[-1] for z in logits])
    return table.new_empty((_num_outputs(logits, rows), width))


@_sample.register_fake
def _(logits: Sequence[Tensor], table: Tensor, rows: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    outputs = _num_outputs(logits, rows)
    return table.new_empty(outputs, dtype=torch.int64), table.new_empty(outputs)


@_logprob.register_fake
def _(
    logits: Sequence[Tensor], table: Tensor, rows: Tensor | None, targets: Tensor, log_z: bool, *numbers: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (table.shape[0], targets.shape[0])
    totals = table.new_empty(shape if log_z else (0, targets.shape[0]))
    return table.new_empty(shape), table.new_empty(shape, dtype=torch.bool), totals


# -- gradients: the reference is run again and differentiated, so that forward keeps nothing but its inputs ------------


def _keep_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, table, rows, *numbers, _ = inputs
    ctx.save_for_backward(table, *logits)
    ctx.rows, ctx.numbers = rows, numbers


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    def combined(table: Tensor, *z: Tensor) -> list[Tensor]:
        return [reference.combine(z, _weights(table, *ctx.numbers), ctx.rows)]

    by_table, by_logits = _differentiated(combined, ctx.saved_tensors, [grad])
    return by_logits, by_table, *[None] * 8


def _keep_logprob(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, table, rows, targets, log_z, *numbers, _ = inputs
    ctx.save_for_backward(table, *logits)
    ctx.rows, ctx.targets, ctx.log_z, ctx.numbers = rows, targets, log_z, numbers
    ctx.mark_non_differentiable(output[1])


def _logprob_backward(ctx: Any, grad: Tensor, _: Tensor | None, by_total: Tensor) -> tuple[Any, ...]:
    def scored(table: Tensor, *z: Tensor) -> list[Tensor]:
        found = reference.combine_logprob(z, _weights(table, *ctx.numbers), ctx.targets, ctx.rows, ctx.log_z)
        return [found.logprobs] if found.log_z is None else [found.logprobs, found.log_z]

    by_table, by_logits = _differentiated(scored, ctx.saved_tensors, [grad, by_total] if ctx.log_z else [grad])
    return by_logits, by_table, *[None] * 10


def _differentiated(function: Any, saved: Sequence[Tensor], grads: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Gradients of function(table, *logits) for the table and for the logits."""
    inputs = [t.detach().requires_grad_() for t in saved]
    with torch.enable_grad():
        results = function(*inputs)
        by_table, *by_logits = torch.autograd.grad(results, inputs, grads, allow_unused=True, materialize_grads=True)
    return by_table, by_logits


_combine.register_autograd(_combine_backward, setup_context=_keep_combine)
_logprob.register_autograd(_logprob_backward, setup_context=_keep_logprob)
