"""What is scored: continuations of a context, read from a file and turned into token ids as lm-eval does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensembler.decoding.prompts import Report, check_utf8, read_lines
from ensembler.errors import PromptError
from ensembler.extras import require


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
        for index, continuation in enumerate(self.continuations):
            if not continuation:
                which = f"choice {index}" if self.has_choices else "the continuation"
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

    def check_length(self, context: tuple[str, int] | None) -> None:
        """Raise PromptError unless it fits into the shortest context: a role and a length in tokens."""
        if context is not None and self.num_positions > context[1]:
            role, length = context
            raise PromptError(
                f"{self.source} has {self.num_positions:,} tokens to read; the context of {role} ends at {length:,}: "
                "shorten the prompt"
            )


def read_questions(path: Path, *, skip: Report | None = None) -> list[Question]:
    """Return the questions of a JSON Lines file: each a text, or a prompt with a continuation or a list of choices.

    A broken line raises PromptError with file and line number; with `skip`, it is called with the message instead.
    """
    return read_lines(path, _question, holds=f"questions; {_EXPECTED}", skip=skip)


_EXPECTED = (
    'expected {"prompt": "...", "continuation": "..."}, {"prompt": "...", "choices": ["...", ...]} or {"text": "..."}'
)


def _question(value: Any, number: int, source: str) -> Question:
    if isinstance(value, dict) and "text" in value and not value.keys() & {"prompt", "continuation", "choices"}:
        if not isinstance(value["text"], str):
            raise PromptError(f"{source}: 'text' is no text; {_EXPECTED}")
        return Question(number, "", (value["text"],), source, is_text=True)
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise PromptError(f"{source} has no text under 'prompt'; {_EXPECTED}")
    if ("continuation" in value) == ("choices" in value):
        found = "both a continuation and choices" if "choices" in value else "no continuation and no choices"
        raise PromptError(f"{source} has {found}; {_EXPECTED}")
    has_choices = "choices" in value
    texts = value["choices"] if has_choices else [value["continuation"]]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        name = "'choices' is no list of texts" if has_choices else "'continuation' is no text"
        raise PromptError(f"{source}: {name}; {_EXPECTED}")
    return Question(number, value["prompt"], tuple(texts), source, has_choices)


def encode_questions(
    questions: Sequence[Question],
    tokenizer: Any,
    *,
    context: tuple[str, int] | None = None,
    skip: Report | None = None,
) -> list[ScoringRequest]:
    """Return the questions as token ids.

    `context` is the role with the shortest context and that length in tokens. What cannot be scored raises PromptError;
    with `skip`, it is called with the message instead.
    """
    return list(_encode(questions, tokenizer, context, skip))


def _encode(
    questions: Sequence[Question], tokenizer: Any, context: tuple[str, int] | None, skip: Report | None
) -> Iterator[ScoringRequest]:
    for question in questions:
        try:
            request = encode_question(question, tokenizer, window=None if context is None else context[1])
            request.check_length(context)
        except PromptError as error:
            if skip is None:
                raise
            skip(str(error))
        else:
            yield request


def encode_question(question: Question, tokenizer: Any, *, window: int | None = None) -> ScoringRequest:
    """Return one question as token ids; raise PromptError where a text of it is none.

    The prompt and a continuation are encoded as one text and parted where the prompt's own tokens end. White space
    at the prompt's end goes to the continuation, to whose first word the tokenizer would join it. An empty
    prompt is the tokenizer's begin token, or its end token where there is none. `window`: how many tokens of a text
    are read at once.
    """
    for index, text in enumerate(question.continuations):
        if not text:
            which = (
                f"choice {index}" if question.has_choices else "the text" if question.is_text else "the continuation"
            )
            raise PromptError(f"{question.source}: {which} is empty; give it some text")
    for text in (question.prompt, *question.continuations):
        check_utf8(text, question.source)
    prompt = question.prompt.rstrip()
    space = question.prompt[len(prompt) :]
    texts = [space + text for text in question.continuations]
    if prompt:
        context = _ids(tokenizer, prompt)
        continuations = [_ids(tokenizer, prompt + text)[len(context) :] for text in texts]
    else:
        context = _begin(tokenizer, question.source)
        continuations = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        continuations = [ids[1:] if ids[:1] == context else ids for ids in continuations]
    return ScoringRequest(
        question.number,
        tuple(context),
        tuple(map(tuple, continuations)),
        question.source,
        question.has_choices,
        window if question.is_text else None,
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    """The ids with the special tokens that the tokenizer adds, but no second begin token before one in the text."""
    has_begin = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer(text, add_special_tokens=not has_begin)["input_ids"]
    return ids


def _begin(tokenizer: Any, source: str) -> list[int]:
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise PromptError(f"{source} has an empty prompt and the tokenizer no begin token; give it some text")
    return [token]
