"""A sweep in words and cells: on the terminal and on the page alike."""

from __future__ import annotations

from ensembler.evaluation.formats import show_difference, show_interval, show_metric, show_number, show_p
from ensembler.evaluation.summary import BY_PERPLEXITY, Choice, TaskSummary

COMPARED = ("compared on the same examples", "difference (95 % interval)", "p", "p (Holm)", "test")


def heading(summary: TaskSummary) -> str:
    """Return in words how many examples there were, and what was left out or cut."""
    said = [f"{summary.num_test:,} test examples"]
    if summary.num_validation:
        said.append(f"{summary.num_validation:,} validation examples")
    if summary.num_repeated:
        said.append(f"{summary.num_repeated:,} left out of validation since test has them too")
    if summary.num_fewshot is not None:
        said.append(f"{summary.num_fewshot} examples in each prompt")
    if summary.num_skipped:
        said.append(f"{summary.num_skipped:,} images that cannot be read left out")
    if summary.num_truncated:
        said.append(f"{summary.num_truncated:,} requests cut on the left to fit into the shortest context")
    return "; ".join(said) + f". Version {summary.version} of the task, metric {summary.metric}."


def choice_lines(summary: TaskSummary) -> list[str]:
    """Return one sentence for each rule: its α and how it was chosen."""
    rules = dict.fromkeys(figure.rule for figure in summary.curve)
    return [_choice_line(summary, rule, summary.choice(rule)) for rule in rules]


def _choice_line(summary: TaskSummary, rule: str, choice: Choice | None) -> str:
    if choice is None:
        return (
            f"{summary.task}, {rule}: no alpha was chosen, since the examples that choose it cannot report it too; "
            "give --validation N or a split, or --select perplexity"
        )
    if choice.selection is None:
        return f"{summary.task}, {rule}: alpha {choice.alpha:g} was the only one given, so there was nothing to choose"
    if choice.by == BY_PERPLEXITY:
        return (
            f"{summary.task}, {rule}: alpha {choice.alpha:g} was chosen without labels: it gives the prompts the "
            f"highest likelihood (perplexity {choice.selection.metric:.4g})"
        )
    num = f"{summary.num_validation:,} validation examples"
    line = f"{summary.task}, {rule}: alpha {choice.alpha:g} was chosen on {num}"
    if choice.selection.threshold != choice.selection.best_metric:
        line += f", within one standard error of the best, alpha {choice.selection.best:g}"
    return line


def columns(summary: TaskSummary) -> list[str]:
    """Return the names of the columns of `method_rows`."""
    metric = show_metric(summary.metric, percent=summary.is_percent)
    return ["method", f"{metric} (95 % interval)", *summary.methods[0].others]


def method_rows(summary: TaskSummary) -> list[list[str]]:
    """Return a row of cells for each method: its name, the metric, the task's other metrics."""
    return [
        [
            figure.label,
            show_interval(figure.test, percent=summary.is_percent),
            *(show_number(value, percent=False) for value in figure.others.values()),
        ]
        for figure in summary.methods
    ]


def difference_rows(summary: TaskSummary) -> list[list[str]]:
    """Return a row of cells (`COMPARED`) for each comparison."""
    return [
        [
            f"{each.method} − {each.against}",
            show_difference(each.comparison, percent=summary.is_percent),
            show_p(each.comparison.p_value),
            show_p(each.p_holm),
            each.comparison.test,
        ]
        for each in summary.differences
    ]


def curve_rows(summary: TaskSummary) -> list[list[str]]:
    """Return a row of cells for each point: rule, α, the metric of the test and of the validation examples."""
    percent = summary.is_percent
    return [
        [
            figure.rule,
            f"{figure.alpha:g}",
            show_interval(figure.test, percent=percent),
            "-" if figure.validation is None else show_number(figure.validation, percent=percent),
        ]
        for figure in summary.curve
    ]
