"""An ensemble's configuration as vLLM reads it: that of the folder, with the sizes that vLLM plans memory by.

vLLM asks a model for one hidden size, one number of layers, heads. Here hidden states of the members lie side by side,
so the hidden size is their sum; each attention layer tells vLLM its own heads when it is built.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from ensembler import folder as folders
from ensembler.config import EnsembleConfig
from ensembler.preflight import CheckedEnsemble, check_ensemble
from ensembler.serving.checks import check_servable, own_dtypes


class ServedConfig(EnsembleConfig):  # type: ignore[misc,unused-ignore]
    """The configuration of an ensemble that is served; `checked` has its members' files and vocabularies."""

    model_type: ClassVar[str] = EnsembleConfig.model_type

    @classmethod
    def from_dict(cls, content: dict[str, Any], **options: Any) -> Any:
        """Return the configuration that a folder's config.json holds; `name_or_path` in `options` is that folder.

        Members are found and checked, none of their weights is read. Raises ConfigError, MemberError or
        VocabularyError with what cannot be served.
        """
        made = super().from_dict(content, **options)
        config = made[0] if isinstance(made, tuple) else made
        folders.located(config, folders.find(config.name_or_path))
        config.dtype = own_dtypes(config.checked)[0]  # vLLM's "auto" goes by it; the engine and the server give theirs
        return made

    @cached_property
    def checked(self) -> CheckedEnsemble:
        """The members' files, configurations and vocabulary contract."""
        found = check_ensemble(EnsembleConfig.replaced(self))
        check_servable(found)
        return found


class ServedSizes(ModelArchConfigConvertorBase):  # type: ignore[misc,unused-ignore]
    """The sizes of all members together."""

    def _configs(self) -> list[Any]:
        return [config.get_text_config(decoder=True) for config in self.hf_config.checked.model_configs.values()]

    def _sizes(self, name: str) -> list[int]:
        base = ModelArchConfigConvertorBase
        return [getattr(base(config, config), name)() for config in self._configs()]

    def get_hidden_size(self) -> int:
        """Hidden states lie side by side."""
        return sum(self._sizes("get_hidden_size"))

    def get_num_hidden_layers(self) -> int:
        """Of all members: each layer has its own keys and values."""
        return sum(self._sizes("get_num_hidden_layers"))

    def get_total_num_attention_heads(self) -> int:
        """Of the anchor; members check their own where they are built."""
        return self._sizes("get_total_num_attention_heads")[0]

    def get_total_num_kv_heads(self) -> int:
        """Of the anchor."""
        return self._sizes("get_total_num_kv_heads")[0]

    def get_num_experts(self) -> int:
        """The most of any member: vLLM sets up its expert layers where there are some."""
        return max(self._sizes("get_num_experts"))

    def get_head_size(self) -> int:
        """Of the anchor."""
        return self._sizes("get_head_size")[0]
