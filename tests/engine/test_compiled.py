"""Compiled members decode what eager ones do, and calls of other lengths compile nothing new."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_cases import save_adapter, save_base
from helpers.commands import Run
from helpers.tiny import make_model, make_tokenizer, random_ids
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config

from ensembler import EnsembleForCausalLM, MemberConfig
from ensembler.decoding.decoder import Decoder
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.texts import complete_prompts
from ensembler.engine.cuda_graphs import check_compiler
from ensembler.engine.grid import make_grid
from ensembler.engine.row_cache import SMALLEST
from ensembler.errors import ConfigError, RunError

ROLES = ("source_ft", "source_pt", "target_pt")
OPTIONS: dict[str, Any] = {"max_new_tokens": 7, "eos_token_id": None, "pad_token_id": 3}


def families(*names: str, **settings: Any) -> EnsembleForCausalLM:
    settings = {"num_layers": 1, **settings}
    members = {role: make_model(name, i, **settings) for i, (role, name) in enumerate(zip(ROLES, names, strict=True))}
    return EnsembleForCausalLM.from_members(alpha=0.7, members=members)


def on_a_backbone(tmp_path: Path, **settings: Any) -> EnsembleForCausalLM:
    base = save_base(tmp_path / "base", num_layers=1)
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    members = {"source_ft": MemberConfig(str(base), adapter=str(adapter)), "source_pt": str(base)}
    return EnsembleForCausalLM.from_members(
        alpha=0.7, members={**members, "target_pt": make_model("mistral", 3, num_layers=1)}
    )


def padded_widths(_: Path) -> EnsembleForCausalLM:
    """Members of one family, which run the same code."""
    members = {role: make_model("llama", i, vocab_size=64 + 4 * i, num_layers=1) for i, role in enumerate(ROLES)}
    return EnsembleForCausalLM.from_members(alpha=0.7, members=members)


ENSEMBLES: dict[str, tuple[Callable[[Path], EnsembleForCausalLM], int]] = {  # and how many graphs a step has
    "windows": (lambda _: families("mistral", "gemma2", "qwen2", num_layers=2), 3),
    "positions": (lambda _: families("gpt2", "opt", "gpt_neox"), 3),
    "one family": (padded_widths, 3),
    "shared": (on_a_backbone, 2),  # one graph for both members on a backbone
    "dora": (lambda path: on_a_backbone(path, use_dora=True), 1),  # only the target's
}


def greedy(model: EnsembleForCausalLM, length: int, **options: Any) -> list[list[int]]:
    ids = random_ids(1, length, seed=length)
    tokens: list[list[int]] = model.generate(ids, do_sample=False, **{**OPTIONS, **options}).tolist()
    return tokens


def padded_batch(model: EnsembleForCausalLM, **options: Any) -> list[list[int]]:
    ids = random_ids(3, 12, seed=4)
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, :2] = 0, 0
    tokens: list[list[int]] = model.generate(ids, attention_mask=mask, **{**OPTIONS, **options}).tolist()
    return tokens


def sampled(model: EnsembleForCausalLM, **options: Any) -> list[list[int]]:
    torch.manual_seed(5)
    return padded_batch(model, do_sample=True, **options)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_tokens_are_equal_and_lengths_of_a_bucket_share_graphs(tmp_path: Path, ensemble: str) -> None:
    make, num_graphs = ENSEMBLES[ensemble]
    model = make(tmp_path)
    lengths = (5, 9, 20, 57, 5)
    expected = [greedy(model, length) for length in lengths], padded_batch(model), sampled(model)
    counter = CompileCounterWithBackend("eager")
    model.compile_members(counter)
    found, counts = [], []
    for length in lengths:
        found.append(greedy(model, length))
        counts.append(counter.frame_count)
    assert counts == [num_graphs] * 5
    assert (found, padded_batch(model), sampled(model)) == expected
    assert counter.frame_count == 2 * num_graphs  # steps of one row, and of three, which run as four


def test_a_text_that_leaves_a_bucket_is_compiled_once_more() -> None:
    model = families("llama", "qwen2", "llama", max_position_embeddings=600)
    expected = greedy(model, SMALLEST - 4)
    counter = CompileCounterWithBackend("eager")
    model.compile_members(counter)
    assert greedy(model, SMALLEST - 4) == expected
    assert counter.frame_count == 2 * 3
    greedy(model, SMALLEST + 50)
    assert greedy(model, SMALLEST - 4) == expected
    assert counter.frame_count == 2 * 3


def test_inductor() -> None:
    """Steps are compiled to machine code, not only traced."""
    model = families("llama", "mistral", "llama")
    expected = [greedy(model, length) for length in (5, 30)], padded_batch(model)
    counter = CompileCounterWithBackend("inductor")
    model.compile_members(counter)
    assert ([greedy(model, length) for length in (5, 30)], padded_batch(model)) == expected
    assert counter.frame_count == 6


@pytest.mark.parametrize("share", [True, False])
def test_texts_with_headers_and_pieces(share: bool) -> None:
    """A header's cache is copied into the rows of each prompt; rows become fewer at the end."""
    model = families("mistral", "llama", "gpt2")
    header = random_ids(1, 40, seed=1)[0].tolist()
    rests = [random_ids(1, length, seed=length)[0].tolist() for length in (3, 9, 1, 4, 2)]
    prompts = [EncodedPrompt(i, header + rest) for i, rest in enumerate(rests)]

    def texts(**options: Any) -> dict[int, list[int]]:
        decoding = DecodingOptions(max_new_tokens=5, draft="none", **options)
        found = complete_prompts(model, make_tokenizer(), prompts, decoding, batch_size=2, share_prefixes=share)
        return {one.number: one.samples[0].ids for one in found}

    variants: tuple[dict[str, Any], ...] = ({}, {"prefill_chunk": 7}, {"temperature": 1.0, "seed": 3})
    expected = [texts(**options) for options in variants]
    counter = CompileCounterWithBackend("eager")
    model.compile_members(counter)
    assert [texts(**options) for options in variants] == expected
    assert counter.frame_count == 2 * 3  # two rows and one


