"""Unpack the test suites of the installed `transformers` into build/suites, from its source distribution.

That holds the suite for models and not the ones for `generate` and for exporters: with the folder of a checkout of the
same version as an argument these are taken from there, and are empty otherwise.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

PLACE = Path(__file__).resolve().parents[2] / "build" / "suites"
ELSEWHERE = {"generation/test_utils.py": "GenerationTesterMixin", "exporters/test_export.py": "ExportTesterMixin"}


def unpack(release: str, place: Path) -> None:
    """Download the source distribution of `release` and unpack its tests into `place`."""
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*pip, "--dest", scratch, f"transformers=={release}"], check=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as files:
            for entry in files:
                _, _, name = entry.name.partition("/tests/")
                if entry.isfile() and name.endswith(".py"):
                    (place / name).parent.mkdir(parents=True, exist_ok=True)
                    (place / name).write_bytes(files.extractfile(entry).read())


def add_others(checkout: Path | None, place: Path) -> None:
    """Put the suites that the source distribution lacks into `place`: those of a checkout, or empty ones."""
    for name, suite in ELSEWHERE.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        if checkout is None:
            (place / name).write_text(f"class {suite}:\n    pass\n")
        else:
            shutil.copyfile(checkout / "tests" / name, place / name)


def main() -> None:
    release = version("transformers")
    place = PLACE / release / "transformers_tests"
    if not place.exists():
        unpack(release, place)
    add_others(Path(sys.argv[1]) if len(sys.argv) > 1 else None, place)


if __name__ == "__main__":
    main()
