"""Combine members inside another model's `generate`: a LogitsProcessor that makes an ensemble of the model's scores.

    python examples/logits_processor.py

The model that generates is the anchor of the ensemble. The processor runs the other members on the same tokens, each
with a cache, and puts the combination in the place of the scores. `EnsembleForCausalLM.generate` is faster and does
more: batches with padding, beams, drafts. This is for code that has a `generate` of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from ensembler import EnsembleForCausalLM
from ensembler.demo import demo_folder


class CombinedScores(LogitsProcessor):
    """Replaces the scores of `ensemble`'s anchor by those of the ensemble. Made anew for each call of `generate`.

    For prompts of one length, without padding or beams. Put it first: temperature and top-k belong behind it.
    """

    def __init__(self, ensemble: EnsembleForCausalLM) -> None:
        self.ensemble = ensemble
        others = (role for role in ensemble.members if role != ensemble.rule.anchor)
        self.caches = {role: DynamicCache(config=ensemble.members[role].config) for role in others}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return combined scores (rows, V) for the anchor's `scores` (rows, V) behind `input_ids` (rows, positions)."""
        logits = {self.ensemble.rule.anchor: scores[:, None]}
        for role, cache in self.caches.items():
            member, unread = self.ensemble.members[role], input_ids[:, cache.get_seq_length() :]
            with torch.inference_mode():
                logits[role] = member(unread, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return self.ensemble.combine(logits)[:, -1]


def main() -> None:
    """Print what the anchor writes alone, with the processor, and what the ensemble writes."""
    ensemble = EnsembleForCausalLM.from_pretrained(demo_folder(), rule="eft", alpha=0.8)
    tokenizer, anchor = ensemble.tokenizer, ensemble.anchor
    inputs = tokenizer("Ben has 3 pens. Ida gives Ben 4 pens.", return_tensors="pt")
    options = {**inputs, "max_new_tokens": 16, "do_sample": False}
    processors = LogitsProcessorList([CombinedScores(ensemble)])
    texts = {
        "anchor": anchor.generate(**options),
        "anchor with the processor": anchor.generate(**options, logits_processor=processors),
        "ensemble": ensemble.generate(**options),
    }
    for name, ids in texts.items():
        print(f"{name}: {tokenizer.decode(ids[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
