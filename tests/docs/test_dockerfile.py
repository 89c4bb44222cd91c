"""The Dockerfile names files, versions and extras that are there. No image is built here."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")


def test_what_is_copied_is_there_and_not_ignored() -> None:
    copied = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if re.match(r"COPY (?!--from)", line)]
    sources = [source for line in copied for source in line]
    assert len(sources) >= 8
    assert [source for source in sources if not (ROOT / source).exists()] == []
    ignored, *kept = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert ignored == "*"
    assert {source.partition("/")[0] for source in sources} == {line[1:] for line in kept if line.startswith("!")}


def test_what_the_build_needs_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for name in ("pyproject.toml", project["readme"], *project["license-files"]):
        assert re.search(rf"^COPY .*{re.escape(name)} ", DOCKERFILE, re.MULTILINE), name
    extras = {name for group in re.findall(r"'\.\[(.*)\]'", DOCKERFILE) for name in group.split(",")}
    assert extras == {"eval", "vision"} <= set(project["optional-dependencies"])


def test_vllms_image_is_of_a_version_that_the_package_takes() -> None:
    (version,) = re.findall(r"^FROM vllm/vllm-openai:v(\S+) AS vllm$", DOCKERFILE, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (wanted,) = map(Requirement, project["optional-dependencies"]["vllm"])
    assert wanted.name == "vllm"
    assert version in wanted.specifier


def test_lines_of_the_constraints_that_it_looks_for_are_there() -> None:
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()}
    assert {"torch", "triton"} <= pinned
