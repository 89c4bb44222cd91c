"""What a round runs: which forwards, at which positions, by whom; and when nothing is drafted."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import make_pair, save_adapter, save_base
from ensembler_kernels import Combination
from speculative_cases import ROLES, counted, drafted, make_tables, make_trio, plain_ids, prompts_of
from test_distributed import run_ranks, spread
from tiny import make_model, random_ids
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerFast
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor

from ensembler import EnsembleForCausalLM
from ensembler.cache import EnsembleCache
from ensembler.decoding.drafting import DraftForward, find_draft, look_up
from ensembler.decoding.slots import Slots
from ensembler.decoding.speculative import SpeculativeDecoder
from ensembler.decoding.texts import DecodingOptions
from ensembler.distributed import World
from ensembler.errors import ConfigError, LogitsError


def fixed(draft: str, num: int = 3, **more: Any) -> SpeculativeDecoder:
    return SpeculativeDecoder(draft, num_positions=num, is_fixed=True, **more)


# -- forwards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("num", [2, 3, 8])
def test_a_round_runs_one_verification_and_as_many_drafts_as_positions(num: int, sampling: bool) -> None:
    model, ids = make_trio(alpha=0.1), random_ids(1, 5)
    model.generation_config.eos_token_id = None
    decoder = fixed("source_ft", num)
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
        decoder = fixed("source_ft", 4)
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


def test_rows_that_have_ended_are_not_run(tokenizer: PreTrainedTokenizerFast) -> None:
    model, ids = make_trio(alpha=0.1), random_ids(4, 5)
    model.generation_config.eos_token_id = int(plain_ids(model, ids)[2, 8])
    with counted(model) as calls:
        plain_ids(model, ids, max_new_tokens=20, custom_generate=fixed("source_ft"))
    num_rows = [found.shape[0] for found in calls[("target_pt",)].ids]
    assert num_rows == sorted(num_rows, reverse=True)
    assert num_rows[-1] < num_rows[0] == 4


# -- a round that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize(
    ("role", "forward"),
    [("source_ft", 7), ("source_ft", 8), ("source_ft", 9), ("source_pt", 3), ("target_pt", 3)],
)
def test_nan_of_a_member_within_a_round_is_an_error(role: str, forward: int, sampling: bool) -> None:
    """At each token that the third round drafts, and where it is verified; the caches are as before the round."""
    model, ids = make_tables(vocab_size=16), random_ids(1, 4, vocab_size=16)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": sampling}
    whole = plain_ids(model, ids, **options, custom_generate=fixed("source_ft"))
    failing: Any = model.members[role]
    first = failing.num_forwards

    def fail(*_: Any) -> None:
        failing.fault = math.nan if failing.num_forwards == first + forward else None

    hook = failing.register_forward_pre_hook(fail)
    cache, decoder = model.new_cache(), fixed("source_ft")
    with pytest.raises(LogitsError, match=f"^{role} computed NaN logits in torch.float32"):
        plain_ids(model, ids, past_key_values=cache, custom_generate=decoder, **options)
    hook.remove()
    failing.fault = None
    stats = decoder.stats
    assert (stats.num_rounds, stats.num_plain_steps) == (2, 0)
    num_read = ids.shape[1] + stats.num_round_tokens
    assert set(cache.lengths().values()) == {num_read}
    with counted(model) as calls:
        text = plain_ids(model, whole[:, : num_read + 1], past_key_values=cache, max_length=28, max_new_tokens=None)
    assert all(set(one.lengths) == {1} for one in calls.values())  # nothing is read again
    assert sampling or text.tolist() == whole.tolist()
    assert text.tolist() == plain_ids(model, whole[:, : num_read + 1], max_length=28, max_new_tokens=None).tolist()


# -- slots ------------------------------------------------------------------------------------------------------------


def test_rows_are_shifted_so_that_all_end_together() -> None:
    model = make_tables(vocab_size=16)
    cache: EnsembleCache = model.new_cache()
    ids = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [0, 0, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]])
    slots = Slots(cache, mask, (mask.cumsum(-1) - 1).clamp(min=0), 3)
    model.member_logits(slots_step(ids, mask), cache)
    fed = torch.tensor([[10, 11, 12], [13, 14, 15], [10, 12, 14]])
    step = slots.step(fed)
    assert step.position_ids is not None
    assert step.position_ids.tolist() == [[4, 5, 6], [4, 5, 6], [2, 3, 4]]
    model.member_logits(step, cache)
    slots.keep(3, [1, 3, 2], [0, 2])
    held = [layer.keys[:, 0, :, 0].tolist() for layer in cache.layers]
    assert held[0] == held[1] == held[2]
    assert [row[-5:] for row in held[0]] == [[0, 1, 2, 3, 10], [*held[0][1][-5:-4], 8, 9, 10, 12]]
    assert len(held[0][0]) == 5  # the padding that all have is cut
    step = slots.step(torch.tensor([[1], [2]]))
    assert step.attention_mask is not None
    assert step.position_ids is not None
    assert step.attention_mask.tolist() == [[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]
    assert step.position_ids.tolist() == [[5], [4]]


def slots_step(ids: Tensor, mask: Tensor) -> Any:
    from ensembler.runners import Step

    return Step(ids, mask)


# -- who drafts -------------------------------------------------------------------------------------------------------


def numbers(found: DraftForward | None) -> dict[str, tuple[float, float]]:
    assert found is not None
    how: Combination = found.how
    return dict(zip(found.roles, zip(how.constant, how.slope, strict=True), strict=True))


def test_the_numbers_of_a_draft(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter, target = save_adapter(base, tmp_path / "adapter"), make_model("gpt2", 3)
    base_change, eft = (make_pair(base, adapter, target, rule=rule) for rule in ("base-change", "eft"))
    assert numbers(find_draft(base_change.shared, "source_pt")) == {"source_ft": (1, 0), "source_pt": (0, 0)}
    assert numbers(find_draft(eft.shared, "source_ft")) == {"source_pt": (1, -1), "source_ft": (0, 1)}
    for role in ROLES:
        assert numbers(find_draft(base_change.copies, role)) == {role: (1, 0)}
        assert numbers(find_draft(eft.copies, role)) == {role: (1, 0)}


def test_a_score_is_left_out_and_cannot_draft() -> None:
    members = {"target_pt": make_model("llama", 1), "reward": make_model("llama", 2)}
    model = EnsembleForCausalLM.from_members(rule="reward", alpha=0.3, members=members)
    assert numbers(find_draft(model, "target_pt")) == {"target_pt": (1, 0)}
    with pytest.raises(ConfigError, match="draft is 'reward', which gives scores and no distribution"):
        find_draft(model, "reward")


def test_auto_drafts_with_a_light_member_alone() -> None:
    equal = EnsembleForCausalLM.from_members(members={role: make_model("llama", 1) for role in ROLES})
    assert find_draft(equal, "auto") is None
    members = {role: make_model("llama", 1) for role in ROLES} | {"target_pt": make_model("llama", 1, num_layers=6)}
    found = find_draft(EnsembleForCausalLM.from_members(members=members), "auto")
    assert found is not None
    assert found.forward.roles[0].startswith("source_")
    assert 0 < found.share < 1 / 3
    assert sum(map(len, found.others)) == 2


@pytest.mark.parametrize(
    ("text", "num", "found"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], 4, [4, 5, 1, 2]),
        ([1, 2, 3, 7, 9, 2, 3, 8, 2, 3], 1, [8]),  # the latest place
        ([1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3], 2, [7, 9]),  # three tokens before two
        ([1, 2, 3], 3, []),
        ([5, 5, 5, 5], 3, [5]),
        ([1], 3, []),
    ],
)
def test_what_followed_before(text: list[int], num: int, found: list[int]) -> None:
    assert look_up(torch.tensor(text), num).tolist() == found


# -- when nothing is drafted ------------------------------------------------------------------------------------------


def assert_plain(model: EnsembleForCausalLM, reason: str, draft: str = "source_ft", **options: Any) -> None:
    ids = random_ids(2, 5)
    decoder = fixed(draft)
    found = plain_ids(model, ids, custom_generate=decoder, **options)
    assert found.tolist() == plain_ids(model, ids, **options).tolist()
    assert decoder.stats.plain_reason == reason
    assert (decoder.stats.num_rounds, decoder.stats.draft) == (0, None)


def test_a_sliding_window_beyond_its_window() -> None:
    members = {"source_ft": make_model("llama", 1), "source_pt": make_model("mistral", 2), "target_pt": make_model()}
    model = EnsembleForCausalLM.from_members(members=members)
    assert_plain(model, "source_pt keeps a window of 6 tokens and a text may have 21")
    decoder = fixed("source_ft")
    plain_ids(model, random_ids(2, 2), max_new_tokens=4, custom_generate=decoder)
    assert decoder.stats.draft == "source_ft"  # within it, it can


def test_a_recurrent_state() -> None:
    members: dict[str, Any] = dict(zip(ROLES, (make_model("llama", 1), make_model("llama", 2), None), strict=True))
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "lfm2", vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], eos_token_id=2, bos_token_id=1, pad_token_id=3,
    )  # fmt: skip
    members["target_pt"] = AutoModelForCausalLM.from_config(config).eval()
    model = EnsembleForCausalLM.from_members(members=members)
    assert_plain(model, "target_pt keeps a recurrent state, which cannot be taken back")


def test_caches_that_cannot_be_taken_back() -> None:
    reason = "the cache of source_ft has a StaticLayer, which cannot be taken back"
    assert_plain(make_trio(), reason, cache_implementation="static")
    assert_plain(make_trio(), "there is no cache to go on with", use_cache=False)


def test_a_batch_in_a_cache_that_was_given() -> None:
    model, ids = make_trio(), random_ids(2, 5)
    cache, decoder = model.new_cache(), fixed("source_ft")
    plain_ids(model, ids, past_key_values=cache, custom_generate=decoder)
    assert decoder.stats.plain_reason == "a cache that was given is gone on with, and rows would be shifted in it"


def test_a_processor_that_knows_rows_by_number() -> None:
    processors = LogitsProcessorList([PrefixConstrainedLogitsProcessor(lambda row, ids: [4 + row, 9, 10], 1)])
    kind = "PrefixConstrainedLogitsProcessor"
    reason = f"{kind} knows texts by their place in the batch, or keeps a state of its own"
    assert_plain(make_trio(), reason, logits_processor=processors)


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
        decoder = fixed("source_ft")
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
        ("source_ft", {"num_beams": 3}, "num_beams is 3; a draft works with greedy decoding and with sampling"),
        ("source_ft", {"return_dict_in_generate": True}, "return_dict_in_generate is set"),
    ],
)
def test_what_cannot_be_drafted_is_an_error(draft: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plain_ids(make_trio(), random_ids(1, 4), custom_generate=fixed(draft), **options)


def test_numbers_that_make_no_sense(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="num_positions is 0"):
        fixed("source_ft", 0)
    with pytest.raises(ConfigError, match="draft_tokens is 0"):
        DecodingOptions(draft_tokens=0)
    with pytest.raises(ConfigError, match="draft is 'ngram' and num_beams 4; a draft works with greedy"):
        DecodingOptions(draft="ngram", num_beams=4)
    with pytest.raises(ConfigError, match="3 numbers were given for 2 prompts"):
        plain_ids(make_trio(), random_ids(2, 4), do_sample=True, custom_generate=fixed("source_ft", numbers=[1, 2, 3]))
    found, _ = drafted(make_trio(), tokenizer, prompts_of(2), DecodingOptions(max_new_tokens=3), "auto", 1)
    assert len(found) == 2
