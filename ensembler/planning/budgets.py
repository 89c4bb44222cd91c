"""Memory budgets: sizes as people write them, and what this machine has."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ensembler.errors import ConfigError

_DECIMAL = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BINARY = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
UNITS = {**_DECIMAL, **_BINARY}


def parse_size(text: str) -> int:
    """Return bytes of a size like '24GiB', '80 GB' or '512MiB'. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    unit = UNITS.get(match.group(2).lower()) if match else None
    num_bytes = int(float(match.group(1)) * unit) if match and unit else 0
    if not num_bytes:
        raise ConfigError(f"{text!r} is not a size; expected a number above 0 and a unit: 24GiB, 80GB, 512MiB")
    return num_bytes


def show_size(num_bytes: float) -> str:
    """Return a number of bytes in binary units: '13.5 GiB'."""
    for unit, factor in reversed(_BINARY.items()):
        if abs(num_bytes) >= factor:
            return f"{num_bytes / factor:,.2f} {unit[0].upper()}iB"
    return f"{num_bytes:,.0f} B"


def show_digits(number: float) -> str:
    """Return a number with three significant digits: '0.0123', '1,230'."""
    return f"{float(f'{number:.3g}'):z,g}"


def gpu_budgets(sizes: Sequence[str]) -> dict[str, int]:
    """Bytes by device for sizes that were given: the first is that of cuda:0."""
    return {f"cuda:{number}": parse_size(text) for number, text in enumerate(sizes)}


def machine_budgets() -> dict[str, int]:
    """Bytes that are free on each GPU of this machine, or in its memory ('cpu') where it has none."""
    import torch

    if torch.cuda.is_available():
        return {f"cuda:{number}": torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())}
    import psutil  # accelerate brings it

    return {"cpu": int(psutil.virtual_memory().available)}
