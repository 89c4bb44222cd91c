"""Configure an ensemble: the rule, α and the members, validated when made. It is the config.json of a folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import AutoConfig, PreTrainedConfig

import ensembler
from ensembler.errors import ConfigError
from ensembler.quantization import Quantization
from ensembler.rules import Rule, finite_number, get_rule
from ensembler.vocab import CHAT_TEMPLATES, OUTSIDE_CHOICES

TEXTS, IMAGES = "text-generation", "image-classification"
TASKS = (TEXTS, IMAGES)
_MODELS = {TEXTS: "EnsembleForCausalLM", IMAGES: "EnsembleForImageClassification"}
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_SIZE = re.compile(r"\d+|\d+(\.\d+)? *[KMG]i?B", re.IGNORECASE)


@dataclass(frozen=True)
class MemberConfig:
    """One member: where its weights are and how they are loaded.

    `model`: a folder or a hub id. `adapter`: a PEFT folder or id, added to it when loaded; members that differ in
    nothing else share one copy of the weights. `revision`: of a hub id. `dtype`: 'auto' is the dtype of the weights
    file. `quantization`: a `Quantization`, its text or mapping. `device`: as in torch, for example 'cuda:1'.

    `device_map` spreads one member over several devices as in accelerate, in place of `device`: 'auto', 'balanced',
    'balanced_low_0', 'sequential', or a mapping from module to device ('cpu' and 'disk' among them). `max_memory` says
    how much a strategy may put where ({'cuda:0': '20GiB', 'cpu': '60GiB'}), `offload_folder` where 'disk' is.

    `head`, of an image classifier that is the vision tower of `model`: a safetensors file with its linear head.

    `trust_remote_code` lets the model's folder run code of its own; it is given where an ensemble is loaded, and never
    read from a file or written to one.
    """

    model: str
    adapter: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    device_map: str | dict[str, str] | None = None
    max_memory: dict[str, str] | None = None
    offload_folder: str | None = None
    quantization: Quantization | None = None
    head: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("model", "adapter", "revision", "dtype", "device", "offload_folder", "head"):
            value = getattr(self, name)
            optional = name in ("adapter", "revision", "offload_folder", "head") and value is None
            if not optional and (not isinstance(value, str) or not value):
                raise ConfigError(f"{name} of a member is {value!r}; expected a text that is not empty")
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {self.dtype!r}; expected one of: {', '.join(DTYPES)}")
        if self.quantization is not None:
            object.__setattr__(self, "quantization", Quantization.parse(self.quantization))
        self._check_device_map()

    def _check_device_map(self) -> None:
        if isinstance(self.device_map, str) and self.device_map not in DEVICE_MAPS:
            raise ConfigError(
                f"unknown device map {self.device_map!r}; expected one of {', '.join(DEVICE_MAPS)}, or a mapping"
            )
        for name in ("device_map", "max_memory"):
            value = getattr(self, name)
            if isinstance(value, Mapping) and value:
                object.__setattr__(self, name, {str(key): str(entry) for key, entry in value.items()})
            elif value is not None and (name == "max_memory" or not isinstance(value, str)):
                raise ConfigError(f"{name} of a member is {value!r}; expected a mapping")
        for device, size in (self.max_memory or {}).items():
            if not _SIZE.fullmatch(size):
                raise ConfigError(f"max_memory of {device!r} is {size!r}; expected bytes, or a size such as '20GiB'")
        if self.max_memory is not None and not isinstance(self.device_map, str):
            raise ConfigError("max_memory was given without a strategy; give device_map 'auto' or 'balanced' beside it")
        if self.device_map is not None and self.device != "cpu":
            raise ConfigError(f"a member has the device {self.device!r} and a device_map; give one of them")

    @classmethod
    def parse(cls, role: str, value: MemberConfig | Mapping[str, Any] | str | Path) -> MemberConfig:
        """Return a MemberConfig from one, from a path or hub id, or from the mapping that config.json holds."""
        if isinstance(value, MemberConfig):
            return value
        if isinstance(value, str | Path):
            return cls(model=str(value))
        if not isinstance(value, Mapping):
            raise ConfigError(f"member {role!r} is {value!r}; expected a path, a hub id or a mapping with 'model'")
        if "trust_remote_code" in value:
            raise ConfigError(
                f"member {role!r} has trust_remote_code in its mapping; leave it out, and give it where members are "
                f"loaded: trust_remote_code=[{role!r}] (--trust-remote-code {role})"
            )
        known = {entry.name for entry in fields(cls)} - {"trust_remote_code"}
        unknown = sorted(set(value) - known)
        if unknown:
            raise ConfigError(f"unknown key {unknown[0]!r} of member {role!r}; expected: {', '.join(sorted(known))}")
        if "model" not in value:
            raise ConfigError(f"member {role!r} has no 'model'; give it a path or a hub id")
        return cls(**value)

    def placed(self, device: str) -> MemberConfig:
        """Return the same on another device, or spread by a strategy of accelerate ('auto', 'balanced' ...)."""
        if device in DEVICE_MAPS:
            return replace(self, device="cpu", device_map=device)
        return replace(self, device=device, device_map=None, max_memory=None)

    def with_paths(self, resolve: Callable[[str], str]) -> MemberConfig:
        """Return the same with model, adapter and head as `resolve` names them."""
        names = {"model": self.model, "adapter": self.adapter, "head": self.head}
        changed: dict[str, Any] = {key: resolve(name) for key, name in names.items() if name is not None}
        return replace(self, **changed)

    def absolute(self) -> MemberConfig:
        """Return the same with existing relative paths made absolute: folders, and the file of a head."""
        paths: dict[str, Any] = {}
        for name in ("model", "adapter", "offload_folder", "head"):
            value = getattr(self, name)
            path = None if value is None else Path(value).expanduser()
            if path is not None and (path.is_file() if name == "head" else path.is_dir()):
                paths[name] = str(path.resolve())
        return replace(self, **paths)

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping for config.json: what differs from the defaults."""
        defaults = {entry.name: entry.default for entry in fields(self)}
        content = {key: value for key, value in asdict(self).items() if value != defaults[key]}
        content.pop("trust_remote_code", None)
        if self.quantization is not None:
            content["quantization"] = self.quantization.to_dict()
        return content


