"""Members share a copy of the weights or have their own; several on one give what each gives alone."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_cases import (
    FAMILIES,
    IDS,
    MASK,
    MODES,
    PADDED,
    TOGETHER,
    GetPair,
    Pair,
    alone,
    assert_equal,
    last_logits,
    make_pair,
    merged,
    roles_of_forwards,
    save_adapter,
    save_base,
    targets,
    tokens,
    weight_bytes,
)
from helpers.tiny import make_tokenizer, random_ids
from peft import PeftModel
from torch.testing import assert_close
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ensembler import EnsembleForCausalLM, MemberConfig
from ensembler.errors import MemberError

# -- more members on one backbone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_adapters", [2, 3])
@pytest.mark.parametrize("with_base", [False, True], ids=["adapters only", "with base"])
def test_several_adapters_on_one_backbone(tmp_path: Path, num_adapters: int, with_base: bool) -> None:
    """Of different ranks and targets; one of them is used by two members."""
    base = save_base(tmp_path / "base", "mistral")
    settings: list[dict[str, Any]] = [{"r": 2}, {"target_modules": ["lm_head", "k_proj"]}, {"use_rslora": True, "r": 9}]
    adapters = [save_adapter(base, tmp_path / f"adapter{i}", seed=i, **settings[i]) for i in range(num_adapters)]
    members: dict[str, Any] = {f"m{i}": MemberConfig(str(base), adapter=str(path)) for i, path in enumerate(adapters)}
    expected: dict[str, Any] = {f"m{i}": merged(base, path) for i, path in enumerate(adapters)}
    members["again"], expected["again"] = members["m0"], expected["m0"]
    if with_base:
        members["base"], expected["base"] = str(base), alone(base)
    numbers = {role: 1.0 / (i + 1) for i, role in enumerate(members)}
    options = {"rule": "linear", "alpha": 0.5, "constant": numbers, "slope": {"m1": -0.4}}
    pair = Pair(
        EnsembleForCausalLM.from_members(members=members, **options),
        EnsembleForCausalLM.from_members(members=expected, **options),
        base,
        adapters[0],
    )
    assert roles_of_forwards(pair.shared) == [tuple(members)]
    assert_equal(pair)
    assert_equal(pair, PADDED, attention_mask=MASK)
    for mode in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        assert tokens(pair.shared, PADDED, **mode) == tokens(pair.copies, PADDED, **mode)


def test_realign_with_two_adapters(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gemma2")
    paths = [save_adapter(base, tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b"))]
    members = {"reference": str(paths[0]), "aligned": str(paths[1])}  # a LoRA folder is a model too
    shared = EnsembleForCausalLM.from_members(rule="realign", alpha=0.3, members=members)
    assert roles_of_forwards(shared) == [("reference", "aligned")]
    expected = 0.7 * last_logits(merged(base, paths[0]), IDS) + 0.3 * last_logits(merged(base, paths[1]), IDS)
    assert_close(last_logits(shared, IDS), expected, atol=1e-5, rtol=1e-5)


def test_the_same_model_twice_without_adapters_is_two_models(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    model = EnsembleForCausalLM.from_members(rule="realign", members={"reference": str(base), "aligned": str(base)})
    assert roles_of_forwards(model) == [("reference",), ("aligned",)]
    assert weight_bytes(model) == 2 * weight_bytes(model.members["reference"])


@pytest.mark.parametrize(
    "other",
    [{"dtype": "bfloat16"}, {"quantization": "bnb-8bit"}, {"device_map": {"": "cpu"}}],
    ids=lambda o: next(iter(o)),
)
def test_members_that_are_loaded_in_another_way_are_another_backbone(tmp_path: Path, other: dict[str, Any]) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    members = {"reference": str(base), "aligned": MemberConfig(str(base), adapter=str(adapter), **other)}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=1.0, members=members)
    assert roles_of_forwards(model) == [("reference",), ("aligned",)]
    expected = last_logits(merged(base, adapter), IDS)
    error = (last_logits(model, IDS) - expected).norm() / expected.norm()
    assert error < (1e-5 if "device_map" in other else 0.15)


def test_a_trained_module_cannot_stand_in_for_quantised_weights(tmp_path: Path) -> None:
    """A head may, which is not quantised; an adapter adds no tensors that a training would change."""
    pytest.importorskip("bitsandbytes")
    base = save_base(tmp_path / "base", "qwen2", hidden_size=64, intermediate_size=64)
    for module in ("mlp", "lm_head"):
        adapter = save_adapter(base, tmp_path / module, target_modules=["q_proj"], modules_to_save=[module])
        for quantization in ("bnb-8bit", "bnb-nf4"):
            alone = MemberConfig(str(base), quantization=quantization)
            members = {"reference": alone, "aligned": replace(alone, adapter=str(adapter))}
            if module == "mlp":
                with pytest.raises(
                    MemberError, match=r"aligned holds \S*mlp\.\S*weight, and the base's is quantised; load"
                ):
                    EnsembleForCausalLM.from_members(rule="realign", members=members)
                continue
            model = EnsembleForCausalLM.from_members(rule="realign", members=members)
            assert roles_of_forwards(model) == [("reference", "aligned")]
            assert not any(value.requires_grad for name, value in model.named_parameters() if ".adapters." in name)


def test_paths_that_are_written_differently_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of its base in an adapter's config may be relative to the folder of its training."""
    save_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    adapter = save_adapter(Path("base"), tmp_path / "adapter")
    members = {"reference": f"{tmp_path}/./base/", "aligned": str(adapter)}
    model = EnsembleForCausalLM.from_members(rule="realign", members=members)
    assert roles_of_forwards(model) == [("reference", "aligned")]


