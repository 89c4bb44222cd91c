"""Requests as token ids, as lm-eval's HFLM makes them: where a text is parted, and what is cut off one too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ensembler.errors import PromptError
from ensembler.evaluation.examples import Answer, Continuation, Example, Generation, Rolling
from ensembler.evaluation.requests import ScoringRequest

Pair = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class EncodedExample:
    """An example whose answers are log-probs, as scoring requests.

    Continuations of the same context are one request. `owners`: for each continuation of each request, to which of the
    example's requests it belongs. `num_truncated`: how many of the example's requests had
    their context cut on the left.
    """

    example: Example
    requests: tuple[ScoringRequest, ...]
    owners: tuple[tuple[int, ...], ...]
    num_truncated: int

    def answers(self, scores: Sequence[Sequence[tuple[float, bool]]]) -> list[Answer]:
        """Return the example's answers from (log-prob, is greedy) of each continuation of each request."""
        found = {
            owner: score
            for owners, of_request in zip(self.owners, scores, strict=True)
            for owner, score in zip(owners, of_request, strict=True)
        }
        return [
            found.get(owner, (0.0, True))[0] if isinstance(request, Rolling) else found[owner]
            for owner, request in enumerate(self.example.requests)
        ]


def encode_examples(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[EncodedExample]:
    """Return examples as scoring requests, numbered through from 0.

    `max_length`: of the shortest context of the members, in tokens. A context too long for it loses tokens on the left,
    as in lm-eval. Raises PromptError where a choice is no token, or longer than the context itself.
    """
    encoded: list[EncodedExample] = []
    number = 0
    for example in examples:
        encoded.append(_encode(example, tokenizer, max_length, number))
        number += len(encoded[-1].requests)
    return encoded


def _encode(example: Example, tokenizer: Any, max_length: int, number: int) -> EncodedExample:
    rolling = [request for request in example.requests if isinstance(request, Rolling)]
    if len(rolling) == len(example.requests):
        return _encode_texts(example, rolling, tokenizer, max_length, number)
    groups: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    num_truncated = 0
    for owner, request in enumerate(example.requests):
        if not isinstance(request, Continuation):
            raise TypeError(f"{example.id} asks for more than log-probs of continuations")
        context, continuation = _pair(request, tokenizer, max_length, example, owner)
        room = max_length + 1 - len(continuation)
        num_truncated += len(context) > room
        groups.setdefault(context[-room:], []).append((owner, continuation))
    requests = tuple(
        ScoringRequest(number + index, context, tuple(ids for _, ids in members), example.id, len(members) > 1)
        for index, (context, members) in enumerate(groups.items())
    )
    owners = tuple(tuple(owner for owner, _ in members) for members in groups.values())
    return EncodedExample(example, requests, owners, num_truncated)


def _encode_texts(
    example: Example, rolling: Sequence[Rolling], tokenizer: Any, max_length: int, number: int
) -> EncodedExample:
    """An empty text asks nothing: its log-prob is 0."""
    texts = [(owner, _ids(request.text, tokenizer)) for owner, request in enumerate(rolling)]
    asked = [(owner, ids) for owner, ids in texts if ids]
    prefix = (_prefix(tokenizer),)
    requests = tuple(
        ScoringRequest(number + index, prefix, (ids,), example.id, window=max_length)
        for index, (_, ids) in enumerate(asked)
    )
    return EncodedExample(example, requests, tuple((owner,) for owner, _ in asked), 0)


def _pair(request: Continuation, tokenizer: Any, max_length: int, example: Example, owner: int) -> Pair:
    context, continuation = encode_pair(request.context, request.text, tokenizer)
    what = f"choice {owner}" if len(example.requests) > 1 else "the answer"
    if not continuation:
        raise PromptError(f"{example.id}: {what} ({request.text!r}) is no token of its own; give it more text")
    if len(continuation) > max_length:
        raise PromptError(
            f"{example.id}: {what} has {len(continuation):,} tokens; the context ends at {max_length:,}: shorten it"
        )
    return context, continuation


def encode_pair(context: str, continuation: str, tokenizer: Any) -> Pair:
    """Return both as ids, parted where the context's own tokens end; white space at its end goes to the continuation.

    An empty context is the tokenizer's begin token, or its end token. HFLM's `loglikelihood` and `_encode_pair`.
    """
    if not context:
        prefix = _prefix(tokenizer)
        ids = tuple(tokenizer.encode(continuation, add_special_tokens=False))
        return (ids[:1], ids[1:]) if ids[:1] == (prefix,) else ((prefix,), ids)
    bare = context.rstrip()
    whole = _ids(bare + context[len(bare) :] + continuation, tokenizer)
    context_ids = _ids(bare, tokenizer)
    return context_ids, whole[len(context_ids) :]


def encode_generation(request: Generation, tokenizer: Any, max_length: int, source: str) -> tuple[list[int], int]:
    """Return the context's ids, and how many of them were cut off on the left to leave room for the answer.

    Raises PromptError where the answer alone may fill the context, or the context is empty. HFLM's `tok_batch_encode`.
    """
    room = max_length - request.max_new_tokens
    if room <= 0:
        raise PromptError(
            f"{source} asks for {request.max_new_tokens:,} new tokens; the context ends at {max_length:,}: lower the "
            "task's max_gen_toks"
        )
    has_begin = bool(tokenizer.bos_token) and request.context.startswith(tokenizer.bos_token)
    ids = list(tokenizer.encode(request.context, **({"add_special_tokens": False} if has_begin else {})))
    if not ids:
        raise PromptError(f"{source} has an empty prompt; give it some text")
    return ids[-room:], max(0, len(ids) - room)


def stop_strings(request: Generation, tokenizer: Any) -> list[str]:
    """Return the texts that end an answer: the task's, and the tokenizer's end token."""
    eos = tokenizer.decode(tokenizer.eos_token_id, skip_special_tokens=False)
    return [*request.until, *([] if eos in request.until else [eos])]


def cut(text: str, stop: Sequence[str]) -> str:
    """Return a generated text as far as the first of its stop strings: HFLM's `postprocess_generated_text`."""
    for term in filter(None, stop):
        text = text.split(term)[0]
    return text


def _ids(text: str, tokenizer: Any) -> tuple[int, ...]:
    """The ids with the special tokens that the tokenizer adds, but none before one in the text: HFLM's `tok_encode`."""
    has_begin = text.startswith(tokenizer.decode(_prefix(tokenizer)))
    return tuple(tokenizer.encode(text, **({"add_special_tokens": False} if has_begin else {})))


def _prefix(tokenizer: Any) -> int:
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise PromptError("the anchor's tokenizer has no begin and no end token; choose another anchor")
    return int(token)
