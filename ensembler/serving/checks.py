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


def common_dtype(checked: CheckedEnsemble) -> str:
    """Return the dtype that all members are to run in: what they ask for, or that of their files.

    vLLM by itself would take half precision for float32. Raises ConfigError where members differ.
    """
    found = list(dict.fromkeys(own_dtypes(checked)))
    if len(found) > 1:
        raise ConfigError(
            f"the members are of {' and '.join(found)}; vLLM runs all in one dtype: give it (--dtype to the server, "
            "--engine-arg dtype=bfloat16 elsewhere)"
        )
    return found[0]


def own_dtypes(checked: CheckedEnsemble) -> list[str]:
    """Return each member's dtype, the anchor's first."""
    return [
        str(config.dtype or "float32").removeprefix("torch.")
        if checked.config.members[role].dtype == "auto"
        else str(checked.config.members[role].dtype)
        for role, config in checked.model_configs.items()
    ]
