"""Optional packages that are missing are met with the exact pip line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ensembler.errors import MissingExtraError
from ensembler.extras import require


def test_an_installed_package_is_returned() -> None:
    assert require("json.decoder", "eval").JSONDecodeError is __import__("json").JSONDecodeError


def test_a_missing_package_names_the_pip_line() -> None:
    with pytest.raises(MissingExtraError) as caught:
        require("no_such_package.stats", "eval")
    expected = "no_such_package is not installed; install it with: pip install 'logit-ensembler[eval]'"
    assert str(caught.value) == expected


def test_a_broken_package_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_there.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        require("half_there", "eval")
    assert "half_there" not in sys.modules
