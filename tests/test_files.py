"""Files: an output that is an input, and reads that fail."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ensembler.errors import MemberError, OutputError
from ensembler.files import check_not_input, reading


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "one"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("w")
    (tmp_path / "link").symlink_to(folder)
    os.link(folder / "weights", tmp_path / "same")
    return folder


@pytest.mark.parametrize(
    ("out", "source", "relation"),
    [
        ("models/one", "models/one", "is"),
        ("link", "models/one", "is"),
        ("models/one/../one", "link", "is"),
        ("same", "models/one/weights", "is"),
        ("models/one/new", "models/one", "lies in"),
        ("link/new/deeper", "models/one", "lies in"),
        ("models", "models/one/weights", "holds"),
        (".", "link", "holds"),
    ],
)
def test_an_output_that_is_an_input_is_refused_by_both_names(
    out: str, source: str, relation: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutputError) as caught:
        check_not_input(tmp_path / out, Path("/elsewhere"), tmp_path / source)
    said = f"{tmp_path / out} {relation} {tmp_path / source}, which this command reads; give --output another name"
    assert str(caught.value) == said


@pytest.mark.parametrize("out", ["new", "models/one.jsonl", "models/one-more", "models/two"])
def test_an_output_beside_an_input_is_taken(out: str, model: Path, tmp_path: Path) -> None:
    check_not_input(tmp_path / out, model, model / "weights")


def test_an_error_of_the_disk_names_the_file() -> None:
    with (
        pytest.raises(MemberError, match=r"^a/b cannot be read \(Input/output error\); fetch or make it again$"),
        reading(Path("a/b")),
    ):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
