"""Files that are there whole or not at all. Loads no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ensembler.errors import OutputError


def write_whole(path: Path, content: str | bytes | Iterable[str]) -> None:
    """Write a file in one rename. Raises OutputError; the file that was there before is then still there."""
    parts = [content] if isinstance(content, str | bytes) else content
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # several processes may write the same file
    try:
        with partial.open("wb") as file:
            file.writelines(part if isinstance(part, bytes) else part.encode() for part in parts)
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; choose another place") from error
    finally:
        with suppress(OSError):  # renamed by now, or never made
            partial.unlink()
