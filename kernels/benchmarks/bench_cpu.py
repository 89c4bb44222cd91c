"""Time the operations on this CPU against the log-softmax chain; append rows to results/cpu.jsonl."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
from chain import log_softmax_chain, multinomial_chain
from ensembler_kernels import Combination, combine, combine_logprob, combine_sample
from measure import RESULTS, Row, interleaved, make_members, make_row

BASE_CHANGE = Combination((1.0, 0.0, 0.0), (0.0, 1.0, -1.0))
ALPHA = 0.7
GRID = [k / 10 for k in range(16)]
CPU = torch.device("cpu")


def measured(rows: int, width: int, dtype: torch.dtype, repeats: int) -> Iterator[Row]:
    """Yield a row per operation; all calls of a case are timed in turn."""
    members = make_members(rows, width, dtype, CPU)
    targets = torch.arange(rows) % width
    source, target = torch.randn(rows, width), torch.empty(rows, width)
    size = source.numel() * source.element_size()
    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "chain": lambda: log_softmax_chain(members, ALPHA),
        "multinomial chain": lambda: multinomial_chain(members, ALPHA, 0.7),
        "combine": lambda: combine(members, BASE_CHANGE, ALPHA),
        "combine_sample greedy": lambda: combine_sample(members, BASE_CHANGE, ALPHA, temperature=0, seed=0),
        "combine_sample T=0.7": lambda: combine_sample(members, BASE_CHANGE, ALPHA, temperature=0.7, seed=0),
        "combine_logprob": lambda: combine_logprob(members, BASE_CHANGE, GRID, targets),
    }
    spreads = interleaved(calls, repeats, CPU)
    for operation, num_alphas, written, baseline in (
        ("combine", 1, size, "chain"),
        ("combine_sample greedy", 1, 12 * rows, "chain"),
        ("combine_sample T=0.7", 1, 12 * rows, "multinomial chain"),
        ("combine_logprob", len(GRID), 5 * rows * len(GRID), "chain"),
    ):
        named = {"torch": spreads[operation], baseline: spreads[baseline], "copy": spreads["copy"]}
        yield make_row(
            operation, "torch", members, num_alphas, repeats, named, written=written, baseline=baseline, copied=2 * size
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--width", type=int, nargs="+", default=[49_152, 151_936])
    parser.add_argument(
        "--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.jsonl")
    options = parser.parse_args()
    with torch.inference_mode():
        for threads, dtype, width, rows in product(options.threads, options.dtype, options.width, options.rows):
            torch.set_num_threads(threads)
            for row in measured(rows, width, getattr(torch, dtype), options.repeats):
                print(row, flush=True)
                row.append_to(options.out)


if __name__ == "__main__":
    main()
