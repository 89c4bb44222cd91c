"""Can vLLM serve this ensemble? Answered before its engine starts, which takes a minute."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from ensembler.errors import ConfigError, MemberError, MissingExtraError
from ensembler.extras import install_command
from ensembler.planning.serving import can_part, heads_of
from ensembler.preflight import CheckedEnsemble

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def require_vllm() -> None:
    """Raise MissingExtraError with the pip line where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise MissingExtraError("vllm", install_command("vllm"))


def check_servable(checked: CheckedEnsemble, *, num_ranks: int = 1) -> None:
    """Raise ConfigError or MemberError with what vLLM cannot run as members of one model, on so many parallel ranks."""
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
        _check_member(role, config, num_ranks)


def _check_member(role: str, config: Any, num_ranks: int) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise MemberError(
            f"{role} has quantised weights ({config.quantization_config.get('quant_method')}), which vLLM cannot "
            "load as one member of several; give the model before that"
        )
    text = config.get_text_config(decoder=True)
    if text is not config:
        raise MemberError(
            f"{role} ({config.model_type}) is a model of more than texts, which vLLM cannot run as one member of "
            "several; give one for texts alone"
        )
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if getattr(family, "_is_stateful", False) or not kinds <= _ATTENTION:
        raise MemberError(
            f"{role} ({config.model_type}) keeps a state beside keys and values, which vLLM cannot do for one member "
            "of several; the transformers backend runs it"
        )
    if getattr(text, "kv_lora_rank", None):
        raise MemberError(
            f"{role} ({config.model_type}) has latent attention, which vLLM sets up for a whole model, not for one "
            "member of several; the transformers backend runs it"
        )
    heads = heads_of(config)
    if not can_part(heads, num_ranks):
        raise MemberError(
            f"{role} has {heads[0]} attention heads and {heads[1]} key-value heads, which {num_ranks} tensor-parallel "
            "ranks cannot share; give another --tensor-parallel-size"
        )


def common_dtype(checked: CheckedEnsemble, given: str | None = None) -> str:
    """Return the dtype that all members are to run in: the one `given` to vLLM, what they ask for, that of their files.

    vLLM by itself would take half precision for float32. Raises ConfigError where members differ.
    """
    if given not in (None, "auto"):
        return str(given)
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
