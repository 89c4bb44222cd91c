"""What is chosen and reported: validation chooses, test reports, the statistics are those of scipy on the rows."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from scipy.stats import binomtest
from sweep_cases import Ensemble, Rows, data_flags, options, rigged, save_ensemble, summary_of, swept, write_questions

from ensembler.engine.grid import GridPoint
from ensembler.errors import ConfigError
from ensembler.evaluation.parts import split_examples
from ensembler.evaluation.pictures import draw_sweep
from ensembler.evaluation.report import make_report
from ensembler.evaluation.statistics import accuracy_interval
from ensembler.evaluation.summary import summarise, to_json
from ensembler.evaluation.sweep import Sweep, levels
from ensembler.evaluation.task_files import make_task_from_file
from ensembler.evaluation.tasks import EvalTask
from ensembler.rules import RULES, get_rule


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Ensemble:
    return save_ensemble(tmp_path_factory.mktemp("members"))


def make_task(folder: Path, number: int = 60, **settings: Any) -> EvalTask:
    path = write_questions(folder / "q.jsonl", number)
    flags = dict(zip(data_flags(path)[2::2], data_flags(path)[3::2], strict=True))
    names = {name.removeprefix("--"): value for name, value in flags.items()}
    return make_task_from_file(path, **names, **settings)


def planned(ensemble: Ensemble, task: EvalTask, **changes: Any) -> Sweep:
    return Sweep(ensemble.checked, [task], options(**{"validation": "20", **changes}))


def test_validation_chooses_and_test_reports(ensemble: Ensemble, tmp_path: Path) -> None:
    """On validation α = 1 is best, on test 0.5: the choice is 1, and its figure is that of the test examples."""
    sweep = planned(ensemble, make_task(tmp_path), rules=("base-change",), alphas=(0.0, 0.5, 1.0, 1.5))
    right = {"validation": {0.0: 4, 0.5: 8, 1.0: 12, 1.5: 2}, "test": {0.0: 4, 0.5: 30, 1.0: 16, 1.5: 2}}
    summary = summary_of(sweep, rigged(sweep, lambda part, i, point: float(i < right[part][point.alpha])))
    (choice,) = summary.choices
    assert (choice.alpha, choice.by) == (1.0, "validation")
    figures = {figure.label: figure for figure in summary.methods}
    assert figures["base-change α = 1"].test.estimate == 16 / 40
    assert figures["base-change α = 1"].validation == 12 / 20
    assert figures["base-change α = 1"].test.num_rows == 40
    assert [figure.test.estimate for figure in summary.curve] == [0.1, 0.75, 0.4, 0.05]


def test_the_one_standard_error_rule(ensemble: Ensemble, tmp_path: Path) -> None:
    right = {0.0: 4, 0.5: 11, 1.0: 12, 1.5: 2}  # of 20; one standard error of 12 is 2.2
    alphas = tuple(right)
    for rule_used, expected in ((False, 1.0), (True, 0.5)):
        sweep = planned(
            ensemble, make_task(tmp_path), rules=("base-change",), alphas=alphas, one_standard_error=rule_used
        )
        summary = summary_of(sweep, rigged(sweep, lambda part, i, point: float(i < right.get(point.alpha, 0))))
        assert summary.choices[0].alpha == expected


def test_comparisons_are_those_of_scipy_and_corrected_over_all(ensemble: Ensemble, tmp_path: Path) -> None:
    draw = random.Random(3)
    values = {
        (i, point): float(draw.random() < 0.5 + 0.05 * hash(point) % 3 / 10) for i in range(60) for point in range(9)
    }
    sweep = planned(ensemble, make_task(tmp_path))
    places = {point: index for index, point in enumerate(sweep.grid)}
    rows = rigged(sweep, lambda part, i, point: values[i + 20 * (part == "test"), places[point]])
    summary = summary_of(sweep, rows)
    points = {figure.label: GridPoint(figure.rule, figure.alpha) for figure in summary.methods}
    test_ids = [example.id for example in sweep.tasks[0].parts.test]
    for each in summary.differences:
        a, b = (
            [rows[name][places[points[label]]]["values"]["acc"] for name in test_ids]
            for label in (each.method, each.against)
        )
        only_a = sum(x > y for x, y in zip(a, b, strict=True))
        only_b = sum(x < y for x, y in zip(a, b, strict=True))
        expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
        assert each.comparison.p_value == pytest.approx(expected)
        assert each.comparison.test == "exact McNemar"
    for figure in summary.methods:
        found = [rows[name][places[points[figure.label]]]["values"]["acc"] for name in test_ids]
        assert figure.test == accuracy_interval(found)
    order = sorted(summary.differences, key=lambda each: each.comparison.p_value)
    assert order[0].p_holm == pytest.approx(min(1.0, order[0].comparison.p_value * len(order)))
    assert [each.p_holm for each in order] == sorted(each.p_holm for each in order)


def test_equal_formulas_are_compared_once(ensemble: Ensemble, tmp_path: Path) -> None:
    """At α = 1 base-change is EFT; a chosen α = 0 is the member itself."""
    sweep = planned(ensemble, make_task(tmp_path))
    assert sweep.formula(GridPoint("base-change", 1.0)) == sweep.formula(GridPoint("eft", 1.0))
    summary = summary_of(sweep, rigged(sweep, lambda part, i, point: float(point.alpha == 1.0)))
    assert [choice.alpha for choice in summary.choices] == [1.0, 1.0]
    assert {(each.method, each.against) for each in summary.differences} == {
        ("base-change α = 1", "source FT"),
        ("base-change α = 1", "target PT"),
    }
    summary = summary_of(sweep, rigged(sweep, lambda part, i, point: float(point.alpha == 0.0)))
    assert [(each.method, each.against) for each in summary.differences] == [
        ("source FT", "target PT"),
        ("source FT", "base-change α = 1"),
        ("target PT", "eft α = 1"),
    ]


def test_levels_are_the_anchors_of_rules_for_the_same_members() -> None:
    both = {"source_ft": GridPoint("base-change", 0.0), "target_pt": GridPoint("eft", 0.0)}
    assert levels(RULES["base-change"]) == levels(RULES["eft"]) == both
    assert levels(RULES["contrastive"]) == {}  # its cut-off is no part of the expert
    assert levels(RULES["realign"]) == {"reference": GridPoint("realign", 0.0)}
    linear = get_rule("linear", constant={"source_ft": 0.5, "target_pt": 0.5}, slope={"source_pt": -1.0})
    assert levels(linear) == both


def turn(row: dict[str, Any]) -> dict[str, Any]:
    """The row as if the other label were right."""
    return {**row, "values": {"acc": 1 - row["values"]["acc"]}} if "acc" in row["values"] else row


def test_labels_are_not_needed_for_the_choice_by_prompts(ensemble: Ensemble, tmp_path: Path) -> None:
    """Labels turned round give the same choice; the perplexity is that of the prompts' own tokens."""
    task = make_task(tmp_path, 12)
    sweep, rows = swept(ensemble, task, tmp_path / "out", select="perplexity")
    chosen = [choice.alpha for choice in summary_of(sweep, rows).choices]
    turned = {name: list(map(turn, of)) for name, of in rows.items()}
    assert [choice.alpha for choice in summary_of(sweep, turned).choices] == chosen
    for choice in summary_of(sweep, rows).choices:
        totals = {
            point.alpha: sum(rows[f"{example.id}/prompts"][index]["values"]["log_prob"] for example in task.examples())
            for index, point in enumerate(sweep.grid)
            if point.rule == choice.rule and point in sweep.points
        }
        assert choice.alpha == max(totals, key=totals.__getitem__)
        assert choice.by == "prompt perplexity"


