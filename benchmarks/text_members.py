"""Measure members with different tokenizers: what their probabilities of text are off by, and what they cost.

    python benchmarks/text_members.py scores ANCHOR MEMBER [--data FILE] [--num 50]
    python benchmarks/text_members.py decode ANCHOR TARGET [--data FILE] [--num 20] [--tokens 48]

ANCHOR, MEMBER and TARGET are folders, such as models/smollm2 and models/gemma3.

`scores` adds up the log-probs of the anchor's tokens under MEMBER, piece by piece along 50 paragraphs: the first ones
of FILE of some length (default: WikiText's validation set), code of this project, and those of
benchmarks/paragraphs.jsonl (digits, other scripts, emoji, addresses). The reference is the member's own log-prob of the
text in its own tokens, the last of which are not certain and are summed over all ways to write them. One row for each
paragraph; the same command goes on behind those that are there.

`decode` takes ANCHOR as source FT and source PT and decodes greedily at alpha 1, so that the ensemble ought to write
what TARGET writes. Of TARGET's own greedy texts: the share of the anchor's tokens that the ensemble chooses along them,
and, for comparison, the share where tokens are matched by name alone. Of free texts: log-likelihood per byte under
TARGET, beside that of its own texts. Evaluations for each token, certain choices, time over an ensemble of three
ANCHORs, and the share of time outside of forwards. One row. Rows are appended to benchmarks/results/text_members.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, Measured

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decode_stats import DecodingStats, Meter
from ensembler.decoding.decoder import Decoder
from ensembler.decoding.texts import explain
from ensembler.engine.text_member_set import TextMemberSet
from ensembler.engine.text_members import TextMembers, TextStats
from ensembler.tokenization.reading import plain_ids

ROOT = Path(__file__).parents[1]
OUT = RESULTS / "text_members.jsonl"
DATA = ROOT.parent / "shared" / "data" / "text" / "wikitext2_raw_valid.txt"
OTHERS = Path(__file__).parent / "paragraphs.jsonl"


@dataclass(frozen=True, kw_only=True)
class ScoreRow(Measured):
    """One paragraph: nats of the sum and of the reference, the bound of their difference, evaluations for a token."""

    number: int
    kind: str
    anchor: str
    member: str
    num_bytes: int
    num_tokens: int
    log_prob: float
    reference: float
    bound: float
    evaluations: float


@dataclass(frozen=True, kw_only=True)
class DecodeRow(Measured):
    """One run of `decode`; shares are of tokens, likelihoods are in nats a byte."""

    anchor: str
    target: str
    num_prompts: int
    num_tokens: int
    agreement: float
    agreement_by_name: float
    likelihood: float
    likelihood_of_own: float
    evaluations: dict[str, float]
    rounds: float
    certain: float
    mean_open: float
    seconds: float
    seconds_of_trio: float
    seconds_ratio: float
    host_share: float


def paragraphs(path: Path, num: int) -> list[tuple[str, str]]:
    """Return (kind, text) of `num` paragraphs."""
    others = [(one["kind"], one["text"]) for one in map(json.loads, OTHERS.read_text(encoding="utf-8").splitlines())]
    source = (ROOT / "ensembler" / "modeling.py").read_text(encoding="utf-8").split("\n\n")
    code = [("code", part[:600]) for part in source if len(part) > 200][:8]
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    english = [("English", line[:600]) for line in lines if len(line) > 300]
    return [*others, *code, *english][:num]


def load(anchor: Path, target: Path) -> tuple[EnsembleForCausalLM, TextMembers]:
    members = {"source_ft": str(anchor), "source_pt": str(anchor), "target_pt": str(target)}
    model = EnsembleForCausalLM.from_members(rule="base-change", alpha=1.0, members=members)
    assert isinstance(model.member_set, TextMemberSet), "the two have one tokenizer"
    return model, model.member_set.text


@torch.inference_mode()
def reference(model: EnsembleForCausalLM, text: TextMembers, role: str, whole: str) -> float:
    """The log-prob that a member begins with a text behind its begin token, by its own tokens and all ends."""
    reader, member = text.plan.readers[role], text.members[role]
    begin = [reader.tokenizer.bos_token_id if reader.tokenizer.bos_token_id is not None else reader.ends[0]]
    ids = begin + plain_ids(reader.tokenizer, whole)
    state = member.begin(ids)
    logprobs = model.members[role](torch.tensor([state.trunk])).logits[0].double().log_softmax(-1)
    total = sum(float(logprobs[at, token]) for at, token in enumerate(state.trunk[len(begin) :]))
    for _ in range(64):
        bounds = member.begun(state)
        if bounds.num_open <= 1e-4 * bounds.high:
            break
        member.evaluate([(state, max(bounds.open, key=bounds.open.__getitem__))])
    return total + math.log(bounds.middle)


def measure_scores(anchor: Path, other: Path, data: Path, num: int, done: set[int]) -> Iterator[ScoreRow]:
    model, text = load(anchor, other)
    role, reader = "target_pt", text.plan.readers["target_pt"]
    begin = [reader.tokenizer.bos_token_id if reader.tokenizer.bos_token_id is not None else reader.ends[0]]
    context = (text.plan.anchor.ends[0],)
    only = TextMembers(text.plan, {role: text.members[role]})
    only.prompts[context] = {role: begin}
    for number, (kind, paragraph) in enumerate(paragraphs(data, num)):
        if number in done:
            continue
        before = text.members[role].num_evaluated
        with torch.inference_mode():
            (found,) = only.score([(context, plain_ids(model.tokenizer, paragraph))])
        num_tokens = len(found[role].log_probs)
        evaluations = (text.members[role].num_evaluated - before) / num_tokens
        yield ScoreRow(
            number=number,
            kind=kind,
            anchor=anchor.name,
            member=other.name,
            num_bytes=len(paragraph.encode()),
            num_tokens=num_tokens,
            log_prob=sum(found[role].log_probs),
            reference=reference(model, text, role, paragraph),
            bound=found[role].bound,
            evaluations=evaluations,
        )


def greedy(model: Any, inputs: dict[str, Any], num: int, **options: Any) -> list[int]:
    out = model.generate(**inputs, max_new_tokens=num, do_sample=False, **options)
    new: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
    return new


@torch.inference_mode()
def likelihood(model: EnsembleForCausalLM, text: TextMembers, prompt: str, new: str) -> float:
    """The log-likelihood of a text behind a prompt under the target, in nats."""
    reader = text.plan.readers["target_pt"]
    begin = [] if reader.tokenizer.bos_token_id is None else [reader.tokenizer.bos_token_id]
    first, ids = begin + plain_ids(reader.tokenizer, prompt), begin + plain_ids(reader.tokenizer, prompt + new)
    logprobs = model.members["target_pt"](torch.tensor([ids])).logits[0].double().log_softmax(-1)
    start = next((at for at, (one, two) in enumerate(zip(first, ids, strict=False)) if one != two), len(first))
    return sum(float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids)))


def by_name(model: EnsembleForCausalLM, text: TextMembers, prompt: str, new: str) -> list[bool]:
    """For each token of the anchor along a text: whether the target's best token of those with its name is that one."""
    reader, anchor = text.plan.readers["target_pt"], text.plan.anchor.writer.tokens.texts
    names = {spelled: token for token, spelled in reader.writer.tokens.texts.items()}
    shared = torch.tensor([names[one] for one in anchor.values() if one in names])
    found, so_far = [], prompt.encode()
    for token in plain_ids(model.tokenizer, prompt + new)[len(plain_ids(model.tokenizer, prompt)) :]:
        begin = [] if reader.tokenizer.bos_token_id is None else [reader.tokenizer.bos_token_id]
        ids = begin + plain_ids(reader.tokenizer, so_far.decode(errors="ignore"))
        with torch.inference_mode():
            logits = model.members["target_pt"](torch.tensor([ids])).logits[0, -1]
        best = int(shared[logits[shared].argmax()])
        found.append(reader.writer.tokens.texts[best] == anchor.get(token))
        so_far += anchor.get(token, b"")
    return found


