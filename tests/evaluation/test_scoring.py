"""Scores against a plain reference, together and one member at a time, on any batch, after any interruption."""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.scoring_cases import ALPHAS, CASES, Case, random_requests, reference
from helpers.tiny import make_model, make_tokenizer, tables
from torch import nn
from transformers import PreTrainedTokenizerFast

from ensembler import EnsembleForCausalLM
from ensembler.engine.grid import make_grid
from ensembler.engine.model_runner import ModelRunner
from ensembler.errors import ConfigError, LogitsError, OutputError, PromptError, RunError
from ensembler.evaluation import offline as offline_module
from ensembler.evaluation.backends import TransformersBackend
from ensembler.evaluation.offline import LogitsFolder, OfflineScorer
from ensembler.evaluation.request_batches import make_batches
from ensembler.evaluation.requests import ScoringRequest, encode_request, group_by_context, read_requests
from ensembler.evaluation.scoring import Score, ScoredRequest, run_settings
from ensembler.files import digest
from ensembler.preflight import CheckedEnsemble, check_ensemble

REQUESTS = random_requests()
Scores = dict[int, tuple[Score, ...]]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


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


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_reference_in_any_batch(case: Case, tmp_path: Path) -> None:
    model = EnsembleForCausalLM.from_config(case.config(tmp_path))
    members = dict(model.members.items())
    low = any(member.dtype != torch.float32 for member in members.values())
    # In bf16, forwards of other shapes round differently: there, sequences that both sides run alone.
    compared = [request for request in REQUESTS if not low or len(request.continuations) == 1]
    expected = {request.number: reference(case, members, request) for request in compared}
    for batch_size in (1,) if low else (1, 3, 8):
        found = together(model, batch_size)
        assert len(found) == len(REQUESTS)
        for number, wanted in expected.items():
            for score, by_alpha in zip(found[number], wanted, strict=True):
                log_probs, is_greedy = zip(*by_alpha, strict=True)
                assert score.log_probs == pytest.approx(log_probs, rel=1e-5, abs=1e-5), (number, batch_size)
                assert score.is_greedy == is_greedy, (number, batch_size)


@pytest.mark.parametrize(("batch_size", "share_contexts"), [(1, False), (4, False), (4, True)])
def test_one_at_a_time_is_exactly_together(
    case: Case, tmp_path: Path, batch_size: int, share_contexts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ensembler.evaluation.request_batches._FORWARD", 0)
    config = case.config(tmp_path)
    folder = LogitsFolder(tmp_path / "out.members", {"seed": 1})
    found = offline(check_ensemble(config.replaced()), folder, batch_size, share_contexts=share_contexts)
    model = EnsembleForCausalLM.from_config(config)
    assert found == together(model, batch_size, share_contexts=share_contexts)
    assert not folder.path.exists()


def test_contexts_that_are_shared_change_no_score(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "ensembler.evaluation.request_batches._FORWARD", -(10**6)
    )  # wherever there is more than one tail
    model = EnsembleForCausalLM.from_config(case.config(tmp_path))
    low = any(member.dtype != torch.float32 for member in model.members.values())
    for batch_size in (1, 3, 8):
        batches = make_batches(REQUESTS, batch_size, share_contexts=True)
        assert any(one.is_forked for batch in batches for one in batch.passes)
        whole = together(model, batch_size)
        shared = together(model, batch_size, share_contexts=True)
        for number, scores in shared.items():
            for score, expected in zip(scores, whole[number], strict=True):
                tolerance = 0.3 if low else 1e-4
                assert score.log_probs == pytest.approx(expected.log_probs, abs=tolerance), (number, batch_size)
                assert low or score.is_greedy == expected.is_greedy


def test_a_grid_is_one_alpha_at_a_time(base_change: EnsembleForCausalLM) -> None:
    grid = [k / 10 for k in range(16)]
    found = together(base_change, 4, grid)
    for k, alpha in enumerate(grid):
        alone = together(base_change, 4, [alpha])
        for number, scores in alone.items():
            for one, score in zip(scores, found[number], strict=True):
                assert score.log_probs[k] == pytest.approx(one.log_probs[0], rel=1e-5, abs=1e-5)
                assert score.is_greedy[k] == one.is_greedy[0]


def test_at_alpha_0_the_score_is_the_anchors(base_change: EnsembleForCausalLM) -> None:
    request = ScoringRequest(0, (5, 9, 11), ((7, 8),), "it")
    found = alone(base_change, request, [0.0])
    with torch.no_grad():
        logprobs = base_change.anchor(torch.tensor([[5, 9, 11, 7]])).logits[0].log_softmax(-1)
    assert found.scores[0].log_probs[0] == pytest.approx(float(logprobs[2, 7] + logprobs[3, 8]), abs=1e-5)


def test_greedy_is_what_generate_says(base_change: EnsembleForCausalLM) -> None:
    ids = torch.tensor([[5, 9, 11]])
    new = base_change.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)[0, 3:].tolist()
    other = [*new[:-1], 4 if new[-1] != 4 else 5]
    request = ScoringRequest(0, (5, 9, 11), (tuple(new), tuple(other)), "it")
    found = alone(base_change, request, [0.7])
    assert [score.is_greedy for score in found.scores] == [(True,), (False,)]