def test_a_task_that_does_not_say_wants_the_highest(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    task.task._higher_is_better = {"acc": None}
    assert task.metrics[0].higher_is_better


@pytest.mark.parametrize("num", range(1, 30, 4))
def test_drawn_examples_and_the_rest_are_all_and_none_is_both(num: int, tmp_path: Path) -> None:
    task = make_task(tmp_path, 30)
    parts = split_examples(task, str(num), seed=num)
    ids = [example.id for example in (*parts.validation, *parts.test)]
    assert len(parts.validation) == num
    assert sorted(ids) == sorted(example.id for example in task.examples())
    assert parts == split_examples(task, str(num), seed=num)


@pytest.mark.parametrize("num_fewshot", [None, 2])
def test_documents_that_are_there_twice_do_not_choose(num_fewshot: int | None, tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "label": "ab"[i % 2]} for i in range(10)] * 2
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = make_task_from_file(
        tmp_path / "twice.jsonl", prompt="{question}", choices="a,b", answer="{label}", num_fewshot=num_fewshot
    )
    parts = split_examples(task, "10")
    asked = [{repr(task.bare_requests(example)) for example in part} for part in (parts.validation, parts.test)]
    assert not asked[0] & asked[1]
    assert len(parts.validation) + len(parts.repeated) == 10
    assert len(parts.repeated) > 0


