"""One pass answers at every α what lm-eval finds with the ensemble of that α in a plain HFLM."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

pytest.importorskip("lm_eval")

from helpers.sweep_cases import Ensemble, load_task, plan_of, save_ensemble
from helpers.task_cases import TASKS, evaluate, figures, figures_of, recorded, run_lm_eval, write_tasks
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, hash_args
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ensembler.engine.grid import GridPoint
from ensembler.errors import ConfigError
from ensembler.evaluation.backends import TransformersBackend
from ensembler.evaluation.documents import Answer, Document
from ensembler.evaluation.grid_lm import GridLM
from ensembler.evaluation.lm_eval_settings import PromptSettings
from ensembler.evaluation.task_loading import load_tasks
from ensembler.evaluation.tasks import TextTask
from ensembler.evaluation.text_answers import TextAnswerer

TURNS = {"apply_chat_template": True, "fewshot_as_multiturn": True, "system_instruction": "be brief"}
POINTS = [*(GridPoint("base-change", alpha) for alpha in (0.0, 0.5, 1.0)), GridPoint("eft", 0.5)]
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'][0] }}: {{ message['content'] }}"
    "{% if not loop.last or add_generation_prompt %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>a: {% endif %}"
)


def save(folder: Path, **families: dict[str, Any]) -> Ensemble:
    """A trio with a chat template."""
    ensemble = save_ensemble(folder, **families)
    ensemble.checked.require_tokenizer().chat_template = TEMPLATE
    return ensemble


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Ensemble:
    return save(tmp_path_factory.mktemp("trio"))


def tokenizer_of(trio: Ensemble) -> PreTrainedTokenizerFast:
    """A copy, which HFLM may change."""
    return copy.deepcopy(trio.checked.require_tokenizer())


def answers_of(
    trio: Ensemble, documents: Sequence[Document], points: Sequence[GridPoint] = POINTS, size: int = 3, **settings: Any
) -> list[list[Answer]]:
    """The answers of the grid, by document and point."""
    answerer = TextAnswerer(trio.checked, **settings)
    batches = [documents[start : start + size] for start in range(0, len(documents), size)]
    with answerer.open():
        return [answers for batch in answerer.answer(batches, points) for answers in batch]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks")


def is_alike(found: Answer, expected: Answer) -> bool:
    try:
        assert_alike(found, expected)
    except AssertionError:
        return False
    return True


def assert_alike(found: Answer, expected: Answer) -> None:
    """Log-probs to 1e-4, what is greedy and texts the same."""
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, tuple):
            assert one == [pytest.approx(other[0], abs=1e-4), other[1]]
        else:
            assert one == (pytest.approx(other, abs=1e-4) if isinstance(other, float) else other)


def check(trio: Ensemble, task: TextTask, *, max_length: int | None = None) -> None:
    """Compare the grid with lm-eval's own runs."""
    task = task.for_model(TextAnswerer(trio.checked).model)
    documents = task.documents()
    answers = answers_of(trio, documents)
    assert all(by_point[0] != by_point[2] for by_point in answers)  # α matters
    for number, point in enumerate(POINTS):
        results = run_lm_eval(task, trio.at(point), tokenizer_of(trio), max_length=max_length)
        expected = recorded(results, task)
        assert len(expected) == len(documents)
        for document, by_point in zip(documents, answers, strict=True):
            assert_alike(by_point[number], expected[document.index])
        found = figures(task, documents, {d.index: a[number] for d, a in zip(documents, answers, strict=True)})
        for key, value in figures_of(results, task).items():
            exact = key.startswith(("acc", "exact_match", "f1"))
            assert found[key] == (value if exact else pytest.approx(value, rel=1e-4)), (point, key)


@pytest.mark.parametrize("name", [task for task in TASKS if task != "targets"])
def test_every_alpha_is_what_lm_eval_finds(name: str, trio: Ensemble, folder: Path) -> None:
    check(trio, load_task(folder, name))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("choice", {"num_fewshot": 2}),
        ("inputs", {"num_fewshot": 1, "limit": 0.4}),
        ("generate", {"num_fewshot": 1, "limit": 2}),
        ("generate", {"gen_kwargs": "max_gen_toks=4,until=a"}),
        ("last_word", {"system_instruction": "be brief"}),
        ("choice", {"apply_chat_template": True}),
        ("mutual", {**TURNS, "num_fewshot": 2}),
        ("generate", {**TURNS, "fewshot_as_multiturn": False, "num_fewshot": 2, "limit": 3}),
    ],
)
def test_options_are_those_of_lm_eval(name: str, settings: dict[str, Any], trio: Ensemble, folder: Path) -> None:
    check(trio, load_task(folder, name, **settings))


