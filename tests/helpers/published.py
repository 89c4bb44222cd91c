"""Configurations as they are published in the config.json of models, to count by hand."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

_LLAMA_2 = {"vocab_size": 32000, "max_position_embeddings": 4096}
_QWEN = {"vocab_size": 152064, "max_position_embeddings": 131072, "use_sliding_window": False}
_PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    # family, then hidden size, layers, heads, key-value heads, MLP width
    "Llama-2-7B": ("llama", {**_LLAMA_2, "sizes": (4096, 32, 32, 32, 11008)}),
    "Llama-2-13B": ("llama", {**_LLAMA_2, "sizes": (5120, 40, 40, 40, 13824)}),
    "CodeLlama-34B": ("llama", {**_LLAMA_2, "max_position_embeddings": 16384, "sizes": (8192, 48, 64, 8, 22016)}),
    "Llama-3.1-8B": (
        "llama",
        {"vocab_size": 128256, "max_position_embeddings": 131072, "sizes": (4096, 32, 32, 8, 14336)},
    ),
    "Qwen2.5-7B": ("qwen2", {**_QWEN, "sizes": (3584, 28, 28, 4, 18944)}),
    "Qwen2.5-32B": ("qwen2", {**_QWEN, "sizes": (5120, 64, 40, 8, 27648)}),
}


def published(name: str, **changes: Any) -> Any:
    """Return the config of a model by name, in bfloat16, its embedding and head apart."""
    family, settings = _PUBLISHED[name]
    hidden, layers, heads, kv_heads, width = settings["sizes"]
    return AutoConfig.for_model(
        family,
        **{key: value for key, value in settings.items() if key != "sizes"},
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=width,
        tie_word_embeddings=False,
        dtype="bfloat16",
        **changes,
    )
