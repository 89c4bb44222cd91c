"""docs/serving.md shows what `plan` prints, and names code that exists."""

from __future__ import annotations

import re
from pkgutil import resolve_name

import pytest
from helpers.scripts import ROOT
from helpers.server_cases import HEADS, trio

from ensembler.cli.tables import print_serving
from ensembler.planning.vllm_plan import propose_serving
from ensembler.serving.middleware import PointOfRequest

PAGE = (ROOT / "docs" / "serving.md").read_text("utf-8")


def test_the_plan_of_a_trio(capsys: pytest.CaptureFixture[str]) -> None:
    found = propose_serving(trio(), HEADS, [80 * 2**30] * 2, context=4096)
    print_serving(found, f"ensembler serve my-ensemble -- {' '.join(found.flags())}")
    for line in capsys.readouterr().out.splitlines():
        assert line.rstrip() in PAGE


def test_the_middleware_is_the_one_that_reads_alpha() -> None:
    (name,) = re.findall(r"--middleware (\S+)", PAGE)
    assert resolve_name(name) is PointOfRequest
