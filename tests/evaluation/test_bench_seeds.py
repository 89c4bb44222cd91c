"""Benchmarks of models from several seeds of training: figures are means over seeds, and α is one for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from helpers.bench_cases import ALL, Ran, recipe, run_bench, save_bench_models, save_patch, write_recipe
from helpers.sweep_cases import column, read_rows
from helpers.task_cases import write_rows, write_tasks

from ensembler import EnsembleForCausalLM
from ensembler.evaluation.costs import plan_measurements
from ensembler.evaluation.methods import plan_runs
from ensembler.evaluation.recipe_file import read_recipe
from ensembler.evaluation.statistics import compare, metric_interval
from ensembler.evaluation.store import Store

SEEDS = 3
TUNED = {
    "base-change": ("ensemble", "base-change"),
    "eft": ("ensemble", "eft"),
    "patch+base-change": ("patched", "base-change"),
}
"""The run and the rule of each method with an α."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe with three patches of source PT, on 60 questions and 30 that choose α, in groups of five."""
    folder = tmp_path_factory.mktemp("seeds")
    models = save_bench_models(folder / "models")
    patches = [str(save_patch(folder / "models" / "source_pt", folder / f"patch{seed}", seed)) for seed in range(SEEDS)]
    seeds = [{"source_ft": {"model": models["source_pt"], "adapter": patch}, "patch": patch} for patch in patches]
    tasks = write_tasks(folder / "tasks")
    for file, number in (("questions", 60), ("train_questions", 30)):
        rows = [
            {"question": f"{file[0]}{i * 7 % 97} {i}", "choices": ["a", "b"], "answer": i % 2} for i in range(number)
        ]
        write_rows(tasks / f"{file}.jsonl", [{**row, "group": i // 5} for i, row in enumerate(rows)])
    shared = {role: models[role] for role in ("source_pt", "target_pt", "direct")}
    return recipe(shared, tasks / "choice.yaml", seeds=seeds, methods=list(ALL))


@pytest.fixture(scope="module")
def ran(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Ran, Path]:
    out = tmp_path_factory.mktemp("bench")
    return run_bench(write_recipe(out / "r.yaml", content), out / "out"), out / "out"


def values(bench: Ran, out: Path, metric: str = "acc") -> dict[str, np.ndarray]:
    """A metric (seeds, documents) of each method, from the rows."""
    found = {}
    for name in ALL:
        alpha = bench.method(name).alpha
        if name in ("source_pt", "direct"):
            places = [(f"r.{name}", "linear", 0.0)]
        elif name == "target_pt":
            places = [("r.ensemble.seed0", "eft", 0.0)]
        elif name in TUNED:
            run, rule = TUNED[name]
            places = [(f"r.{run}.seed{seed}", rule, alpha) for seed in range(SEEDS)]
        else:
            run, rule = {"source_ft": ("ensemble", "base-change"), "patch": ("patched", "eft")}[name]
            places = [(f"r.{run}.seed{seed}", rule, 0.0) for seed in range(SEEDS)]
        found[name] = np.array(
            [column(read_rows(out, run), "test", rule, alpha, metric) for run, rule, alpha in places]
        )
    return found


def test_what_no_seed_changes_is_run_once(content: dict[str, Any], tmp_path: Path) -> None:
    (experiment,) = read_recipe(write_recipe(tmp_path / "r.yaml", content)).experiments
    runs = {run.name.removeprefix("r."): run for run in plan_runs(experiment)}
    split = [f"{name}.seed{seed}" for name in ("ensemble", "patched") for seed in range(SEEDS)]
    spare = [f"{name}.seed{seed}" for name in ("source_ft", "patch") for seed in range(SEEDS)]
    assert sorted(runs) == sorted([*split, *spare, "source_pt", "direct", "target_pt"])
    assert {name: run.seed for name, run in runs.items() if "seed" not in name} == {
        "source_pt": None,
        "direct": None,
        "target_pt": None,
    }
    assert [method.key for method in runs["ensemble.seed0"].methods] == ["source_ft", "target_pt", "base-change", "eft"]
    for seed in range(SEEDS):
        assert runs[f"ensemble.seed{seed}"].seed == seed
        assert runs[f"ensemble.seed{seed}"].config.members["source_ft"].adapter == experiment.seeds[seed]["patch"].model
        assert runs[f"source_ft.seed{seed}"].instead_of == f"r.ensemble.seed{seed}"
        assert runs[f"patch.seed{seed}"].instead_of == f"r.patched.seed{seed}"
    for seed in (1, 2):
        assert [method.key for method in runs[f"ensemble.seed{seed}"].methods] == ["source_ft", "base-change", "eft"]
    assert runs["target_pt"].instead_of == "r.ensemble.seed0"


def test_figures_are_means_over_the_seeds(ran: tuple[Ran, Path]) -> None:
    bench, out = ran
    assert bench.reported == {}
    of = values(bench, out)
    assert len({tuple(row) for row in of["patch"]}) == SEEDS  # the seeds differ
    (task,) = bench.tasks
    assert (
        "3 seeds of training; the alpha of a method is the same for all, and the curve and the documents that alpha "
        "changed are of the first"
    ) in task.notes
    for method in task.methods:
        table = of[method.method]
        assert method.test is not None
        assert method.test == metric_interval(table)
        assert method.test.estimate == pytest.approx(table.mean())
        assert method.seeds == pytest.approx(() if len(table) == 1 else tuple(table.mean(axis=1)))
        other = values(bench, out, "acc_norm")[method.method]
        assert method.others["acc_norm"] == pytest.approx(other.mean())
        assert (method.standard_error is None) == (len(table) > 1)
    for each in task.differences:
        assert each.comparison == compare(of[each.method], of[each.against])
    tests = {(each.method, each.against): each.comparison.test for each in task.differences}
    assert tests["patch", "source_ft"] == "seeds × documents t"
    assert tests["patch", "target_pt"] == "seeds × documents t"


def test_alpha_is_chosen_by_all_seeds_together(ran: tuple[Ran, Path]) -> None:
    bench, out = ran
    for name, (run, rule) in TUNED.items():
        right = {
            alpha: sum(
                sum(column(read_rows(out, f"r.{run}.seed{seed}"), "train", rule, alpha, "acc")) for seed in range(SEEDS)
            )
            for alpha in (0.2, 0.6, 1.0)
        }
        method = bench.method(name)
        assert method.alpha == max(right, key=lambda alpha: (right[alpha], -alpha))
        assert method.selection is not None
        assert method.selection.metric == pytest.approx(max(right.values()) / 30 / SEEDS)


def test_documents_in_clusters(content: dict[str, Any], ran: tuple[Ran, Path], tmp_path: Path) -> None:
    """The same rows: only what is said of them changes."""
    plain, out = ran
    path = write_recipe(tmp_path / "r.yaml", {**content, "cluster": "group", "margin": 25})
    bench = run_bench(path, out)
    of = values(bench, out)
    groups = [index // 5 for index in range(60)]
    (task,) = bench.tasks
    assert task.num_clusters == 12
    for method in task.methods:
        assert method.test == metric_interval(of[method.method], clusters=groups)
        assert method.alpha == plain.method(method.method).alpha
    for each in task.differences:
        assert each.comparison == compare(of[each.method], of[each.against], clusters=groups)
        assert each.p_equivalent is not None


@pytest.mark.parametrize("failing", [0, 1])
def test_of_a_seed_whose_ensemble_fails_the_members_run_alone(
    failing: int, content: dict[str, Any], ran: tuple[Ran, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = ran
    load = EnsembleForCausalLM.from_checked
    path = write_recipe(tmp_path / "r.yaml", content)
    patch = read_recipe(path).experiments[0].seeds[failing]["patch"].model

    def too_large(checked: Any, **options: Any) -> EnsembleForCausalLM:
        if len(checked.config.members) > 2 and checked.config.members["source_ft"].adapter == patch:
            raise RuntimeError("out of memory")
        return load(checked, **options)

    monkeypatch.setattr(EnsembleForCausalLM, "from_checked", too_large)
    bench = run_bench(path, tmp_path / "out")
    error = "RuntimeError: out of memory"
    assert bench.reported == dict.fromkeys((f"r.ensemble.seed{failing}", f"r.patched.seed{failing}"), error)
    for name in ALL:
        assert bench.method(name).error == (error if name in TUNED else None)
        assert bench.method(name).test == (None if name in TUNED else whole.method(name).test)
    with Store(tmp_path / "out", bench.bench.settings) as store:
        store.begin("ensembler bench")
        assert plan_measurements(bench.bench.studies, store) == []  # of a recipe without speed


def test_costs_are_of_the_first_seed(content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = []

    def measured(load: Any) -> dict[str, Any]:
        adapters.append(load.config["members"]["target_pt"].get("adapter"))
        return {"tokens_per_second": 2.5}

    monkeypatch.setattr("ensembler.evaluation.costs._measure_apart", measured)
    speed = {"rounds": 1, "num_prompts": 1, "new_tokens": 2, "num_examples": 1}
    path = write_recipe(tmp_path / "r.yaml", {**content, "speed": speed, "methods": ["patch", "target_pt"]})
    bench = run_bench(path, tmp_path / "out", costs=True)
    assert adapters == [content["seeds"][0]["patch"], None]
    assert [method.cost["tokens_per_second"].median for method in bench.tasks[0].methods] == [2.5, 2.5]
