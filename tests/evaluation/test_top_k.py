"""`ensembler score --top-k-logits`: equals the ensemble's own log-softmax; shards, resuming, one line per mistake."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Run
from helpers.scoring_cases import CASES, VOCAB
from helpers.tiny import make_model, tables
from safetensors.torch import load_file
from torch import Tensor

from ensembler import EnsembleForCausalLM
from ensembler.engine.grid import GridPoint
from ensembler.engine.model_runner import ModelRunner
from ensembler.errors import ConfigError, LogitsError, PromptError, RunError
from ensembler.evaluation import top_k as module
from ensembler.evaluation.offline import LogitsFolder
from ensembler.evaluation.requests import ScoringRequest
from ensembler.evaluation.top_k import TopKWriter

PER_POSITION = ("top_ids", "top_log_probs", "rest_log_probs", "token_log_probs")


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the sequences, each with its own part of the tensors."""
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        tensors = load_file(folder / shard["file"])
        lengths, num_scored = tensors["lengths"].tolist(), tensors["num_scored"].tolist()
        parts = {key: torch.split(tensors[key], num_scored) for key in PER_POSITION}
        for number, ids in enumerate(torch.split(tensors["input_ids"], lengths)):
            line = int(tensors["lines"][number])
            assert shard["lines"][0] <= line <= shard["lines"][1]
            yield {"line": line, "input_ids": ids.long(), **{key: part[number] for key, part in parts.items()}}


def requests(num: int = 14, seed: int = 0) -> list[ScoringRequest]:
    """One continuation each; some lines are missing."""
    chance = random.Random(seed)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(chance.randrange(4, VOCAB) for _ in range(chance.randint(1, most)))

    return [ScoringRequest(2 * number, ids(20), (ids(9),), f"line {number}") for number in range(num)]


def write(
    model: EnsembleForCausalLM,
    path: Path,
    k: int = 5,
    asked: list[ScoringRequest] | None = None,
    *,
    batch_size: int = 4,
    **options: Any,
) -> list[dict[str, Any]]:
    width = model.contract.widths[model.rule.anchor]
    writer = TopKWriter(requests() if asked is None else asked, k, width, LogitsFolder(path, {"seed": 1}, **options))
    num_bytes = writer.check_space()
    writer.write(model, GridPoint(model.rule.name, float(model.alpha)), batch_size=batch_size)
    stored = [tensor for file in path.glob("*.safetensors") for tensor in load_file(file).values()]
    assert num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in stored)
    return list(read(path))


def expected(model: EnsembleForCausalLM, ids: Tensor, num_scored: int) -> Tensor:
    """The log-probs (num_scored, V) in the places of the last tokens, by the ensemble's own forward."""
    with torch.no_grad():
        return model(ids[None, :-1]).logits[0].log_softmax(-1)[-num_scored:]


def assert_right(model: EnsembleForCausalLM, found: dict[str, Any], k: int, tolerance: float = 1e-5) -> None:
    num_scored = len(found["token_log_probs"])
    log_probs = expected(model, found["input_ids"], num_scored)
    ids, targets = found["top_ids"].long(), found["input_ids"][-num_scored:]
    half = {"rtol": 2.0**-11, "atol": tolerance}  # the rounding of float16
    torch.testing.assert_close(found["top_log_probs"].float(), log_probs.topk(k).values, **half)
    torch.testing.assert_close(found["top_log_probs"].float(), log_probs.gather(1, ids), **half)
    assert all(len(set(row)) == k for row in ids.tolist())
    inside = targets < log_probs.shape[1]
    own = log_probs.gather(1, targets.where(inside, 0)[:, None])[:, 0].where(inside, -math.inf)
    torch.testing.assert_close(found["token_log_probs"], own, rtol=1e-5, atol=tolerance)
    rest = log_probs.scatter(1, ids, -math.inf).logsumexp(1)
    torch.testing.assert_close(found["rest_log_probs"], rest, rtol=1e-4, atol=10 * tolerance)
    mass = found["top_log_probs"].double().exp().sum(1) + found["rest_log_probs"].double().exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=2e-3)


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_the_log_softmax_of_the_ensembles_logits(name: str, tmp_path: Path) -> None:
    model = EnsembleForCausalLM.from_config(CASES[name].config(tmp_path))
    low = any(member.dtype != torch.float32 for member in model.members.values())
    for number, (alpha, k) in enumerate([(0.0, 1), (0.4, 5), (1.3, VOCAB)]):
        model.alpha = alpha
        asked = requests(seed=number)
        batch_size = 1 if low else 4  # in bf16, forwards of other shapes round differently
        found = write(model, tmp_path / f"teacher-{number}", k, asked, batch_size=batch_size)
        assert [one["line"] for one in found] == [request.number for request in asked]
        for one, request in zip(found, asked, strict=True):
            assert tuple(one["input_ids"].tolist()) == request.context + request.continuations[0]
            assert len(one["top_ids"]) == len(request.continuations[0])
            assert_right(model, one, k)