def test_drafts_and_grids() -> None:
    """Compiled for each number of positions that are verified, as they count in powers of two; greedy and sampled."""
    model = families("llama", "qwen2", "gpt2")
    points = make_grid(["base-change", "eft"], [0.0, 0.5])
    decoders: list[Callable[[], Decoder]] = [
        lambda: Decoder("source_pt", num_positions=3, is_fixed=True, seed=1),
        lambda: Decoder("ngram", num_positions=4, is_fixed=True, seed=1),
        lambda: Decoder("none", points=points, seed=1),
    ]

    def run(sampling: dict[str, Any]) -> list[Any]:
        found = []
        for make in decoders:
            decoder = make()
            output = model.generate(random_ids(2, 9), **OPTIONS, **sampling, custom_generate=decoder)
            found.append((output if decoder.points is None else output.sequences).tolist())
        assert found[0] == found[1]
        return found

    ways: tuple[dict[str, Any], ...] = ({}, {"do_sample": True})
    expected = [run(sampling) for sampling in ways]
    counter = CompileCounterWithBackend("eager")
    model.compile_members(counter)
    for sampling, tokens in zip(ways, expected, strict=True):
        for _ in range(2):  # in the second call the cache has the rows that it has grown to in the first
            assert run(sampling) == tokens
        once = counter.frame_count
        assert run(sampling) == tokens
        assert counter.frame_count == once


def test_the_cache_is_kept_in_its_place(tmp_path: Path) -> None:
    model = on_a_backbone(tmp_path)
    model.compile_members("eager")
    greedy(model, 20)
    kept = model.member_set.row_cache(1, 40)
    places = [layer.keys.data_ptr() for part in kept.caches.values() for layer in part.layers]
    assert len(places) == 2
    assert kept.lengths == [0]
    model.member_set.keep(kept)
    greedy(model, 20)
    assert model.member_set.row_cache(1, 20) is kept
    assert [layer.keys.data_ptr() for part in kept.caches.values() for layer in part.layers] == places
    assert kept.room == SMALLEST


