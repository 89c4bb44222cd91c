"""Patches on a device: blocks of megabytes, no sums left on the CPU, one wait for a tensor; batches, error bounds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Run
from helpers.patch_cases import save_lora, save_model, weights
from helpers.quantized_models import KINDS, SIZE, parts_of, quantize_folder, read_tensors
from safetensors.torch import save_file
from torch import Tensor

from ensembler.errors import RunError
from ensembler.patch import extract, patch_device
from ensembler.patch.addition import SumCheck, WeightUpdate, patched, planned_update
from ensembler.patch.apply import apply_patches
from ensembler.patch.extract import extract_patch
from ensembler.patch.formats import read_patch
from ensembler.patch.patch_plan import plan_patches
from ensembler.patch.requantize import Loss, requantized
from ensembler.patch.schemes import mxfp4
from ensembler.patch.schemes.scheme import Scheme, power_of_two
from ensembler.patch.singular_values import truncate
from ensembler.patch.verify import verify_applied
from ensembler.safetensors_files import read_model

CUDA, META = torch.device("cuda"), torch.device("meta")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MODULE = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "plain", dtype=torch.bfloat16, **SIZE)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    targets = ["q_proj", "v_proj", "down_proj"]
    return save_lora(tmp_path_factory.mktemp("patches") / "lora", size=SIZE, target_modules=targets)


def assert_one_rounding_apart(found: Path, expected: Path) -> None:
    """Two sums in fp32 may be rounded to neighbours in bf16, rarely."""
    wanted = weights(expected)
    for name, tensor in weights(found).items():
        apart = (tensor.float() - wanted[name].float()).abs()
        assert (apart <= wanted[name].float().abs() * 2**-7).all(), name
        assert (apart > 0).double().mean() <= 1e-2, name


@pytest.mark.parametrize("block", [1024, 2**23])
def test_other_blocks_are_one_rounding_apart_and_verified_by_their_own(
    block: int, plain: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply_patches([read_patch(lora)], plain, tmp_path / "as-ever")
    monkeypatch.setattr(patch_device, "BLOCK_ELEMENTS", block)
    apply_patches([read_patch(lora)], plain, tmp_path / "out")
    assert_one_rounding_apart(tmp_path / "out", tmp_path / "as-ever")
    plan = plan_patches([read_patch(lora)], plain)
    done = verify_applied(plan, tmp_path / "out")
    assert done.num_tensors == len(weights(plain))


def test_a_block_on_a_device_is_tens_of_megabytes() -> None:
    assert patch_device.block_elements(torch.device("cpu")) * 4 == 2**19
    assert 2**24 <= patch_device.block_elements(CUDA) * 4 <= 2**26


def test_the_sum_is_made_on_the_device_and_waits_for_it_once(plain: Path, lora: Path) -> None:
    """A tensor on `meta` refuses factors on the CPU, and any look at its values, as a wait for a GPU would be."""
    plan = plan_patches([read_patch(lora)], plain)
    name = f"{MODULE}.weight"
    update = planned_update(plan, name).to(META)
    assert update.left is not None
    assert (update.left.device.type, update.left.shape[0]) == ("meta", weights(plain)[name].shape[0])
    check = SumCheck(update, torch.bfloat16)
    for start in (0, 16, 32):
        block = torch.empty(16, SIZE["intermediate_size"], dtype=torch.bfloat16, device=META)
        assert patched(block, update, dtype=torch.bfloat16, start=start, check=check).device.type == "meta"
    with pytest.raises(RuntimeError, match="meta tensors"):
        check.close()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fp8-whole"])
def test_quantising_again_waits_for_the_device_at_the_end(
    kind: str, plain: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patch_device, "_DEVICE_ELEMENTS", 2048)
    plan = plan_patches([read_patch(lora)], quantize_folder(plain, tmp_path / kind, kind))
    weight = plan.quantized[f"{MODULE}.weight"]
    found: list[Tensor] = []
    with pytest.raises(RuntimeError, match="meta tensors"):  # noqa: PT012 - the generator raises at its end
        for _, _, rows in requantized(weight, planned_update(plan, weight.name), Loss(), device=META):
            found.append(rows)
    assert {rows.device.type for rows in found} == {"meta"}
    assert len(found) >= len(list(weight.blocks(2048)))


@pytest.mark.parametrize("kind", [*KINDS, "mxfp4"])
def test_no_scheme_keeps_constants_on_the_cpu(kind: str, plain: Path, tmp_path: Path) -> None:
    scheme: Scheme = mxfp4.MXFP4()
    parts = {mxfp4.BLOCKS: torch.ones(8, 32, dtype=torch.uint8), mxfp4.SCALES: torch.ones(8, 2, dtype=torch.uint8)}
    if kind != "mxfp4":
        scheme, parts = parts_of(read_tensors(quantize_folder(plain, tmp_path / kind, kind)), kind, MODULE)
    there = {name: part.to(META) for name, part in parts.items()}
    values = scheme.dequantize(there)
    assert values.device.type == "meta"
    for name, part in scheme.quantize(values, there, 1.0).items():
        assert (part.device.type, part.numel()) == ("meta", parts[name].numel()), name
    assert {table.device.type for table in mxfp4._tables(META)} == {"meta"}


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(-127, 128, dtype=torch.int32)
    assert power_of_two(exponents).tolist() == [2.0**exponent for exponent in range(-127, 128)]


# -- extraction --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "tuned"
    state = {name: tensor.clone() for name, tensor in weights(plain).items()}
    out.mkdir()
    for file in plain.iterdir():
        if file.name != "model.safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if "layers.1.self_attn.q_proj" not in name:  # one that stays, within a batch
            tensor += (0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("limit", [{"rank": 3}, {"energy": 0.8}], ids=str)
def test_batches_of_one_shape_give_the_factors_of_one_by_one(
    limit: dict[str, Any], plain: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = extract_patch(plain, tuned, tmp_path / "alone", **limit)
    batches = extract._batches
    used: list[list[str]] = []

    def as_on_a_gpu(new: Any, kinds: Any, device: torch.device) -> Iterator[list[str]]:
        used.extend(batches(new, kinds, CUDA))
        yield from used

    monkeypatch.setattr(extract, "_batches", as_on_a_gpu)
    together = extract_patch(plain, tuned, tmp_path / "together", **limit)
    assert max(map(len, used)) > 1
    assert sorted(name for batch in used for name in batch) == sorted(read_model(tuned).tensors)
    wanted = {kept.name: kept for kept in alone.kept}
    assert {kept.name for kept in together.kept} == set(wanted)
    for kept in together.kept:
        other = wanted[kept.name]
        assert (kept.rank, kept.bound) == (other.rank, None)
        assert kept.energy == pytest.approx(other.energy, abs=1e-6)
    for out in ("alone", "together"):
        apply_patches([read_patch(tmp_path / out)], plain, tmp_path / f"{out}-applied", dtype="float32")
    mine, theirs = weights(tmp_path / "together-applied"), weights(tmp_path / "alone-applied")
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in theirs) <= 1e-5


def test_a_batch_has_a_limit_and_large_matrices_go_alone(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = read_model(tuned)
    kinds = {name: "linear" for name in model.tensors if name.endswith("_proj.weight")}
    largest = max(model.tensors[name].num_elements for name in kinds)
    monkeypatch.setattr(extract, "_BATCH_ELEMENTS", largest)
    assert all(
        sum(model.tensors[name].num_elements for name in batch) <= largest
        for batch in extract._batches(model, kinds, CUDA)
    )
    monkeypatch.undo()
    monkeypatch.setattr("ensembler.patch.singular_values._EXACT_SIZE", 0)
    assert all(len(batch) == 1 for batch in extract._batches(model, kinds, CUDA))


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_bound_of_randomised_factors_holds_and_the_energy_is_measured(
    decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ensembler.patch.singular_values._EXACT_SIZE", 100)
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, 301, dtype=torch.float32) ** -decay
    matrix = torch.randn(400, 300, generator=generator) * spectrum
    values = torch.linalg.svdvals(matrix)
    for rank in (4, 16, 40):
        found = truncate(matrix, rank=rank, energy=None)
        rest = (matrix - found.left @ found.right).double()
        assert found.bound is not None
        assert float(torch.linalg.matrix_norm(rest, 2)) <= found.bound * float(values[rank])
        assert 2 < found.bound < 3
        lost = float(rest.square().sum() / matrix.double().square().sum())
        assert found.energy == pytest.approx(1 - lost, abs=1e-5)
    assert truncate(matrix, rank=100, energy=None).bound is None


def test_the_bound_is_printed(
    run: Run, plain: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ensembler.patch.singular_values._EXACT_SIZE", 32)
    done = run("patch", "extract", "--base", plain, "--finetuned", tuned, "--output", tmp_path / "p", "--rank", 2)
    assert done.code == 0, done.err
    assert "large deltas were decomposed at random: the energy kept is measured" in done.out.replace("\n", " ")


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:99"])
def test_a_device_that_is_not_there(run: Run, name: str, plain: Path, tuned: Path, lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for command in (
        ("apply", lora, "--to", plain, "--output", out),
        ("verify", plain, lora, tuned),
        ("extract", "--base", plain, "--finetuned", tuned, "--output", out),
    ):
        done = run("patch", *command, "--device", name)
        assert done.code == 2
        assert done.error.startswith(f"Error: --device {name}: there is no such device for patches here (")
        assert not out.exists()


def test_memory_of_a_device_that_does_not_do_is_told() -> None:
    with pytest.raises(RunError, match="cuda has too little memory free"), patch_device.memory_of(CUDA):
        raise torch.OutOfMemoryError


@needs_gpu
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_gpu_writes_what_the_cpu_does_but_for_rounding(
    kind: str | None, plain: Path, lora: Path, tmp_path: Path
) -> None:
    model = plain if kind is None else quantize_folder(plain, tmp_path / kind, kind)
    for device in (torch.device("cpu"), CUDA):
        applied = apply_patches([read_patch(lora)], model, tmp_path / device.type, device=device)
        verify_applied(plan_patches([read_patch(lora)], model), tmp_path / device.type, device=device)
        assert all(0 <= share < 10 for share in applied.losses.values())
    if kind is None:
        assert_one_rounding_apart(tmp_path / "cuda", tmp_path / "cpu")
        return
    found, wanted = read_tensors(tmp_path / "cuda"), read_tensors(tmp_path / "cpu")
    for name, tensor in wanted.items():
        assert (found[name].view(torch.uint8) != tensor.view(torch.uint8)).double().mean() <= 1e-2, name


@needs_gpu
def test_a_gpu_extracts_what_the_cpu_does(plain: Path, tuned: Path, tmp_path: Path) -> None:
    shares = [
        extract_patch(plain, tuned, tmp_path / device, rank=4, device=torch.device(device)).energy
        for device in ("cpu", "cuda")
    ]
    assert shares[1] == pytest.approx(shares[0], abs=1e-4)


def test_an_update_without_factors_is_moved(plain: Path) -> None:
    assert WeightUpdate().to(META) == WeightUpdate()
