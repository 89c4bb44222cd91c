"""Resolve a name: a folder on this machine, or an id on the hub."""

from __future__ import annotations

import os
from pathlib import Path

from transformers.utils import cached_file

from ensembler.errors import HubError, MemberError


def is_local(name: str) -> bool:
    """Return whether a member's name is a path (absolute, or written with a leading dot) or an existing folder."""
    return os.path.isabs(name) or name.startswith((".", "~")) or os.path.isdir(name)


def find_file(role: str, source: str, name: str, *, revision: str | None = None) -> Path | None:
    """Return a file of a local folder or of a model on the hub (from the cache, or fetched); None if it has none.

    Raises MemberError where the hub has no such model or cannot be reached.
    """
    if is_local(source):
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        found = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise not_found(role, source, error) from error
    return None if found is None else Path(found)


def not_found(role: str, name: str, error: Exception) -> MemberError:
    """Tell an id that does not exist from a hub that cannot be reached."""
    text = one_line(error)
    if is_local(name):
        return MemberError(f"{role}: {name} cannot be read: {text}")
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "") or "connect" in text or "offline" in text.lower()
    if offline:
        return HubError(
            f"{role}: {name!r} is no folder here, is not in the local cache, and the hub cannot be reached (offline); "
            "give a folder or fetch the model first"
        )
    return MemberError(f"{role}: {name!r} is neither a folder here nor a model on the hub: {text}")


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
