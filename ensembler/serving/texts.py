"""Texts from prompts by vLLM's engine: the options, stops and samples of `ensembler.decoding`, its batching."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ensembler.decoding.batches import end_ids, room_for
from ensembler.decoding.drafting import AUTO, NONE
from ensembler.decoding.options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.samples import make_sample
from ensembler.decoding.texts import Completion
from ensembler.errors import ConfigError
from ensembler.serving.engine import Engine

_COLDEST, _HOTTEST = 0.01, 2  # vLLM raises what is below, and refuses what is above
_SEED_STEP = 1_000_003  # prompts get seeds far apart: the samples of one have neighbouring ones


def check_options(options: DecodingOptions) -> None:
    """Raise ConfigError for ways to decode that vLLM does not have, or has by itself."""
    if options.temperature > _HOTTEST or 0 < options.temperature < _COLDEST:
        raise ConfigError(
            f"temperature is {options.temperature:g}; vLLM samples at {_COLDEST:g} to {_HOTTEST:g}: one there, or 0"
        )
    if options.num_beams > 1:
        raise ConfigError(f"num_beams is {options.num_beams}; vLLM decodes an ensemble without beams: leave it at 1")
    if options.draft not in (AUTO, NONE):
        raise ConfigError(f"draft is {options.draft!r}; in vLLM no member drafts: leave it out")
    if options.prefill_chunk is not None:
        raise ConfigError("prefill_chunk was given; vLLM parts long prompts by itself (max_num_batched_tokens)")


def complete_in_engine(
    engine: Engine, tokenizer: Any, prompts: Sequence[EncodedPrompt], options: DecodingOptions
) -> Iterator[Completion]:
    """Yield the completion of each prompt as soon as it is finished, in any order.

    Greedy texts are those of `complete_prompts`, but for rounding. What is sampled depends on (seed, prompt's number,
    sample), and is not what the other backend draws: vLLM has noise of its own. Raises ConfigError.
    """
    check_options(options)
    seed = secrets.randbits(62) if options.seed is None else options.seed
    ends = end_ids(engine)
    start = time.perf_counter()
    params = [_params(engine, prompt, options, ends, seed) for prompt in prompts]
    for index, output in engine.run([prompt.ids for prompt in prompts], params):
        prompt = prompts[index]
        rows = [list(one.token_ids) for one in sorted(output.outputs, key=lambda one: one.index)]
        samples = [make_sample(ids, tokenizer, ends, options.stop) for ids in rows]
        yield Completion(prompt.number, prompt.ids, samples, time.perf_counter() - start)


def _params(engine: Engine, prompt: EncodedPrompt, options: DecodingOptions, ends: frozenset[int], seed: int) -> Any:
    from vllm import SamplingParams

    sampling = options.temperature > 0
    return SamplingParams(
        n=options.num_return_sequences,
        temperature=options.temperature,
        top_k=options.top_k or 0,
        top_p=options.top_p if options.top_p is not None else 1.0,
        min_p=options.min_p or 0.0,
        repetition_penalty=options.repetition_penalty if options.repetition_penalty is not None else 1.0,
        seed=(seed + prompt.number * _SEED_STEP) % 2**62 if sampling else None,
        stop=list(options.stop),
        stop_token_ids=sorted(ends),
        ignore_eos=True,  # the ends are those of the folder, no others
        max_tokens=room_for(engine, len(prompt.ids), options.max_new_tokens),
    )
