"""Read continuations to be scored from a file, and turn them into token ids as lm-eval does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensembler.decoding.prompts import Report, check_utf8, read_lines
from ensembler.errors import PromptError
from ensembler.extras import require

_EXPECTED = (
    'expected {"prompt": "...", "continuation": "..."}, {"prompt": "...", "choices": ["...", ...]} or {"text": "..."}'
)


@dataclass(frozen=True)
class Question:
    """A prompt and its possible continuations, as texts.

    `has_choices`: they were given as a list. `is_text`: the one continuation is a text of any length, without a prompt.
    """

    number: int
    prompt: str
    continuations: tuple[str, ...]
    source: str
    has_choices: bool = False
    is_text: bool = False


@dataclass(frozen=True)
class ScoringRequest:
    """Continuations of one context, as token ids; none of them is empty.

    `number`: of the line in the input (from 0); `source` names it in messages. `window`: the one continuation is a text
    of any length behind a begin token, read in windows of so many tokens at most. Raises PromptError.
    """

    number: int
    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    source: str
    has_choices: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        if not self.context:
            raise PromptError(f"{self.source} has no token before its continuation; give a prompt of one token or more")
        if not self.continuations:
            raise PromptError(f"{self.source} has no continuation; give one or more")
        if () in self.continuations:
            which = f"choice {self.continuations.index(())}" if self.has_choices else "the continuation"
            raise PromptError(f"{self.source}: {which} is no token of its own; give it more text")

    @property
    def num_positions(self) -> int:
        """The tokens that a member reads for the longest continuation, whose last token it need not see."""
        whole = len(self.context) + max(map(len, self.continuations)) - 1
        return whole if self.window is None else min(whole, self.window)

    def windows(self) -> list[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]]:
        """Return what is read at once: contexts and their continuations, all tokens of a text scored exactly once.

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


def read_questions(path: Path, *, skip: Report | None = None) -> list[Question]:
    """Return the questions of a JSON Lines file: each a text, or a prompt with a continuation or a list of choices.

    A broken line raises PromptError with file and line number; with `skip`, it is called with the message instead.
    """
    return read_lines(path, _question, holds=f"questions; {_EXPECTED}", skip=skip)


def _question(value: Any, number: int, source: str) -> Question:
    given = value if isinstance(value, dict) else {}
    if "text" in given and not given.keys() & {"prompt", "continuation", "choices"}:
        if not isinstance(given["text"], str):
            raise PromptError(f"{source}: 'text' is no text; {_EXPECTED}")
        return Question(number, "", (given["text"],), source, is_text=True)
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
    return Question(number, given["prompt"], tuple(texts), source, has_choices)


def encode_questions(
    questions: Sequence[Question],
    tokenizer: Any,
    *,
    context: tuple[str, int] | None = None,
    skip: Report | None = None,
) -> list[ScoringRequest]:
    """Return what `encode_question` does; with `skip`, it is called with the message in place of a PromptError."""
    requests = []
    for question in questions:
        try:
            requests.append(encode_question(question, tokenizer, context=context))
        except PromptError as error:
            if skip is None:
                raise
            skip(str(error))
    return requests


def encode_question(question: Question, tokenizer: Any, *, context: tuple[str, int] | None = None) -> ScoringRequest:
    """Return one question as token ids.

    The prompt and a continuation are encoded as one text and parted where the prompt's own tokens end. White space
    at the prompt's end goes to the continuation, to whose first word the tokenizer would join it. An empty
    prompt is the tokenizer's begin token, or its end token where there is none. `context`: the role with the shortest
    context and that length in tokens, which is the window of a text. Raises PromptError for what cannot be scored.
    """
    source = question.source
    for index, text in enumerate(question.continuations):
        if not text:
            only = "the text" if question.is_text else "the continuation"
            which = f"choice {index}" if question.has_choices else only
            raise PromptError(f"{source}: {which} is empty; give it some text")
    for text in (question.prompt, *question.continuations):
        check_utf8(text, source)
    first, continuations = _encode(question, tokenizer)
    role, length = context or ("", None)
    window = length if question.is_text else None
    request = ScoringRequest(question.number, first, continuations, source, question.has_choices, window)
    if length is not None and request.num_positions > length:
        raise PromptError(
            f"{source} has {request.num_positions:,} tokens to read; the context of {role} ends at {length:,}: "
            "shorten the prompt"
        )
    return request


def _encode(question: Question, tokenizer: Any) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Return the ids of the prompt, or the begin token, and of the continuations."""
    prompt = question.prompt.rstrip()
    texts = [question.prompt[len(prompt) :] + text for text in question.continuations]
    if prompt:
        first = _ids(tokenizer, prompt)
        found = [_ids(tokenizer, prompt + text)[len(first) :] for text in texts]
    else:
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if begin is None:
            raise PromptError(
                f"{question.source} has an empty prompt and the tokenizer no begin token; give it some text"
            )
        first = [begin]
        found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        found = [ids[1:] if ids[:1] == first else ids for ids in found]
    return tuple(first), tuple(map(tuple, found))


def _ids(tokenizer: Any, text: str) -> list[int]:
    """The ids with the special tokens that the tokenizer adds, but no second begin token before one in the text."""
    has_begin = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer(text, add_special_tokens=not has_begin)["input_ids"]
    return ids
