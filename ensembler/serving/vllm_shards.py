"""Members of vLLM under tensor parallelism, whose logits are combined on each rank and gathered once.

A member's heads lie on the ranks in equal parts of its vocabulary, which vLLM pads. With one padding for all members,
each rank has the same ids of every member.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from ensembler_kernels import Weights
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_gather,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import DEFAULT_VOCAB_PADDING_SIZE, VocabParallelEmbedding
from vllm.platforms import current_platform

from ensembler.serving.vocab_shards import VocabShards, can_combine_shards


def common_padding(weights: Weights, widths: Mapping[str, int]) -> int | None:
    """Return the number of ids to which all members' heads are to be padded, for `padded_heads`.

    None where logits are gathered of each member: on one rank, with one member, and where rules need whole rows.
    """
    num_ranks: int = get_tensor_model_parallel_world_size()
    if num_ranks == 1 or len(widths) == 1 or not can_combine_shards(weights, tuple(widths.values())):
        return None
    multiple = math.lcm(DEFAULT_VOCAB_PADDING_SIZE, num_ranks)
    return math.ceil(max(widths.values()) / multiple) * multiple


@contextmanager
def padded_heads(width: int, to: int | None) -> Iterator[None]:
    """Pad heads and embeddings of `width` ids that are made in this block to `to` ids (None: as vLLM does)."""
    original = VocabParallelEmbedding.__init__
    signature = inspect.signature(original)

    @wraps(original)
    def init_padded(layer: Any, *arguments: Any, **options: Any) -> None:
        given = signature.bind(layer, *arguments, **options)
        if given.arguments["num_embeddings"] == width:
            given.arguments["padding_size"] = to
        original(*given.args, **given.kwargs)

    if to is None:
        yield
        return
    VocabParallelEmbedding.__init__ = init_padded
    try:
        yield
    finally:
        VocabParallelEmbedding.__init__ = original


def shard_members(members: Mapping[str, nn.Module], weights: Weights, widths: Mapping[str, int]) -> VocabShards | None:
    """Have members compute the logits of this rank's shard, (n, size), and return how to combine them.

    `members`: in the order of the weights, made in `padded_heads`. None, and nothing changed, where `common_padding` is
    None, or where a member's heads do not lie on the ranks in shards of that padding.
    """
    padded = common_padding(weights, widths)
    if padded is None:
        return None
    size = padded // get_tensor_model_parallel_world_size()
    if not all(_has_shards(member, widths[role], size) for role, member in members.items()):
        return None
    for processor in (one for member in members.values() for one in _processors(member)):
        processor.register_forward_pre_hook(_skip_gather, with_kwargs=True)
    return VocabShards(weights, tuple(widths[role] for role in members), size)


def combine_shards(shards: VocabShards, logits: Sequence[Tensor], table: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return combined logits (n, V) fp32, and which members have NaN among their logits, (n, members) bool.

    `logits`: this rank's (n, size) per member; `table` (n, 2 · members + 2) fp32: rows of the weights. Called on all
    ranks; None on those that gather no logits.
    """
    part = shards.combine(get_tensor_model_parallel_rank(), logits, table)
    gather = tensor_model_parallel_all_gather if current_platform.use_all_gather() else tensor_model_parallel_gather
    gathered: Tensor | None = gather(part, dim=0)
    return None if gathered is None else shards.join(gathered.view(-1, *part.shape))


def _skip_gather(processor: nn.Module, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return arguments, {**options, "skip_gather": True}


def _processors(member: nn.Module) -> list[Any]:
    return [module for module in member.modules() if isinstance(module, LogitsProcessor)]


def _has_shards(member: nn.Module, width: int, size: int) -> bool:
    """Return whether the member's logits are of `width` ids, in shards of `size` on this rank."""
    layers = [module for module in member.modules() if isinstance(module, VocabParallelEmbedding)]
    heads = [layer for layer in layers if layer.org_vocab_size == width]
    processors = _processors(member)
    return (
        bool(heads and processors)
        and all(head.num_embeddings == width and head.num_embeddings_per_partition == size for head in heads)
        and all(one.org_vocab_size == width and not one.logits_as_input for one in processors)
    )
