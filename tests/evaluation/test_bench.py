"""Figures of a benchmark: each method's are lm-eval's of the same model, the paired statistics scipy's of the rows."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from helpers.bench_cases import ALL, Ran, recipe, run_bench, save_bench_models, write_recipe
from helpers.sweep_cases import column, load_task, read_rows
from helpers.task_cases import run_lm_eval, write_tasks
from peft import PeftModel
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ensembler import EnsembleForCausalLM
from ensembler.errors import MemberError
from ensembler.evaluation.benchmark import Bench
from ensembler.evaluation.documents import TEST, VALIDATION
from ensembler.evaluation.ensemble_plan import Plan
from ensembler.evaluation.methods import plan_runs
from ensembler.evaluation.recipe_file import read_recipe
from ensembler.evaluation.results_file import open_results
from ensembler.evaluation.runner import BEGUN, ERROR, Runner
from ensembler.evaluation.statistics import holm
from ensembler.evaluation.store import Store
from ensembler.evaluation.summary import summarise
from ensembler.evaluation.verdict import verdict


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return save_bench_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks")


def plain(models: dict[str, Any], method: str, alpha: float | None) -> PreTrainedModel:
    """The model of a method, made without the benchmark: by transformers, PEFT's merge, or as an ensemble."""
    if method in ("source_pt", "target_pt", "direct"):
        return AutoModelForCausalLM.from_pretrained(models[method])
    if method in ("source_ft", "patch"):
        base = AutoModelForCausalLM.from_pretrained(models["source_pt" if method == "source_ft" else "target_pt"])
        return PeftModel.from_pretrained(base, models["patch"]).merge_and_unload()
    target = "patch" if method == "patch+base-change" else "target_pt"
    members = {role: plain(models, role, None) for role in ("source_ft", "source_pt")}
    members["target_pt"] = plain(models, target, None)
    rule = "eft" if method == "eft" else "base-change"
    return EnsembleForCausalLM.from_members(rule=rule, alpha=alpha, members=members)


