"""The documents say what is true: their examples run, the reference is that of --help, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ensembler.cli.main import cli
from ensembler.demo import demo_folder

ROOT = Path(__file__).parents[2]
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
    assert len([line for page, line in COMMANDS if page == "README.md"]) >= 3
    assert {"README.md", "python.md"} <= {page for page, _ in PYTHON}


def test_the_command_reference_is_up_to_date() -> None:
    path = ROOT / "docs" / "make_cli_reference.py"
    spec = importlib.util.spec_from_file_location("make_cli_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "cli.md").read_text("utf-8") == module.reference(), "run: make docs"


def test_the_tables_of_the_demo_family_are_those_of_its_rows() -> None:
    pytest.importorskip("scipy")
    command = [sys.executable, ROOT / "benchmarks" / "demo_family.py", "--table"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "demo-family.md").read_text("utf-8").splitlines()
    assert len(lines) > 30
    assert [line for line in lines if line not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []
