"""Predicted bytes: of published models against arithmetic by hand, of tiny ones against what is really loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.commands import SaveMember
from helpers.published import published
from helpers.tiny import FAMILIES, make_model, random_ids
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from ensembler import MemberConfig
from ensembler.engine.members import MemberFiles, check_member, group_members, load_group
from ensembler.errors import ConfigError, MemberError
from ensembler.planning.member_sizes import loaded_bytes, measure_group, measure_model, member_dtype
from ensembler.planning.sizes import LayerCache, device_budgets, parse_size, show_size
from ensembler.quantization import Quantization

# Parameters: embedding + head + last norm + layers x (attention + MLP + 2 norms, + biases of q, k, v in Qwen).
PARAMETERS = {
    "Llama-2-7B": (
        2 * 32000 * 4096 + 4096 + 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096),
        6_738_415_616,
    ),
    "Llama-2-13B": (
        2 * 32000 * 5120 + 5120 + 40 * (4 * 5120 * 5120 + 3 * 5120 * 13824 + 2 * 5120),
        13_015_864_320,
    ),
    "CodeLlama-34B": (
        2 * 32000 * 8192 + 8192 + 48 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 22016 + 2 * 8192),
        33_743_970_304,
    ),
    "Llama-3.1-8B": (
        2 * 128256 * 4096 + 4096 + 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096),
        8_030_261_248,
    ),
    "Qwen2.5-7B": (
        2 * 152064 * 3584
        + 3584
        + 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3584 + 2 * 512 + 3 * 3584 * 18944 + 2 * 3584),
        7_615_616_512,
    ),
    "Qwen2.5-32B": (
        2 * 152064 * 5120
        + 5120
        + 64 * (2 * 5120 * 5120 + 2 * 5120 * 1024 + 5120 + 2 * 1024 + 3 * 5120 * 27648 + 2 * 5120),
        32_763_876_352,
    ),
}
# Keys and values x layers x key-value heads x head width x 2 bytes.
CACHE = {
    "Llama-2-7B": (2 * 32 * 32 * 128 * 2, 524_288),
    "Llama-2-13B": (2 * 40 * 40 * 128 * 2, 819_200),
    "CodeLlama-34B": (2 * 48 * 8 * 128 * 2, 196_608),
    "Llama-3.1-8B": (2 * 32 * 8 * 128 * 2, 131_072),
    "Qwen2.5-7B": (2 * 28 * 4 * 128 * 2, 57_344),
    "Qwen2.5-32B": (2 * 64 * 8 * 128 * 2, 262_144),
}
ROPE = 2 * 64 * 4  # two fp32 tables of half a head's width, 128 / 2

METHODS = ("bnb-8bit", "bnb-nf4", "bnb-fp4", "bnb-nf4:float32:double")


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_by_hand(name: str) -> None:
    sizes = measure_model(published(name), "bfloat16")
    by_hand, number = PARAMETERS[name]
    assert sizes.parameters == by_hand == number
    assert sizes.num_bytes() == 2 * number + ROPE
    by_hand, per_token = CACHE[name]
    assert sizes.cache_per_token == by_hand == per_token
    assert sizes.cache_bytes(4096) == 4096 * per_token


def test_quantised_llama_2_7b_by_hand() -> None:
    sizes = measure_model(published("Llama-2-7B"), "bfloat16")
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert linear == 6_476_005_376
    rest = 2 * (6_738_415_616 - linear) + ROPE  # embedding, head and norms stay in bfloat16
    assert rest == 524_820_992
    rows = 32 * (4 * 4096 + 2 * 11008 + 4096)  # one fp32 scale per output of q, k, v, o, gate, up and down
    assert sizes.num_bytes(Quantization("bnb-8bit")) == rest + linear + 4 * rows == 7_006_265_856
    tables = 32 * 7 * 16 * 4  # each layer keeps the 16 fp32 values that 4 bits stand for
    nf4 = rest + linear // 2 + 4 * linear // 64 + tables
    assert sizes.num_bytes(Quantization("bnb-nf4")) == sizes.num_bytes(Quantization("bnb-fp4")) == nf4 == 4_167_588_352
    scales = linear // 64
    double = rest + linear // 2 + scales + 4 * scales // 256 + 32 * 7 * (4 + 256 * 4) + tables
    assert sizes.num_bytes(Quantization("bnb-nf4", double_quant=True)) == double


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_and_cache_of_every_family_are_those_of_a_real_forward(family: str) -> None:
    model = make_model(family)
    sizes = measure_model(model.config, "float32")
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sizes.num_bytes() == loaded_bytes([model])
    for length in (1, 5, 12):  # beyond the window of 6 of those that slide
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=random_ids(3, length), past_key_values=cache, use_cache=True)
        real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert 3 * sizes.cache_bytes(length) == real


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_bytes_are_those_of_loaded_models(
    save_member: SaveMember, family: str, method: str, dtype: str
) -> None:
    folder = save_member("m", family, dtype=getattr(torch, dtype))
    files = check_member("x", MemberConfig(str(folder), quantization=Quantization.parse(method)))
    predicted = measure_group([files], "x").weight_bytes(files.config.quantization)
    assert predicted == loaded_bytes(load_group([files]).models.values())


def add_adapter(folder: Path, out: Path, **settings: object) -> Path:
    made = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], **settings)  # type: ignore[arg-type]
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), made).save_pretrained(out)
    return out


@pytest.mark.parametrize("method", [None, "bnb-8bit", "bnb-nf4"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_beside_a_backbone_and_merged(
    save_member: SaveMember, tmp_path: Path, method: str | None, shared: bool, settings: dict[str, object]
) -> None:
    folder = save_member("m")
    adapter = add_adapter(folder, tmp_path / "adapter", **settings)
    quantization = None if method is None else Quantization(method)
    members = {"a": MemberConfig(str(folder), adapter=str(adapter), quantization=quantization)}
    if shared:
        members["b"] = MemberConfig(str(folder), quantization=quantization)
    files: dict[str, MemberFiles] = {role: check_member(role, member) for role, member in members.items()}
    (group,) = group_members(files)
    sizes = measure_group(group, "a")
    assert sizes.roles == tuple(members)
    assert sizes.weight_bytes(quantization) == loaded_bytes(load_group(group).models.values())
    assert sizes.cache_bytes(10, 2) == 10 * 2 * len(members) * sizes.model.cache_per_token


def test_the_dtype_is_what_the_model_is_loaded_in(save_member: SaveMember) -> None:
    folder = save_member("m", dtype=torch.float16)
    config = AutoConfig.from_pretrained(folder)
    for said in ("float16", None):
        config.dtype = said
        config.save_pretrained(folder)
        files = check_member("x", MemberConfig(str(folder)))
        loaded = load_group([files]).models["x"]
        assert f"torch.{member_dtype(files)}" == str(loaded.dtype) == "torch.float16"
    files = check_member("x", MemberConfig(str(folder), dtype="bfloat16"))
    assert member_dtype(files) == "bfloat16"
    assert measure_group([files], "x").weight_bytes() == loaded_bytes(load_group([files]).models.values())


def test_a_checkpoint_that_is_stored_quantised_is_refused() -> None:
    config = published("Llama-2-7B", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(MemberError, match="target_pt: its checkpoint is stored quantised"):
        measure_model(config, "bfloat16", role="target_pt")


def test_windows_and_fixed_states() -> None:
    assert LayerCache(10, window=4, fixed=7).num_bytes(3) == 37
    assert LayerCache(10, window=4, fixed=7).num_bytes(30) == 47


def test_sizes_are_read_and_shown() -> None:
    read = {"24GiB": 24 * 2**30, "80 GB": 80 * 10**9, "512mib": 512 * 2**20, "1.5kB": 1500, "7B": 7}
    assert {text: parse_size(text) for text in read} == read
    assert device_budgets(["1GiB", "2GiB"]) == {"cuda:0": 2**30, "cuda:1": 2**31}
    assert [show_size(number) for number in (0, 1023, 1536, 24 * 2**30)] == ["0 B", "1,023 B", "1.50 KiB", "24.00 GiB"]


@pytest.mark.parametrize(
    "text", ["", "24", "GiB", "-1GiB", "0GiB", "0.0001B", "1e3GiB", "24 GiBs", "nan GiB", "1,5GiB"]
)
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)
