"""Norms of patches against the definition, in float64 and from the products that the code avoids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.patch_cases import exact, save_lora, save_model, weights
from helpers.quantized_models import quantize_folder
from helpers.tiny import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ensembler.errors import ConfigError, PatchError
from ensembler.patch.apply import apply_patches
from ensembler.patch.extract import extract_patch
from ensembler.patch.formats import read_patch
from ensembler.patch.geometry import Delta, inspect_patch, save_heatmap, size_of_matrix


def sigma(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix.double())[0])


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 30), columns=st.integers(1, 30), rank=st.integers(1, 6), seed=st.integers(0, 10_000))
def test_sizes_from_factors_are_those_of_the_product(rows: int, columns: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def factors(rank: int) -> Delta:
        return Delta(torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator))

    first, second = factors(rank), factors(3)
    a, b = (delta.added_to(torch.zeros(rows, columns)).double() for delta in (first, second))
    size = first.size()
    assert size.frobenius == pytest.approx(float(a.norm()), rel=1e-5)
    assert size.sigma_max == pytest.approx(sigma(a), rel=1e-5)
    assert size.effective_rank is not None
    assert 1 - 1e-9 <= size.effective_rank <= min(rank, rows, columns) + 1e-6
    for minuend in (first, Delta(None, a.float())):
        for subtrahend in (second, Delta(None, b.float())):
            residual = minuend.minus(subtrahend).size()
            assert residual.frobenius == pytest.approx(float((a - b).norm()), rel=1e-4, abs=1e-5)
            assert residual.sigma_max == pytest.approx(sigma(a - b), rel=1e-4, abs=1e-5)
    matrix = torch.randn(rows, columns, generator=generator)
    scale = float(a.norm() * matrix.norm())
    for delta in (first, Delta(None, a.float())):
        assert delta.inner(matrix) == pytest.approx(float((a * matrix).sum()), abs=1e-5 * scale)


@pytest.mark.parametrize("full", [False, True])
def test_a_base_and_a_model_that_name_their_tensors_otherwise(full: bool, tmp_path: Path) -> None:
    """One saved without its head has no prefix in its files: the figures are those of two whole models."""
    for name, seed in (("old", 1), ("new", 2)):
        save_model(tmp_path / name, seed=seed)
        make_model("llama", seed).base_model.save_pretrained(tmp_path / f"{name}-bare")
    patch = save_lora(tmp_path / "lora", target_modules=["q_proj", "down_proj"])
    if full:
        apply_patches([read_patch(patch)], tmp_path / "old", tmp_path / "tuned")
        extract_patch(tmp_path / "old", tmp_path / "tuned", patch := tmp_path / "full", full=True)
    expected = inspect_patch(read_patch(patch), model=tmp_path / "new", base=tmp_path / "old").overall()
    assert expected["update_frobenius"] > 1
    for model, base in (("new", "old-bare"), ("new-bare", "old"), ("new-bare", "old-bare")):
        found = inspect_patch(read_patch(patch), model=tmp_path / model, base=tmp_path / base).overall()
        assert found == pytest.approx(expected, rel=1e-6), (model, base)


def test_effective_rank_counts_equal_directions() -> None:
    left, right = torch.eye(10)[:, :4], torch.eye(12)[:4]
    assert Delta(left, right).size().effective_rank == pytest.approx(4)
    assert Delta(torch.zeros(5, 2), torch.ones(2, 3)).size().frobenius == 0


@pytest.mark.parametrize("shape", [(300, 200), (129, 400), (1, 9), (200, 1)])
def test_the_largest_singular_value_of_large_and_odd_matrices(shape: tuple[int, int]) -> None:
    pytest.importorskip("scipy")
    matrix = torch.randn(shape)
    assert size_of_matrix(matrix).sigma_max == pytest.approx(sigma(matrix), rel=1e-5)


def test_table_1_of_a_patch(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", seed=1)
    update, patch, other = (save_lora(tmp_path / f"lora{seed}", seed=seed, r=seed + 1) for seed in (1, 2, 3))
    apply_patches([read_patch(update)], base, tmp_path / "updated")
    report = inspect_patch(read_patch(patch), model=tmp_path / "updated", base=base, other=read_patch(other))
    theta, updated = weights(base), weights(tmp_path / "updated")
    mine, theirs = exact(base, patch), exact(base, other)
    assert len(report.modules) == 14
    squares = inners = changes = 0.0
    for row in report.modules:
        delta = mine[row.name] - theta[row.name].double()
        residual = theirs[row.name] - mine[row.name]
        change = updated[row.name].double() - theta[row.name].double()
        patched = updated[row.name].double() + delta
        assert row.rank == 3
        assert row.patched is not None
        assert row.residual is not None
        for size, truth in ((row.patch, delta), (row.patched, patched), (row.residual, residual)):
            assert size.frobenius == pytest.approx(float(truth.norm()), rel=1e-5)
            assert size.sigma_max == pytest.approx(sigma(truth), rel=1e-5)
        assert row.update == pytest.approx(float(change.norm()), rel=1e-5)
        assert row.cosine == pytest.approx(float((delta * change).sum() / delta.norm() / change.norm()), abs=1e-5)
        assert row.rounding_share == 0  # fp32
        squares, changes = squares + float(delta.norm() ** 2), changes + float(change.norm() ** 2)
        inners += float((delta * change).sum())
    overall = report.overall()
    assert overall["patch_frobenius"] == pytest.approx(squares**0.5, rel=1e-5)
    assert overall["cosine"] == pytest.approx(inners / (squares * changes) ** 0.5, abs=1e-5)
    assert overall["ratio_sigma_max"] == overall["patched_sigma_max"] / overall["residual_sigma_max"]
    assert "times the residual" in report.advice()
    assert json.dumps(report.to_dict())


def test_what_rounding_loses(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", dtype=torch.bfloat16)
    lora = save_lora(tmp_path / "lora")
    for row in inspect_patch(read_patch(lora), model=model).modules:
        truth = exact(model, lora)[row.name]
        delta = truth - weights(model)[row.name].double()
        lost = float((truth.float().bfloat16().double() - truth).norm() / delta.norm())
        assert row.rounding_share == pytest.approx(lost, rel=1e-3)


def test_the_patch_itself_and_its_opposite_in_direction(tmp_path: Path) -> None:
    base, lora = save_model(tmp_path / "base"), save_lora(tmp_path / "lora")
    for scale in (1.0, -0.5):
        out = tmp_path / f"updated{scale}"
        apply_patches([read_patch(lora, scale=scale)], base, out)
        overall = inspect_patch(read_patch(lora), model=out, base=base, other=read_patch(lora)).overall()
        assert overall["cosine"] == pytest.approx(scale / abs(scale), abs=1e-5)
        assert overall["update_frobenius"] == pytest.approx(abs(scale) * overall["patch_frobenius"], rel=1e-4)
        assert overall["residual_frobenius"] <= 1e-5 * overall["patch_frobenius"]


def test_full_deltas_are_measured_too(tmp_path: Path) -> None:
    base, lora = save_model(tmp_path / "base"), save_lora(tmp_path / "lora")
    apply_patches([read_patch(lora)], base, tmp_path / "tuned")
    extract_patch(base, tmp_path / "tuned", tmp_path / "full", full=True)
    extract_patch(base, tmp_path / "tuned", tmp_path / "low", rank=4)
    dense, low, given_ = (
        inspect_patch(read_patch(path)).overall() for path in (tmp_path / "full", tmp_path / "low", lora)
    )
    for key in ("patch_frobenius", "patch_sigma_max"):
        assert dense[key] == pytest.approx(given_[key], rel=1e-4)
        assert low[key] == pytest.approx(given_[key], rel=1e-4)
    both = inspect_patch(read_patch(tmp_path / "low"), other=read_patch(tmp_path / "full")).overall()
    assert both["residual_frobenius"] < 1e-4 * given_["patch_frobenius"]


def test_a_heat_map_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora", target_modules=["q_proj", "lm_head"])
    save_heatmap(inspect_patch(read_patch(lora), model=model), tmp_path / "patch.png")
    assert (tmp_path / "patch.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["fp8-blocks", "int4-rows"])
def test_norms_are_those_of_plain_weights(kind: str, plain: Path, lora: Path, tmp_path: Path) -> None:
    model = quantize_folder(plain, tmp_path / "model", kind)
    for models in ({"model": model}, {"model": plain, "base": model}):
        with pytest.raises(PatchError, match=r"is quantised \(model\.layers\.0.*norms are those of plain weights"):
            inspect_patch(read_patch(lora), **models)
    assert inspect_patch(read_patch(lora)).modules


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    with pytest.raises(ConfigError, match="--to"):
        inspect_patch(read_patch(lora), base=model)
    other = save_lora(tmp_path / "other", target_modules=["q_proj"])
    with pytest.raises(PatchError, match="different tensors"):
        inspect_patch(read_patch(lora), other=read_patch(other))
    with pytest.raises(PatchError, match="another architecture"):
        inspect_patch(read_patch(lora), model=save_model(tmp_path / "small", num_layers=1))
