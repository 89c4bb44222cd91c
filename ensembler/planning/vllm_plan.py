"""Plan a server of vLLM: all members on the same GPUs, each split into as many shards as there are GPUs.

Members of one backbone have one copy of its weights, with their adapters beside it, and a KV cache each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ensembler.errors import PlacementError
from ensembler.planning.sizes import GroupSizes, show_size

UTILISATION = 0.9
"""Fraction of each GPU that vLLM is told to use."""

ACTIVATIONS = 2 * 10**9
"""Bytes of a GPU for activations and graphs: a rule of thumb, which vLLM replaces by a measurement when it starts."""


@dataclass(frozen=True)
class ServingPlan:
    """Servers of `num_gpus` GPUs each, `num_servers` of them, for texts of `context` tokens.

    `weight_bytes`: of all backbones, each once, and of the adapters beside them. `cache_per_token`: bytes of a token in
    all members, each of which has a cache of its own. `num_tokens`: how many tokens one server has room for, texts that
    run at the same time together.
    """

    num_gpus: int
    num_servers: int
    context: int
    weight_bytes: int
    cache_per_token: int
    num_tokens: int

    @property
    def num_requests(self) -> int:
        """Texts of full length that one server holds at the same time."""
        return self.num_tokens // self.context

    def flags(self) -> list[str]:
        """Return vLLM's flags for this plan, to stand behind `ensembler serve FOLDER --`."""
        tensor = ["--tensor-parallel-size", str(self.num_gpus)] if self.num_gpus > 1 else []
        data = ["--data-parallel-size", str(self.num_servers)] if self.num_servers > 1 else []
        lengths = ["--max-model-len", str(self.context), "--gpu-memory-utilization", f"{UTILISATION:g}"]
        return [*lengths, *tensor, *data]

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping for JSON."""
        return {**vars(self), "num_requests": self.num_requests, "flags": self.flags()}


def propose_serving(
    groups: Sequence[GroupSizes],
    heads: Mapping[str, tuple[int, int]],
    budgets: Sequence[int],
    *,
    context: int,
    batch_size: int = 1,
) -> ServingPlan:
    """Return the smallest server that holds the weights and `batch_size` texts of `context` tokens.

    `heads`: as `num_heads`, by role; `budgets`: bytes of each GPU. A server takes 1, 2, 4 ... of the GPUs, as many as
    divide the heads of every member, and all are taken for as large as the smallest. Raises PlacementError.
    """
    if not budgets:
        raise PlacementError("there is no GPU; give --budget once for each GPU of another machine")
    weights = sum(group.weight_bytes() for group in groups)
    whole = sum(group.model.cache_per_token * len(group.roles) for group in groups)
    usable = min(budgets) * UTILISATION
    powers = [2**power for power in range(len(budgets).bit_length())]
    for num_gpus in (num for num in powers if all(can_split(each, num) for each in heads.values())):
        per_token = sum(
            group.model.cache_per_token / min(num_gpus, heads[role][1]) for group in groups for role in group.roles
        )
        room = usable - ACTIVATIONS - weights / num_gpus
        cache = per_token * context * batch_size
        num_tokens = int(room / max(per_token, 1))
        if room >= cache:
            return ServingPlan(num_gpus, len(budgets) // num_gpus, context, weights, whole, num_tokens)
    each = "the GPU" if num_gpus == 1 else f"each of {num_gpus} GPUs"
    texts = "a text" if batch_size == 1 else f"{batch_size:,} texts"
    longest = int(room / max(per_token, 1) / batch_size)
    shorter = f"; --context {longest} fits" if longest > 0 else ""
    unused = len(budgets) // (2 * num_gpus)
    more = "; the members' attention heads cannot be shared by more of the GPUs" if unused else ""
    raise PlacementError(
        f"these members do not fit: {each} would hold {show_size(weights / num_gpus)} of weights (a copy for each "
        f"backbone), {show_size(cache)} of KV cache ({texts} of {context:,} tokens, a cache for each member) and "
        f"{show_size(ACTIVATIONS)} of activations, and vLLM may use {show_size(usable)} of it ({UTILISATION:.0%})"
        f"{shorter}{more}"
    )


def can_split(heads: tuple[int, int], num_gpus: int) -> bool:
    """Return whether a model of so many attention and key-value heads can be split over so many GPUs.

    Key-value heads are split as long as there is one for each GPU; beyond that, each is kept several times.
    """
    attention, key_value = heads
    return attention % num_gpus == 0 and (key_value % num_gpus == 0 or num_gpus % key_value == 0)


def num_heads(config: Any) -> tuple[int, int]:
    """Return the numbers of attention heads and key-value heads of a model's configuration."""
    text = config.get_text_config(decoder=True)
    attention = int(text.num_attention_heads)
    return attention, int(getattr(text, "num_key_value_heads", None) or attention)
