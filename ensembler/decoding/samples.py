"""A decoded row as a text: where it ends and why; the texts of a grid, and tokens as they come."""

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


def make_sample(ids: list[int], tokenizer: Any, ends: frozenset[int], stops: Sequence[str]) -> Sample:
    """Return the sample of a decoded row: cut at its end token, its text at the first of `stops`."""
    end = next((position for position, token in enumerate(ids) if token in ends), None)
    kept = ids if end is None else ids[: end + 1]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    behind = _behind_text(kept, tokenizer) if stops else text
    cuts = [cut for cut in (behind.find(stop) for stop in stops) if cut >= 0]
    if cuts:
        text = text[: max(0, min(cuts) - (len(behind) - len(text)))]
        beginnings = (kept[:num] for num in range(1, len(kept) + 1))  # what follows in a batch is padding
        kept = next(one for one in beginnings if any(stop in _behind_text(one, tokenizer) for stop in stops))
    return Sample(text, len(kept), "stop" if cuts or end is not None else "length", kept)


def _behind_text(ids: list[int], tokenizer: Any) -> str:
    """The text of `ids` behind other text: by itself, many a tokenizer drops the space that it begins with.

    A stop text may be found with that space, as it is by the criterion that ended the row.
    """
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    before: str = tokenizer.decode(ids[:1], skip_special_tokens=True)
    behind: str = tokenizer.decode([*ids[:1], *ids], skip_special_tokens=True)[len(before) :]
    return behind if behind == f" {text}" else text


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
