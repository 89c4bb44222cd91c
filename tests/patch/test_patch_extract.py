"""Extraction: against the singular values themselves, and there and back through apply and through PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.patch_cases import FAMILIES, save_lora, save_model, weights
from helpers.tiny import random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from ensembler.errors import ConfigError, PatchError
from ensembler.patch import singular_values
from ensembler.patch.apply import apply_patches
from ensembler.patch.extract import extract_patch
from ensembler.patch.formats import read_patch
from ensembler.patch.patch_plan import plan_patches
from ensembler.patch.singular_values import truncate


def changed(folder: Path, out: Path, *, seed: int = 0, size: float = 0.1, names: str = "") -> Path:
    """The model with noise on all tensors (or those whose name holds `names`)."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(out)
    generator = torch.Generator().manual_seed(seed)
    state = weights(out)
    for name, tensor in state.items():
        if names in name:
            tensor += size * torch.randn(tensor.shape, generator=generator)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 30), columns=st.integers(1, 30), rank=st.integers(1, 35), seed=st.integers(0, 10_000))
def test_the_error_is_the_tail_of_the_singular_values(rows: int, columns: int, rank: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = truncate(matrix, rank=rank, energy=None)
    left, right, energy = found.left, found.right, found.energy
    values = torch.linalg.svdvals(matrix.double()).square()
    tail = values[rank:].sum()
    assert left.shape[1] == right.shape[0] == min(rank, rows, columns)
    assert ((matrix - left @ right).double().square().sum() - tail).abs() <= 1e-5 * values.sum()
    assert energy == pytest.approx(1 - (tail / values.sum()).item(), abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(2, 30), columns=st.integers(2, 30), energy=st.floats(0.05, 1), seed=st.integers(0, 10_000))
def test_energy_takes_the_smallest_rank_that_keeps_it(rows: int, columns: int, energy: float, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = truncate(matrix, rank=None, energy=energy)
    left, kept = found.left, found.energy
    shares = torch.linalg.svdvals(matrix.double()).square()
    shares = shares.cumsum(0) / shares.sum()
    rank = left.shape[1]
    assert shares[rank - 1] >= energy - 1e-5
    assert rank == 1 or shares[rank - 2] < energy + 1e-5
    assert kept == pytest.approx(shares[rank - 1].item(), abs=1e-5)


@pytest.mark.parametrize(("rank", "energy"), [(8, None), (None, 0.9)])
def test_large_matrices_are_decomposed_at_random_and_nearly_as_well(
    rank: int | None, energy: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(singular_values, "_EXACT_SIZE", 100)
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, 301, dtype=torch.float32) ** -1.0
    matrix = (
        torch.randn(400, 300, generator=generator) @ torch.diag(spectrum) @ torch.randn(300, 300, generator=generator)
    )
    found = truncate(matrix, rank=rank, energy=energy)
    left, right, kept = found.left, found.right, found.energy
    values = torch.linalg.svdvals(matrix.double()).square()
    shares = values.cumsum(0) / values.sum()
    num = left.shape[1]
    assert kept == pytest.approx(shares[num - 1].item(), abs=1e-3)
    error = (matrix - left @ right).double().square().sum() / values.sum()
    assert error <= (1 - shares[num - 1]) * 1.02
    assert energy is None or (shares[num - 1] >= energy > shares[num - 3])
    again = truncate(matrix, rank=rank, energy=energy)
    assert torch.equal(again.left, left)


def test_a_spectrum_without_decay_costs_the_randomised_decomposition_a_hundredth() -> None:
    matrix = torch.randn(1100, 1300, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(matrix).double().square()
    for rank in (8, 64, 256):
        found = truncate(matrix, rank=rank, energy=None)
        left, right, kept = found.left, found.right, found.energy
        error = (matrix - left @ right).double().square().sum().sqrt()
        assert 1 - 1e-5 <= error / values[rank:].sum().sqrt() <= 1.01
        assert kept == pytest.approx(1 - (error**2 / values.sum()).item(), abs=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_a_merged_lora_comes_back_at_its_rank(family: str, tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model", family), save_lora(tmp_path / "lora", family, 2, r=3)
    apply_patches([read_patch(lora)], model, tmp_path / "tuned")
    extracted = extract_patch(model, tmp_path / "tuned", tmp_path / "patch", rank=3)
    assert {kept.rank for kept in extracted.kept} == {3}
    assert extracted.energy == pytest.approx(1, abs=1e-6)
    assert not (tmp_path / "patch" / "deltas.safetensors").exists()
    apply_patches([read_patch(tmp_path / "patch")], model, tmp_path / "again")
    expected = weights(tmp_path / "tuned")
    for name, weight in weights(tmp_path / "again").items():
        assert (weight - expected[name]).abs().max() <= 3e-6 * expected[name].abs().max(), name
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "patch").eval()
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").eval()
    with torch.no_grad():
        first, second = loaded(random_ids(2, 8)).logits, tuned(random_ids(2, 8)).logits
    assert (first - second).abs().max() < 1e-4 * second.abs().max()


@pytest.mark.parametrize("limit", [{"rank": 2}, {"energy": 0.7}, {"full": True}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "qwen2"])
def test_every_tensor_is_kept_as_well_as_its_singular_values_allow(
    family: str, limit: dict[str, Any], tmp_path: Path
) -> None:
    base = save_model(tmp_path / "base", family)
    tuned = changed(base, tmp_path / "tuned")
    extracted = extract_patch(base, tuned, tmp_path / "patch", **limit)
    apply_patches([read_patch(tmp_path / "patch")], base, tmp_path / "again")
    old, new, again = weights(base), weights(tuned), weights(tmp_path / "again")
    assert {kept.name for kept in extracted.kept} == set(new)
    total = lost = 0.0
    for kept in extracted.kept:
        delta = (new[kept.name] - old[kept.name]).double()
        error = (new[kept.name] - again[kept.name]).double().square().sum().item()
        tail = 0.0 if kept.rank is None else torch.linalg.svdvals(delta)[kept.rank :].square().sum().item()
        assert error == pytest.approx(tail, abs=1e-5 * delta.square().sum().item()), kept.name
        assert kept.norm == pytest.approx(delta.norm().item(), rel=1e-5)
        if "rank" in limit and kept.rank is not None:
            assert kept.rank == 2
        total, lost = total + kept.norm**2, lost + error
    assert extracted.energy == pytest.approx(1 - lost / total, abs=1e-5)
    in_full = {kept.name for kept in extracted.kept if kept.rank is None}
    assert {name for name in new if "norm" in name or name.endswith("bias")} <= in_full
    embedding = next(name for name in new if "embed" in name and name != "embed_out.weight")
    assert (embedding in in_full) == (family == "gemma2" or "full" in limit)  # Gemma ties it to the output head


def test_peft_loads_what_is_low_rank_and_drops_the_rest(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    tuned = changed(base, tmp_path / "tuned", names="proj")
    extract_patch(base, tuned, tmp_path / "patch", energy=0.8)
    config = json.loads((tmp_path / "patch" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    apply_patches([read_patch(tmp_path / "patch")], base, tmp_path / "ours")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "patch")
    merged = loaded.merge_and_unload().state_dict()
    for name, weight in weights(tmp_path / "ours").items():
        assert (weight - merged[name]).abs().max() <= 1e-6, name


def test_the_record_knows_its_base_by_its_weights(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", shards=True)
    tuned = changed(base, tmp_path / "tuned", names="q_proj")
    extracted = extract_patch(base, tuned, tmp_path / "patch", rank=2)
    assert extracted.num_equal == len(weights(base)) - 2
    record = json.loads((tmp_path / "patch" / "patch.json").read_text())
    assert (record["base"], record["finetuned"], record["num_equal"]) == ("../base", "tuned", extracted.num_equal)
    assert [row["rank"] for row in record["kept"]] == [2, 2]
    base.rename(tmp_path / "renamed")
    assert plan_patches([read_patch(tmp_path / "patch")], tmp_path / "renamed").warnings == ()
    assert len(plan_patches([read_patch(tmp_path / "patch")], tuned).warnings) == 1


def test_half_precision_on_both_sides(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(tmp_path / "wide")
    tuned = changed(tmp_path / "wide", tmp_path / "tuned")
    extract_patch(base, tuned, tmp_path / "patch", full=True, dtype="bfloat16")
    assert {delta.dtype for delta in weights(tmp_path / "patch").values()} == {torch.bfloat16}
    apply_patches([read_patch(tmp_path / "patch", scale=0.5)], base, tmp_path / "half", dtype="float32")
    old, new = weights(base), weights(tuned)
    for name, weight in weights(tmp_path / "half").items():
        middle = (old[name].float() + new[name]) / 2
        assert (weight - middle).abs().max() <= (new[name] - old[name].float()).abs().max() * 2**-9 + 1e-6


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({}, "exactly one"),
        ({"rank": 2, "full": True}, "exactly one"),
        ({"rank": 0}, "the rank is 0"),
        ({"energy": 1.5}, "the energy is 1.5"),
    ],
)
def test_limits_that_make_no_sense(limit: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        extract_patch(tmp_path, tmp_path, tmp_path / "patch", **limit)


def test_models_without_a_difference(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    cases = {
        "same weights": save_model(tmp_path / "same"),
        "lm_head.weight": save_model(tmp_path / "tied", tie_word_embeddings=True),
        "model.layers.1.input_layernorm.weight": save_model(tmp_path / "small", num_layers=1),
        r"has shape \(70, 16\)": save_model(tmp_path / "wide", vocab_size=70),
    }
    for message, model in cases.items():
        with pytest.raises(PatchError, match=message):
            extract_patch(base, model, tmp_path / "patch", rank=2)
        assert not (tmp_path / "patch").exists()


def test_nan_in_a_model(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    tuned = changed(base, tmp_path / "tuned", names="up_proj", size=float("nan"))
    with pytest.raises(PatchError, match=r"up_proj\.weight holds NaN"):
        extract_patch(base, tuned, tmp_path / "patch", rank=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]
