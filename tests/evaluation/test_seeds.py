"""Several seeds: mean squares against statsmodels, coverage by simulation, and the cases that fall back to one seed."""

from __future__ import annotations

import numpy as np
import pytest

stats = pytest.importorskip("scipy.stats")
pytest.importorskip("statsmodels")

from ensembler.errors import ConfigError  # noqa: E402
from ensembler.evaluation.decisions import equivalence  # noqa: E402
from ensembler.evaluation.statistics import compare, mean_interval, metric_interval  # noqa: E402


def drawn(generator: np.random.Generator, seeds: int, documents: int, spreads: tuple[float, ...]) -> np.ndarray:
    """Return values (seeds, documents) of mean 0, with the spread of documents, of seeds, and of the rest."""
    shapes = (1, documents), (seeds, 1), (seeds, documents)
    return sum(spread * generator.normal(size=shape) for spread, shape in zip(spreads, shapes, strict=True))


def test_the_standard_error_is_that_of_the_mean_squares() -> None:
    import pandas
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    generator = np.random.default_rng(0)
    for num_seeds, num_documents in ((3, 8), (5, 12), (2, 20)):
        values = drawn(generator, num_seeds, num_documents, (1.0, 0.8, 0.5))
        seed, document = np.indices(values.shape).reshape(2, -1)
        data = pandas.DataFrame({"y": values.ravel(), "seed": seed, "document": document})
        table = anova_lm(ols("y ~ C(document) + C(seed)", data).fit())
        squares = table["mean_sq"].to_numpy()
        documents, seeds, rest = squares
        found = metric_interval(values)
        variance = max(documents, rest) + max(seeds - rest, 0)
        assert found.standard_error == pytest.approx(np.sqrt(variance / values.size))
        degrees = variance**2 / (squares**2 / table["df"].to_numpy()).sum()
        assert found.degrees_of_freedom == pytest.approx(max(degrees, min(num_seeds, num_documents) - 1))
        reach = stats.t.ppf(0.975, found.degrees_of_freedom) * found.standard_error
        assert (found.low, found.high) == pytest.approx((values.mean() - reach, values.mean() + reach))
        assert (found.method, found.num_rows) == ("seeds × documents", num_documents)


@pytest.mark.parametrize(
    ("shape", "spreads"),
    [
        ((3, 60), (1.0, 0.1, 1.0)),
        ((4, 40), (0.5, 0.2, 1.0)),
        ((5, 100), (1.0, 0.3, 1.0)),
        ((10, 100), (0.3, 0.2, 1.0)),
        ((5, 50), (0.0, 0.5, 0.5)),
        ((5, 50), (1.0, 0.0, 0.0)),
    ],
)
def test_a_mean_is_covered(shape: tuple[int, int], spreads: tuple[float, ...]) -> None:
    generator = np.random.default_rng(1)
    found = [metric_interval(drawn(generator, *shape, spreads)) for _ in range(1000)]
    covered = np.mean([one.low <= 0 <= one.high for one in found])
    assert 0.925 < covered < 0.985, covered


def test_seeds_that_differ_are_not_taken_for_documents() -> None:
    """The mean over seeds, tested over documents alone, finds differences that other seeds would not have."""
    generator = np.random.default_rng(2)
    p_values = []
    for _ in range(600):
        trained = drawn(generator, 4, 80, (1.0, 0.3, 0.5))
        untrained = generator.normal(size=(1, 80))
        blind = stats.ttest_rel(trained.mean(axis=0), untrained[0]).pvalue
        p_values.append((compare(trained, untrained).p_value, blind))
    seeded, blind = (np.array(p_values) <= 0.05).mean(axis=0)
    assert seeded == pytest.approx(0.05, abs=0.03)
    assert blind > 0.1, blind


def test_right_or_wrong_is_covered_and_a_share() -> None:
    generator = np.random.default_rng(3)
    covered = []
    for _ in range(500):
        found = metric_interval(drawn(generator, 3, 60, (1.0, 0.2, 1.0)) > -1.0)
        covered.append(found.low <= stats.norm.sf(-1 / np.sqrt(2.04)) <= found.high)
        assert 0 <= found.low <= found.estimate <= found.high <= 1
    assert 0.92 < np.mean(covered) < 0.985, np.mean(covered)


