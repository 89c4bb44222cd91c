"""An ensemble's configuration as vLLM reads it: that of the folder, with the sizes that vLLM plans memory by.

vLLM asks a model for one hidden size, one number of layers, heads. Here hidden states of the members lie side by side,
so the hidden size is their sum; each attention layer tells vLLM its own heads when it is built.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from ensembler import folder as folders
from ensembler.config import EnsembleConfig
from ensembler.preflight import CheckedEnsemble, check_ensemble
from ensembler.serving.choice import check_servable, own_dtypes
from ensembler.serving.request_points import ServedRules

_served: dict[tuple[str, float], ServedRules] = {}  # not in a configuration: vLLM copies and sends those many times
_being_checked: set[Path] = set()  # a folder's tokenizer asks for its configuration meanwhile


class ServedConfig(EnsembleConfig):  # type: ignore[misc,unused-ignore]
    """The configuration of an ensemble that is served, with its members' files and vocabularies, and its rules."""

    model_type: ClassVar[str] = EnsembleConfig.model_type

    @classmethod
    def from_dict(cls, content: dict[str, Any], **options: Any) -> Any:
        """Return the configuration that a folder's config.json holds; `name_or_path` in `options` is that folder.

        Members are found and checked, none of their weights is read. Raises ConfigError, MemberError or
        VocabularyError with what cannot be served.
        """
        made = super().from_dict(content, **options)
        config = made[0] if isinstance(made, tuple) else made
        folder = folders.find(config.name_or_path)
        folders.located(config, folder)
        if folder not in _being_checked:
            _being_checked.add(folder)
            try:
                config.dtype = own_dtypes(config.checked)[0]  # of vLLM's "auto"; the engine and the server give theirs
            finally:
                _being_checked.remove(folder)
        return made

    @property
    def checked(self) -> CheckedEnsemble:
        """The members' files, configurations and vocabulary contract."""
        return self.rules.checked

    @property
    def rules(self) -> ServedRules:
        """The rules that requests may ask for. Members are checked once; α may be another than the folder's."""
        members = json.dumps([self.name_or_path, {**self.to_dict(), "alpha": None}], default=str)
        key = (members, float(self.alpha))
        if key not in _served:
            found = next((rules.checked for (same, _), rules in _served.items() if same == members), None)
            if found is None:
                found = check_ensemble(EnsembleConfig.replaced(self))
                check_servable(found)
            _served[key] = ServedRules(found, key[1])
        return _served[key]


def all_served_rules() -> list[ServedRules]:
    """Return the rules of every ensemble whose configuration this process has read."""
    return list(_served.values())


class ServedSizes(ModelArchConfigConvertorBase):  # type: ignore[misc,unused-ignore]
    """The sizes of all members together; heads are the anchor's, since members check their own where they are built."""

    def _sizes(self, name: str) -> list[int]:
        """Return a size of each member, the anchor's first."""
        configs = [config.get_text_config(decoder=True) for config in self.hf_config.checked.model_configs.values()]
        return [getattr(ModelArchConfigConvertorBase(config, config), name)() for config in configs]

    def get_hidden_size(self) -> int:
        """Return the width of all hidden states side by side."""
        return sum(self._sizes("get_hidden_size"))

    def get_num_hidden_layers(self) -> int:
        """Return the layers of all members: each has its own keys and values."""
        return sum(self._sizes("get_num_hidden_layers"))

    def get_vocab_size(self) -> int:
        """Return the number of ids of the logits: those of the widest anchor, and one for each member that fails."""
        rules: ServedRules = self.hf_config.rules
        return rules.width + len(rules.failures)

    def get_num_experts(self) -> int:
        """Return the most of any member: vLLM sets up its expert layers where there are some."""
        return max(self._sizes("get_num_experts"))

    def get_total_num_attention_heads(self) -> int:
        return self._sizes("get_total_num_attention_heads")[0]

    def get_total_num_kv_heads(self) -> int:
        return self._sizes("get_total_num_kv_heads")[0]

    def get_head_size(self) -> int:
        return self._sizes("get_head_size")[0]
