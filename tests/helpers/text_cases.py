"""Tiny members with tokenizers of different kinds, trained on the same texts."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.tiny import make_model
from helpers.tokenizer_cases import make_trained_tokenizer

import ensembler
from ensembler import EnsembleForCausalLM
from ensembler.tokenization.reading import PROBES

ROOT = Path(ensembler.__file__).parents[1]
TEXTS = (*PROBES, (ROOT / "LICENSE").read_text(encoding="utf-8"))
KINDS = (  # of the source pair, of the target, and the rule
    ("byte-level", "spaces", "base-change"),
    ("spaces with a prefix", "byte-level, takes whole", "base-change"),
    ("spaces", "added tokens", "eft"),
    ("byte-level, takes whole", "spaces with a prefix", "eft"),
)


def save_text_members(
    folder: Path, source: str = "byte-level", target: str = "spaces", rule: str = "base-change"
) -> Path:
    """Save an ensemble whose target has a tokenizer of another kind than the source pair; return its folder."""
    members = {}
    for seed, (role, kind) in enumerate({"source_ft": source, "source_pt": source, "target_pt": target}.items()):
        tokenizer = make_trained_tokenizer(kind, TEXTS, vocab_size=900)
        make_model("llama", seed, vocab_size=len(tokenizer), initializer_range=0.3).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
        members[role] = str(folder / role)
    EnsembleForCausalLM.from_members(rule=rule, alpha=1.0, members=members).save_pretrained(folder / "ensemble")
    return folder / "ensemble"


@torch.no_grad()
def own_log_prob(model: EnsembleForCausalLM, role: str, context: str, continuation: str) -> float:
    """The log-prob of a continuation under a member alone, by the tokens of the ensemble's tokenizer."""
    first = model.tokenizer(context)["input_ids"]
    whole = model.tokenizer(context + continuation)["input_ids"]
    assert whole[: len(first)] == first
    logprobs = model.members[role](torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return float(sum(logprobs[at - 1, whole[at]] for at in range(len(first), len(whole))))