def test_a_forbidden_token_has_log_prob_minus_infinity(tmp_path: Path) -> None:
    model = EnsembleForCausalLM.from_config(CASES["extended"].config(tmp_path))
    request = ScoringRequest(0, (5, 66, 11), ((7,), (66,)), "it", has_choices=True)
    found = alone(model, request, [0.0, 1.0])
    assert found.scores[1].log_probs == (-math.inf, -math.inf)
    assert all(log_prob > -math.inf for log_prob in found.scores[0].log_probs)
    assert found.to_row(make_grid([model.rule.name], [0.0, 1.0]))["choices"][1]["log_prob"] == [None, None]


# -- batches ----------------------------------------------------------------------------------------------------------


def test_choices_of_one_token_are_one_sequence_and_one_position() -> None:
    request = ScoringRequest(0, (5, 9, 11), ((7,), (8,), (9,), (7,)), "it")
    (batch,) = make_batches([request], 1)
    (only,) = batch.passes
    assert only.step.input_ids.tolist() == [[5, 9, 11]]
    assert only.step.logits_to_keep.tolist() == [2]
    assert (only.taken.tolist(), only.tokens.tolist()) == ([0], [7, 8, 9, 7])


def test_choices_that_begin_alike_share_positions_and_passes_keep_their_size() -> None:
    request = ScoringRequest(0, (5,), ((1, 2, 3), (1, 2, 4), (1, 6, 3), (1,), (9, 9)), "it")
    (batch,) = make_batches([request], 2, share_contexts=True)
    # behind the context: 1 2, 1 6, 9; positions: after 5, 5 1, 5 1 2, 5 1 6, 5 9
    assert [one.step.input_ids.tolist() for one in batch.passes] == [[[5, 1, 2], [5, 1, 6]], [[5, 9]]]
    assert [len(one.taken) for one in batch.passes] == [4, 1]
    assert sum(len(one.tokens) for one in batch.passes) == sum(map(len, request.continuations))


