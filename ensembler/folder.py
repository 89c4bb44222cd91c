"""The folder of an ensemble: config.json, the anchor's tokenizer and generation_config.json; members by reference.

Paths in config.json are relative to the folder (written with a leading dot) or absolute; any other name is a hub id.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from ensembler.config import EnsembleConfig, MemberConfig
from ensembler.errors import ConfigError, MemberError, OutputError
from ensembler.files import (
    CHAT_TEMPLATE,
    TOKENIZER_FILES,
    TOKENIZER_SETTINGS,
    find_file,
    find_folder,
    read_json,
    scratch_beside,
    write_whole,
)

CONFIG = "config.json"
IN_MEMORY = "<in memory>"
HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
_OVERRIDES = ("rule", "alpha", "constant", "slope", "cutoff", "outside", "allow_renamed_special")  # of from_pretrained
_NUMBERS_OF_RULES = ("constant", "slope", "anchor", "cutoff")
_OPTIONS_OF_AUTO = ("_from_auto", "_commit_hash", "adapter_kwargs", "low_cpu_mem_usage", "tqdm_class")
_ALWAYS_TRUE = ("safe_serialization", "save_peft_format", "save_original_format")  # options of save_pretrained
# Files that belong to an ensemble: where it is overwritten, those of the old anchor must not outlive it.
_OWN_FILES = {CHAT_TEMPLATE, "generation_config.json", *TOKENIZER_FILES, *TOKENIZER_SETTINGS}


@dataclass(frozen=True)
class Copy:
    """A member to be saved inside the folder: the model that `load` returns, and its tokenizer or image processor."""

    load: Callable[[], PreTrainedModel]
    processors: tuple[Any, ...] = ()
    max_shard_size: int | str | None = None

    def save(self, folder: Path) -> None:
        model = self.load()
        generation_config = getattr(model, "generation_config", None)  # an image classifier has none
        model.generation_config = GenerationConfig()
        try:
            options = {} if self.max_shard_size is None else {"max_shard_size": self.max_shard_size}
            model.save_pretrained(folder, **options)
        finally:
            model.generation_config = generation_config
        if generation_config is not None:
            _write_generation_config(generation_config, folder)
        for processor in self.processors:
            processor.save_pretrained(folder)


def check_save_options(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for options of `transformers`' save_pretrained that an ensemble cannot honour."""
    for name, value in options.items():
        is_done = value is True if name in _ALWAYS_TRUE else _is_off(value)
        if not is_done and name != "save_function":  # accelerate's, which transformers has no use for either
            raise ConfigError(
                f"save_pretrained of an ensemble takes no {name}={value!r:.40}; leave it out: it writes config.json, "
                "and with copy_members=True members as they are in memory, in safetensors files"
            )


def _is_off(value: object) -> bool:
    """Return whether an option asks for nothing: None, False, or an empty text such as a subfolder of that name."""
    return value is None or value is False or value == ""


def named(member: object) -> Any:
    """Return what a configuration holds for a member, which may be a loaded model. Raises ConfigError."""
    if isinstance(member, PreTrainedModel):
        return MemberConfig(IN_MEMORY)
    if isinstance(member, nn.Module):
        kind = type(member).__name__
        raise ConfigError(f"a member is a {kind}; expected a PreTrainedModel (of a PeftModel: merge_and_unload())")
    return member


