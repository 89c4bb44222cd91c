"""The page, its pictures and summary.json hold the figures as they are, and a telephone's browser finds no fault."""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("lxml")

from helpers.browser import CHROMIUM, Browser
from helpers.report_cases import answered, benchmark, changed, clustered, failed, figures, not_finite, right, sweep
from lxml import html

from ensembler.cli.figures_output import print_figures, print_pairs
from ensembler.errors import OutputError
from ensembler.evaluation.figures import (
    MethodFigure,
    TaskFigures,
    cost_table,
    difference_table,
    heading,
    method_table,
    show_number,
)
from ensembler.evaluation.report import changed_by, compare_folders, write_report
from ensembler.evaluation.results_file import FILE
from ensembler.evaluation.verdict import recommendation, verdict

PICTURE = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
CASES: dict[str, Callable[[], list[TaskFigures]]] = {
    "sweep": lambda: [sweep()],
    "benchmark": lambda: [benchmark()],
    "images": lambda: [replace(sweep(), task="digits")],
    "failed": lambda: [failed()],
    "all": lambda: [benchmark(), failed(), clustered(), not_finite()],
}


def write(out: Path, tasks: Sequence[TaskFigures], *, images: bool = False) -> list[str]:
    def changes(task: TaskFigures) -> list[Mapping[str, Any]]:
        method = MethodFigure("eft", "eft", "eft", 1.0)
        found = changed_by(answered(images=images), method, task, lambda document: PICTURE if images else None)
        return [] if found is None or not task.curve else [found]

    settings = {"seed": 0, "hash": "f" * 300, "limit": float("inf")}
    out.mkdir(exist_ok=True)
    return write_report(
        out,
        "GSM8K & more",
        "From 7B to <13B>",
        tasks,
        command="ensembler sweep demo",
        settings=settings,
        changed=changes,
    )


@pytest.fixture(scope="module", params=CASES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[TaskFigures], Path]:
    tasks, out = CASES[request.param](), tmp_path_factory.mktemp(request.param)
    write(out, tasks, images=request.param == "images")
    return tasks, out / "report.html"


def text(node: Any) -> str:
    return " ".join(node.text_content().split())


def expected(task: TaskFigures) -> list[list[list[str]]]:
    """The cells of all tables of a task but that of the curve."""
    tables = filter(None, (method_table(task), cost_table(task), difference_table(task)))
    return [[list(rows[0]), *(list(row.values()) for row in rows)] for rows in tables]


def test_the_verdict_stands_first(written: tuple[list[TaskFigures], Path]) -> None:
    tasks, path = written
    page = html.parse(path).getroot()
    assert [text(node) for node in page.iter("h1", "h2")][:2] == ["GSM8K & more", "Verdict"]
    (section,) = page.xpath("//section[contains(@class, 'verdict')]")
    said = [[text(line) for line in of_task.iter("li")] for of_task in section.findall("ul")]
    advice = [text(line) for line in section.xpath("./p[@class='advice']")]
    assert said[1::2] == [verdict(task) for task in tasks]
    recommended = [recommendation(task) for task in tasks]
    assert advice == [f"Recommendation: {first}" for first, *_ in recommended]
    assert said[::2] == [reasons for _, *reasons in recommended]
    order = [node.tag for node in page.find("body/main").iter("section", "svg", "table", "article", "pre")]
    first = [order.index(tag) for tag in ("section", "svg", "table", "article", "pre") if tag in order]
    assert first == sorted(first)


def test_the_tables_of_the_page_are_the_figures(written: tuple[list[TaskFigures], Path]) -> None:
    tasks, path = written
    shown = [
        [[text(cell) for cell in row.iter("th", "td")] for row in table.iter("tr")]
        for table in html.parse(path).getroot().xpath("//table[contains(@class, 'cards')]")
    ]
    assert shown == [table for task in tasks for table in expected(task)]


def test_the_page_needs_nothing_else_and_is_safe(written: tuple[list[TaskFigures], Path]) -> None:
    page = written[1].read_text("utf-8")
    assert "<script" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert not re.findall(r"url\((?!#)|@import", page)
    root = html.fromstring(page)
    assert all(image.get("alt") for image in root.iter("img"))
    assert all(svg.getparent().get("role") == "img" and svg.getparent().get("aria-label") for svg in root.iter("svg"))


