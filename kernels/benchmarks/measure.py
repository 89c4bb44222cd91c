"""What the benchmarks share: interleaved timing, and a result as one dataclass = one JSON line."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One measured operation. Times are seconds per call, bandwidths GB/s; `speedup` is against `baseline`."""

    operation: str
    impl: str
    device: str
    threads: int
    dtype: str
    rows: int
    width: int
    members: int
    num_alphas: int
    repeats: int
    median: float
    lower_quartile: float
    upper_quartile: float
    bytes_moved: int
    bandwidth: float
    copy_bandwidth: float
    baseline: str
    baseline_median: float
    baseline_lower_quartile: float
    baseline_upper_quartile: float
    speedup: float
    torch: str
    measured_at: str

    def append_to(self, path: Path) -> None:
        """Add this row to a file of JSON lines."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self)) + "\n")

    def __str__(self) -> str:
        case = f"{self.operation:<22} {self.impl:<9} {self.dtype:<8} {self.rows:>3} × {self.width:<7}"
        spread = f"[{1e3 * self.lower_quartile:.3f}, {1e3 * self.upper_quartile:.3f}]"
        speed = f"{self.bandwidth:6.2f} GB/s (copy {self.copy_bandwidth:.1f})"
        time = f"threads {self.threads}  {1e3 * self.median:8.3f} ms {spread:<18}"
        return f"{case} {time} {speed}  {self.speedup:5.1f} × {self.baseline}"


@dataclass(frozen=True)
class Spread:
    """Quartiles of seconds per call."""

    lower: float
    median: float
    upper: float


def interleaved(calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, Spread]:
    """Time the calls in turn, `repeats` rounds after one to warm up, so that a disturbance meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            _synchronise(device)
            start = time.perf_counter()
            call()
            _synchronise(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: Spread(*statistics.quantiles(times[1:], n=4)) for name, times in seconds.items()}


def make_row(
    operation: str,
    impl: str,
    members: list[Tensor],
    num_alphas: int,
    repeats: int,
    spreads: Mapping[str, Spread],
    *,
    written: int,
    baseline: str,
    copied: int,
) -> Row:
    """Return the row of `spreads[impl]` against `spreads[baseline]`; `written` and `copied` are bytes.

    A baseline that does one α per call counts once per α.
    """
    own, other = spreads[impl], spreads[baseline]
    moved = sum(z.numel() * z.element_size() for z in members) + written
    return Row(
        operation=operation,
        impl=impl,
        device=device_name(members[0].device),
        threads=torch.get_num_threads(),
        dtype=str(members[0].dtype).removeprefix("torch."),
        rows=members[0].shape[0],
        width=members[0].shape[1],
        members=len(members),
        num_alphas=num_alphas,
        repeats=repeats,
        median=own.median,
        lower_quartile=own.lower,
        upper_quartile=own.upper,
        bytes_moved=moved,
        bandwidth=moved / own.median / 1e9,
        copy_bandwidth=copied / spreads["copy"].median / 1e9,
        baseline=baseline,
        baseline_median=other.median,
        baseline_lower_quartile=other.lower,
        baseline_upper_quartile=other.upper,
        speedup=other.median * num_alphas / own.median,
        torch=torch.__version__,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def make_members(rows: int, width: int, dtype: torch.dtype, device: torch.device, num: int = 3) -> list[Tensor]:
    """Return logits (rows, width) of `num` members that resemble one another, as those of one family do."""
    generator = torch.Generator().manual_seed(width + rows)
    common = 3 * torch.randn(rows, width, generator=generator)
    own = [common + 0.5 * torch.randn(rows, width, generator=generator) for _ in range(num)]
    return [z.to(device, dtype) for z in own]


def device_name(device: torch.device) -> str:
    """Return what the device is called by whoever made it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    names = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
