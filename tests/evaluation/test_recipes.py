"""Recipes of benchmarks: what they say, and that each kind of fault is told in one line before a weight is loaded."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from click.testing import CliRunner
from helpers.recipe_cases import Change, good, plan, refusal, save_roles, spoilt, write_recipe

from ensembler.cli.bench import bench
from ensembler.engine.grid import GridPoint
from ensembler.errors import ConfigError, VocabularyError
from ensembler.evaluation.documents import TEST, VALIDATION
from ensembler.evaluation.figures import METHODS
from ensembler.evaluation.recipe import Speed
from ensembler.evaluation.recipe_file import read_recipe
from ensembler.vision.answers import KINDS

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_roles(tmp_path_factory.mktemp("roles"))


@pytest.fixture(autouse=True)
def _nothing_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No way to weights is open: whoever takes one fails the test."""

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    for name in (
        "transformers.modeling_utils.PreTrainedModel.from_pretrained",
        "transformers.modeling_utils.load_state_dict",
        "ensembler.modeling.EnsembleForCausalLM.from_checked",
        "safetensors.torch.load_file",
        "torch.load",
    ):
        monkeypatch.setattr(name, load)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def test_a_recipe_of_all_methods_is_planned_without_weights(roles: Path, tmp_path: Path) -> None:
    (study,) = plan(write_recipe(tmp_path / "all.yaml", good(roles))).studies
    needed = [planned for planned in study.plans if planned.run.instead_of is None]
    assert [planned.name for planned in needed] == ["all.ensemble", "all.patched", "all.source_pt", "all.direct"]
    found = {method.key: planned for planned in needed for method in planned.run.methods}
    assert found.keys() == METHODS.keys()
    (task,) = found["base-change"].tasks
    assert (task.task.name, len(task.subsets[TEST]), len(task.subsets[VALIDATION])) == ("tiny_pairs", 4, 2)
    assert {GridPoint("eft", 0.5), GridPoint("base-change", 1.0)} <= set(found["eft"].grid)
    assert found["patch"].checked.config.members["target_pt"].adapter == str(roles / "patch")


def test_what_is_left_out_has_its_default(roles: Path, tmp_path: Path) -> None:
    content = {"models": {"source_ft": str(roles / "source_ft")}, "tasks": ["hellaswag"]}
    recipe = read_recipe(write_recipe(tmp_path / "short.yaml", content))
    (experiment,) = recipe.experiments
    assert (recipe.name, recipe.description, experiment.speed) == ("short", "", Speed())
    assert (experiment.name, experiment.methods, experiment.source) == ("short", ("source_ft",), "")
    assert experiment.alphas == tuple(round(0.1 * i, 1) for i in range(1, 16))
    assert (experiment.validation, experiment.metric, experiment.num_fewshot, experiment.limit) == (None,) * 4
    assert (experiment.cluster, experiment.margin, experiment.gen_kwargs, experiment.system_instruction) == (None,) * 4
    assert (experiment.batch_size, experiment.seed) == (8, 0)