def test_what_is_of_the_first_seed_and_what_is_corrected_together_is_said(tmp_path: Path) -> None:
    seeded = replace(sweep(), methods=tuple(replace(one, seeds=(0.4, 0.5)) for one in sweep().methods), margin=2.0)
    pages = []
    for name, task in (("plain", sweep()), ("seeded", seeded)):
        write(tmp_path / name, [task])
        pages.append(text(html.parse(tmp_path / name / "report.html").getroot()))
    for said in ("Curves are of the first seed of training.", "on this page, p of alike over all tests of that."):
        assert [said in page for page in pages] == [False, True]
    (found, plain) = (
        changed_by(answered(), MethodFigure("eft", "eft", "eft", 1.0, seeds=seeds), sweep())
        for seeds in ((0.4, 0.5), ())
    )
    assert found is not None
    assert plain is not None
    assert found["title"] == f"{plain['title']}, of the first seed of training"


def test_numbers_of_the_tables() -> None:
    rows = {row["method"]: row for row in method_table(benchmark())}
    assert rows["base-change"]["α"] == "0.7 (validation); published 0.9"
    assert rows["base-change"]["published"] == "42.3"
    assert rows["EFT"]["α"] == "1 (given)"
    assert rows["the directly tuned target"]["by seed"] == "60.0, 62.0, 61.0"
    assert rows["base-change"]["f1, published"] == "0.5"
    costs = {row["method"]: row for row in cost_table(benchmark())}
    assert costs["the patch"]["peak device memory"] == "14.20 GiB; published 2.00 GiB"
    assert costs["the patch"]["first token, ms"] == "31 (30 to 34)"
    last = difference_table(benchmark())[-2]
    assert last["would have shown"] == "6.2"
    assert last["p of alike to within 2 points"] == "0.003"
    (first, second) = method_table(not_finite())
    assert first["word_perplexity (95 % interval)"] == "3.5 (-inf to inf)"
    assert second["word_perplexity (95 % interval)"] == "inf"
    (_, published, *_) = method_table(changed(failed(), published_alpha={"base-change": 0.3}))
    assert published["α"] == "published 0.3"
    assert method_table(failed())[1]["acc, % (95 % interval)"].startswith("failed: OutOfMemoryError")


def test_the_summary_is_strict_json_with_the_verdict(tmp_path: Path) -> None:
    tasks = [benchmark(), not_finite()]
    write(tmp_path, tasks)
    content = json.loads((tmp_path / "summary.json").read_text("utf-8"), parse_constant=lambda name: 1 / 0)
    assert [task["verdict"] for task in content["tasks"]] == [verdict(task) for task in tasks]
    assert [task["recommendation"] for task in content["tasks"]] == [recommendation(task) for task in tasks]
    assert content["tasks"][0]["methods"][3]["test"]["estimate"] == benchmark().methods[3].test.estimate  # type: ignore[union-attr]
    assert content["tasks"][1]["methods"][1]["test"]["estimate"] is None
    assert (content["name"], content["command"], content["settings"]["limit"]) == (
        "GSM8K & more",
        "ensembler sweep demo",
        None,
    )


def size(picture: bytes) -> tuple[int, int]:
    assert picture.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", picture[16:24])
    return width, height


def test_pictures_are_those_that_there_is_something_for(tmp_path: Path) -> None:
    assert write(tmp_path / "sweep", [sweep()]) == ["summary.json", "curve.png", "methods.png", "report.html"]
    files = write(tmp_path / "bench", [benchmark()])
    assert files == ["summary.json", "methods.png", "speed.png", "memory.png", "report.html"]
    assert write(tmp_path / "one", [failed()]) == ["summary.json", "report.html"]
    write(tmp_path / "more", [benchmark(), clustered()])
    one, two = (size((tmp_path / name / "methods.png").read_bytes()) for name in ("bench", "more"))
    assert one[0] == two[0]
    assert one[1] < two[1]


def test_a_picture_depends_on_the_figures_alone(tmp_path: Path) -> None:
    """The same figures give the same page to the byte, others another picture."""
    pages = []
    for name, num in (("a", 200), ("b", 200), ("c", 201)):
        write(tmp_path / name, [figures({"source_ft": right(200), "eft": right(num)})])
        pages.append(((tmp_path / name / "report.html").read_bytes(), (tmp_path / name / "methods.png").read_bytes()))
    assert pages[0] == pages[1]
    assert pages[0][1] != pages[2][1]


