"""Tokenizers that treat the beginning, the end and the spaces of a text in the ways of the field."""

from __future__ import annotations

import string
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
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
