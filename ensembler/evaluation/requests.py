"""Read continuations to be scored from a file, and turn them into token ids as lm-eval does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ensembler.decoding.prompts import Report, check_utf8, read_lines, text_ids
from ensembler.errors import PromptError
from ensembler.extras import require

_NUM_SHOWN = 12  # tokens of a text in a message
_EXPECTED = (
    'expected {"prompt": "...", "continuation": "..."}, {"prompt": "...", "choices": ["...", ...]} or {"text": "..."}'
)


@dataclass(frozen=True)
class ScoringRequest:
    """Continuations of one context, as token ids; none of them is empty.

    `number`: of the line in the input (from 0); `source` names it in messages. `window`: the one continuation is a text
    of any length behind a begin token, read in windows of so many tokens at most. `has_moved_space`: white space at the
    prompt's end was moved to the continuations. `is_merged`: a token spans the end of the prompt, so that what a
    continuation begins with is not scored. `fields`: all of the line. Raises PromptError.
    """

    number: int
    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    source: str
    has_choices: bool = False
    window: int | None = None
    has_moved_space: bool = False
    is_merged: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.context:
            raise PromptError(f"{self.source} has no token before its continuation; give a prompt of one token or more")
        if not self.continuations:
            raise PromptError(f"{self.source} has no continuation; give one or more")
        if () in self.continuations:
            which = f"choice {self.continuations.index(())}" if self.has_choices else "the continuation"
            remedy = "end the prompt where a word ends" if self.is_merged else "give it more text"
            raise PromptError(f"{self.source}: {which} is no token of its own; {remedy}")

    @property
    def num_positions(self) -> int:
        """The number of tokens that a member reads for the longest continuation: all but the last."""
        whole = len(self.context) + max(map(len, self.continuations)) - 1
        return whole if self.window is None else min(whole, self.window)

    def windows(self) -> list[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]]:
        """Return the contexts that are read at once with their continuations; each token of a text is scored once.

        A text that is longer than its window is cut as lm-eval's `loglikelihood_rolling` cuts it: every window but the
        first is full, and scores only what no window before it did. Raises MissingExtraError for such without lm-eval.
        """
        if self.window is None or len(self.continuations[0]) <= self.window:
            return [(self.context, self.continuations)]
        lm_eval: Any = require("lm_eval.utils", "eval")
        pairs = lm_eval.get_rolling_token_windows(
            token_list=list(self.continuations[0]), prefix_token=self.context[0], max_seq_len=self.window, context_len=1
        )
        disjoint = map(lm_eval.make_disjoint_window, pairs)
        return [(tuple(context), (tuple(continuation),)) for context, continuation in disjoint]


def read_requests(
    path: Path, tokenizer: Any, *, context: tuple[str, int] | None = None, skip: Report | None = None
) -> list[ScoringRequest]:
    """Return the requests of a JSON Lines file: each a text, or a prompt with a continuation or a list of choices.

    `context`: see `encode_request`. A line that cannot be scored raises PromptError with file and line number; with
    `skip`, it is called with the message instead.
    """

    parse = partial(make_request, tokenizer=tokenizer, context=context)
    return read_lines(path, parse, holds=f"line that can be scored; {_EXPECTED}", skip=skip)


def make_request(
    value: Any, number: int, source: str, tokenizer: Any, *, context: tuple[str, int] | None = None
) -> ScoringRequest:
    """Return the request of one line of such a file, `number` from 0; raise PromptError, which names `source`."""
    prompt, texts, has_choices = _texts(value, source)
    found = encode_request(tokenizer, prompt, texts, source, number, has_choices=has_choices, context=context)
    return replace(found, fields=value)


def _texts(value: Any, source: str) -> tuple[str | None, list[str], bool]:
    """Return the prompt (None for a text), the continuations, and whether they are choices."""
    given = value if isinstance(value, dict) else {}
    if "text" in given and not given.keys() & {"prompt", "continuation", "choices"}:
        if not isinstance(given["text"], str):
            raise PromptError(f"{source}: 'text' is no text; {_EXPECTED}")
        return None, [given["text"]], False
    if not isinstance(given.get("prompt"), str):
        raise PromptError(f"{source} has no text under 'prompt'; {_EXPECTED}")
    has_choices = "choices" in given
    if has_choices == ("continuation" in given):
        found = "both a continuation and choices" if has_choices else "no continuation and no choices"
        raise PromptError(f"{source} has {found}; {_EXPECTED}")
    texts = given["choices"] if has_choices else [given["continuation"]]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        name = "'choices' is no list of texts" if has_choices else "'continuation' is no text"
        raise PromptError(f"{source}: {name}; {_EXPECTED}")
    return given["prompt"], texts, has_choices


def encode_request(
    tokenizer: Any,
    prompt: str | None,
    continuations: Sequence[str],
    source: str,
    number: int = 0,
    *,
    has_choices: bool = False,
    context: tuple[str, int] | None = None,
) -> ScoringRequest:
    """Return a prompt and its continuations as token ids; without a prompt, the one continuation is a text.

    The prompt and a continuation are encoded as one text and parted behind as many tokens as the prompt has by itself,
    as in lm-eval. White space at the prompt's end goes to the continuation, to whose first word the tokenizer would
    join it. An empty prompt is the tokenizer's begin token, or its end token where there is none. `context`: the role
    with the shortest context and that length in tokens, which is the window of a text. Raises PromptError for what
    cannot be scored.
    """
    for index, text in enumerate(continuations):
        if not text:
            name = f"choice {index}" if has_choices else "the text" if prompt is None else "the continuation"
            raise PromptError(f"{source}: {name} is empty; give it some text")
    for text in (prompt or "", *continuations):
        check_utf8(text, source)
    first, found, is_merged = _encode(tokenizer, prompt or "", continuations, source)
    role, length = context or ("", None)
    window = length if prompt is None else None
    has_moved = prompt is not None and prompt != prompt.rstrip()
    ids = tuple(first), tuple(map(tuple, found))
    request = ScoringRequest(number, *ids, source, has_choices, window, has_moved, is_merged)
    if length is not None and request.num_positions > length:
        limit = f"the context of {role} ends at {length:,}"
        raise PromptError(f"{source} has {request.num_positions:,} tokens to read; {limit}: shorten the prompt")
    return request


def _encode(tokenizer: Any, prompt: str, texts: Sequence[str], source: str) -> tuple[list[int], list[list[int]], bool]:
    """Return the ids of the prompt, or the begin token, and of the continuations; whether tokens span their seam."""
    head = prompt.rstrip()
    texts = [prompt[len(head) :] + text for text in texts]
    if head:
        first, wholes = text_ids(tokenizer, head), [text_ids(tokenizer, head + text) for text in texts]
        is_merged = any(whole[: len(first)] != first for whole in wholes)
        return first, [whole[len(first) :] for whole in wholes], is_merged
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise PromptError(f"{source} has an empty prompt and the tokenizer no begin token; give it some text")
    found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [begin], [ids[1:] if ids[:1] == [begin] else ids for ids in found], False


def group_by_context(
    pairs: Iterable[Sequence[Sequence[int]]], tokenizer: Any, names: Mapping[tuple[int, ...], str] | None = None
) -> list[ScoringRequest]:
    """Return one request for each context of (context, continuation) pairs, with its different continuations.

    `names`: of contexts, for messages; the others are named by their first words.
    """
    together: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for context, continuation in pairs:
        together.setdefault(tuple(context), {})[tuple(continuation)] = None
    requests = []
    for number, (context, found) in enumerate(together.items()):
        continuations = tuple(found)
        source = (names or {}).get(context)
        if source is None:
            source = f"the text that begins with {tokenizer.decode((context + continuations[0])[:_NUM_SHOWN])!r}"
        requests.append(ScoringRequest(number, context, continuations, source))
    return requests
