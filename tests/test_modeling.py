"""The ensemble as a transformers model: every decoding mode against an uncached reference."""

from __future__ import annotations

from contextlib import nullcontext
from threading import Thread
from typing import Any

import pytest
import torch
from helpers.noise_cases import shared_noise
from helpers.tiny import WeightedSum, make_model, member_logits, random_ids, tables
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    TextStreamer,
)

from ensembler import EnsembleForCausalLM
from ensembler.engine.row_cache import RowCache
from ensembler.errors import ConfigError, EnsemblerError

ALPHA = 0.7
NUM_NEW = 10


@pytest.fixture(scope="module")
def reference(trio: dict[str, PreTrainedModel]) -> WeightedSum:
    """The same ensemble by hand: float64, no cache, none of the package's code."""
    return WeightedSum([trio["source_ft"], trio["source_pt"], trio["target_pt"]], [1.0, -ALPHA, ALPHA])


def prompt(rows: int = 1, positions: int = 5, pads: int = 0) -> dict[str, Tensor]:
    ids = random_ids(rows, positions, seed=positions)
    mask = torch.ones_like(ids)
    if pads:
        ids[0, :pads], mask[0, :pads] = 3, 0
    return {"input_ids": ids, "attention_mask": mask}


def test_greedy_equals_a_plain_loop(base_change: EnsembleForCausalLM, trio: dict[str, PreTrainedModel]) -> None:
    """Twelve tokens, past the sliding window of source_pt, by argmax over full uncached forwards."""
    ids = prompt()["input_ids"]
    expected = ids
    for _ in range(12):
        z = {role: member_logits(member, expected)[:, -1] for role, member in trio.items()}
        scores = z["source_ft"] + ALPHA * (z["target_pt"] - z["source_pt"])
        expected = torch.cat([expected, scores.argmax(-1, keepdim=True)], -1)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "eos_token_id": 9999}
    assert base_change.generate(ids, **options).tolist() == expected.tolist()


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"do_sample": True, "temperature": 0.7},
    "top-k": {"do_sample": True, "top_k": 5},
    "top-p": {"do_sample": True, "top_p": 0.8, "top_k": 0},
    "min-p": {"do_sample": True, "min_p": 0.1, "temperature": 1.5},
    "repetition": {"repetition_penalty": 1.4},
    "no-repeat": {"no_repeat_ngram_size": 2},
    "bad-words": {"bad_words_ids": [[7], [8, 9]]},
    "min-new": {"min_new_tokens": 6},
    "beams": {"num_beams": 4},
    "beams-penalty": {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True, "repetition_penalty": 1.2},
    "beam-sample": {"num_beams": 3, "do_sample": True},
    "beams-returned": {"num_beams": 4, "num_return_sequences": 3},
    "returned": {"do_sample": True, "num_return_sequences": 3},
    "guidance": {"guidance_scale": 1.5},
    "allowed": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(4, 20))},
}


@pytest.mark.parametrize("pads", [0, 2])
@pytest.mark.parametrize("mode", MODES)
def test_modes_equal_the_uncached_reference(
    base_change: EnsembleForCausalLM, reference: WeightedSum, mode: str, pads: int
) -> None:
    options = {**prompt(2, pads=pads), "max_new_tokens": NUM_NEW, **MODES[mode]}
    is_by_row = options.get("do_sample") and not options.get("num_beams")
    with shared_noise(11, options.get("num_return_sequences", 1)) if is_by_row else nullcontext():
        torch.manual_seed(11)
        expected = reference.generate(**options, use_cache=False).tolist()
    for cached in (True, False):
        torch.manual_seed(11)
        assert base_change.generate(**options, use_cache=cached).tolist() == expected


@pytest.mark.parametrize("families", [("bloom", "opt"), ("gemma2", "gpt_neox"), ("qwen2", "gemma"), ("opt", "mistral")])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_other_families(families: tuple[str, str], num_beams: int) -> None:
    """Positions by rotation, table, offset and slope (ALiBi), with and without windows; padded, past the windows."""
    first, second = make_model(families[0], 21), make_model(families[1], 22, hidden_size=24)
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members={"reference": first, "aligned": second})
    options = {**prompt(2, pads=2), "max_new_tokens": NUM_NEW, "num_beams": num_beams, "eos_token_id": None}
    expected = WeightedSum([first, second], [0.5, 0.5]).generate(**options, use_cache=False, pad_token_id=3).tolist()
    for use_cache in (True, False):
        assert model.generate(**options, use_cache=use_cache, pad_token_id=3).tolist() == expected


