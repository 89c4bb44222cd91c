"""The recipes of the papers: planned whole on tiny stand-ins for their models, and the gains that the papers print."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from helpers.adapter_cases import save_adapter, save_base
from helpers.recipe_cases import refusal
from helpers.task_cases import write_rows

from ensembler.evaluation.benchmark import Bench
from ensembler.evaluation.documents import TEST, VALIDATION
from ensembler.evaluation.recipe import Experiment
from ensembler.evaluation.recipe_file import read_recipe
from ensembler.vision.answers import KINDS, ImageExperiment

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))
IMAGES = ("basechange_table2", "digits")  # of image classifiers: test_vision_bench.py
PAPERS = [path for path in RECIPES if path.stem.startswith(("basechange", "portllm")) and path.stem not in IMAGES]
PORTLLM = ["boolq", "sst2", "mrpc", "rte", "winogrande", "wnli", "gsm8k"]

PAIR = {"sentence1": "it fell {i}", "sentence2": "she ran {i}"}
ROWS: dict[str, tuple[int, dict[str, str]]] = {
    "boolq": (3, {"passage": "rain {i}", "question": "is it wet {i}", "label": "true"}),
    "sst2": (3, {"sentence": "a fine day {i}", "label": "1"}),
    "mrpc": (3, {**PAIR, "label": "1"}),
    "rte": (3, {**PAIR, "label": "0"}),
    "wnli": (3, {**PAIR, "label": "0"}),
    "winogrande": (3, {"sentence": "the _ fell {i}", "option1": "cup", "option2": "lid", "answer": "1"}),
    "gsm8k": (123, {"question": "what is {i} + 2?", "answer": "so #### {i}"}),
    "humaneval": (23, {"prompt": "def f{i}(x):", "entry_point": "f{i}", "test": "def check(f): f(1)"}),
}


class CodeEval:
    """Stands for the metric that `evaluate` takes from the hub, which HumanEval's functions try when imported."""

    def compute(self, **_: Any) -> Any:
        return {}, {}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluate.load", lambda name: CodeEval())
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/ with data beside the tasks, and those of the hub as files, as the tasks say that it is done."""
    folder = tmp_path_factory.mktemp("examples")
    for name in ("recipes", "tasks"):
        shutil.copytree(EXAMPLES / name, folder / name)
    for path in (folder / "tasks").glob("*.yaml"):
        text = path.read_text("utf-8")
        files = re.search(r"^# +dataset_kwargs: (\{.*\})$", text, re.MULTILINE)
        if files:
            text = re.sub(r"^dataset_path: .*\ndataset_name: .*\n", "", text, flags=re.MULTILINE)
            path.write_text(f"{text}dataset_path: json\ndataset_kwargs: {files.group(1)}\n", "utf-8")
        for file in set(re.findall(r"data/\w+/\w+\.jsonl", text)):
            num, row = ROWS[file.split("/")[1]]
            rows = [{key: value.replace("{i}", str(i)) for key, value in row.items()} for i in range(num)]
            (folder / "tasks" / file).parent.mkdir(parents=True, exist_ok=True)
            write_rows(folder / "tasks" / file, rows)
    return folder


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model and a LoRA of it."""
    folder = tmp_path_factory.mktemp("models")
    base = save_base(folder / "base", max_position_embeddings=2048)
    return {"model": base, "adapter": save_adapter(base, folder / "lora")}


def names(path: Path) -> Iterator[tuple[str, str]]:
    """The kind and the name of each model and adapter of a recipe."""
    for experiment in read_recipe(path, KINDS).experiments:
        for role, member in experiment.models.items():
            yield "adapter" if role == "patch" else "model", member.model
            if member.adapter is not None:
                yield "adapter", member.adapter


