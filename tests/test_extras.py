"""Packages: each import is declared, and a missing one is met with the pip line that works."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ensembler.errors import MissingExtraError
from ensembler.extras import install_command, require

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CHECKOUT = "pip install -e '.[eval]' (in a checkout of the package)"
OWN_LINE = {"wandb", "trl"}  # --log wandb and the example with TRL tell their own pip lines
OF_VLLM = {"compressed_tensors"}  # comes with vLLM, and its test is skipped where that is not


def test_an_installed_package_is_returned() -> None:
    assert require("json.decoder", "eval").JSONDecodeError is __import__("json").JSONDecodeError


def test_a_missing_package_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensembler.extras.distributions", lambda name: [])
    with pytest.raises(MissingExtraError) as caught:
        require("no_such_package.stats", "eval")
    assert str(caught.value) == f"no_such_package is not installed; install it with: {CHECKOUT}"


def test_a_broken_package_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_there.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        require("half_there", "eval")
    assert "half_there" not in sys.modules


GIT = {"url": "https://example.org/e.git", "vcs_info": {"vcs": "git", "commit_id": "4ef6"}}


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        ({"url": "file:///a/b%20c", "dir_info": {"editable": True}}, "pip install -e '/a/b c[eval]'"),
        ({"url": "file:///a/b", "dir_info": {}}, "pip install '/a/b[eval]'"),
        (GIT, "pip install 'logit-ensembler[eval] @ git+https://example.org/e.git@4ef6'"),
        (
            {"url": "https://example.org/e.whl", "archive_info": {}},
            "pip install 'logit-ensembler[eval] @ https://example.org/e.whl'",
        ),
        (None, CHECKOUT),
    ],
)
def test_extras_come_from_where_the_package_came(
    origin: dict[str, Any] | None, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logit_ensembler.egg-info").mkdir()  # as in a checkout, which pip tells nothing about the origin
    installed = tmp_path / "site-packages" / "logit_ensembler-1.0.dist-info"
    installed.mkdir(parents=True)
    if origin is not None:
        (installed / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.setattr("sys.path", [str(tmp_path), str(installed.parent)])
    assert install_command("eval") == command


def declared(*extras: str) -> set[str]:
    """The distributions of pyproject.toml that come with the extras."""
    lines = [*PROJECT["dependencies"], *(line for name in extras for line in PROJECT["optional-dependencies"][name])]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def imports(folder: str) -> Iterator[tuple[str, str | None]]:
    """Every top-level package that Python files in `folder` import, and the extra where `require` names one."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((alias.name.partition(".")[0], None) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield (node.module or "").partition(".")[0], None
            elif (
                folder != "tests"
                and isinstance(node, ast.Call)
                and getattr(node.func, "id", "") in ("require", "require_package")
            ):
                texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
                if len(texts) == len(node.args) == 2:
                    yield texts[0].partition(".")[0], texts[1]


@pytest.mark.parametrize("folder", ["ensembler", "kernels", "tests", "benchmarks", "examples", "docs"])
def test_what_is_imported_is_declared(folder: str) -> None:
    own = {"ensembler", "ensembler_kernels", "helpers", *(path.stem for path in ROOT.glob("*/*.py"))}
    names = packages_distributions()
    extras = ("eval", "vision", "vllm", "dev")  # of modules that are imported only where the extra is there
    for module, extra in set(imports(folder)):
        if module in own | OWN_LINE | OF_VLLM or module in sys.stdlib_module_names:
            continue
        distributions = {canonicalize_name(name) for name in names.get(module, [module])}
        assert distributions & declared(*([extra] if extra else extras)), f"{folder} imports {module} ({extra})"


def test_untested_versions_are_bounded() -> None:
    """The bound is above what constraints.txt tests, and that satisfies the requirement."""
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    tested = {canonicalize_name(name): version for name, version in tested.items()}
    lines = [*PROJECT["dependencies"], *(line for lines in PROJECT["optional-dependencies"].values() for line in lines)]
    for wanted in map(Requirement, lines):
        name = canonicalize_name(wanted.name)
        assert name == "vllm" or wanted.specifier.contains(tested[name]), f"{wanted} is not what is tested"
        if name in ("transformers", "peft", "lm-eval", "vllm"):
            assert any(part.operator == "<" for part in wanted.specifier), f"{wanted} has no upper bound"


WITHOUT_BITSANDBYTES = """
import sys
sys.modules["bitsandbytes"] = None
from ensembler.cli.main import main
for command in (["inspect"], ["plan", "--quantize", "nf4"], ["generate"], ["generate", "--quantize", "nf4"]):
    prompt = ["--prompt", "1 + 1 =", "--max-new-tokens", "2"] if command[0] == "generate" else []
    try:
        main([command[0], "demo", *command[1:], *prompt])
    except SystemExit as end:
        assert not end.code or "nf4" in command, (command, end.code)
"""


def test_bitsandbytes_is_missed_only_by_what_quantises() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_BITSANDBYTES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if "Error" in line]
    assert errors == ["Error: bitsandbytes is not installed; install it with: pip install bitsandbytes"]