def test_only_needed_positions_go_through_the_heads(
    base_change: EnsembleForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    run = ModelRunner.run
    monkeypatch.setattr(ModelRunner, "run", lambda self, step, *more: kept.append(step) or run(self, step, *more))
    request = ScoringRequest(0, tuple(range(4, 40)), ((7, 8),), "it")
    alone(base_change, request, [1.0])
    assert [step.logits_to_keep.tolist() for step in kept] == 3 * [[35, 36]]


def test_the_longest_run_first(base_change: EnsembleForCausalLM) -> None:
    batches = make_batches(REQUESTS, 4)
    lengths = [request.num_positions for batch in batches for request in batch.requests]
    assert lengths == sorted(lengths, reverse=True)
    counted: list[int] = []
    together(base_change, 4, advance=counted.append)
    assert counted == [4, 4, 4, 1]


# -- one member at a time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base-change", "lora"])
def test_one_group_of_members_is_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    weights: list[list[weakref.ref[nn.Parameter]]] = []
    load = offline_module.load_members

    def watched(files: Any) -> Any:
        assert not [ref for refs in weights for ref in refs if ref() is not None], "members of before are alive"
        models, backbones = load(files)
        weights.append([weakref.ref(p) for model in models.values() for p in model.parameters()])
        return models, backbones

    monkeypatch.setattr(offline_module, "load_members", watched)
    gc.disable()  # freeing must not wait for a collection by chance
    try:
        offline(check_ensemble(CASES[name].config(tmp_path)), LogitsFolder(tmp_path / "out.members", {"seed": 1}), 4)
    finally:
        gc.enable()
    assert len(weights) == (2 if name == "lora" else 3)
    assert not [ref for refs in weights for ref in refs if ref() is not None]


def test_the_folder_holds_as_many_bytes_as_was_said(case: Case, tmp_path: Path) -> None:
    checked = check_ensemble(case.config(tmp_path))
    folder = LogitsFolder(tmp_path / "out.members", {"seed": 1})
    scorer, batches = OfflineScorer(checked, folder), make_batches(REQUESTS, 3)
    expected = scorer.check_space(batches)
    next(scorer.score(batches, make_grid([checked.config.get_rule().name], ALPHAS)))
    assert scorer.check_space(batches) == expected
    stored = [folder.read(path.name) for path in folder.path.glob("*.safetensors")]
    assert expected == sum(t.numel() * t.element_size() for tensors in stored for t in tensors.values())
    roles = {role: tensor.dtype for tensors in stored for role, tensor in tensors.items()}
    members = EnsembleForCausalLM.from_checked(checked).members
    assert roles == {role: member.dtype for role, member in members.items()}


class Interruption:
    """Counts the forwards by role, and raises in the one that is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts = Counter[str]()
        self.at: tuple[str, int] | None = None
        self.error: BaseException = KeyboardInterrupt()
        run = ModelRunner.run

        def counted(runner: ModelRunner, *inputs: Any) -> Any:
            name = "+".join(runner.roles)
            self.counts[name] += 1
            if (name, self.counts[name]) == self.at:
                raise self.error
            return run(runner, *inputs)

        monkeypatch.setattr(ModelRunner, "run", counted)


@pytest.fixture
def interruption(monkeypatch: pytest.MonkeyPatch) -> Interruption:
    return Interruption(monkeypatch)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a fault"), RunError("out of memory")])
def test_what_an_interruption_left_is_not_computed_again(
    tmp_path: Path, interruption: Interruption, error: BaseException
) -> None:
    config = CASES["base-change"].config(tmp_path)
    whole = offline(check_ensemble(config.replaced()), LogitsFolder(tmp_path / "whole.members", {"seed": 1}), 3)
    num_passes = interruption.counts["source_pt"]
    assert interruption.counts == dict.fromkeys(("source_ft", "source_pt", "target_pt"), num_passes)
    assert num_passes > 4

    path = tmp_path / "out.members"
    interruption.counts.clear()
    interruption.at, interruption.error = (list(config.members)[1], 4), error
    with pytest.raises(type(error)):
        offline(check_ensemble(config.replaced()), LogitsFolder(path, {"seed": 1}), 3)
    first, second, third = config.members
    assert interruption.counts == {first: num_passes, second: 4}
    interruption.counts.clear()
    interruption.at = None
    resumed = offline(check_ensemble(config.replaced()), LogitsFolder(path, {"seed": 1}), 3)
    assert resumed == whole
    assert interruption.counts == {second: num_passes - 3, third: num_passes}
    assert not path.exists()


def test_an_interruption_while_combining_needs_no_forward_again(tmp_path: Path, interruption: Interruption) -> None:
    checked = check_ensemble(CASES["base-change"].config(tmp_path))
    batches = make_batches(REQUESTS, 3)
    grid = make_grid([checked.config.get_rule().name], ALPHAS)
    path = tmp_path / "out.members"
    begun = OfflineScorer(checked, LogitsFolder(path, {"seed": 1})).score(batches, grid)
    first = next(begun)
    begun.close()
    interruption.counts.clear()
    counted: list[int] = []
    scorer = OfflineScorer(checked, LogitsFolder(path, {"seed": 1}))
    rest = scorer.score(batches[1:], grid, counted.append)
    numbers = [one.request.number for batch in rest for one in batch]
    assert sum(counted) == scorer.num_rounds * len(numbers)
    assert sorted([*numbers, *(one.request.number for one in first)]) == list(range(len(REQUESTS)))
    assert not interruption.counts
    assert not path.exists()


@pytest.mark.parametrize(
    "files",
    [
        {"precious": "mine"},
        {"run.json": '{"seed": 1}', "precious": "mine"},
        {"run.json": '{"seed": 1}'},
        {"run.json": "a log"},
        {"run.json": '{"format": "ensembler-logits", "seed": 1}', "precious": "mine"},
        {"x.safetensors": "mine"},
    ],
    ids=["no mark", "of another program", "of another program alone", "no JSON", "ours and another file", "weights"],
)
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, files: dict[str, str]) -> None:
    path = tmp_path / "out.members"
    path.mkdir()
    for name, content in files.items():
        (path / name).write_text(content)
    for options in ({}, {"overwrite": True}):
        with pytest.raises(OutputError, match="holds something else"):
            LogitsFolder(path, {"seed": 1}, **options)
    assert {file.name: file.read_text() for file in path.iterdir()} == files


def test_a_folder_of_another_run_is_refused_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out.members"
    folder = LogitsFolder(path, {"seed": 1})
    folder.open()
    folder.write("x.safetensors", {"role": torch.ones(2)})
    assert LogitsFolder(path, {"seed": 1}).has("x.safetensors")
    with pytest.raises(OutputError, match="begun with other settings: seed was 1, now 2; choose another --output"):
        LogitsFolder(path, {"seed": 2})
    again = LogitsFolder(path, {"seed": 2}, overwrite=True)
    assert not again.has("x.safetensors")
    assert folder.has("x.safetensors")  # nothing is removed before the run begins
    again.open()
    assert [entry.name for entry in path.iterdir()] == ["run.json"]


def test_removing_leaves_what_was_put_into_the_folder_meanwhile(tmp_path: Path) -> None:
    folder = LogitsFolder(tmp_path / "out.members", {"seed": 1})
    folder.open()
    folder.write("x.safetensors", {"role": torch.ones(2)})
    (folder.path / "precious").write_text("mine")
    folder.remove()
    assert [entry.name for entry in folder.path.iterdir()] == ["precious"]


def test_members_that_are_loaded_already_are_refused(trio: Any, tmp_path: Path) -> None:
    config = CASES["base-change"].config(tmp_path)
    checked = check_ensemble(config, {"source_pt": trio["source_pt"]})
    with pytest.raises(ConfigError, match="source_pt is loaded already"):
        OfflineScorer(checked, LogitsFolder(tmp_path / "out.members", {"seed": 1}))


@pytest.mark.parametrize("way", ["together", "offline"])
def test_nan_names_the_member(tmp_path: Path, way: str) -> None:
    config = CASES["base-change"].config(tmp_path)
    model = make_model("mistral", 2)
    with torch.no_grad():
        model.get_output_embeddings().weight[9] = float("nan")
    model.save_pretrained(tmp_path / "source_pt")
    checked = check_ensemble(config)
    folder = LogitsFolder(tmp_path / "out.members", {"seed": 1})
    run = {
        "offline": lambda: offline(checked, folder, 3),
        "together": lambda: together(EnsembleForCausalLM.from_checked(checked), 3),
    }[way]
    with pytest.raises(LogitsError, match="source_pt computed NaN"):
        run()


def test_a_row_without_any_possible_token_names_its_lines() -> None:
    anchor, other = tables(2)
    with torch.no_grad():
        anchor.table[5] = -math.inf
    model = EnsembleForCausalLM.from_members(
        rule="contrastive", alpha=0.5, members={"expert": anchor, "amateur": other}
    )
    request = ScoringRequest(0, (5,), ((7,),), "data.jsonl:1")
    with pytest.raises(RunError, match=r"in the batch of data\.jsonl:1: target 0 has no log-prob at point 0"):
        alone(model, request, [0.5])


def test_a_run_is_told_apart_by_all_that_its_scores_depend_on(tmp_path: Path) -> None:
    config = check_ensemble(CASES["base-change"].config(tmp_path)).config
    grid = make_grid(["base-change"], ALPHAS)
    runs = [
        run_settings(config, REQUESTS, grid, {"batch_size": 2}),
        run_settings(config, REQUESTS[:-1], grid, {"batch_size": 2}),
        run_settings(config, REQUESTS, grid[:-1], {"batch_size": 2}),
        run_settings(config, REQUESTS, make_grid(["eft"], ALPHAS), {"batch_size": 2}),
        run_settings(config, REQUESTS, grid, {"batch_size": 3}),
        run_settings(config, REQUESTS, grid, {"batch_size": 2, "per_token": True}),
        run_settings(config.replaced(rule="eft"), REQUESTS, grid, {"batch_size": 2}),
    ]
    assert run_settings(config, REQUESTS, grid, {"batch_size": 2}) == runs[0]
    assert len(set(map(digest, runs))) == len(runs)


# -- texts ------------------------------------------------------------------------------------------------------------

PAIRS = [("abc", " de"), ("the cat ", "sat"), ("", "xyz"), ("one\n\n", " 3"), ("q", "q"), ("  ", "ab"), ("<s>ab", "c")]


def ids_of(tokenizer: Any, prompt: str, *texts: str) -> ScoringRequest:
    return encode_request(tokenizer, prompt, texts, "it")


def test_white_space_at_the_end_of_a_prompt_belongs_to_the_continuation(tokenizer: PreTrainedTokenizerFast) -> None:
    request = ids_of(tokenizer, "ab ", "c", "de")
    assert tokenizer.decode(request.context) == "ab"
    assert [tokenizer.decode(ids) for ids in request.continuations] == [" c", " de"]
    assert ids_of(tokenizer, "", "<s>c").continuations == ids_of(tokenizer, "", "c").continuations


def test_encodings_and_scores_are_those_of_lm_eval(base_change: EnsembleForCausalLM) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = make_tokenizer()
    lm = HFLM(pretrained=base_change, tokenizer=tokenizer, batch_size=3, device="cpu")
    pairs = [pair for pair in PAIRS if pair[0].strip() or not pair[0]]  # lm-eval stumbles over white space alone
    theirs = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    requests = [encode_request(tokenizer, prompt, [text], "it", number) for number, (prompt, text) in enumerate(pairs)]
    batches = make_batches(requests, 3)
    grid = make_grid([base_change.rule.name], [0.7])
    mine = {s.request.number: s.scores[0] for b in TransformersBackend(base_change).score(batches, grid) for s in b}
    for number, (log_prob, is_greedy) in enumerate(theirs):
        assert mine[number].log_probs[0] == pytest.approx(log_prob, rel=1e-5, abs=1e-5), pairs[number]
        assert mine[number].is_greedy[0] == is_greedy


@pytest.mark.parametrize(
    ("prompt", "texts", "message"),
    [
        ("abc", [""], "it: the continuation is empty"),
        ("abc", ["half \ud83d"], "not UTF-8 text"),
        ("half \ud83d", ["abc"], "not UTF-8 text"),
        ("a" * 38, ["abc"], "it has 40 tokens to read; the context of target_pt ends at 39"),
    ],
)
def test_what_cannot_be_scored_is_one_line(
    tokenizer: PreTrainedTokenizerFast, prompt: str, texts: list[str], message: str
) -> None:
    with pytest.raises(PromptError, match=message) as found:
        encode_request(tokenizer, prompt, texts, "it", context=("target_pt", 39))
    assert "\n" not in str(found.value)


def test_lines_that_cannot_be_scored_are_refused_or_skipped(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Bad JSON and what cannot be encoded alike; numbers are those of the lines."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": ""}\n{"prompt": "a", "continuation": "bc"}\noops\n{"text": "abcd"}\n')
    with pytest.raises(PromptError, match=r"data\.jsonl:1: the text is empty; .*; mend the line or add --skip-bad$"):
        read_requests(data, tokenizer)
    skipped: list[str] = []
    found = read_requests(data, tokenizer, context=("target_pt", 3), skip=skipped.append)
    assert [(one.number, one.has_choices, one.window) for one in found] == [(1, False, None), (3, False, 3)]
    assert [line.removeprefix(f"{data}:")[:10] for line in skipped] == ["1: the tex", "3 is no JS"]


def test_continuations_are_grouped_by_their_context(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("abc").input_ids
    pairs = [(ids[:2], ids[2:]), ((7,), (8, 9)), (ids[:2], (5,)), (ids[:2], ids[2:])]
    one, other = group_by_context(pairs, tokenizer, {(7,): "document 3 of sst2"})
    assert (one.number, one.context, one.continuations) == (0, tuple(ids[:2]), (tuple(ids[2:]), (5,)))
    assert (other.number, other.context, other.continuations) == (1, (7,), ((8, 9),))
    assert (one.source, other.source) == ("the text that begins with 'abc'", "document 3 of sst2")


def test_the_last_token_of_a_continuation_needs_no_room(
    base_change: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    context = base_change.shortest_context
    assert context is not None
    request = encode_request(tokenizer, "a" * (context[1] - 1), ["bc"], "it", context=context)
    assert alone(base_change, request, [0.7]).scores[0].num_tokens == 2