def measure_decode(anchor: Path, target: Path, data: Path, num: int, num_tokens: int) -> DecodeRow:
    model, text = load(anchor, target)
    trio = EnsembleForCausalLM.from_members(
        rule="base-change",
        alpha=1.0,
        members=dict.fromkeys(("source_ft", "source_pt", "target_pt"), str(anchor)),
    )
    tokenizer, own = model.tokenizer, text.plan.readers["target_pt"].tokenizer
    lines = [line.strip() for line in data.read_text(encoding="utf-8").splitlines() if len(line) > 300]
    prompts = [line[:120].rsplit(" ", 1)[0] for line in lines[:num]]
    meter = Meter(DecodingStats())
    agreed, named, free, seconds, theirs = [], [], [], [], []
    inside: list[float] = []
    model_pairs = []
    for prompt in prompts:
        new = own.decode(
            greedy(model.members["target_pt"], dict(own(prompt, return_tensors="pt")), num_tokens),
            skip_special_tokens=True,
        )
        first = tokenizer(prompt).input_ids
        whole = tokenizer(prompt + new).input_ids
        if whole[: len(first)] != first or len(whole) == len(first):
            continue
        choices = explain(model, first, whole[len(first) :])
        agreed += [one.ensemble_token == one.token for one in choices]
        named += by_name(model, text, prompt, new)
        model_pairs.append((prompt, new))
    text.stats = TextStats()
    for member in text.members.values():
        member.num_evaluated = 0
    for prompt, new in model_pairs:
        inputs = dict(tokenizer(prompt, return_tensors="pt"))
        start = time.perf_counter()
        before = sum(meter.stats.members.values())
        with meter.watching(model):
            ids = greedy(model, inputs, num_tokens, custom_generate=Decoder("none", meter=meter))
        seconds.append(time.perf_counter() - start)
        inside.append(sum(meter.stats.members.values()) - before)
        start = time.perf_counter()
        greedy(trio, inputs, num_tokens, custom_generate=Decoder("none"))
        theirs.append(time.perf_counter() - start)
        written = tokenizer.decode(ids, skip_special_tokens=True)
        if written and new:
            free.append(
                (
                    likelihood(model, text, prompt, written) / len(written.encode()),
                    likelihood(model, text, prompt, new) / len(new.encode()),
                )
            )
    found = text.describe()
    return DecodeRow(
        anchor=anchor.name,
        target=target.name,
        num_prompts=len(model_pairs),
        num_tokens=len(agreed),
        agreement=statistics.mean(agreed),
        agreement_by_name=statistics.mean(named),
        likelihood=statistics.mean(one for one, _ in free),
        likelihood_of_own=statistics.mean(one for _, one in free),
        evaluations=found["evaluations"],
        rounds=found["rounds"],
        certain=found["certain"],
        mean_open=found["mean_open"],
        seconds=sum(seconds),
        seconds_of_trio=sum(theirs),
        seconds_ratio=statistics.median(one / two for one, two in zip(seconds, theirs, strict=True)),
        host_share=1 - sum(inside) / sum(seconds),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["scores", "decode"])
    parser.add_argument("anchor", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--num", type=int)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--results", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    if given.what == "decode":
        measure_decode(given.anchor, given.other, given.data, given.num or 20, given.tokens).append(given.results)
        return
    rows = map(json.loads, given.results.read_text().splitlines() if given.results.exists() else ())
    names = given.anchor.name, given.other.name
    done = {row["number"] for row in rows if (row["anchor"], row.get("member")) == names}
    for row in measure_scores(given.anchor, given.other, given.data, given.num or 50, done):
        row.append(given.results)
        print(f"{row.kind}: off by {row.log_prob - row.reference:+.4f} nats, bound {row.bound:.4f}", flush=True)


if __name__ == "__main__":
    main()
