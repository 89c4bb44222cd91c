"""Pairs of ensembles for the tests of backbones, made once each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers.adapter_cases import LORAS, Pair, make_pair, save_adapter, save_base
from helpers.tiny import make_model
from transformers import PreTrainedModel


@pytest.fixture(scope="module")
def pair_target() -> PreTrainedModel:
    return make_model("qwen2", 3, hidden_size=24)


@pytest.fixture(scope="module")
def get_pair(tmp_path_factory: pytest.TempPathFactory, pair_target: PreTrainedModel) -> Callable[..., Pair]:
    """A function that makes the pair of a family and a LoRA once."""
    made: dict[tuple[str, str, bool], Pair] = {}

    def get(family: str = "llama", lora: str = "plain", *, tied: bool = False) -> Pair:
        if (family, lora, tied) not in made:
            folder = tmp_path_factory.mktemp("pair")
            more = {"tie_word_embeddings": True} if tied else {}
            base = save_base(folder / "base", family, **more)
            made[family, lora, tied] = make_pair(
                base, save_adapter(base, folder / "adapter", **LORAS[lora]), pair_target
            )
        return made[family, lora, tied]

    return get


@pytest.fixture
def pair(get_pair: Callable[..., Pair]) -> Pair:
    return get_pair()
