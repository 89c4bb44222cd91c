"""A decoded row as a text: how it is decoded, where it ends and why; the texts of a grid, and tokens as they come."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation import StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from ensembler.decoding.rows import Row, Text


@dataclass(frozen=True)
class GridOutput:
    """The output of `generate` for a grid.

    `sequences` (points, prompts · samples, positions) int64: prompts and texts as `generate` returns them for each
    point, padded behind their ends; `lengths` (points, prompts · samples) int64 count their positions up to there.
    `rows_per_step`: how many different texts each forward of the members served.
    """

    sequences: Tensor
    lengths: Tensor
    rows_per_step: tuple[int, ...]


class Stream:
    """Hands tokens to a streamer, position by position, as soon as every running text has them."""

    def __init__(self, streamer: BaseStreamer | None, texts: Sequence[Text], pad: int = 0) -> None:
        self._streamer = streamer
        self._texts = texts
        self._pad = pad
        self._num = 0

    def go_on(self, rows: Sequence[Row]) -> None:
        """Hand on what is new on `rows`; of texts that have ended, padding."""
        if self._streamer is None:
            return
        running = {text: row.new_ids for row in rows for text in row.texts}
        texts = [running.get(text, text.ids) for text in self._texts]
        ready = min((len(ids) for ids in running.values()), default=max(map(len, texts)))
        for position in range(self._num, ready):
            tokens = [ids[position] if position < len(ids) else self._pad for ids in texts]
            self._streamer.put(torch.tensor(tokens))
        self._num = max(ready, self._num)
        if not running:
            self._streamer.end()


class StopChecker:
    """`ids` end a text; `criteria` are asked too: called with texts (rows, positions) int64, they say which end.

    `whole`: criteria see the prompt before the new tokens, with its padding; else the new tokens alone.
    """

    def __init__(
        self,
        ids: Collection[int],
        criteria: Sequence[Callable[..., Tensor]] = (),
        *,
        whole: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self._ids = frozenset(ids)
        self._criteria = StoppingCriteriaList(criteria)
        self._whole = whole
        self._device = device

    def ended(self, grown: Sequence[tuple[Row, Sequence[int]]]) -> list[bool]:
        """Return whether each row ends with the last of the tokens that it has gained."""
        found = [tokens[-1] in self._ids or len(tokens) >= row.room for row, tokens in grown]
        if self._criteria:
            texts = [[*(row.columns if self._whole else ()), *row.new_ids, *tokens] for row, tokens in grown]
            for length in {len(text) for text in texts}:
                which = [index for index, text in enumerate(texts) if len(text) == length]
                ids = torch.tensor([texts[index] for index in which], device=self._device)
                for index, is_end in zip(which, self._criteria(ids, None).tolist(), strict=True):
                    found[index] = found[index] or is_end
        return found


@dataclass(frozen=True)
class Sample:
    """One decoded text. `ids` are its new tokens, the end token included; finish reason is 'stop' or 'length'."""

    text: str
    num_tokens: int
    finish_reason: str
    ids: list[int]


_TAIL = 16  # tokens of a prompt behind which an answer is decoded: more do not change it


class AnswerDecoder:
    """Decodes the new tokens of a text behind its prompt, so that prompt and text together are the whole text.

    By itself, many a tokenizer drops the space that a text begins with. The answer in a chat is decoded by itself: what
    stands before it is the template's.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], *, is_chat: bool = False) -> None:
        self._tokenizer = tokenizer
        self._before = list(prompt_ids[-_TAIL:])
        if not self._decoded(self._before, raw=False):  # nothing but special tokens
            self._before = list(prompt_ids)
        self.is_chat = is_chat

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of new `ids`, without special tokens."""
        return self._decoded(ids, raw=False) if self.is_chat else self._behind(ids, raw=False)

    def raw(self, ids: Sequence[int]) -> str:
        """Return the text of new `ids` behind the prompt, special tokens included, as a stop text is looked for."""
        return self._behind(ids, raw=True)

    def _behind(self, ids: Sequence[int], *, raw: bool) -> str:
        before, whole = (self._decoded(one, raw=raw) for one in (self._before, [*self._before, *ids]))
        # Bytes of an incomplete character may change how those before them are decoded.
        return whole[len(before) :] if whole.startswith(before) else self._decoded(ids, raw=raw)

    def _decoded(self, ids: Sequence[int], *, raw: bool) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=not raw)
        return text

    def _dropped(self, ids: Sequence[int]) -> str:
        """Return the space that `raw` drops of new `ids`, and shows where they stand behind a text; else ''."""
        once, twice = (self._decoded(one, raw=True) for one in (ids[:1], [*ids[:1], *ids[:1]]))
        return " " if twice == f"{once} {once}" and self.raw(ids[:1]) == once else ""

    def cut(self, ids: Sequence[int], stops: Sequence[str]) -> tuple[str, int] | None:
        """Return the text before the first of `stops` and the number of tokens up to its end, or None without any.

        A stop text may hold special tokens, and a space that the tokenizer drops at the beginning of a text.
        """
        whole, dropped = self.raw(ids), self._dropped(ids)
        cuts = [cut for cut in ((dropped + whole).find(stop) for stop in stops) if cut >= 0]
        if not cuts:
            return None
        kept = whole[: max(0, min(cuts) - len(dropped))]
        num = next(n for n in range(1, len(ids) + 1) if any(stop in dropped + self.raw(ids[:n]) for stop in stops))
        begun = next(n for n in reversed(range(num)) if kept.startswith(self.raw(ids[:n])))
        rest = kept[len(self.raw(ids[:begun])) :]  # of the token in which the stop text begins
        token = self.text(ids[begun : begun + 1])
        if not token:  # a special one, whose name is not shown
            rest = ""
        elif self.is_chat and not begun and self.raw(ids[:1]) == f" {token}":  # by itself it has no space
            rest = rest.removeprefix(" ")
        return self.text(ids[:begun]) + rest, num


def make_sample(ids: list[int], decoder: AnswerDecoder, ends: Collection[int], stops: Sequence[str]) -> Sample:
    """Return the sample of a decoded row: cut at its end token, its text at the first of `stops`."""
    end = next((position for position, token in enumerate(ids) if token in ends), None)
    kept = ids if end is None else ids[: end + 1]
    found = decoder.cut(kept, stops) if stops else None
    if found is None:
        return Sample(decoder.text(kept), len(kept), "length" if end is None else "stop", kept)
    text, num = found  # what follows in a batch is padding
    return Sample(text, num, "stop", kept[:num])


class TextPrinter(BaseStreamer):  # type: ignore[misc,unused-ignore]
    """Prints a text as its tokens come: together what `make_sample` returns. `ids` are the new ones so far."""

    def __init__(self, tokenizer: Any, *, is_chat: bool = False) -> None:
        self._tokenizer = tokenizer
        self._is_chat = is_chat
        self._decoder: AnswerDecoder | None = None
        self._begun: list[int] = []  # tokens behind the decoder's prompt
        self._num_printed = 0  # characters of theirs
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        """Take the prompt, then a token at a time."""
        ids = value.flatten().tolist()
        if self._decoder is None:
            self._decoder = AnswerDecoder(self._tokenizer, ids, is_chat=self._is_chat)
            return
        self.ids += ids
        self._begun += ids
        text = self._decoder.text(self._begun)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character that is not complete yet
            return
        self._print(text)
        if len(self._begun) >= _TAIL and text:
            self._decoder = AnswerDecoder(self._tokenizer, self._begun)
            self._begun, self._num_printed = [], 0

    def end(self) -> None:
        """Print what is left, and end the line."""
        if self._decoder is not None:
            self._print(self._decoder.text(self._begun))
        print(flush=True)

    def _print(self, text: str) -> None:
        print(text[self._num_printed :], end="", flush=True)
        self._num_printed = len(text)


class _StopStrings(StopStringCriteria):  # type: ignore[misc,unused-ignore]
    """transformers' criterion, for vocabularies too that do not hold the text which it tries tokens behind."""

    @staticmethod
    def clean_tokenizer_vocab(tokenizer: Any, static_prefix: str = "abcdef", **kwargs: Any) -> Any:
        """Return the texts of all tokens, and their ids."""

        def is_kept(text: str) -> bool:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return bool(text) and text in tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids))

        if not is_kept(static_prefix):
            texts = (tokenizer.convert_tokens_to_string([token]).strip() for token in tokenizer.get_vocab())
            static_prefix = next(filter(is_kept, texts), static_prefix)
        return StopStringCriteria.clean_tokenizer_vocab(tokenizer, static_prefix, **kwargs)


class StopInNewText(StoppingCriteria):  # type: ignore[misc,unused-ignore]
    """End a row whose new text holds one of `stops`; a stop text that begins in the prompt is none.

    `prompt_length`: positions of the batch before the new text.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt_length: int) -> None:
        self._criterion = _StopStrings(tokenizer, list(stops))
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return which rows of `input_ids` (rows, positions) end, (rows,) bool."""
        ended: Tensor = self._criterion(input_ids[:, self._prompt_length :], scores, **kwargs)
        return ended


def stopping_criteria(tokenizer: Any, stops: Sequence[str], prompt_length: int) -> StoppingCriteriaList:
    """Return what `generate` takes to end texts at `stops`."""
    return StoppingCriteriaList([StopInNewText(tokenizer, stops, prompt_length)] if stops else [])