def test_tokens_that_are_forbidden_have_no_probability(tmp_path: Path) -> None:
    model = EnsembleForCausalLM.from_config(CASES["extended"].config(tmp_path))
    (found,) = write(model, tmp_path / "teacher", 70, [ScoringRequest(0, (5, 9), ((66, 7),), "it")])
    assert found["token_log_probs"].isinf().tolist() == [True, False]
    assert found["top_log_probs"].isinf().sum(1).tolist() == [6, 6]
    assert sorted(found["top_ids"][0, -6:].tolist()) == list(range(64, 70))
    assert found["rest_log_probs"].tolist() == [-math.inf] * 2


def test_what_is_left_over_is_exact_where_it_is_tiny(tmp_path: Path) -> None:
    """The k most probable tokens in float16 could not tell it."""
    (member,) = tables(1)
    with torch.no_grad():
        member.table[5] = torch.linspace(0, -20, member.table.shape[1])
        member.table[5, 9] = 20.0
    model = EnsembleForCausalLM.from_members(rule="linear", members={"a": member}, constant={"a": 1.0})
    (found,) = write(model, tmp_path / "teacher", 1, [ScoringRequest(0, (5,), ((7,),), "it")])
    log_probs = member.table[5].detach().double().log_softmax(0)
    rest = torch.cat([log_probs[:9], log_probs[10:]]).logsumexp(0)
    assert -20 < float(rest) < -15
    assert float(found["rest_log_probs"][0]) == pytest.approx(float(rest), rel=1e-5)


def test_long_texts_are_windows_in_which_every_token_counts_once(
    base_change: EnsembleForCausalLM, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    ids = tuple(random.Random(0).choices(range(4, VOCAB), k=37))
    found = write(base_change, tmp_path / "teacher", 5, [ScoringRequest(3, (1,), (ids,), "it", window=16)])
    assert [one["line"] for one in found] == [3, 3, 3]
    assert max(len(one["input_ids"]) for one in found) == 17
    assert [token for one in found for token in one["input_ids"][-len(one["top_ids"]) :].tolist()] == list(ids)
    for one in found:
        assert_right(base_change, one, 5)


# -- shards -----------------------------------------------------------------------------------------------------------


def assert_same(found: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    for one, another in zip(found, other, strict=True):
        assert one.keys() == another.keys()
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(another[key])) for key in one)