def test_documents_that_alpha_changed_are_counted_and_drawn() -> None:
    measured = answered()
    found = changed_by(measured, MethodFigure("eft", "EFT", "eft", 1.0), sweep())
    assert found is not None
    assert found["title"] == "EFT, α = 1 beside α = 0"
    assert found["counts"].startswith("α changed 30 of 60 answers; by acc, 30 documents are better and 0 worse. 10 of")
    names = [one["name"] for one in found["examples"]]
    assert len(names) == 10
    assert set(names) <= {document.name for document, _ in measured if document.index % 2}
    assert [one["value"] for one in found["examples"][0]["answers"]] == [0.0, 1.0]
    assert all(len(one["prompt"]) == 702 and one["prompt"].startswith("… ") for one in found["examples"])
    lower = changed_by(measured, MethodFigure("eft", "EFT", "eft", 1.0), replace(sweep(), higher_is_better=False))
    assert lower is not None
    assert "0 documents are better and 30 worse" in lower["counts"]
    other = changed_by(measured, MethodFigure("eft", "EFT", "eft", 1.0), replace(sweep(), is_percent=False))
    assert other is not None
    assert other["counts"] == "α changed 30 of 60 answers. 10 of the changed ones, drawn at random:"
    bare = [(asked, {at: one._replace(predictions={}) for at, one in rows.items()}) for asked, rows in measured]
    assert changed_by(bare, MethodFigure("eft", "EFT", "eft", 1.0), sweep()) is None
    assert changed_by(measured, MethodFigure("eft", "EFT", "eft", 0.0), sweep()) is None
    assert changed_by(measured, MethodFigure("x", "x", "base-change", 1.0), sweep()) is None


def test_changed_documents_are_shown_with_their_answers(tmp_path: Path) -> None:
    write(tmp_path, [sweep()])
    articles = list(html.parse(tmp_path / "report.html").getroot().iter("article"))
    assert len(articles) == 10
    assert all(text(one).endswith("right answer: yes α = 0✗ no α = 1✓ yes") for one in articles)
    write(tmp_path, [sweep()], images=True)
    shown = html.parse(tmp_path / "report.html").getroot().xpath("//article[img]")
    assert len(shown) == 10
    assert all(text(one).endswith("right answer: yes α = 0✗ no α = 1✓ yes") for one in shown)
    write(tmp_path, [replace(sweep(), is_percent=False)])
    unmarked = list(html.parse(tmp_path / "report.html").getroot().iter("article"))
    assert len(unmarked) == 10
    assert all(text(one).endswith("right answer: yes α = 0no α = 1yes") for one in unmarked)


def test_two_folders_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", [benchmark()])
    write(tmp_path / "b", [replace(benchmark(), tests="others"), sweep()])
    pairs = {(pair["experiment"], pair["method"]): pair for pair in compare_folders(tmp_path / "a", tmp_path / "b")}
    both = pairs["llama", "base-change"]
    assert both["a"] == both["b"]
    assert both["a"]["alpha"] == 0.7
    assert both["same_documents"] is False
    assert (pairs["", "eft"]["a"], pairs["", "eft"]["same_documents"]) == (None, None)
    assert all(pair["same_documents"] for pair in compare_folders(tmp_path / "a", tmp_path / "a"))
    print_pairs(list(pairs.values()), "a", "b")
    printed = capsys.readouterr().out
    assert {line.split()[-1] for line in printed.splitlines() if line.startswith("gsm8k")} == {"-"}
    assert {line.split()[-1] for line in printed.splitlines() if line.startswith("llama")} == {"others"}
    (row,) = (line.split() for line in printed.splitlines() if " base-change " in line and "61.5" in line)
    assert row[-10:] == ["base-change", *2 * ["61.5", "(56.6", "to", "66.1)"], "others"]
    assert printed.count("α 0.7, 14 tokens/s") == 2
    assert printed.splitlines()[0].split()[:2] == ["task", "method"]
    assert [line.split()[:4] for line in printed.splitlines() if line.startswith("gsm8k")][:3] == [
        ["gsm8k", "(acc,", "%)", name] for name in ("source", "target", "base-change")
    ]
    assert "α =" not in printed


def test_folders_that_cannot_be_compared(tmp_path: Path) -> None:
    write(tmp_path / "a", [sweep()])
    write(tmp_path / "b", [failed()])

    def refused(b: str) -> str:
        with pytest.raises(OutputError) as caught:
            compare_folders(tmp_path / "a", tmp_path / b)
        return str(caught.value).replace(f"{tmp_path}/", "")

    assert refused("b") == (
        "no method is in both folders, on the same task by the same metric: a has (gsm8k acc: source_ft, target_pt, "
        "base-change, base-change at 1, eft, eft at 1), b has (boolq acc: source_ft, base-change); give two that can "
        "be set side by side"
    )
    (tmp_path / "b" / "summary.json").write_text('{"tasks": [{"methods": []}, {}]}')
    expected = "give two folders that `ensembler bench` or `ensembler sweep` wrote"
    again = "run the command that wrote it again, or"
    assert refused("b") == f"b/summary.json is no summary of this version; {again} {expected}"
    assert refused("nowhere") == f"nowhere is no folder; {expected}"
    (tmp_path / "c").mkdir()
    assert refused("c") == f"c holds no summary.json; {expected}"
    (tmp_path / "c" / FILE).touch()
    assert refused("c") == "c is of a run that has not finished; run its command again, which goes on with it"


