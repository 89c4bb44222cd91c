"""Time every implementation that can run on a device, next to the chain and a copy; append rows to results/.

For people with a GPU: python kernels/benchmarks/bench_device.py --device cuda. On a CPU it measures plain torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
from chain import log_softmax_chain
from ensembler_kernels import Combination, combine, combine_logprob, combine_sample
from ensembler_kernels.implementations import MODULES, why_not
from measure import RESULTS, Row, interleaved, make_members, make_row

PROXY_TUNING = Combination((1.0, 0.0, 0.0), (0.0, 1.0, -1.0))
WIDTHS = [32_000, 49_152, 128_256, 151_936, 262_144]
ALPHA = 0.7


def measured(
    impls: list[str], rows: int, width: int, dtype: torch.dtype, device: torch.device, num_alphas: int, repeats: int
) -> Iterator[Row]:
    """Yield a row per operation and implementation; all calls of a case are timed in turn."""
    members = make_members(rows, width, dtype, device)
    targets = torch.arange(rows, device=device) % width
    alphas = torch.arange(num_alphas, device=device) / 10
    source = torch.randn(rows, width, device=device)
    target, size = torch.empty_like(source), source.numel() * source.element_size()
    baselines: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "chain": lambda: log_softmax_chain(members, ALPHA),
    }

    def operations(impl: str) -> dict[str, tuple[int, int, Callable[[], object]]]:
        """By name: number of α, bytes written, call."""
        return {
            "combine": (1, size, lambda: combine(members, PROXY_TUNING, ALPHA, impl=impl)),
            "combine_sample greedy": (
                1,
                12 * rows,
                lambda: combine_sample(members, PROXY_TUNING, ALPHA, temperature=0, seed=0, impl=impl),
            ),
            "combine_sample T=0.7": (
                1,
                12 * rows,
                lambda: combine_sample(members, PROXY_TUNING, ALPHA, temperature=0.7, seed=0, impl=impl),
            ),
            "combine_logprob": (
                num_alphas,
                5 * rows * num_alphas,
                lambda: combine_logprob(members, PROXY_TUNING, alphas, targets, impl=impl),
            ),
        }

    cases = {(name, impl): case for impl in impls for name, case in operations(impl).items()}
    calls = baselines | {f"{name} {impl}": call for (name, impl), (_, _, call) in cases.items()}
    spreads = interleaved(calls, repeats, device)
    for (name, impl), (num, written, _) in cases.items():
        named = {impl: spreads[f"{name} {impl}"], "chain": spreads["chain"], "copy": spreads["copy"]}
        yield make_row(name, impl, members, num, repeats, named, written=written, baseline="chain", copied=2 * size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--impl", nargs="+", choices=sorted(MODULES), help="default: all that can run there")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--width", type=int, nargs="+", default=WIDTHS)
    parser.add_argument(
        "--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["bfloat16", "float32"]
    )
    parser.add_argument("--alphas", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="default: results/DEVICE.jsonl")
    options = parser.parse_args()
    device = torch.device(options.device)
    impls = options.impl or [name for name in MODULES if name != "reference" and why_not(name, device) is None]
    with torch.inference_mode():
        for dtype, width, rows in product(options.dtype, options.width, options.rows):
            case = (impls, rows, width, getattr(torch, dtype), device, options.alphas, options.repeats)
            for row in measured(*case):
                print(row, flush=True)
                row.append_to(options.out or RESULTS / f"{device.type}.jsonl")


if __name__ == "__main__":
    main()
