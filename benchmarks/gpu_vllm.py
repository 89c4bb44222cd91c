"""Section `vllm` of `gpu.py`: tokens per second in vLLM of a random ensemble, 1B/1B/3B in bf16, and of its target.

Two engines are asked by turns, with CUDA graphs and compiled, as vLLM runs by default, and then eagerly: 1 and 32
requests at one point, and 32 at points of their own (16 α of two rules). Prompts have 64 random tokens; nothing ends a
text before it has its tokens. Both engines share the GPU, so they get a part of its memory each.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gpu_engine
import torch
from gpu_options import Options, Row
from kernel_timing import Spread, interleaved, seconds_of

NUM, PROMPT_TOKENS, MEMORY = 32, 64, 0.3
SMALL = {**gpu_engine.SMALL, "hidden_size": 64}  # heads of 32: smaller ones have no paged attention on a CPU
GRAPHS, EAGER = "graphs", "eager"
_CHILDREN = {"TRITON_INTERPRET": None, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}  # CUDA is in use here: no fork


def vllm(options: Options) -> Iterator[Row]:
    """Yield a row per mode and way, or one that says that vLLM is not installed."""
    if find_spec("vllm") is None:
        why = "vLLM is not installed, so nothing was measured in it; install it with: pip install -e '.[vllm]'"
        yield Row("vllm", {"left_out": why}, {"note": why})
        return
    if not options.has_time("vllm"):
        return
    from vllm_measuring import prepare_vllm

    version = prepare_vllm()
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ):
        for name, value in _CHILDREN.items():
            os.environ.pop(name, None) if value is None else os.environ.setdefault(name, value)
        checked = _save_members(Path(folder), options)
        for mode in (EAGER,) if options.small else (GRAPHS, EAGER):
            if options.has_time(f"vllm: {mode}"):
                yield from _measured(checked, mode, version, options)


def _save_members(folder: Path, options: Options) -> Any:
    """Save random members, both sources of one shape, and return the checked ensemble of them."""
    from ensembler import EnsembleConfig
    from ensembler.preflight import check_ensemble

    shapes = (SMALL,) * 3 if options.small else (gpu_engine.ONE_B, gpu_engine.ONE_B, gpu_engine.THREE_B)
    for seed, (role, shape) in enumerate(zip(gpu_engine.ROLES, shapes, strict=True)):
        gpu_engine.llama(shape, seed, options.device).save_pretrained(folder / role)
    if options.device.type == "cuda":
        torch.cuda.empty_cache()
    members: dict[str, Any] = {role: {"model": str(folder / role)} for role in gpu_engine.ROLES}
    return check_ensemble(EnsembleConfig(alpha=gpu_engine.ALPHA, members=members))


def _measured(checked: Any, mode: str, version: str, options: Options) -> Iterator[Row]:
    from vllm import LLM
    from vllm_measuring import target_folder, written

    num_tokens = 4 if options.small else 128
    settings: dict[str, Any] = {"enforce_eager": mode == EAGER, "max_model_len": PROMPT_TOKENS + num_tokens}
    settings |= {"skip_tokenizer_init": True, "dtype": "float32" if options.device.type == "cpu" else "bfloat16"}
    if options.device.type == "cuda":
        settings["gpu_memory_utilization"] = MEMORY
    with ExitStack() as stack:
        folder = stack.enter_context(written(checked))
        llms = {}
        for name, model, extra in (
            ("ensemble", folder, {"load_format": "ensembler"}),
            ("target", target_folder(checked), {}),
        ):
            llms[name] = LLM(model, **settings, **extra)
            stack.callback(llms[name].llm_engine.engine_core.shutdown)
        times = _seconds(llms, checked, num_tokens, options)
    yield from _rows(times, mode, version, num_tokens, options)


def _seconds(llms: dict[str, Any], checked: Any, num_tokens: int, options: Options) -> dict[tuple[str, int], Spread]:
    """Return the seconds of each way, (name, number of requests), by turns."""
    from vllm_measuring import decode, make_prompts, mixed_points

    seeds, points = count(), mixed_points(checked)

    def timed(name: str, num: int, points: Any = ()) -> Callable[[], float]:
        def measure() -> float:
            prompts = make_prompts(checked.contract.shared, num, PROMPT_TOKENS, next(seeds))
            return seconds_of(lambda: decode(llms[name], prompts, [num_tokens] * num, points))

        return measure

    ways = {(name, num): timed(name, num) for name in llms for num in (1, NUM)}
    ways["ensemble, mixed", NUM] = timed("ensemble", NUM, points[:NUM])
    return interleaved(ways, 2 if options.small else 5)


def _rows(
    times: dict[tuple[str, int], Spread], mode: str, version: str, num_tokens: int, options: Options
) -> Iterator[Row]:
    family = "small" if options.small else "1B/1B/3B"
    for (way, num), spread in times.items():
        rates = [num * num_tokens / seconds for seconds in (spread.upper, spread.median, spread.lower)]
        over_target = times["target", num].median / spread.median
        fields = {
            "way": way,
            "requests": num,
            "mode": mode,
            "vllm": version,
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": num_tokens,
            "tokens_per_second": [round(rate, 2) for rate in rates],
            "over_target": round(over_target, 4),
        }
        if way == "ensemble, mixed":
            fields["over_single"] = round(times["ensemble", num].median / spread.median, 4)
        cell = f"{rates[1]:.0f} tokens/s" + ("" if way == "target" else f", {over_target:.2f} of the target's")
        cell += f", {fields['over_single']:.2f} of one point's" if "over_single" in fields else ""
        yield Row(f"{family} in vLLM, {num} request{'s' * (num > 1)}, {mode}", fields, {way: cell})
