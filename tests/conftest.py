"""Fixtures: tiny models and tokenizers in memory and saved in folders. Everything runs offline."""

from __future__ import annotations

import gc
import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers, huggingface_hub and datasets are imported
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models, here and in the processes that a test starts

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers.commands import Result, Run, SaveMember
from helpers.tiny import make_model, make_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ensembler import EnsembleForCausalLM
from ensembler.cli import main as cli_main

torch.set_num_threads(1)  # tiny models: more threads only wait for each other


def pytest_collection_finish() -> None:
    gc.freeze()  # a full collection, with which each run and sweep ends, need not go through all that was imported


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def trio() -> dict[str, PreTrainedModel]:
    """Three members of different families and sizes, by the roles of base-change and EFT."""
    return {
        "source_ft": make_model("llama", 1),
        "source_pt": make_model("mistral", 2, hidden_size=24, num_layers=1),
        "target_pt": make_model("gpt2", 3, hidden_size=32, num_layers=3),
    }


@pytest.fixture(scope="session")
def base_change(trio: dict[str, PreTrainedModel]) -> EnsembleForCausalLM:
    """Base-change of `trio` at α = 0.7. Shared by the session: a test that changes it uses `fresh` instead."""
    return EnsembleForCausalLM.from_members(rule="base-change", alpha=0.7, members=trio)


@pytest.fixture
def fresh(trio: dict[str, PreTrainedModel]) -> EnsembleForCausalLM:
    """The same ensemble, made for one test."""
    return EnsembleForCausalLM.from_members(rule="base-change", alpha=0.7, members=trio)


@pytest.fixture
def save_member(tmp_path: Path) -> SaveMember:
    """A function that saves a tiny model in `tmp_path / name`, with a tokenizer beside it (None: without)."""

    def save(name: str, family: str = "llama", seed: int = 0, *, tokenizer: Any = "default", **settings: Any) -> Path:
        dtype = settings.pop("dtype", torch.float32)
        make_model(family, seed, **settings).to(dtype).save_pretrained(tmp_path / name)
        chosen = make_tokenizer() if tokenizer == "default" else tokenizer
        if chosen is not None:
            chosen.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def folders(save_member: SaveMember) -> dict[str, Path]:
    """Three saved members, by the roles of base-change and EFT."""
    return {
        "source_ft": save_member("m_source_ft", "llama", 1),
        "source_pt": save_member("m_source_pt", "llama", 2),
        "target_pt": save_member("m_target_pt", "qwen2", 3, hidden_size=24),
    }


@pytest.fixture
def run() -> Run:
    """Run the command line in this process, errors and exit codes included."""

    def run(*args: object, stdin: str | None = None) -> Result:
        runner = CliRunner()
        with runner.isolation(input=stdin) as (out, err, _):
            try:
                cli_main.main([str(arg) for arg in args])
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
        return Result(code, out.getvalue().decode(), err.getvalue().decode())

    return run


@pytest.fixture
def members(folders: dict[str, Path]) -> list[str]:
    names = {"source_ft": "--source-ft", "source_pt": "--source-pt", "target_pt": "--target-pt"}
    return [part for role, option in names.items() for part in (option, str(folders[role]))]


@pytest.fixture
def said() -> Any:
    """The lines that the package logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ensembler")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
