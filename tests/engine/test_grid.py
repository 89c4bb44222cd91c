"""A grid decodes what its points decode one by one: greedy and sampled texts, forwards and rows counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_cases import make_pair, roles_of_forwards, save_adapter, save_base
from helpers.grid_cases import (
    ALPHAS,
    POINTS,
    assert_same,
    by_transformers,
    distinct_texts,
    make_trio,
    prompts_of,
    run_alone,
    run_grid,
    spied,
)
from helpers.rank_cases import run_ranks, spread
from helpers.tiny import make_model, random_ids
from transformers import PreTrainedTokenizerFast

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decoder import Decoder
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt, text_ids
from ensembler.demo import demo_folder
from ensembler.engine.distributed import World
from ensembler.engine.grid import GridPoint, make_grid
from ensembler.errors import ConfigError, EnsemblerError

FEW = POINTS[::6]  # of both rules
SAMPLING = {
    "plain": {},
    "top-p": {"top_p": 0.9},
    "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2},
}


def sampling(name: str, **more: Any) -> DecodingOptions:
    return DecodingOptions(**{"temperature": 1.0, "seed": 7, **SAMPLING[name], **more})


# -- the embedded family ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> EnsembleForCausalLM:
    return EnsembleForCausalLM.from_pretrained(demo_folder())


def demo_prompts(model: EnsembleForCausalLM, count: int) -> list[EncodedPrompt]:
    lines = (demo_folder() / "data" / "examples.jsonl").read_text("utf-8").splitlines()[:count]
    return [EncodedPrompt(i, text_ids(model.tokenizer, json.loads(line)["prompt"])) for i, line in enumerate(lines)]


def test_greedy_texts_of_the_demo_are_those_of_transformers(demo: EnsembleForCausalLM) -> None:
    prompts, options = demo_prompts(demo, 24), DecodingOptions(max_new_tokens=24, draft="none")
    with spied(demo) as steps:
        found, stats = run_grid(demo, demo.tokenizer, prompts, options, batch_size=24)
    assert_same(found, run_alone(demo, demo.tokenizer, prompts, options, batch_size=24))
    assert len({samples[0].text for samples in found.values()}) > 24  # α matters
    rows = [step.input_ids.shape[0] for step in steps if step.logits_to_keep == 0]
    assert len(rows) == max(samples[0].num_tokens for samples in found.values()) - 1
    assert rows == [distinct_texts(found, step + 1) for step in range(len(rows))]
    assert stats.num_rows == sum(rows)
    assert stats.num_rows < 0.25 * len(POINTS) * len(prompts) * len(rows)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_sampled_texts_of_the_demo_are_those_of_transformers(demo: EnsembleForCausalLM, name: str) -> None:
    prompts, options = demo_prompts(demo, 24), sampling(name, max_new_tokens=12)
    found, _ = run_grid(demo, demo.tokenizer, prompts, options, batch_size=24)
    some = {key: samples for key, samples in found.items() if key[0] in FEW}
    assert_same(some, run_alone(demo, demo.tokenizer, prompts, options, FEW, batch_size=24))
    for point in POINTS:
        alone, _ = run_grid(demo, demo.tokenizer, prompts, options, batch_size=7, points=[point])
        assert_same({key: samples for key, samples in found.items() if key[0] == point}, alone)


# -- members of other widths ------------------------------------------------------------------------------------------

WIDTHS = {"same": (64, 64, 64), "wide anchor": (72, 64, 70), "narrow anchor": (64, 80, 72)}


@pytest.mark.parametrize("outside", ["mask", "neutral"])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("penalty", [None, 1.3])
def test_greedy_texts_of_random_members(
    tokenizer: PreTrainedTokenizerFast, outside: str, widths: str, penalty: float | None
) -> None:
    model, prompts = make_trio(WIDTHS[widths], outside=outside), prompts_of(7)
    options = DecodingOptions(max_new_tokens=12, repetition_penalty=penalty)
    found, _ = run_grid(model, tokenizer, prompts, options, batch_size=4)
    points = POINTS if (widths, outside) == ("wide anchor", "neutral") else FEW  # all of them take their time
    some = {key: samples for key, samples in found.items() if key[0] in points}
    assert_same(some, run_alone(model, tokenizer, prompts, options, points, batch_size=4))


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("widths", WIDTHS)
def test_sampled_texts_depend_on_nothing_beside_them(
    tokenizer: PreTrainedTokenizerFast, widths: str, name: str
) -> None:
    """Other points, other prompts, fewer samples, another order, `transformers`' loop: the same texts."""
    model, prompts = make_trio(WIDTHS[widths], outside="neutral"), prompts_of(5)
    options = sampling(name, max_new_tokens=7, num_return_sequences=3)
    found, _ = run_grid(model, tokenizer, prompts, options, batch_size=4)
    some = {key: samples for key, samples in found.items() if key[0] in FEW[::2]}
    assert_same(some, run_alone(model, tokenizer, prompts, options, FEW[::2], batch_size=2))
    for point in POINTS if (widths, name) == ("wide anchor", "top-p") else FEW[::2]:
        alone, _ = run_grid(model, tokenizer, prompts, options, batch_size=4, points=[point])
        assert_same({key: samples for key, samples in found.items() if key[0] == point}, alone)
    other, _ = run_grid(model, tokenizer, prompts[::-1][1:], options, points=FEW[::-1])
    assert_same({key: found[key] for key in other}, other)
    two, _ = run_grid(
        model, tokenizer, prompts, sampling(name, max_new_tokens=7, num_return_sequences=2), batch_size=3, points=FEW
    )
    assert_same({key: found[key][:2] for key in two}, two)
    assert found[POINTS[3], 0] != found[POINTS[3], 4]  # the same prompt, another number
    again, _ = run_grid(model, tokenizer, prompts, sampling(name, max_new_tokens=7, seed=8), points=FEW)
    assert all(again[key][0] != two[key][0] for key in [(FEW[0], 0), (FEW[-1], 1)])


