"""Steps that are replayed as graphs give the texts of steps that are launched; here on a CPU, with fake graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_cases import save_adapter, save_base
from helpers.graph_cases import ROLES, greedy, make_trio, recorder_of, with_graphs
from helpers.tiny import make_model, make_tokenizer, random_ids

from ensembler import EnsembleForCausalLM, MemberConfig
from ensembler.decoding.decoder import Decoder
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.texts import complete_grid, complete_prompts
from ensembler.engine import cuda_graphs, model_runner
from ensembler.engine.grid import make_grid

CPU = torch.device("cpu")
POINTS = make_grid(["base-change", "eft"], [0.0, 0.4, 1.0])
LENGTHS = (9, 3, 14, 1, 6)
PROMPTS = [EncodedPrompt(i, random_ids(1, length, seed=length)[0].tolist()) for i, length in enumerate(LENGTHS)]
SAMPLING = {"temperature": 1.0, "seed": 3}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"draft": "none"},
    "sampled": {"draft": "none", "num_return_sequences": 3, **SAMPLING},
    "processed": {"draft": "none", "repetition_penalty": 1.3, "top_p": 0.9, "temperature": 0.8, "seed": 5},
    "chunks": {"draft": "none", "prefill_chunk": 4},
    "drafted": {"draft": "source_pt"},
    "drafted and sampled": {"draft": "source_pt", "num_return_sequences": 2, **SAMPLING},
    "repeated": {"draft": "ngram"},
}


def on_a_backbone(tmp_path: Path) -> EnsembleForCausalLM:
    base = save_base(tmp_path / "base", num_layers=1)
    members = {"source_ft": MemberConfig(str(base), adapter=str(save_adapter(base, tmp_path / "adapter")))}
    members |= {"source_pt": MemberConfig(str(base))}
    return EnsembleForCausalLM.from_members(alpha=0.7, members={**members, "target_pt": make_model("qwen2", 3)})


ENSEMBLES: dict[str, Callable[[Path], EnsembleForCausalLM]] = {"trio": lambda _: make_trio(), "backbone": on_a_backbone}


def texts(model: EnsembleForCausalLM, options: dict[str, Any], **more: Any) -> Any:
    """The tokens of all prompts, three together; at all points of a grid as well."""
    chosen = DecodingOptions(max_new_tokens=12, **options)
    is_fixed = {"is_fixed": True, "num_positions": 4, "seed": chosen.seed}
    tokenizer = make_tokenizer()
    plain = {
        one.number: [sample.ids for sample in one.samples]
        for one in complete_prompts(
            model, tokenizer, PROMPTS, chosen, batch_size=3, decoder=Decoder(chosen.draft, **is_fixed), **more
        )
    }
    grid = {
        (one.number, point): [sample.ids for sample in samples]
        for one in complete_grid(
            model, tokenizer, PROMPTS, POINTS, chosen, batch_size=2,
            decoder=Decoder(chosen.draft, points=POINTS, **is_fixed),
        )
        for point, samples in one.samples.items()
    }  # fmt: skip
    return plain, grid


# -- the same texts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_texts_are_those_of_steps_that_are_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ensemble: str, mode: str
) -> None:
    """Ragged prompts that take each other's places, at one point and at all."""
    model = ENSEMBLES[ensemble](tmp_path)
    assert model.member_set.graphs is None or not model.member_set.is_static
    expected = texts(model, MODES[mode])
    with_graphs(model.member_set, monkeypatch)
    assert texts(model, MODES[mode]) == expected
    assert texts(model, MODES[mode]) == expected  # on graphs that are there already
    recorder = recorder_of(model.member_set)
    assert recorder.num_replayed > 2 * model.member_set.graphs.num_recorded > 0


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "num_return_sequences": 5, "top_k": 9}], ids=str)
def test_generate_on_a_padded_batch(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """Logits and scores are the text's own, though each replay fills the outputs anew."""
    model = make_trio()
    ids = random_ids(3, 12, seed=4)
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, :2] = 0, 0
    options = {"do_sample": False, **options, "output_logits": True, "return_dict_in_generate": True}

    def run() -> Any:
        torch.manual_seed(5)
        return model.generate(ids, attention_mask=mask, max_new_tokens=9, pad_token_id=3, **options)

    expected = run()
    with_graphs(model.member_set, monkeypatch)
    found = run()
    assert found.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-4)


def test_a_grid_by_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_trio()

    def run() -> Any:
        decoder = Decoder("none", points=POINTS)
        return model.generate(random_ids(2, 5), max_new_tokens=8, pad_token_id=3, custom_generate=decoder)

    expected = run()
    with_graphs(model.member_set, monkeypatch)
    found = run()
    assert torch.equal(found.sequences, expected.sequences)
    assert found.rows_per_step == expected.rows_per_step


