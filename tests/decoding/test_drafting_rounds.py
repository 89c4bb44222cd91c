"""What a round runs: which forwards, at which positions, by whom; rounds that fail; and when nothing is drafted."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_cases import make_pair, save_adapter, save_base
from helpers.drafting_cases import ROLES, counted, drafted, fixed, make_tables, make_trio, plain_ids, prompts_of
from helpers.rank_cases import run_ranks, spread
from helpers.tiny import make_model, random_ids
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerFast
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decoder import Decoder
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.engine.distributed import World
from ensembler.errors import ConfigError, LogitsError

# -- forwards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("num", [2, 3, 8])
def test_a_round_runs_one_verification_and_as_many_drafts_as_positions(num: int, sampling: bool) -> None:
    model, ids = make_trio(alpha=0.1), random_ids(1, 5)
    model.generation_config.eos_token_id = None
    decoder = fixed(num=num, seed=1)
    with counted(model) as calls:
        text = plain_ids(model, ids, max_new_tokens=25, do_sample=sampling, custom_generate=decoder)
    stats = decoder.stats
    drafting, *others = (calls[(role,)] for role in ROLES)
    rounds = [length for length in others[0].lengths[1:] if length > 1]  # the last may be plain: one token is left
    assert len(rounds) == stats.num_rounds
    assert drafting.lengths == [5] + [1] * (sum(rounds) + stats.num_plain_steps)
    for other in others:
        assert other.lengths == [5, *rounds, *[1] * stats.num_plain_steps]
        assert rounds[0] == num == max(rounds)
    assert stats.num_accepted < stats.num_drafted  # something was taken back
    for member in (drafting, *others):
        assert_computed_once(text[0], member.ids, member.positions)


def assert_computed_once(text: Tensor, ids: list[Tensor], positions: list[Tensor]) -> None:
    """Every token of the text but the last was computed behind its own context once; all others were rejected."""
    held: list[int] = []
    seen: Counter[tuple[int, ...]] = Counter()
    for tokens, places in zip(ids, positions, strict=True):
        for token, position in zip(tokens[0].tolist(), places[0].tolist(), strict=True):
            held = [*held[:position], token]
            assert len(held) == position + 1  # nothing is left out
            seen[tuple(held)] += 1
    wanted = [tuple(text[:end].tolist()) for end in range(1, text.shape[0])]
    assert [seen[context] for context in wanted] == [1] * len(wanted)
    assert 0 < sum(seen.values()) - len(wanted) < sum(seen.values())


def test_members_on_one_backbone_are_drafted_by_one_forward(tmp_path: Path) -> None:
    """Both members' logits come from drafting: verification is one forward of the target, and nothing else."""
    base = save_base(tmp_path / "base")
    model = make_pair(base, save_adapter(base, tmp_path / "adapter"), make_model("gpt2", 3), alpha=0.1).shared
    model.generation_config.eos_token_id = None
    with counted(model) as calls:
        decoder = fixed(num=4)
        plain_ids(model, random_ids(1, 5), max_new_tokens=21, custom_generate=decoder)
    pair, target = calls[("source_ft", "source_pt")], calls[("target_pt",)]
    rounds = target.lengths[1:]
    assert len(rounds) == decoder.stats.num_rounds + decoder.stats.num_plain_steps
    assert pair.lengths[1:] == [1] * sum(rounds)
    assert {ids.shape[0] for ids in pair.ids} == {2}


def test_repetitions_are_verified_by_one_forward_of_each_member() -> None:
    model = make_trio(alpha=0.1)
    model.generation_config.eos_token_id = None
    ids = random_ids(1, 6).repeat(1, 3)
    text = plain_ids(model, ids, max_new_tokens=1)
    ids = torch.cat([ids, text[:, -1:], random_ids(1, 3, seed=5), ids[:, -2:]], dim=1)  # what follows is known
    decoder = fixed("ngram", 4)
    with counted(model) as calls:
        plain_ids(model, ids, max_new_tokens=12, custom_generate=decoder)
    lengths = {tuple(one.lengths) for one in calls.values()}
    assert len(lengths) == 1
    assert sum(map(len, lengths)) == 1 + decoder.stats.num_rounds + decoder.stats.num_plain_steps


@pytest.mark.parametrize("draft", ["source_ft", "ngram"])
def test_rows_that_have_ended_are_not_run(draft: str) -> None:
    model, ids = make_trio(alpha=0.1), random_ids(4, 5)
    model.generation_config.eos_token_id = int(plain_ids(model, ids)[2, 8])
    with counted(model) as calls:
        plain_ids(model, ids, max_new_tokens=20, custom_generate=fixed(draft))
    num_rows = [found.shape[0] for found in calls[("target_pt",)].ids]
    assert num_rows == sorted(num_rows, reverse=True)
    assert num_rows[-1] < num_rows[0] == 4


