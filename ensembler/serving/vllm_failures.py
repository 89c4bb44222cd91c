"""End requests for which a member computed NaN, and no others. Such rows permit one id: the member's own.

Ids of members stand behind the vocabulary, in the order of the weights (`ServedRules.failures`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import torch
from ensembler_kernels import Weights
from torch import Tensor
from vllm.exceptions import VLLMServerError
from vllm.forward_context import get_forward_context

from ensembler.errors import LogitsError
from ensembler.serving.request_points import ServedRules

Generate = Callable[..., AsyncGenerator[Any, None]]


def used_members(weights: Weights) -> Tensor:
    """Return which members have a number in each row's rule, (outputs, members) bool."""
    num = weights.num_members
    return (weights.table[:, :num] != 0) | (weights.table[:, num : 2 * num] != 0)


def end_failed(combined: Tensor, is_nan: Tensor) -> Tensor:
    """Return logits (n, V + members) from combined ones (n, V): the members' ids are forbidden, where none failed.

    Where `is_nan` (n, members), the id of the first such member is the only one that is permitted.
    """
    has_failed = is_nan.any(1, keepdim=True)
    first = torch.zeros_like(is_nan).scatter_(1, is_nan.int().argmax(1, keepdim=True), value=True) & is_nan
    ids = torch.zeros_like(is_nan, dtype=combined.dtype).masked_fill(~first, -torch.inf)
    return torch.cat([combined.masked_fill(has_failed, -torch.inf), ids], 1)


def end_with_error(generate: Generate, rules: ServedRules) -> Generate:
    """Return a `generate` of vLLM's engine that raises VLLMServerError where a member computed NaN.

    Such a text ends with the member's id behind the vocabulary; the server answers 500 with the error's sentence, or
    ends a stream with it.
    """

    async def checked(prompt: Any, sampling_params: Any, *given: Any, **more: Any) -> AsyncGenerator[Any, None]:
        params = sampling_params.clone()  # a caller may use its own for several texts
        params.stop_token_ids = [*(params.stop_token_ids or ()), *rules.failures]
        async with aclosing(generate(prompt, params, *given, **more)) as outputs:  # which aborts what is left
            async for output in outputs:
                try:
                    rules.check_stops([one.stop_reason for one in output.outputs])
                except LogitsError as error:
                    raise VLLMServerError(str(error)) from error
                yield output

    return checked


def clear_begun_blocks() -> None:
    """Zero the blocks of the cache that this step's tokens begin, on a CPU.

    vLLM's attention for CPUs multiplies what stands behind a text by 0, and 0 · NaN of a request that failed before
    would be NaN for the one that has its block now.
    """
    context = get_forward_context()
    metadata = context.attn_metadata
    begun: dict[tuple[int, int], Tensor] = {}  # layers of a kind share their slots
    for name, of_layer in (metadata if isinstance(metadata, dict) else {}).items():
        cache = context.no_compile_layers[name].kv_cache  # (blocks, heads, tokens of a block, 2 · head size)
        size = cache.shape[2]
        key = (id(of_layer), size)
        if key not in begun:
            slots = of_layer.slot_mapping[: of_layer.num_actual_tokens]
            begun[key] = slots[(slots >= 0) & (slots % size == 0)] // size
        if len(begun[key]):
            cache[begun[key]] = 0
