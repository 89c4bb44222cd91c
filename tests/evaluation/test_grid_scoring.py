"""A grid equals its points one by one: rules that share forwards, contexts that are read once, texts in windows."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import SaveMember
from helpers.lm_eval_tasks import CHOICE
from helpers.rank_cases import run_ranks, spread
from helpers.scoring_cases import CASES, random_requests, save_lora
from helpers.scripts import run_script
from helpers.tiny import make_model, make_tokenizer, member_logits, tables
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from ensembler import EnsembleForCausalLM
from ensembler.demo import demo_folder
from ensembler.engine.grid import GridPoint, make_grid
from ensembler.engine.model_runner import ModelRunner
from ensembler.errors import ConfigError, MissingExtraError
from ensembler.evaluation import request_batches as batches_module
from ensembler.evaluation.backends import TransformersBackend
from ensembler.evaluation.offline import LogitsFolder, OfflineScorer
from ensembler.evaluation.request_batches import Batch, can_share_contexts, make_batches
from ensembler.evaluation.requests import ScoringRequest, encode_request
from ensembler.evaluation.scoring import ScoredRequest
from ensembler.preflight import check_ensemble

GRID = make_grid(["base-change", "eft"], [k / 10 for k in range(16)])
REQUESTS = random_requests(9, seed=5)


def scored(model: EnsembleForCausalLM, batches: list[Batch], grid: list[GridPoint]) -> dict[int, ScoredRequest]:
    return {one.request.number: one for batch in TransformersBackend(model).score(batches, grid) for one in batch}


def assert_one_by_one(model: EnsembleForCausalLM, requests: list[ScoringRequest], batch_size: int = 4) -> None:
    """The grid in shared batches against every point, alone, on whole sequences, one request at a time."""
    together = scored(model, make_batches(requests, batch_size, share_contexts=True), GRID)
    for index, point in enumerate(GRID):
        alone = scored(model, make_batches(requests, 1), [point])
        for number, expected in alone.items():
            for found, one in zip(together[number].scores, expected.scores, strict=True):
                where = (point.rule, point.alpha, number)
                assert found.log_probs[index] == pytest.approx(one.log_probs[0], abs=1e-4), where
                assert found.token_log_probs[index] == pytest.approx(one.token_log_probs[0], abs=1e-4), where
                assert found.is_greedy[index] == one.is_greedy[0], where


# -- one by one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base-change", "padded", "extended", "lora"])
def test_a_grid_of_two_rules_is_its_points_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(batches_module, "_FORWARD", 0)
    assert_one_by_one(EnsembleForCausalLM.from_config(CASES[name].config(tmp_path)), REQUESTS)


def test_a_grid_of_two_rules_on_the_demo_family() -> None:
    model = EnsembleForCausalLM.from_pretrained(demo_folder())
    lines = (demo_folder() / "data" / "examples.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    prompts = [json.loads(line)["prompt"] for line in lines]
    texts = (" 9 + 7 = 16; so 16.", " 9 + 7 = 15; so 15.", " 23 - 16 = 7; so 7.", " 7")
    requests = [encode_request(model.tokenizer, prompt, texts, "it", i) for i, prompt in enumerate(prompts)]
    assert any(one.is_forked for batch in make_batches(requests, 4, share_contexts=True) for one in batch.passes)
    assert_one_by_one(model, requests)


def test_both_rules_are_those_of_their_formulas_and_meet_at_alpha_1(
    base_change: EnsembleForCausalLM, trio: dict[str, PreTrainedModel]
) -> None:
    request = ScoringRequest(0, (5, 9, 11), ((7, 8, 20),), "it")
    (score,) = scored(base_change, make_batches([request], 1), GRID)[0].scores
    z = {role: member_logits(model, torch.tensor([[5, 9, 11, 7, 8]]))[0, 2:] for role, model in trio.items()}
    for point, log_prob in zip(GRID, score.log_probs, strict=True):
        a = point.alpha
        base = z["source_ft"] + a * (z["target_pt"] - z["source_pt"])
        eft = z["target_pt"] + a * (z["source_ft"] - z["source_pt"])
        logprobs = (base if point.rule == "base-change" else eft).log_softmax(-1)
        assert log_prob == pytest.approx(sum(float(logprobs[i, t]) for i, t in enumerate((7, 8, 20))), abs=1e-5)
    assert score.log_probs[10] == pytest.approx(score.log_probs[26], abs=1e-5)


def test_rules_share_the_forwards_and_points_keep_their_order(
    base_change: EnsembleForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = []
    run = ModelRunner.run
    monkeypatch.setattr(ModelRunner, "run", lambda self, step, *more: count.append(1) or run(self, step, *more))
    batches = make_batches(REQUESTS, 4)
    whole = scored(base_change, batches, GRID)
    assert len(count) == 3 * sum(len(batch.passes) for batch in batches)
    mixed = random.Random(0).sample(range(len(GRID)), 11)
    found = scored(base_change, batches, [GRID[index] for index in mixed])
    for number, one in found.items():
        for score, all_points in zip(one.scores, whole[number].scores, strict=True):
            assert score.log_probs == pytest.approx([all_points.log_probs[index] for index in mixed], abs=1e-4)


def test_a_token_that_only_one_anchor_holds(save_member: SaveMember) -> None:
    """An id beyond the width of EFT's anchor: impossible there, and not an error."""
    model = EnsembleForCausalLM.from_members(
        rule="base-change",
        outside="neutral",
        members={
            "source_ft": save_member("a", "llama", 1, vocab_size=70, tokenizer=make_tokenizer(6)),
            "source_pt": save_member("b", "llama", 2),
            "target_pt": save_member("c", "qwen2", 3),
        },
    )
    request = ScoringRequest(0, (5, 9), ((66,), (7,)), "it", has_choices=True)
    grid = make_grid(["base-change", "eft"], [0.0, 0.5])
    outside, inside = scored(model, make_batches([request], 1), grid)[0].scores
    assert [math.isfinite(log_prob) for log_prob in outside.log_probs] == [True, True, False, False]
    assert all(map(math.isfinite, inside.log_probs))
    assert outside.perplexities[2] == math.inf
    row = ScoredRequest(request, (outside, inside)).to_row(make_grid(["eft"], [0.0, 0.5]), make_tokenizer(6))
    assert row["choices"][0]["token_log_probs"][2] == [None]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (lambda: [GridPoint("contrastive", 0.5)], "the rule 'contrastive' combines amateur, expert; the members are"),
        (lambda: make_grid(["eft"], [-1.0]), "not negative"),
        (list, "the grid is empty"),
    ],
)
def test_a_grid_that_members_cannot_serve(base_change: EnsembleForCausalLM, points: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scored(base_change, make_batches(REQUESTS, 4), points())


# -- contexts that are read once --------------------------------------------------------------------------------------

LONG = tuple(range(4, 44))
FORKED = ScoringRequest(0, LONG, ((5, 6, 7), (5, 8, 9), (6, 6), (7,)), "it", has_choices=True)


def test_a_context_is_read_once_where_that_saves_tokens() -> None:
    short = ScoringRequest(1, (5,), ((5, 6), (7, 8)), "it")
    one_token = ScoringRequest(2, LONG, ((5,), (6,), (7,)), "it")
    (batch,) = make_batches([FORKED, short, one_token], 2 + 1, share_contexts=True)
    contexts, *tails, whole = batch.passes
    assert [one.is_forked for one in batch.passes] == [True, False, False, False]
    assert contexts.step.input_ids.shape == (2, 40)
    assert contexts.step.attention_mask.sum(1).tolist() == [40, 1]
    assert [tail.step.input_ids.tolist() for tail in tails] == [[[5, 6], [5, 8], [6, 0]], [[5], [7]]]
    assert [tail.parents.tolist() for tail in tails] == [[0, 0, 0], [1, 1]]
    assert tails[1].step.position_ids.tolist() == [[1], [1]]
    assert whole.step.input_ids.shape == (1, 40)
    assert [one.number for one in batch.passes] == [0, 1, 2, 3]
    tokens = [token for one in batch.passes for token in one.slots.tolist()]
    assert sorted(tokens) == list(range(9 + 4 + 3))

    (alone,) = make_batches([short], 3, share_contexts=True)  # two tokens are not worth a forward
    assert not any(one.is_forked for one in alone.passes)
    (plain,) = make_batches([FORKED], 3)  # each row is one that a member alone would read
    assert [one.step.input_ids.shape for one in plain.passes] == [(3, 42), (1, 41)]
    assert [one.step.lengths.tolist() for one in plain.passes] == [[[40], [42], [42]], [[41]]]


def test_contexts_of_one_length_need_no_mask() -> None:
    requests = [ScoringRequest(number, LONG, FORKED.continuations, "it") for number in range(2)]
    (batch,) = make_batches(requests, 8, share_contexts=True)
    assert [(one.step.attention_mask, one.step.position_ids) for one in batch.passes] == 2 * [(None, None)]


def test_an_interrupted_tail_is_run_again_behind_its_context(tmp_path: Path) -> None:
    checked = check_ensemble(CASES["lora"].config(tmp_path))
    batches = make_batches([FORKED, ScoringRequest(1, LONG[5:], ((9, 9, 9), (8, 8)), "it")], 2, share_contexts=True)
    whole = LogitsFolder(tmp_path / "out.members", {"seed": 1})
    expected = next(OfflineScorer(checked, whole).score(batches, GRID))
    tails = [one.number for batch in batches for one in batch.passes if one.parents is not None]
    assert len(tails) == 3
    for number in tails[1:]:
        for path in whole.path.glob(f"*.{number:06d}.safetensors"):
            path.unlink()
    again = OfflineScorer(checked, LogitsFolder(whole.path, {"seed": 1}))
    assert next(again.score(batches, GRID)) == expected


def test_which_members_share_contexts(trio: dict[str, PreTrainedModel]) -> None:
    assert can_share_contexts(model.config for model in trio.values())
    families = {name: make_model(name).config for name in ("gemma2", "bloom", "opt", "gpt_neox")}
    assert can_share_contexts(families.values())
    recurrent = AutoConfig.for_model("mamba", hidden_size=8, num_hidden_layers=1)
    stretched = make_model("llama").config
    stretched.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    for config in (recurrent, stretched, tables(1)[0].config):
        assert not can_share_contexts([*families.values(), config]), config.model_type


def test_shared_contexts_over_several_processes(
    base_change: EnsembleForCausalLM, trio: dict[str, PreTrainedModel]
) -> None:
    batches = make_batches([FORKED, *REQUESTS[1:4]], 4, share_contexts=True)
    assert any(one.is_forked for batch in batches for one in batch.passes)
    expected = scored(base_change, batches, GRID)
    for found in run_ranks(2, lambda world: scored(spread(world, trio, base_change), batches, GRID)):
        assert found.keys() == expected.keys(), found
        for number, one in found.items():
            for score, other in zip(one.scores, expected[number].scores, strict=True):
                assert score.log_probs == pytest.approx(other.log_probs, abs=1e-5)


# -- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [4, 7, 64])
def test_texts_are_scored_as_lm_eval_rolls_over_them(
    base_change: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast, window: int
) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    chance = random.Random(0)
    texts = ["".join(chance.choices("abcdefgh ,.", k=length)) for length in (1, 3, 4, 5, 8, 21, 40)]
    lm = HFLM(pretrained=base_change, tokenizer=tokenizer, batch_size=3, device="cpu", max_length=window)
    theirs = lm.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    )
    context = ("source_ft", window)
    requests = [encode_request(tokenizer, None, [text], "it", i, context=context) for i, text in enumerate(texts)]
    found = scored(base_change, make_batches(requests, 3), make_grid([base_change.rule.name], [0.7]))
    for number, log_prob in enumerate(theirs):
        (score,) = found[number].scores
        assert score.log_probs[0] == pytest.approx(log_prob, abs=1e-4)
        assert score.num_tokens == len(texts[number])
        assert score.perplexities[0] == pytest.approx(math.exp(-log_prob / len(texts[number])), rel=1e-4)