@pytest.mark.parametrize("name", ["choice", "generate", "text"])
def test_texts_too_long_are_cut_as_by_lm_eval(name: str, folder: Path, tmp_path: Path) -> None:
    short = save(tmp_path / "short", source_pt={"family": "llama", "max_position_embeddings": 48})
    task = load_task(folder, name, num_fewshot=None if name == "text" else 4)
    answerer = TextAnswerer(short.checked)
    cut = [answerer.encode(document).num_cut for document in task.documents()]
    assert (sum(cut) > 0) == (name != "text")  # which is read in windows
    check(short, task, max_length=48)


FUNCTIONS = """
def prompt(doc):
    return "so: " + doc["question"]

def keep(docs):
    return docs.filter(lambda doc: len(doc["question"]) > 1)

def process(doc, results):
    return {"margin": results[0][0] - results[1][0], "right": results[doc["answer"]][0]}
"""


def test_settings_as_lm_eval_reads_them(trio: Ensemble, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    given: dict[str, Any] = {"num_fewshot": 1, "limit": 0.5, "gen_kwargs": "max_gen_toks=4,until=a"}
    model = HFLM(pretrained=trio.at(POINTS[1]), tokenizer=tokenizer_of(trio), device="cpu")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    chat = {"apply_chat_template": True, "system_instruction": "be brief"}
    results = evaluate(model, tasks=["tiny_choice", "tiny_generate"], task_manager=manager, **given, **chat)
    settings = PromptSettings(**given, **TURNS)
    for task in load_tasks(["tiny_choice", "tiny_generate"], settings, include_path=folder):
        documents = task.for_model(TextAnswerer(trio.checked).model).documents()
        expected = recorded(results, task)
        assert [document.index for document in documents] == sorted(expected) == [0, 1, 2]
        for document, (answers,) in zip(documents, answers_of(trio, documents, POINTS[1:2]), strict=True):
            assert_alike(answers, expected[document.index])


def test_functions_and_groups(trio: Ensemble, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval loads the same group by itself."""
    monkeypatch.chdir(folder)
    (folder / "own.py").write_text(FUNCTIONS)
    text = (folder / "choice.yaml").read_text()
    head = text[: text.index("doc_to_text")].replace("tiny_choice", "tiny_own")
    (folder / "own.yaml").write_text(
        f"{head}doc_to_text: !function own.prompt\nprocess_docs: !function own.keep\ndoc_to_choice: choices\n"
        'doc_to_target: "{{answer}}"\nprocess_results: !function own.process\nmetric_list:\n'
        "  - {metric: margin, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: right, aggregation: mean, higher_is_better: true}\n"
    )
    (folder / "both.yaml").write_text("group: tiny_both\ntask: [tiny_own, tiny_pairs]\n")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    tasks = load_tasks(["tiny_both"], include_path=folder)
    assert {task.name: len(task.documents()) for task in tasks} == {"tiny_own": 4, "tiny_pairs": 4}
    answers = {task.name: answers_of(trio, task.documents()) for task in tasks}
    for number, point in enumerate(POINTS):
        model = HFLM(pretrained=trio.at(point), tokenizer=tokenizer_of(trio), device="cpu")
        results = evaluate(model, tasks=["tiny_both"], task_manager=manager)
        for task in tasks:
            given = {d.index: a[number] for d, a in zip(task.documents(), answers[task.name], strict=True)}
            expected = figures_of(results, task)
            assert figures(task, task.documents(), given) == pytest.approx(expected, abs=1e-4)


def test_another_split_is_what_lm_eval_finds_where_it_is_evaluated(
    trio: Ensemble, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Few-shot examples are drawn from the same split there; ours are others where lm-eval shows the answer."""
    task = load_task(folder, "choice", num_fewshot=2)
    path = folder / "choice.yaml"
    path.write_text(path.read_text().replace("test_split: test", "test_split: train"))
    other = load_task(folder, "choice", num_fewshot=2)
    answers = answers_of(trio, task.documents("train"), POINTS[1:2])
    expected = recorded(run_lm_eval(other, trio.at(POINTS[1]), tokenizer_of(trio)), other)
    assert len(answers) == len(expected) == 4
    leaks = [index for index, (given,) in enumerate(answers) if not is_alike(given, expected[index])]
    assert len(leaks) == 3
    assert "3 questions stand among their own solved examples" in caplog.text


@pytest.mark.parametrize("name", ["choice", "text", "generate", "targets"])
def test_a_batch_and_a_grid_change_nothing(name: str, trio: Ensemble, folder: Path) -> None:
    """Sampled texts, too, depend on the seed and the document alone."""
    documents = load_task(folder, name).documents()
    expected = answers_of(trio, documents, size=1, seed=3)
    for points, size in ((POINTS, 8), (POINTS[1:2], 2)):
        for one, other in zip(answers_of(trio, documents, points, size, seed=3), expected, strict=True):
            for given, of_point in zip(one, other if points is POINTS else other[1:2], strict=True):
                assert_alike(given, [tuple(each) if name == "choice" else each for each in of_point])
    if name == "targets":
        assert all(len(texts) == 2 for by_point in expected for (texts,) in by_point)
        assert answers_of(trio, documents, seed=4) != expected


@pytest.mark.parametrize("think_end", ["t", 23])
def test_thoughts_are_left_out_as_by_hflm(think_end: str | int, trio: Ensemble, folder: Path) -> None:
    task = load_task(folder, "generate")
    ours = GridLM(trio.checked, think_end_token=think_end)
    ours.take(TransformersBackend(trio.model, tokenizer_of(trio)))
    theirs = HFLM(
        pretrained=trio.at(ours.points[0]), tokenizer=tokenizer_of(trio), device="cpu", think_end_token=think_end
    )
    manager = TaskManager(include_defaults=False)
    found, expected = (
        recorded(evaluate(model, tasks=[task.task], task_manager=manager), task) for model in (ours, theirs)
    )
    assert found == expected


def test_a_chat_template_by_its_name(trio: Ensemble, folder: Path) -> None:
    model = TextAnswerer(trio.checked).model
    model.tokenizer.chat_template = {"default": TEMPLATE, "plain": "{{ messages[-1]['content'] }}!"}
    task = load_task(folder, "choice", apply_chat_template="plain")
    assert task.for_model(model).documents()[0].prompt == "ask abc say!"
    for template, name, message in (
        ({"default": TEMPLATE}, "plain", "chat template 'plain' is not available"),
        (None, True, "the anchor's tokenizer has no chat template; leave --apply-chat-template out"),
    ):
        model.tokenizer.chat_template = template
        with pytest.raises(ConfigError, match=message):
            load_task(folder, "choice", apply_chat_template=name).for_model(model)


# -- members, and without them ----------------------------------------------------------------------------------------


def instances(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, given, number, metadata=("t", number, 1)) for number, given in enumerate(arguments)]


ASKED = {
    "loglikelihood": [("ab", " c"), ("", "xyz")],
    "loglikelihood_rolling": [("abcdefg",), ("hi",)],
    "generate_until": [("ab", {"max_gen_toks": 4}), ("abc", {"max_gen_toks": 4})],
}


@pytest.mark.parametrize("kind", ASKED)
def test_answers_want_members(kind: str, trio: Ensemble) -> None:
    model = GridLM(trio.checked, points=POINTS)
    requests = instances(kind, *ASKED[kind])
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"asked without members; load some and give them to take\(\)"):
            getattr(model, kind)(requests, disable_tqdm=True)
        with model.noting() as noted:
            getattr(model, kind)(requests, disable_tqdm=True)
        assert [len(one.tokens) for one in noted] == [1 if kind == "generate_until" else 2] * 2
        model.take(TransformersBackend(trio.model, tokenizer_of(trio)))
        found = getattr(model, kind)(requests, disable_tqdm=True)
        with model.noting() as again:  # loaded members are not asked
            assert repr(getattr(model, kind)(requests, disable_tqdm=True)) != repr(found)
        assert again == noted
        model.take(None)


