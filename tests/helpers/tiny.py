"""Models small enough for a unit test: real families with random weights, and a fake one with known logits."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from ensembler.engine import row_cache

VOCAB = 64
_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
_CHARACTERS = string.ascii_lowercase + string.digits + " .,:;!?-+*/=()'\"<>[]&%$#@"
EXTRA = string.ascii_uppercase

_COMMON: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "initializer_range": 0.5}
_LLAMA_LIKE = {"num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 128}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "mistral": {**_LLAMA_LIKE, "sliding_window": 6},
    "gemma": {**_LLAMA_LIKE, "head_dim": 8},
    "gemma2": {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gpt2": {"n_positions": 128},
    "gpt_neox": {"intermediate_size": 32, "max_position_embeddings": 96},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 128},
    "bloom": {},
    "mixtral": {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
}
FAMILIES = tuple(_FAMILIES)


def make_model(
    family: str = "llama",
    seed: int = 0,
    *,
    vocab_size: int = VOCAB,
    hidden_size: int = 16,
    num_layers: int = 2,
    **more: Any,
) -> PreTrainedModel:
    """Return a random model of `family`; equal arguments give equal weights."""
    settings = {**_COMMON, **_FAMILIES[family], "hidden_size": hidden_size, "vocab_size": vocab_size, **more}
    settings.update(num_hidden_layers=num_layers, num_attention_heads=2)
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    return model


def make_tokenizer(num_extra: int = 0, *, swapped: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of characters, VOCAB ids and `num_extra` capitals behind them, padding on the left."""
    characters = list(_CHARACTERS[: VOCAB - len(_SPECIAL)] + EXTRA[:num_extra])
    if swapped:
        characters[0], characters[5] = characters[5], characters[0]
    tokens = [*_SPECIAL, *characters]
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def member_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **inputs: Any) -> Tensor:
    """One member's logits (rows, positions, V) in float64, computed at once and without a cache."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs).logits
    return logits.double()


def random_ids(rows: int, positions: int, *, seed: int = 0, vocab_size: int = VOCAB) -> Tensor:
    """Random tokens (rows, positions), none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, vocab_size, (rows, positions), generator=generator)


class WeightedSum(PreTrainedModel, GenerationMixin):
    """The reference ensemble: Σ weight · logits in float64, no cache, nothing shared with the package."""

    config_class = LlamaConfig

    def __init__(self, members: Sequence[PreTrainedModel], weights: Sequence[float]) -> None:
        super().__init__(LlamaConfig(vocab_size=members[0].config.vocab_size, **_COMMON))
        self.models = nn.ModuleList(members)
        self.weights = list(weights)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **ignored: Any,
    ) -> CausalLMOutputWithPast:
        total = sum(
            weight * member_logits(model, input_ids, attention_mask, **_positions(model, position_ids))
            for model, weight in zip(self.models, self.weights, strict=True)
        )
        return CausalLMOutputWithPast(logits=total)


def _positions(model: PreTrainedModel, position_ids: Tensor | None) -> dict[str, Tensor]:
    return {} if position_ids is None or model.config.model_type == "bloom" else {"position_ids": position_ids}


class TableConfig(PreTrainedConfig):
    model_type: ClassVar[str] = "ensembler_test_table"
    vocab_size: int = VOCAB
    num_hidden_layers: int = 1
    hidden_size: int = 1
    num_attention_heads: int = 1


row_cache.FAMILIES.add(TableConfig.model_type)  # it keeps keys and values and looks at no mask


class TableModel(PreTrainedModel, GenerationMixin):
    """A fake model: the logits after token i are row i of a table (V, V). It keeps a cache like a real one.

    `fault` is raised, or put into the logits where it is a number, in the next forward; `num_forwards` counts them.
    """

    config_class = TableConfig

    def __init__(self, table: Tensor) -> None:
        config = TableConfig(vocab_size=table.shape[0], bos_token_id=1, eos_token_id=2, pad_token_id=3)
        super().__init__(config)
        self.table = nn.Parameter(table)
        self.fault: BaseException | float | None = None
        self.num_forwards = 0

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutputWithPast:
        self.num_forwards += 1
        if past_key_values is not None:
            state = input_ids[:, None, :, None].float()
            past_key_values.update(state, state, 0)
        fault, self.fault = self.fault, None
        if isinstance(fault, BaseException):
            raise fault
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.table[input_ids[:, kept]]
        return CausalLMOutputWithPast(logits=logits if fault is None else logits.masked_fill(logits > 0, fault))


def tables(count: int, *, vocab_size: int = VOCAB, seed: int = 0) -> list[TableModel]:
    """Fake models with random logits."""
    generator = torch.Generator().manual_seed(seed)
    return [TableModel(3 * torch.randn(vocab_size, vocab_size, generator=generator)).eval() for _ in range(count)]
