"""Measure the step time of one request at a time in vLLM, by the number of threads of the process that runs the model.

    .venv-vllm/bin/python benchmarks/vllm_latency.py [MODEL] [--threads 1 2 unset auto] [--repeats 5] [--new-tokens 64]

MODEL is `demo`, the embedded family (default), an ensemble's folder, or the folder of one model for all three roles.
An engine is started once for each value of OMP_NUM_THREADS and kept, and they are asked by turns, forwards and
backwards; `auto` leaves it to vLLM, which binds threads to cores and keeps one free. On a CPU an engine is two
processes beside ours: one waits for the other's steps without sleeping, and so takes a core from its threads. A step is
the difference of four long and four short texts over their tokens. One JSON row is appended to
benchmarks/results/vllm_latency.jsonl. Needs the environment of `make test-vllm`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measuring import RESULTS, Measured, spread
from vllm_measuring import REST_SECONDS, decode, make_prompts, model_name, prepare_vllm, read_ensemble, written

OUT = RESULTS / "vllm_latency.jsonl"
PROMPT_TOKENS, SHORT = 32, 8
NUM_REQUESTS = 4
UNSET, AUTO = "unset", "auto"
VARIABLE, BINDING = "OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One run, by value of OMP_NUM_THREADS: median, smallest and largest of the repeats.

    `worker_threads`: what torch has in the process that runs the model. `over_first`: step times over those of the
    first value in the same repeat.
    """

    model: str
    vllm: str
    dtype: str
    compiled: bool
    cores: int
    repeats: int
    prompt_tokens: int
    new_tokens: int
    worker_threads: dict[str, int]
    step_ms: dict[str, tuple[float, tuple[float, float]]]
    over_first: dict[str, tuple[float, tuple[float, float]]]


@contextmanager
def threads_of_children(value: str) -> Iterator[None]:
    """Set OMP_NUM_THREADS for processes that are started within, unset it, or leave both to vLLM."""
    settings = {BINDING: "auto" if value == AUTO else "nobind"}
    if value not in (UNSET, AUTO):
        settings[VARIABLE] = value
    with patch.dict(os.environ, settings):
        if VARIABLE not in settings:
            os.environ.pop(VARIABLE, None)
        yield


@contextmanager
def engines(folder: str, values: Sequence[str], settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Start an engine for each value; all end together."""
    from vllm import LLM

    with ExitStack() as stack:
        found = {}
        for value in values:
            with threads_of_children(value):
                found[value] = LLM(folder, load_format="ensembler", **settings)
            stack.callback(found[value].llm_engine.engine_core.shutdown)
        yield found


def threads_of_worker(worker: Any) -> int:
    return torch.get_num_threads()


def step_seconds(llm: Any, vocab_size: int, new_tokens: int, seed: int) -> float:
    """Return the seconds of a step: those of long texts less those of short ones, over the tokens between them."""
    seconds = []
    for length in (SHORT, SHORT + new_tokens):
        prompts = make_prompts(vocab_size, NUM_REQUESTS, PROMPT_TOKENS, seed + length)
        start = time.perf_counter()
        for prompt in prompts:
            decode(llm, [prompt], [length])
        seconds.append(time.perf_counter() - start)
    return (seconds[1] - seconds[0]) / (NUM_REQUESTS * new_tokens)


def measure(llms: dict[str, Any], vocab_size: int, new_tokens: int, repeats: int) -> dict[str, list[float]]:
    """Return milliseconds of a step by engine and repeat, after a round to warm up."""
    found: dict[str, list[float]] = {name: [] for name in llms}
    for repeat in range(repeats + 1):
        for name in list(llms) if repeat % 2 else reversed(list(llms)):
            time.sleep(REST_SECONDS)
            taken = 1e3 * step_seconds(llms[name], vocab_size, new_tokens, 1000 * repeat)
            if repeat:
                found[name].append(taken)
            print(f"{repeat}: {VARIABLE} {name}, {taken:.2f} ms", file=sys.stderr, flush=True)
    return found


def summary(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    return round(statistics.median(values), 3), spread(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--threads", nargs="+", default=["1", "2", UNSET, AUTO], help="values, unset or auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true", help="Leave vLLM's members uncompiled.")
    parser.add_argument("--results", type=Path, default=OUT)
    args = parser.parse_args()
    version, checked = prepare_vllm(), read_ensemble(args.model, args.dtype)
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # a function of ours asks the worker for its threads
    settings = {"dtype": args.dtype, "enforce_eager": args.eager}
    settings["max_model_len"] = PROMPT_TOKENS + SHORT + args.new_tokens
    with written(checked) as folder, engines(folder, args.threads, settings) as llms:
        worker_threads = {name: llm.collective_rpc(threads_of_worker)[0] for name, llm in llms.items()}
        taken = measure(llms, checked.contract.shared, args.new_tokens, args.repeats)
    first = taken[args.threads[0]]
    row = Row(
        model=model_name(args.model),
        vllm=version,
        dtype=args.dtype,
        compiled=not args.eager,
        cores=len(os.sched_getaffinity(0)),
        repeats=args.repeats,
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=args.new_tokens,
        worker_threads=worker_threads,
        step_ms={name: summary(values) for name, values in taken.items()},
        over_first={
            name: summary([one / other for one, other in zip(values, first, strict=True)])
            for name, values in taken.items()
            if values is not first
        },
    )
    row.append(args.results)
    for name, (median, (low, high)) in row.step_ms.items():
        said = f"{VARIABLE} {name} ({worker_threads[name]} threads)"
        ratio = f", {row.over_first[name][0]:.2f} of the first" if name in row.over_first else ""
        print(f"{said}: {median:.2f} ms a step ({low:.2f} to {high:.2f}){ratio}")


if __name__ == "__main__":
    main()
