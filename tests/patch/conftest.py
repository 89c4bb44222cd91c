"""A tiny model that every scheme can quantise, and a LoRA of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.patch_cases import save_lora, save_model
from helpers.quantized_models import SIZE


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Llama-like model of two layers, whose sizes are multiples of the largest blocks."""
    return save_model(tmp_path_factory.mktemp("models") / "plain", **SIZE)


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LoRA of some of its layers, and of the head, which no scheme quantises."""
    folder = tmp_path_factory.mktemp("patches") / "lora"
    return save_lora(folder, size=SIZE, target_modules=["q_proj", "v_proj", "down_proj", "lm_head"])
