"""Quantised members, and members that are spread over a CPU and a disk; and what is refused about both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_cases import alone, last_logits, merged, roles_of_forwards, save_adapter, save_base, weight_bytes
from helpers.tiny import make_model, random_ids
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ensembler import EnsembleForCausalLM, MemberConfig
from ensembler.errors import ConfigError, EnsemblerError, MemberError

IDS = random_ids(2, 7)
SIZES = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes wants multiples of its blocks
METHODS: dict[str, tuple[dict[str, Any], float]] = {  # what it is for bitsandbytes, and the relative error allowed
    "bnb-8bit": ({"load_in_8bit": True}, 0.1),
    "nf4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}, 0.6),
    "bnb-fp4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "float32"}, 0.8),
    "nf4:bfloat16": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}, 0.6),
    "nf4:float32:double": (
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_use_double_quant": True,
        },
        0.6,
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("quantised") / "base", **SIZES, initializer_range=0.1)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return save_adapter(base, base.parent / "adapter")


def quantised(base: Path, method: str) -> Any:
    """As transformers loads it, for itself."""
    settings = BitsAndBytesConfig(**METHODS[method][0])
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, device_map={"": "cpu"}).eval()


def realign(reference: Any, aligned: Any, alpha: float = 0.5) -> EnsembleForCausalLM:
    return EnsembleForCausalLM.from_members(
        rule="realign", alpha=alpha, members={"reference": reference, "aligned": aligned}
    )


def tokens(model: Any, **options: Any) -> list[list[int]]:
    torch.manual_seed(1)
    options = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 3, **options}
    result: list[list[int]] = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options).tolist()
    return result


# -- quantised --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_member(base: Path, method: str) -> None:
    """The same as the model that transformers quantises; near the plain one; smaller."""
    plain = make_model("qwen2", 3)
    model = realign(MemberConfig(str(base), quantization=method), plain)  # type: ignore[arg-type]
    reference = quantised(base, method)
    expected = 0.5 * (last_logits(reference, IDS) + last_logits(plain, IDS))
    assert_close(last_logits(model, IDS), expected, atol=1e-5, rtol=1e-5)
    truth = last_logits(alone(base), IDS)
    error = (last_logits(model.members["reference"], IDS) - truth).norm() / truth.norm()
    assert 0 < error < METHODS[method][1]
    layer, original = (made.model.layers[0] for made in (model.members["reference"], alone(base)))
    bits = 8 if "8" in method.partition(":")[0] else 4
    assert weight_bytes(layer.mlp.up_proj) <= weight_bytes(original.mlp.up_proj) * bits / 32
    same = EnsembleForCausalLM.from_members(
        rule="realign", alpha=0.5, members={"reference": reference, "aligned": plain}
    )
    for options in ({}, {"num_beams": 3}, {"do_sample": True}):
        assert tokens(model, **options) == tokens(same, **options)


@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_backbone_with_an_adapter(base: Path, adapter: Path, method: str) -> None:
    """QLoRA: the reference is PEFT on the same quantised base; with gradients asked for, too."""
    options = {"quantization": method}
    model = realign(MemberConfig(str(base), **options), MemberConfig(str(base), adapter=str(adapter), **options))  # type: ignore[arg-type]
    assert roles_of_forwards(model) == [("reference", "aligned")]
    patched = PeftModel.from_pretrained(quantised(base, method), adapter).eval()
    with patched.disable_adapter():
        z_base = last_logits(patched, IDS)
    z_aligned = last_logits(patched, IDS)
    # 8 bits: the largest entries of all rows decide what is computed in fp16, so a batch is not its rows alone.
    tol = 0.02 if "8bit" in method else 0.05 if "bfloat16" in method else 1e-4
    for role, expected in (("reference", z_base), ("aligned", z_aligned)):
        assert_close(last_logits(model.members[role], IDS), expected, atol=tol, rtol=tol)
    combined = 0.5 * (z_base + z_aligned)
    assert (last_logits(model, IDS) - combined).norm() < tol * combined.norm()
    assert (z_aligned - z_base).norm() > 10 * tol * combined.norm()
    assert_close(model(IDS).logits, last_logits(model, IDS), atol=1e-4, rtol=1e-4)
    assert model(IDS, labels=IDS).loss.isfinite()
    assert weight_bytes(model) < 1.3 * weight_bytes(quantised(base, method))
    assert len(tokens(model, num_beams=3)) == 2


@pytest.mark.parametrize("method", ["bnb-8bit", "nf4"])
def test_a_single_quantised_member_keeps_its_adapter_beside(base: Path, adapter: Path, method: str) -> None:
    """Merged, the update would be rounded to 8 or 4 bits."""
    aligned = MemberConfig(str(base), adapter=str(adapter), quantization=method)  # type: ignore[arg-type]
    model = realign(make_model("qwen2", 3), aligned, alpha=1.0)
    patched = PeftModel.from_pretrained(quantised(base, method), adapter).eval()
    tol = 0.02 if "8bit" in method else 1e-4
    assert_close(last_logits(model, IDS), last_logits(patched, IDS), atol=tol, rtol=tol)
    assert any("down_aligned" in name for name, _ in model.named_parameters())


def test_a_quantised_ensemble_survives_the_folder(base: Path, adapter: Path, tmp_path: Path) -> None:
    """By reference it is the same; copies are whole, and quantised again when they are loaded."""
    quantization = {"method": "bnb-nf4", "compute_dtype": "float32", "double_quant": True}
    members = (
        MemberConfig(str(base), quantization=quantization),  # type: ignore[arg-type]
        MemberConfig(str(base), adapter=str(adapter), quantization=quantization),  # type: ignore[arg-type]
    )
    model = realign(*members)
    for name, copy_members in (("referenced", False), ("alone", True)):
        model.save_pretrained(tmp_path / name, copy_members=copy_members)
        content = json.loads((tmp_path / name / "config.json").read_text())["members"]
        assert [member["quantization"] for member in content.values()] == [quantization] * 2
    again = EnsembleForCausalLM.from_pretrained(tmp_path / "referenced")
    assert torch.equal(last_logits(again, IDS), last_logits(model, IDS))
    assert_close(last_logits(alone(tmp_path / "alone" / "aligned"), IDS), last_logits(merged(base, adapter), IDS))
    copied = EnsembleForCausalLM.from_pretrained(tmp_path / "alone")
    error = (last_logits(copied, IDS) - last_logits(model, IDS)).norm() / last_logits(model, IDS).norm()
    assert error < 0.6


# -- spread -----------------------------------------------------------------------------------------------------------

MAPS: dict[str, Any] = {
    "cpu": {"": "cpu"},
    "disk": {"": "disk"},
    "head on disk": {"model": "cpu", "lm_head": "disk"},
    "first on disk": {
        "model.embed_tokens": "disk",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    },
}


@pytest.mark.parametrize("places", MAPS)
@pytest.mark.parametrize("anchor", [True, False], ids=["anchor", "other"])
def test_a_device_map_gives_what_the_plain_member_gives(base: Path, tmp_path: Path, places: str, anchor: bool) -> None:
    spread = MemberConfig(str(base), device_map=MAPS[places], offload_folder=str(tmp_path / "offload"))
    plain = make_model("qwen2", 3)
    model = realign(spread, plain) if anchor else realign(plain, spread)
    expected = realign(alone(base), plain) if anchor else realign(plain, alone(base))
    assert model.device == torch.device("cpu")
    assert_close(last_logits(model, IDS), last_logits(expected, IDS), atol=1e-5, rtol=1e-5)
    for options in ({}, {"num_beams": 3}, {"use_cache": False}):
        assert tokens(model, **options) == tokens(expected, **options)


@pytest.mark.parametrize("places", MAPS)
@pytest.mark.parametrize("single", [True, False], ids=["single", "shared"])
def test_adapters_on_a_member_that_is_spread(
    base: Path, adapter: Path, tmp_path: Path, places: str, single: bool
) -> None:
    options = {"device_map": MAPS[places], "offload_folder": str(tmp_path / "offload")}
    aligned = MemberConfig(str(base), adapter=str(adapter), **options)
    other = make_model("qwen2", 3)
    model = realign(other if single else MemberConfig(str(base), **options), aligned)
    expected = realign(other if single else alone(base), merged(base, adapter))
    assert len(roles_of_forwards(model)) == 1 + single
    for _ in range(2):  # weights that were fetched are put back
        assert_close(last_logits(model, IDS), last_logits(expected, IDS), atol=1e-5, rtol=1e-5)
    assert tokens(model) == tokens(expected)


@pytest.mark.parametrize(
    "max_memory", [None, {"cpu": "10KiB"}, {"cpu": "60KB"}, {"cpu": 60_000}, {"cpu": "1.5GiB", "disk": "1GB"}], ids=str
)
@pytest.mark.parametrize("strategy", ["auto", "sequential"])
def test_a_strategy_with_little_memory(base: Path, tmp_path: Path, max_memory: Any, strategy: str) -> None:
    spread = MemberConfig(
        str(base), device_map=strategy, max_memory=max_memory, offload_folder=str(tmp_path / "offload")
    )
    model = realign(spread, make_model("qwen2", 3), alpha=0.0)
    assert_close(last_logits(model, IDS), last_logits(alone(base), IDS), atol=1e-5, rtol=1e-5)


def test_numbers_reach_accelerate_as_numbers(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs that are given by number, as accelerate's own examples do."""
    seen: list[dict[str, Any]] = []
    load = AutoModelForCausalLM.from_pretrained

    def look(name: str, **options: Any) -> Any:
        seen.append(options)
        return load(name, **{**options, "device_map": {"": "cpu"}, "max_memory": None})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", look)
    monkeypatch.setattr("ensembler.engine.members.check_devices", lambda files: None)
    other = make_model("qwen2", 3)
    realign(MemberConfig(str(base), device_map={"model": 0, "lm_head": "cuda:1"}), other)  # type: ignore[dict-item]
    sizes = {0: 10**9, "cuda:1": "2GiB", "cpu": "3GiB"}
    realign(MemberConfig(str(base), device_map="auto", max_memory=sizes), other)  # type: ignore[arg-type]
    assert seen[0]["device_map"] == {"model": 0, "lm_head": "cuda:1"}
    assert seen[1]["max_memory"] == {0: 10**9, 1: "2GiB", "cpu": "3GiB"}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no offload folder": ({"device_map": {"": "disk"}}, "^reference: .*on disk; give an offload_folder"),
    "device of a map": ({"device_map": {"": "cuda:7"}}, "^reference: device 'cuda:7' is not there"),
    "number of a map": ({"device_map": {"": 7}}, "^reference: device 'cuda:7' is not there"),
    "nonsense of a map": ({"device_map": {"": "banana"}}, "^reference: 'banana' is no device"),
    "meta": ({"device_map": {"": "meta"}}, "^reference: 'meta' is no device"),
    "device": ({"device": "cuda:7"}, "^reference: device 'cuda:7' is not there"),
    "device of a size": (
        {"device_map": "auto", "max_memory": {"cuda:7": "1GiB"}},
        "^reference: device 'cuda:7' is not there",
    ),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_places_that_are_refused_in_one_line(base: Path, refused: str) -> None:
    settings, message = REFUSED[refused]
    with pytest.raises(EnsemblerError, match=message) as caught:
        realign(MemberConfig(str(base), **settings), make_model("qwen2", 3))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("place", ["cpu", "cpu:0"])
