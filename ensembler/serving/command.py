"""The command line of vLLM's server for an ensemble."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ensembler.config import EnsembleConfig
from ensembler.preflight import CheckedEnsemble
from ensembler.serving.checks import common_dtype

LOAD_FORMAT = "ensembler"
DRAIN_SECONDS = 30  # that running requests get to end in after SIGTERM


def model_name(name: str, config: EnsembleConfig) -> str:
    """The name under which an ensemble is served: folder, rule and α, as in 'math:base-change@0.5'."""
    return f"{name}:{config.rule}@{config.alpha:g}"


def serve_command(
    folder: Path, checked: CheckedEnsemble, *, name: str, alpha: float | None, flags: Sequence[str]
) -> list[str]:
    """Return the command for the server; `alpha` is one that differs from the folder's, `flags` are any of vLLM's.

    Raises ConfigError where members differ in dtype and `flags` name none.
    """
    command = [sys.executable, "-m", "ensembler.serving.vllm_serve", "serve", str(folder), "--load-format", LOAD_FORMAT]
    if not _has(flags, "--served-model-name"):
        command += ["--served-model-name", model_name(name, checked.config), name]
    if not _has(flags, "--dtype"):
        command += ["--dtype", common_dtype(checked)]
    command += ["--middleware", "ensembler.serving.fixed_alpha.RefuseAlpha"]
    if not _has(flags, "--shutdown-timeout"):  # vLLM's own is 0: open streams would wait for ever for a killed engine
        command += ["--shutdown-timeout", str(DRAIN_SECONDS)]
    if alpha is not None:
        command += ["--hf-overrides", json.dumps({"alpha": alpha})]
    return [*command, *flags]


def _has(flags: Sequence[str], name: str) -> bool:
    return any(flag.split("=")[0] == name for flag in flags)
