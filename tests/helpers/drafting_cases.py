"""For the tests of drafting: drafted and plain texts, forwards that are counted, similar tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from helpers.tiny import TableModel, make_model, random_ids
from torch import Tensor

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decoder import Decoder
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.samples import Sample
from ensembler.decoding.texts import complete_prompts

ROLES = ("source_ft", "source_pt", "target_pt")
Texts = dict[int, list[Sample]]


def make_trio(widths: Sequence[int] = (64, 64, 64), **settings: Any) -> EnsembleForCausalLM:
    """Tiny members of these widths (source FT, source PT, target PT)."""
    members = {
        "source_ft": make_model("llama", 1, vocab_size=widths[0]),
        "source_pt": make_model("qwen2", 2, vocab_size=widths[1], hidden_size=24, num_layers=1),
        "target_pt": make_model("gpt2", 3, vocab_size=widths[2], hidden_size=32, num_layers=3),
    }
    return EnsembleForCausalLM.from_members(members=members, **settings)


def similar_tables(count: int, vocab_size: int, *, distance: float = 0.7, seed: int = 0) -> list[TableModel]:
    """Fake models whose logits have much in common; none ends a text."""
    generator = torch.Generator().manual_seed(seed)
    common = 1.5 * torch.randn(vocab_size, vocab_size, generator=generator)
    found = []
    for _ in range(count):
        model = TableModel(common + distance * torch.randn(vocab_size, vocab_size, generator=generator)).eval()
        model.config.eos_token_id = model.generation_config.eos_token_id = None
        found.append(model)
    return found


def make_tables(rule: str = "base-change", alpha: float = 0.7, **settings: Any) -> EnsembleForCausalLM:
    """Base-change or EFT of three similar tables, without an end token."""
    members = dict(zip(ROLES, similar_tables(3, **settings), strict=True))
    model = EnsembleForCausalLM.from_members(rule=rule, alpha=alpha, members=members)
    model.generation_config.eos_token_id = None
    return model


def fixed(draft: str = "source_ft", num: int = 3, **more: Any) -> Decoder:
    """A decoder whose rounds always have so many positions."""
    return Decoder(draft, num_positions=num, is_fixed=True, **more)


def drafted(
    model: EnsembleForCausalLM,
    tokenizer: Any,
    prompts: list[EncodedPrompt],
    options: DecodingOptions,
    draft: str,
    num_positions: int | None,
    **more: Any,
) -> tuple[Texts, Decoder]:
    """The samples of each prompt with rounds of so many positions (None: as many as pay), and what decoded them.

    Fails where nothing was drafted: the texts would be those of plain decoding for no reason of ours.
    """
    settings = {"num_positions": num_positions or 8, "is_fixed": num_positions is not None}
    decoder = Decoder(draft, **{**settings, **more.pop("decoder", {})})
    completions = complete_prompts(model, tokenizer, prompts, options, decoder=decoder, **more)
    found = {completion.number: completion.samples for completion in completions}
    if options.max_new_tokens > 1:  # the first token is that of the prompt
        assert_drafted(decoder, has_rounds=(num_positions or 1) > 1 and options.max_new_tokens > 2)
    return found, decoder


def assert_drafted(decoder: Decoder, *, has_rounds: bool = True) -> None:
    """A draft was there for all texts; `has_rounds`: and rounds were run with it, else perhaps."""
    stats = decoder.stats
    assert not stats.by_transformers
    assert stats.draft is not None, stats.plain_reason
    assert not has_rounds or stats.num_rounds > 0
    assert not decoder.is_fixed or stats.plain_reason is None


def plain(
    model: EnsembleForCausalLM, tokenizer: Any, prompts: list[EncodedPrompt], options: DecodingOptions, **more: Any
) -> Texts:
    """The samples without a draft."""
    completions = complete_prompts(model, tokenizer, prompts, replace(options, draft="none"), **more)
    return {completion.number: completion.samples for completion in completions}


def assert_same(found: Texts, expected: Texts) -> None:
    assert found.keys() == expected.keys()
    differing = {key: (found[key], expected[key]) for key in found if found[key] != expected[key]}
    assert not differing, f"{len(differing)} of {len(found)} differ, the first: {next(iter(differing.items()))}"


def num_texts(texts: Texts) -> int:
    """How many of the texts differ."""
    return len({tuple(sample.ids) for samples in texts.values() for sample in samples})


@dataclass
class Calls:
    """What one model was given: the token ids and positions (rows, n) of each forward."""

    ids: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        """The positions of each forward."""
        return [ids.shape[1] for ids in self.ids]


@contextmanager
def counted(model: EnsembleForCausalLM) -> Iterator[dict[tuple[str, ...], Calls]]:
    """The forwards of each model inside, by the roles that it serves."""
    calls: dict[tuple[str, ...], Calls] = {}
    hooks = []
    for runner in model.member_set.runners:
        own = calls.setdefault(runner.roles, Calls())

        def note(module: Any, args: Any, kwargs: dict[str, Any], own: Calls = own) -> None:
            own.ids.append(kwargs["input_ids"].clone())
            if kwargs.get("position_ids") is not None:
                own.positions.append(kwargs["position_ids"].clone())

        hooks.append(runner.model.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def prompts_of(count: int, seed: int = 3, longest: int = 9) -> list[EncodedPrompt]:
    """Random prompts of 1 to `longest` tokens."""
    rows = [random_ids(1, 1 + (5 * i + seed) % longest, seed=100 * seed + i)[0].tolist() for i in range(count)]
    return [EncodedPrompt(number, ids) for number, ids in enumerate(rows)]


def plain_ids(model: EnsembleForCausalLM, ids: Tensor, **more: Any) -> Tensor:
    found: Tensor = model.generate(ids, **{"max_new_tokens": 16, "do_sample": False, **more})
    return found