def test_validation_that_is_all_in_test_is_refused(tmp_path: Path) -> None:
    (tmp_path / "same.jsonl").write_text('{"question": "x", "label": "a"}\n' * 6)
    task = make_task_from_file(tmp_path / "same.jsonl", prompt="{question}", choices="a,b", answer="{label}")
    with pytest.raises(ConfigError, match=r"all 2 validation examples .* are among those that are reported"):
        split_examples(task, "2")


def report_of(sweep: Sweep, rows: Rows, picture: bytes = b"PNG") -> str:
    examples = {row["id"]: row for row in sweep.example_rows()}
    return make_report(summarise(sweep, rows), rows, examples, picture, command="ensembler sweep", settings={})


def test_the_report_is_one_safe_page_with_examples_that_changed(ensemble: Ensemble, tmp_path: Path) -> None:
    rows_of_file = [{"question": f"<script>{i}</script> & ?", "label": "ab"[i % 2]} for i in range(60)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of_file))
    task = make_task_from_file(tmp_path / "q.jsonl", prompt="{question}", choices="a,b", answer="{label}")
    sweep = planned(ensemble, task, rules=("base-change",))
    rows = rigged(sweep, lambda part, i, point: float(point.alpha > 0 and i % 2))
    page = report_of(sweep, rows, draw_sweep(summarise(sweep, rows)))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:image/png;base64,)""", page)
    assert "α changed 20 of 40 answers; by acc, 20 examples are better and 0 worse" in page
    shown = re.findall(r"<small>(.*?)</small>", page)
    assert len(shown) == 10
    odd = {example.id for index, example in enumerate(sweep.tasks[0].parts.test) if index % 2}
    assert set(shown) <= odd


def test_the_picture_depends_on_the_figures(ensemble: Ensemble, tmp_path: Path) -> None:
    sweep = planned(ensemble, make_task(tmp_path))
    one, other = (
        draw_sweep(summarise(sweep, rigged(sweep, lambda part, i, point, n=n: float(i < n * point.alpha))))
        for n in (3, 9)
    )
    assert one.startswith(b"\x89PNG")
    assert one != other


def test_metrics_that_are_no_mean_go_by_the_bootstrap(ensemble: Ensemble, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"t": f"a {i}", "x": "b c d"[: 1 + i % 5]}) + "\n" for i in range(60))
    )
    task = make_task_from_file(tmp_path / "p.jsonl", prompt="{t}", answer="{x}", metric="perplexity")
    sweep = planned(ensemble, task, rules=("base-change",))
    rows = rigged(sweep, lambda part, i, point: [-3.0 - point.alpha - i % 3, 1 + i % 2])
    summary = summary_of(sweep, rows)
    assert summary.choices[0].alpha == 0.0  # lower is better
    assert {each.comparison.test for each in summary.differences} == {"paired bootstrap"}
    assert all(figure.test.method == "bootstrap" for figure in summary.methods)
    assert not summary.is_percent
    impossible = rigged(sweep, lambda part, i, point: [-1e9, 1])
    text = to_json([summary_of(sweep, impossible)], sweep, "x")
    json.loads(text, parse_constant=lambda name: 1 / 0)