def test_a_member_that_is_not_captured_runs_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_trio()
    expected = texts(model, MODES["greedy"])
    members = with_graphs(model.member_set, monkeypatch)
    for module in (cuda_graphs, model_runner):
        monkeypatch.setattr(
            module, "why_not_captured", lambda one: "it is odd" if one.config.model_type == "gpt2" else None
        )
    assert texts(model, MODES["greedy"]) == expected
    assert recorder_of(members).num_replayed > 0
    assert members.why_eager() == {"target_pt": "it is odd"}


# -- how many graphs --------------------------------------------------------------------------------------------------


def test_lengths_of_a_bucket_share_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_trio()
    members = with_graphs(model.member_set, monkeypatch)
    counts = []
    for length in (5, 9, 20, 57, 5, 100):
        greedy(model, length)
        counts.append(members.graphs.num_recorded)
    assert counts == [1] * 6
    for rows in (3, 4, 2, 3):
        greedy(model, 9, rows)
        counts.append(members.graphs.num_recorded)
    assert counts[6:] == [2, 2, 3, 3]  # rows of three and four, then of two


def test_a_text_that_leaves_a_bucket_needs_one_graph_more(monkeypatch: pytest.MonkeyPatch) -> None:
    members = {
        role: make_model("llama", seed, num_layers=1, max_position_embeddings=600) for seed, role in enumerate(ROLES)
    }
    model = EnsembleForCausalLM.from_members(alpha=0.7, members=members)
    expected = greedy(model, 250, max_new_tokens=12)
    graphs = with_graphs(model.member_set, monkeypatch).graphs
    assert greedy(model, 250, max_new_tokens=12) == expected
    assert graphs.num_recorded == 2
    assert greedy(model, 250, max_new_tokens=12) == expected
    assert graphs.num_recorded == 2


def test_a_drafted_text_has_few_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft alone, all members, and those that verify: of up to 2, 4 and 8 positions."""
    model = make_trio()
    graphs = with_graphs(model.member_set, monkeypatch).graphs
    for num in range(2, 9):
        decoder = Decoder("source_pt", num_positions=num, is_fixed=True)
        greedy(model, 9, max_new_tokens=40, custom_generate=decoder)
        assert decoder.stats.num_rounds > 0
    assert graphs.num_recorded <= 5


# -- graphs that go ---------------------------------------------------------------------------------------------------


def test_few_graphs_are_enough_for_right_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_trio()
    expected = texts(model, MODES["drafted"])
    with_graphs(model.member_set, monkeypatch, most=1)
    assert texts(model, MODES["drafted"]) == expected


def test_a_replaced_member_has_graphs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_trio()
    graphs = with_graphs(model.member_set, monkeypatch).graphs
    greedy(model, 9)
    model.members["source_ft"] = make_model("qwen2", 77)
    found = greedy(model, 9)
    assert graphs.num_recorded == 2
    other = EnsembleForCausalLM.from_members(alpha=0.7, members=dict(model.members.items()))
    assert found == greedy(other, 9)


def test_a_cache_that_grows_has_new_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples part into rows that were not there; a cache that is gone on with gets more room."""
    model = make_trio()
    ids = random_ids(1, 5)
    sampling = {"do_sample": True, "num_return_sequences": 9, "max_new_tokens": 8, "eos_token_id": None}

    def run() -> list[Any]:
        torch.manual_seed(1)
        many = model.generate(ids, pad_token_id=3, **sampling)
        first = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
        cache, version = first.past_key_values, first.past_key_values.version
        cache.reserve(2, cache.room + 1)
        again = model.generate(first.sequences, past_key_values=cache, max_new_tokens=9, do_sample=False)
        assert cache.version != version
        return [many.tolist(), first.sequences.tolist(), again.tolist()]

    expected = run()
    with_graphs(model.member_set, monkeypatch)
    assert run() == expected


def test_one_cache_serves_one_call_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """But one that somebody holds is theirs."""
    model = make_trio()
    expected = greedy(model, 9), greedy(model, 7)
    members = with_graphs(model.member_set, monkeypatch)
    first = members.row_cache(2, 30)
    assert members.row_cache(1, 40) is not first  # it was not given back
    members.keep(first)
    assert members.row_cache(1, 40) is first
    output = model.generate(
        random_ids(1, 9, seed=9), max_new_tokens=3, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    assert greedy(model, 7) == expected[1]
    more = model.generate(
        output.sequences, past_key_values=output.past_key_values, max_new_tokens=3, do_sample=False, eos_token_id=None
    )
    assert more.tolist() == expected[0]


def test_inference_mode_in_one_call_and_not_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_trio()
    expected = greedy(model, 9), greedy(model, 5, 3)
    with_graphs(model.member_set, monkeypatch)
    with torch.inference_mode():
        assert (greedy(model, 9), greedy(model, 5, 3)) == expected
    assert (greedy(model, 9), greedy(model, 5, 3)) == expected