# -- a round that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize(
    ("role", "forward"),
    [("source_ft", 7), ("source_pt", 3), ("target_pt", 3)],
)
def test_nan_of_a_member_within_a_round_is_an_error(role: str, forward: int, sampling: bool) -> None:
    """Where the third round drafts its first token, and where it is verified; the cache is as before the call."""
    model, ids = make_tables(vocab_size=16), random_ids(1, 4, vocab_size=16)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": sampling}
    whole = plain_ids(model, ids, **options, custom_generate=fixed(seed=3))
    failing: Any = model.members[role]
    first = failing.num_forwards

    def fail(*_: Any) -> None:
        failing.fault = math.nan if failing.num_forwards == first + forward else None

    hook = failing.register_forward_pre_hook(fail)
    cache, decoder = model.member_set.row_cache(1, 32), fixed(seed=3)
    with pytest.raises(LogitsError, match=f"^{role} computed NaN logits in torch.float32"):
        plain_ids(model, ids, past_key_values=cache, custom_generate=decoder, **options)
    hook.remove()
    failing.fault = None
    stats = decoder.stats
    assert (stats.num_rounds, stats.num_plain_steps) == (2, 0)
    assert cache.lengths[0] == 0
    text = plain_ids(model, ids, past_key_values=cache, custom_generate=fixed(seed=3), **options)
    assert text.tolist() == whole.tolist()


@pytest.mark.parametrize("fault", ["nan", "error"])
@pytest.mark.parametrize(("role", "call"), [("source_ft", 8), ("source_pt", 3), ("target_pt", 4)])
def test_a_cache_is_usable_after_a_round_that_failed(role: str, call: int, fault: str) -> None:
    """NaN in keys and values, behind what was kept, is forgotten: a mask would not stop it."""
    model, ids = make_trio(alpha=0.2), random_ids(3, 5)
    model.generation_config.eos_token_id = None
    member: Any = model.members[role]
    layer = member.transformer.h[0] if role == "target_pt" else member.model.layers[0]
    num = 0

    def fail(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal num
        num += 1
        if num != call:
            return None
        if fault == "error":
            raise ValueError("out of luck")
        return (args[0] * math.nan, *args[1:]), kwargs

    expected = plain_ids(model, ids, max_new_tokens=20)
    hook = layer.register_forward_pre_hook(fail, with_kwargs=True)
    cache, decoder = model.member_set.row_cache(3, 32), fixed()
    message = "computed NaN logits" if fault == "nan" else "failed: ValueError: out of luck"
    with pytest.raises(Exception, match=f"^{role} {message}"):
        plain_ids(model, ids, max_new_tokens=20, past_key_values=cache, custom_generate=decoder)
    hook.remove()
    assert decoder.stats.num_rounds > 0
    for more in ({"custom_generate": fixed()}, {}):
        assert cache.lengths[:3] == [0] * 3
        text = plain_ids(model, ids, max_new_tokens=20, past_key_values=cache, **more)
        assert text.tolist() == expected.tolist()
        cache.lengths[:3] = [0] * 3


@pytest.mark.parametrize("draft", ["none", "source_ft", "source_pt", "ngram"])
def test_nan_of_a_member_is_an_error_at_an_alpha_of_zero(draft: str) -> None:
    model = make_tables(alpha=0.0, vocab_size=16)
    with torch.no_grad():
        model.members["target_pt"].table[5:].fill_(math.nan)
    with pytest.raises(LogitsError, match=r"^target_pt computed NaN"):
        plain_ids(model, random_ids(2, 4, vocab_size=16), max_new_tokens=40, custom_generate=fixed(draft))


# -- when nothing is drafted ------------------------------------------------------------------------------------------


def assert_plain(model: EnsembleForCausalLM, reason: str, draft: str = "source_ft", **options: Any) -> None:
    """Nothing is drafted, for this reason, and decoded all the same in the loop."""
    decoder = decoded(model, draft, **options)
    assert (decoder.stats.plain_reason, decoder.stats.by_transformers) == (reason, {})


def assert_by_transformers(model: EnsembleForCausalLM, reason: str, **options: Any) -> None:
    decoder = decoded(model, "source_ft", **options)
    assert (decoder.stats.plain_reason, decoder.stats.by_transformers) == (None, {reason: 1})


def decoded(model: EnsembleForCausalLM, draft: str, **options: Any) -> Decoder:
    ids, decoder = random_ids(2, 5), fixed(draft)
    found = plain_ids(model, ids, custom_generate=decoder, **options)
    assert found.tolist() == plain_ids(model, ids, **{"use_cache": False, **options}).tolist()
    assert (decoder.stats.num_rounds, decoder.stats.draft) == (0, None)
    return decoder


def test_a_recurrent_state() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "lfm2", vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], eos_token_id=2, bos_token_id=1, pad_token_id=3,
    )  # fmt: skip
    members: dict[str, Any] = {"source_ft": make_model("llama", 1), "source_pt": make_model("llama", 2)}
    members["target_pt"] = AutoModelForCausalLM.from_config(config).eval()
    model = EnsembleForCausalLM.from_members(members=members)
    assert_by_transformers(
        model, "target_pt cannot keep a cache of rows: Lfm2ForCausalLM has not been tried on it", use_cache=True
    )