def test_shards_are_bounded_and_add_up(
    base_change: EnsembleForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write(base_change, tmp_path / "whole", batch_size=1)
    monkeypatch.setattr(module, "_SHARD_BYTES", 900)
    shards = write(base_change, tmp_path / "shards", batch_size=1)
    assert_same(shards, whole)
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        tensors = load_file(file)
        assert sum(t.numel() * t.element_size() for t in tensors.values()) <= 900 or len(tensors["lines"]) == 1
    index = json.loads((tmp_path / "shards" / "index.json").read_text())
    assert index["num_sequences"] == index["num_lines"] == len(whole)
    assert index["num_positions"] == sum(len(one["top_ids"]) for one in whole)
    assert [index[key] for key in ("format", "rule", "alpha", "k", "vocab_size")] == [1, "base-change", 0.7, 5, VOCAB]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_interrupted_and_gone_on_with_equals_undisturbed(
    base_change: EnsembleForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SHARD_BYTES", 900)
    count, stop = 0, 0
    run = ModelRunner.run

    def counted(runner: ModelRunner, *inputs: Any) -> Any:
        nonlocal count
        count += 1
        if count == stop:
            raise KeyboardInterrupt
        return run(runner, *inputs)

    monkeypatch.setattr(ModelRunner, "run", counted)
    write(base_change, tmp_path / "whole")
    num_forwards = count
    for stop in range(2, num_forwards, 7):
        count, path = 0, tmp_path / f"cut-{stop}"
        with pytest.raises(KeyboardInterrupt):
            write(base_change, path)
        finished = set(path.glob("*.safetensors"))
        assert not (path / "index.json").exists()
        before = {file: file.stat().st_mtime_ns for file in finished}
        write(base_change, path)
        assert contents(path) == contents(tmp_path / "whole")
        assert {file: file.stat().st_mtime_ns for file in finished} == before
    assert finished
    count = stop = 0
    write(base_change, path)
    assert count == 0
    write(base_change, path, overwrite=True)
    assert count == num_forwards


def test_nan_names_the_member_and_an_impossible_position_its_lines(tmp_path: Path) -> None:
    config = CASES["base-change"].config(tmp_path)
    broken = make_model("mistral", 2)
    with torch.no_grad():
        broken.get_output_embeddings().weight[9] = float("nan")
    broken.save_pretrained(tmp_path / "source_pt")
    with pytest.raises(LogitsError, match="source_pt computed NaN"):
        write(EnsembleForCausalLM.from_config(config), tmp_path / "teacher")

    anchor, other = tables(2)
    with torch.no_grad():
        anchor.table[5] = -math.inf
    model = EnsembleForCausalLM.from_members(
        rule="contrastive", alpha=0.5, members={"expert": anchor, "amateur": other}
    )
    with pytest.raises(RunError, match=r"in the batch of data\.jsonl:1: all combined logits of a position are -inf"):
        write(model, tmp_path / "other", 3, [ScoringRequest(0, (5,), ((7,),), "data.jsonl:1")])


def test_what_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    folder = LogitsFolder(tmp_path / "teacher", {"a": 1})
    with pytest.raises(ConfigError, match="--top-k-logits is 65; the vocabulary has 64 tokens"):
        TopKWriter(requests(), 65, VOCAB, folder)
    choices = ScoringRequest(0, (5,), ((7,), (8,)), "data.jsonl:1", has_choices=True)
    with pytest.raises(PromptError, match=r"data\.jsonl:1 has choices"):
        TopKWriter([choices], 5, VOCAB, folder)
    assert not folder.path.exists()


# -- the command ------------------------------------------------------------------------------------------------------

LINES = [{"prompt": "abc", "continuation": " de"}, {"text": "xyz and so on"}, {"prompt": "", "continuation": "q 3"}]


@pytest.fixture
def command(members: list[str], tmp_path: Path) -> list[object]:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return ["score", *members, "--data", data, "--alpha", 0.6]


def test_the_command_writes_what_score_tells(run: Run, command: list[object], tmp_path: Path) -> None:
    out = tmp_path / "teacher"
    result = run(*command, "--top-k-logits", 7, "--output", out)
    assert result.code == 0, result.err
    assert result.out == ""
    said, last = result.err.splitlines()
    assert said.startswith(f"{out} will take ")
    assert last.startswith("sequences: 3, tokens: 19, seconds: ")
    scores = sorted(map(json.loads, run(*command, "--json").out.splitlines()), key=lambda row: row["number"])
    for one, row in zip(read(out), scores, strict=True):
        assert one["line"] == row["number"]
        assert len(one["top_ids"]) == row["num_tokens"]
        assert float(one["token_log_probs"].sum()) == pytest.approx(row["log_prob"][0], abs=1e-4)
    index = json.loads((out / "index.json").read_text())
    assert (index["alpha"], index["ensemble"]["alpha"], index["k"]) == (0.6, 0.6, 7)
    assert index["ensemble"]["members"].keys() == {"source_ft", "source_pt", "target_pt"}
    assert Path(index["tokenizer"]).name == "m_source_ft"

    again = ["--top-k-logits", 7, "--output", out]
    before = contents(out)
    assert run(*command, *again).code == 0
    assert contents(out) == before
    for other in (
        ["--top-k-logits", 6],
        ["--top-k-logits", 7, "--batch-size", 2],
        ["--top-k-logits", 7, "--rule", "eft"],
    ):
        refused = run(*command, *other, "--output", out)
        assert "was begun with other settings: " in refused.error
        assert refused.code == 2
    assert contents(out) == before
    assert run(*command, "--top-k-logits", 6, "--output", out, "--overwrite").code == 0
    assert {len(row) for one in read(out) for row in one["top_ids"]} == {6}


MISTAKES = {
    "no output": (["--top-k-logits", "5"], "--top-k-logits was given without --output; name the folder"),
    "two alphas": (["--top-k-logits", "5", "--output", "OUT", "--rule", "eft,base-change"], "with 2 points"),
    "offline": (["--top-k-logits", "5", "--output", "OUT", "--offline-members"], "with --offline-members"),
    "per token": (["--top-k-logits", "5", "--output", "OUT", "--per-token"], "with --per-token"),
    "json": (["--top-k-logits", "5", "--output", "OUT", "--json"], "with --json"),
    "zero": (["--top-k-logits", "0", "--output", "OUT"], "--top-k-logits"),
    "too many": (["--top-k-logits", "99", "--output", "OUT"], "the vocabulary has 64 tokens"),
    "a file": (["--top-k-logits", "5", "--output", "DATA"], "which this command reads"),
    "no folder": (["--top-k-logits", "5", "--output", "nowhere/out"], "nowhere is not a folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(run: Run, command: list[object], tmp_path: Path, name: str) -> None:
    arguments, message = MISTAKES[name]
    places = {"OUT": tmp_path / "out", "DATA": tmp_path / "data.jsonl"}
    before = sorted(tmp_path.rglob("*"))
    result = run(*command, *(places.get(argument, argument) for argument in arguments))
    assert message in result.error
    assert result.code == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_choices_are_refused(run: Run, command: list[object], tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "choices": ["b", "c"]}\n')
    result = run(*command, "--top-k-logits", 5, "--output", tmp_path / "out")
    assert "data.jsonl:1 has choices, which are no text to learn from" in result.error
    assert not (tmp_path / "out").exists()
