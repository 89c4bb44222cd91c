"""Every kind of adapter beside its base: the base stays as it is alone, to the bit, and the member is what PEFT makes.

Members share one copy of the weights, in one forward or in PEFT's layers; or they get a copy of their own, with a line
that says why; or the adapter is refused in one sentence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.adapter_cases import alone, last_logits, roles_of_forwards, save_adapter, save_base, weight_bytes
from helpers.patch_cases import edit_json
from helpers.tiny import random_ids
from peft import LoraConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import save_file
from torch.testing import assert_close

from ensembler import EnsembleForCausalLM, MemberConfig
from ensembler.errors import EnsemblerError

IDS = random_ids(3, 7)
BY_KIND = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
LINEAR = {"target_modules": ["q_proj", "down_proj"]}
PROMPTS = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
# What each kind is made with: those beside the weights, those that are copied, those that are refused.
SHARED: dict[str, dict[str, Any]] = {
    kind: dict(LINEAR)
    for kind in (
        *("BEFT", "DEFT", "DELORA", "GLORA", "GRALORA", "HIRA", "HRA", "LILY", "LOHA", "LOKR", "OFT", "OSF", "PEANUT"),
        *("PVERA", "RANDLORA", "SUPERTUNING", "TINYLORA", "VERA"),
    )
}
SHARED |= {
    "MISS": {"r": 4, **LINEAR},
    "PSOFT": {"r": 4, **LINEAR},
    "FOURIERFT": {"n_frequency": 50, **LINEAR},
    "WAVEFT": {"n_frequency": 50, **LINEAR},
    "LORA": {"r": 4, "use_dora": True, **LINEAR},
    "ADALORA": {"total_step": 10, **LINEAR},
    "C3A": {"block_size": 16, **LINEAR},
    "IA3": {"feedforward_modules": ["down_proj"], **LINEAR},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "ROAD": {"group_size": 16, **LINEAR},
    "VBLORA": {"vector_length": 16, "num_vectors": 32, **LINEAR},
}
COPIED: dict[str, dict[str, Any]] = {"TRAINABLE_TOKENS": {"token_indices": [4, 5, 30]}}
REFUSED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE"), PROMPTS),
    **dict.fromkeys(("ADAMSS", "BOFT", "FROD", "POLY", "UNILORA"), LINEAR),
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 1, **PROMPTS},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1], "task_type": "CAUSAL_LM"},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1, "target_modules": "self_attn"},
    "SHIRA": {"r": 4, **LINEAR},
    "SHADOW": {},
    "XLORA": {"hidden_size": 64, "adapters": {}},
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds") / "base"
    return save_base(folder, hidden_size=64, intermediate_size=64, tie_word_embeddings=request.param)


def linear(members: dict[str, Any], **options: Any) -> EnsembleForCausalLM:
    return EnsembleForCausalLM.from_members(
        rule="linear", members=members, constant=dict.fromkeys(members, 1.0), alpha=0.0, **options
    )


def by_peft(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(alone(base), adapter).eval()


def assert_members(model: EnsembleForCausalLM, base: Path, adapters: dict[str, Path], *, to_the_bit: bool) -> None:
    """In any order, and again: one member leaves nothing behind for another."""
    expected = {role: last_logits(by_peft(base, path), IDS) for role, path in adapters.items()}
    expected["base"] = last_logits(alone(base), IDS)
    for role in ("base", *adapters, "base", *reversed(adapters), "base"):
        actual = last_logits(model.members[role], IDS)
        if to_the_bit or role == "base":
            assert torch.equal(actual, expected[role]), (role, (actual - expected[role]).abs().max())
        assert_close(actual, expected[role], atol=1e-4, rtol=1e-5)
    for role in adapters:
        assert (expected[role] - expected["base"]).abs().max() > 0.05, role
    assert_close(last_logits(model, IDS), sum(expected.values()), atol=1e-4, rtol=1e-4)


def test_all_kinds_of_peft_are_here() -> None:
    """A new version of PEFT may have more: each is shared, copied or refused for a reason."""
    assert BY_KIND.keys() <= SHARED.keys() | COPIED.keys() | REFUSED.keys()


def two_and_base(base: Path, folder: Path, said: list[str], config: Any) -> tuple[Any, dict[str, Path]]:
    """An ensemble of two adapters of one configuration and their base, and the adapters; `said` is of its loading."""
    adapters = {role: save_adapter(base, folder / role, config, seed=seed) for seed, role in enumerate("ab")}
    said.clear()
    members: dict[str, Any] = {role: MemberConfig(str(base), adapter=str(path)) for role, path in adapters.items()}
    return linear({**members, "base": str(base)}), adapters


@pytest.mark.parametrize("kind", [kind for kind in SHARED if kind in BY_KIND])
def test_kinds_beside_the_weights(base: Path, tmp_path: Path, said: list[str], kind: str) -> None:
    """Two adapters and their base on one copy of the weights."""
    model, adapters = two_and_base(base, tmp_path, said, BY_KIND[kind](**SHARED[kind]))
    assert [line for line in said if "PEFT runs the adapter of" in line] == said
    assert len(said) == 1
    assert_members(model, base, adapters, to_the_bit=True)
    assert roles_of_forwards(model) == [("a",), ("b",), ("base",)]
    embeddings = [model.members[role].get_output_embeddings() for role in model.members]
    assert len({layer.weight.data_ptr() for layer in embeddings}) == 1
    model.tie_weights()
    assert_members(model, base, adapters, to_the_bit=True)


# LoRA with other settings: what it is made with, and what becomes of it.
HERE, PEFT, COPY = "here", "peft", "copy"
LORAS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, HERE),
    "patterns": ({"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 24}, "use_rslora": True}, HERE),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, HERE),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, HERE),
    "all": ({"target_modules": "all-linear"}, HERE),
    "gaussian": ({"init_lora_weights": "gaussian"}, HERE),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, HERE),
    "head to save": ({"modules_to_save": ["lm_head"]}, HERE),
    "embedding to save": ({"modules_to_save": ["embed_tokens"]}, HERE),
    "both to save": ({"modules_to_save": ["embed_tokens", "lm_head"]}, HERE),
    "norms to save": ({"modules_to_save": ["input_layernorm", "norm"]}, HERE),
    "block to save": ({"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}, HERE),
    "biases": ({"bias": "all"}, HERE),
    "biases of lora": ({"bias": "lora_only"}, HERE),
    "dora": ({"use_dora": True}, PEFT),
    "dora, head to save": ({"use_dora": True, "modules_to_save": ["lm_head"]}, PEFT),
    "dora, norms to save": ({"use_dora": True, "modules_to_save": ["norm"]}, PEFT),
    "lora_bias": ({"lora_bias": True}, PEFT),
    "tokens": ({"trainable_token_indices": [4, 5, 30]}, PEFT),
    "tokens, dora": ({"trainable_token_indices": [4, 5, 30], "use_dora": True}, PEFT),
    "parameters": ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, PEFT),
    "dora of the embedding": ({"use_dora": True, "target_modules": ["embed_tokens"]}, COPY),
    "dora with biases": ({"use_dora": True, "bias": "lora_only"}, COPY),
    "tied tokens": ({"trainable_token_indices": [4, 30], "ensure_weight_tying": True}, COPY),
    "tied to save": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, COPY),
    "pissa": ({"init_lora_weights": "pissa"}, COPY),
    "olora": ({"init_lora_weights": "olora"}, COPY),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, COPY),
    "kasa": ({"kasa_config": peft.KasaConfig() if hasattr(peft, "KasaConfig") else None}, COPY),
    "qalora": ({"use_qalora": True}, COPY),
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base_with_biases(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras") / "base"
    return save_base(folder, "qwen2", tie_word_embeddings=request.param)


@pytest.mark.parametrize("lora", LORAS)
def test_loras(base_with_biases: Path, tmp_path: Path, said: list[str], lora: str) -> None:
    base, (settings, outcome) = base_with_biases, LORAS[lora]
    settings = {"r": 4, **LINEAR, **settings}
    adapters = {
        role: save_adapter(base, tmp_path / role, LoraConfig(**settings), seed=i) for i, role in enumerate("ab")
    }
    said.clear()
    members: dict[str, Any] = {role: MemberConfig(str(base), adapter=str(path)) for role, path in adapters.items()}
    model = linear({**members, "base": str(base)})
    assert_members(model, base, adapters, to_the_bit=outcome == PEFT)
    forwards = {HERE: [("a", "b", "base")]}.get(outcome, [("a",), ("b",), ("base",)])
    assert roles_of_forwards(model) == forwards
    words = {HERE: [], PEFT: ["PEFT runs the adapter of a (LORA) and b (LORA)"]}
    expected = words.get(outcome, [f"{role} has a copy of the weights of its own: its adapter " for role in "ab"])
    assert len(said) == len(expected)
    assert all(part in line for part, line in zip(expected, said, strict=True)), said
    layers = [model.members[role].model.layers[0].mlp.up_proj.weight.data_ptr() for role in model.members]
    if lora not in ("all", "block to save"):
        assert len(set(layers)) == (3 if outcome == COPY else 1)
    model.tie_weights()
    assert_members(model, base, adapters, to_the_bit=outcome == PEFT)


FAMILIES: dict[str, list[dict[str, Any]]] = {
    "gpt2": [
        {"target_modules": ["c_attn", "c_proj", "wte", "wpe"]},
        {"target_modules": ["c_fc"], "modules_to_save": ["wte", "wpe", "ln_f"], "bias": "all"},
        {"target_modules": ["c_attn"], "use_dora": True},
    ],
    "gemma": [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["down_proj"], "modules_to_save": ["embed_tokens", "norm"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]},
    ],
    "opt": [
        {"target_modules": ["q_proj", "fc1"], "bias": "all"},
        {"target_modules": ["fc2"], "modules_to_save": ["embed_positions", "final_layer_norm"]},
        {"target_modules": ["fc2"], "lora_bias": True},
    ],
    "bloom": [
        {"target_modules": ["query_key_value"], "bias": "lora_only"},
        {"target_modules": ["dense_h_to_4h"], "modules_to_save": ["word_embeddings_layernorm"]},
        {"target_modules": ["query_key_value"], "use_dora": True},
    ],
    "mixtral": [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ],
}


@pytest.mark.parametrize("order", ["abcd", "dcba", "cadb"])
@pytest.mark.parametrize("family", FAMILIES)
def test_members_of_several_kinds_on_one_copy(tmp_path: Path, family: str, order: str) -> None:
    """Two share a forward with the base, beside one that PEFT runs; padded rows, and positions of one row for all."""
    base = save_base(tmp_path / "base", family)
    adapters = {}
    for role, settings in zip("abc", FAMILIES[family], strict=True):
        config = LoraConfig(r=3, fan_in_fan_out=family == "gpt2", **settings)
        adapters[role] = save_adapter(base, tmp_path / role, config, seed=ord(role))
    members: dict[str, Any] = {role: MemberConfig(str(base), adapter=str(path)) for role, path in adapters.items()}
    model = linear({"base" if role == "d" else role: members.get(role, str(base)) for role in order})
    together = tuple("base" if role == "d" else role for role in order if role != "c")
    assert sorted(roles_of_forwards(model)) == sorted([together, ("c",)])
    assert_members(model, base, adapters, to_the_bit=False)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    total = sum(last_logits(by_peft(base, path), IDS, attention_mask=mask) for path in adapters.values())
    total += last_logits(alone(base), IDS, attention_mask=mask)
    assert_close(last_logits(model, IDS, attention_mask=mask)[mask > 0], total[mask > 0], atol=1e-4, rtol=1e-4)
    sizes = [weight_bytes(by_peft(base, path)) - weight_bytes(alone(base)) for path in adapters.values()]
    assert weight_bytes(model) <= weight_bytes(alone(base)) + 2 * sum(sizes) + weight_bytes(alone(base)) // 2


def test_peft_runs_adapters_of_one_kind_on_a_copy(base: Path, tmp_path: Path, said: list[str]) -> None:
    configs = {"a": BY_KIND["IA3"](**SHARED["IA3"]), "b": LoraConfig(**SHARED["LORA"]), "c": LoraConfig(r=2, **LINEAR)}
    adapters = {role: save_adapter(base, tmp_path / role, config) for role, config in configs.items()}
    said.clear()
    members: dict[str, Any] = {role: MemberConfig(str(base), adapter=str(path)) for role, path in adapters.items()}
    model = linear({**members, "base": str(base)})
    assert said == [
        "a and c and base and b do not share the weights of their model: PEFT runs adapters of one kind on one copy",
        "a and c and base share their weights and not their forward: PEFT runs the adapter of a (IA3)",
    ]
    assert sorted(roles_of_forwards(model)) == [("a",), ("b",), ("c", "base")]
    assert_members(model, base, adapters, to_the_bit=False)


@pytest.mark.parametrize("kind", [kind for kind in COPIED if kind in BY_KIND])
def test_kinds_that_are_copied(base: Path, tmp_path: Path, said: list[str], kind: str) -> None:
    model, adapters = two_and_base(base, tmp_path, said, BY_KIND[kind](**COPIED[kind]))
    assert said == [f"{role} has a copy of the weights of its own: its adapter is of kind {kind}" for role in adapters]
    assert_members(model, base, adapters, to_the_bit=False)


@pytest.mark.parametrize("lora", ["alora", "replication", "pissa_niter", "corda"])
def test_loras_that_are_refused(base: Path, tmp_path: Path, lora: str) -> None:
    """PEFT alone gives something else each time, or runs them with more than the model's own forward."""
    adapter = save_adapter(base, tmp_path / "adapter")
    settings: dict[str, dict[str, Any]] = {
        "alora": {"alora_invocation_tokens": [5]},
        "replication": {"layer_replication": [[0, 2], [1, 2]]},
        "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
        "corda": {"init_lora_weights": "corda"},
    }
    edit_json(adapter / "adapter_config.json", **settings[lora])
    with pytest.raises(EnsemblerError, match=rf"^a: the adapter .*{lora.partition('_')[0]}.*; merge it") as caught:
        linear({"a": MemberConfig(str(base), adapter=str(adapter)), "base": str(base)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind in BY_KIND])
def test_kinds_that_are_refused(base: Path, tmp_path: Path, kind: str) -> None:
    config = BY_KIND[kind](**REFUSED[kind])
    config.save_pretrained(tmp_path / "adapter")
    save_file({"base_model.model.x": torch.zeros(1)}, tmp_path / "adapter" / "adapter_model.safetensors")
    members = {"a": MemberConfig(str(base), adapter=str(tmp_path / "adapter")), "base": str(base)}
    with pytest.raises(EnsemblerError, match=rf"^a: the adapter .* is of kind {kind}, which .*; merge it") as caught:
        linear(members)
    assert "\n" not in str(caught.value)
