"""The documents say what is true: their examples run, the reference is that of --help, the site is built."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from string import Template

import pytest
from click.testing import CliRunner
from helpers.scripts import ROOT, load_script
from lxml import html

from ensembler.cli.main import cli
from ensembler.demo import demo_folder

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
COMMANDS = [
    (page.name, line)
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("ensembler ") and " demo" in line
    if not line.startswith("ensembler serve")  # test_vllm_server.py does, where vLLM is
]
PYTHON = [
    (page.name, "\n".join(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)))
    for page in PAGES
    if "```python" in page.read_text("utf-8")
]
NUMBER = r"\d+(?:\.\d+)?(?:e-\d+)?"


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_on_the_demo_run(page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.jsonl").write_text((demo_folder() / "data" / "examples.jsonl").read_text("utf-8"))
    questions = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "scoring.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "questions.jsonl").write_text(questions[0])
    monkeypatch.chdir(tmp_path)
    line = line.split("  #")[0]
    result = CliRunner().invoke(cli, shlex.split(line)[1:], catch_exceptions=False)
    assert result.exit_code == 0, f"{page}: {line}\n{result.output}"
    written = [tmp_path / name for name in ("answers.jsonl", "scores.jsonl")]
    assert result.stdout or [path for path in written if path.is_file() and path.read_text()], f"{page}: {line}"


def test_the_terminal_session_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are the same and numbers nearly, as floats round differently on other CPUs; ... stands for anything."""
    (session,) = re.findall(r"```text\n(\$ .*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "ensembler").symlink_to(ROOT / "ensembler")
    monkeypatch.chdir(tmp_path)
    variables: dict[str, str] = {}
    commands = []
    for part in session.removeprefix("$ ").split("\n$ "):
        line, _, expected = part.partition("\n")
        words = shlex.split(Template(line).substitute(variables))
        if words[0] != "ensembler":
            variables.update(word.split("=", 1) for word in words)
            continue
        result = CliRunner().invoke(cli, words[1:], catch_exceptions=False)
        printed = "\n".join(each.rstrip() for each in result.output.splitlines())
        parts = (re.escape(part).replace(r"\.\.\.", r"[\s\S]*?") for part in re.split(NUMBER, expected.strip()))
        found = re.fullmatch(f"({NUMBER})".join(parts), printed.strip())
        assert found, f"{line}\n{printed}"
        numbers = [float(number) for number in re.findall(NUMBER, expected)]
        assert [float(number) for number in found.groups()] == pytest.approx(numbers, rel=0.1, abs=0.15), line
        commands.append(words[1])
    assert commands == ["create", "inspect", "generate", "sweep", "patch"]


@pytest.mark.parametrize(("page", "code"), PYTHON)
def test_python_blocks_run_in_their_order(
    page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "lm_eval" in code:
        pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})
    assert "ensembler" in code


def test_there_are_examples_to_run() -> None:
    assert {"index.md", "generate.md"} <= {page for page, _ in COMMANDS}
    assert {"python.md", "extend.md"} <= {page for page, _ in PYTHON}


def test_the_command_reference_is_up_to_date() -> None:
    reference = load_script("docs/make_cli_reference.py").reference()
    assert (ROOT / "docs" / "cli.md").read_text("utf-8") == reference, "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    links = [*re.findall(r"\]\(([^)#]+)[^)]*\)", text), *re.findall(r'src(?:set)?="([^"]+)"', text)]
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def build_site(settings: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", settings, "--site-dir", site]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_site_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = build_site(ROOT / "mkdocs.yml", tmp_path)
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.glob("*.html"))
    assert {"index.html", "decide.html", "cli.html"} <= {page.name for page in pages}
    for page in pages:
        loaded = html.parse(str(page)).xpath("//script/@src | //link/@href | //img/@src | //iframe/@src")
        assert len(loaded) > 3
        assert [link for link in loaded if "//" in link] == []
    for style in tmp_path.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)]*", style.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[a](b.md) [a](../file.py)", None),
        ("[a](c.md)", "c.md"),
        ("[a](b.md#c)", "#c"),
        ("[a](../none.py)", "none.py"),
        ("[a](../folder)", "folder"),
        ('<img src="https://example.org/a.png">', "index.md loads from another server"),
        ('<script async src="//example.org/a.js"></script>', "index.md loads from another server"),
    ],
)
def test_a_site_with_a_fault_is_not_built(text: str, error: str | None, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.py").write_text("1 + 1")
    (docs / "site_hooks.py").write_text((ROOT / "docs" / "site_hooks.py").read_text("utf-8"))
    (docs / "index.md").write_text(f"# A\n\n{text}\n")
    (docs / "b.md").write_text("# B")
    settings = tmp_path / "mkdocs.yml"
    lines = (ROOT / "mkdocs.yml").read_text("utf-8").partition("nav:\n")[0]
    settings.write_text(lines + "nav: [index.md, b.md]\n")
    done = build_site(settings, tmp_path / "site")
    assert done.returncode == (0 if error is None else 1), done.stderr
    assert error is None or error in done.stderr
    if error is None:
        assert (tmp_path / "site" / "repository" / "file.py").read_text() == "1 + 1"
