"""Register an ensemble's folder as a model of vLLM, and the load formats of ensembles and of patched models.

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`.
"""

from __future__ import annotations

from ensembler.config import EnsembleConfig
from ensembler.serving.choice import LOAD_FORMAT, PATCHED


def register() -> None:
    """Make ensembles and patched models known to vLLM; a second call changes nothing."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
    from vllm.model_executor.models import ModelRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from ensembler.serving.vllm_config import ServedConfig, ServedSizes
    from ensembler.serving.vllm_members import EnsembleLoader
    from ensembler.serving.vllm_patched import PatchedLoader

    if LOAD_FORMAT in _LOAD_FORMAT_TO_MODEL_LOADER:
        return
    _CONFIG_REGISTRY[EnsembleConfig.model_type] = ServedConfig
    MODEL_ARCH_CONFIG_CONVERTORS[EnsembleConfig.model_type] = ServedSizes
    ModelRegistry.register_model("EnsembleForCausalLM", "ensembler.serving.vllm_model:EnsembleForCausalLM")
    register_model_loader(LOAD_FORMAT)(EnsembleLoader)
    register_model_loader(PATCHED)(PatchedLoader)
