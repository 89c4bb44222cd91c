"""Choose the backend that runs an ensemble, transformers or vLLM, and check that it can, before an engine starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from ensembler.config import MemberConfig
from ensembler.errors import ConfigError, MemberError, MissingExtraError, UnsupportedPatchError
from ensembler.extras import install_command
from ensembler.files import find_folder, naming
from ensembler.patch.formats import PATCH_FILES, read_patch
from ensembler.patch.patch_plan import PatchPlan, plan_patches
from ensembler.planning.vllm_plan import can_split, num_heads
from ensembler.preflight import CheckedEnsemble

LOAD_FORMAT, PATCHED = "ensembler", "patched"
READER = "ensembler.serving.vllm_audit.AuditReader"  # in vLLM's workers, which count tokens where it is
TRANSFORMERS, VLLM = BACKENDS = ("transformers", "vllm")
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_REFUSED_ARGUMENTS = {
    "is given to vLLM's engine by ensembler itself": ("model", "load_format", "worker_extension_cls", "hf_overrides"),
    "is nothing that vLLM can do with one member of several": (
        *("quantization", "pipeline_parallel_size", "speculative_config", "skip_tokenizer_init", "runner", "convert"),
    ),
    "would change what the numbers mean": ("logprobs_mode", "max_logprobs"),
}


def require_vllm() -> None:
    """Raise MissingExtraError with the pip line where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise MissingExtraError("vllm", install_command("vllm"))


def check_servable(checked: CheckedEnsemble, *, num_ranks: int = 1) -> None:
    """Raise ConfigError or MemberError with what vLLM cannot run as members of one model, on so many parallel ranks."""
    if checked.contract.is_text:
        raise ConfigError(
            "the members have different tokenizers, which vLLM's one model cannot have; leave out --backend vllm, or "
            "use ensembler generate"
        )
    for role, member in checked.config.members.items():
        if member.trust_remote_code:
            raise ConfigError(
                f"{role} was allowed to run code of its own, which vLLM's members cannot; leave out "
                "--trust-remote-code, or --backend vllm"
            )
        if member.quantization is not None:
            raise ConfigError(
                f"{role} is quantised when loaded ({member.quantization}); vLLM's members are loaded as they are: "
                "serve a folder without it (float32, bfloat16 or float16)"
            )
        if member.device_map is not None or member.device not in ("cpu", "cuda", "cuda:0"):
            raise ConfigError(
                f"{role} is put on devices of its own ({member.device_map or member.device}); vLLM spreads all members "
                "alike: leave it out, and give --tensor-parallel-size for several GPUs"
            )
    for role, config in checked.model_configs.items():
        _check_architecture(role, config, num_ranks)


def _check_architecture(role: str, config: Any, num_ranks: int) -> None:
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        raise MemberError(
            f"{role} has quantised weights ({quantized.get('quant_method')}), which vLLM cannot load as one member of "
            "several; give the model before that"
        )
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    reason = None
    if text is not config:
        reason = "is a model of more than texts, which vLLM cannot run as one of several"
    elif getattr(family, "_is_stateful", False) or not kinds <= _ATTENTION:
        reason = "keeps a state beside keys and values, which vLLM cannot do for one of several"
    elif getattr(text, "kv_lora_rank", None):
        reason = "has latent attention, which vLLM sets up for a whole model, not for one of several"
    if reason is not None:
        raise MemberError(f"{role} ({config.model_type}) {reason}; the transformers backend runs it")
    heads = num_heads(config)
    if not can_split(heads, num_ranks):
        raise MemberError(
            f"{role} has {heads[0]} attention heads and {heads[1]} key-value heads, which {num_ranks} tensor-parallel "
            "ranks cannot share; give another --tensor-parallel-size"
        )


def plan_member(role: str, member: MemberConfig) -> PatchPlan:
    """Find a member's files, and check from headers alone that its adapter fits them; raise MemberError where not."""
    with naming(role):
        try:
            adapters = [] if member.adapter is None else [find_folder(member.adapter, allow_patterns=PATCH_FILES)]
            patches = [read_patch(folder) for folder in adapters]
        except UnsupportedPatchError as error:
            raise MemberError(
                f"{error}; vLLM loads what is a sum with the weights: merge it with PEFT first, and give that model"
            ) from error
        return plan_patches(patches, find_folder(member.model, revision=member.revision))


def own_dtypes(checked: CheckedEnsemble) -> list[str]:
    """Return each member's dtype, the anchor's first."""
    return [
        str(config.dtype or "float32").removeprefix("torch.")
        if checked.config.members[role].dtype == "auto"
        else str(checked.config.members[role].dtype)
        for role, config in checked.model_configs.items()
    ]


def common_dtype(checked: CheckedEnsemble, given: str | None = None) -> str:
    """Return the dtype that all members are to run in: the one `given` to vLLM, or that of the members.

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


@dataclass(frozen=True)
class BackendChoice:
    """A backend by name; `arguments` are those of `vllm.LLM`. Raises ConfigError."""

    name: str = TRANSFORMERS
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in BACKENDS:
            raise ConfigError(f"unknown backend {self.name!r}; expected {' or '.join(BACKENDS)}")
        if self.arguments and self.name != VLLM:
            raise ConfigError(f"arguments of vLLM's engine were given to the backend {self.name}; choose vllm")
        for reason, names in _REFUSED_ARGUMENTS.items():
            for name in names:
                if name in self.arguments:
                    raise ConfigError(f"{name} {reason}; leave it out")
        for name in ("max_model_len", "tensor_parallel_size"):
            value = self.arguments.get(name, 1)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; expected a whole number from 1")

    def check(self, checked: CheckedEnsemble) -> None:
        """Raise an InputError for what this backend cannot run, before work is planned for it."""
        if self.name == VLLM:
            require_vllm()
            check_servable(checked, num_ranks=self.arguments.get("tensor_parallel_size", 1))
            common_dtype(checked, self.arguments.get("dtype"))

    def describe(self, checked: CheckedEnsemble) -> dict[str, Any]:
        """Return all of it that results may depend on, as JSON."""
        if self.name != VLLM:
            return {"name": self.name}
        return {"name": self.name, **self.arguments, "dtype": common_dtype(checked, self.arguments.get("dtype"))}

    def shortest_context(self, checked: CheckedEnsemble) -> tuple[str, int] | None:
        """Return what sets the shortest limit to a text with its answer, and that limit in tokens, or None."""
        limits = [] if checked.shortest_context is None else [checked.shortest_context]
        if "max_model_len" in self.arguments:
            limits.append(("vLLM's engine (max_model_len)", self.arguments["max_model_len"]))
        return min(limits, key=lambda limit: limit[1], default=None)

    def max_length(self, checked: CheckedEnsemble) -> int | None:
        """Return how many tokens a member may read of a text that is scored; None where nothing sets a limit.

        vLLM reads a text's last token too, and wants room for a token behind it.
        """
        limit = self.shortest_context(checked)
        if limit is None:
            return None
        return limit[1] - 2 if self.name == VLLM else limit[1]