def test_beam_search_equals_brute_force() -> None:
    """Six tokens, three steps, beams for every prefix: the best of all 216 continuations."""
    members = dict(zip(("source_ft", "target_pt", "source_pt"), tables(3, vocab_size=6), strict=True))
    model = EnsembleForCausalLM.from_members(rule="base-change", alpha=0.4, members=members)
    table = sum(w * members[role].table.detach().double() for role, w in model.rule.weights(0.4).items())
    scores = table.log_softmax(-1)
    start = 4
    best = max(
        ((a, b, c) for a in range(6) for b in range(6) for c in range(6)),
        key=lambda t: float(scores[start, t[0]] + scores[t[0], t[1]] + scores[t[1], t[2]]),
    )
    output = model.generate(
        torch.tensor([[start]]),
        attention_mask=torch.ones(1, 1, dtype=torch.long),
        num_beams=36,
        max_new_tokens=3,
        eos_token_id=None,
        pad_token_id=3,
    )
    assert output[0, 1:].tolist() == list(best)


def test_scores_and_logits_are_returned(base_change: EnsembleForCausalLM, reference: WeightedSum) -> None:
    options = {**prompt(2, pads=2), "max_new_tokens": 5, "top_k": 4, "do_sample": True, "eos_token_id": None}
    options.update(return_dict_in_generate=True, output_scores=True, output_logits=True)
    torch.manual_seed(0)
    ours = base_change.generate(**options)
    with shared_noise(0):
        theirs = reference.generate(**options, use_cache=False)
    assert isinstance(ours.past_key_values, RowCache)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for name in ("scores", "logits"):
        actual, expected = (torch.stack(getattr(output, name)).float() for output in (ours, theirs))
        assert_close(actual, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_padded_batch_equals_one_by_one(base_change: EnsembleForCausalLM, num_beams: int) -> None:
    options = {"max_new_tokens": NUM_NEW, "num_beams": num_beams, "eos_token_id": None, "pad_token_id": 3}
    singles = [prompt(1, length) for length in (3, 7, 5)]
    alone = [base_change.generate(**single, **options)[0, -NUM_NEW:].tolist() for single in singles]
    ids = torch.full((3, 7), 3)
    for row, single in enumerate(singles):
        ids[row, 7 - single["input_ids"].shape[1] :] = single["input_ids"][0]
    batch = base_change.generate(input_ids=ids, attention_mask=(ids != 3).long(), **options)
    assert batch[:, -NUM_NEW:].tolist() == alone


@pytest.mark.parametrize("extra", [{"prompt_lookup_num_tokens": 3}, {"assistant": "source_pt"}, {"assistant": "other"}])
def test_speculation_gives_greedy_text(base_change: EnsembleForCausalLM, extra: dict[str, Any]) -> None:
    """Drafts are verified by the ensemble: over the sliding window, and with a cache that is cropped."""
    ids = random_ids(1, 4, seed=2).repeat(1, 3)
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "eos_token_id": None}
    name = extra.get("assistant")
    if name is not None:
        extra = {"assistant_model": make_model(seed=9) if name == "other" else base_change.members[name]}
    assert base_change.generate(**options, **extra).tolist() == base_change.generate(**options).tolist()


def test_the_ensemble_drafts_for_another_model(base_change: EnsembleForCausalLM) -> None:
    target = make_model("llama", 12)
    options = {**prompt(), "max_new_tokens": NUM_NEW}
    assert target.generate(**options, assistant_model=base_change).tolist() == target.generate(**options).tolist()


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_cache_implementations(base_change: EnsembleForCausalLM, implementation: str, num_beams: int) -> None:
    options = {**prompt(2, pads=2), "max_new_tokens": NUM_NEW, "num_beams": num_beams}
    expected = base_change.generate(**options, use_cache=False).tolist()
    for _ in range(2):  # a static cache is kept by the member and used again
        assert base_change.generate(**options, cache_implementation=implementation).tolist() == expected


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_one_model_in_two_roles(trio: dict[str, PreTrainedModel], implementation: str) -> None:
    """One object, two roles: its caches must not be one cache."""
    shared = make_model("llama", 5)
    members = {"source_ft": trio["source_ft"], "source_pt": shared, "target_pt": shared}
    model = EnsembleForCausalLM.from_members(rule="eft", alpha=0.5, members=members)
    options = {**prompt(), "max_new_tokens": NUM_NEW, "eos_token_id": None}
    expected = model.generate(**options, use_cache=False).tolist()
    assert model.generate(**options, cache_implementation=implementation).tolist() == expected


def test_a_quantised_cache_that_is_not_installed_is_an_error(base_change: EnsembleForCausalLM) -> None:
    with pytest.raises((ImportError, ValueError), match=r"(?i)quanto"):
        base_change.generate(**prompt(), max_new_tokens=2, cache_implementation="quantized")