def test_from_pretrained_overrides_where_and_how(base: Path, adapter: Path, tmp_path: Path, place: str) -> None:
    """One device for all, whatever the folder's members say; dtypes too."""
    options: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "offload")}
    model = realign(MemberConfig(str(base), **options), MemberConfig(str(base), adapter=str(adapter), **options))
    model.save_pretrained(tmp_path / "ens")
    loaded = EnsembleForCausalLM.from_pretrained(tmp_path / "ens", device_map=place, dtype=torch.bfloat16)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert {member.device_map for member in loaded.config.members.values()} == {None}
    assert roles_of_forwards(loaded) == [("reference", "aligned")]
    error = (last_logits(loaded, IDS) - last_logits(model, IDS)).norm() / last_logits(model, IDS).norm()
    assert error < 0.1


def test_a_device_that_is_not_there_in_from_pretrained(base: Path, tmp_path: Path) -> None:
    realign(str(base), str(base)).save_pretrained(tmp_path / "ens")
    with pytest.raises(ConfigError, match="device 'cuda:7' is not there"):
        EnsembleForCausalLM.from_pretrained(tmp_path / "ens", device_map="cuda:7")


def test_copies_of_a_member_that_is_spread_are_whole(base: Path, adapter: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "offload")}
    model = realign(MemberConfig(str(base), **options), MemberConfig(str(base), adapter=str(adapter), **options))
    model.save_pretrained(tmp_path / "alone", copy_members=True)
    for role, expected in (("reference", alone(base)), ("aligned", merged(base, adapter))):
        saved = alone(tmp_path / "alone" / role)
        assert_close(last_logits(saved, IDS), last_logits(expected, IDS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dora", "bias"])
def test_other_adapters_on_a_quantised_base(base: Path, tmp_path: Path, kind: str) -> None:
    settings: dict[str, Any] = {"use_dora": True} if kind == "dora" else {"bias": "all"}
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    options = {"quantization": "nf4:float32"}
    model = realign(MemberConfig(str(base), **options), MemberConfig(str(base), adapter=str(adapter), **options))  # type: ignore[arg-type]
    patched = PeftModel.from_pretrained(quantised(base, "nf4"), adapter).eval()
    for role, expected in (("reference", quantised(base, "nf4")), ("aligned", patched)):
        assert_close(last_logits(model.members[role], IDS), last_logits(expected, IDS), atol=1e-4, rtol=1e-4)


def test_embeddings_of_its_own_on_a_base_that_is_away(base: Path, tmp_path: Path) -> None:
    """The adapter's file holds embeddings and the base's are on disk: the right numbers, or one line."""

    def train(model: Any) -> None:
        torch.nn.init.normal_(model.get_input_embeddings().weight)

    adapter = save_adapter(base, tmp_path / "adapter", change=train, save={"save_embedding_layers": True})
    options: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "offload")}
    with pytest.raises(MemberError, match=r"^reference and aligned: .*on disk") as caught:
        realign(MemberConfig(str(base), **options), MemberConfig(str(base), adapter=str(adapter), **options))
    assert "\n" not in str(caught.value)
