"""What a run was made with: versions, and hashes that tell one model from another."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ensembler import __version__
from ensembler.adapters import ADAPTER_CONFIG
from ensembler.patch.headers import fingerprint, model_tensors
from ensembler.preflight import CheckedEnsemble
from ensembler.sources import is_local

_PACKAGES = ("torch", "transformers", "peft", "lm_eval", "bitsandbytes")


def versions() -> dict[str, str]:
    """Return the version of this package and of those that its figures depend on."""
    found = {"ensembler": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def member_hashes(checked: CheckedEnsemble) -> dict[str, dict[str, str]]:
    """Return for each member that is loaded from files what tells its weights from others'.

    Of a folder the fingerprint of `patch apply`'s cards (headers and the first 4 KiB of every tensor), of a model on
    the hub its commit; of an adapter the SHA-256 of its files.
    """
    found = {}
    for role, files in checked.files.items():
        if is_local(files.config.model):
            hashes = {"fingerprint": fingerprint(model_tensors(Path(files.config.model)).values())[:16]}
        else:
            hashes = {"commit": str(getattr(files.model_config, "_commit_hash", None) or files.config.revision)}
        if files.config.adapter is not None and is_local(files.config.adapter):
            hashes["adapter_sha256"] = _folder_hash(Path(files.config.adapter))[:16]
        found[role] = hashes
    return found


def _folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in [folder / ADAPTER_CONFIG, *sorted(folder.glob("*.safetensors"))]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