def find(name: str | Path, **hub_options: Any) -> Path:
    """Return the folder called `name`, fetched from the hub (`revision`, `token` ...) where it is not a local one."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise ConfigError(f"{path} has no config.json, so it is not an ensemble; make one with: ensembler create")
        return path
    if path.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1:
        raise ConfigError(f"there is no folder {path}; make one with: ensembler create")
    try:
        config = find_file(str(name), CONFIG, **hub_options)  # first: a model that is no ensemble is not fetched
        _check_kind({} if config is None else read_json(config, ConfigError), name)
        return find_folder(str(name), **hub_options)
    except MemberError as error:
        raise ConfigError(f"{error}; make one with: ensembler create") from error


def load(
    name: str | Path,
    config: EnsembleConfig | None,
    *,
    dtype: str | torch.dtype | None,
    device_map: int | str | torch.device | Mapping[str, int | str | torch.device] | None = None,
    options: Mapping[str, Any],
) -> EnsembleConfig:
    """Return the configuration of the ensemble called `name` as `from_pretrained` takes it, changed as it asks.

    `config` stands in for the folder's own. `options`: of the rule (`rule`, `alpha` ...) and of the hub; any other
    raises ConfigError.
    """
    given = {key: value for key, value in options.items() if not _is_off(value)}
    dtype = given.pop("torch_dtype", None) if dtype is None else dtype
    unknown = [key for key in given if key not in {*_OVERRIDES, *_OPTIONS_OF_AUTO, *HUB_OPTIONS}]
    if unknown:
        raise ConfigError(f"from_pretrained of an ensemble takes no {unknown[0]!r}; set it for each member instead")
    folder = find(name, **{key: options[key] for key in HUB_OPTIONS if options.get(key) is not None})
    config = read(folder) if config is None else located(config, folder)
    config = config.replaced(**{key: options[key] for key in _OVERRIDES if options.get(key) is not None})
    if dtype not in (None, "auto"):
        config.change_members(dtype=str(dtype).removeprefix("torch."))
    if device_map is not None:
        devices = dict(device_map) if isinstance(device_map, Mapping) else {"": device_map}
        devices = dict.fromkeys(config.members, devices.pop("")) | devices if "" in devices else devices
        unknown = [role for role in devices if role not in config.members]
        if unknown:
            raise ConfigError(f"unknown role {unknown[0]!r}; the members are: {', '.join(config.members)}")
        names = {role: f"cuda:{device}" if isinstance(device, int) else str(device) for role, device in devices.items()}
        config.members |= {role: config.members[role].placed(name) for role, name in names.items()}
    return config


def read(folder: Path) -> EnsembleConfig:
    """Return the configuration of an ensemble's folder, with the paths of members made absolute."""
    content = read_json(folder / CONFIG, ConfigError)
    _check_kind(content, folder)
    return located(EnsembleConfig(**{"members": None, **content}), folder)


def _check_kind(content: Mapping[str, Any], name: str | Path) -> None:
    kind = content.get("model_type")
    if kind != EnsembleConfig.model_type:
        raise ConfigError(
            f"{name} is of model type {kind!r}, not an ensemble; give it as a member (--source-ft ...) or make an "
            "ensemble with: ensembler create"
        )


def located(config: EnsembleConfig, folder: Path) -> EnsembleConfig:
    """Make the paths of members absolute and note that the configuration is that of `folder`."""

    def absolute(name: str) -> str:
        if name.startswith("."):
            return str((folder / name).resolve())
        return str(folder / name) if (folder / name).is_dir() else name

    config.members = {role: member.with_paths(absolute) for role, member in config.members.items()}
    config.name_or_path = str(folder)
    return config


