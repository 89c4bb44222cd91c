"""Can vLLM serve this ensemble? Answered before its engine starts, which takes a minute."""

from __future__ import annotations

from importlib.util import find_spec

from ensembler.errors import ConfigError, MemberError, MissingExtraError
from ensembler.preflight import CheckedEnsemble


def require_vllm() -> None:
    """Raise MissingExtraError with the pip line where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise MissingExtraError("vllm", "vllm")


def check_servable(checked: CheckedEnsemble) -> None:
    """Raise ConfigError or MemberError with what vLLM cannot run: quantised members, placements, scores of rewards."""
    for role, member in checked.config.members.items():
        if member.quantization is not None:
            raise ConfigError(
                f"{role} is quantised when loaded ({member.quantization}); vLLM's members are loaded as they are: "
                "serve a folder without it (float32, bfloat16 or float16)"
            )
        if member.device_map is not None or member.device not in ("cpu", "cuda", "cuda:0"):
            raise ConfigError(
                f"{role} has a place of its own ({member.device_map or member.device}); vLLM spreads all members "
                "alike: leave it out, and give --tensor-parallel-size for several GPUs"
            )
    for role, config in checked.model_configs.items():
        if getattr(config, "quantization_config", None) is not None:
            raise MemberError(
                f"{role} has quantised weights ({config.quantization_config.get('quant_method')}), which vLLM cannot "
                "load as one member of several; give the model before that"
            )