@pytest.mark.parametrize("given", [{"alpha": 0.5}, {"rule": "eft"}, {"device": "cpu"}, {"dtype": "float32"}])
def test_settings_of_a_folder_are_refused_beside_a_checked_ensemble(given: dict[str, Any], trio: Ensemble) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(given))} was given beside a checked ensemble; set it before"):
        GridLM(trio.checked, **given)


@pytest.mark.parametrize("kind", ASKED)
def test_answers_go_into_the_cache_of_lm_eval_one_by_one(kind: str, trio: Ensemble) -> None:
    """As those of HFLM, so that a run that is interrupted goes on; under the names that lm-eval looks for."""
    ours = GridLM(trio.checked)
    ours.take(TransformersBackend(trio.model, tokenizer_of(trio)))
    theirs = HFLM(pretrained=trio.at(ours.points[0]), tokenizer=tokenizer_of(trio), device="cpu")
    kept: list[dict[str, Any]] = []
    for model in (ours, theirs):
        kept.append({})
        model.set_cache_hook(CacheHook(SimpleNamespace(dbdict=kept[-1])))
        getattr(model, kind)(instances(kind, *ASKED[kind]), disable_tqdm=True)
    found, expected = kept
    assert found.keys() == expected.keys() == {hash_args(kind, asked) for asked in ASKED[kind]}
    for key, answer in expected.items():
        assert found[key] == (answer if isinstance(answer, str) else pytest.approx(answer, abs=1e-4))


def test_the_longest_document_of_each_task_is_measured(trio: Ensemble, folder: Path) -> None:
    plan = plan_of(trio.checked, [load_task(folder, "choice"), load_task(folder, "generate")])
    lengths = {document.name: plan.answerer.encode(document).length for document, _ in plan.documents()}
    assert [one.task for one in plan.longest] == ["tiny_choice", "tiny_generate"]
    for one in plan.longest:
        assert lengths[one.name] == max(n for name, n in lengths.items() if name.startswith(f"{one.task}/"))
