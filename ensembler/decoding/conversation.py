"""A conversation: messages in the anchor's chat template, answered one turn at a time."""

from __future__ import annotations

from typing import Any

from transformers import TextStreamer

from ensembler.decoding.options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt, chat_ids, check_length
from ensembler.decoding.texts import complete_prompts, decoder_of
from ensembler.engine.row_cache import RowCache
from ensembler.errors import ConfigError
from ensembler.modeling import EnsembleForCausalLM


class Conversation:
    """The messages so far. `reply` streams the answer to standard output and returns it.

    A turn reads what is new: the members' cache is kept from turn to turn, and so is `decoder` with what it measured.
    """

    def __init__(
        self, model: EnsembleForCausalLM, tokenizer: Any, options: DecodingOptions, *, system: str | None = None
    ) -> None:
        if options.num_return_sequences > 1:
            num = options.num_return_sequences
            raise ConfigError(f"num_return_sequences is {num}; a conversation goes on with one answer: leave it at 1")
        self._model = model
        self._tokenizer = tokenizer
        self._options = options
        self.decoder = decoder_of(options)
        self._cache: RowCache | None = None
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self._start)

    def reply(self, text: str) -> str:
        """Add the user's `text`, stream and return the answer; a text that does not fit leaves the messages alone."""
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = chat_ids(self._tokenizer, messages)
        check_length(len(ids), "the conversation", self._model.shortest_context)
        self.decoder.streamer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        prompts = [EncodedPrompt(0, ids)]
        (completion,) = complete_prompts(
            self._model, self._tokenizer, prompts, self._options, decoder=self.decoder, cache=self._kept_cache(len(ids))
        )
        answer = completion.samples[0].text
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def _kept_cache(self, room: int) -> RowCache | None:
        """The cache of the turns before, or a new one; None where a member keeps no rows."""
        members = self._model.member_set
        if self._options.num_beams > 1 or members.why_not_by_row() is not None:
            return None
        if self._cache is None:
            self._cache = members.row_cache(1, room)
        return self._cache
