"""An adapter of one of two tied layers, merged in memory: what PEFT computes with it beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.patch_cases import save_lora
from helpers.tiny import make_model, random_ids
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from ensembler.adapters import check_adapter
from ensembler.patch.addition import merge_adapter

IDS = random_ids(2, 9)
EMBEDDINGS = {"gpt2": "wte", "gemma2": "embed_tokens", "bloom": "word_embeddings", "gpt_neox": "embed_in"}
LAYERS = {"gpt2": "c_attn", "gemma2": "q_proj", "bloom": "query_key_value", "gpt_neox": "query_key_value"}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


def changes(family: str) -> dict[str, dict[str, Any]]:
    embedding, layer = EMBEDDINGS[family], LAYERS[family]
    return {
        "embedding": {"target_modules": [embedding, layer]},
        "head": {"target_modules": ["lm_head", layer]},
        "both": {"target_modules": [embedding, "lm_head"]},
        "embedding whole": {"target_modules": [layer], "modules_to_save": [embedding]},
        "head whole": {"target_modules": [layer], "modules_to_save": ["lm_head"]},
        "DoRA": {"target_modules": [embedding, layer], "use_dora": True},
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", changes("gpt2"))
@pytest.mark.parametrize("family", EMBEDDINGS)
def test_a_merged_adapter_computes_what_it_does_beside_the_weights(
    family: str, kind: str, tied: bool, tmp_path: Path
) -> None:
    base, size = tmp_path / "base", {"tie_word_embeddings": tied}
    make_model(family, 1, **size).save_pretrained(base)
    lora = save_lora(tmp_path / "lora", family, 1, size=size, **changes(family)[kind])

    def load() -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base)
        return model

    before, model = logits(load()), load()
    expected = logits(PeftModel.from_pretrained(load(), lora))
    merged = merge_adapter(model, check_adapter("x", str(lora), str(base), model.config))
    assert (expected - before).abs().max() > 0.1
    scale = expected.abs().max()
    assert_close(logits(merged) / scale, expected / scale, atol=1e-5, rtol=0)
    head, embeddings = merged.get_output_embeddings(), merged.get_input_embeddings()
    assert head.weight is not embeddings.weight
    merged.tie_weights()  # accelerate does so
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))
    assert_close(logits(merged) / scale, expected / scale, atol=1e-5, rtol=0)


def test_an_adapter_of_other_layers_leaves_the_tie(tmp_path: Path) -> None:
    make_model("gpt2", 1).save_pretrained(tmp_path / "base")
    for config in ({}, {"use_dora": True}):
        lora = save_lora(tmp_path / "lora", "gpt2", target_modules=["c_attn"], **config)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        merged = merge_adapter(model, check_adapter("x", str(lora), str(tmp_path / "base"), model.config))
        assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
        assert merged.config.tie_word_embeddings
