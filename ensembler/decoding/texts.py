"""Texts from prompts: options, batches by length, one completion per prompt. The decoding is `model.generate`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from ensembler.decoding.prompts import EncodedPrompt
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
}


@dataclass(frozen=True)
class DecodingOptions:
    """How to decode. Temperature 0 is greedy; what is not set leaves the ensemble's distribution as it is.

    `max_new_tokens` in tokens; `stop`: texts that end a completion and are cut off; `seed`: makes sampling repeatable
    for the same prompts and batch size.
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
        if "" in self.stop:
            raise ConfigError("a stop text is empty; give it some text or leave it out")
        sampling = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if sampling and self.temperature == 0:
            raise ConfigError(f"{sampling[0]} needs sampling, and temperature 0 is greedy; give a temperature above 0")

    def generation_config(self, max_new_tokens: int) -> GenerationConfig:
        """Return all of it for `generate`."""
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
            stop_strings=list(self.stop) or None,
        )


def fingerprint(
    model: EnsembleForCausalLM, prompts: Sequence[EncodedPrompt], options: DecodingOptions, *, batch_size: int
) -> str:
    """Return a short hash of all that the texts of a run depend on, but for the weights themselves."""
    settings = {
        "prompts": [[prompt.number, prompt.ids] for prompt in prompts],
        "ensemble": {key: value for key, value in model.config.to_dict().items() if key != "transformers_version"},
        "ends": sorted(_end_ids(model)),
        "options": asdict(options),
        "batch_size": batch_size,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Sample:
    """One decoded text. `ids` are its new tokens, the end token included; finish reason is 'stop' or 'length'."""

    text: str
    num_tokens: int
    finish_reason: str
    ids: list[int]


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


def batches_by_length(
    prompts: Sequence[EncodedPrompt], batch_size: int, *, longest: float = _INF
) -> list[list[EncodedPrompt]]:
    """Return batches of prompts of similar length, the longest first: too little memory then shows at once.

    Prompts of more than `longest` tokens, to which the context leaves less room than was asked for, are batches of
    their own: the room of one must not cut the others short.
    """
    ordered = sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.number))
    tight = [[prompt] for prompt in ordered if len(prompt.ids) > longest]
    others = ordered[len(tight) :]
    return tight + [others[start : start + batch_size] for start in range(0, len(others), batch_size)]


def complete_batches(
    model: EnsembleForCausalLM,
    tokenizer: Any,
    prompts: Sequence[EncodedPrompt],
    options: DecodingOptions,
    *,
    batch_size: int = 1,
    done: frozenset[int] = frozenset(),
    streamer: BaseStreamer | None = None,
) -> Iterator[list[Completion]]:
    """Yield the completions of one batch after another.

    Batches and their seeds depend on `prompts`, `batch_size` and the seed alone: leaving out the numbers in `done`
    (when a run is resumed) gives the others the texts they would have had.
    """
    context = model.shortest_context
    longest = _INF if context is None else context[1] - options.max_new_tokens
    for index, batch in enumerate(batches_by_length(prompts, batch_size, longest=longest)):
        wanted = [prompt for prompt in batch if prompt.number not in done]
        if not wanted:
            continue
        if options.seed is not None:
            torch.manual_seed((options.seed + index * _SEED_STEP) % 2**63)
        with _ends_only(model):
            completions = _complete(model, tokenizer, batch, options, streamer)
        yield [completion for completion in completions if completion.number not in done]


@contextmanager
def _ends_only(model: EnsembleForCausalLM) -> Iterator[None]:
    """Leave only the special ids of the generation config: what else a model's authors like there is not asked for."""
    own = model.generation_config
    ids = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    try:
        yield
    finally:
        model.generation_config = own


def _complete(
    model: EnsembleForCausalLM,
    tokenizer: Any,
    batch: Sequence[EncodedPrompt],
    options: DecodingOptions,
    streamer: BaseStreamer | None,
) -> list[Completion]:
    start = time.perf_counter()
    input_ids, attention_mask = _pad_left([prompt.ids for prompt in batch], _pad_id(model, tokenizer))
    length = input_ids.shape[1]
    context = model.shortest_context
    room = options.max_new_tokens if context is None else min(options.max_new_tokens, context[1] - length)
    sequences = model.generate(
        input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=options.generation_config(room),
        tokenizer=tokenizer,
        streamer=streamer,
    )
    new = sequences[:, length:].tolist()
    seconds = time.perf_counter() - start
    num = options.num_return_sequences
    ends = _end_ids(model)
    return [
        Completion(
            number=prompt.number,
            prompt_ids=prompt.ids,
            samples=[_sample(ids, tokenizer, ends, options.stop) for ids in new[row * num : (row + 1) * num]],
            seconds=seconds,
        )
        for row, prompt in enumerate(batch)
    ]


def _sample(ids: list[int], tokenizer: Any, ends: frozenset[int], stops: Sequence[str]) -> Sample:
    """Cut a row at its end token, then its text at the first stop text."""
    end = next((position for position, token in enumerate(ids) if token in ends), None)
    kept = ids if end is None else ids[: end + 1]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    cuts = [cut for cut in (text.find(stop) for stop in stops) if cut >= 0]
    if cuts:
        text = text[: min(cuts)]
        kept = _until_text(kept, tokenizer, stops)
    return Sample(text, len(kept), "stop" if cuts or end is not None else "length", kept)


def _until_text(ids: list[int], tokenizer: Any, stops: Sequence[str]) -> list[int]:
    """The shortest beginning of `ids` whose text holds a stop text: what follows in a batch is padding."""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        if any(stop in text for stop in stops):
            return ids[:end]
    return ids


def _pad_left(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask, both (rows, longest) int64."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _end_ids(model: EnsembleForCausalLM) -> frozenset[int]:
    ends = model.generation_config.eos_token_id
    return frozenset([] if ends is None else ends if isinstance(ends, list) else [ends])


def _pad_id(model: EnsembleForCausalLM, tokenizer: Any) -> int:
    """Any id will do where the mask is 0; the end token is what transformers takes by itself."""
    candidates = (model.generation_config.pad_token_id, tokenizer.pad_token_id, *_end_ids(model), 0)
    return int(next(token for token in candidates if token is not None))