def test_what_is_not_a_step_stays_eager() -> None:
    """Beams, decoding without a cache, an assistant, and forwards by themselves."""
    model = families("llama", "qwen2", "gpt2")
    ids = random_ids(2, 9)
    expected = padded_batch(model, num_beams=3), padded_batch(model, use_cache=False), model(ids).logits
    counter = CompileCounterWithBackend("eager")
    model.compile_members(counter)
    assert (padded_batch(model, num_beams=3), padded_batch(model, use_cache=False)) == expected[:2]
    assert torch.equal(model(ids).logits, expected[2])
    assert counter.frame_count == 0
    assert greedy(model, 9, assistant_model=model.members["source_ft"]) == greedy(model, 9)
    assert counter.frame_count == 3  # the last, which is plain decoding


def test_inference_mode_in_one_call_and_not_in_the_next() -> None:
    model = families("llama", "qwen2", "gpt2")
    expected = greedy(model, 9)
    model.compile_members("eager")
    with torch.inference_mode():
        assert greedy(model, 9) == expected
    assert greedy(model, 9) == expected


def test_a_replaced_member_is_compiled_anew() -> None:
    model = families("llama", "qwen2", "gpt2")
    counter = CompileCounterWithBackend("eager")
    model.compile_members(counter)
    greedy(model, 9)
    model.members["source_ft"] = make_model("llama", 77)
    found = greedy(model, 9)
    other = EnsembleForCausalLM.from_members(alpha=0.7, members=dict(model.members.items()))
    assert found == greedy(other, 9)
    assert counter.frame_count == 2 * 3


def test_members_that_cannot_be_compiled_run_eagerly_and_are_said(tmp_path: Path, said: list[str]) -> None:
    """DoRA is switched on shared weights; BLOOM keeps no rows; a model may be compiled already."""
    model = on_a_backbone(tmp_path, use_dora=True)
    said.clear()
    model.compile_members("eager")
    reason = "runs without --compile: its adapter is switched on weights that it shares"
    assert said == [f"source_ft {reason}", f"source_pt {reason}"]
    said.clear()
    mixed = families("llama", "bloom", "llama")
    expected = greedy(mixed, 9)
    mixed.members["target_pt"] = torch.compile(mixed.members["target_pt"], backend="eager")
    mixed.compile_members("eager")
    assert greedy(mixed, 9) == expected
    assert sorted(said) == [
        "source_pt runs without --compile: BloomForCausalLM has not been tried on it",
        "target_pt runs without --compile: it is compiled already",
    ]


def test_a_graph_that_fails_names_its_member() -> None:
    model = families("llama", "qwen2", "gpt2")

    def broken(*_: Any) -> Any:
        raise RuntimeError("no code today")

    model.compile_members(broken)
    with pytest.raises(RunError, match=r"^source_ft failed: RuntimeError: no code today") as caught:
        greedy(model, 9)
    assert "\n" not in str(caught.value)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, run: Run, members: list[str]) -> None:
    check_compiler()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with config.patch({"cpp.cxx": ("/nowhere/c++",)}):  # whose attributes monkeypatch would not put back
        with pytest.raises(ConfigError, match=r"--compile needs a C\+\+ compiler and there is none here; install"):
            families("llama", "llama", "llama").compile_members()
        result = run("generate", *members, "--prompt", "a", "--compile")
    assert "install g++ or name one in CXX" in result.error
    assert result.code == 2


def test_beams_are_refused(run: Run, members: list[str]) -> None:
    result = run("generate", *members, "--prompt", "a", "--compile", "--num-beams", 2)
    assert "--compile is for greedy decoding and sampling" in result.error
    assert result.code == 2


def test_the_whole_ensemble_may_be_compiled() -> None:
    """As any model of `transformers`, by `torch.compile` around it."""
    members = {"source_ft": make_model("llama"), "source_pt": make_model("qwen2"), "target_pt": make_model("gpt2")}
    model, ids = EnsembleForCausalLM.from_members(members=members, alpha=0.5), random_ids(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager")(ids).logits, model(ids).logits)
