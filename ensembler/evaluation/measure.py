"""Measure the costs of one method in a process of its own: `python -m ensembler.evaluation.measure`.

Reads a JSON `Load` from standard input and prints the costs as JSON. One process loads one method, as its user would:
nothing of another method is in its memory.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (a patch would load it while the clock runs)
import psutil
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from ensembler.config import EnsembleConfig
from ensembler.decoding.batching import pad_id
from ensembler.engine.grid import GridPoint
from ensembler.engine.text_member_set import TextMemberSet
from ensembler.evaluation.backends import TransformersBackend
from ensembler.evaluation.request_batches import can_share_contexts, make_batches
from ensembler.evaluation.requests import ScoringRequest, group_by_context
from ensembler.modeling import EnsembleForCausalLM
from ensembler.planning.member_sizes import loaded_bytes
from ensembler.preflight import check_ensemble


@dataclass(frozen=True)
class Load:
    """The work to be timed: an ensemble at α, or its one member `alone`, on prompts and continuations as ids.

    `requests`, each a context and its continuation, are those of `num_examples` documents. `chats`: prompts and
    contexts that are chats, with the ids by role of members with other tokenizers.
    """

    config: Mapping[str, Any]
    alpha: float
    alone: bool
    prompts: Sequence[Sequence[int]]
    requests: Sequence[Sequence[Sequence[int]]]
    chats: Sequence[tuple[Sequence[int], Mapping[str, Sequence[int]]]]
    num_examples: int
    new_tokens: int
    batch_size: int


class _Clock(BaseStreamer):  # type: ignore[misc,unused-ignore]
    """Notes when the prompt is handed over and when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if self.times and torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


def measure(load: Load) -> dict[str, float | None]:
    """Load a method, warm it up, and return its costs by their names in `figures.COSTS`. Raises EnsemblerError.

    Medians over the prompts; sizes in bytes; peaks less what the process had before loading. `examples_per_second` is
    None where nothing is scored, `peak_device_bytes` without a GPU, `peak_host_bytes` on other systems than Linux.
    """
    config = EnsembleConfig(**{**load.config, "alpha": load.alpha})
    checked = check_ensemble(config)
    before = psutil.Process().memory_info().rss
    _forget_host_peak()
    start = time.perf_counter()
    model = EnsembleForCausalLM.from_checked(checked)
    _read_weights(model)
    if isinstance(model.member_set, TextMemberSet):
        model.member_set.text.prompts = {tuple(ids): others for ids, others in load.chats}
    setup = time.perf_counter() - start
    decoder = model.anchor if load.alone else model
    tokenizer = checked.require_tokenizer()
    requests, pad = group_by_context(load.requests, tokenizer), pad_id(model, tokenizer)
    _decode(decoder, pad, load.prompts[0], 4)
    _score(model, checked.model_configs, requests[: load.batch_size], load)
    times = [_decode(decoder, pad, prompt, load.new_tokens) for prompt in load.prompts]
    devices = range(torch.cuda.device_count())
    return {
        "setup_seconds": setup,
        "weight_bytes": loaded_bytes([model]),
        "first_token_seconds": statistics.median(first for first, _ in times),
        "tokens_per_second": statistics.median(rate for _, rate in times),
        "examples_per_second": _score(model, checked.model_configs, requests, load),
        "peak_host_bytes": _host_peak(before),
        "peak_device_bytes": sum(map(torch.cuda.max_memory_allocated, devices)) if devices else None,
    }


def _read_weights(model: EnsembleForCausalLM) -> None:
    """Read every page of the weights on the CPU: those in the dtype of their file are only mapped by loading."""
    for weight in (weight for weight in model.parameters() if weight.device.type == "cpu"):
        weight.detach().flatten()[:: max(1, 4096 // weight.element_size())].sum()


@torch.inference_mode()
def _decode(decoder: Any, pad: int, prompt: Sequence[int], num: int) -> tuple[float, float]:
    """Return the seconds to the first token, and the tokens per second after it; end tokens are ignored."""
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
    """Return examples per second; None where there are none."""
    share = can_share_contexts(model_configs.values())
    batches = make_batches(requests, load.batch_size, share_contexts=share)
    start = time.perf_counter()
    for _ in TransformersBackend(model).score(batches, [GridPoint(load.config["rule"], load.alpha)]):
        pass
    return load.num_examples / (time.perf_counter() - start) if requests else None


_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _forget_host_peak() -> None:
    """Reset the largest resident size. (`ru_maxrss` cannot be reset, and counts the parent's.)"""
    if _REFERENCES.exists():
        _REFERENCES.write_text("5")


def _host_peak(before: int) -> int | None:
    """Return the largest resident size since it was forgotten, less `before`, in bytes; None where it is not told."""
    if not _STATUS.exists():
        return None
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return next(int(line[1]) * 1024 for line in lines if line[0] == "VmHWM:") - before


def main() -> None:
    """Print the cost, or {"error": ...}."""
    load = Load(**json.load(sys.stdin))
    try:
        found: dict[str, Any] = measure(load)
    except Exception as error:  # a model may raise anything; it is the row of this measurement
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    print(json.dumps(found))


def machine() -> dict[str, Any]:
    """Return on what costs are measured: device, threads and the version of torch."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    device = ", ".join(names) or platform.processor() or platform.machine()
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}


if __name__ == "__main__":
    main()