def test_caches_that_are_transformers_own() -> None:
    assert_by_transformers(make_trio(), "cache_implementation is 'static'", cache_implementation="static")
    assert_by_transformers(make_trio(), "use_cache is off", use_cache=False)
    model = make_trio()
    reason = "past_key_values is a growing cache; one that generate has returned can be gone on with"
    decoder = fixed()
    found = plain_ids(model, random_ids(2, 5), past_key_values=model.new_cache(), custom_generate=decoder)
    assert found.tolist() == plain_ids(model, random_ids(2, 5)).tolist()
    assert decoder.stats.by_transformers == {reason: 1}


def test_a_processor_that_knows_rows_by_number() -> None:
    processors = LogitsProcessorList([PrefixConstrainedLogitsProcessor(lambda row, ids: [4 + row, 9, 10], 1)])
    kind = "PrefixConstrainedLogitsProcessor"
    reason = f"{kind} knows texts by their place in the batch, or keeps a state of its own"
    assert_by_transformers(make_trio(), reason, logits_processor=processors)


def test_members_that_all_run_in_one_forward(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    first, second = (save_adapter(base, tmp_path / f"a{seed}", seed=seed) for seed in (5, 6))
    members: Any = {
        "source_pt": str(base),
        "source_ft": {"model": str(base), "adapter": str(first)},
        "target_pt": {"model": str(base), "adapter": str(second)},
    }
    model = EnsembleForCausalLM.from_members(members=members)
    assert_plain(model, "all members run in one forward, so that there is none to verify")


def test_nobody_light_enough_and_nobody_wanted() -> None:
    model = EnsembleForCausalLM.from_members(members={role: make_model("llama", 1) for role in ROLES})
    assert_plain(model, "no member is light enough to draft for the others", draft="auto")
    assert_plain(model, "no draft was wanted", draft="none")


def test_several_processes(trio: dict[str, Any], base_change: EnsembleForCausalLM) -> None:
    ids = random_ids(2, 5)

    def decode(world: World) -> Any:
        decoder = fixed()
        model = spread(world, trio, base_change)
        found = plain_ids(model, ids, max_new_tokens=6, custom_generate=decoder).tolist()
        return found, decoder.stats.plain_reason

    expected = plain_ids(base_change, ids, max_new_tokens=6).tolist()
    assert run_ranks(2, decode) == [(expected, "several processes share the members")] * 2


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draft", "options", "message"),
    [
        (
            "target_ft",
            {},
            "draft is 'target_ft', which is no role of this ensemble; expected one of: auto, none, ngram",
        ),
        ("source_ft", {"num_beams": 3}, "num_beams is 3; a grid and a draft work with greedy decoding and with"),
    ],
)
def test_what_cannot_be_drafted_is_an_error(draft: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plain_ids(make_trio(), random_ids(1, 4), custom_generate=fixed(draft), **options)


def test_numbers_that_make_no_sense(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="num_positions is 0"):
        fixed(num=0)
    with pytest.raises(ConfigError, match="draft_tokens is 0"):
        DecodingOptions(draft_tokens=0)
    with pytest.raises(ConfigError, match="draft is 'ngram' and num_beams 4; a draft works with greedy"):
        DecodingOptions(draft="ngram", num_beams=4)
    with pytest.raises(ConfigError, match="3 numbers were given for 2 prompts"):
        plain_ids(make_trio(), random_ids(2, 4), do_sample=True, custom_generate=fixed(numbers=[1, 2, 3]))
    found, _ = drafted(make_trio(), tokenizer, prompts_of(2), DecodingOptions(max_new_tokens=3), "auto", 1)
    assert len(found) == 2
