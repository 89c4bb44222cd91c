"""What prompts begin with in common is read once per member, and nothing else changes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_cases import save_adapter, save_base
from helpers.tiny import make_model, make_tokenizer, random_ids
from transformers import AutoConfig, AutoModelForCausalLM

from ensembler import EnsembleForCausalLM, MemberConfig
from ensembler.decoding.batching import MIN_SHARED, PrefixCache, common_length, plan_prefixes
from ensembler.decoding.decoder import Decoder
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.rows import Row, Text
from ensembler.decoding.texts import complete_prompts
from ensembler.errors import ConfigError, LogitsError

ROLES = ("source_ft", "source_pt", "target_pt")
HEADER = random_ids(1, 40, seed=1)[0].tolist()
TOKENIZER = make_tokenizer()


def families(*names: str) -> EnsembleForCausalLM:
    members = {role: make_model(name, seed) for seed, (role, name) in enumerate(zip(ROLES, names, strict=True))}
    return EnsembleForCausalLM.from_members(alpha=0.7, members=members)


def shared(tmp_path: Path, family: str = "llama", **settings: Any) -> EnsembleForCausalLM:
    """A LoRA beside its base, and a target of another family."""
    base = save_base(tmp_path / "base", family)
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    members = {"source_ft": MemberConfig(str(base), adapter=str(adapter)), "source_pt": str(base)}
    return EnsembleForCausalLM.from_members(alpha=0.7, members={**members, "target_pt": make_model("gpt2", 3)})


def padded(_: Path) -> EnsembleForCausalLM:
    """Vocabularies of other widths, a model in two roles."""
    one = make_model("llama", 1, vocab_size=72)
    members = {"source_ft": one, "source_pt": make_model("qwen2", 2, vocab_size=66), "target_pt": one}
    return EnsembleForCausalLM.from_members(rule="eft", alpha=0.7, members=members)


ENSEMBLES: dict[str, Callable[[Path], EnsembleForCausalLM]] = {
    "windows": lambda _: families("mistral", "gemma2", "llama"),
    "positions": lambda _: families("gpt2", "opt", "mixtral"),
    "rotary": lambda _: families("gpt_neox", "gemma", "qwen2"),
    "shared": shared,
    "shared windows": lambda path: shared(path, "mistral"),
    "peft": lambda path: shared(path, use_dora=True),
    "padded": padded,
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"temperature": 0.9, "seed": 3, "num_return_sequences": 2},
    "penalty": {"repetition_penalty": 1.7},
    "chunks": {"prefill_chunk": 7},
}


def prompts_behind(header: list[int], *lengths: int, seed: int = 0) -> list[EncodedPrompt]:
    rests = [random_ids(1, length, seed=seed + i)[0].tolist() for i, length in enumerate(lengths)]
    return [EncodedPrompt(i, [*header, *rest]) for i, rest in enumerate(rests)]


def texts(
    model: EnsembleForCausalLM, prompts: Sequence[EncodedPrompt], batch_size: int, *, share: bool = True, **options: Any
) -> dict[int, list[list[int]]]:
    decoding = DecodingOptions(**{"max_new_tokens": 6, "draft": "none", **options})
    found = complete_prompts(model, TOKENIZER, prompts, decoding, batch_size=batch_size, share_prefixes=share)
    return {one.number: [sample.ids for sample in one.samples] for one in found}


@contextmanager
def positions_read(model: EnsembleForCausalLM) -> Iterator[dict[tuple[str, ...], list[tuple[int, int]]]]:
    """(rows, positions) of all that each forward embeds; rows of members on one backbone are counted together."""
    seen: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    handles = []
    for runner in model.member_set.runners:
        own = seen.setdefault(runner.roles, [])
        embeddings = runner.model.get_input_embeddings()
        hook = embeddings.register_forward_pre_hook(lambda _, inputs, own=own: own.append(tuple(inputs[0].shape)))
        handles.append(hook)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_texts_are_those_without_a_header(tmp_path: Path, ensemble: str) -> None:
    """Prompts shorter and longer than the others, one row and many, every mode."""
    model = ENSEMBLES[ensemble](tmp_path)
    for mode, options in MODES.items():
        for batch_size, lengths in ((1, (3, 1, 5)), (2, (3, 1, 9, 4)), (4, (1, 55, 2, 8))):
            prompts = prompts_behind(HEADER, *lengths, seed=batch_size)
            with positions_read(model) as seen:
                expected = texts(model, prompts, batch_size, share=False, **options)
                before = {roles: sum(rows * width for rows, width in shapes) for roles, shapes in seen.items()}
                found = texts(model, prompts, batch_size, **options)
                after = {roles: sum(rows * width for rows, width in shapes) for roles, shapes in seen.items()}
            assert found == expected, (mode, batch_size)
            assert all(after[roles] < 2 * before[roles] for roles in before), (mode, batch_size)


@pytest.mark.parametrize("seed", range(12))
def test_random_prompts_headers_and_batches(base_change: EnsembleForCausalLM, seed: int) -> None:
    choose = random.Random(seed)
    header = random_ids(1, choose.randint(MIN_SHARED, 60), seed=seed)[0].tolist()
    lengths = [choose.randint(1, 40) for _ in range(7)]
    prompts = [*prompts_behind(header, *lengths, seed=seed), EncodedPrompt(7, random_ids(1, 50, seed=99)[0].tolist())]
    for batch_size in (1, 3, 8):
        expected = texts(base_change, prompts, batch_size, share=False)
        assert texts(base_change, prompts, batch_size) == expected, (seed, batch_size, lengths)


@pytest.mark.parametrize("ensemble", ["windows", "shared", "padded", "peft"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
def test_each_member_reads_the_header_once_and_the_rests(tmp_path: Path, ensemble: str, batch_size: int) -> None:
    model = ENSEMBLES[ensemble](tmp_path)
    prompts = prompts_behind(HEADER, *[4] * 6)
    with positions_read(model) as seen:
        texts(model, prompts, batch_size, max_new_tokens=1)
    for roles, shapes in seen.items():
        served = members_behind(model, roles)
        assert sum(rows * width for rows, width in shapes) == served * (40 + 6 * 4), (roles, shapes)


def members_behind(model: EnsembleForCausalLM, roles: tuple[str, ...]) -> int:
    """How many members embed with the module of `roles`: those on one backbone, and a model in two roles, share it."""
    module = model.members[roles[0]].get_input_embeddings()
    return sum(member.get_input_embeddings() is module for member in model.members.values())


def test_a_header_is_read_in_pieces(base_change: EnsembleForCausalLM) -> None:
    prompts = prompts_behind(HEADER, 4, 20)
    with positions_read(base_change) as seen:
        texts(base_change, prompts, 2, prefill_chunk=16)
    for shapes in seen.values():
        assert shapes[:5] == [(1, 16), (1, 16), (1, 8), (2, 16), (2, 4)]


@pytest.mark.parametrize("chunk", [1, 3, 16, 1000])
def test_long_prompts_in_pieces(base_change: EnsembleForCausalLM, chunk: int) -> None:
    """Prompts that begin in a later piece than others, and windows that are shorter than a piece or longer."""
    prompts = prompts_behind([], 50, 3, 31, 20)
    expected = texts(base_change, prompts, 4)
    with positions_read(base_change) as seen:
        assert texts(base_change, prompts, 4, prefill_chunk=chunk) == expected
    assert max(width for shapes in seen.values() for _, width in shapes) == min(chunk, 50)


def test_a_piece_of_no_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="prefill_chunk is 0; expected a number from 1"):
        DecodingOptions(prefill_chunk=0)


# -- which headers ----------------------------------------------------------------------------------------------------


def test_common_length() -> None:
    assert common_length([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert common_length([[1, 2], [3]]) == 0
    assert common_length([[1, 2]]) == 2
    assert common_length([[1], []]) == 0


A, B = list(range(100)), list(range(500, 600))


@pytest.mark.parametrize(
    ("prompts", "lengths"),
    [
        ([[*A, 1], [*A, 2]], [100, 100]),
        ([[*A, 1]], [0]),  # nobody to share with
        ([A, A], [99, 99]),  # a token has to be left
        ([[*A[:31], 1], [*A[:31], 2]], [0, 0]),  # too short
        ([[*A[:32], 1], [*A[:32], 2]], [32, 32]),
        ([[*A, 1], [*A, 2], [*B, 1], [*B, 2]], [100] * 4),  # each its own
        ([[*A, 1], [*A, 2], [*B, 1], [*A, 3], [*A, 4]], [100, 100, 0, 100, 100]),
        ([[*A, 1], [*A, 1], [*A[:40], 1], [*A[:40], 2]], [100, 100, 40, 40]),  # 100 + 40 against 3 · 40
        ([[*A, 1], [*A, 1], [*A[:90], 1], [*A[:90], 2]], [90] * 4),  # 3 · 90 against 100 + 90
    ],
)
def test_headers_are_planned_by_what_they_save(prompts: list[list[int]], lengths: list[int]) -> None:
    headers = plan_prefixes(prompts)
    assert [len(header) for header in headers] == lengths
    assert all(ids[: len(header)] == header for header, ids in zip(headers, prompts, strict=True))


def test_a_header_is_not_read_again_behind_a_prompt_without_one(base_change: EnsembleForCausalLM) -> None:
    ids = [[*HEADER, 5], [*HEADER, 6], [*HEADER[1:], 5, 9], [*HEADER, 7], [*HEADER, 8]]
    prompts = [EncodedPrompt(number, one) for number, one in enumerate(ids)]
    headers = PrefixCache(base_change, prompts)
    rows = [Row(one, 41, 50, [Text(0, number, 0)], one) for number, one in enumerate(ids)]
    cache = base_change.member_set.row_cache(7, 50)
    with positions_read(base_change) as seen:
        headers.fill(cache, rows[:2], 0)
        headers.fill(cache, rows[2:], 4)  # they stand where others have left
    assert [row.num_read for row in rows] == [40, 40, 0, 40, 40]
    assert all(shapes == [(1, 40)] for shapes in seen.values())
    for part in cache.caches.values():
        held = [layer.keys[row, :, :40].abs().sum() > 0 for layer in part.layers for row in range(7)]
        assert held == [True, True, False, False, False, True, True] * len(part.layers)


def test_a_resumed_run_reads_no_header_that_it_does_not_need(base_change: EnsembleForCausalLM) -> None:
    prompts = prompts_behind(HEADER, 3, 3, 2, 2)
    options = DecodingOptions(max_new_tokens=4)
    whole = texts(base_change, prompts, 2)
    with positions_read(base_change) as seen:
        done = frozenset(range(4))
        assert not list(complete_prompts(base_change, TOKENIZER, prompts, options, batch_size=2, done=done))
    assert not any(seen.values())
    rest = complete_prompts(base_change, TOKENIZER, prompts, options, batch_size=2, done=frozenset({0, 1}))
    found = {one.number: [sample.ids[:4] for sample in one.samples] for one in rest}
    assert found == {number: [ids[:4] for ids in whole[number]] for number in (2, 3)}


def test_a_recurrent_member_reads_every_prompt_whole() -> None:
    settings = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
    settings.update(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = AutoConfig.for_model("falcon_h1", vocab_size=64, num_key_value_heads=2, initializer_range=0.5, **settings)
    members = {"reference": AutoModelForCausalLM.from_config(config).eval(), "aligned": make_model("llama", 1)}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    prompts = prompts_behind(HEADER, 3, 3)
    with positions_read(model) as seen:
        found = texts(model, prompts, 2)
    assert all(shapes[0] == (2, 43) for shapes in seen.values())
    assert found == texts(model, prompts, 2, share=False)


def test_nan_in_a_header_names_the_member() -> None:
    model = families("llama", "gpt2", "qwen2")
    with torch.no_grad():
        model.members["source_pt"].get_input_embeddings().weight[HEADER[3]] = torch.nan
    with pytest.raises(LogitsError, match=r"^source_pt computed NaN"):
        texts(model, prompts_behind([token for token in HEADER if token != HEADER[3]] + [HEADER[3]], 3, 3), 2)


@pytest.mark.parametrize("draft", ["source_ft", "ngram"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_drafts_behind_a_header(draft: str, temperature: float) -> None:
    """Rows accept different numbers of tokens; the texts are those without a draft, too."""
    model = families("llama", "qwen2", "gpt2")
    header = random_ids(1, MIN_SHARED + 5, seed=3)[0].tolist()
    prompts = prompts_behind(header, 3, 9, 1, 6, seed=4)
    options = {"max_new_tokens": 14, "temperature": temperature, "seed": 7}
    expected = texts(model, prompts, 4, share=False, **options)
    for share_prefixes in (True, False):
        decoder = Decoder(draft, num_positions=4, is_fixed=True, seed=7)
        found = complete_prompts(
            model,
            TOKENIZER,
            prompts,
            DecodingOptions(**options),
            batch_size=3,
            decoder=decoder,
            share_prefixes=share_prefixes,
        )
        assert {one.number: [sample.ids for sample in one.samples] for one in found} == expected
        assert decoder.stats.plain_reason is None
        assert decoder.stats.num_rounds > 0