def write(
    config: EnsembleConfig,
    folder: Path,
    tokenizer: Any | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    copies: Mapping[str, Copy] | None = None,
    overwrite: bool = False,
) -> None:
    """Write an ensemble's folder, with the anchor's tokenizer and generation settings; `copies`: members to save in it.

    Everything is made beside the folder and moved into it when it is complete, config.json last: an interrupted write
    leaves nothing that looks like an ensemble. `overwrite` replaces an ensemble's own files, and nothing else. Without
    it the folder may hold other files, such as a Trainer's checkpoints. Raises OutputError where files are in the way.
    """
    folder = folder.expanduser().resolve()
    _check_free(folder, {CONFIG, *_OWN_FILES, *(copies or ())}, overwrite=overwrite)

    def relative(name: str) -> str:
        """A path below the folder's parent as a relative one, so that both can be moved together; others absolute."""
        path = Path(name).expanduser().resolve()
        if not Path(name).expanduser().exists():
            return name
        if not path.is_relative_to(folder.parent):
            return str(path)
        found = Path(os.path.relpath(path, folder)).as_posix()
        return found if found.startswith(".") else f"./{found}"

    with scratch_beside(folder) as scratch:
        made = scratch / "made"
        made.mkdir()
        members = {role: member.with_paths(relative) for role, member in config.members.items()}
        for role, copy in (copies or {}).items():
            copy.save(made / role)
            head = config.members[role].head
            if head is not None:
                head = f"./{role}/head.safetensors"
                shutil.copyfile(str(config.members[role].head), made / head)
            members[role] = replace(members[role], model=f"./{role}", adapter=None, revision=None, head=head)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        if generation_config is not None:
            _write_generation_config(generation_config, made)
        content = {**config.to_dict(), "members": {role: member.to_dict() for role, member in members.items()}}
        (made / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if not folder.exists():
            made.rename(folder)
            return
        names = {entry.name for entry in made.iterdir()}
        for entry in sorted(made.iterdir(), key=lambda entry: entry.name == CONFIG):
            if (folder / entry.name).is_dir():
                (folder / entry.name).rename(scratch / f"old {entry.name}")
            entry.replace(folder / entry.name)
        for name in _OWN_FILES - names:
            (folder / name).unlink(missing_ok=True)


class PushedFolder:
    """`push_to_hub` of an ensemble, which uploads the folder that its `save_pretrained` writes."""

    config: EnsembleConfig
    save_pretrained: Callable[..., None]

    def push_to_hub(
        self,
        repo_id: str,
        *,
        copy_members: bool = False,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload ensemble",
    ) -> str:
        """Upload the folder to the hub, into a repository that is made where it is missing; return the commit's URL.

        Members that are hub ids stay references; local ones, and local heads, need `copy_members`, which uploads all
        members. The other arguments are those of `huggingface_hub`. Raises ConfigError for a local member before
        anything is sent.
        """
        if not copy_members:
            self._check_on_hub()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "ensemble"
            self.save_pretrained(folder, copy_members=copy_members)
            api = HfApi(token=token, library_name="ensembler")
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = {"revision": revision, "create_pr": create_pr, "commit_message": commit_message}
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **commit))

    def _check_on_hub(self) -> None:
        for role, member in self.config.members.items():
            for name in filter(None, (member.model, member.adapter, member.head)):
                if Path(name).expanduser().exists():
                    raise ConfigError(
                        f"{role} names {name} on this machine, which is not on the hub; push with copy_members=True, "
                        "or make the ensemble from hub ids"
                    )


def is_begun(folder: Path) -> bool:
    """Return whether a model's configuration is in a folder."""
    return (folder.expanduser() / CONFIG).exists()


def _check_free(folder: Path, names: Collection[str], *, overwrite: bool) -> None:
    """Raise OutputError unless `folder` is new or without these `names`, or an ensemble that may be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; choose another name")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        found = sorted(name for name in names if (folder / name).exists())
        if not found:
            return
        raise OutputError(
            f"{folder} exists already and has {', '.join(found)}; choose another name, or replace an ensemble with "
            "--overwrite (overwrite=True)"
        )
    try:
        read(folder)
    except ConfigError as error:
        raise OutputError(f"{folder} holds something else than an ensemble; choose another name") from error


def _write_generation_config(generation_config: GenerationConfig, folder: Path) -> None:
    """As transformers does, without its refusal of files that many models have (a temperature, but no do_sample)."""
    generation_config.to_json_file(folder / "generation_config.json")


def set_point(folder: Path, rule: str, alpha: float) -> None:
    """Set rule and α in the config.json of an ensemble's folder, in one rename. Raises ConfigError and OutputError.

    What belongs to another rule alone, as its numbers or a cutoff, is taken out.
    """
    content = read_json(folder / CONFIG, ConfigError)
    _check_kind(content, folder)
    if content.get("rule", EnsembleConfig.rule) != rule:
        content = {key: value for key, value in content.items() if key not in _NUMBERS_OF_RULES}
    write_whole(folder / CONFIG, json.dumps({**content, "rule": rule, "alpha": alpha}, indent=2) + "\n")