@pytest.mark.parametrize("name", ["choice", "pairs", "generate"])
def test_every_method_is_what_lm_eval_finds(name: str, models: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    ran = run_bench(write_recipe(tmp_path / "r.yaml", recipe(models, folder / f"{name}.yaml")), tmp_path / "out")
    assert not ran.reported
    (found,) = ran.tasks
    assert [method.method for method in found.methods] == list(ALL)
    task = load_task(folder, name)
    tokenizer = AutoTokenizer.from_pretrained(models["source_pt"])
    for method in found.methods:
        assert (method.alpha is None) == (method.method not in ("base-change", "eft", "patch+base-change"))
        model = plain(models, method.method, method.alpha)
        expected = run_lm_eval(task, model, tokenizer)["results"][task.name]
        figures = {found.metric: method.test.estimate, **method.others}
        for key, value in figures.items():
            metric, _, filter_name = key.partition(",")
            assert value == pytest.approx(expected[f"{metric},{filter_name or 'none'}"], abs=1e-6), (method.method, key)


@pytest.fixture(scope="module")
def ran(models: dict[str, Any], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ran, Path]:
    out = tmp_path_factory.mktemp("bench")
    rows = [{"question": f"{chr(97 + i % 26)} {i * 7 % 97}", "choices": ["a", "b"], "answer": i % 2} for i in range(90)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    own = out / "tasks"
    own.mkdir()
    (own / "questions.jsonl").write_text(text)
    (own / "train_questions.jsonl").write_text(text.replace('"question": "', '"question": "x'))
    (own / "choice.yaml").write_text((folder / "choice.yaml").read_text())
    return run_bench(write_recipe(out / "r.yaml", recipe(models, own / "choice.yaml")), out / "out"), out / "out"


def places(ran: Ran) -> dict[str, tuple[str, str, float]]:
    """Where the rows of each method are: run, rule, α."""
    alphas = {method.method: method.alpha for method in ran.tasks[0].methods}
    joint = {"source_ft": ("base-change", 0.0), "target_pt": ("eft", 0.0)}
    found = {name: (f"r.{name}", "linear", 0.0) for name in ("source_pt", "direct")}
    found |= {name: ("r.ensemble", *point) for name, point in joint.items()}
    found |= {name: ("r.ensemble", name, alphas[name]) for name in ("base-change", "eft")}
    found["patch"] = ("r.patched", "eft", 0.0)
    found["patch+base-change"] = ("r.patched", "base-change", alphas["patch+base-change"])
    return found


def test_paired_statistics_are_scipys_on_the_rows(ran: tuple[Ran, Path]) -> None:
    bench, out = ran
    values = {
        name: column(read_rows(out, run), "test", rule, alpha, "acc")
        for name, (run, rule, alpha) in places(bench).items()
    }
    task = bench.tasks[0]
    assert {len(of) for of in values.values()} == {90}
    p_values = []
    for each in task.differences:
        a, b = values[each.method], values[each.against]
        only_a = sum(1 for x, y in zip(a, b, strict=True) if x > y)
        only_b = sum(1 for x, y in zip(a, b, strict=True) if x < y)
        expected = stats.binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
        assert each.comparison.difference.estimate == pytest.approx((sum(a) - sum(b)) / 90)
        assert each.comparison.p_value == pytest.approx(expected)
        p_values.append(expected)
    assert any(p < 1 for p in p_values)
    assert [each.p_holm for each in task.differences] == pytest.approx(holm(p_values))
    for method in task.methods:
        wilson = stats.binomtest(int(sum(values[method.method])), 90).proportion_ci(0.95, method="wilson")
        assert (method.test.low, method.test.high) == pytest.approx((wilson.low, wilson.high))
    compared = {(each.method, each.against) for each in task.differences}
    assert {(name, "source_ft") for name in ALL if name != "source_ft"} <= compared
    assert ("patch", "target_pt") in compared


def test_alpha_is_what_the_validation_rows_choose(ran: tuple[Ran, Path]) -> None:
    bench, out = ran
    for name, run in (("base-change", "r.ensemble"), ("eft", "r.ensemble"), ("patch+base-change", "r.patched")):
        rule = "eft" if name == "eft" else "base-change"
        rows = read_rows(out, run)
        right = {alpha: sum(column(rows, "train", rule, alpha, "acc")) for alpha in (0.2, 0.6, 1.0)}
        best = max(right.values())
        assert bench.method(name).alpha == min(alpha for alpha, num in right.items() if num == best)


def test_only_runs_that_choose_read_the_validation_documents(ran: tuple[Ran, Path]) -> None:
    sizes = {plan.name: sum(1 for _ in plan.documents()) for plan in plans_of(ran[0].bench)}
    assert sizes["r.ensemble"] == sizes["r.patched"] == 180
    assert {sizes[f"r.{name}"] for name in ("source_pt", "direct", "source_ft", "target_pt", "patch")} == {90}


def plans_of(bench: Bench) -> list[Plan]:
    return [plan for study in bench.studies for plan in study.plans]


def test_documents_drawn_for_validation_are_reported_by_no_method(
    models: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path / "r.yaml", recipe(models, folder / "choice.yaml", validation=2))
    ran = run_bench(path, tmp_path / "out")
    (task,) = ran.tasks
    assert (task.num_validation, task.num_test) == (2, 3)
    reported = [{document.name for document in plan.tasks[0].subsets[TEST]} for plan in plans_of(ran.bench)]
    assert all(names == reported[0] for names in reported)
    assert {len(plan.tasks[0].subsets[VALIDATION]) for plan in plans_of(ran.bench)} == {2}


def test_a_given_alpha_needs_no_validation(models: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    content = recipe(
        models,
        folder / "choice.yaml",
        validation=None,
        alpha={"base-change": 0.3, "eft": 0.7, "patch+base-change": 0.3},
    )
    ran = run_bench(write_recipe(tmp_path / "r.yaml", content), tmp_path / "out")
    assert [ran.method(name).alpha for name in ("base-change", "eft", "patch+base-change")] == [0.3, 0.7, 0.3]
    assert {method.chosen_by for method in ran.tasks[0].methods if method.alpha is not None} == {"given"}
    ran = run_bench(write_recipe(tmp_path / "drawn.yaml", {**content, "validation": 2}), tmp_path / "drawn")
    assert (ran.tasks[0].num_validation, ran.tasks[0].num_test) == (0, 3)
    assert "2 drawn for validation are not reported; all alphas were given" in ran.tasks[0].notes


def test_the_curve_is_that_of_the_method_which_chose(models: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """Base-change with the patched target, not base-change at the α that was given."""
    changes = {"methods": ["base-change", "patch+base-change"], "alpha": {"base-change": 0.3}}
    ran = run_bench(
        write_recipe(tmp_path / "r.yaml", recipe(models, folder / "choice.yaml", **changes)), tmp_path / "out"
    )
    (task,) = ran.tasks
    assert {point.method for point in task.curve} == {"patch+base-change"}
    assert task.chosen("base-change") is task.method("patch+base-change")
    alpha = task.method("patch+base-change").alpha
    assert [point.test.estimate for point in task.curve if point.alpha == alpha] == [
        ran.method("patch+base-change").test.estimate
    ]


def test_an_alpha_that_is_given_for_one_method_is_no_choice_of_another(
    models: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    grid = [0.2, 0.6]
    content = recipe(models, folder / "pairs.yaml", alphas=grid, alpha={"eft": 2.0}, methods=["base-change", "eft"])
    (found,) = run_bench(write_recipe(tmp_path / "r.yaml", content), tmp_path / "out").tasks
    assert found.method("eft").alpha == 2.0
    assert found.method("base-change").alpha in grid
    assert {point.alpha for point in found.curve} == set(grid)
    assert not any("no alpha was chosen" in line for line in verdict(found))


def test_a_failure_of_an_earlier_command_does_not_count(models: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    content = recipe(models, folder / "pairs.yaml", methods=["source_pt", "target_pt"])
    bench = Bench(read_recipe(write_recipe(tmp_path / "r.yaml", content)))
    store = Store(tmp_path / "out", bench.settings)
    store.begin("ensembler bench")
    plan, *_ = plans_of(bench)
    store.note(ERROR, plan.name, {"done": 0, "error": "it was out of memory"})
    runner = Runner(store)
    assert runner.errors(bench.studies) == {}
    assert not runner.is_complete(bench.studies, runner.errors(bench.studies))  # it is tried again
    store.note(ERROR, plan.name, {"done": 0, "error": "again"})
    assert runner.errors(bench.studies) == {plan.name: "again"}


def test_members_alone_stand_in_for_an_ensemble_that_fails(
    models: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three models may be too many for a device that holds one."""
    load = EnsembleForCausalLM.from_checked

    def too_large(checked: Any, **options: Any) -> EnsembleForCausalLM:
        if len(checked.config.members) > 2:
            raise RuntimeError("out of memory")
        return load(checked, **options)

    path = write_recipe(tmp_path / "r.yaml", recipe(models, folder / "choice.yaml"))
    whole = run_bench(path, tmp_path / "whole")
    monkeypatch.setattr(EnsembleForCausalLM, "from_checked", too_large)
    ran = run_bench(path, tmp_path / "out")
    assert ran.reported == dict.fromkeys(("r.ensemble", "r.patched"), "RuntimeError: out of memory")
    for name in ALL:
        failed = name in ("base-change", "eft", "patch+base-change")
        assert ran.method(name).error == ("RuntimeError: out of memory" if failed else None)
        assert ran.method(name).test == (None if failed else whole.method(name).test)
    assert ran.tasks[0].not_measured[:3] == tuple(
        f"{name}: RuntimeError: out of memory" for name in ("base-change", "EFT", "base-change with the patched target")
    )
    with open_results(tmp_path / "out") as results:
        assert {name: content["error"] for name, content in results.notes(ERROR)} == ran.reported
    monkeypatch.undo()
    mended = run_bench(path, tmp_path / "out")  # the same command goes on, and what failed is tried again
    assert mended.tasks == whole.tasks


def test_any_error_of_a_model_is_its_row(
    models: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = EnsembleForCausalLM.from_checked

    def broken(checked: Any, **options: Any) -> EnsembleForCausalLM:
        if "direct" in checked.config.members:
            raise MemberError("direct: a tensor is missing")
        return load(checked, **options)

    monkeypatch.setattr(EnsembleForCausalLM, "from_checked", broken)
    ran = run_bench(write_recipe(tmp_path / "r.yaml", recipe(models, folder / "choice.yaml")), tmp_path / "out")
    assert ran.method("direct").error == "MemberError: direct: a tensor is missing"
    assert all(ran.method(name).test is not None for name in ALL if name != "direct")


def begin_run(path: Path, out: Path) -> None:
    """Begin the first run of a recipe, and nothing more."""
    bench = Bench(read_recipe(path))
    with Store(out, bench.settings) as store:
        store.begin("ensembler bench")
        Runner(store)._note_beginning(bench.studies[0].plans[0])


def test_processes_that_are_at_work_are_not_lost(models: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    path, out = write_recipe(tmp_path / "r.yaml", recipe(models, folder / "choice.yaml")), tmp_path / "out"
    for _ in range(3):
        begin_run(path, out)
    assert not run_bench(path, out).reported


def test_a_run_in_which_the_process_is_lost_twice_gives_way_to_its_members(
    models: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system ends a process without memory, which then says nothing."""
    path, out = write_recipe(tmp_path / "r.yaml", recipe(models, folder / "choice.yaml")), tmp_path / "out"
    whole = run_bench(path, tmp_path / "whole")
    for _ in range(2):
        if not (child := os.fork()):
            try:
                begin_run(path, out)
            finally:
                os._exit(1)  # no more is heard of the process
        os.waitpid(child, 0)
    ran = run_bench(path, out)
    assert list(ran.reported) == ["r.ensemble"]
    assert ran.reported["r.ensemble"].startswith("MemoryError: the process was lost in it 2 times without a new row")
    assert ran.method("source_ft").test == whole.method("source_ft").test
    assert ran.method("eft").test is None
    assert ran.method("eft").error == ran.reported["r.ensemble"]
    mended = run_bench(path, out)  # where room was made, say
    assert mended.reported == {}
    assert mended.tasks == whole.tasks
    for _ in range(3):  # what is finished is begun no more
        assert run_bench(path, out).reported == {}
    with open_results(out) as results:
        assert [content["done"] for name, content in results.notes(BEGUN) if name == "r.ensemble"] == [0] * 3


@pytest.mark.parametrize("failing", [(1,), (0, 1)])
def test_processes_whose_ensemble_failed_leave_no_method_out(
    failing: tuple[int, ...], models: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two processes fails, or both; the other one cannot know of it while it runs."""
    load = EnsembleForCausalLM.from_checked
    path, out = (
        write_recipe(tmp_path / "r.yaml", recipe(models, folder / "choice.yaml", batch_size=1)),
        tmp_path / "out",
    )
    whole = run_bench(path, tmp_path / "whole")
    found = []
    for rank in (0, 1):

        def sometimes(checked: Any, rank: int = rank, **options: Any) -> EnsembleForCausalLM:
            if len(checked.config.members) > 2 and rank in failing:
                raise RuntimeError("out of memory")
            return load(checked, **options)

        monkeypatch.setattr(EnsembleForCausalLM, "from_checked", sometimes)
        bench = Bench(read_recipe(path))
        with Store(out, bench.settings) as store:
            store.begin("ensembler bench")
            runner = Runner(store, rank, 2)
            runner.run_studies(bench.studies, lambda num: None, lambda name, reason: None)
            errors = runner.errors(bench.studies)
            if runner.is_complete(bench.studies, errors):
                found.append(summarise(bench.studies, store, errors))
    assert len(found) == 1
    methods = {method.method: method for method in found[0][0].methods}
    for name in ("source_ft", "target_pt", "patch", "source_pt", "direct"):
        assert methods[name].test == whole.method(name).test
    for name in ("base-change", "eft", "patch+base-change"):
        assert methods[name].error == "RuntimeError: out of memory"


def test_members_that_an_ensemble_would_change_run_alone(models: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """A member with a short context would cut the prompts of all of them."""
    short = copy_model(Path(models["source_pt"]), tmp_path / "short", max_position_embeddings=24)
    content = recipe({**models, "source_pt": str(short)}, folder / "choice.yaml", num_fewshot=2)
    ran = run_bench(write_recipe(tmp_path / "r.yaml", content), tmp_path / "out")
    names = [plan.name for plan in plans_of(ran.bench)]
    assert names == [
        f"r.{name}" for name in ("ensemble", "patched", "source_ft", "source_pt", "target_pt", "patch", "direct")
    ]
    task = load_task(folder, "choice", num_fewshot=2)
    tokenizer = AutoTokenizer.from_pretrained(models["source_pt"])
    for name in ("target_pt", "patch"):
        expected = run_lm_eval(task, plain(models, name, None), tokenizer)["results"][task.name]
        assert ran.method(name).test.estimate == pytest.approx(expected["acc,none"])
        assert ran.method(name).others["acc_norm"] == pytest.approx(expected["acc_norm,none"])


def copy_model(source: Path, out: Path, **changes: Any) -> Path:
    """A model's folder with other settings."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **changes}))
    return out


def test_what_is_planned_in_place_of_a_run_says_so(models: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    (experiment,) = read_recipe(write_recipe(tmp_path / "r.yaml", recipe(models, folder / "choice.yaml"))).experiments
    runs = {run.name: run for run in plan_runs(experiment)}
    assert {name: run.instead_of for name, run in runs.items()} == {
        "r.ensemble": None,
        "r.patched": None,
        "r.source_pt": None,
        "r.direct": None,
        "r.source_ft": "r.ensemble",
        "r.target_pt": "r.ensemble",
        "r.patch": "r.patched",
    }
    methods = [method.key for run in runs.values() if run.instead_of is None for method in run.methods]
    assert sorted(methods) == sorted(ALL)