def test_long_texts_take_passes_of_their_own() -> None:
    """Every position of a text goes through the heads: rows of a pass are bounded by the logits' memory."""
    requests = [ScoringRequest(n, (1,), (tuple(range(4, 64)) * 15,), "it", window=900) for n in range(5)]
    (batch,) = make_batches(requests, 8)
    assert [one.step.input_ids.shape for one in batch.passes] == [(2, 900), (2, 900), (1, 900)]
    assert sorted(slot for one in batch.passes for slot in one.slots.tolist()) == list(range(4500))


def test_long_texts_need_lm_eval_and_short_ones_do_not(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.utils", None)
    assert make_batches([encode_request(tokenizer, None, ["abcdef"], "it", context=("it", 6))], 1)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[eval\]"):
        make_batches([encode_request(tokenizer, None, ["abcdef"], "it", context=("it", 5))], 1)


# -- the benchmark ----------------------------------------------------------------------------------------------------


def test_the_benchmark_writes_its_row(tmp_path: Path) -> None:
    save_lora(tmp_path)
    (tmp_path / "adapter").rename(tmp_path / "source_ft")
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    lines = [json.dumps({"sentence": f"a film {i} ", "label": "1"}) + "\n" for i in range(6)]
    (tmp_path / "data" / "sst2" / "dev.jsonl").write_text("".join(lines))
    rows = tmp_path / "rows.jsonl"
    options = ("--repeats", 1, "--batch-size", 3, "--results", rows)
    run_script("benchmarks/grid_score.py", tmp_path / "source_pt", tmp_path, tmp_path / "data", *options)
    (row,) = map(json.loads, rows.read_text().splitlines())
    assert (row["num_rows"], row["num_alphas"]) == (6, 16)
    assert row["time_ratio"] > 0
    assert row["time_spread"][0] <= row["time_ratio"] <= row["time_spread"][1]


# -- lm-eval's own ----------------------------------------------------------------------------------------------------


def test_accuracies_are_those_of_lm_eval_at_each_alpha(
    tmp_path: Path, fresh: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    chance = random.Random(1)
    questions = [
        {
            "question": "".join(chance.choices("abcdefgh 12", k=chance.randint(3, 40))).strip() or "a",
            "choices": [f" {first}{''.join(chance.choices('abcdefgh', k=2))}" for first in chance.sample("aabc", k=3)],
            "answer": chance.randrange(3),
        }
        for _ in range(40)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in questions))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "choice.yaml").write_text(CHOICE.format(data=data))
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    requests = [encode_request(tokenizer, one["question"], one["choices"], "it", i) for i, one in enumerate(questions)]
    grid = make_grid([fresh.rule.name], [0.0, 0.3, 0.7, 1.0, 1.5])
    found = scored(fresh, make_batches(requests, 8, share_contexts=True), grid)
    accuracies = []
    for index, point in enumerate(grid):
        best = [max(range(3), key=lambda c, n=n: found[n].scores[c].log_probs[index]) for n in range(len(questions))]
        accuracies.append(sum(b == row["answer"] for b, row in zip(best, questions, strict=True)) / len(questions))
        fresh.alpha = point.alpha
        lm = HFLM(pretrained=fresh, tokenizer=tokenizer, batch_size=2, device="cpu")
        theirs = simple_evaluate(lm, tasks=["tiny_choice"], task_manager=manager, bootstrap_iters=0)
        assert theirs is not None
        assert accuracies[-1] == theirs["results"]["tiny_choice"]["acc,none"], point.alpha
    assert len(set(accuracies)) > 1
