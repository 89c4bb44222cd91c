"""The decline of the patch over updates: the line, its crossing of a floor, coverage, sentences and refusals."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from helpers.bench_cases import recipe, save_bench_models, write_recipe
from helpers.commands import Run
from helpers.report_cases import figures
from helpers.scoring_cases import save_models
from helpers.task_cases import write_tasks
from scipy import stats
from statsmodels.regression.linear_model import OLS

from ensembler.errors import ConfigError, EnsemblerError
from ensembler.evaluation.expiry import find_expiries, fit_decline, tell_expiry
from ensembler.evaluation.figures import MethodFigure
from ensembler.evaluation.report import write_report
from ensembler.evaluation.results_file import Measured
from ensembler.evaluation.statistics import metric_interval
from ensembler.evaluation.store import Store

NUM = 300
FALLING = (0.90, 0.85, 0.80, 0.75)


def drawn(chances: Sequence[float], seed: int, num: int = NUM) -> np.ndarray[Any, Any]:
    """Right and wrong answers (updates, documents): a document that is hard at one update is hard at others."""
    generator = np.random.default_rng(seed)
    ability = generator.normal(size=num)
    levels = stats.norm.ppf(np.array(chances)) * math.sqrt(2)
    found = ability + generator.normal(size=(len(chances), num)) + levels[:, None] > 0
    return np.asarray(found, dtype=float)


def exact(chances: Sequence[float], num: int = NUM) -> np.ndarray[Any, Any]:
    """As many right answers as the chances say, the same documents first."""
    return np.array([[float(index < round(chance * num)) for index in range(num)] for chance in chances])


def test_the_line_is_least_squares_with_clustered_errors() -> None:
    rows, floor = drawn(FALLING, seed=1), 0.7
    decline = fit_decline(rows, floor)
    updates, documents = (found.ravel() for found in np.indices(rows.shape))
    design = np.stack([np.ones(rows.size), updates + 1.0], axis=1)
    options = {"groups": documents, "use_correction": False}
    fitted = OLS(rows.ravel(), design).fit(cov_type="cluster", cov_kwds=options)
    assert decline.slope.estimate == pytest.approx(fitted.params[1], rel=1e-9)
    correction = math.sqrt(NUM / (NUM - 1))
    assert decline.slope.standard_error == pytest.approx(fitted.bse[1] * correction, rel=1e-9)
    crossing = decline.crossing
    assert crossing is not None
    assert crossing.estimate == pytest.approx((floor - fitted.params[0]) / fitted.params[1], rel=1e-9)
    for edge in (crossing.low, crossing.high):  # there the line's own interval ends at the floor
        at = np.array([1.0, edge])
        error = math.sqrt(at @ fitted.cov_params() @ at) * correction
        assert abs(at @ fitted.params - floor) / error == pytest.approx(stats.t.ppf(0.975, NUM - 1), rel=1e-6)


def test_intervals_cover_the_truth() -> None:
    """Of 400 sequences of answers about 95 % have slope and crossing within the interval, the crossing beyond them."""
    chances, floor, num = (0.90, 0.84, 0.78, 0.72), 0.66, 400
    declines = [fit_decline(drawn(chances, seed, num=200), floor) for seed in range(num)]
    slopes = sum(one.slope.low <= -0.06 <= one.slope.high for one in declines) / num
    crossings = [one.crossing for one in declines]
    at = sum(one is not None and one.low <= 5 <= one.high for one in crossings) / num
    straight = sum(one.p_straight <= 0.05 for one in declines) / num
    assert 0.925 <= slopes <= 0.975, (slopes, at, straight)
    assert 0.925 <= at <= 0.975, (slopes, at, straight)
    assert 0.025 <= straight <= 0.08, (slopes, at, straight)


def test_unclear_declines_still_cover_the_crossing() -> None:
    """Few documents and a slow decline: many intervals have no end, and about 95 % of all hold the crossing."""
    chances, floor, num = (0.80, 0.78, 0.76), 0.72, 400
    declines = [fit_decline(drawn(chances, seed, num=100), floor) for seed in range(num)]
    unbounded = sum(one.crossing is None or math.isinf(one.crossing.high) for one in declines) / num
    covered = sum(one.crossing is not None and one.crossing.low <= 5 <= one.crossing.high for one in declines) / num
    assert unbounded > 0.5
    assert covered >= 0.925, (unbounded, covered)


def test_scores_off_a_line_are_noticed() -> None:
    assert fit_decline(drawn((0.9, 0.6, 0.9), seed=0), 0.5).p_straight < 1e-6
    assert math.isnan(fit_decline(np.ones((3, 9)), 0.5).p_straight)


def test_lower_is_better_turns_the_line() -> None:
    rows = drawn(FALLING, seed=1)
    up, down = fit_decline(rows, 0.7), fit_decline(1 - rows, 0.3, higher_is_better=False)
    assert up.crossing is not None
    assert down.crossing is not None
    assert down.slope.estimate == pytest.approx(-up.slope.estimate)
    for edge in ("estimate", "low", "high"):
        assert getattr(down.crossing, edge) == pytest.approx(getattr(up.crossing, edge))


@pytest.mark.parametrize("num", [1, 2])
def test_fewer_than_three_updates_are_refused(num: int) -> None:
    with pytest.raises(ConfigError, match=f"{num} updates cannot show a decline; give the results of 3 or more"):
        fit_decline(np.ones((num, 9)), 0.5)


def write_update(folder: Path, values: Sequence[Any], *, other_seed: Sequence[Any] = (), **changes: Any) -> Path:
    """The results of a benchmark of the patch alone, with these values of its documents, of two seeds if so given."""
    name = changes.pop("name", "r")
    member = {"model": folder.name, "fingerprint": folder.name, "adapter_sha256": "p", **changes.pop("member", {})}
    runs = (
        {f"{name}.patch.seed0": values, f"{name}.patch.seed1": other_seed}
        if len(other_seed)
        else {f"{name}.patch": values}
    )
    settings = {"runs": {run: {"ensemble": {"members": {"target_pt": member}}} for run in runs}}
    point: Any = SimpleNamespace(rule="linear", alpha=0.0)
    with Store(folder, settings) as store:
        store.begin("ensembler bench")
        for run, of_run in runs.items():
            documents = [
                SimpleNamespace(name=f"t/test/{index}", task="t", prompt="p", choices=("a", "b"), gold="a")
                for index in range(len(of_run))
            ]
            asked: Any = [(document, "test") for document in documents]
            store.begin_run(run, [point], asked)
            rows = zip(documents, of_run, strict=True)
            store.add(run, [(one.name, [Measured([], {"acc": value}, {})]) for one, value in rows])
    figure = MethodFigure("patch", "the patch", "linear", test=changes.pop("test", None) or metric_interval(values))
    plain = {"experiment": name, "task": "t", "methods": (figure,), "num_test": len(values)}
    task = replace(figures({"patch": [1.0, 0.0]}), **{**plain, **changes})
    write_report(folder, name, "", [task], command="ensembler bench", settings=settings, changed=lambda task: [])
    return folder


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., list[Path]]:
    """Write results with so many right answers at each update; return their folders."""

    def write(*chances: float, **changes: Any) -> list[Path]:
        rows = exact(chances)
        return [write_update(tmp_path / f"u{number}", of_one, **changes) for number, of_one in enumerate(rows, 1)]

    return write


def sentence(folders: Sequence[Path], floor: float) -> str:
    (found,) = find_expiries(folders, floor)
    return tell_expiry(found)


def test_a_decline_is_told_with_its_crossing(written: Callable[..., list[Path]]) -> None:
    folders = written(0.9, 0.84, 0.78, 0.72)
    told = sentence(folders, 66)
    pattern = (
        r"on t the patch declines by 6\.0 \(4\.\d to 7\.\d\) points per update and crosses the floor of 66 % at "
        r"5 updates \(95 % interval 4\.\d+ to 6\.\d+\), an extrapolation beyond the 4 that were measured"
    )
    assert re.fullmatch(pattern, told), told
    assert "at 2.5 updates" in (within := sentence(folders, 81))
    assert within.endswith("within the 4 that were measured")
    assert sentence(folders, 99).endswith("and is below the floor of 99 % from the first update on")
    (found,) = find_expiries(folders, 66)
    assert [score.estimate for score in found.scores] == pytest.approx([0.9, 0.84, 0.78, 0.72])
    assert (found.bases, found.notes) == (("u1", "u2", "u3", "u4"), ())


def test_no_decline_is_told_as_such(tmp_path: Path, written: Callable[..., list[Path]]) -> None:
    told = sentence(written(0.7, 0.8, 0.9), 50)
    assert told.startswith("on t the patch improves by 10.0 (")
    assert told.endswith("points per update, so no crossing of the floor of 50 % is in sight")
    assert sentence(sorted(tmp_path.iterdir()), 95).endswith("is in sight; it is below already")
    weak = drawn((0.80, 0.79, 0.78), seed=7, num=60)
    folders = [write_update(tmp_path / f"weak{number}", row) for number, row in enumerate(weak)]
    told = sentence(folders, 50)
    assert re.search(
        r"shows no decline \(its score changes by -0\.8 \(-\d.* to \d.*\), so no crossing .* dated; ", told
    )
    assert re.search(
        r"would meet it at 30 updates, and the interval of the crossing begins at 5\.\d+ and has no end", told
    )
    assert sentence(folders, 77).endswith(
        "its line is below it from the first update on, and the interval of the crossing has no beginning and no end"
    )
    assert sentence(folders, 99).endswith("it is below already")
    same = [write_update(tmp_path / f"same{number}", [1.0, 0.0, 1.0]) for number in range(3)]
    assert "neither declines nor improves, so no crossing" in sentence(same, 50)


def test_notes_say_what_the_interval_leaves_out(written: Callable[..., list[Path]]) -> None:
    bent = written(0.9, 0.6, 0.9, cluster="subject", num_clusters=3)
    (found,) = find_expiries(bent, 50)
    line, groups = found.notes
    assert line.startswith("the scores do not lie on a straight line (p = ")
    assert groups.startswith("documents count one by one here, not in groups by subject")


def test_experiments_of_other_names_are_one(tmp_path: Path) -> None:
    rows = exact((0.9, 0.8, 0.7))
    folders = [write_update(tmp_path / f"u{at}", row, name=f"recipe{at}") for at, row in enumerate(rows)]
    (found,) = find_expiries(folders, 60)
    assert found.name == "t"
    assert found.decline.slope.estimate == pytest.approx(-0.1)


def test_a_document_counts_once_over_seeds(tmp_path: Path) -> None:
    """The values are the means over seeds, and a note says that the intervals leave other seeds out."""
    one, other = exact((0.9, 0.8, 0.7)), exact((0.7, 0.6, 0.5))
    folders = []
    for at, (values, others) in enumerate(zip(one, other, strict=True)):
        both = metric_interval(np.stack([values, others]))
        figure = MethodFigure("patch", "the patch", "linear", test=both, seeds=(values.mean(), others.mean()))
        folders.append(write_update(tmp_path / f"u{at}", values, other_seed=others, methods=(figure,)))
    (found,) = find_expiries(folders, 50)
    assert found.decline.slope == fit_decline((one + other) / 2, 0.5).slope
    assert found.notes == ("the values are means over the seeds of training; the intervals do not cover other seeds",)


@pytest.mark.parametrize(
    ("changes", "floor", "message"),
    [
        ({}, 0.85, "--floor is 0.85; expected a number from 1 to 100, since acc is in per cent"),
        ({}, 101.0, "--floor is 101; expected"),
        ({}, math.nan, "--floor is nan; expected"),
        ({"tests": "other"}, 50.0, "u3 was tested on other documents of t than"),
        ({"task": "other"}, 50.0, "the patch is in all folders on no task by one metric: .*; run the same tasks"),
        ({"member": {"adapter_sha256": "q"}}, 50.0, "u3 is of another patch than"),
        ({"member": {"fingerprint": "u1"}}, 50.0, "u1 and .*u3 are of the same base; give each update's results once"),
        ({"test": metric_interval([1.0, 0.0])}, 50.0, "u3: acc of t is no mean of finite numbers over documents"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path, written: Callable[..., list[Path]], changes: dict[str, Any], floor: float, message: str
) -> None:
    folders = [*written(0.9, 0.8), write_update(tmp_path / "u3", exact((0.7,))[0], **changes)]
    with pytest.raises(EnsemblerError, match=message) as found:
        find_expiries(folders, floor)
    assert (found.value.exit_code, "\n" in str(found.value)) == (2, False)


def test_results_without_the_patch_are_refused(tmp_path: Path, written: Callable[..., list[Path]]) -> None:
    folders = written(0.9, 0.8, 0.7)
    with pytest.raises(ConfigError, match="2 updates cannot show a decline; give the results of 3 or more"):
        find_expiries(folders[:2], 50)
    failed = write_update(tmp_path / "failed", [1.0], methods=(MethodFigure("patch", "", "linear", error="full"),))
    with pytest.raises(EnsemblerError, match=r"failed: the patch failed on t \(full\); run its command again"):
        find_expiries([*folders, failed], 50)
    other = write_update(tmp_path / "other", [1.0], methods=(MethodFigure("direct", "", "linear"),))
    with pytest.raises(EnsemblerError, match="other has no method 'patch'; add it to the recipe's methods"):
        find_expiries([*folders, other], 50)
    with pytest.raises(EnsemblerError, match="nowhere is no folder; give"):
        find_expiries([*folders, tmp_path / "nowhere"], 50)


def test_benchmarks_of_three_bases_are_read(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the command line: the values are those of the benchmarks, by the ensemble or by the patch alone."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    models = save_bench_models(tmp_path / "models")
    task = write_tasks(tmp_path / "tasks") / "choice.yaml"
    settings = {"family": "llama", "num_layers": 1}
    save_models(tmp_path / "more", source_pt=settings, target_pt=settings, second=settings, third=settings)
    bases = [models["target_pt"], str(tmp_path / "more/second"), str(tmp_path / "more/third")]
    folders = []
    for number, base in enumerate(bases):
        methods = ["patch", "patch+base-change"] if number == 0 else ["patch"]
        content = recipe({**models, "target_pt": base}, task, methods=methods, alphas="1")
        path = write_recipe(tmp_path / f"recipe{number}.yaml", content)
        folders.append(tmp_path / f"results{number}")
        result = run("bench", path, "--output", folders[-1])
        assert result.code == 0, result.err
    result = run("bench", "expiry", "--floor", 50, *folders, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    tests = [json.loads((folder / "summary.json").read_text("utf-8"))["tasks"][0]["methods"][0] for folder in folders]
    scores = [test["test"]["estimate"] for test in tests]
    assert [score["estimate"] for score in found["scores"]] == scores
    assert found["decline"]["slope"]["estimate"] == pytest.approx((scores[2] - scores[0]) / 2)
    assert found["bases"] == ["target_pt", "second", "third"]
    printed = run("bench", "expiry", "--floor", 50, *folders)
    assert printed.code == 0
    assert found["sentence"] in printed.out
    again = run("bench", "expiry", "--floor", 50, folders[0], folders[1], folders[0])
    assert again.code == 2
    assert "are of the same base" in again.err
