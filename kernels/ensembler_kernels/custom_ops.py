"""The operations as torch.library custom ops: what torch.compile traces, and what autograd goes through.

An eager call without gradients goes straight to the implementation; an op costs tens of microseconds more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ensembler_kernels import implementations, reference
from ensembler_kernels.checks import check_range, check_sampled, check_scored
from ensembler_kernels.combination import Combination

_Pair = Callable[..., tuple[Tensor, Tensor]]


def combine(logits: list[Tensor], how: Combination, alpha: Tensor, impl: str | None) -> Tensor:
    """`reference.combine` on checked arguments: `alpha` fp32 (rows,)."""
    if _is_traced(*logits, alpha):
        result: Tensor = _combine(logits, alpha, *_flat(how), impl)
    else:
        result = implementations.load(implementations.chosen(impl, alpha.device)).combine(logits, how, alpha)
    return result


def combine_sample(
    logits: list[Tensor], how: Combination, alpha: Tensor, temperature: Tensor, seed: Tensor, impl: str | None
) -> tuple[Tensor, Tensor]:
    """`reference.combine_sample` on checked arguments; raises ValueError for a row without a token."""
    call: _Pair = _combine_sample if torch.compiler.is_compiling() else _combine_sample_now
    return call([z.detach() for z in logits], alpha.detach(), temperature, seed, *_flat(how), impl)


def combine_logprob(
    logits: list[Tensor], how: Combination, alphas: Tensor, targets: Tensor, impl: str | None
) -> tuple[Tensor, Tensor]:
    """`reference.combine_logprob` on checked arguments; raises ValueError for a row without log-prob."""
    call: _Pair = _combine_logprob if _is_traced(*logits, alphas) else _combine_logprob_now
    return call(logits, alphas, targets, *_flat(how), impl)


def _is_traced(*tensors: Tensor) -> bool:
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def _flat(how: Combination) -> tuple[Any, ...]:
    """The fields of `how` as an op's schema takes them; `_how` is the inverse."""
    return (how.constant, how.slope, how.shared, how.neutral, how.raw, how.cutoff)


def _how(
    constant: Sequence[float],
    slope: Sequence[float],
    shared: int | None,
    neutral: bool,
    raw: Sequence[bool] | None,
    cutoff: float | None,
) -> Combination:
    return Combination(tuple(constant), tuple(slope), shared, neutral, None if raw is None else tuple(raw), cutoff)


@torch.library.custom_op("ensembler::combine", mutates_args=())
def _combine(
    logits: Sequence[Tensor],
    alpha: Tensor,
    constant: Sequence[float],
    slope: Sequence[float],
    shared: int | None,
    neutral: bool,
    raw: Sequence[bool] | None,
    cutoff: float | None,
    impl: str | None,
) -> Tensor:
    module = implementations.load(implementations.chosen(impl, alpha.device))
    result: Tensor = module.combine(logits, _how(constant, slope, shared, neutral, raw, cutoff), alpha)
    return result


@_combine.register_fake
def _(logits: Sequence[Tensor], alpha: Tensor, *numbers: Any) -> Tensor:
    return torch.empty(logits[0].shape, dtype=torch.float32, device=logits[0].device)


def _combine_sample_now(
    logits: Sequence[Tensor],
    alpha: Tensor,
    temperature: Tensor,
    seed: Tensor,
    constant: Sequence[float],
    slope: Sequence[float],
    shared: int | None,
    neutral: bool,
    raw: Sequence[bool] | None,
    cutoff: float | None,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    module = implementations.load(implementations.chosen(impl, alpha.device))
    how = _how(constant, slope, shared, neutral, raw, cutoff)
    tokens, logprobs = module.combine_sample(logits, how, alpha, temperature, seed)
    check_sampled(tokens, logprobs)
    return tokens, logprobs


_combine_sample = torch.library.custom_op("ensembler::combine_sample", _combine_sample_now, mutates_args=())


@_combine_sample.register_fake
def _(logits: Sequence[Tensor], alpha: Tensor, *numbers: Any) -> tuple[Tensor, Tensor]:
    rows, device = logits[0].shape[0], logits[0].device
    return torch.empty(rows, dtype=torch.int64, device=device), torch.empty(rows, dtype=torch.float32, device=device)


def _combine_logprob_now(
    logits: Sequence[Tensor],
    alphas: Tensor,
    targets: Tensor,
    constant: Sequence[float],
    slope: Sequence[float],
    shared: int | None,
    neutral: bool,
    raw: Sequence[bool] | None,
    cutoff: float | None,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    check_range(targets, logits[0].shape[-1])
    module = implementations.load(implementations.chosen(impl, alphas.device))
    how = _how(constant, slope, shared, neutral, raw, cutoff)
    logprobs, greedy = module.combine_logprob(logits, how, alphas, targets)
    check_scored(logprobs, alphas)
    return logprobs, greedy


_combine_logprob = torch.library.custom_op("ensembler::combine_logprob", _combine_logprob_now, mutates_args=())


@_combine_logprob.register_fake
def _(logits: Sequence[Tensor], alphas: Tensor, targets: Tensor, *numbers: Any) -> tuple[Tensor, Tensor]:
    shape, device = (alphas.shape[0], targets.shape[0]), logits[0].device
    return torch.empty(shape, dtype=torch.float32, device=device), torch.empty(shape, dtype=torch.bool, device=device)


# -- gradients: the reference is run again and differentiated, so that forward keeps nothing but its inputs ------------


def _keep_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, alpha, *numbers, _ = inputs
    ctx.save_for_backward(alpha, *logits)
    ctx.how = _how(*numbers)


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    alpha, *logits = ctx.saved_tensors
    return _differentiated(lambda alpha, *z: reference.combine(z, ctx.how, alpha), grad, alpha, logits)


def _keep_logprob(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, alphas, targets, *numbers, _ = inputs
    ctx.save_for_backward(targets, alphas, *logits)
    ctx.how = _how(*numbers)
    ctx.mark_non_differentiable(output[1])


def _logprob_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    targets, alphas, *logits = ctx.saved_tensors

    def scored(alphas: Tensor, *z: Tensor) -> Tensor:
        return reference.combine_logprob(z, ctx.how, alphas, targets)[0]

    by_logits, by_alphas, *rest = _differentiated(scored, grad, alphas, logits)
    return by_logits, by_alphas, None, *rest


def _differentiated(function: Any, grad: Tensor, alpha: Tensor, logits: list[Tensor]) -> tuple[Any, ...]:
    """Gradients of function(alpha, *logits), as an op returns them: for logits, for alpha, None for seven constants."""
    inputs = [t.detach().requires_grad_() for t in (alpha, *logits)]
    with torch.enable_grad():
        result = function(*inputs)
        by_alpha, *by_logits = torch.autograd.grad(result, inputs, grad, allow_unused=True, materialize_grads=True)
    return by_logits, by_alpha, *[None] * 7


_combine.register_autograd(_combine_backward, setup_context=_keep_combine)
_combine_logprob.register_autograd(_logprob_backward, setup_context=_keep_logprob)
