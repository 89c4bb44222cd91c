"""Measure the exact way byte by byte beside `text_members.py decode`: byte-sampler (arXiv 2506.14123).

    python benchmarks/byte_sampler.py TARGET [--anchor ANCHOR] [--data FILE] [--num 20] [--tokens 48]

TARGET and ANCHOR are folders, such as models/gemma3 and models/smollm2 (default). Needs `byte_sampling` of
https://github.com/SewoongLab/byte-sampler. With ANCHOR as source FT and source PT at alpha 1 the ensemble
p_ft · p_target / p_pt of next bytes is the target itself byte by byte, so that the target alone has to run.

Prompts and the target's own greedy texts are those of `text_members.py decode`. Along these texts: the share of the
anchor's tokens all of whose bytes are the most probable ones; forwards and positions (behind the prompt) that the
target computes for each of these tokens, and seconds, prompts included; seconds of the target alone, which writes the
same texts in its own tokens. Of as many bytes written freely, each the most probable one: log-likelihood per byte under
the target, beside that of its own texts. One row is appended to benchmarks/results/byte_sampler.jsonl.

byte-sampler reads byte-level BPE only. A SentencePiece-BPE such as Gemma's is given to it as byte-level BPE with the
same ids, exact for texts whose characters all have a token. Nothing is dropped from its cache: the code for that does
not run with transformers 5, and at these lengths it saves no time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measuring import RESULTS, Measured
from text_members import DATA, ROOT, likelihood, load, own_text
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ensembler.tokenization.reading import byte_level_map, plain_ids

END = 256  # what byte-sampler calls the end of the text


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One run; forwards, positions and seconds are of a token of the anchor, likelihoods are in nats a byte."""

    anchor: str
    target: str
    num_prompts: int
    num_tokens: int
    num_bytes: int
    agreement: float
    likelihood: float
    likelihood_of_own: float
    forwards: float
    positions: float
    seconds: float
    seconds_of_target: float


