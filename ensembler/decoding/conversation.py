"""A conversation: messages in the anchor's chat template, answered one turn at a time."""

from __future__ import annotations

import time
from typing import Any

from transformers import TextStreamer

from ensembler.cache import EnsembleCache
from ensembler.decoding.prefixes import can_share, common_length
from ensembler.decoding.prompts import EncodedPrompt, chat_ids, check_length
from ensembler.decoding.texts import DecodingOptions, complete, seed_batch
from ensembler.modeling import EnsembleForCausalLM


class Conversation:
    """The messages so far. `reply` streams the answer to standard output and returns it.

    A turn reads what is new: the members' cache is kept from turn to turn, and cut to what the texts share. `decoder`
    is kept too, with what it has measured.
    """

    def __init__(
        self, model: EnsembleForCausalLM, tokenizer: Any, options: DecodingOptions, *, system: str | None = None
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._options = options
        self.decoder = options.decoder()
        self._cache: EnsembleCache | None = None
        self._held: list[int] = []  # the tokens that it has read
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
        cache = self._cache = self._cache_for(ids)
        self._held = []  # a turn that fails leaves nothing to go on with
        seed_batch(self._options)
        completions = complete(
            self._model,
            self._tokenizer,
            [EncodedPrompt(0, ids)],
            self._options,
            self.decoder,
            start=time.perf_counter(),
            cache=cache,
        )
        if cache is not None:
            self._held = [*ids, *completions[0].samples[0].ids][: cache.get_seq_length()]
        answer = completions[0].samples[0].text
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def _cache_for(self, ids: list[int]) -> EnsembleCache | None:
        """The cache of the turns before, cut to what they share with `ids`; a new one where it cannot go back.

        None where a member keeps more than keys and values: `generate` then decides.
        """
        length = min(common_length([ids, self._held]), len(ids) - 1) if self._held else 0
        if length and self._cache is not None and self._cache.crop_to(length):
            return self._cache
        return self._model.new_cache() if can_share(self._model) else None
