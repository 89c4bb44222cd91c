"""A sweep's rows are what lm-eval's own HFLM finds on an ensemble of each rule and α."""

from __future__ import annotations

import json
import math
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from helpers.sweep_cases import ALPHAS, RULES, Ensemble, Rows, load_task, plan_of, run_plan, save_ensemble, swept
from helpers.task_cases import recorded, run_lm_eval, write_tasks

from ensembler import EnsembleForCausalLM
from ensembler.demo import demo_folder, demo_task
from ensembler.engine.grid import GridPoint
from ensembler.evaluation.ensemble_plan import Plan
from ensembler.evaluation.lm_eval_settings import PromptSettings
from ensembler.evaluation.results_file import FILE, Measured
from ensembler.evaluation.task_loading import load_tasks
from ensembler.evaluation.tasks import TextTask
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


def at(plan: Plan, rows: Rows, point: GridPoint) -> list[Measured]:
    """What each document came to at one point."""
    return [of_points[plan.grid.index(point)] for of_points in rows.values()]


def assert_like_lm_eval(found: list[Measured], point: GridPoint, results: dict[str, Any], task: TextTask) -> None:
    """Log-probs to 1e-4, texts and figures of every document and of all together."""
    answers = recorded(results, task)
    samples = {sample["doc_id"]: sample for sample in results["samples"][task.name]}
    output_type, metric = task.task.OUTPUT_TYPE, task.metrics[0]
    assert len(found) == len(answers) > 0
    for index, row in enumerate(found):
        given, expected = row.answers, answers[index]
        if output_type == "generate_until":
            assert given == expected, (point, index)
        elif output_type == "loglikelihood_rolling":
            assert given == pytest.approx(expected, abs=1e-4), (point, index)
        else:
            assert [one[0] for one in given] == pytest.approx([one[0] for one in expected], abs=1e-4), (point, index)
            assert [one[1] for one in given] == [one[1] for one in expected], (point, index)
        if metric.is_mean and len(task.task._filters) == 1:
            assert row.values[metric.key] == samples[index][metric.name]
    for metric in task.metrics:
        expected = results["results"][task.name][f"{metric.name},{metric.filter}"]
        is_exact = metric.name.startswith(("acc", "exact_match", "f1"))
        figure = task.aggregate(metric.key, [row.values[metric.key] for row in found])
        assert figure == (expected if is_exact else pytest.approx(expected, rel=1e-4)), (point, metric)


@pytest.mark.parametrize(
    ("name", "alphas"),
    [("choice", ALPHAS), ("text", ALPHAS), ("generate", ALPHAS)]
    + [(name, ALPHAS[::5]) for name in ("mutual", "pairs", "last_word")],
)
def test_every_point_gives_what_lm_eval_gives(
    name: str, alphas: tuple[float, ...], folder: Path, ensemble: Ensemble, tmp_path: Path
) -> None:
    task = load_task(folder, name, limit=3 if name == "generate" else None)
    plan, rows = swept(ensemble, task, tmp_path / "out", alphas=alphas)
    assert plan.points == [GridPoint(rule, alpha) for rule in RULES for alpha in alphas]
    for point in plan.points:
        results = run_lm_eval(task, ensemble.at(point), ensemble.checked.tokenizer)
        assert_like_lm_eval(at(plan, rows, point), point, results, task)


@pytest.mark.parametrize("name", ["choice", "generate"])
def test_few_shot_prompts_and_contexts_that_are_cut(
    name: str, folder: Path, ensemble: Ensemble, tmp_path: Path
) -> None:
    """Solved examples before each question are too much for members with 48 tokens of context."""
    short = {"max_position_embeddings": 48}
    members = save_ensemble(tmp_path / "short", source_pt={"family": "llama", **short})
    task = load_task(folder, name, num_fewshot=4)
    plan, rows = swept(members, task, tmp_path / "out")
    assert plan.tasks[0].num_cut > 0
    for point in plan.points:
        results = run_lm_eval(task, members.at(point), members.checked.tokenizer, max_length=48)
        assert_like_lm_eval(at(plan, rows, point), point, results, task)


def test_the_demo_family_on_its_own_task(tmp_path: Path) -> None:
    checked = check_ensemble(read(demo_folder()))
    demo = Ensemble(checked, EnsembleForCausalLM.from_checked(checked))
    (task,) = load_tasks([str(demo_task())], PromptSettings(limit=6))
    plan, rows = swept(demo, task, tmp_path / "out", alphas=(0.0, 0.4, 0.8, 1.0, 1.3))
    right = {point: sum(row.values["exact_match"] for row in at(plan, rows, point)) for point in plan.points}
    assert len(set(right.values())) > 2  # α matters here
    for point in plan.points:
        results = run_lm_eval(task, demo.at(point), checked.tokenizer)
        assert_like_lm_eval(at(plan, rows, point), point, results, task)


