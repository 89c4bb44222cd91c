"""The test suites that `transformers` runs on each of its models, on a tiny ensemble: `make test-suites`."""

from __future__ import annotations

import sys
import unittest
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from helpers.tiny import VOCAB, make_model, random_ids
from transformers import GenerationMixin, PreTrainedModel

from ensembler import EnsembleConfig, EnsembleForCausalLM
from ensembler.preflight import check_ensemble

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "build" / "suites" / version("transformers")))

ModelTesterMixin: Any = import_module("transformers_tests.test_modeling_common").ModelTesterMixin
GenerationTesterMixin: Any = import_module("transformers_tests.generation.test_utils").GenerationTesterMixin
ROLES = ("source_ft", "source_pt", "target_pt")

_HIDDEN = "asks for hidden states or attentions, of which an ensemble has no one set"
_FILES = "expects one file of weights: the folder of an ensemble has its members' folders in it"
_REPORT = "asks for a report of one state dict, and members are loaded one by one"
_COMPLETE = "makes weights from the configuration alone: members come with theirs"
_EMBEDDINGS = "changes the embeddings, of which each member has its own"
NOT_FOR_ENSEMBLES = {  # the beginning of a test's name: the reason
    "test_attention_outputs": _HIDDEN,
    "test_beam_sample_generate_dict_output": _HIDDEN,
    "test_beam_search_generate_dict_output": _HIDDEN,
    "test_can_capture_specific_layers_hidden_states": _HIDDEN,
    "test_capture_outputs_decorator": _HIDDEN,
    "test_eager_matches_sdpa_inference": _HIDDEN,
    "test_greedy_generate_dict_outputs": _HIDDEN,
    "test_hidden_states_output": _HIDDEN,
    "test_model_outputs_equivalence": _HIDDEN,
    "test_retain_grad_hidden_states_attentions": _HIDDEN,
    "test_sample_generate_dict_output": _HIDDEN,
    "test_load_save_without_tied_weights": _FILES,
    "test_from_pretrained_no_checkpoint": _FILES,
    "test_can_use_safetensors": _REPORT,
    "test_model_weights_reload_no_missing_tied_weights": _REPORT,
    "test_all_tensors_are_parameter_or_buffer": _COMPLETE,
    "test_init_weights_can_init_buffers": _COMPLETE,
    "test_cannot_load_with_meta_device_context_manager": "expects another error: ours names the member",
    "test_model_get_set_embeddings": _EMBEDDINGS,
    "test_resize_tokens_embeddings": _EMBEDDINGS,
    "test_model_base_model_prefix": "asks for the model below the head: each member has its own",
    "test_past_key_values_format": "asks for the cache of one model: each member has its own",
}


class TinyForCausalLM(EnsembleForCausalLM, GenerationMixin):
    """An ensemble that makes its members from the configuration alone, as the suites make a model."""

    def __init__(self, config: EnsembleConfig, members: Any = None, contract: Any = None, *others: Any) -> None:
        if members is None:
            settings = {
                "tie_word_embeddings": getattr(config, "tie_word_embeddings", False),
                "attn_implementation": config._attn_implementation,
            }
            members = {role: make_model("llama", seed, **settings) for seed, role in enumerate(ROLES)}
            contract = check_ensemble(config.replaced(), members).contract
        super().__init__(config, members, contract, *others)

    def save_pretrained(self, save_directory: str, **options: Any) -> None:
        super().save_pretrained(save_directory, overwrite=True, **options)


class Inputs:
    """The configuration and the inputs that the suites ask for."""

    batch_size = 3
    seq_length = 7
    is_training = True

    def get_config(self) -> EnsembleConfig:
        config = EnsembleConfig(rule="base-change", alpha=0.7, members=dict.fromkeys(ROLES, "<in memory>"))
        config.vocab_size, config.eos_token_id, config.pad_token_id, config.bos_token_id = VOCAB, 2, 3, 1
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[EnsembleConfig, dict[str, torch.Tensor]]:
        ids = random_ids(self.batch_size, self.seq_length)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class TestEnsemble(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (TinyForCausalLM,)

    def setUp(self) -> None:
        self.model_tester = Inputs()
        name = self._testMethodName
        reason = next((reason for start, reason in NOT_FOR_ENSEMBLES.items() if name.startswith(start)), None)
        if reason is not None:
            self.skipTest(reason)

    def _prepare_for_class(
        self, inputs: dict[str, Any], model_class: type[PreTrainedModel], return_labels: bool = False
    ) -> dict[str, Any]:
        made: dict[str, Any] = super()._prepare_for_class(inputs, model_class)
        return {**made, "labels": made["input_ids"].clone()} if return_labels else made

    def _check_caches_are_equal(self, one: Any, other: Any) -> None:
        assert type(one) is type(other)
        num = one.get_seq_length()
        assert other.get_seq_length() == num
        for roles, cache in one.caches.items():
            for layer, its in zip(cache.layers, other.caches[roles].layers, strict=True):
                torch.testing.assert_close(layer.keys[..., :num, :], its.keys[..., :num, :])
                torch.testing.assert_close(layer.values[..., :num, :], its.values[..., :num, :])