def as_byte_level(tokenizer: Any) -> Any:
    """Return a SentencePiece-BPE tokenizer as byte-level BPE with the same ids, or a byte-level one as it is.

    The bytes of a character that has a token are merged before all else. The first two of three or four bytes, say, get
    the id of a special token that the tokenizer does not use.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, listed = data["model"]["vocab"], data["model"]["merges"]
    if not data["model"]["byte_fallback"]:
        return tokenizer
    byte_names = {byte: name for name, byte in byte_level_map().items()}
    added = [one for one in data["added_tokens"] if "▁" not in one["content"]]
    kept = [one for one in added if not one["special"] or one["id"] in tokenizer.all_special_ids]
    texts = vocabulary.keys() - {one["content"] for one in added} - {f"<0x{byte:02X}>" for byte in range(256)}
    names = {text: "".join(byte_names[byte] for byte in text.replace("▁", " ").encode()) for text in texts}
    new = {byte_names[byte]: vocabulary[f"<0x{byte:02X}>"] for byte in range(256)}
    new |= {name: vocabulary[text] for text, name in names.items()}
    characters = [list(accumulate(name)) for text, name in names.items() if len(text) == 1]
    merges = {(one, two[-1]): two for character in characters for one, two in pairwise(character)}
    between, unused = sorted(set(merges.values()) - new.keys()), [one["id"] for one in added if one not in kept]
    if len(between) > len(unused):
        raise SystemExit(
            f"the target's tokenizer has {len(unused)} unused tokens, expected {len(between)}; give Gemma's"
        )
    new |= dict(zip(between, unused, strict=False)) | {one["content"]: one["id"] for one in kept}
    pairs = [*merges, *((names[one], names[two]) for one, two in listed if {one, two, one + two} <= texts)]
    data["model"] |= {"vocab": new, "merges": pairs, "byte_fallback": False}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    data |= {"added_tokens": kept, "normalizer": None, "pre_tokenizer": plain, "decoder": plain, "post_processor": None}
    specials = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), **specials)


@torch.inference_mode()
def best_bytes(conditioning: Any, begin: Sequence[int], prompt: str, num: int, along: bytes | None = None) -> list[int]:
    """Return the most probable byte at each of `num` places behind a prompt: along a text, or along themselves."""
    sampler = conditioning.get_bytewise_sampler(1)
    sampler.trunks = [list(begin)]
    sampler.add_context([prompt.encode()])
    best: list[int] = []
    for at in range(num):
        best.append(int(sampler.get_dists(do_gc=False)[0].argmax()))
        following = best[at] if along is None else along[at]
        if following == END:
            break
        sampler.add_context([bytes([following])])
    return best


def measure(conditioning_class: Any, anchor: Path, target: Path, data: Path, num: int, num_tokens: int) -> Row:
    model, text = load(anchor, target)
    alone, own, words = model.members["target_pt"], text.plan.readers["target_pt"].tokenizer, text.plan.anchor.tokenizer
    spelled, begin = text.plan.anchor.writer.tokens.texts, own("").input_ids
    conditioning = conditioning_class(alone, as_byte_level(own))
    lines = [line.strip() for line in data.read_text(encoding="utf-8").splitlines() if len(line) > 300]
    agreed, free, num_bytes, positions, seconds, theirs = [], [], [], [], [], []
    for prompt in (line[:120].rsplit(" ", 1)[0] for line in lines[:num]):
        start = time.perf_counter()
        new = own_text(model, text, prompt, num_tokens)
        spent = time.perf_counter() - start
        first, whole = words(prompt).input_ids, words(prompt + new).input_ids
        if whole[: len(first)] != first or len(whole) == len(first):
            continue
        if plain_ids(conditioning.tokenizer, prompt + new) != plain_ids(own, prompt + new):
            raise SystemExit(f"as byte-level BPE {target} writes {prompt + new!r} in other tokens; give other --data")
        along = new.encode()
        start = time.perf_counter()
        with mock.patch.object(alone, "forward", wraps=alone.forward) as forward:
            best = best_bytes(conditioning, begin, prompt, len(along), along)
        seconds.append(time.perf_counter() - start)
        theirs.append(spent)
        num_bytes.append(len(along))
        positions.append([call.args[0].numel() for call in forward.call_args_list])
        ends = accumulate((len(spelled[token]) for token in whole[len(first) :]), initial=0)
        agreed += [list(along[one:two]) == best[one:two] for one, two in pairwise(ends)]
        chosen = best_bytes(conditioning, begin, prompt, len(along))
        written = bytes(byte for byte in chosen if byte != END).decode(errors="ignore")
        if written:
            free.append([likelihood(model, text, prompt, one) / len(one.encode()) for one in (written, new)])
    return Row(
        anchor=anchor.name,
        target=target.name,
        num_prompts=len(num_bytes),
        num_tokens=len(agreed),
        num_bytes=sum(num_bytes),
        agreement=statistics.mean(agreed),
        likelihood=statistics.mean(one for one, _ in free),
        likelihood_of_own=statistics.mean(one for _, one in free),
        forwards=sum(map(len, positions)) / len(agreed),
        positions=sum(sum(counts[1:]) for counts in positions) / len(agreed),
        seconds=sum(seconds) / len(agreed),
        seconds_of_target=sum(theirs) / len(agreed),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--anchor", type=Path, default=ROOT / "models" / "smollm2")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--num", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--results", type=Path, default=RESULTS / "byte_sampler.jsonl")
    given = parser.parse_args(arguments)
    try:
        conditioning_class = import_module("byte_sampling").ByteConditioning
    except ImportError as error:
        install = "pip install git+https://github.com/SewoongLab/byte-sampler"
        raise SystemExit(
            f"byte_sampling cannot be imported ({error}); install it and what it needs: {install}"
        ) from None
    row = measure(conditioning_class, given.anchor, given.target, given.data, given.num, given.tokens)
    row.append(given.results)
    print(json.dumps(asdict(row)))


if __name__ == "__main__":
    main()
