"""Texts from prompts: options, batches by length, one completion per prompt. The decoding is `model.generate`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from ensembler.cache import EnsembleCache
from ensembler.decoding.batches import TextLimits, end_ids, ends_only, make_batches, pad_id, pad_left, room_for
from ensembler.decoding.drafting import AUTO, NONE
from ensembler.decoding.prefixes import Headers
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.samples import Sample, make_sample, stopping_criteria
from ensembler.decoding.speculative import SpeculativeDecoder
from ensembler.decoding.stats import Meter
from ensembler.errors import ConfigError
from ensembler.modeling import EnsembleForCausalLM

_SEED_STEP = 1_000_003  # batches get seeds far apart, so that neighbours of a user's seed do not share any


_INF = float("inf")
_RANGES: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, _INF),
    "temperature": (0, 1e6),
    "top_k": (1, _INF),
    "top_p": (1e-9, 1),
    "min_p": (0, 1),
    "repetition_penalty": (1e-9, 1e6),
    "num_beams": (1, _INF),
    "num_return_sequences": (1, _INF),
    "seed": (0, 2**63 - 1),
    "draft_tokens": (1, _INF),
    "prefill_chunk": (1, _INF),
}


@dataclass(frozen=True)
class DecodingOptions:
    """How to decode. Temperature 0 is greedy; what is not set leaves the ensemble's distribution as it is.

    `max_new_tokens` in tokens; `stop`: texts that end a completion and are cut off; `seed`: makes sampling repeatable
    for the same prompts and batch size. `draft`: who drafts, as in `SpeculativeDecoder`, up to `draft_tokens` a round;
    `prefill_chunk`: read prompts in pieces of so many tokens, for less memory.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    num_beams: int = 1
    num_return_sequences: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    draft: str = AUTO
    draft_tokens: int = 8
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # nan is in no range
                raise ConfigError(f"{name} is {value}; expected a number from {low:g} to {high:g}")
        if self.num_return_sequences > self.num_beams > 1:
            raise ConfigError(
                f"{self.num_return_sequences} sequences were asked of {self.num_beams} beams; give as many beams"
            )
        if self.num_return_sequences > 1 and self.temperature == 0 and self.num_beams < self.num_return_sequences:
            raise ConfigError(
                f"{self.num_return_sequences} sequences from greedy decoding would be the same; "
                "give a temperature above 0 or as many beams"
            )
        if self.num_beams > 1 and self.draft not in (AUTO, NONE):
            raise ConfigError(
                f"draft is {self.draft!r} and num_beams {self.num_beams}; a draft works with greedy decoding and with "
                "sampling: leave one of them out"
            )
        if "" in self.stop:
            raise ConfigError("a stop text is empty; give it some text or leave it out")
        sampling = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if sampling and self.temperature == 0:
            raise ConfigError(f"{sampling[0]} needs sampling, and temperature 0 is greedy; give a temperature above 0")

    @property
    def num_rows(self) -> int:
        """The rows of a batch for each of its prompts."""
        return max(self.num_beams, self.num_return_sequences)

    def decoder(self, *, streamer: BaseStreamer | None = None, meter: Meter | None = None) -> SpeculativeDecoder:
        """Return what drafts, for batches that it is to learn its pace from; a cache that it is given is its own."""
        return SpeculativeDecoder(
            self.draft, num_positions=self.draft_tokens, seed=self.seed, streamer=streamer, meter=meter, owns_cache=True
        )

    def generation_config(self, max_new_tokens: int) -> GenerationConfig:
        """Return all of it for `generate` but the stop texts, which need a tokenizer (`stopping_criteria`)."""
        sampling = self.temperature > 0
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=sampling,
            temperature=self.temperature if sampling else 1.0,
            top_k=(self.top_k or 0) if sampling else 50,  # 50 is transformers' default, unused when greedy
            top_p=self.top_p if self.top_p is not None else 1.0,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty if self.repetition_penalty is not None else 1.0,
            num_beams=self.num_beams,
            num_return_sequences=self.num_return_sequences,
            prefill_chunk_size=self.prefill_chunk,
        )


