"""The command line of vLLM's server for an ensemble."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ensembler.config import EnsembleConfig
from ensembler.errors import ConfigError
from ensembler.preflight import CheckedEnsemble

LOAD_FORMAT = "ensembler"
DRAIN_SECONDS = 30  # that running requests get to end in after SIGTERM


def model_name(name: str, config: EnsembleConfig) -> str:
    """The name under which an ensemble is served: folder, rule and α, as in 'math:base-change@0.5'."""
    return f"{name}:{config.rule}@{config.alpha:g}"


def serve_command(
    folder: Path, checked: CheckedEnsemble, *, name: str, alpha: float | None, flags: Sequence[str]
) -> list[str]:
    """Return the command for the server; `alpha` is one that differs from the folder's, `flags` are any of vLLM's.

    Ours come first: of a flag that is given twice, vLLM takes the last. Raises ConfigError.
    """
    if any(flag.split("=")[0] == "--config" for flag in flags):
        raise ConfigError(
            "--config was given to vLLM's server, whose other flags would hide some of it; give flags alone"
        )
    command = [sys.executable, "-m", "ensembler.serving.vllm_serve", json.dumps(alpha), "serve", str(folder)]
    command += ["--served-model-name", model_name(name, checked.config), name]
    command += ["--shutdown-timeout", str(DRAIN_SECONDS)]  # vLLM's is 0: open streams would wait for a killed engine
    command += ["--middleware", "ensembler.serving.fixed_alpha.RefuseAlpha"]
    return [*command, *flags]
