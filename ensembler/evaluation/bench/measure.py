"""What a method costs, measured in a process of its own: `python -m ensembler.evaluation.bench.measure`.

Reads a JSON `Load` from standard input, prints a JSON `Cost` on standard output. One process loads one method, as its
user would: nothing of another method is in its memory.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from ensembler.config import EnsembleConfig
from ensembler.decoding.batches import pad_id
from ensembler.decoding.points import GridPoint
from ensembler.errors import EnsemblerError
from ensembler.evaluation.batches import can_share_contexts, make_batches
from ensembler.evaluation.requests import ScoringRequest
from ensembler.evaluation.scoring import score_together
from ensembler.modeling import EnsembleForCausalLM
from ensembler.planning.measuring import loaded_bytes
from ensembler.preflight import check_ensemble


@dataclass(frozen=True)
class Load:
    """What is measured: an ensemble at a point, or its one member `alone`, on prompts and continuations as ids."""

    config: Mapping[str, Any]
    rule: str
    alpha: float
    alone: bool
    prompts: Sequence[Sequence[int]]
    requests: Sequence[Mapping[str, Any]]
    new_tokens: int
    batch_size: int


@dataclass(frozen=True)
class Cost:
    """What it came to. Medians over the prompts; sizes in bytes; peaks less what the process had before loading.

    `examples_per_second` is None where nothing is scored, `peak_device_bytes` without a GPU.
    """

    setup_seconds: float
    weight_bytes: int
    first_token_seconds: float
    tokens_per_second: float
    examples_per_second: float | None
    peak_host_bytes: int
    peak_device_bytes: int | None


class _Clock(BaseStreamer):  # type: ignore[misc,unused-ignore]
    """Notes when the prompt is handed over and when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if self.times and torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def measure(load: Load) -> Cost:
    """Load a method, warm it up, and measure it. Raises EnsemblerError."""
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    config = EnsembleConfig(**{**load.config, "alpha": load.alpha})
    checked = check_ensemble(config)
    model = EnsembleForCausalLM.from_checked(checked)
    setup = time.perf_counter() - start
    decoder = model.anchor if load.alone else model
    requests = [_request(number, given) for number, given in enumerate(load.requests)]
    pad = pad_id(model, checked.require_tokenizer())
    _decode(decoder, pad, load.prompts[0], 4)
    _score(model, checked.model_configs, requests[: load.batch_size], load)
    times = [_decode(decoder, pad, prompt, load.new_tokens) for prompt in load.prompts]
    return Cost(
        setup_seconds=setup,
        weight_bytes=loaded_bytes([model]),
        first_token_seconds=statistics.median(first for first, _ in times),
        tokens_per_second=statistics.median(rate for _, rate in times),
        examples_per_second=_score(model, checked.model_configs, requests, load) if requests else None,
        peak_host_bytes=_host_peak() - before,
        peak_device_bytes=_device_peak(),
    )


def _request(number: int, given: Mapping[str, Any]) -> ScoringRequest:
    continuations = tuple(tuple(ids) for ids in given["continuations"])
    return ScoringRequest(number, tuple(given["context"]), continuations, f"request {number}", window=given["window"])


@torch.inference_mode()
def _decode(decoder: Any, pad: int, prompt: Sequence[int], num: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second after it; nothing ends the text before its length."""
    ids = torch.tensor([list(prompt)], device=decoder.device)
    clock = _Clock()
    settings = GenerationConfig(max_new_tokens=num, do_sample=False, pad_token_id=pad)
    decoder.generation_config = GenerationConfig(pad_token_id=pad)
    start = time.perf_counter()
    decoder.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=clock)
    _prompt, first, *_rest = clock.times
    return first - start, (num - 1) / (clock.times[-1] - first)


def _score(
    model: EnsembleForCausalLM, model_configs: Mapping[str, Any], requests: Sequence[ScoringRequest], load: Load
) -> float | None:
    """Examples per second."""
    share = can_share_contexts(model_configs.values())
    batches = make_batches(requests, load.batch_size, share_contexts=share)
    start = time.perf_counter()
    for _ in score_together(model, batches, [GridPoint(load.rule, load.alpha)]):
        pass
    return len(requests) / (time.perf_counter() - start) if requests else None


def _host_peak() -> int:
    """The largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _device_peak() -> int | None:
    if not torch.cuda.is_available():
        return None
    return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))


def main() -> None:
    """Print the cost, or {"error": ...}."""
    load = Load(**json.load(sys.stdin))
    try:
        found: dict[str, Any] = asdict(measure(load))
    except (EnsemblerError, RuntimeError, MemoryError) as error:
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
