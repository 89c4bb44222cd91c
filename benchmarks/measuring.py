"""Common to all measurements: where they were made, rows that are appended, spreads, memory of a process."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers

from ensembler import __version__

RESULTS = Path(__file__).parent / "results"


def _versions() -> dict[str, str]:
    return {"ensembler": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _machine() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The machine and the time of a row; a benchmark's row adds its own fields."""

    threads: int = field(default_factory=torch.get_num_threads)
    machine: str = field(default_factory=_machine)
    versions: dict[str, str] = field(default_factory=_versions)
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))

    def append(self, path: Path) -> None:
        """Add the row to a file of JSON lines."""
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self)) + "\n")


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest."""
    return round(min(values), 4), round(max(values), 4)


def resident_mb() -> float:
    """The largest resident size of this process so far; getrusage would count that of the process which started it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024 / 1e6


def printed_by(script: str, *arguments: object) -> float:
    """The number that a fresh process of `script` prints: the peak memory of one way, say."""
    command = [sys.executable, script, *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
