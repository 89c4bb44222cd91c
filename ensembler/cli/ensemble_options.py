"""An ensemble as given on the command line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ensembler.errors import ConfigError
from ensembler.planning.sizes import parse_size
from ensembler.quantization import Quantization

if TYPE_CHECKING:
    from ensembler.config import EnsembleConfig

DEMO = "demo"


@dataclass(frozen=True)
class EnsembleOptions:
    """The ensemble as given on the command line; `load_config` turns it into a configuration."""

    ensemble: str | None = None
    source_ft: str | None = None
    source_ft_adapter: str | None = None
    source_pt: str | None = None
    target_pt: str | None = None
    member: tuple[str, ...] = ()
    patch: tuple[str, ...] = ()
    rule: str | None = None
    alpha: float | None = None
    constant: tuple[str, ...] = ()
    slope: tuple[str, ...] = ()
    cutoff: float | None = None
    outside: str | None = None
    allow_renamed_special: bool | None = None
    text_candidates: int | None = None
    text_tolerance: float | None = None
    chat_template: str | None = None
    trust_remote_code: tuple[str, ...] = ()
    dtype: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()
    device: tuple[str, ...] = ()
    max_memory: tuple[str, ...] = ()
    offload_folder: str | None = None

    def load_config(self) -> EnsembleConfig:
        """Return the configuration: that of the folder (with the options given), or one of the members."""
        if self.ensemble is not None:
            return self._from_folder(self.ensemble)
        return self._from_members()

    def _members(self) -> dict[str, Any]:
        named = {"source_ft": self.source_ft, "source_pt": self.source_pt, "target_pt": self.target_pt}
        given: dict[str, Any] = {role: path for role, path in named.items() if path is not None}
        if self.source_ft_adapter is not None:
            if self.source_ft is not None or self.source_pt is None:
                raise ConfigError(
                    "--source-ft-adapter makes source_ft from --source-pt; give that beside it, and no --source-ft"
                )
            given["source_ft"] = {"model": self.source_pt, "adapter": self.source_ft_adapter}
        for role, path in _pairs("--member", self.member).items():
            if role in given:
                raise ConfigError(f"the member {role!r} is given twice; give it once")
            given[role] = path
        return given

    def _from_folder(self, name: str) -> EnsembleConfig:
        from ensembler import folder
        from ensembler.demo import demo_folder

        beside = (self.source_ft, self.source_ft_adapter, self.source_pt, self.target_pt, *self.member)
        if any(one is not None for one in beside):
            raise ConfigError(f"a member was given beside the ensemble {name!r}; give the folder, or the members alone")
        config = folder.read(demo_folder() if name == DEMO else folder.find(name))
        changes = {
            "rule": self.rule,
            "alpha": self.alpha,
            "constant": _numbers("--constant", self.constant),
            "slope": _numbers("--slope", self.slope),
            "cutoff": self.cutoff,
            "outside": self.outside,
            "allow_renamed_special": self.allow_renamed_special,
            **self._of_texts(),
        }
        config = config.replaced(**{key: value for key, value in changes.items() if value is not None})
        return self._placed(config)

    def _from_members(self) -> EnsembleConfig:
        from ensembler.config import EnsembleConfig

        members = self._members()
        if not members:
            raise ConfigError(
                "no ensemble was given; name a folder, or demo, or the members with --source-ft --source-pt --target-pt"
            )
        config = EnsembleConfig(
            rule=self.rule or "base-change",
            alpha=1.0 if self.alpha is None else self.alpha,
            members=members,
            constant=_numbers("--constant", self.constant),
            slope=_numbers("--slope", self.slope),
            cutoff=self.cutoff,
            outside=self.outside or "mask",
            allow_renamed_special=bool(self.allow_renamed_special),
            **self._of_texts(),
        )
        return self._placed(config)

    def _of_texts(self) -> dict[str, Any]:
        """Return what was given for members with different tokenizers."""
        names = ("text_candidates", "text_tolerance", "chat_template")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _placed(self, config: EnsembleConfig) -> EnsembleConfig:
        """Return the configuration with the options for loading members."""
        roles = tuple(config.members)
        config.trust_code([role.strip() for value in self.trust_remote_code for role in value.split(",")])
        for role, patch in self._patches(config).items():
            if config.members[role].adapter is not None:
                raise ConfigError(
                    f"--patch was given for {role}, which has an adapter already ({config.members[role].adapter}); add "
                    "one of them to its files first: ensembler patch apply"
                )
            config.members[role] = replace(config.members[role], adapter=patch)
        for role, dtype in by_role("--dtype", self.dtype, roles).items():
            config.members[role] = replace(config.members[role], dtype=dtype)
        for role, method in by_role("--quantize", self.quantize, roles).items():
            try:
                quantization = None if method == "none" else Quantization.parse(method)
            except ConfigError as error:
                raise ConfigError(f"--quantize {role}={method}: {error} (bnb- may be left out), or none") from error
            config.members[role] = replace(config.members[role], quantization=quantization)
        for role, device in by_role("--device", self.device, roles).items():
            config.members[role] = config.members[role].placed(device)
        for role, sizes in by_role("--max-memory", self.max_memory, roles).items():
            max_memory = _pairs("--max-memory", tuple(sizes.split(",")))
            for size in max_memory.values():
                try:
                    parse_size(size)  # a bare number would be bytes
                except ConfigError as error:
                    given = sizes if sizes in self.max_memory else f"{role}={sizes}"
                    raise ConfigError(f"--max-memory {given}: {error}") from error
            if config.members[role].device_map is None:
                raise ConfigError(
                    f"--max-memory was given for {role}, which is on one device; add --device {role}=auto"
                )
            config.members[role] = replace(config.members[role], max_memory=max_memory)
        if self.offload_folder is not None:
            config.change_members(offload_folder=self.offload_folder)
        return config

    def _patches(self, config: EnsembleConfig) -> dict[str, str]:
        """Patches by role; one without a role is for the new model, as in PortLLM."""
        found = {}
        for value in self.patch:
            role, equals, path = value.partition("=")
            if not equals or role not in config.members:
                role, path = "target_pt", value
            if role not in config.members:
                roles = ", ".join(config.members)
                raise ConfigError(f"--patch {value!r}: there is no target_pt; give ROLE=PATCH with one of {roles}")
            if role in found:
                raise ConfigError(f"--patch was given twice for {role!r}; give it once, or add them on disk first")
            found[role] = path
        return found


def _pairs(option: str, values: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for value in values:
        role, equals, rest = value.partition("=")
        if not equals or not role or not rest:
            form = "[ROLE=]DEVICE=SIZE,... (target_pt=cpu=20GiB)" if option == "--max-memory" else "ROLE=VALUE"
            raise ConfigError(f"{option} {value!r} is not of the form {form}")
        if role in pairs:
            raise ConfigError(f"{option} was given twice for {role!r}; give it once")
        pairs[role] = rest
    return pairs


def by_role(option: str, values: tuple[str, ...], roles: tuple[str, ...]) -> dict[str, str]:
    """Return values by role; one without a role is for all that have none of their own. Raises ConfigError."""
    for_all, own = [], {}
    for value in values:
        role, equals, rest = value.partition("=")
        if equals and role in roles and rest:
            if role in own:
                raise ConfigError(f"{option} was given twice for {role!r}; give it once")
            own[role] = rest
        elif equals and option != "--max-memory":
            raise ConfigError(f"{option} {value!r}: expected a value, or ROLE=VALUE with one of {', '.join(roles)}")
        else:
            for_all.append(value)
    if len(for_all) > 1:
        raise ConfigError(f"{option} was given twice for all members, {for_all[0]!r} and {for_all[1]!r}; give it once")
    return {**{role: value for value in for_all for role in roles}, **own}


def _numbers(option: str, values: tuple[str, ...]) -> dict[str, float] | None:
    try:
        return {role: float(number) for role, number in _pairs(option, values).items()} or None
    except ValueError as error:
        raise ConfigError(f"{option}: {error}; expected ROLE=NUMBER") from error
