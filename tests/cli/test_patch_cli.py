"""`ensembler patch` through click's runner: what is printed, what is written, exit codes and one line for a mistake."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Run
from helpers.patch_cases import edit_json, edit_tensors, exact, save_lora, save_model, weights


@pytest.fixture
def run(run: Run) -> Run:
    """Run `ensembler patch` with these arguments."""
    return functools.partial(run, "patch")


def test_apply_adds_and_says_what_it_wrote(run: Run, tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    result = run("apply", lora, "--to", model, "--output", tmp_path / "out", "--scale", 0.5)
    assert (result.code, result.out) == (0, "")
    assert result.err.startswith(f"{tmp_path / 'out'}: 14 of 21 tensors changed, ")
    truth = exact(model, lora, 0.5)
    for name, weight in weights(tmp_path / "out").items():
        assert (weight.double() - truth[name]).abs().max() <= 1e-6


def test_apply_adds_several_in_one_dtype(run: Run, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    first, second, third = (save_lora(tmp_path / f"lora{seed}", seed=seed) for seed in (1, 2, 3))
    also = ("--also", second, "--also", third, "--scale2", -1, "--scale2", 2)
    result = run("apply", first, *also, "--to", model, "--output", tmp_path / "out", "--dtype", "bfloat16")
    assert result.code == 0, result.err
    parts = [exact(model, lora, scale) for lora, scale in ((first, 1), (second, -1), (third, 2))]
    for name, weight in weights(tmp_path / "out").items():
        truth = sum(part[name] for part in parts) - 2 * weights(model)[name].double()
        assert weight.dtype == torch.bfloat16
        assert (weight.double() - truth).abs().max() <= truth.abs().max() * 2**-8


def test_check_says_whether_it_fits_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    result = run("apply", lora, "--to", model, "--check")
    assert (result.code, result.out) == (0, f"{model}: 14 of 21 tensors change; everything fits\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "model"]
    result = run("apply", lora, "--to", save_model(tmp_path / "small", num_layers=1), "--check")
    assert result.code == 2
    assert "another architecture" in result.error


def test_check_reads_no_weights(run: Run, tmp_path: Path) -> None:
    """Headers and the class built without memory are what makes it an answer in seconds for any size."""
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    edit_tensors(model / "model.safetensors", lambda t: {name: v * float("nan") for name, v in t.items()})
    assert "14 of 21 tensors change; everything fits" in run("apply", lora, "--to", model, "--check").out
    assert "is NaN" in run("apply", lora, "--to", model, "--output", tmp_path / "out").error


def test_another_base_is_noted(run: Run, tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    edit_json(lora / "adapter_config.json", base_model_name_or_path="org/older")
    result = run("apply", lora, "--to", model, "--check")
    expected = f"Note: {lora} was made for org/older; this is {model} (expected where that was updated)\n"
    assert (result.code, result.err) == (0, expected)
    assert "org/older" in run("inspect", lora, "--to", model, "--base", model).err


def test_extract_there_and_back(run: Run, tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    run("apply", lora, "--to", model, "--output", tmp_path / "tuned")
    models = ("--base", model, "--finetuned", tmp_path / "tuned")
    result = run("extract", *models, "--output", tmp_path / "patch", "--rank", 4)
    assert result.code == 0, result.err
    assert "model.layers.0.self_attn.q_proj.weight" in result.out
    assert "14 tensors as low rank, 0 in full beside them, 7 equal; 100.00% of all energy kept" in result.out
    run("apply", tmp_path / "patch", "--to", model, "--output", tmp_path / "again")
    for name, weight in weights(tmp_path / "again").items():
        assert (weight - weights(tmp_path / "tuned")[name]).abs().max() <= 1e-5
    result = run("extract", *models, "--output", tmp_path / "default", "--json")
    content = json.loads(result.out)
    assert 0.95 <= content["energy"] < 1
    assert {row["rank"] for row in content["kept"]} <= {1, 2, 3, 4}


def test_inspect_prints_a_table_json_and_a_picture(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, lora, other = save_model(tmp_path / "model"), save_lora(tmp_path / "a"), save_lora(tmp_path / "b", seed=2)
    result = run("inspect", lora, "--to", model, "--other", other, "--png", tmp_path / "a.png")
    assert result.code == 0, result.err
    assert "model.layers.1.mlp.down_proj.weight" in result.out
    assert "ratio sigma max" in result.out
    assert "only a test on your own data" in result.out.splitlines()[-1]
    assert (tmp_path / "a.png").stat().st_size > 1000
    content = json.loads(run("inspect", lora, "--json").out)
    assert len(content["modules"]) == 14
    assert content["overall"]["num_tensors"] == 14
    assert "patched_frobenius" not in content["overall"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("apply", "LORA", "--to", "MODEL"), "--output is missing"),
        (("apply", "LORA", "--to", "MODEL", "--output", "OUT", "--dtype", "int8"), "unknown dtype 'int8'"),
        (
            ("apply", "LORA", "--to", "MODEL", "--output", "OUT", "--also", "LORA", "--scale2", 1, "--scale2", 2),
            "2 times",
        ),
        (("apply", "LORA", "--to", "MODEL", "--output", "LORA"), "which this command reads"),
        (("apply", "LORA", "--to", "MODEL", "--output", "MODEL", "--overwrite"), "which this command reads"),
        (("apply", "LORA", "--to", "nowhere/at/all", "--output", "OUT"), "there is no folder"),
        (("apply", "LORA", "--to", "org/unknown", "--output", "OUT"), "cannot be reached (offline)"),
        (("apply", "LORA", "--to", "MODEL", "--output", "OUT", "--scale", "nan"), "expected a finite number"),
        (("apply", "LORA", "--output", "OUT"), "Missing option '--to'"),
        (("extract", "--base", "MODEL", "--finetuned", "MODEL", "--output", "OUT"), "nothing to extract"),
        (
            ("extract", "--base", "MODEL", "--finetuned", "MODEL", "--output", "OUT", "--full", "--rank", 2),
            "exactly one",
        ),
        (("inspect", "LORA", "--base", "MODEL"), "--to"),
        (("inspect", "MODEL"), "holds no patch"),
    ],
)
def test_mistakes_are_one_line(args: tuple[Any, ...], message: str, run: Run, tmp_path: Path) -> None:
    places = {"MODEL": save_model(tmp_path / "model"), "LORA": save_lora(tmp_path / "lora"), "OUT": tmp_path / "out"}
    result = run(*[places.get(arg, arg) for arg in args])
    assert result.code == 2
    assert message in result.error
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """The signal comes with the first bytes that are written."""
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    code = (
        "import os, signal, sys; import ensembler.patch.apply as a; from ensembler.cli.main import main\n"
        "blocks = a._blocks\n"
        "def interrupted(*args):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return blocks(*args)\n"
        "a._blocks = interrupted\n"
        f"main(['patch', 'apply', {str(lora)!r}, '--to', {str(model)!r}, '--output', {str(tmp_path / 'out')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr.strip().startswith("Error: interrupted")
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "model"]
