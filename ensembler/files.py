"""Find folders and hub files, read JSON, and write files that are there whole or not at all. Loads no torch."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ensembler.errors import HubError, InputError, MemberError, OutputError, PatchError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
TOKENIZER_SETTINGS = ("added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")
CHAT_TEMPLATE = "chat_template.jinja"
_FETCHED = ["*.json", "*.safetensors", "*.jinja", "*.md", "*.model", "*.tiktoken", "*.txt", "*.py", "adapter_model.bin"]


def write_whole(path: Path, content: str | bytes | Iterable[str]) -> None:
    """Write a file in one rename. Raises OutputError; the file that was there before is then still there."""
    chunks = [content] if isinstance(content, str | bytes) else content
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # several processes may write the same file
    try:
        with partial.open("wb") as file:
            file.writelines(chunk if isinstance(chunk, bytes) else chunk.encode() for chunk in chunks)
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; choose another place") from error
    finally:
        with suppress(OSError):  # renamed by now, or never made
            partial.unlink()


def check_not_input(out: Path, *inputs: Path) -> None:
    """Raise OutputError where `out` is one of the inputs, lies in one, or holds one."""
    target = out.expanduser().resolve()
    for each in inputs:
        source = each.expanduser().resolve()
        if target == source or (target.exists() and source.exists() and target.samefile(source)):
            relation = "is"
        elif source in target.parents:
            relation = "lies in"
        elif target in source.parents:
            relation = "holds"
        else:
            continue
        raise OutputError(f"{out} {relation} {each}, which this command reads; give --output another name")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError into a MemberError that names the file."""
    try:
        yield
    except OSError as error:
        raise MemberError(f"{path} cannot be read ({error.strerror}); fetch or make it again") from error


@contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """Yield a new folder on the disk of `path`, from which a rename to `path` is one step; remove it in the end.

    Raises OutputError where the folder above `path` cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be made: {error.strerror}; choose another place") from error
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", ignore_cleanup_errors=True) as scratch:
        yield Path(scratch)


def other_tokenizer(folder: Path, model: Path) -> list[str]:
    """Return the names of the tokenizer's files and the chat template in `folder`, unless `model` has the same."""
    names = [name for name in (*TOKENIZER_FILES, *TOKENIZER_SETTINGS, CHAT_TEMPLATE) if (folder / name).is_file()]
    contents = ((folder / name, model / name) for name in names)
    is_same = all(other.is_file() and one.read_bytes() == other.read_bytes() for one, other in contents)
    return [] if is_same else names


def read_json(path: Path, error_type: type[InputError] = MemberError) -> dict[str, Any]:
    """Return the object in a JSON file; raise `error_type` where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise error_type(f"{path} cannot be read ({one_line(error)}); fetch or make it again") from error
    if not isinstance(content, dict):
        raise error_type(f"{path} holds no JSON object; fetch or make it again")
    return content


def digest(content: Any, num_digits: int = 12) -> str:
    """Return the first hexadecimal digits of the SHA-256 of a text, or of other content as JSON with sorted keys."""
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:num_digits]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits. Raises MemberError."""
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_local(name: str) -> bool:
    """Return whether a model's name is a path (absolute, or written with a leading dot) or an existing folder."""
    return os.path.isabs(name) or name.startswith((".", "~")) or os.path.isdir(name)


def find_file(source: str, name: str, **hub_options: Any) -> Path | None:
    """Return a file of a local folder or of a model on the hub (from the cache, or fetched); None if it has none.

    `hub_options` are those of huggingface_hub (`revision`, `token` ...). Raises MemberError where the hub has no such
    model, HubError where it cannot be reached.
    """
    if is_local(source):
        path = Path(source).expanduser() / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    try:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub_options)
    except OSError as error:
        raise not_found(source, error) from error
    return None if found is None else Path(found)


def find_folder(source: str, **hub_options: Any) -> Path:
    """Return the folder `source`, or the one that holds the files of a hub id, fetched where they are not cached.

    Raises MemberError or HubError as `find_file`.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if is_local(source) or source.count("/") > 1 or path.exists():
        raise MemberError(f"there is no folder {path}; give a folder or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(source, **{"allow_patterns": _FETCHED, **hub_options}))
    except (OSError, HFValidationError) as error:
        raise not_found(source, error) from error


def not_found(name: str, error: Exception) -> MemberError:
    """Return the error for a model that cannot be read: no such folder, no such id, or no way to the hub."""
    text = one_line(error)
    if is_local(name):
        return MemberError(f"{name} cannot be read: {text}")
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "") or "connect" in text or "offline" in text.lower():
        return HubError(
            f"{name!r} is no folder here, is not in the local cache, and the hub cannot be reached (offline); give a "
            "folder or fetch the model first"
        )
    return MemberError(f"{name!r} is neither a folder here nor a model on the hub: {text}")


@contextmanager
def naming(role: str) -> Iterator[None]:
    """Put the member's role in front of the message of an error about its files, and raise it as a MemberError."""
    try:
        yield
    except HubError as error:
        raise HubError(f"{role}: {error}") from error
    except (MemberError, PatchError) as error:
        raise MemberError(f"{role}: {error}") from error


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def model_name(folder: Path) -> str:
    """Return the name of a model: its id on the hub where `folder` is in the hub's cache, else the folder's name."""
    path = folder.absolute()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.resolve().name
