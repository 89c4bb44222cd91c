"""A sweep's rows are what lm-eval's own HFLM finds on an ensemble of each rule and α."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from sweep_cases import ALPHAS, RULES, Ensemble, Rows, load_task, options, run_sweep, save_ensemble, swept
from task_cases import recorded, run_lm_eval, write_tasks

from ensembler import EnsembleForCausalLM
from ensembler.demo import demo_folder, demo_task
from ensembler.engine.grid import GridPoint
from ensembler.evaluation.metric_values import from_json
from ensembler.evaluation.sweep import Sweep
from ensembler.evaluation.task_loading import load_tasks
from ensembler.evaluation.tasks import EvalTask
from ensembler.folder import read
from ensembler.preflight import check_ensemble


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks")


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Ensemble:
    return save_ensemble(tmp_path_factory.mktemp("members"))


def at(rows: Rows, point: GridPoint) -> list[dict[str, Any]]:
    """The row of each example at one point."""
    return [row for of in rows.values() for row in of if (row["rule"], row["alpha"]) == (point.rule, point.alpha)]


def assert_like_lm_eval(rows: Rows, point: GridPoint, results: dict[str, Any], task: EvalTask) -> None:
    """Log-probs to 1e-4, texts and figures of every document and of all together."""
    answers = recorded(results, task)
    samples = {sample["doc_id"]: sample for sample in results["samples"][task.name]}
    found = at(rows, point)
    assert len(found) == len(answers) > 0
    for index, row in enumerate(found):
        given, expected = from_json(row["answers"]), answers[index]
        if task.output_type == "generate_until":
            assert given == expected, (point, index)
        elif task.output_type == "loglikelihood_rolling":
            assert given == pytest.approx(expected, abs=1e-4), (point, index)
        else:
            assert [one[0] for one in given] == pytest.approx([one[0] for one in expected], abs=1e-4), (point, index)
            assert [one[1] for one in given] == [one[1] for one in expected], (point, index)
        if task.choose_metric().is_mean and len(task.task._filters) == 1:
            assert row["values"][task.choose_metric().key] == samples[index][task.choose_metric().name]
    for metric in task.metrics:
        values = [row["values"][metric.key] for row in found]
        expected = results["results"][task.name][f"{metric.name},{metric.filter}"]
        is_exact = metric.name.startswith(("acc", "exact_match", "f1"))
        assert task.aggregate(metric.key, values) == (expected if is_exact else pytest.approx(expected, rel=1e-4))


@pytest.mark.parametrize(
    ("name", "alphas"),
    [("choice", ALPHAS), ("text", ALPHAS), ("generate", ALPHAS)]
    + [(name, ALPHAS[::5]) for name in ("mutual", "pairs", "last_word")],
)
def test_every_point_gives_what_lm_eval_gives(
    name: str, alphas: tuple[float, ...], folder: Path, ensemble: Ensemble, tmp_path: Path
) -> None:
    task = load_task(folder, name, limit=3 if name == "generate" else None)
    sweep, rows = swept(ensemble, task, tmp_path / "out", alphas=alphas)
    assert sweep.points == [GridPoint(rule, alpha) for rule in RULES for alpha in alphas]
    for point in sweep.points:
        results = run_lm_eval(task, ensemble.at(point), ensemble.checked.tokenizer)
        assert_like_lm_eval(rows, point, results, task)


@pytest.mark.parametrize("name", ["choice", "generate"])
def test_few_shot_prompts_and_contexts_that_are_cut(
    name: str, folder: Path, ensemble: Ensemble, tmp_path: Path
) -> None:
    """Solved examples before each question are too much for members with 48 tokens of context."""
    short = {"max_position_embeddings": 48}
    members = save_ensemble(tmp_path / "short", source_pt={"family": "llama", **short})
    task = load_task(folder, name, num_fewshot=4)
    sweep, rows = swept(members, task, tmp_path / "out")
    assert sweep.num_truncated(sweep.tasks[0]) > 0
    for point in sweep.points:
        results = run_lm_eval(task, members.at(point), members.checked.tokenizer, max_length=48)
        assert_like_lm_eval(rows, point, results, task)


def test_the_demo_family_on_its_own_task(tmp_path: Path) -> None:
    checked = check_ensemble(read(demo_folder()))
    demo = Ensemble(checked, EnsembleForCausalLM.from_checked(checked))
    (task,) = load_tasks([str(demo_task())], limit=6)
    sweep, rows = swept(demo, task, tmp_path / "out", alphas=(0.0, 0.4, 0.8, 1.0, 1.3))
    right = {point: sum(row["values"]["exact_match"] for row in at(rows, point)) for point in sweep.points}
    assert len(set(right.values())) > 2  # α matters here
    for point in sweep.points:
        results = run_lm_eval(task, demo.at(point), checked.tokenizer)
        assert_like_lm_eval(rows, point, results, task)


@pytest.mark.parametrize("name", ["choice", "generate", "text", "targets"])
def test_the_batch_size_does_not_matter(name: str, folder: Path, ensemble: Ensemble, tmp_path: Path) -> None:
    """Texts are the same, sampled ones too; log-probs to rounding."""
    task = load_task(folder, name)
    by_size = [swept(ensemble, task, tmp_path / f"{size}", batch_size=size)[1] for size in (1, 2, 8)]
    for rows in by_size[1:]:
        for one, other in zip(flat(rows), flat(by_size[0]), strict=True):
            assert [one[key] for key in ("id", "rule", "alpha")] == [other[key] for key in ("id", "rule", "alpha")]
            if task.output_type == "generate_until":
                assert one == other
            else:
                assert numbers(one["answers"]) == pytest.approx(numbers(other["answers"]), abs=1e-4)


def flat(rows: Rows) -> list[dict[str, Any]]:
    return [row for of in rows.values() for row in of]


def numbers(value: Any) -> list[float]:
    return [number for one in value for number in numbers(one)] if isinstance(value, list) else [float(value)]


def test_sampled_texts_of_a_point_are_those_of_the_point_alone(
    folder: Path, ensemble: Ensemble, tmp_path: Path
) -> None:
    task = load_task(folder, "targets")
    _, rows = swept(ensemble, task, tmp_path / "grid", alphas=ALPHAS, seed=5)
    texts = {point: [row["answers"] for row in at(rows, point)] for point in (GridPoint("eft", 0.7),)}
    assert all(len(answers[0]) == 2 for answers in texts[GridPoint("eft", 0.7)])  # repeats
    assert any(answers[0][0] != answers[0][1] for answers in texts[GridPoint("eft", 0.7)])
    for rule in RULES:
        for alpha in (0.0, 0.3, 0.7, 1.5):
            path = tmp_path / f"{rule}{alpha}"
            sweep, alone = swept(ensemble, task, path, rules=(rule,), alphas=(alpha,), seed=5)
            point = GridPoint(rule, alpha)
            assert point in sweep.grid
            assert at(alone, point) == at(rows, point)
    _, others = swept(ensemble, task, tmp_path / "seed", alphas=(0.7,), seed=6)
    assert at(others, GridPoint("eft", 0.7)) != at(rows, GridPoint("eft", 0.7))


def test_a_sampled_text_depends_on_no_other_example(folder: Path, ensemble: Ensemble, tmp_path: Path) -> None:
    """Which examples choose α, and how many there are, changes no text."""
    task = load_task(folder, "targets")
    _, whole = swept(ensemble, task, tmp_path / "whole")
    for name, changes in {"drawn": {"validation": "2"}, "split": {"validation": "train"}}.items():
        _, rows = swept(ensemble, task, tmp_path / name, **changes)
        assert {example: rows[example] for example in whole if example in rows} == {
            example: whole[example] for example in whole if example in rows
        }
    _, few = swept(ensemble, load_task(folder, "targets", limit=2), tmp_path / "few")
    assert few == {example: whole[example] for example in few}


def test_greedy_texts_are_made_once_for_all_repeats(folder: Path, ensemble: Ensemble, tmp_path: Path) -> None:
    path = folder / "targets.yaml"
    path.write_text(path.read_text().replace("do_sample: true, temperature: 0.9", "do_sample: false"))
    _, rows = swept(ensemble, load_task(folder, "targets"), tmp_path / "out")
    assert all(len(row["answers"][0]) == 2 and len(set(row["answers"][0])) == 1 for row in flat(rows))


def test_rows_are_strict_json_even_of_forbidden_tokens(folder: Path, tmp_path: Path) -> None:
    """A capital is a token of the anchor alone: its log-prob under base-change is −inf."""
    extended = {"family": "llama", "vocab_size": 70, "num_extra": 6}
    members = save_ensemble(tmp_path / "members", source_ft=extended)
    rows = [{"question": "aB", "choices": ["c", "A"], "answer": 0}] * 2 + [{**QUESTION, "question": "x"}]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sweep = Sweep(members.checked, [load_task(folder, "choice")], options(select="perplexity"))
    run_sweep(sweep, members.model, tmp_path / "out")
    text = (tmp_path / "out" / "rows.jsonl").read_text()
    assert '"-inf"' in text
    for line in text.splitlines():
        json.loads(line, parse_constant=_refuse)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


QUESTION = {"choices": ["c", "d"], "answer": 1}