def test_a_task_without_a_version_has_none_in_its_heading() -> None:
    assert ". Version 2.0 of the task, metric acc." in heading(replace(sweep(), version="2.0"))
    assert heading(replace(sweep(), version="Yaml")).endswith("chose alpha. Metric acc.")


def test_the_terminal_shows_the_same_tables(capsys: pytest.CaptureFixture[str]) -> None:
    tasks = [sweep(), benchmark(), failed(), clustered(), not_finite()]
    print_figures(tasks)
    printed = " ".join(capsys.readouterr().out.split())
    for task in tasks:
        first, *reasons = recommendation(task)
        assert all(f"* {line}" in printed for line in (*reasons, *verdict(task)))
        assert f"Recommendation for {task.name}: {first}" in printed
    assert "400 test documents in 37 groups by author" in printed
    assert "56.2 (51.4 to 61.0)" in printed
    assert "not measured: speed and memory: there was no GPU" in printed


def shown_in(columns: int | None, task: TaskFigures, capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed on a terminal of so many columns, or into a pipe."""
    with pytest.MonkeyPatch.context() as terminal:
        if columns is not None:
            terminal.setenv("FORCE_COLOR", "1")
            terminal.setenv("COLUMNS", str(columns))
        print_figures([task])
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)


@pytest.mark.parametrize("columns", [None, 100, 80])
@pytest.mark.parametrize("task", [sweep(), benchmark(), failed(), clustered(), not_finite()])
def test_tables_fit_the_terminal_and_lose_no_character(
    task: TaskFigures, columns: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a file or a pipe tables have 100 columns, and a sentence is one line."""
    printed = shown_in(columns, task, capsys)
    lines = [line for line in printed.splitlines() if columns is not None or "  " in line]
    assert max(map(len, lines)) <= (columns or 100)
    assert columns is not None or {f"* {line}" for line in verdict(task)} <= set(printed.splitlines())
    assert Counter("".join(printed.split())) == Counter("".join(shown_in(1000, task, capsys).split()))


def test_intervals_stay_in_one_line_where_there_is_room(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = (line for line in shown_in(100, sweep(), capsys).splitlines() if line.startswith("base-change  0.7 "))
    assert line.strip() == "base-change  0.7 (validation)  56.2 (51.4 to 61.0)  +15.5 (8.6 to 22.2)  0.00011   0.583"


def test_numbers_have_three_digits() -> None:
    numbers = {0.012345: "0.0123", 1234.5: "1,230", -23.9454: "-23.9", 5.0: "5", -1e-9: "-1e-09", 1234567.0: "1.23e+06"}
    assert {number: show_number(number) for number in numbers} == numbers
    others = [show_number(number) for number in (float("nan"), float("-inf"), None, -0.0)]
    assert others == ["?", "-inf", "", "0"]
    assert show_number(0.56249, percent=True) == "56.2"


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        OutputError, match=r"summary\.json cannot be written: No such file or directory; choose another"
    ):
        write_report(tmp_path / "no", "x", "", [failed()], command="", settings={}, changed=lambda task: [])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: the page is not looked at in a browser")
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_on_a_telephone(scheme: str, written: tuple[list[TaskFigures], Path], browser: Browser) -> None:
    """No scrolling to the side, nothing in the console, no request, and the cells that are seen are the figures."""
    tasks, path = written
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open(path)
    browser.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.said == []
    assert browser.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    seen = browser.evaluate(
        "[...document.querySelectorAll('table.cards')].map(table => [...table.rows].map(row => "
        "[...row.cells].map(cell => cell.textContent.trim().replace(/\\s+/g, ' '))))"
    )
    assert seen == [table for task in tasks for table in expected(task)]
    outside = (
        "[...document.querySelectorAll('.cards tbody td')].filter(c => c.getBoundingClientRect().right > innerWidth)"
    )
    assert browser.evaluate(f"{outside}.length") == 0
    ink, paper = browser.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (brightness[0] < brightness[1]) == (scheme == "light")