def plan_on(path: Path, stand_ins: dict[str, Path]) -> Bench:
    """Plan a recipe with links in the current folder for all that it names."""
    for kind, name in set(names(path)):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).symlink_to(stand_ins[kind])
    return Bench(read_recipe(path, KINDS), confirm_run_unsafe_code=True)


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_a_paper_s_recipe_is_planned_whole(path: Path, examples: Path, stand_ins: dict[str, Path]) -> None:
    planned = plan_on(examples / "recipes" / path.name, stand_ins)
    experiments = planned.recipe.experiments
    assert [study.name for study in planned.studies] == [experiment.name for experiment in experiments]
    for study, experiment in zip(planned.studies, experiments, strict=True):
        for plan in study.plans:
            (task,) = plan.tasks
            name = task.task.name
            assert set(experiment.published) == {name}
            num = len(task.subsets[VALIDATION])
            assert num == (0 if experiments[0].validation is None else {"portllm_gsm8k": 119}.get(name, 20))
            assert len(task.subsets[TEST]) == {"portllm_gsm8k": 123, "base_change_humaneval": 23}.get(name, 3) - num


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_without_its_models_a_recipe_says_which_one_is_missing(path: Path) -> None:
    message = refusal(path)
    assert re.match(r"experiment \S+: \w+: ('[^']+' is no folder here|there is no folder )", message), message


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_what_people_look_for(path: Path) -> None:
    recipe = read_recipe(path, KINDS)
    assert recipe.name == path.stem
    assert recipe.description
    assert len({experiment.name for experiment in recipe.experiments}) == len(recipe.experiments)
    for experiment in recipe.experiments:
        assert isinstance(experiment, ImageExperiment) or all(
            (path.parent / task).is_file() for task in experiment.tasks
        )


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_a_paper_s_recipe_tells_its_source_and_what_to_bring(path: Path) -> None:
    header = path.read_text("utf-8").split("\nname:")[0].replace("\n# ", " ")
    assert "Source: " in header
    assert ("arXiv 2410.10870" in header) is path.stem.startswith("portllm")
    for _, name in names(path):
        if name.startswith("."):
            assert any(said in header for said in wordings(name)), name


def wordings(name: str) -> set[str]:
    """A folder's name, and the same with capitals for its parts."""
    found = {name}
    for part, capitals in (
        (f"_({'|'.join(PORTLLM)})", "_TASK"),
        (r"_r\d+$", "_rN"),
        (r"update_\d", "update_N"),
        (r"portllm/[^/]+", "portllm/MODEL"),
        (r"[^/]+orca$|openplatypus|alpacagpt4", "DATASET"),
    ):
        found |= {re.sub(part, capitals, each) for each in found}
    return found


def figures(name: str) -> dict[str, tuple[Experiment, dict[str, Any]]]:
    """The published figures of a recipe by experiment: accuracy, where there are several."""
    found = {}
    for experiment in read_recipe(EXAMPLES / "recipes" / f"{name}.yaml", KINDS).experiments:
        ((_, by_method),) = experiment.published.items()
        of_accuracy = {method: each if isinstance(each, float) else each["acc"] for method, each in by_method.items()}
        found[experiment.name] = (experiment, of_accuracy)
    return found


def gain(of: dict[str, Any], method: str, other: str) -> float:
    return round(of[method] - of[other], 2)


def gains(name: str, method: str, other: str) -> dict[str, float]:
    return {experiment: gain(of, method, other) for experiment, (_, of) in figures(name).items()}


def test_portllm_s_gains_are_those_that_its_text_prints() -> None:
    """Sections 4.1, 4.2 and 4.4: differences that the authors took of the figures themselves."""
    two = gains("portllm_table2", "patch", "target_pt")
    assert two == dict(zip(PORTLLM, (2.78, 13.19, 13.98, 14.08, 9.95, 25.38, 26.16), strict=True))  # BoolQ "2.7"
    tuned = gains("portllm_table2", "patch", "source_ft")
    assert (tuned["sst2"], tuned["rte"], tuned["gsm8k"], tuned["boolq"]) == (0.11, 1.44, 7.28, -0.77)
    direct = gains("portllm_table2", "patch", "direct")
    assert (direct["winogrande"], direct["wnli"], direct["gsm8k"]) == (-1.04, 1.02, 6.37)
    five = gains("portllm_table5", "patch", "target_pt")
    assert five == dict(zip(PORTLLM, (3.27, 1.72, 10.04, 15.52, 12.31, 16.90, 20.69), strict=True))
    printed = {  # by the arrows of table 3
        "openorca": (2.78, 13.98, 25.38, 9.95),
        "slimorca": (2.91, 12.99, 18.30, 10.61),
        "openplatypus": (6.61, 20.10, 26.76, 9.63),
        "alpacagpt4": (6.58, 17.90, 28.17, 10.11),
    }
    assert gains("portllm_table3", "patch", "target_pt") == {
        f"{data}.{task}": value
        for data, row in printed.items()
        for task, value in zip(("boolq", "mrpc", "wnli", "winogrande"), row, strict=True)
    }