def fingerprint(
    model: TextLimits,
    prompts: Sequence[EncodedPrompt],
    options: DecodingOptions,
    *,
    batch_size: int | None,
    backend: Mapping[str, Any] | None = None,
) -> str:
    """Return a short hash of all that the texts of a run depend on, but for the weights themselves.

    `batch_size`: None where it does not matter; `backend`: what else is to be said of what decodes them.
    """
    settings = {
        "prompts": [[prompt.number, prompt.ids] for prompt in prompts],
        "ensemble": {key: value for key, value in model.config.to_dict().items() if key != "transformers_version"},
        "ends": sorted(end_ids(model)),
        "options": {name: value for name, value in asdict(options).items() if name != "prefill_chunk"},
        "batch_size": batch_size,
        "backend": dict(backend or {}),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Completion:
    """All samples of one prompt, and the seconds that its batch took."""

    number: int
    prompt_ids: list[int]
    samples: list[Sample]
    seconds: float

    def to_row(self) -> dict[str, Any]:
        """One line of the output file: a text, or a list of samples where several were asked for."""
        texts = [
            {"text": sample.text, "num_tokens": sample.num_tokens, "finish_reason": sample.finish_reason}
            for sample in self.samples
        ]
        body = texts[0] if len(texts) == 1 else {"samples": texts}
        return {"number": self.number, **body, "seconds": round(self.seconds, 3)}


def complete_batches(
    model: EnsembleForCausalLM,
    tokenizer: Any,
    prompts: Sequence[EncodedPrompt],
    options: DecodingOptions,
    *,
    batch_size: int = 1,
    done: frozenset[int] = frozenset(),
    streamer: BaseStreamer | None = None,
    decoder: SpeculativeDecoder | None = None,
    share_headers: bool = True,
) -> Iterator[list[Completion]]:
    """Yield the completions of one batch after another.

    Batches and their seeds depend on `prompts`, `batch_size` and the seed alone: leaving out the numbers in `done`
    (when a run is resumed) gives the others the texts they would have had. `decoder`: of the options, with the streamer
    (default: a new one). With `share_headers`, what prompts begin with in common is read once (`prefixes`); the texts
    are the same.
    """
    decoder = options.decoder(streamer=streamer) if decoder is None else decoder
    batches = make_batches(model, prompts, batch_size, options.max_new_tokens)
    headers = Headers(model, batches if share_headers else [], options.prefill_chunk)
    for index, batch in enumerate(batches):
        wanted = [prompt for prompt in batch if prompt.number not in done]
        if not wanted:
            continue
        start = time.perf_counter()
        with decoder.watching(model):
            cache = headers.cache(index, options.num_rows, options.max_new_tokens)
        seed_batch(options, index)
        completions = complete(model, tokenizer, batch, options, decoder, start=start, cache=cache)
        yield [completion for completion in completions if completion.number not in done]


def seed_batch(options: DecodingOptions, index: int = 0) -> None:
    """Make what is drawn in batch number `index` repeatable, where a seed was given."""
    if options.seed is not None:
        torch.manual_seed((options.seed + index * _SEED_STEP) % 2**63)


def complete(
    model: EnsembleForCausalLM,
    tokenizer: Any,
    batch: Sequence[EncodedPrompt],
    options: DecodingOptions,
    decoder: SpeculativeDecoder,
    *,
    start: float,
    cache: EnsembleCache | None = None,
) -> list[Completion]:
    """Return the completions of one batch, begun at `start` (as of perf_counter).

    `cache` holds what all its rows begin with, and goes on to hold all but the last token of each.
    """
    input_ids, attention_mask = pad_left([prompt.ids for prompt in batch], pad_id(model, tokenizer))
    length = input_ids.shape[1]
    room = room_for(model, length, options.max_new_tokens)
    decoder.numbers = [prompt.number for prompt in batch]
    with ends_only(model), decoder.watching(model):
        sequences = model.generate(
            input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            past_key_values=cache,
            generation_config=options.generation_config(room),
            stopping_criteria=stopping_criteria(tokenizer, options.stop, length),
            streamer=decoder.streamer,
            custom_generate=decoder if options.num_beams == 1 and options.draft != NONE else None,
        )
    new = sequences[:, length:].tolist()
    seconds = time.perf_counter() - start
    num = options.num_return_sequences
    ends = end_ids(model)
    completions = [
        Completion(
            number=prompt.number,
            prompt_ids=prompt.ids,
            samples=[make_sample(ids, tokenizer, ends, options.stop) for ids in new[row * num : (row + 1) * num]],
            seconds=seconds,
        )
        for row, prompt in enumerate(batch)
    ]
    decoder.stats.num_tokens += sum(sample.num_tokens for one in completions for sample in one.samples)
    return completions
