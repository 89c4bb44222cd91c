"""Options of decoding that the command line and the library share, checked when they are given."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import GenerationConfig, LogitsProcessor
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ensembler.decoding.drafting import AUTO, NONE
from ensembler.errors import ConfigError

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
    """Options of decoding. Temperature 0 is greedy; what is not set leaves the ensemble's distribution as it is.

    `max_new_tokens` in tokens; `stop`: texts that end a completion and are cut off; `seed`: makes sampling repeatable
    for the same prompts. `draft`: who drafts, as in `Decoder`, up to `draft_tokens` a round;
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

    def processors(self) -> list[LogitsProcessor]:
        """Return the processors of the options, in the order of `transformers`; the kernels know the temperature."""
        found: list[LogitsProcessor] = []
        if self.repetition_penalty not in (None, 1.0):
            found.append(RepetitionPenaltyLogitsProcessor(penalty=self.repetition_penalty))
        if self.temperature > 0:
            if self.temperature != 1:
                found.append(TemperatureLogitsWarper(self.temperature))
            if self.top_k is not None:
                found.append(TopKLogitsWarper(top_k=self.top_k))
            if self.top_p is not None and self.top_p < 1:
                found.append(TopPLogitsWarper(top_p=self.top_p))
            if self.min_p is not None:
                found.append(MinPLogitsWarper(min_p=self.min_p))
        return found

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