def test_a_tokenizer_of_the_adapter_with_extra_tokens(tmp_path: Path) -> None:
    """Ids that only source_ft holds: source_pt on the same backbone reads its substitute for them."""
    base = save_base(tmp_path / "base", vocab_size=72)  # padded: room for more tokens
    adapter = save_adapter(base, tmp_path / "adapter")
    tokenizer: PreTrainedTokenizerFast = make_tokenizer(4)
    tokenizer.save_pretrained(adapter)
    target = save_base(tmp_path / "target", seed=4)
    for outside in ("mask", "neutral"):
        members = {
            "source_ft": MemberConfig(str(base), adapter=str(adapter)),
            "source_pt": str(base),
            "target_pt": str(target),
        }
        shared = EnsembleForCausalLM.from_members(alpha=0.6, members=members, outside=outside)
        assert roles_of_forwards(shared) == TOGETHER
        ids = torch.tensor([[5, 66, 9, 67], [8, 9, 64, 30]])
        assert shared.contract.held == {"source_ft": 68, "source_pt": 64, "target_pt": 64}
        read = torch.where(ids < 64, ids, shared.contract.substitutes["source_pt"])
        z_ft, z_pt = last_logits(merged(base, adapter), ids), last_logits(alone(base), read)
        z_target = last_logits(alone(target), torch.where(ids < 64, ids, shared.contract.substitutes["target_pt"]))
        logits = last_logits(shared, ids)
        z = [values[..., :64].log_softmax(-1) for values in (z_ft, z_target, z_pt)]
        expected = (z[0] + 0.6 * (z[1] - z[2])).log_softmax(-1)
        assert_close(logits[..., :64].log_softmax(-1), expected, atol=1e-5, rtol=1e-5)
        assert logits[..., 64:68].isfinite().all() == (outside == "neutral")


@pytest.mark.parametrize("seed", range(6))
def test_random_cases(tmp_path: Path, pair_target: PreTrainedModel, seed: int) -> None:
    """Families, ranks, targets, scalings, batches and modes drawn at random."""
    draw = random.Random(seed)
    family = draw.choice(FAMILIES)
    base = save_base(tmp_path / "base", family, seed=seed)
    chosen = draw.sample(targets(family), draw.randint(1, len(targets(family))))
    lora = {
        "r": draw.randint(1, 9),
        "lora_alpha": draw.choice([1, 4, 16]),
        "use_rslora": draw.random() < 0.5,
        "target_modules": chosen,
        "rank_pattern": {draw.choice(chosen): draw.randint(1, 5)},
        "lora_dropout": 0.3,
    }
    pair = make_pair(
        base, save_adapter(base, tmp_path / "adapter", seed=seed, **lora), pair_target, alpha=draw.uniform(0, 2)
    )
    rows, positions = draw.randint(1, 4), draw.randint(1, 12)
    ids = random_ids(rows, positions, seed=seed)
    for row in range(rows):
        ids[row, : draw.randint(0, positions - 1)] = 3
    ids[0] = ids[0].clamp(min=4)
    mask = (ids != 3).long()
    actual, expected = (last_logits(model, ids, attention_mask=mask)[:, -1] for model in (pair.shared, pair.copies))
    assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    mode = MODES[draw.choice(list(MODES))]
    assert tokens(pair.shared, ids, **mode) == tokens(pair.copies, ids, **mode)


def test_pefts_own_mixed_batch(tmp_path: Path) -> None:
    """adapter_names with '__base__' is what the batched forward means."""
    base = save_base(tmp_path / "base", "qwen2")
    adapters = {role: save_adapter(base, tmp_path / role, seed=i, r=2 + i) for i, role in enumerate("ab")}
    patched = PeftModel.from_pretrained(alone(base), adapters["a"], adapter_name="a")
    patched.load_adapter(adapters["b"], adapter_name="b")
    names = ["a"] * 2 + ["b"] * 2 + ["__base__"] * 2
    expected = last_logits(patched.eval(), IDS.repeat(3, 1), adapter_names=names).split(2)
    members: dict[str, Any] = {role: MemberConfig(str(base), adapter=str(path)) for role, path in adapters.items()}
    numbers = {"a": 0.7, "b": -1.1, "base": 0.4}
    model = EnsembleForCausalLM.from_members(
        rule="linear", members={**members, "base": str(base)}, constant=numbers, alpha=0.0
    )
    combined = sum(weight * logits for weight, logits in zip(numbers.values(), expected, strict=True))
    assert_close(last_logits(model, IDS), combined, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_two_copies(get_pair: GetPair, dtype: str) -> None:
    """Unmerged, the update is rounded apart from the weights: no further from fp32 than a merged copy is."""
    pair = get_pair("llama")
    truth = last_logits(merged(pair.base, pair.adapter), IDS)
    members = {
        "reference": MemberConfig(str(pair.base), dtype=dtype),
        "aligned": MemberConfig(str(pair.base), dtype=dtype, adapter=str(pair.adapter)),
    }
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=1.0, members=members)
    assert {tensor.dtype for name, tensor in model.named_parameters() if "_aligned" in name} == {getattr(torch, dtype)}
    reference = last_logits(merged(pair.base, pair.adapter).to(getattr(torch, dtype)), IDS).float()
    own, other = ((logits - truth).norm() / truth.norm() for logits in (last_logits(model, IDS), reference))
    assert own <= 2 * other + 1e-3, (own, other)
