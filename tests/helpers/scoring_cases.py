"""Cases for the tests of scoring: ensembles in folders, random requests, and a plain reference in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from helpers.tiny import VOCAB, make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ensembler import EnsembleConfig, EnsembleForCausalLM, MemberConfig
from ensembler.engine.grid import make_grid
from ensembler.evaluation.backends import TransformersBackend
from ensembler.evaluation.offline import LogitsFolder, OfflineScorer
from ensembler.evaluation.request_batches import make_batches
from ensembler.evaluation.requests import ScoringRequest
from ensembler.evaluation.scoring import Score, ScoredRequest
from ensembler.preflight import CheckedEnsemble

ALPHAS = [0.0, 0.4, 1.0, 1.7]


@dataclass(frozen=True)
class Case:
    """An ensemble of saved members: `numbers` are (constant, slope) by role, the anchor first."""

    rule: str
    numbers: dict[str, tuple[float, float]]
    save: Callable[[Path], dict[str, MemberConfig]]
    settings: dict[str, object] = field(default_factory=dict)
    cutoff: float | None = None
    shared: int = VOCAB

    def config(self, folder: Path) -> EnsembleConfig:
        return EnsembleConfig(rule=self.rule, alpha=0.4, members=self.save(folder), **self.settings)


def save_models(folder: Path, *, dtypes: Mapping[str, torch.dtype] | None = None, **families: dict) -> dict:
    """Save one tiny model per role: its family and settings."""
    members = {}
    for seed, (role, settings) in enumerate(families.items(), 1):
        settings = dict(settings)
        tokenizer = make_tokenizer(settings.pop("num_extra", 0))
        model = make_model(settings.pop("family"), seed, **settings)
        model.to((dtypes or {}).get(role, torch.float32)).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
        members[role] = MemberConfig(str(folder / role))
    return members


def save_lora(folder: Path) -> dict[str, MemberConfig]:
    """source_ft is source_pt with an adapter, so that the two share a backbone."""
    members = save_models(folder, source_pt={"family": "llama"}, target_pt={"family": "qwen2", "hidden_size": 24})
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    base = AutoModelForCausalLM.from_pretrained(folder / "source_pt")
    get_peft_model(base, lora).save_pretrained(folder / "adapter")
    members["source_ft"] = MemberConfig(str(folder / "source_pt"), adapter=str(folder / "adapter"))
    return members


_BASE_CHANGE = {"source_ft": (1.0, 0.0), "target_pt": (0.0, 1.0), "source_pt": (0.0, -1.0)}
_EFT = {"target_pt": (1.0, 0.0), "source_ft": (0.0, 1.0), "source_pt": (0.0, -1.0)}
_LINEAR = {"a": (1.0, 0.0), "b": (0.5, 0.0), "c": (0.0, 0.5), "d": (0.0, -0.5)}


def _trio(**settings: dict) -> Callable[[Path], dict[str, MemberConfig]]:
    plain = {"source_ft": {"family": "llama"}, "source_pt": {"family": "mistral"}, "target_pt": {"family": "gpt2"}}
    return partial(save_models, **{**plain, **settings})


CASES = {
    "base-change": Case("base-change", _BASE_CHANGE, _trio()),
    "eft": Case(
        "eft", _EFT, _trio(source_ft={"family": "opt"}, source_pt={"family": "bloom"}, target_pt={"family": "gpt_neox"})
    ),
    "linear": Case(
        "linear",
        _LINEAR,
        partial(
            save_models,
            a={"family": "llama"},
            b={"family": "gemma"},
            c={"family": "gemma2"},
            d={"family": "qwen2", "num_layers": 1},
        ),
        {
            "constant": {role: constant for role, (constant, _) in _LINEAR.items() if constant},
            "slope": {role: slope for role, (_, slope) in _LINEAR.items() if slope},
        },
    ),
    "contrastive": Case(
        "contrastive",
        {"expert": (1.0, 1.0), "amateur": (0.0, -1.0)},
        partial(save_models, expert={"family": "qwen2"}, amateur={"family": "llama", "num_layers": 1}),
        {"cutoff": 0.05},
        cutoff=0.05,
    ),
    "padded": Case("base-change", _BASE_CHANGE, _trio(source_ft={"family": "llama", "vocab_size": 72}), shared=VOCAB),
    "extended": Case(
        "base-change",
        _BASE_CHANGE,
        _trio(source_ft={"family": "llama", "vocab_size": 70, "num_extra": 6}),
    ),
    "lora": Case("base-change", _BASE_CHANGE, save_lora),
    "bf16": Case(
        "base-change",
        _BASE_CHANGE,
        partial(_trio(), dtypes={"source_ft": torch.bfloat16, "target_pt": torch.float16}),
    ),
}


def random_requests(num: int = 13, seed: int = 0) -> list[ScoringRequest]:
    """Contexts of 1 to 20 tokens with 1 to 4 continuations, some alike, some the beginning of another, some equal."""
    chance = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(chance.randrange(4, VOCAB) for _ in range(length))

    requests = []
    for number in range(num):
        first = ids(chance.randint(1, 6))
        others = [
            chance.choice([first, first[:1], first + ids(2), first[:2] + ids(3), ids(1), ids(4)])
            for _ in range(chance.randint(0, 3))
        ]
        requests.append(ScoringRequest(number, ids(chance.randint(1, 20)), (first, *others), f"line {number}"))
    return requests


def reference(
    case: Case, members: Mapping[str, PreTrainedModel], request: ScoringRequest
) -> list[list[tuple[float, bool]]]:
    """Log-prob and greedy flag of every continuation under ALPHAS: each alone, all its logits, float64 from there."""
    found = []
    for continuation in request.continuations:
        ids = torch.tensor([request.context + continuation])
        with torch.no_grad():
            logits = {role: members[role](ids[:, :-1]).logits[0].double() for role in case.numbers}
        found.append([_score(_combined(case, logits, a)[len(request.context) - 1 :], continuation) for a in ALPHAS])
    return found


def _score(z: Tensor, continuation: tuple[int, ...]) -> tuple[float, bool]:
    logprobs = z.log_softmax(-1)
    chosen = [float(row[token]) for row, token in zip(logprobs, continuation, strict=True)]
    return sum(chosen), z.argmax(-1).tolist() == list(continuation)


def _combined(case: Case, logits: Mapping[str, Tensor], alpha: float) -> Tensor:
    """Ids from `shared` on are left out, which is what forbidding them comes to."""
    z = sum((c + alpha * s) * logits[role][:, : case.shared] for role, (c, s) in case.numbers.items())
    assert isinstance(z, Tensor)
    if case.cutoff is None or alpha == 0:
        return z
    anchor = logits[next(iter(case.numbers))][:, : case.shared]
    return z.masked_fill(anchor < anchor.amax(-1, keepdim=True) + math.log(case.cutoff), -math.inf)


REQUESTS = random_requests()
Scores = dict[int, tuple[Score, ...]]


def scored(
    scorer: TransformersBackend | OfflineScorer,
    rule: str,
    batch_size: int,
    alphas: list[float] = ALPHAS,
    **options: Any,
) -> Scores:
    share_contexts = options.pop("share_contexts", False)
    batches = make_batches(REQUESTS, batch_size, share_contexts=share_contexts)
    found = scorer.score(batches, make_grid([rule], alphas), **options)
    return {one.request.number: one.scores for batch in found for one in batch}


def together(model: EnsembleForCausalLM, *settings: Any, **options: Any) -> Scores:
    return scored(TransformersBackend(model), model.rule.name, *settings, **options)


def offline(checked: CheckedEnsemble, folder: LogitsFolder, *settings: Any, **options: Any) -> Scores:
    return scored(OfflineScorer(checked, folder), checked.config.get_rule().name, *settings, **options)


def alone(model: EnsembleForCausalLM, request: ScoringRequest, alphas: list[float]) -> ScoredRequest:
    batches = make_batches([request], 8)
    ((found,),) = TransformersBackend(model).score(batches, make_grid([model.rule.name], alphas))
    return found