@pytest.mark.parametrize("name", ["choice", "generate", "text", "targets"])
def test_the_batch_size_does_not_matter(name: str, folder: Path, ensemble: Ensemble, tmp_path: Path) -> None:
    """Texts are the same, sampled ones too; log-probs to rounding."""
    task = load_task(folder, name)
    by_size = [swept(ensemble, task, tmp_path / f"{size}", batch_size=size)[1] for size in (1, 2, 8)]
    for rows in by_size[1:]:
        assert list(rows) == list(by_size[0])
        for one, other in zip(flat(rows), flat(by_size[0]), strict=True):
            if task.task.OUTPUT_TYPE == "generate_until":
                assert one == other
            else:
                assert numbers(one.answers) == pytest.approx(numbers(other.answers), abs=1e-4)


def flat(rows: Rows) -> list[Measured]:
    return [row for of in rows.values() for row in of]


def numbers(value: Any) -> list[float]:
    return [number for one in value for number in numbers(one)] if isinstance(value, list) else [float(value)]


def test_sampled_texts_of_a_point_are_those_of_the_point_alone(
    folder: Path, ensemble: Ensemble, tmp_path: Path
) -> None:
    task = load_task(folder, "targets")
    plan, rows = swept(ensemble, task, tmp_path / "grid", alphas=ALPHAS, seed=5)
    point = GridPoint("eft", 0.7)
    texts = [row.answers for row in at(plan, rows, point)]
    assert all(len(answers[0]) == 2 for answers in texts)  # repeats
    assert any(answers[0][0] != answers[0][1] for answers in texts)
    for rule in RULES:
        for alpha in (0.0, 0.3, 0.7, 1.5):
            one, alone = swept(ensemble, task, tmp_path / f"{rule}{alpha}", rules=(rule,), alphas=(alpha,), seed=5)
            point = GridPoint(rule, alpha)
            assert at(one, alone, point) == at(plan, rows, point)
    other, others = swept(ensemble, task, tmp_path / "seed", alphas=(0.7,), seed=6)
    assert at(other, others, GridPoint("eft", 0.7)) != at(plan, rows, GridPoint("eft", 0.7))


def test_a_sampled_text_depends_on_no_other_document(folder: Path, ensemble: Ensemble, tmp_path: Path) -> None:
    """Which documents choose α, and how many there are, changes no text."""
    task = load_task(folder, "targets")
    _, whole = swept(ensemble, task, tmp_path / "whole")
    for name, changes in {"drawn": {"validation": "2"}, "split": {"validation": "train"}}.items():
        _, rows = swept(ensemble, task, tmp_path / name, **changes)
        assert whole.keys() <= rows.keys()
        assert {document: rows[document] for document in whole} == whole
    _, few = swept(ensemble, load_task(folder, "targets", limit=2), tmp_path / "few")
    assert len(few) == 2
    assert few == {document: whole[document] for document in few}


def test_greedy_texts_are_made_once_for_all_repeats(folder: Path, ensemble: Ensemble, tmp_path: Path) -> None:
    path = folder / "targets.yaml"
    path.write_text(path.read_text().replace("do_sample: true, temperature: 0.9", "do_sample: false"))
    _, rows = swept(ensemble, load_task(folder, "targets"), tmp_path / "out")
    assert all(len(row.answers[0]) == 2 and len(set(row.answers[0])) == 1 for row in flat(rows))


def test_rows_are_strict_json_even_of_forbidden_tokens(folder: Path, tmp_path: Path) -> None:
    """A capital is a token of the anchor alone: its log-prob under base-change is −inf."""
    extended = {"family": "llama", "vocab_size": 70, "num_extra": 6}
    members = save_ensemble(tmp_path / "members", source_ft=extended)
    rows = [{"question": "aB", "choices": ["c", "A"], "answer": 0}] * 2 + [{**QUESTION, "question": "x"}]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = plan_of(members.checked, [load_task(folder, "choice")], select="perplexity")
    found = run_plan(plan, tmp_path / "out")
    assert any(-math.inf in numbers(row.answers) for row in flat(found))
    with closing(sqlite3.connect(tmp_path / "out" / FILE)) as connection:
        texts = connection.execute("SELECT answer FROM answers UNION SELECT metric_values FROM measurements").fetchall()
    assert any('"-inf"' in text for (text,) in texts)
    for (text,) in texts:
        json.loads(text, parse_constant=_refuse)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


QUESTION = {"choices": ["c", "d"], "answer": 1}
