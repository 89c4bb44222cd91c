"""Read how a tokenizer of `transformers` writes text, or say why its tokens cannot be taken as pieces of text."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from ensembler.errors import VocabularyError
from ensembler.tokenization.merges import Merges
from ensembler.tokenization.token_bytes import TokenBytes
from ensembler.tokenization.token_writer import TokenWriter, joined_bytes, split_at_spaces, split_where_apart

_SPACE = "▁"  # of SentencePiece
# Texts on which our own writing is compared with the tokenizer's: words, code, digits, other scripts, spaces, signs.
PROBES = (
    "The quick brown fox doesn't jump over 13 lazy dogs; it's 2024-11-05, isn't it?",
    "def f(x):\n    if x >= 10:\n        return {'a': [1, 2], \"b\": None}\n\n\n    # done\n",
    "http://example.org/a_b?c=d&e=%20f  \t two  spaces,   three\n\n  and tabs\t\tHERE ...\n",
    "naïve café, Straße, Ελληνικά, русский текст, עברית, العربية, हिन्दी, ไทย",
    "日本語のテキスト、中文文本。한국어 텍스트 🙂👩‍👩‍👧 1234567890 3.14159",
    " leading and trailing spaces ",
    "UPPER lower MiXeD 'quoted' (brackets) <tag> </tag> a's we'll ..'s",
)


def read_writer(role: str, tokenizer: Any) -> TokenWriter:
    """Return how a tokenizer writes text, checked against itself on several texts.

    Raises VocabularyError naming the role where it is no byte-level BPE and no SentencePiece-BPE with bytes, and where
    a text is written otherwise or changed, with the first such text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise VocabularyError(
            f"the tokenizer of {role} ({type(tokenizer).__name__}) is written in Python and does not say what its "
            "tokens spell; give the model a tokenizer.json, as transformers' fast tokenizers save it"
        )
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = data["model"]["type"]
    if kind != "BPE":
        raise VocabularyError(
            f"the tokenizer of {role} is of the kind {kind}; beside another tokenizer, expected byte-level BPE (as of "
            "Llama 3 or Qwen) or SentencePiece-BPE (as of Gemma or Mistral)"
        )
    byte_map = byte_level_map() if _is_byte_level(data) else None
    writer = _make_writer(tokenizer, data, byte_map)
    _check_probes(role, tokenizer, writer)
    return writer


def _is_byte_level(data: Mapping[str, Any]) -> bool:
    decoder = data.get("decoder") or {}
    return any(one.get("type") == "ByteLevel" for one in (decoder, *decoder.get("decoders", ())))


def byte_level_map() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for: printable ones for themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _make_writer(tokenizer: Any, data: Mapping[str, Any], byte_map: Mapping[str, int] | None) -> TokenWriter:
    model, vocabulary = data["model"], data["model"]["vocab"]
    known = {one["content"]: one["id"] for one in data["added_tokens"]}
    special = {one["id"] for one in data["added_tokens"] if one["special"]} | set(tokenizer.all_special_ids)
    added = {spelled: token for text, token in known.items() if token not in special and (spelled := _spelled(text))}
    texts = {
        token: spelled
        for text, token in vocabulary.items()
        if token not in special and (spelled := _spelled(text, byte_map)) is not None
    }
    texts |= {token: spelled for spelled, token in added.items()}
    merges = _merges(model["merges"], vocabulary)
    split: Callable[[str], Sequence[bytes]]
    symbols: Callable[[bytes], list[int] | None]
    if byte_map is not None:
        ids = {byte: vocabulary[character] for character, byte in byte_map.items() if character in vocabulary}
        split = partial(_split_byte_level, tokenizer.backend_tokenizer.pre_tokenizer, byte_map)
        symbols = partial(_byte_symbols, ids)
    else:
        characters = {text.replace(_SPACE, " "): token for text, token in vocabulary.items() if len(text) == 1}
        fallback = {int(text[3:5], 16): token for text, token in vocabulary.items() if _is_byte_token(text)}
        for byte, token in fallback.items():  # a character that has a token is never written as its byte
            if byte < 128 and chr(byte) in characters:
                del texts[token]
        crossing = any(b" " in spelled.lstrip(b" ") for spelled in texts.values())
        split = partial(split_where_apart, joined_bytes(list(texts.values()))) if crossing else split_at_spaces
        symbols = partial(_character_symbols, characters, fallback)
    return TokenWriter(
        TokenBytes(_without_doubles(texts, set(added.values()))),
        merges,
        split,
        symbols,
        added=added,
        takes_whole=bool(model.get("ignore_merges")),
        has_pieces=byte_map is not None,
    )