def test_portllm_s_appendices_agree_with_their_text() -> None:
    a = {name: of for name, (_, of) in figures("portllm_a").items()}
    times = ("T1", "T2", "T3", "T4")
    by_task = {task: [gain(a[f"{time}.{task}"], "patch", "target_pt") for time in times] for task in PORTLLM}
    assert (min(by_task["sst2"]), max(by_task["sst2"])) == (9.41, 20.31)
    assert (min(by_task["wnli"]), max(by_task["wnli"])) == (21.12, 30.99)
    assert (min(by_task["gsm8k"]), max(by_task["gsm8k"])) == (16.83, 29.79)
    boolq = [a[f"{time}.boolq"]["patch"] for time in times]
    assert (min(boolq), max(boolq)) == (88.41, 90.24)
    b = {name: of["source_ft"] for name, (_, of) in figures("portllm_b").items()}
    drops = {task: round(b[f"r8.{task}"] - b[f"r32.{task}"], 2) for task in ("boolq", "mrpc", "wnli")}
    assert drops == {"boolq": 1.01, "mrpc": 0.49, "wnli": 2.83}


def test_figures_that_stand_in_several_tables_are_the_same() -> None:
    """θ, θ′, θ_i and the patch of Mistral-7B on OpenOrca; all but SST-2 at T = 1, which the paper prints twice."""
    two = {name: dict(experiment.published) for name, (experiment, _) in figures("portllm_table2").items()}
    prefixes = {"portllm_table4": "mistral-7b.", "portllm_a": "T1.", "portllm_b": "r8."}
    compared = 0
    for name, prefix in {**prefixes, "portllm_a ": "T0."}.items():
        for called, (experiment, _) in figures(name.strip()).items():
            if not called.startswith(prefix) or called == "T1.sst2":
                continue
            ((task, by_method),) = experiment.published.items()
            for method, figure in by_method.items():
                assert two[task.removeprefix("portllm_")][task][method] == figure, (called, method)
                compared += 1
    assert compared == 4 * 4 + 6 * 2 + 3 * 2 + 7 * 2


def test_base_change_s_arrows_are_those_of_its_table() -> None:
    """Table 1 marks what is above and below source FT, in the order of its rows."""
    of = {name: by_method for name, (_, by_method) in figures("basechange_table1").items()}
    above = {method: [each[method] > each["source_ft"] for each in of.values()] for method in ("eft", "base-change")}
    assert above["eft"] == [False, False, True, True, True, False, False, False]
    assert above["base-change"] == [False, True, True, True, True, False, True, True]
    three = {name: by_method for name, (_, by_method) in figures("basechange_table3").items()}
    for mine, other in (("gsm8k", "gsm8k.llama-2-13b"), ("humaneval", "humaneval.llama-2-13b")):
        for method in ("source_ft", "target_pt"):
            assert three[f"{mine}.full"][method] == of[other][method]


def test_table_6_is_twelve_times() -> None:
    (experiment,) = read_recipe(EXAMPLES / "recipes" / "portllm_table6.yaml", KINDS).experiments
    memory = {method: costs["peak_device_bytes"] for method, costs in experiment.published_costs.items()}
    assert round(memory["direct"] / memory["patch"], 1) == 12.2
