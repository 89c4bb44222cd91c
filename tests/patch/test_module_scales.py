"""Strengths of a patch by patterns of its modules: what is added, and a sentence for a mistake."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.commands import Run
from helpers.patch_cases import exact, save_lora, save_model, weights


@pytest.fixture
def run(run: Run) -> Run:
    """Run `ensembler patch` with these arguments."""
    return functools.partial(run, "patch")


def test_scale_by_pattern(run: Run, tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    out = tmp_path / "out"
    scales = ("--scale", "0.8", "--scale", "down_proj=0.5", "--scale", "*layers.1.*=-2")
    result = run("apply", lora, "--to", model, "--output", out, *scales)
    assert result.code == 0, result.err
    by_scale = {scale: exact(model, lora, scale) for scale in (0.8, 0.5, -2.0)}
    for name, weight in weights(out).items():
        scale = -2.0 if "layers.1." in name else 0.5 if "down_proj" in name else 0.8
        assert (weight.double() - by_scale[scale][name]).abs().max() <= 2e-6, name
    assert "down_proj 0.5, *layers.1.* -2" in (out / "README.md").read_text("utf-8")
    assert run("verify", model, lora, out, *scales).code == 0
    assert run("verify", model, lora, out).code == 1


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (("down_prj=0.5",), "--scale down_prj matches no module that the patch changes; did you mean down_proj?"),
        (("much",), "'much' is no number and no PATTERN=NUMBER"),
        (("=2",), "names no module before ="),
        (("1", "2"), "given 2 times for all modules"),
        (("up_proj=1", "up_proj=2"), "is given twice"),
        (("up_proj=nan",), "expected a finite number"),
    ],
)
def test_scales_that_cannot_be(scale: Sequence[str], said: str, run: Run, tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    given_scales = [word for each in scale for word in ("--scale", each)]
    result = run("apply", lora, "--to", model, "--check", *given_scales)
    assert (result.code, said in result.error) == (2, True), result.err
