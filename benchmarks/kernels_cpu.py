"""Time the operations on this CPU against the log-softmax chain; append rows to results/kernels_cpu.jsonl."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from ensembler_kernels import Combination, Weights, combine, combine_logprob, combine_sample, make_noise
from kernel_chains import greedy_chain, multinomial_chain
from kernel_timing import device_name, interleaved, make_members, seconds_of
from measuring import RESULTS, Measured

BASE_CHANGE = Combination((1.0, 0.0, 0.0), (0.0, 1.0, -1.0))
ALPHA = 0.7
GRID = [k / 10 for k in range(16)]
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One measured operation. Quartiles are of seconds per call, bandwidths GB/s; `speedup` is against `baseline`.

    A baseline that does one α per call counts once per α.
    """

    machine: str = device_name(CPU)
    operation: str
    dtype: str
    rows: int
    width: int
    num_alphas: int
    repeats: int
    quartiles: tuple[float, float, float]
    bytes_moved: int
    bandwidth: float
    copy_bandwidth: float
    baseline: str
    baseline_quartiles: tuple[float, float, float]
    speedup: float

    def __str__(self) -> str:
        lower, median, upper = (1e3 * seconds for seconds in self.quartiles)
        case = f"{self.operation:<22} {self.dtype:<8} {self.rows:>3} × {self.width:<7} threads {self.threads}"
        speed = f"{self.bandwidth:6.2f} GB/s (copy {self.copy_bandwidth:.1f})  {self.speedup:5.1f} × {self.baseline}"
        return f"{case}  {median:8.3f} ms {f'[{lower:.3f}, {upper:.3f}]':<18} {speed}"


def measured(rows: int, width: int, dtype: torch.dtype, repeats: int) -> Iterator[Row]:
    """Yield a row per operation; all calls of a case are timed in turn."""
    members = make_members(rows, width, dtype, CPU)
    weights, grid = Weights.of((BASE_CHANGE, ALPHA)), Weights.of((BASE_CHANGE, GRID))
    targets, noise = torch.arange(rows) % width, make_noise(0, torch.arange(rows))
    source, target = torch.randn(rows, width), torch.empty(rows, width)
    size, read = source.numel() * source.element_size(), sum(z.numel() * z.element_size() for z in members)
    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "chain": lambda: greedy_chain(members, ALPHA),
        "multinomial chain": lambda: multinomial_chain(members, ALPHA, 0.7),
        "combine": lambda: combine(members, weights),
        "combine_sample greedy": lambda: combine_sample(members, weights),
        "combine_sample T=0.7": lambda: combine_sample(members, weights, temperature=0.7, noise=noise),
        "combine_logprob": lambda: combine_logprob(members, grid, targets),
    }
    spreads = interleaved({name: partial(seconds_of, call) for name, call in calls.items()}, repeats)

    def row(operation: str, num_alphas: int, written: int, baseline: str) -> Row:
        own, other = spreads[operation], spreads[baseline]
        return Row(
            operation=operation,
            dtype=str(dtype).removeprefix("torch."),
            rows=rows,
            width=width,
            num_alphas=num_alphas,
            repeats=repeats,
            quartiles=astuple(own),
            bytes_moved=read + written,
            bandwidth=(read + written) / own.median / 1e9,
            copy_bandwidth=2 * size / spreads["copy"].median / 1e9,
            baseline=baseline,
            baseline_quartiles=astuple(other),
            speedup=other.median * num_alphas / own.median,
        )

    yield row("combine", 1, size, "chain")
    yield row("combine_sample greedy", 1, 12 * rows, "chain")
    yield row("combine_sample T=0.7", 1, 12 * rows, "multinomial chain")
    yield row("combine_logprob", len(GRID), 5 * rows * len(GRID), "chain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--width", type=int, nargs="+", default=[49_152, 151_936])
    parser.add_argument(
        "--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels_cpu.jsonl")
    options = parser.parse_args()
    with torch.inference_mode():
        for threads, dtype, width, rows in product(options.threads, options.dtype, options.width, options.rows):
            torch.set_num_threads(threads)
            for row in measured(rows, width, getattr(torch, dtype), options.repeats):
                print(row, flush=True)
                row.append(options.out)


if __name__ == "__main__":
    main()
