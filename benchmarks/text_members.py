"""Measure members with different tokenizers: what their probabilities of text are off by, and what they cost.

    python benchmarks/text_members.py scores ANCHOR MEMBER [--data FILE] [--num 50]
    python benchmarks/text_members.py decode ANCHOR TARGET [--data FILE] [--num 20] [--tokens 48]

ANCHOR, MEMBER and TARGET are folders, such as models/smollm2 and models/gemma3.

`scores` adds up the log-probs of the anchor's tokens under MEMBER, piece by piece along 50 paragraphs: the first ones
of FILE of some length (default: WikiText's validation set), code of this project, and those of
benchmarks/paragraphs.jsonl (digits, other scripts, emoji, addresses). The reference is the member's own log-prob of the
text in its own tokens, the last of which are not certain and are summed over all ways to write them: of those texts
that the anchor cuts behind the last token, as the steps count them. One row for each paragraph; the same command goes
on behind those that are there.

`decode` takes ANCHOR as source FT and source PT and decodes greedily at alpha 1, so that the ensemble ought to write
what TARGET writes. Of TARGET's own greedy texts (of tokens that spell text): the share of the anchor's tokens that the
ensemble chooses along them. Of free texts: log-likelihood per byte under TARGET, beside that of its own texts. Both
also where tokens are aligned in two known ways: by name, and as in UniTE (Yao et al. 2024, arXiv 2410.03777), where the
candidates are the 64 most probable tokens of both models, and one that the other model writes in several tokens has
the probability of the first of these. Evaluations for each token, certain choices, time over an ensemble of three
ANCHORs, and the share of time outside of forwards. One row. Rows are appended to benchmarks/results/text_members.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from ensembler.tokenization.token_cut import TokenCut

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
    agreement_by_first_token: float
    likelihood: float
    likelihood_by_first_token: float
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
def reference(model: EnsembleForCausalLM, text: TextMembers, role: str, whole: str, last: int) -> float:
    """The log-prob that a member begins with a text behind its begin token, by its own tokens and all ends.

    `last`: the anchor's last token, behind which it cuts the texts that count.
    """
    reader, member = text.plan.readers[role], text.members[role]
    begin = [reader.tokenizer.bos_token_id if reader.tokenizer.bos_token_id is not None else reader.ends[0]]
    ids = begin + plain_ids(reader.tokenizer, whole)
    state = replace(member.begin(ids), cut=TokenCut(text.plan.anchor.writer, last))
    logprobs = model.members[role](torch.tensor([state.trunk])).logits[0].double().log_softmax(-1)
    total = sum(float(logprobs[at, token]) for at, token in enumerate(state.trunk[len(begin) :]))
    for _ in range(64):
        bounds = member.begun(state)
        if sum(bounds.open.values()) <= 1e-4 * bounds.high:
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
        tokens = plain_ids(model.tokenizer, paragraph)
        with torch.inference_mode():
            (found,) = only.score([(context, tokens)])
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
            reference=reference(model, text, role, paragraph, tokens[-1]),
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


def own_text(model: EnsembleForCausalLM, text: TextMembers, prompt: str, num: int) -> str:
    """Return the text that the target alone writes greedily behind a prompt, in tokens that spell text."""
    reader = text.plan.readers["target_pt"]
    no_text = set(range(len(reader.tokenizer))) - {*reader.writer.tokens.texts, *reader.ends}
    inputs = dict(reader.tokenizer(prompt, return_tensors="pt"))
    ids = greedy(model.members["target_pt"], inputs, num, suppress_tokens=sorted(no_text))
    written: str = reader.tokenizer.decode(ids, skip_special_tokens=True)
    return written


class Alignment:
    """The target's next token in the anchor's tokens, as others align them: by name, and by the first of its tokens."""

    def __init__(self, model: EnsembleForCausalLM, text: TextMembers) -> None:
        self._model = model
        self._reader = text.plan.readers["target_pt"]
        self._writer = text.plan.anchor.writer
        self._anchor = self._writer.tokens.texts
        names = {spelled: token for token, spelled in self._reader.writer.tokens.texts.items()}
        self._shared = torch.tensor([names[one] for one in self._anchor.values() if one in names])

    @torch.inference_mode()
    def best(self, ids: Sequence[int]) -> tuple[bytes, int]:
        """The best token behind a text as ids of the anchor: by name, its bytes, and by the first token, its id."""
        so_far = b"".join(self._anchor.get(token, b"") for token in ids).decode(errors="ignore")
        begin = [] if self._reader.tokenizer.bos_token_id is None else [self._reader.tokenizer.bos_token_id]
        own = torch.tensor([begin + plain_ids(self._reader.tokenizer, so_far)])
        logits = self._model.members["target_pt"](own, logits_to_keep=1).logits[0, -1]
        named = self._reader.writer.tokens.texts[int(self._shared[logits[self._shared].argmax()])]
        of_anchor = self._model.anchor(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
        candidates = {token for token in of_anchor.topk(64).indices.tolist() if token in self._anchor}
        for token in logits.topk(64).indices.tolist():
            written = self._writer.encode(self._reader.writer.tokens.texts.get(token, b""))
            candidates |= set((written or [])[:1])
        firsts = {token: self._reader.writer.encode(self._anchor[token]) for token in candidates}
        return named, max(firsts, key=lambda token: float(logits[firsts[token][0]]) if firsts[token] else -math.inf)

    def write(self, ids: Sequence[int], num: int) -> list[int]:
        """The next `num` tokens, by the first token."""
        found = list(ids)
        for _ in range(num):
            found.append(self.best(found)[1])
        return found[len(ids) :]


def measure_decode(anchor: Path, target: Path, data: Path, num: int, num_tokens: int) -> DecodeRow:
    model, text = load(anchor, target)
    trio = EnsembleForCausalLM.from_members(
        rule="base-change",
        alpha=1.0,
        members=dict.fromkeys(("source_ft", "source_pt", "target_pt"), str(anchor)),
    )
    tokenizer = model.tokenizer
    lines = [line.strip() for line in data.read_text(encoding="utf-8").splitlines() if len(line) > 300]
    prompts = [line[:120].rsplit(" ", 1)[0] for line in lines[:num]]
    meter = Meter(DecodingStats())
    agreed, named, first_of, free, seconds, theirs = [], [], [], [], [], []
    inside: list[float] = []
    model_pairs = []
    alignment = Alignment(model, text)
    for prompt in prompts:
        new = own_text(model, text, prompt, num_tokens)
        first = tokenizer(prompt).input_ids
        whole = tokenizer(prompt + new).input_ids
        if whole[: len(first)] != first or len(whole) == len(first):
            continue
        choices = explain(model, first, whole[len(first) :])
        agreed += [one.ensemble_token == one.token for one in choices]
        for at in range(len(first), len(whole)):
            by_name, by_first = alignment.best(whole[:at])
            named.append(by_name == text.plan.anchor.writer.tokens.texts.get(whole[at]))
            first_of.append(by_first == whole[at])
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
        aligned = tokenizer.decode(alignment.write(inputs["input_ids"][0].tolist(), num_tokens))
        if written and new:
            free.append([likelihood(model, text, prompt, one) / len(one.encode()) for one in (written, new, aligned)])
    found = text.describe()
    return DecodeRow(
        anchor=anchor.name,
        target=target.name,
        num_prompts=len(model_pairs),
        num_tokens=len(agreed),
        agreement=statistics.mean(agreed),
        agreement_by_name=statistics.mean(named),
        agreement_by_first_token=statistics.mean(first_of),
        likelihood=statistics.mean(one for one, _, _ in free),
        likelihood_of_own=statistics.mean(one for _, one, _ in free),
        likelihood_by_first_token=statistics.mean(one for _, _, one in free),
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
