"""Sizes of published models, to plan a server for."""

from __future__ import annotations

from helpers.published import published

from ensembler.planning.member_sizes import measure_model
from ensembler.planning.sizes import GroupSizes

HEADS = {"source_ft": (32, 32), "source_pt": (32, 32), "target_pt": (40, 8)}


def trio() -> list[GroupSizes]:
    """Llama-2-7B with a LoRA on the same copy of its weights, and Qwen2.5-32B, in bfloat16."""
    small, large = (measure_model(published(name), "bfloat16") for name in ("Llama-2-7B", "Qwen2.5-32B"))
    return [
        GroupSizes(("source_ft", "source_pt"), "7B", small, adapters={"source_ft": 10**7}, is_anchor=True),
        GroupSizes(("target_pt",), "32B", large, adapters={}),
    ]