def _without_doubles(texts: Mapping[int, bytes], preferred: Collection[int]) -> dict[int, bytes]:
    """Return one token for each spelling: a preferred one, else the first."""
    kept: dict[bytes, int] = {}
    for token in sorted(texts, key=lambda one: (one not in preferred, one)):
        kept.setdefault(texts[token], token)
    return {token: spelled for spelled, token in kept.items()}


def _merges(listed: Sequence[Any], vocabulary: Mapping[str, int]) -> Merges:
    """Return the merges by ids; in files a pair is a list, or a text with a space between them."""
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for rank, pair in enumerate(listed):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        if left in vocabulary and right in vocabulary and left + right in vocabulary:
            found[vocabulary[left], vocabulary[right]] = rank, vocabulary[left + right]
    return found


def _is_byte_token(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _spelled(text: str, byte_map: Mapping[str, int] | None = None) -> bytes | None:
    """Return the bytes that a token of a vocabulary spells, or None where it spells none."""
    if byte_map is not None:
        known = [byte_map.get(character) for character in text]
        return bytes(byte for byte in known if byte is not None) if text and None not in known else None
    if _is_byte_token(text):
        return bytes([int(text[3:5], 16)])
    return text.replace(_SPACE, " ").encode() or None


def _split_byte_level(pre_tokenizer: Any, byte_map: Mapping[str, int], text: str) -> list[bytes]:
    pieces = pre_tokenizer.pre_tokenize_str(text)
    return _unprefixed([bytes(byte_map[character] for character in piece) for piece, _ in pieces], text)


def _unprefixed(pieces: list[bytes], text: str) -> list[bytes]:
    """Return pieces without the space that some tokenizers put before the first word."""
    if pieces and not text.startswith(" "):
        pieces[0] = pieces[0].removeprefix(b" ")
    return [piece for piece in pieces if piece]


def _byte_symbols(ids: Mapping[int, int], piece: bytes) -> list[int] | None:
    found = [ids.get(byte) for byte in piece]
    return None if None in found else [token for token in found if token is not None]


def _character_symbols(characters: Mapping[str, int], fallback: Mapping[int, int], piece: bytes) -> list[int] | None:
    """Return a symbol for each character, or for each of its bytes where it has no token."""
    found: list[int | None] = []
    for character in piece.decode(errors="surrogateescape"):
        if character in characters:
            found.append(characters[character])
        else:
            found += [fallback.get(byte) for byte in character.encode(errors="surrogateescape")]
    return None if None in found else [token for token in found if token is not None]


def _check_probes(role: str, tokenizer: Any, writer: TokenWriter) -> None:
    """Raise VocabularyError with the first text that the tokenizer changes, or writes in other tokens than `writer`."""
    for text in PROBES:
        ids = plain_ids(tokenizer, text)
        if tokenizer.unk_token_id in ids:  # characters that it cannot write are refused where a text has them
            continue
        unknown = next((token for token in ids if token not in writer.tokens.texts), None)
        spelled = b"" if unknown is not None else b"".join(writer.tokens.texts[token] for token in ids)
        prefix = spelled.removesuffix(text.encode())
        if unknown is not None or not spelled.endswith(text.encode()) or prefix not in (b"", b" "):
            read = spelled.decode(errors="replace")
            what = f"gives {tokenizer.convert_ids_to_tokens(unknown)!r}" if unknown is not None else f"reads {read!r}"
            raise VocabularyError(
                f"the tokenizer of {role} {what} for {text!r}; beside another tokenizer, expected one that keeps every "
                "text as it is: choose a model with byte-level BPE, or with SentencePiece-BPE that falls back to bytes"
            )
        if writer.encode(spelled) != ids:
            raise VocabularyError(
                f"the tokenizer of {role} does not write {text!r} by its merges alone; beside another tokenizer, "
                "expected plain byte-pair encoding: choose another model"
            )


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text without special tokens: text that spells one is text."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text with the special tokens that the tokenizer puts before it, and none behind it."""
    encoded = tokenizer(text, split_special_tokens=True, return_special_tokens_mask=True)
    ids: list[int] = list(encoded["input_ids"])
    while ids and encoded["special_tokens_mask"][len(ids) - 1]:
        ids.pop()
    return ids