class EnsembleConfig(PreTrainedConfig):  # type: ignore[misc,unused-ignore]
    """An ensemble: `task`, `rule`, `alpha`, `members` by role, and what the vocabulary contract found.

    `constant` and `slope` (by role) are the numbers of the rule 'linear' and `anchor` its anchor (default: the first
    role with a constant); `cutoff` belongs to 'contrastive'.
    `outside` says what happens to tokens that not every member holds: 'mask' forbids them, 'neutral' gives them
    log-ratio 0. `allow_renamed_special`: added tokens may have other names at the same ids. Where tokenizers differ,
    `text_candidates` is the number of next tokens that are compared, `text_tolerance` the share of their probabilities
    that may stay unknown, and `chat_template` says whose chat template a member reads, its own ('per-member') or the
    anchor's ('anchor'). `vocab_size` is the anchor's width, `shared_vocab_size` the number of ids that all share,
    `max_position_embeddings` the shortest context of the members, in tokens.

    Of the task 'image-classification': `classes` are the labels in the order of the logits (None: those of the anchor),
    `class_texts` the words for them in prompts by label, where these are others, `templates` the prompts of zero-shot
    members with {} for the class, `aliases` the labels for what members call them (a list for a name that several
    classes have).
    """

    model_type: ClassVar[str] = "ensembler"
    use_cache = True  # of forward, as in transformers; config.json has no such key

    task: str = TEXTS
    rule: str = "base-change"
    alpha: float = 1.0
    members: dict[str, Any] = field(default_factory=dict)
    constant: dict[str, float] | None = None
    slope: dict[str, float] | None = None
    anchor: str | None = None
    cutoff: float | None = None
    outside: str = "mask"
    allow_renamed_special: bool = False
    text_candidates: int = 64
    text_tolerance: float = 0.02
    chat_template: str = "per-member"
    vocab_size: int | None = None
    shared_vocab_size: int | None = None
    max_position_embeddings: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    classes: list[str] | None = None
    class_texts: dict[str, str] | None = None
    templates: list[str] | None = None
    aliases: dict[str, str | list[str]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for key in kwargs:
            if not key.startswith("_") and key not in _KEYS_OF_TRANSFORMERS:
                raise ConfigError(f"unknown key {key!r} in the ensemble's configuration; remove it or mend its name")
        if self.task not in TASKS:
            raise ConfigError(f"unknown task {self.task!r}; expected one of: {', '.join(TASKS)}")
        self.architectures = [_MODELS[self.task]]
        super().__post_init__(**kwargs)
        if self.members != {}:  # transformers makes a default instance to find out what differs from it
            self._check()

    @classmethod
    def from_dict(cls, content: dict[str, Any], **options: Any) -> Any:
        """Return the configuration for an Auto class of `transformers`, and load the model class that it needs next."""
        made = super().from_dict(content, **options)
        getattr(ensembler, _MODELS[content.get("task", TEXTS)])
        return made

    def _check(self) -> None:
        rule = self.get_rule()
        if rule.name == "linear":
            self.anchor = rule.anchor  # written down, since JSON may sort the roles
        if not isinstance(self.members, Mapping):
            raise ConfigError(f"members is {self.members!r}; expected a mapping from role to member")
        self.alpha = rule.check_alpha(self.alpha)
        if self.outside not in OUTSIDE_CHOICES:
            raise ConfigError(f"outside is {self.outside!r}; expected one of: {', '.join(OUTSIDE_CHOICES)}")
        if not isinstance(self.text_candidates, int) or self.text_candidates < 1:
            raise ConfigError(f"text_candidates is {self.text_candidates!r}; expected a whole number of at least 1")
        self.text_tolerance = finite_number("text_tolerance", self.text_tolerance)
        if not 0 < self.text_tolerance < 1:
            raise ConfigError(
                f"text_tolerance is {self.text_tolerance:g}; expected a number above 0 and below 1, as 0.02"
            )
        if self.chat_template not in CHAT_TEMPLATES:
            raise ConfigError(f"chat_template is {self.chat_template!r}; expected one of: {', '.join(CHAT_TEMPLATES)}")
        check_roles(rule, self.members)
        for role in rule.roles:
            if hasattr(nn.ModuleDict, role):
                raise ConfigError(f"{role!r} cannot be a role: torch's modules use the name; choose another")
        self.members = {role: MemberConfig.parse(role, self.members[role]) for role in rule.roles}
        self._check_classes()

    def _check_classes(self) -> None:
        """Check the form of classes, prompts and names; which classes there are is known from the members."""
        for name in ("class_texts", "aliases"):
            texts = getattr(self, name)
            if texts is None:
                continue
            if not isinstance(texts, Mapping):
                raise ConfigError(f"{name} is {type(texts).__name__}; expected a mapping from one text to another")
            for key, value in texts.items():
                several = value if name == "aliases" and _is_list(value) else [value]
                if not _is_text(key) or not all(map(_is_text, several)):
                    raise ConfigError(f"{name} has {value!r} for {key!r}; expected a text")
            setattr(self, name, dict(texts))
        if self.classes is not None:
            if not _is_list(self.classes) or not all(map(_is_text, self.classes)):
                raise ConfigError("classes holds no classes; expected a list of labels, each a text")
            self.name_classes(self.classes)
        if self.templates is not None:
            if not _is_list(self.templates):
                raise ConfigError(f"templates is {self.templates!r}; expected a list of prompts, each with one {{}}")
            for template in self.templates:
                if not isinstance(template, str) or template.count("{}") != 1:
                    raise ConfigError(
                        f"templates has the template {template!r}; expected one {{}} in it, for the class"
                    )
            self.templates = list(self.templates)

    def name_classes(self, classes: Sequence[str]) -> None:
        """Set the classes, and with them what `transformers` calls the labels of a classifier."""
        self.classes = list(classes)
        self.id2label = dict(enumerate(self.classes))
        self.label2id = {name: index for index, name in self.id2label.items()}

    def get_rule(self) -> Rule:
        """Return the rule with the numbers of this configuration."""
        return get_rule(self.rule, constant=self.constant, slope=self.slope, anchor=self.anchor, cutoff=self.cutoff)

    def trust_code(self, roles: bool | Collection[str]) -> None:
        """Let the members of these roles (True: all) run code of their own. Raises ConfigError for an unknown role."""
        roles = self.members if roles is True else (roles,) if isinstance(roles, str) else roles or ()
        for role in roles:
            if role not in self.members:
                raise ConfigError(
                    f"trust_remote_code names the role {role!r}; the members are: {', '.join(self.members)}"
                )
            self.members[role] = replace(self.members[role], trust_remote_code=True)

    def change_members(self, **changes: Any) -> None:
        """Set the same fields of every member: a dtype or a device for all."""
        self.members = {role: replace(member, **changes) for role, member in self.members.items()}

    def replaced(self, **changes: Any) -> EnsembleConfig:
        """Return a copy with some of its own keys changed (rule, alpha, outside ...), checked as a whole.

        What belongs to the old rule alone (the numbers of 'linear', a cutoff) is not taken over by another rule.
        """
        kept = {name: getattr(self, name) for name in _OWN_KEYS}
        if changes.get("rule", self.rule) != self.rule:
            kept |= {"constant": None, "slope": None, "anchor": None, "cutoff": None}
        if "constant" in changes:
            kept["anchor"] = None
        copy = EnsembleConfig(**{**kept, "members": dict(self.members), **changes})
        copy.name_or_path = self.name_or_path
        copy._attn_implementation_internal = self._attn_implementation_internal
        return copy

    def to_dict(self) -> dict[str, Any]:
        """Return the content of config.json."""
        content: dict[str, Any] = super().to_dict()
        content["members"] = {role: member.to_dict() for role, member in self.members.items()}
        if self.task == TEXTS:
            content.pop("task", None)
        for name in VOCABULARY_SETTINGS:
            if content.get(name) == getattr(EnsembleConfig, name):
                del content[name]
        return {key: value for key, value in content.items() if key in _KEYS_WRITTEN and value is not None}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return all keys: those of an ensemble are worth writing, defaults too."""
        return self.to_dict()


AutoConfig.register(EnsembleConfig.model_type, EnsembleConfig, exist_ok=True)
_OWN_KEYS = tuple(name for name in EnsembleConfig.__annotations__ if name != "model_type")
_KEYS_WRITTEN = {"model_type", "architectures", "transformers_version", *_OWN_KEYS}
# How vocabularies that differ are combined. Most folders do without: not written where they are the defaults.
VOCABULARY_SETTINGS = ("allow_renamed_special", "text_candidates", "text_tolerance", "chat_template")
_KEYS_OF_TRANSFORMERS = {"attn_implementation", "experts_implementation", "model_type", "name_or_path", "num_labels"}
_KEYS_OF_TRANSFORMERS |= {"output_attentions", "torch_dtype", "use_cache"}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0


def check_roles(rule: Rule, roles: Mapping[str, Any]) -> None:
    """Raise ConfigError unless `roles` are exactly the roles of `rule`."""
    missing = [role for role in rule.roles if role not in roles]
    if missing:
        raise ConfigError(f"the rule {rule.name!r} needs a member {missing[0]!r}; its roles: {', '.join(rule.roles)}")
    unknown = [role for role in roles if role not in rule.roles]
    if unknown:
        raise ConfigError(f"unknown role {unknown[0]!r}; the roles of {rule.name!r}: {', '.join(rule.roles)}")
