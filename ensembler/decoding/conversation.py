"""A conversation: messages in the anchor's chat template, answered one turn at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt, chat_ids, chats_of, check_length, check_text
from ensembler.decoding.samples import AnswerDecoder, TextPrinter, make_sample
from ensembler.decoding.texts import Choice, complete_prompts, decoder_of, explain
from ensembler.engine.grid import Grid, GridPoint
from ensembler.engine.row_cache import RowCache
from ensembler.engine.text_member_set import TextMemberSet
from ensembler.errors import ConfigError, OutputError, PromptError
from ensembler.files import write_whole
from ensembler.modeling import EnsembleForCausalLM
from ensembler.rules import Rule
from ensembler.vocab import end_ids


@dataclass(frozen=True)
class Answer:
    """The ids of an answer and of its prompt, and the rule and α that it was decoded at."""

    prompt_ids: list[int]
    ids: list[int]
    rule: Rule
    alpha: float
    was_stopped: bool


class Conversation:
    """The messages so far. `reply` streams the answer to standard output and returns it.

    A turn reads what is new: the members' cache is kept from turn to turn, and so is `decoder` with what it measured.
    `rule` and `alpha` are those of the next answer, `answer` is the last one.
    """

    def __init__(
        self,
        model: EnsembleForCausalLM,
        tokenizer: Any,
        options: DecodingOptions,
        *,
        system: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """`template_kwargs`: variables of the chat template, as `enable_thinking`."""
        if options.num_return_sequences > 1:
            num = options.num_return_sequences
            raise ConfigError(f"num_return_sequences is {num}; a conversation goes on with one answer: leave it at 1")
        self._model = model
        self.tokenizer = tokenizer
        self._options = options
        self._template_kwargs = template_kwargs
        self.rule, self.alpha = model.rule, float(model.alpha)
        self.decoder = decoder_of(options)
        self._streamer = _Streamer(tokenizer)
        self._cache: RowCache | None = None
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message, the rule and α."""
        self.messages = list(self._start)
        self.answer: Answer | None = None

    def change(self, *, rule: str | None = None, alpha: float | None = None) -> None:
        """Decode from the next answer on by another rule of the same members, or at another α; raise ConfigError.

        Members' caches depend on neither, so nothing is read again.
        """
        point = GridPoint(self.rule.name if rule is None else rule, self.alpha if alpha is None else alpha)
        grid = Grid.of([point], self._model.rule, self._model.contract, self._model.config.outside)
        ((self.rule, (self.alpha,)),) = grid.runs

    def stop(self) -> None:
        """End the answer that is being decoded behind its next token; a signal handler may call it."""
        self._streamer.is_stopped = True

    def reply(self, text: str) -> str:
        """Add the user's `text`, stream and return the answer; a text that does not fit leaves the messages alone.

        An answer that was stopped counts as far as it was streamed.
        """
        self.decoder.streamer = self._streamer = streamer = _Streamer(self.tokenizer)
        check_text(text, "the message")
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = chat_ids(self.tokenizer, messages, self._template_kwargs)
        members = self._model.member_set
        others = {}
        if isinstance(members, TextMemberSet):
            others = chats_of(members.text.plan, messages, self._template_kwargs)
        prompt = EncodedPrompt(0, ids, is_chat=True, others=others)
        check_length(len(ids), "the conversation", self._model.shortest_context)
        try:
            with self._model.at(self.rule, self.alpha):
                (completion,) = complete_prompts(
                    self._model,
                    self.tokenizer,
                    [prompt],
                    self._options,
                    decoder=self.decoder,
                    cache=self._kept_cache(len(ids)),
                )
            (sample,) = completion.samples
        except _AnswerStopped:
            decoder, ends = AnswerDecoder(self.tokenizer, ids, is_chat=True), end_ids(self._model.generation_config)
            sample = make_sample(streamer.ids, decoder, ends, self._options.stop)
        self.messages = [*messages, {"role": "assistant", "content": sample.text}]
        self.answer = Answer(ids, sample.ids, self.rule, self.alpha, streamer.is_stopped)
        return sample.text

    def explain(self) -> list[Choice]:
        """Return a Choice for each token of the last answer, at the rule and α that it was decoded at."""
        if self.answer is None:
            raise PromptError("there is no answer to explain yet; write a message first")
        with self._model.at(self.answer.rule, self.answer.alpha):
            return explain(self._model, self.answer.prompt_ids, self.answer.ids)

    def save(self, path: Path) -> None:
        """Write the messages as JSON lines to a new file. Raises PromptError before the first answer, OutputError."""
        if self.answer is None:
            raise PromptError("there is nothing to save yet; write a message first")
        if path.exists():
            raise OutputError(f"{path} exists already; choose another name")
        write_whole(path, (json.dumps(message, ensure_ascii=False) + "\n" for message in self.messages))

    def _kept_cache(self, room: int) -> RowCache | None:
        """The cache of the turns before, or a new one; None where a member keeps no rows."""
        members = self._model.member_set
        if self._options.num_beams > 1 or members.why_not_by_row() is not None:
            return None
        if self._cache is None:
            self._cache = members.row_cache(1, room)
        return self._cache


class _AnswerStopped(Exception):
    """Leaves the decode loop between two steps, where the cache is whole."""


class _Streamer(TextPrinter):
    """Prints an answer as it comes; once `is_stopped` is set, the next token is the last."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, is_chat=True)
        self.is_stopped = False

    def put(self, value: Tensor) -> None:
        """Take the prompt, then a token at a time."""
        super().put(value)
        if self.ids and self.is_stopped:
            self.end()
            raise _AnswerStopped
