"""The folder of an ensemble: config.json, the anchor's tokenizer and generation_config.json; members by reference.

Paths in config.json are relative to the folder (written with a leading dot) or absolute; any other name is a hub id.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import GenerationConfig

from ensembler.config import EnsembleConfig, MemberConfig
from ensembler.errors import ConfigError, OutputError
from ensembler.preflight import CheckedEnsemble

IN_MEMORY = "<in memory>"


def find(name: str | Path, *, revision: str | None = None) -> Path:
    """Return the folder called `name`, fetched from the hub (at `revision`) where it is not a local one."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path} has no config.json, so it is not an ensemble; make one with: ensembler create")
        return path
    if path.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1:
        raise ConfigError(f"there is no folder {path}; make one with: ensembler create")
    try:
        return Path(snapshot_download(str(name), revision=revision))
    except (OSError, ValueError) as error:
        offline = isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled)
        reason = "the hub cannot be reached (offline)" if offline else "it is not on the hub either"
        raise ConfigError(f"{str(name)!r} is no folder here, and {reason}; make one with: ensembler create") from error


def read(folder: Path) -> EnsembleConfig:
    """Return the configuration of an ensemble's folder, with the paths of members made absolute."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("model_type") != EnsembleConfig.model_type:
        kind = content.get("model_type") if isinstance(content, dict) else None
        raise ConfigError(
            f"{path} is of model type {kind!r}, not an ensemble; give it as a member (--source-ft ...) or make an "
            "ensemble with: ensembler create"
        )
    config = EnsembleConfig(**content)
    config.members = {role: _absolute(member, folder) for role, member in config.members.items()}
    return config


def with_members(config: EnsembleConfig, **changes: Any) -> EnsembleConfig:
    """Set the same field of every member: a dtype or a device for all."""
    config.members = {role: replace(member, **changes) for role, member in config.members.items()}
    return config


def write(
    config: EnsembleConfig,
    folder: Path,
    *,
    tokenizer: Any | None,
    generation_config: Any | None,
    copies: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write an ensemble's folder; `copies` are models to save inside it, by role.

    It is made beside its place and renamed, so that an interrupted write leaves nothing that looks like an ensemble.
    """
    folder = folder.expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise OutputError(f"{folder} exists already and is not empty; choose another name or add --overwrite")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as partial:
        made = Path(partial) / folder.name
        made.mkdir()
        members = {role: _relative(member, folder) for role, member in config.members.items()}
        for role, model in (copies or {}).items():
            model.save_pretrained(made / role)
            if tokenizer is not None:
                tokenizer.save_pretrained(made / role)
            members[role] = MemberConfig(f"./{role}", dtype=members[role].dtype, device=members[role].device)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        if generation_config is not None:
            generation_config.save_pretrained(made)
        content = {**config.to_dict(), "members": {role: member.to_dict() for role, member in members.items()}}
        (made / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rename(Path(partial) / "replaced")
        made.rename(folder)


def write_checked(checked: CheckedEnsemble, folder: Path, *, overwrite: bool = False) -> None:
    """Write the folder of a checked ensemble, with the anchor's tokenizer and generation settings; loads no weights."""
    rule = checked.config.get_rule()
    anchor = checked.files[rule.anchor]
    try:
        generation_config = GenerationConfig.from_pretrained(anchor.config.model, revision=anchor.config.revision)
    except OSError:  # a model without one has its end tokens in its config
        generation_config = GenerationConfig.from_model_config(anchor.model_config)
    write(checked.config, folder, tokenizer=anchor.tokenizer, generation_config=generation_config, overwrite=overwrite)


def _absolute(member: MemberConfig, folder: Path) -> MemberConfig:
    return replace(
        member,
        model=_from_folder(member.model, folder),
        adapter=None if member.adapter is None else _from_folder(member.adapter, folder),
    )


def _from_folder(name: str, folder: Path) -> str:
    if name.startswith("."):
        return str((folder / name).resolve())
    return str(folder / name) if (folder / name).is_dir() else name


def _relative(member: MemberConfig, folder: Path) -> MemberConfig:
    return replace(
        member,
        model=_to_folder(member.model, folder),
        adapter=None if member.adapter is None else _to_folder(member.adapter, folder),
    )


def _to_folder(name: str, folder: Path) -> str:
    """A path below the folder's parent as a relative one, so that both can be moved together; others absolute."""
    path = Path(name).expanduser()
    if not path.exists():
        return name
    path = path.resolve()
    if not path.is_relative_to(folder.parent):
        return str(path)
    relative = os.path.relpath(path, folder)
    return relative if relative.startswith(".") else f"./{relative}"
