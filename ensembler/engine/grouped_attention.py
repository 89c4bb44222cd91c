"""Attention of a few new tokens whose heads share keys and values: none of these is copied out for each head.

`transformers` copies them where several tokens have a mask, so that a step reads the cache once per head. Here the
heads of a group stand behind one another as if they were tokens, and see the same keys. It is registered as an
attention of `transformers`, and models have it for the time of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "ensembler_grouped"


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Return attention (rows, n, heads, width) of queries (rows, heads, n, width) to keys (rows, groups, slots, w)."""
    rows, heads, num, width = query.shape
    groups = key.shape[1]
    # What shapes the scores otherwise, or is no mask for all heads, is left to transformers.
    others = {name for name, given in options.items() if given is not None} - {"dropout", "scaling", "sliding_window"}
    is_plain = attention_mask is not None and attention_mask.shape[1] == 1 and not options.get("dropout")
    if heads == groups or not is_plain or others & {"position_bias", "softcap", "s_aux", "head_mask"}:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found
    assert attention_mask is not None
    of_group = heads // groups
    packed = query.reshape(rows, groups, of_group * num, width)
    mask = attention_mask[:, :, None].expand(-1, -1, of_group, -1, -1).flatten(2, 3)
    attended = torch.nn.functional.scaled_dot_product_attention(
        packed, key, value, attn_mask=mask, scale=options.get("scaling")
    )
    return attended.reshape(rows, heads, num, value.shape[-1]).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, grouped_attention)


@contextmanager
def grouped(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` run with grouped attention inside, where it takes any attention and has sdpa."""
    config: Any = model.config.get_text_config(decoder=True)
    if config._attn_implementation != "sdpa" or not getattr(model, "_supports_attention_backend", False):
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
