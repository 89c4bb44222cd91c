"""Scripts of examples/ and benchmarks/, run as people run them, but in the process of the tests."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

ROOT = Path(__file__).parents[2]


def run_script(script: str, *arguments: object) -> str:
    """Return what a script prints; it has to end with 0. Processes that it starts print elsewhere."""
    path = ROOT / script
    given, folders = [str(path), *map(str, arguments)], [str(path.parent), *sys.path]
    with patch.object(sys, "argv", given), patch.object(sys, "path", folders), redirect_stdout(StringIO()) as printed:
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise
    return printed.getvalue()


def load_script(script: str) -> ModuleType:
    """Return a script as a module, without running it."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
