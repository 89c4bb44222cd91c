"""`ensembler.score`: the rows of `ensembler score`, from Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Run
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import ensembler
from ensembler import EnsembleForCausalLM
from ensembler.errors import ConfigError, MemberError, PromptError

ROWS: list[dict[str, Any]] = [
    {"prompt": "abc", "continuation": " de", "id": 7},
    {"prompt": "the cat ", "choices": ["sat", "ran", "sang"]},
    {"text": "a text of some length"},
    {"prompt": "", "continuation": "x"},
]


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    EnsembleForCausalLM.from_members(rule="eft", alpha=0.4, members=folders).save_pretrained(tmp_path / "ens")
    return tmp_path / "ens"


@pytest.mark.parametrize("per_token", [False, True])
def test_rows_are_those_of_the_command(folder: Path, run: Run, tmp_path: Path, per_token: bool) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = ["--alpha", "0,0.6", "--batch-size", 2, *(["--per-token"] if per_token else [])]
    result = run("score", folder, "--data", data, "--json", *flags)
    assert result.code == 0, result.err
    written = sorted(map(json.loads, result.out.splitlines()), key=lambda row: row["number"])
    for model in (folder, str(folder), EnsembleForCausalLM.from_pretrained(folder)):
        found = ensembler.score(model, iter(ROWS), alpha=[0, 0.6], batch_size=2, per_token=per_token)
        assert [row["number"] for row in found] == [0, 1, 2, 3]
        assert found == [{key: row[key] for key in found[row["number"]]} for row in written]
        assert len(found[1]["choices"]) == 3
        assert ("token_log_probs" in found[0]) == per_token


def test_alpha_is_the_ensembles_or_a_number(folder: Path) -> None:
    (own,), (other,) = ensembler.score(folder, ROWS[:1]), ensembler.score(folder, ROWS[:1], alpha=0.9)
    assert (own["alpha"], other["alpha"]) == ([0.4], [0.9])
    assert own["log_prob"] != other["log_prob"]


def test_what_cannot_be_scored(
    folder: Path, trio: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = EnsembleForCausalLM.from_pretrained(folder)
    with pytest.raises(PromptError, match=r"rows\[1\] has no continuation and no choices"):
        ensembler.score(model, [ROWS[0], {"prompt": "a"}])
    for alpha in ("0.5", ["0.5"], -1, [0.5, None]):
        with pytest.raises(ConfigError, match="alpha is"):
            ensembler.score(model, ROWS, alpha=alpha)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the grid is empty"):
        ensembler.score(model, ROWS, alpha=[])
    model.alpha = torch.tensor([0.1, 0.2])
    with pytest.raises(ConfigError, match="alpha is"):
        ensembler.score(model, ROWS)
    loaded = EnsembleForCausalLM.from_members(members=trio)
    with pytest.raises(MemberError, match=r"set model\.tokenizer"):
        ensembler.score(loaded, ROWS)
    loaded.tokenizer = tokenizer
    assert len(ensembler.score(loaded, ROWS)) == 4
