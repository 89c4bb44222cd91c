"""What an ensemble answers to examples, at all points of a grid: chunk by chunk, whatever was answered before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ensembler.decoding.options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.engine.grid import GridPoint
from ensembler.errors import ConfigError
from ensembler.evaluation.backends import Backend
from ensembler.evaluation.batches import Batch, make_batches
from ensembler.evaluation.encoding import EncodedExample, cut, encode_examples, encode_generation, stop_strings
from ensembler.evaluation.examples import Answer, Example, Generation

_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Answered:
    """An example and its answers (one for each of its requests) at every point of the grid, in the grid's order."""

    example: Example
    answers: tuple[list[Answer], ...]


class Chunk(Protocol):
    """Examples that are answered together. What a chunk holds, and so its rounding, depends on no earlier run."""

    @property
    def examples(self) -> tuple[Example, ...]:
        """The examples, the longest first."""

    @property
    def num_truncated(self) -> int:
        """How many of their requests lost tokens on the left to fit into the context."""

    def ids(self) -> dict[str, object]:
        """Return what each example's requests are to the members, their tokens for texts, by its id."""


class TextChunk(Chunk, Protocol):
    """Examples whose requests are texts."""

    def answer(self, backend: Backend, tokenizer: Any, grid: Sequence[GridPoint], *, seed: int = 0) -> list[Answered]:
        """Run the members once and return the answers; sampled texts depend on the seed and the example alone."""


@dataclass(frozen=True)
class ScoringChunk:
    """Examples whose answers are log-probs."""

    encoded: tuple[EncodedExample, ...]
    batches: tuple[Batch, ...]

    @property
    def examples(self) -> tuple[Example, ...]:
        """The examples, the longest first."""
        return tuple(one.example for one in self.encoded)

    @property
    def num_truncated(self) -> int:
        """How many of their requests lost tokens on the left to fit into the context."""
        return sum(one.num_truncated for one in self.encoded)

    def ids(self) -> dict[str, object]:
        """Return the tokens of each example's requests, by its id."""
        return {
            one.example.id: [(request.context, request.continuations) for request in one.requests]
            for one in self.encoded
        }

    def answer(self, backend: Backend, tokenizer: Any, grid: Sequence[GridPoint], *, seed: int = 0) -> list[Answered]:
        """Run the members once and return the answers."""
        scores = {one.request.number: one.scores for batch in backend.score(self.batches, grid) for one in batch}

        def at(index: int, one: EncodedExample) -> list[Answer]:
            found = [scores[request.number] for request in one.requests]
            return one.answers([[(score.log_probs[index], score.is_greedy[index]) for score in of] for of in found])

        return [Answered(one.example, tuple(at(index, one) for index in range(len(grid)))) for one in self.encoded]


@dataclass(frozen=True)
class GenerationChunk:
    """Examples whose answers are texts, all made with the settings of `request`."""

    examples: tuple[Example, ...]
    prompts: tuple[EncodedPrompt, ...]
    num_truncated: int
    request: Generation

    def ids(self) -> dict[str, object]:
        """Return the tokens of each example's prompt, by its id."""
        return {example.id: prompt.ids for example, prompt in zip(self.examples, self.prompts, strict=True)}

    def answer(self, backend: Backend, tokenizer: Any, grid: Sequence[GridPoint], *, seed: int = 0) -> list[Answered]:
        """Decode all points together and return the answers; sampled texts depend on the seed and the example alone."""
        stop = stop_strings(self.request, tokenizer)
        options = _options(self.request, stop, seed)
        repeats = self.request.repeats if options.num_return_sequences == 1 else 1  # greedy texts are the same
        samples = {one.number: one.samples for one in backend.complete(self.prompts, grid, options)}

        def texts(prompt: EncodedPrompt, point: GridPoint) -> list[Answer]:
            return [[cut(one.text, stop) for one in samples[prompt.number][point]] * repeats]

        return [
            Answered(example, tuple(texts(prompt, point) for point in grid))
            for example, prompt in zip(self.examples, self.prompts, strict=True)
        ]


def make_chunks(
    examples: Sequence[Example], tokenizer: Any, *, max_length: int, batch_size: int, share_contexts: bool = False
) -> list[TextChunk]:
    """Return chunks of `batch_size` examples of similar length, the longest first: too little memory shows at once.

    `max_length`: of the shortest context of the members, in tokens. `share_contexts`: as in `make_batches`. All
    examples are encoded here, so that what cannot be asked is said before a model is loaded: raises PromptError, or
    ConfigError for settings of generation that this package does not have. Examples are of one split of a task: the
    noise of sampled texts belongs to a document's place there.
    """
    generated = [example for example in examples if any(isinstance(one, Generation) for one in example.requests)]
    scored = [example for example in examples if not any(isinstance(one, Generation) for one in example.requests)]
    return [
        *_scoring_chunks(encode_examples(scored, tokenizer, max_length), batch_size, share_contexts),
        *_generation_chunks(generated, tokenizer, max_length, batch_size),
    ]


def _scoring_chunks(encoded: Sequence[EncodedExample], batch_size: int, share_contexts: bool) -> Iterator[ScoringChunk]:
    def length(one: EncodedExample) -> int:
        return max((request.num_positions for request in one.requests), default=0)

    ordered = sorted(encoded, key=lambda one: -length(one))
    for start in range(0, len(ordered), batch_size):
        together = tuple(ordered[start : start + batch_size])
        requests = [request for one in together for request in one.requests]
        yield ScoringChunk(together, tuple(make_batches(requests, batch_size, share_contexts=share_contexts)))


def _generation_chunks(
    examples: Sequence[Example], tokenizer: Any, max_length: int, batch_size: int
) -> Iterator[GenerationChunk]:
    alike: dict[str, list[tuple[Example, EncodedPrompt, int, Generation]]] = {}
    for example in examples:
        (request,) = example.requests
        if not isinstance(request, Generation):
            raise TypeError(f"{example.id} is to be scored and generated at once")
        ids, num_lost = encode_generation(request, tokenizer, max_length, example.id)
        settings = (request.max_new_tokens, request.until, request.do_sample, request.temperature, request.repeats)
        key = repr((settings, sorted(request.settings.items())))
        alike.setdefault(key, []).append((example, EncodedPrompt(example.index, ids), int(num_lost > 0), request))
    for same in alike.values():
        _options(same[0][3], stop_strings(same[0][3], tokenizer), 0)
        same.sort(key=lambda one: (-len(one[1].ids), one[1].number))
        for start in range(0, len(same), batch_size):
            chunk = same[start : start + batch_size]
            found, prompts, truncated, requests = zip(*chunk, strict=True)
            yield GenerationChunk(found, prompts, sum(truncated), requests[0])


def _options(request: Generation, stop: Sequence[str], seed: int) -> DecodingOptions:
    others = [name for name in request.settings if name not in _SAMPLING]
    if others:
        raise ConfigError(
            f"the task generates with {others[0]}={request.settings[others[0]]!r}, which a grid of alphas does not "
            f"know; expected settings are {', '.join(_SAMPLING)}, temperature and max_gen_toks"
        )
    if not request.do_sample:
        penalty = request.settings.get("repetition_penalty")
        return DecodingOptions(request.max_new_tokens, repetition_penalty=penalty, stop=tuple(stop), seed=seed)
    return DecodingOptions(
        request.max_new_tokens,
        request.temperature,
        **request.settings,
        num_return_sequences=request.repeats,
        stop=tuple(stop),
        seed=seed,
    )