@pytest.mark.parametrize("draft", ["source_pt", "target_pt", "ngram"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drafted_grid_is_the_plain_one(tokenizer: PreTrainedTokenizerFast, draft: str, temperature: float) -> None:
    model, prompts = make_trio((72, 64, 70), outside="neutral"), prompts_of(6)
    options = DecodingOptions(max_new_tokens=14, temperature=temperature, seed=5 if temperature else None, draft="none")
    expected, _ = run_grid(model, tokenizer, prompts, options, batch_size=4)
    for num in (2, 5):
        decoder = Decoder(draft, points=POINTS, num_positions=num, is_fixed=True, seed=5)
        found, stats = run_grid(model, tokenizer, prompts, options, batch_size=4, decoder=decoder)
        assert_same(found, expected)
        assert stats.draft == draft
        assert stats.num_drafted > stats.num_accepted >= 0
        assert stats.num_rounds > 0


def test_alpha_0_is_the_anchor(base_change: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts, options = prompts_of(6), DecodingOptions(max_new_tokens=12)
    points = [GridPoint("base-change", 0.0), GridPoint("eft", 0.0)]
    found, _ = run_grid(base_change, tokenizer, prompts, options, points=points)
    for point, role in zip(points, ("source_ft", "target_pt"), strict=True):
        for prompt in prompts:
            alone = base_change.members[role].generate(torch.tensor([prompt.ids]), max_new_tokens=12, do_sample=False)
            assert found[point, prompt.number][0].ids == alone[0, len(prompt.ids) :].tolist()


def test_members_on_one_backbone(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    base = save_base(tmp_path / "base")
    pair = make_pair(base, save_adapter(base, tmp_path / "adapter"), make_model("gpt2", 3))
    assert ("source_ft", "source_pt") in roles_of_forwards(pair.shared)
    prompts, options = prompts_of(7), DecodingOptions(max_new_tokens=12)
    found, _ = run_grid(pair.shared, tokenizer, prompts, options, batch_size=4, points=FEW)
    assert_same(found, run_alone(pair.copies, tokenizer, prompts, options, FEW, batch_size=4))
    options = sampling("top-p", max_new_tokens=10, num_return_sequences=2)
    drawn, _ = run_grid(pair.shared, tokenizer, prompts, options, batch_size=4, points=FEW)
    copied, _ = run_grid(pair.copies, tokenizer, prompts, options, batch_size=4, points=FEW)
    assert_same(drawn, copied)


def test_several_processes(trio: dict[str, Any], base_change: EnsembleForCausalLM) -> None:
    ids = random_ids(3, 5)
    options = {"do_sample": True, "max_new_tokens": 8, "num_return_sequences": 2, "pad_token_id": 3}

    def decode(model: EnsembleForCausalLM) -> list[list[list[int]]]:
        return model.generate(ids, custom_generate=Decoder(points=POINTS, seed=5), **options).sequences.tolist()

    def task(world: World) -> list[list[list[int]]]:
        return decode(spread(world, trio, base_change))

    assert run_ranks(3, task) == [decode(base_change)] * 3


# -- what runs --------------------------------------------------------------------------------------------------------


def test_prompts_are_run_once_and_only_the_last_position_is_read(
    base_change: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts, options = prompts_of(5), sampling("plain", max_new_tokens=9, num_return_sequences=4, draft="none")
    with spied(base_change) as steps:
        found, stats = run_grid(base_change, tokenizer, prompts, options, batch_size=5)
    longest = max(len(prompt.ids) for prompt in prompts)
    shapes = [tuple(step.input_ids.shape) for step in steps]
    assert shapes == [(5, longest), *((distinct_texts(found, step), 1) for step in range(1, len(steps)))]
    assert len(steps) == max(sample.num_tokens for samples in found.values() for sample in samples)
    assert steps[0].logits_to_keep == 1
    assert stats.num_rows == sum(rows for rows, _ in shapes[1:])
    assert stats.to_row()["rows_per_step"] == pytest.approx(stats.num_rows / (len(steps) - 1), abs=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_returns_padded_sequences(base_change: EnsembleForCausalLM, use_cache: bool) -> None:
    """Through `generate` itself: left padding, a processor and a criterion of the caller's."""
    ids, mask = random_ids(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    options = {"attention_mask": mask, "max_new_tokens": 9, "no_repeat_ngram_size": 2, "do_sample": False}
    output = base_change.generate(ids, custom_generate=Decoder(points=POINTS[:16]), use_cache=use_cache, **options)
    for alpha, sequences, lengths in zip(ALPHAS, output.sequences, output.lengths.tolist(), strict=True):
        base_change.alpha = alpha
        with by_transformers(base_change):
            alone = base_change.generate(ids, use_cache=use_cache, **options)
        base_change.alpha = 0.7
        assert sequences[:, : alone.shape[1]].tolist() == alone.tolist()
        assert (sequences[:, alone.shape[1] :] == 3).all()
        for row, length in zip(sequences.tolist(), lengths, strict=True):
            assert row[length:] == [3] * (len(row) - length)
            assert length == 15 or row[length - 1] == 2


@pytest.mark.parametrize(
    "asked",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefix_allowed_tokens_fn": lambda row, ids: range(10 * row, 64)},
        {"past_key_values": "growing"},
        {"guidance_scale": 1.5},
    ],
    ids=lambda asked: next(iter(asked)),
)
@pytest.mark.parametrize("do_sample", [False, True])
def test_what_the_loop_does_not_do_is_decoded_point_by_point(
    fresh: EnsembleForCausalLM, asked: dict[str, Any], do_sample: bool
) -> None:
    ids, options = random_ids(2, 6), {"max_new_tokens": 7, "do_sample": do_sample}

    def decode(alpha: float, **decoder: Any) -> Any:
        fresh.alpha = alpha
        more = {**asked, "past_key_values": fresh.new_cache()} if "past_key_values" in asked else asked
        found = Decoder(seed=4, **decoder)
        output = fresh.generate(ids, custom_generate=found, **options, **more)
        assert sum(found.stats.by_transformers.values()) == 1
        return output

    points = [GridPoint("base-change", alpha) for alpha in (0.0, 0.5, 1.2)]
    output = decode(0.7, points=points)
    assert fresh.alpha == 0.7
    for point, sequences, lengths in zip(points, output.sequences, output.lengths.tolist(), strict=True):
        alone = decode(point.alpha)
        assert sequences[:, : alone.shape[1]].tolist() == alone.tolist()
        assert max(lengths) == alone.shape[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams is 2; a grid and a draft work with greedy decoding and with sampling"),
        ({"return_dict_in_generate": True}, "a grid returns a GridOutput"),
        ({"custom_generate": Decoder(points=[])}, "the grid is empty"),
        ({"custom_generate": Decoder(points=[POINTS[1], POINTS[1]])}, "base-change at alpha 0.1 is in the grid twice"),
        ({"custom_generate": Decoder(points=[GridPoint("basechange", 1.0)])}, "unknown rule 'basechange'"),
        ({"custom_generate": Decoder(points=[GridPoint("eft", -1.0)])}, "alpha is -1"),
        (
            {"custom_generate": Decoder(points=[GridPoint("realign", 1.0)])},
            "combines aligned, reference; the members are",
        ),
        ({"custom_generate": Decoder(points=POINTS, numbers=[1]), "do_sample": True}, "1 numbers were given for 2"),
    ],
)
def test_what_a_grid_cannot_do(base_change: EnsembleForCausalLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EnsemblerError, match=message):
        base_change.generate(
            random_ids(2, 4), **{"custom_generate": Decoder(points=POINTS), **options}, max_new_tokens=3
        )


def test_a_grid_is_made_of_lists(base_change: EnsembleForCausalLM) -> None:
    rules: Any = "base-change"
    alphas: Any = 0.5
    for given in ((rules, [0.5]), (["base-change"], alphas)):
        with pytest.raises(ConfigError, match=r"give lists: \['base-change'\] and \[0.5\]"):
            make_grid(*given)
    with pytest.raises(ConfigError, match=r"points holds 0; expected points as make_grid"):
        Decoder(points=[*POINTS, 0])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="a Decoder was given to a LlamaForCausalLM"):
        make_model("llama", 1).generate(random_ids(1, 4), custom_generate=Decoder("none"))


# -- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "top-p"])
def test_stop_texts_end_rows(
    base_change: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str | None
) -> None:
    prompts = prompts_of(6)
    settings: dict[str, Any] = {"max_new_tokens": 12, "stop": ("e", "7", "a b"), "draft": "none"}
    options = DecodingOptions(**settings) if name is None else sampling(name, **settings)
    with spied(base_change) as steps:
        found, _ = run_grid(base_change, tokenizer, prompts, options, batch_size=6)
    some = {key: samples for key, samples in found.items() if key[0] in FEW}
    assert_same(some, run_alone(base_change, tokenizer, prompts, options, FEW, batch_size=6))
    reasons = [sample.finish_reason for samples in found.values() for sample in samples]
    assert {"stop", "length"} == set(reasons)
    assert [step.input_ids.shape[0] for step in steps] == [distinct_texts(found, step) for step in range(len(steps))]
    for point in FEW:
        alone, _ = run_grid(base_change, tokenizer, prompts, options, batch_size=6, points=[point])
        assert_same({key: samples for key, samples in found.items() if key[0] == point}, alone)


def test_finished_prompts_are_left_out_and_change_nothing(
    base_change: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts, options = prompts_of(6), sampling("plain", max_new_tokens=8)
    whole, _ = run_grid(base_change, tokenizer, prompts, options, batch_size=2)
    rest, _ = run_grid(base_change, tokenizer, prompts, options, batch_size=2, done=frozenset({0, 1, 2, 5}))
    assert {number for _, number in rest} == {3, 4}
    assert_same(rest, {key: whole[key] for key in rest})
    with spied(base_change) as steps:
        assert run_grid(base_change, tokenizer, prompts, options, done=frozenset(range(6)))[0] == {}
    assert not steps


def test_a_prompt_near_the_end_of_the_context(
    base_change: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert base_change.shortest_context is not None
    prompts = [EncodedPrompt(0, [5] * (base_change.shortest_context[1] - 4)), EncodedPrompt(1, [9, 8])]
    found, _ = run_grid(base_change, tokenizer, prompts, DecodingOptions(max_new_tokens=9), batch_size=2)
    assert max(samples[0].num_tokens for (_, number), samples in found.items() if number == 0) <= 4
    assert_same(found, run_alone(base_change, tokenizer, prompts, DecodingOptions(max_new_tokens=9), batch_size=2))
