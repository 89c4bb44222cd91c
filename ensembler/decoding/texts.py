"""Texts from prompts: one completion per prompt, at the ensemble's own α or at all points of a grid."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ensembler.decoding.batching import (
    Decoded,
    TextLimits,
    batches_by_length,
    decode_queue,
    ends_only,
    pad_id,
    pad_left,
    room_for,
)
from ensembler.decoding.decoder import Decoder
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.samples import AnswerDecoder, GridOutput, Sample, make_sample, stopping_criteria
from ensembler.engine.grid import Grid, GridPoint
from ensembler.engine.model_runner import Step
from ensembler.engine.row_cache import RowCache
from ensembler.engine.text_member_set import TextMemberSet
from ensembler.errors import ConfigError
from ensembler.files import digest
from ensembler.modeling import EnsembleForCausalLM
from ensembler.vocab import end_ids

_SEED_STEP = 1_000_003  # batches get seeds far apart, so that neighbours of a user's seed do not share any
_WITHOUT_EFFECT = ("prefill_chunk", "draft", "draft_tokens")  # on the texts


def run_settings(
    model: TextLimits,
    prompts: Sequence[EncodedPrompt],
    options: DecodingOptions,
    *,
    points: Sequence[GridPoint] = (),
    backend: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return all that the texts of a run depend on, but for the weights themselves.

    `backend`: what else is to be said of what decodes them.
    """
    return {
        "prompts": digest([[prompt.number, prompt.ids] for prompt in prompts]),
        "ensemble": {key: value for key, value in model.config.to_dict().items() if key != "transformers_version"},
        "end tokens": [] if model.generation_config is None else sorted(end_ids(model.generation_config)),
        "points": [f"{point.rule} at {point.alpha:g}" for point in points],
        **{name: value for name, value in asdict(options).items() if name not in _WITHOUT_EFFECT},
        "backend": dict(backend or {}),
    }


