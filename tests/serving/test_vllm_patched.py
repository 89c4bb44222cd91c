"""The load format `patched` in vLLM: the model that `patch apply` writes, without writing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.vllm_cases import engine

from ensembler.errors import ConfigError
from ensembler.patch.apply import apply_patches
from ensembler.patch.formats import read_patch
from ensembler.patch.loading import load_patched
from ensembler.patch.patch_plan import plan_patches

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm

KINDS = ("plain", "int4-rows")


def make_model(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_lora(model: Path, folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj"]
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    )
    adapted.save_pretrained(folder)
    return folder


def log_probs(folder: Path, **settings: Any) -> list[dict[int, float]]:
    """Return the log-probs of a random prompt's tokens and of the most probable ones there, by vLLM's kernels."""
    from vllm import SamplingParams

    options = {"skip_tokenizer_init": True, "max_model_len": 64, "dtype": "bfloat16", "enforce_eager": True, **settings}
    prompt = {"prompt_token_ids": torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(2)).tolist()}
    with engine(folder, **options) as llm:
        (output,) = llm.generate([prompt], SamplingParams(max_tokens=1, prompt_logprobs=5, detokenize=False))
    return [{token: one.logprob for token, one in each.items()} for each in output.prompt_logprobs[1:]]


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_those_of_the_written_model(kind: str, tmp_path: Path) -> None:
    plain = make_model(tmp_path / "plain")
    lora = make_lora(plain, tmp_path / "lora")
    base = plain
    if kind != "plain":
        from helpers.quantized_models import quantize_folder

        base = quantize_folder(plain, tmp_path / kind, kind)
    apply_patches([read_patch(lora, scale=0.5)], base, tmp_path / "out")
    extra = {"patch": str(lora), "scale": 0.5}
    ours = log_probs(base, load_format="patched", model_loader_extra_config=extra)
    assert ours == log_probs(tmp_path / "out", load_format="auto")
    assert ours != log_probs(base, load_format="auto")


def test_files_are_those_of_the_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from vllm.config.load import LoadConfig

    from ensembler.serving import vllm_patched

    asked = {}

    def find_folder(name: str, **options: Any) -> Path:
        asked[name] = options
        if name == "a":
            return Path(name)
        raise ConfigError("stopped")

    monkeypatch.setattr(vllm_patched, "read_patch", lambda folder, scale: None)
    monkeypatch.setattr(vllm_patched, "find_folder", find_folder)
    loader = vllm_patched.PatchedLoader(LoadConfig(download_dir="cache", model_loader_extra_config={"patch": "a"}))
    with pytest.raises(ConfigError, match="stopped"):
        next(loader.get_all_weights(SimpleNamespace(model="org/base", revision="v2"), torch.nn.Module()))
    assert asked["org/base"] == {"revision": "v2", "cache_dir": "cache"}


def test_what_the_configuration_has_to_say() -> None:
    from ensembler.serving.vllm_patched import patches_of

    assert patches_of({"patch": "a"}) == [("a", 1.0)]
    assert patches_of({"patch": ["a", "b"], "scale": [1, 0.5]}) == [("a", 1.0), ("b", 0.5)]
    for extra in ({}, {"patch": 1}, {"patch": []}, {"patch": "a", "scale": "x"}, {"patch": ["a"], "scale": [1, 2]}):
        with pytest.raises(ConfigError, match=r"expected a folder|give one number"):
            patches_of(extra)


def test_tensors_are_those_of_the_files(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    plain = make_model(tmp_path / "plain")
    lora = make_lora(plain, tmp_path / "lora")
    apply_patches([read_patch(lora)], plain, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    found = dict(load_patched(plan_patches([read_patch(lora)], plain)))
    assert found.keys() == written.keys()
    assert all(torch.equal(found[name], written[name]) for name in found)
