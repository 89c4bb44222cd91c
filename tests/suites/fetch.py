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

SUITES = Path(__file__).resolve().parents[2] / "build" / "suites"
ELSEWHERE = {"generation/test_utils.py": "GenerationTesterMixin", "exporters/test_export.py": "ExportTesterMixin"}


def unpack(release: str, folder: Path) -> None:
    """Download the source distribution of `release` and unpack its tests; `folder` is there when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*pip, "--dest", scratch, f"transformers=={release}"], check=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        unpacked = Path(scratch) / "tests"
        with tarfile.open(archive) as files:
            for entry in files:
                _, _, name = entry.name.partition("/tests/")
                if entry.isfile() and name.endswith(".py"):
                    (unpacked / name).parent.mkdir(parents=True, exist_ok=True)
                    (unpacked / name).write_bytes(files.extractfile(entry).read())
        unpacked.rename(folder)


def add_others(checkout: Path | None, folder: Path) -> None:
    """Put the suites that the source distribution lacks into `folder`: those of a checkout, or empty ones."""
    if checkout is None:
        print(f"without a checkout (make test-suites TRANSFORMERS=folder) these are missing: {', '.join(ELSEWHERE)}")
    for name, suite in ELSEWHERE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if checkout is None:
            (folder / name).write_text(f"class {suite}:\n    pass\n")
        else:
            shutil.copyfile(checkout / "tests" / name, folder / name)


def main() -> None:
    release = version("transformers")
    folder = SUITES / release / "transformers_tests"
    if not folder.exists():
        unpack(release, folder)
    add_others(Path(sys.argv[1]) if len(sys.argv) > 1 else None, folder)


if __name__ == "__main__":
    main()