def test_experiments_take_from_the_top_what_they_do_not_say(roles: Path, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        del content["published"], content["published_costs"]
        content["alpha"] = {"eft": 1.0}
        content["experiments"] = [
            {"name": "a", "alpha": {"base-change": 0.3}, "methods": ["base-change", "eft"]},
            {
                "name": "b",
                "models": {"target_pt": "other"},
                "batch_size": 2,
                "validation": 3,
                "alphas": [0.2, 1],
                "speed": False,
            },
        ]

    a, b = read_recipe(write_recipe(tmp_path / "two.yaml", spoilt(good(roles), change))).experiments
    assert a.alpha == {"eft": 1.0, "base-change": 0.3}
    assert b.alpha == {"eft": 1.0}
    assert (a.models["target_pt"].model, b.models["target_pt"].model) == (str(roles / "target_pt"), "other")
    assert a.models["source_ft"] == b.models["source_ft"]
    assert (a.batch_size, b.batch_size, a.validation, b.validation) == (8, 2, "train", "3")
    assert (a.methods, b.methods) == (("base-change", "eft"), tuple(METHODS))
    assert b.alphas == (0.2, 1.0)
    assert (a.speed, b.speed) == (Speed(rounds=2), None)


def test_what_is_asked_of_lm_eval_and_of_the_statistics(roles: Path, tmp_path: Path) -> None:
    said: dict[str, Any] = {
        "cluster": "passage",
        "margin": 2,
        "num_fewshot": 0,
        "apply_chat_template": "tool_use",
        "fewshot_as_multiturn": False,
        "system_instruction": "Answer in one word.",
        "gen_kwargs": {"temperature": 0.8, "do_sample": True},
    }
    (one,) = read_recipe(write_recipe(tmp_path / "one.yaml", {**good(roles), **said})).experiments
    assert {key: getattr(one, key) for key in said} == said
    content = {**good(roles), **said}
    content["experiments"] = [
        {"name": "a", "margin": 0.5, "gen_kwargs": "temperature=0.7"},
        {"name": "b", "margin": None, "apply_chat_template": True},
    ]
    a, b = read_recipe(write_recipe(tmp_path / "two.yaml", content)).experiments
    assert (a.margin, a.gen_kwargs, a.cluster) == (0.5, "temperature=0.7", "passage")
    assert (b.margin, b.gen_kwargs, b.apply_chat_template) == (None, said["gen_kwargs"], True)


def test_examples_are_turns_of_a_chat_where_there_is_one_as_in_lm_eval(tmp_path: Path) -> None:
    content: dict[str, Any] = {"models": {"source_ft": "a"}, "tasks": ["t"]}
    for said in (False, True, "tool_use"):
        path = write_recipe(tmp_path / "r.yaml", {**content, "apply_chat_template": said})
        assert read_recipe(path).experiments[0].fewshot_as_multiturn is bool(said)


def test_models_of_several_seeds(roles: Path) -> None:
    content = good(roles)
    content["models"]["source_ft"] = "of-no-seed"
    del content["models"]["patch"]
    content["seeds"] = [{"source_ft": "source_ft", "patch": "patch"}, {"source_ft": {"model": "b"}, "patch": "b/lora"}]
    (experiment,) = read_recipe(write_recipe(roles / "seeds.yaml", content)).experiments
    assert experiment.methods == tuple(METHODS)  # the patch is there with the seeds
    first, second = experiment.by_seed
    assert first.models == experiment.models
    assert [first.models[role].model for role in ("source_ft", "patch")] == [
        str(roles / "source_ft"),
        str(roles / "patch"),
    ]
    assert [second.models[role].model for role in ("source_ft", "patch")] == ["b", "b/lora"]
    assert second.models["target_pt"] == experiment.models["target_pt"] == first.models["target_pt"]
    assert (second.seeds, second.published) == ((), experiment.published)


def test_an_experiment_without_seeds_is_of_one(roles: Path, tmp_path: Path) -> None:
    (experiment,) = read_recipe(write_recipe(tmp_path / "good.yaml", good(roles))).experiments
    assert experiment.by_seed == [experiment]


def test_models_may_be_those_of_the_seeds_alone(tmp_path: Path) -> None:
    content = {"tasks": ["t"], "seeds": [{"source_ft": "a"}, {"source_ft": "b"}]}
    (experiment,) = read_recipe(write_recipe(tmp_path / "seeds.yaml", content)).experiments
    assert experiment.methods == ("source_ft",)
    assert [one.models["source_ft"].model for one in experiment.by_seed] == ["a", "b"]


def test_a_recipe_cannot_be_changed(roles: Path, tmp_path: Path) -> None:
    (experiment,) = read_recipe(write_recipe(tmp_path / "good.yaml", good(roles))).experiments
    with pytest.raises(ValueError, match="frozen"):
        experiment.limit = 3


def test_paths_are_looked_for_beside_the_recipe(roles: Path, tmp_path: Path) -> None:
    content = {"models": {"target_pt": "target_pt", "patch": "patch"}, "tasks": ["tasks/pairs.yaml"]}
    path = write_recipe(roles / "beside.yaml", content)
    (experiment,) = read_recipe(path).experiments
    assert experiment.models["patch"].model == str(roles / "patch")
    assert experiment.tasks == (str(roles / "tasks/pairs.yaml"),)
    assert [each.name for study in plan(path).studies for each in study.plans] == ["beside.target_pt", "beside.patch"]


def test_published_figures_by_metric_and_costs(roles: Path, tmp_path: Path) -> None:
    (experiment,) = read_recipe(write_recipe(tmp_path / "good.yaml", good(roles))).experiments
    assert experiment.published_figures("tiny_pairs", "patch", "acc") == {"acc": 50.0, "f1": 0.5}
    assert experiment.published_figures("tiny_pairs", "direct", "acc") == {"acc": 75.0}  # of the metric that is shown
    assert experiment.published_figures("tiny_pairs", "eft", "acc") == {}
    assert experiment.published_figures("another", "patch", "acc") == {}
    assert experiment.published_costs == {"patch": {"peak_device_bytes": 1e9}}


def test_the_demo_on_the_command_line() -> None:
    result = CliRunner().invoke(bench, ["demo", "--dry-run"], catch_exceptions=False)
    assert result.exit_code == 0
    printed = " ".join(result.output.split())
    assert "updated.patched: patch, patch+base-change" in printed
    assert "larger.ensemble: source_ft, target_pt, base-change, eft" in printed
    assert "demo_sums (exact_match): 1,000 test examples, alpha chosen of 15 on 400 others" in printed
    assert [path.name for path in Path().iterdir()] == ["cache"]


def put(*keys: Any, value: Any) -> Change:
    """The change that puts a value at a place."""

    def change(content: dict[str, Any]) -> None:
        place: Any = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


def drop(*keys: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        place: Any = content
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]

    return change


READING = {
    "an unknown key": (put("tasksets", value=1), r": unknown key 'tasksets'; did you mean tasks\?$"),
    "a key like no other": (put("zzz", value=1), r": unknown key 'zzz'; expected one of description, experiments,"),
    "of an experiment": (
        put("experiments", value=[{"limits": 3}]),
        r"experiment bad: unknown key 'limits'; did you.* limit",
    ),
    "of speed": (put("speed", "round", value=1), r"speed: unknown key 'round'; did you mean rounds\?$"),
    "of a member": (put("models", "direct", value={"model": "a", "dtyp": "x"}), r"models: direct: unknown key 'dtyp'"),
    "an unknown role": (
        put("models", "source_tf", value="a"),
        r"models: unknown role 'source_tf'; did you mean source_",
    ),
    "no models": (put("models", value={}), r"models: there are none; give them by role: source_ft, "),
    "models in a list": (put("models", value=["a"]), r"models is \['a'\]; expected a mapping"),
    "a model that is a number": (
        put("models", "direct", value=7),
        r"models: direct: member 'direct' is 7; expected a path",
    ),
    "a model without its name": (put("models", "direct", value={"dtype": "auto"}), r"'direct' has no 'model'"),
    "a patch that is a mapping": (put("models", "patch", value={"model": "a"}), r"the patch is \{.*expected the path"),
    "models of no method": (
        put("models", value={"patch": "./a"}),
        r"no method is given; the models patch allow none, so give others too",
    ),
    "an unknown method": (
        put("methods", value=["base-chnage"]),
        r"unknown method 'base-chnage'; did you mean base-change\?",
    ),
    "no method of those that are possible": (
        put("methods", value=[]),
        r"methods: no method is given; the models source_ft, source_pt, target_pt, patch, direct allow source_ft, so",
    ),
    "a method that is a list": (put("methods", value=[["eft"]]), r"unknown method \['eft'\]"),
    "methods as a text": (put("methods", value="eft"), r"methods is 'eft'; expected a list of source_ft,"),
    "a method twice": (put("methods", value=["eft", "eft"]), r"methods: 'eft' is given twice; leave one out"),
    "a role without a model": (
        lambda content: (content["models"].pop("direct"), put("methods", value=["direct"])(content)),
        r"direct needs the model 'direct'; give it under models",
    ),
    "no tasks": (drop("tasks"), r"tasks is None; expected a list"),
    "a task that is a text": (put("tasks", value="sst2"), r"tasks is 'sst2'; expected a list of names"),
    "nothing that chooses": (drop("validation"), r"nothing chooses the alpha of base-change; give validation"),
    "validation that is no number": (
        put("validation", value=True),
        r"validation is True; expected a number of examples",
    ),
    "validation of none": (put("validation", value=0), r"validation is 0; expected a number of examples from 1"),
    "no grid": (put("alphas", value="0.1:1.5"), r"alphas: alpha is '0.1:1.5'; expected a number, or a grid"),
    "an empty grid": (put("alphas", value=[]), r"alphas is empty; expected FIRST:LAST:STEP or a list"),
    "an alpha twice": (put("alphas", value=[0.5, 1, 0.5]), r"alphas: 0.5 is given twice; leave one out"),
    "an alpha that is a text": (put("alphas", value=[0.1, "x"]), r"alphas: number 2 is 'x'; expected a number"),
    "an alpha of a method without": (
        put("alpha", value={"patch": 1}),
        r"alpha: unknown method with an alpha 'patch'; expected one of base-change, eft",
    ),
    "an alpha that is no number": (
        put("alpha", value={"eft": float("nan")}),
        r"alpha: eft is nan; expected a number",
    ),
    "one alpha for all": (put("alpha", value=0.5), r"alpha is 0.5; expected a mapping"),
    "a limit of none": (put("limit", value=0), r"limit is 0; expected a whole number from 1"),
    "a batch that is a text": (put("batch_size", value="8"), r"batch_size is '8'; expected a whole number"),
    "a negative seed": (put("seed", value=-1), r"seed is -1; expected a whole number from 0"),
    "a metric that is a list": (put("metric", value=["acc"]), r"metric is \['acc'\]; expected a text"),
    "rounds that are true": (put("speed", "rounds", value=True), r"speed: rounds is True; expected a whole number"),
    "no prompts": (put("speed", "num_prompts", value=0), r"speed: num_prompts is 0; expected a whole number"),
    "speed that is true": (put("speed", value=True), r"speed is True; expected a mapping"),
    "no experiment": (put("experiments", value=[]), r"experiments is \[\]; expected a list of one or more"),
    "an experiment that is a text": (put("experiments", value=["a"]), r"experiment 1 is 'a'; expected a mapping"),
    "a name that is a list": (put("name", value=["a"]), r"name is \['a'\]; expected a text"),
    "two of one name": (
        put("experiments", value=[{"name": "a"}, {"name": "b"}, {"name": "a"}]),
        r"experiments: two of them are called 'a'; give each a name of its own",
    ),
    "two without a name": (put("experiments", value=[{}, {}]), r"two of them are called 'bad'"),
    "published of an unknown method": (
        put("published", "tiny_pairs", "portllm", value=1),
        r"published: tiny_pairs: unknown method 'portllm'; expected one of source_ft,",
    ),
    "published of a method that is not run": (
        put("methods", value=["source_ft", "patch"]),
        r"published: tiny_pairs: direct is not among the methods; add it",
    ),
    "a published text": (
        put("published", "tiny_pairs", "patch", value="88.7"),
        r"published: tiny_pairs: patch is '88.7'; expected a number",
    ),
    "a published text by metric": (
        put("published", "tiny_pairs", "patch", "f1", value="x"),
        r"published: tiny_pairs: patch: f1 is 'x'; expected a number",
    ),
    "a published nothing": (
        put("published", "tiny_pairs", "patch", value={}),
        r"published: tiny_pairs: patch is \{\}; expected a number",
    ),
    "published in a list": (put("published", value=[1]), r"published is \[1\]; expected a mapping"),
    "published of a task alone": (
        put("published", "tiny_pairs", value=1),
        r"published: tiny_pairs is 1; expected a mapping",
    ),
    "an unknown cost": (put("published_costs", "patch", "memory", value=1), r"costs: patch: unknown cost 'memory'"),
    "a cost of an unknown method": (
        put("published_costs", "lora", value={}),
        r"published_costs: unknown method 'lora'",
    ),
    "a cost of a method that is not run": (
        put("methods", value=["source_ft", "direct"]),
        r"published: tiny_pairs: patch is not among the methods",
    ),
    "seeds that are one": (put("seeds", value=[{"direct": "a"}]), r"seeds is \[.*expected a list of two or more map"),
    "seeds in a mapping": (put("seeds", value={"direct": ["a", "b"]}), r"seeds is \{.*expected a list of two or more"),
    "a seed that is a path": (put("seeds", value=["a", "b"]), r"seeds: number 1 is 'a'; expected a mapping"),
    "a seed of an unknown role": (
        put("seeds", value=[{"direct": "a"}, {"dirct": "b"}]),
        r"seeds: number 2: unknown role 'dirct'; did you mean direct\?",
    ),
    "seeds of other roles": (
        put("seeds", value=[{"direct": "a"}, {"direct": "b", "patch": "./c"}]),
        r"seeds: number 2 has the roles direct, patch; expected those of number 1: direct$",
    ),
    "seeds of no role": (put("seeds", value=[{}, {}]), r"seeds: number 1 has no models; give them by role: source_ft,"),
    "a seed twice": (
        put("seeds", value=[{"direct": "a"}, {"direct": "b"}, {"direct": "a"}]),
        r"seeds: number 3 has the models of an earlier one; give those of another seed",
    ),
    "a seed with a fault": (
        put("seeds", value=[{"direct": "a"}, {"direct": {"model": "b", "dtyp": "auto"}}]),
        r"seeds: number 2: direct: unknown key 'dtyp'",
    ),
    "a margin of nothing": (put("margin", value=0), r"margin is 0; expected a number above 0$"),
    "a margin that is a text": (put("margin", value="1%"), r"margin is '1%'; expected a number$"),
    "a margin without an end": (put("margin", value=float("inf")), r"margin is inf; expected a number$"),
    "a cluster that is a list": (put("cluster", value=["id"]), r"cluster is \['id'\]; expected a text$"),
    "a chat template that is a number": (
        put("apply_chat_template", value=1),
        r"apply_chat_template is 1; expected true, false or the name of a chat template",
    ),
    "turns without a chat template": (
        put("fewshot_as_multiturn", value=True),
        r"fewshot_as_multiturn was given without apply_chat_template; add it",
    ),
    "turns that are a text": (
        put("fewshot_as_multiturn", value="yes"),
        r"fewshot_as_multiturn is 'yes'; expected true or false",
    ),
    "a system instruction that is empty": (put("system_instruction", value=" "), r"system_instruction is ' '; exp"),
    "settings of generation in a list": (
        put("gen_kwargs", value=["temperature=1"]),
        r"gen_kwargs is \[.*\]; expected a mapping, or a text such as temperature=0.8,do_sample=true",
    ),
    "settings of texts for images": (
        lambda content: content.update(images={}, speed=False, system_instruction="Answer."),
        r"system_instruction is a setting of texts; leave it out of an experiment on images",
    ),
    "a cost that is a text": (
        put("published_costs", "patch", "weight_bytes", value="28.7 GB"),
        r"published_costs: patch: weight_bytes is '28",
    ),
}


@pytest.mark.parametrize("fault", READING)
def test_what_a_recipe_cannot_say(fault: str, roles: Path, tmp_path: Path) -> None:
    change, said = READING[fault]
    path = write_recipe(tmp_path / "bad.yaml", spoilt(good(roles), change))
    message = refusal(path, partial(read_recipe, kinds=KINDS))
    assert message.startswith(f"{path}: ")
    assert re.search(said, message), message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no recipe; expected a mapping with models and tasks"),
        ("- a\n- b\n", "is no recipe"),
        ("models: {a: [\n", "cannot be read as a recipe: "),
        ("tasks: [a]\nmodels: {direct: x}\ntasks: [b]\n", "the key 'tasks' is there twice"),
        ("tasks: [a]\nmodels: {direct: x, direct: y}\n", "the key 'direct' is there twice"),
        (
            "models: !!python/object/apply:os.getcwd []\n",
            "cannot be read as a recipe: could not determine a constructor",
        ),
        ("description: \x00", "cannot be read as a recipe: "),
    ],
)
def test_a_file_that_is_no_recipe(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert said in refusal(path, read_recipe)


def test_no_file_a_folder_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    for name, reason in {
        "nowhere.yaml": "No such file or directory; give a YAML file, or `demo`",
        "bytes.yaml": "'utf-8' codec can't decode",
        ".": "Is a directory; give a YAML file, or `demo`",
    }.items():
        with pytest.raises(ConfigError) as found:
            read_recipe(tmp_path / name)
        assert str(found.value).startswith(f"{tmp_path / name} cannot be read as a recipe: {reason}")
        assert "\n" not in str(found.value)


PLANNING = {
    "a model folder that is missing": (
        put("models", "direct", value="./nowhere"),
        r"direct: there is no folder .*nowhere",
    ),
    "a model of the hub, without it": (
        put("models", "direct", value="a-lab/a-model"),
        r"'a-lab/a-model' is no folder here",
    ),
    "a patch that is nowhere": (put("models", "patch", value="my-lora"), "the patch is 'my-lora', which is no folder"),
    "a patch that is missing": (put("models", "patch", value="./nowhere"), r"target_pt: .*nowhere"),
    "a patch that does not fit": (put("models", "patch", value="wider_patch"), r"target_pt: .*wider_patch"),
    "a patch on an adapter": (
        put("models", "target_pt", value={"model": "source_pt", "adapter": "patch"}),
        r"target_pt has an adapter already .*patch apply",
    ),
    "vocabularies that differ": (put("models", "target_pt", value="swapped"), r"target_pt.*\b4\b|\b4\b.*target_pt"),
    "no device": (put("models", "direct", value={"model": "direct", "device": "gpu"}), r"'gpu' is no device"),
    "a task file that is missing": (put("tasks", value=["chocie.yaml"]), r"chocie.yaml does not exist"),
    "a task twice": (put("tasks", value=["tasks/pairs.yaml"] * 2), r"tiny_pairs is given twice"),
    "a split that the task has not": (
        put("validation", value="dev"),
        r"tiny_pairs has no split 'dev'; it has test, train",
    ),
    "the split that is reported": (put("validation", value="test"), r"test split .* is the one that is reported"),
    "more validation than examples": (put("validation", value=4), r"4 of the 4 examples .* leaves none"),
    "a negative alpha": (put("alphas", value=[-0.5, 1]), r"-0.5"),
    "an unknown metric": (put("metric", value="bleu"), r"tiny_pairs has no metric 'bleu'; it has acc, f1"),
    "published of an unknown task": (
        put("published", value={"pairs": {"eft": 1}}),
        r"not run, 'pairs'; did you mean tiny_pairs\?",
    ),
    "published by an unknown metric": (
        put("published", "tiny_pairs", "patch", value={"f1_": 1}),
        r"tiny_pairs by an unknown metric, 'f1_'; did you mean f1\?",
    ),
    "a name that is no folder's": (put("name", value="../a"), r"experiment ../a: its name cannot be one of results"),
}


@pytest.mark.parametrize("fault", PLANNING)
def test_what_cannot_be_run(fault: str, roles: Path) -> None:
    change, said = PLANNING[fault]
    path = write_recipe(roles / "bad.yaml", spoilt(good(roles), change))
    message = refusal(path)
    assert re.match(r"experiment \S+: ", message), message
    assert re.search(said, message), message


def test_the_kind_of_an_error_is_kept(roles: Path) -> None:
    content = spoilt(good(roles), put("models", "target_pt", value="swapped"))
    with pytest.raises(VocabularyError, match=r"^experiment bad: "):
        plan(write_recipe(roles / "bad.yaml", content))


def test_a_task_by_name_that_lm_eval_does_not_know(roles: Path) -> None:
    message = refusal(write_recipe(roles / "bad.yaml", spoilt(good(roles), put("tasks", value=["hellaswagg"]))))
    assert "experiment bad: task 'hellaswagg' is not known; did you mean hellaswag" in message


def test_all_experiments_that_cannot_run_are_named(roles: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        del content["published"]
        bad = {f"b{i}": {"models": {"direct": f"./nowhere{i}"}} for i in range(8)}
        content["experiments"] = [{"name": "good"}, *({"name": name, **each} for name, each in bad.items())]

    message = refusal(write_recipe(roles / "bad.yaml", spoilt(good(roles), change)))
    assert message.startswith("experiment b0: direct: ")
    assert message.endswith("; 7 other experiments cannot run either: b1, b2, b3, b4, b5 ...")


def test_an_unreachable_hub_is_asked_once(roles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(content: dict[str, Any]) -> None:
        del content["published"], content["published_costs"]
        content["methods"] = ["direct"]
        content["models"]["direct"] = "a-lab/a-model"
        content["experiments"] = [{"name": "a"}, {"name": "b"}, {"name": "c"}]

    asked = []

    def ask(name: str, **options: Any) -> None:
        asked.append(name)
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr("ensembler.engine.members.AutoConfig.from_pretrained", ask)
    message = refusal(write_recipe(roles / "bad.yaml", spoilt(good(roles), change)))
    assert "experiment a: direct: 'a-lab/a-model' is no folder here" in message
    assert asked == ["a-lab/a-model"]


def test_the_first_test_of_this_file_can_fail(roles: Path) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(AssertionError, match="weights were loaded"):
        AutoModelForCausalLM.from_pretrained(roles / "direct")


def test_a_key_is_a_text_and_numbers_may_have_exponents(tmp_path: Path) -> None:
    """To YAML 1.1, the key `on` is true, 3 is a number, and 1e9 a text."""
    path = tmp_path / "r.yaml"
    path.write_text(
        "models: {source_ft: a}\ntasks: [t]\npublished: {on: {source_ft: 1}, 3: {source_ft: 5e-1}}\n"
        "published_costs: &costs {source_ft: {weight_bytes: 1e9}}\nexperiments:\n- {published_costs: {<<: *costs}}\n"
    )
    (experiment,) = read_recipe(path).experiments
    assert experiment.published == {"on": {"source_ft": 1.0}, "3": {"source_ft": 0.5}}
    assert experiment.published_costs == {"source_ft": {"weight_bytes": 1e9}}
    path.write_text("models: {source_ft: a}\ntasks: [t]\non: 1\n")
    assert "r.yaml: unknown key 'on'; expected one of description" in refusal(path, read_recipe)


def test_published_figures_are_of_tasks_and_metrics_that_are_there(tmp_path: Path) -> None:
    content: dict[str, Any] = {"models": {"source_ft": "a", "source_pt": "b", "target_pt": "c"}, "tasks": ["pairs"]}
    content["validation"] = 5
    for figures, said in (
        ({"published": {"pairs": {"eft": 1, "source_ft": {"acc": 1, "f1": 2}}}}, None),
        ({"published": {"pair": {"eft": 1}}}, "task that is not run, 'pair'; did you mean pairs?"),
        ({"published_alphas": {"mnli": {"eft": 1}}}, "task that is not run, 'mnli'; expected one of pairs"),
        ({"published": {"pairs": {"eft": {"f1_": 1}}}}, "pairs by an unknown metric, 'f1_'; did you mean f1?"),
    ):
        (experiment,) = read_recipe(write_recipe(tmp_path / "r.yaml", {**content, **figures})).experiments
        with nullcontext() if said is None else pytest.raises(ConfigError, match=re.escape(said)):
            experiment.check_published({"pairs": ["acc", "f1"]})


def test_pydantic_is_not_loaded_with_the_package() -> None:
    code = "import sys, ensembler, ensembler.cli.main, ensembler.config; print('pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("grid", ["0:1:0.1", "0.1:1.5:0.1", "0:2:0.5"])
def test_a_grid_needs_no_quotes(grid: str, tmp_path: Path) -> None:
    """To YAML 1.1, 0:1:0.1 is a number to the base of 60."""
    path = tmp_path / "r.yaml"
    models = "{source_ft: a, source_pt: b, target_pt: c}"
    path.write_text(f"models: {models}\ntasks: [t]\nvalidation: 5\nalphas: {grid}\n")
    (experiment,) = read_recipe(path).experiments
    first, last, step = map(float, grid.split(":"))
    assert experiment.alphas == pytest.approx([first + step * i for i in range(round((last - first) / step) + 1)])
