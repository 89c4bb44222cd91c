"""A conversation: messages in the anchor's chat template, answered one turn at a time."""

from __future__ import annotations

from typing import Any

from transformers import TextStreamer

from ensembler.decoding.prompts import EncodedPrompt, chat_ids, check_length
from ensembler.decoding.texts import DecodingOptions, complete_batches
from ensembler.modeling import EnsembleForCausalLM


class Conversation:
    """The messages so far. `reply` streams the answer to standard output and returns it."""

    def __init__(
        self, model: EnsembleForCausalLM, tokenizer: Any, options: DecodingOptions, *, system: str | None = None
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._options = options
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
        streamer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        prompt = EncodedPrompt(0, ids)
        completions = next(complete_batches(self._model, self._tokenizer, [prompt], self._options, streamer=streamer))
        answer = completions[0].samples[0].text
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer
