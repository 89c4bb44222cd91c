"""Find a model or a patch: a folder here, or an id on the hub whose files are fetched into its cache."""

from __future__ import annotations

from pathlib import Path

from ensembler.errors import PatchError

_FETCHED = ["*.json", "*.safetensors", "*.jinja", "*.md", "*.model", "*.txt", "*.py", "adapter_model.bin"]


def local_folder(name: str) -> Path:
    """Return the folder called `name`, fetched from the hub where it is an id; raise PatchError where it is neither."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1 or path.exists():
        raise PatchError(f"there is no folder {path}; give a folder or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=_FETCHED))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PatchError(
            f"{name!r} is neither a folder here nor to be had from the hub ({reason}); give one"
        ) from error


def model_name(folder: Path) -> str:
    """Return the name of a model: its id on the hub where `folder` is in the hub's cache, else the folder's name."""
    path = folder.absolute()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.resolve().name