@dataclass(frozen=True)
class Completion:
    """All samples of one prompt, and the seconds that it took, or its batch did."""

    number: int
    prompt_ids: list[int]
    samples: list[Sample]
    seconds: float

    @property
    def all_samples(self) -> list[Sample]:
        """Return the samples, as `GridCompletion` does those of all points."""
        return self.samples

    def to_row(self) -> dict[str, Any]:
        """Return one line of the output file: a text, or a list of samples where several were asked for."""
        return {"number": self.number, **_texts(self.samples), "seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class GridCompletion:
    """All samples of one prompt at every point of the grid, and the seconds that they took together."""

    number: int
    prompt_ids: list[int]
    samples: dict[GridPoint, list[Sample]]
    seconds: float

    @property
    def all_samples(self) -> list[Sample]:
        """Return the samples of all points."""
        return [sample for of_point in self.samples.values() for sample in of_point]

    def to_row(self) -> dict[str, Any]:
        """Return one line of the output file: under `points` a rule, an alpha and the text or samples of each."""
        points = [{"rule": point.rule, "alpha": point.alpha, **_texts(found)} for point, found in self.samples.items()]
        return {"number": self.number, "points": points, "seconds": round(self.seconds, 3)}


def _texts(samples: Sequence[Sample]) -> dict[str, Any]:
    rows = [{"text": one.text, "num_tokens": one.num_tokens, "finish_reason": one.finish_reason} for one in samples]
    return rows[0] if len(rows) == 1 else {"samples": rows}


def complete_prompts(
    model: EnsembleForCausalLM,
    tokenizer: Any,
    prompts: Sequence[EncodedPrompt],
    options: DecodingOptions,
    *,
    batch_size: int = 1,
    done: frozenset[int] = frozenset(),
    decoder: Decoder | None = None,
    share_prefixes: bool = True,
    cache: RowCache | None = None,
) -> Iterator[Completion]:
    """Yield the completions of prompts as they end, but for the numbers in `done`; `batch_size` run together.

    A text depends on its prompt's number, the options and the seed alone (up to rounding). `decoder` says who drafts
    and counts what happens (default: that of the options). With `share_prefixes`, what prompts begin with in common is
    read once. `cache`: see `decode_queue`.
    """
    decoder = decoder_of(options) if decoder is None else decoder
    wanted = [prompt for prompt in prompts if prompt.number not in done]
    decoded = _decode(
        model, tokenizer, wanted, options, decoder, batch_size, cache=cache, share_prefixes=share_prefixes
    )
    for one in decoded:
        (samples,) = _samples(one, tokenizer, end_ids(model.generation_config), options.stop)
        decoder.stats.num_tokens += sum(sample.num_tokens for sample in samples)
        yield Completion(one.prompt.number, one.prompt.ids, samples, one.seconds)


def complete_grid(
    model: EnsembleForCausalLM,
    tokenizer: Any,
    prompts: Sequence[EncodedPrompt],
    points: Sequence[GridPoint],
    options: DecodingOptions,
    *,
    batch_size: int = 1,
    done: frozenset[int] = frozenset(),
    decoder: Decoder | None = None,
) -> Iterator[GridCompletion]:
    """Yield the texts of prompts at all `points` as they end; the model's own α does not count.

    Each is that of `complete_prompts` at its rule and α (but for rounding). Raises ConfigError for points that do not
    fit the model, and for beams.
    """
    # What is wrong with the points should be said before any prompt is run.
    Grid.of(points, model.rule, model.contract, model.config.outside)
    if options.num_beams > 1:
        raise ConfigError(f"num_beams is {options.num_beams}; a grid is decoded without beams: leave it at 1")
    decoder = decoder_of(options, points=points) if decoder is None else decoder
    wanted = [prompt for prompt in prompts if prompt.number not in done]
    for one in _decode(model, tokenizer, wanted, options, decoder, batch_size):
        samples = _samples(one, tokenizer, end_ids(model.generation_config), options.stop)
        decoder.stats.num_tokens += sum(sample.num_tokens for of_point in samples for sample in of_point)
        yield GridCompletion(one.prompt.number, one.prompt.ids, dict(zip(points, samples, strict=True)), one.seconds)


def decoder_of(options: DecodingOptions, **others: Any) -> Decoder:
    """Return what decodes as the options say; `others` are settings of `Decoder`."""
    return Decoder(options.draft, num_positions=options.draft_tokens, seed=options.seed, **others)


def _samples(one: Decoded, tokenizer: Any, ends: Collection[int], stops: Sequence[str]) -> list[list[Sample]]:
    decoder = AnswerDecoder(tokenizer, one.prompt.ids, is_chat=one.prompt.is_chat)
    return [[make_sample(ids, decoder, ends, stops) for ids in of_point] for of_point in one.ids]


def _decode(
    model: EnsembleForCausalLM,
    tokenizer: Any,
    prompts: Sequence[EncodedPrompt],
    options: DecodingOptions,
    decoder: Decoder,
    num_together: int,
    *,
    cache: RowCache | None = None,
    share_prefixes: bool = True,
) -> Iterator[Decoded]:
    """Decode in the loop, or where it does not do what is asked batch by batch with `generate`."""
    if isinstance(model.member_set, TextMemberSet):
        model.member_set.text.prompts = {tuple(one.ids): one.others for one in prompts if one.others}
    reason = "beam search" if options.num_beams > 1 else model.member_set.why_not_by_row()
    if reason is None:
        running = decode_queue(
            model, tokenizer, prompts, options, decoder, num_together, cache=cache, share_prefixes=share_prefixes
        )
        while True:  # whoever takes the texts may use the model between two of them
            with decoder.watching(model):
                one = next(running, None)
            if one is None:
                return
            yield one
    for batch in batches_by_length(model, prompts, num_together, options.max_new_tokens):
        if options.num_beams > 1:  # which no decoder sees
            decoder.stats.add_batch_of_transformers(reason)
        with decoder.watching(model), ends_only(model):
            decoded = list(_generate(model, tokenizer, batch, options, decoder))
        yield from decoded


def _generate(
    model: EnsembleForCausalLM,
    tokenizer: Any,
    batch: Sequence[EncodedPrompt],
    options: DecodingOptions,
    decoder: Decoder,
) -> Iterator[Decoded]:
    """One batch by `generate`. Its seed is that of its first prompt: it does not depend on the batches before."""
    start = time.perf_counter()
    input_ids, attention_mask = pad_left([prompt.ids for prompt in batch], pad_id(model, tokenizer))
    length = input_ids.shape[1]
    room = room_for(model, length, options.max_new_tokens)
    decoder = copy(decoder)
    decoder.numbers, decoder.seed = [prompt.number for prompt in batch], options.seed
    if options.seed is not None:
        torch.manual_seed((options.seed + batch[0].number * _SEED_STEP) % 2**63)
    output = model.generate(
        input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=options.generation_config(room),
        stopping_criteria=stopping_criteria(tokenizer, options.stop, length),
        streamer=decoder.streamer,
        custom_generate=decoder if options.num_beams == 1 else None,
    )
    sequences = output.sequences if isinstance(output, GridOutput) else output[None]
    num, seconds = options.num_return_sequences, time.perf_counter() - start
    for row, prompt in enumerate(batch):
        new = [[ids[length:] for ids in of_point[row * num : (row + 1) * num].tolist()] for of_point in sequences]
        yield Decoded(prompt, new, seconds)


ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class Candidate:
    """A next token and its probability."""

    token: int
    probability: float


@dataclass(frozen=True)
class Choice:
    """One token of a text, and what the ensemble and its anchor alone find most probable there.

    `token` is what was chosen: the ensemble's most probable token when decoding is greedy, a drawn one when it samples.
    `probability` is the ensemble's for it, `anchor_probability` the anchor's.
    """

    token: int
    probability: float
    ensemble_token: int
    anchor_token: int
    anchor_probability: float

    @property
    def moved(self) -> bool:
        """Return whether the ensemble's most probable token is not its anchor's."""
        return self.ensemble_token != self.anchor_token


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return what each token adds to the text: a token alone often decodes without the space in front of it."""
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        texts.append(text[len(before) :] if text.startswith(before) else tokenizer.decode([ids[end - 1]]))
        before = text
    return texts


@torch.inference_mode()
def next_tokens(model: EnsembleForCausalLM, ids: Sequence[int], top_k: int = 5) -> dict[str, list[Candidate]]:
    """Return the `top_k` most probable next tokens of the ensemble and of every member, by role, after `ids`."""
    logits = model.member_set.logits(Step(torch.tensor([list(ids)], device=model.device), logits_to_keep=1))
    scores = {ENSEMBLE: model.combine(logits), **logits}
    top_k = min(top_k, *(values.shape[-1] for values in scores.values()))
    others = set(logits) - {model.rule.anchor} if isinstance(model.member_set, TextMemberSet) else set()
    probabilities = {
        # Beside other tokenizers, those of the candidates; 0 stands for all other tokens.
        role: values[0, -1].exp() * (values[0, -1] != 0) if role in others else values[0, -1].float().softmax(-1)
        for role, values in scores.items()
    }
    return {role: _top(values, top_k) for role, values in probabilities.items()}


def _top(probabilities: Tensor, top_k: int) -> list[Candidate]:
    values, tokens = probabilities.topk(top_k)
    return [Candidate(token, value) for token, value in zip(tokens.tolist(), values.tolist(), strict=True)]


@torch.inference_mode()
def explain(model: EnsembleForCausalLM, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> list[Choice]:
    """Return one Choice for each token of `new_ids`, from one forward over the finished text.

    Probabilities are before sampling options: temperature and cut-offs change what is drawn, not what is shown here.
    """
    ids = torch.tensor([[*prompt_ids, *new_ids]], device=model.device)
    logits = model.member_set.logits(Step(ids[:, :-1], logits_to_keep=len(new_ids)))
    ensemble = model.combine(logits)[0].softmax(-1)
    anchor = logits[model.rule.anchor][0].float().softmax(-1).to(ensemble.device)
    tokens = ids[0, len(prompt_ids) :].to(ensemble.device)
    columns = (
        tokens.tolist(),
        ensemble.gather(-1, tokens[:, None])[:, 0].tolist(),
        ensemble.argmax(-1).tolist(),
        anchor.argmax(-1).tolist(),
        anchor.gather(-1, tokens[:, None])[:, 0].tolist(),
    )
    return [Choice(*values) for values in zip(*columns, strict=True)]