@pytest.mark.parametrize("num_beams", [1, 3])
def test_stop_strings(base_change: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast, num_beams: int) -> None:
    options = {**prompt(), "max_new_tokens": 20, "eos_token_id": None, "num_beams": num_beams}
    full = tokenizer.decode(base_change.generate(**options)[0, 5:])
    stop = full[4:6]
    output = base_change.generate(**options, stop_strings=[stop], tokenizer=tokenizer)
    text = tokenizer.decode(output[0, 5:])
    assert text.endswith(stop)
    assert text.index(stop) + len(stop) == len(text)
    if num_beams == 1:
        assert full.startswith(text)


def test_streamers_print_the_decoded_text(
    base_change: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**prompt(), "max_new_tokens": NUM_NEW, "eos_token_id": None}
    expected = tokenizer.decode(base_change.generate(**options)[0, 5:])
    base_change.generate(**options, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.rstrip("\n") == expected
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=base_change.generate, kwargs={**options, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def test_generation_config_object_and_no_inputs(base_change: EnsembleForCausalLM, reference: WeightedSum) -> None:
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    inputs = prompt()
    expected = reference.generate(**inputs, generation_config=settings, use_cache=False).tolist()
    assert base_change.generate(**inputs, generation_config=settings).tolist() == expected
    expected = reference.generate(generation_config=settings, use_cache=False).tolist()
    assert base_change.generate(generation_config=settings).tolist() == expected


def test_prefill_in_chunks(base_change: EnsembleForCausalLM) -> None:
    options = {**prompt(1, 11), "max_new_tokens": NUM_NEW, "eos_token_id": None}
    expected = base_change.generate(**options).tolist()
    assert base_change.generate(**options, prefill_chunk_size=4).tolist() == expected


@pytest.mark.parametrize("mode", ["greedy", "beams", "beams-returned", "returned"])
def test_contrastive_rule_in_decoding_modes(mode: str) -> None:
    """Its cut-off gives −inf logits: beams, samples and the cache must live with them."""
    members = {"expert": make_model("llama", 1, hidden_size=24), "amateur": make_model("gpt2", 2)}
    model = EnsembleForCausalLM.from_members(rule="contrastive", alpha=0.5, members=members, cutoff=0.2)
    options = {**prompt(2, pads=1), "max_new_tokens": 8, "eos_token_id": None, **MODES[mode]}
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        outputs.append(model.generate(**options, use_cache=use_cache))
    assert outputs[0].tolist() == outputs[1].tolist()
    sequence = outputs[0][:1]
    mask = torch.ones_like(sequence)
    mask[:, :1] = 0
    scores = member_logits(members["expert"], sequence, mask).softmax(-1)
    for position in range(4, sequence.shape[1] - 1):
        chosen = scores[0, position, sequence[0, position + 1]]
        assert chosen >= 0.2 * scores[0, position].max() * (1 - 1e-4)


@pytest.mark.parametrize("mode", ["greedy", "beams", "beams-returned", "returned"])
def test_alpha_per_row(fresh: EnsembleForCausalLM, mode: str) -> None:
    """A row with its own α is decoded as if it were alone, with its beams and returned sequences."""
    values = [0.0, 0.6, 2.0]
    options = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 3, **MODES[mode]}
    num = options.get("num_return_sequences", 1)
    if options.get("do_sample"):
        options["top_k"] = 1  # the same draw in every batch
    inputs = prompt(3, pads=2)
    expected = []
    for row, value in enumerate(values):
        fresh.alpha = value
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        expected += fresh.generate(**one, **options).tolist()
    fresh.alpha = torch.tensor(values)
    assert len(expected) == 3 * num
    assert fresh.generate(**inputs, **options).tolist() == expected


def test_pipeline(base_change: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    from transformers import pipeline

    generator = pipeline("text-generation", model=base_change, tokenizer=tokenizer)
    texts = ["hello w", "abc"]
    outputs = generator(texts, max_new_tokens=6, do_sample=False, return_full_text=False, batch_size=2)
    for text, output in zip(texts, outputs, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        expected = base_change.generate(**inputs, max_new_tokens=6)[0, inputs.input_ids.shape[1] :]
        assert output[0]["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_the_rule_cannot_be_assigned(base_change: EnsembleForCausalLM) -> None:
    before = base_change.rule
    with pytest.raises(ConfigError, match=r"stays 'base-change'; load its folder with from_pretrained\(folder, rule"):
        base_change.rule = "eft"
    assert base_change.rule is before


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_generate_refuses_what_it_cannot_give(base_change: EnsembleForCausalLM, name: str) -> None:
    with pytest.raises(EnsemblerError, match=name):
        base_change.generate(**prompt(), max_new_tokens=2, return_dict_in_generate=True, **{name: True})
