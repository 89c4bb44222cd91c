"""Tokenizers that treat the beginning, the end and the spaces of a text in the ways of the field."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<|end|>")


def make_spaced_tokenizer(*, begin: bool = True, end: bool = False, num_bytes: int = 256) -> PreTrainedTokenizerFast:
    """Return a tokenizer like sentencepiece's: a text's first space is dropped, unknown characters become bytes.

    It knows a few words of two letters. `begin`, `end`: it adds such a token to a text. `num_bytes`: 256, or 0 without.
    """
    words = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b"), ("▁", "▁"), ("▁▁", "▁▁")]
    letters = ["▁", *string.ascii_lowercase, *string.digits, *".,:\n"]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(num_bytes)), *letters, *map("".join, words)]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    made = Tokenizer(models.BPE(vocab=vocab, merges=words, unk_token="<unk>", byte_fallback=num_bytes > 0))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    return _finished(made, begin=begin, end=end)


def make_byte_tokenizer(*, begin: bool = False, end: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes, which keeps every space."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*SPECIAL, *letters])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return _finished(made, begin=begin, end=end)


def _finished(made: Tokenizer, *, begin: bool, end: bool) -> PreTrainedTokenizerFast:
    template = f"{'<s> ' * begin}$A{' </s>' * end}"
    ids: list[Any] = [("<s>", 1), ("</s>", 2)]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special, extra_special_tokens=["<|end|>"])


def make_trained_tokenizer(kind: str, texts: Sequence[str], *, vocab_size: int = 600) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a kind that bases of the field have, trained on `texts`.

    'byte-level' (GPT-2, SmolLM2), 'byte-level, takes whole' (Llama 3: digits by threes, pieces that are tokens stay
    whole), 'spaces' (Gemma: spaces are letters, bytes for others; 'without bytes': none), 'spaces with a prefix' (Llama
    2), 'added tokens' (such as runs of spaces, found before all else).
    """
    byte_level = kind.startswith("byte-level") or kind == "added tokens"
    falls_back = not byte_level and "without bytes" not in kind
    unknown = None if byte_level or falls_back else "<unk>"
    made = Tokenizer(models.BPE(byte_fallback=falls_back, ignore_merges="whole" in kind, unk_token=unknown))
    alphabet = (
        sorted(pre_tokenizers.ByteLevel.alphabet()) if byte_level else list({"▁", *string.printable, "é"} - {" "})
    )
    if byte_level:
        pattern = r"'(?:s|t|ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes]) if "whole" in kind else plain
        made.decoder = decoders.ByteLevel()
    else:
        replaced = normalizers.Replace(" ", "▁")
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaced]) if "prefix" in kind else replaced
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if "prefix" in kind else parts)
        made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # while it is trained: as in SentencePiece
    num_bytes = [] if not falls_back else [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL, *num_bytes], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    if not byte_level:
        made = _without_special_bytes(made)
    if kind == "added tokens":
        made.add_tokens([AddedToken(text, normalized=False) for text in ("   ", "\n\n\n", "<tag>", "jump over")])
    return _finished(made, begin=True, end=False)


def _without_special_bytes(made: Tokenizer) -> Tokenizer:
    """Let the byte tokens be ordinary ones, and all of a text one piece."""
    data = json.loads(made.to_str())
    data["added_tokens"] = [one for one in data["added_tokens"] if one["content"] in SPECIAL]
    data["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(data))