def test_clusters_and_seeds() -> None:
    generator = np.random.default_rng(4)
    labels = np.repeat(np.arange(30), 4)
    found = []
    for _ in range(400):
        values = drawn(generator, 5, 120, (0.3, 0.2, 0.5)) + generator.normal(size=30)[labels]
        found.append((metric_interval(values, clusters=labels), metric_interval(values)))
    clustered, blind = (np.mean([one.low <= 0 <= one.high for one in each]) for each in zip(*found, strict=True))
    assert 0.92 < clustered < 0.98, clustered
    assert blind < 0.85, blind
    compared = compare(values, np.zeros((1, 120)), clusters=labels)
    assert compared.test == "seeds × clusters t"
    single = metric_interval(values, clusters=range(120))
    assert single.standard_error == pytest.approx(metric_interval(values).standard_error)


def test_one_seed_and_seeds_that_are_alike() -> None:
    generator = np.random.default_rng(5)
    for values in (generator.integers(0, 2, size=(2, 60)), generator.normal(size=(2, 60))):
        a, b = values
        assert metric_interval([a]) == metric_interval(a)
        assert compare([a], [b]) == compare(a, b)
        labels = np.arange(60) // 3
        assert compare([a], [b], clusters=labels) == compare(a, b, clusters=labels)
    copies, plain = metric_interval([a, a, a]), mean_interval(a)
    assert (copies.low, copies.high) == pytest.approx((plain.low, plain.high))
    assert compare([a, a], [a]).p_value == 1.0
    assert metric_interval(np.ones((3, 20))) == metric_interval(np.ones(20))
    assert metric_interval([[0.2], [0.4]]).low == -np.inf
    balanced = compare([[1, 0, 1, 0]] * 2, [[0, 1, 0, 1]] * 2, clusters="aabb")
    assert (balanced.difference.standard_error, balanced.p_value) == (0.0, 1.0)
    trained, other = drawn(generator, 3, 60, (1.0, 0.2, 1.0)), generator.normal(size=(1, 60))
    found, mirrored = compare(trained, other), compare(other, trained)
    assert found.p_value == pytest.approx(mirrored.p_value)
    assert found.difference.low == pytest.approx(-mirrored.difference.high)
    assert found.test == "seeds × documents t"


def test_equivalence_of_seeds() -> None:
    generator = np.random.default_rng(6)
    trained, other = drawn(generator, 3, 60, (1.0, 0.2, 1.0)), generator.normal(size=(1, 60))
    for labels in (None, np.arange(60) // 3):
        difference = compare(trained, other, clusters=labels).difference
        t = (2.0 - abs(difference.estimate)) / difference.standard_error
        expected = stats.t.sf(t, difference.degrees_of_freedom)
        assert equivalence(trained, other, 2.0, clusters=labels) == pytest.approx(expected)
        assert equivalence([trained[0]], other, 2.0, clusters=labels) == pytest.approx(
            equivalence(trained[0], other[0], 2.0, clusters=labels)
        )


def test_seeds_that_do_not_differ_are_as_good_as_so_few_documents_can_tell() -> None:
    """Without a standard error, and of methods that hardly differ, p is what it is of one seed."""
    right = (np.random.default_rng(7).random((3, 40)) < 0.6).astype(float)
    assert equivalence(right, right, 0.02) == pytest.approx(0.98**40)
    assert equivalence(right, right, 0.02, clusters=np.arange(40) // 4) == pytest.approx(0.98**10)
    assert equivalence(np.ones((3, 40)), np.zeros((3, 40)), 0.02) == pytest.approx(1.0)
    balanced = [[1, 0, 1, 0]] * 2, [[0, 1, 0, 1]] * 2
    assert equivalence(*balanced, 0.02, clusters="aabb") == pytest.approx(0.98**2)
    changed = right.copy()
    changed[0, 0] = 1 - changed[0, 0]
    assert equivalence(right, changed, 0.1) >= 0.9**40
    assert np.isnan(equivalence(right - 5, right - 5, 0.02))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metric_interval(np.ones((2, 2, 2))), r"shape \(2, 2, 2\); expected one number for each"),
        (lambda: metric_interval([[1.0, np.nan]]), "row 1 is nan; expected a finite number"),
        (lambda: compare(np.ones((2, 4)), np.ones((3, 4))), "2 and 3 seeds"),
        (lambda: compare(np.ones((2, 4)), np.ones((2, 5))), "4 and 5 rows cannot be paired"),
        (lambda: metric_interval(np.eye(3), clusters="aaa"), "one cluster"),
    ],
)
def test_bad_values(call: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
