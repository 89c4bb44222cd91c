"""On two ranks vLLM's members compute shards of their logits, and one combined row of each step is gathered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.vllm_cases import assert_same, engine, expected, prompts_for, served
from transformers import AutoModelForCausalLM, AutoTokenizer

from ensembler import EnsembleForCausalLM
from ensembler.demo import demo_folder
from ensembler.engine.grid import make_combination
from ensembler.rules import RULES
from ensembler.vocab import VocabularyContract

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm

TOKENS, WIDE = 134, 200  # of 256 padded ids each rank has 128: the second has 6 that all members hold


def save_padded(folder: Path) -> EnsembleForCausalLM:
    """The embedded family with a target that has a wider head, which vLLM alone would cut elsewhere."""
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_pretrained(demo_folder() / "target_pt")
    target.resize_token_embeddings(WIDE, mean_resizing=False)
    target.save_pretrained(folder / "target")
    AutoTokenizer.from_pretrained(demo_folder() / "target_pt").save_pretrained(folder / "target")
    members = {role: str(demo_folder() / role) for role in ("source_ft", "source_pt")}
    members["target_pt"] = str(folder / "target")
    model = EnsembleForCausalLM.from_members(rule="base-change", alpha=0.7, members=members)
    model.save_pretrained(folder / "ensemble")
    return model


def watch(model: Any) -> None:
    """Note what this rank gives to gathers, and how often logits are asked for, in `model.watched`."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    gather, compute = group.all_gather, model.compute_logits
    model.watched = {"gathers": [], "steps": 0}

    def watched_gather(tensor: Any, dim: int = -1) -> Any:
        model.watched["gathers"].append((tensor.shape[1], str(tensor.dtype)))
        return gather(tensor, dim)

    def watched_compute(hidden_states: Any) -> Any:
        model.watched["steps"] += 1
        return compute(hidden_states)

    group.all_gather, model.compute_logits = watched_gather, watched_compute


def watched(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = model.watched
    return found


def fail_on_second_rank(model: Any) -> None:
    """Have the source's logits be NaN at one id of the second rank's."""
    from vllm.distributed import get_tensor_model_parallel_rank

    def fail(processor: Any, arguments: Any, logits: Any) -> None:
        if get_tensor_model_parallel_rank() == 1:
            logits[:, 3] = float("nan")

    model.members["source_pt"].logits_processor.register_forward_hook(fail)


def test_one_combined_row_is_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    model = save_padded(tmp_path)
    prompts = prompts_for(TOKENS)
    with engine(tmp_path / "ensemble", load_format="ensembler", tensor_parallel_size=2) as llm:
        llm.apply_model(watch)
        assert_same(served(llm, prompts), expected(model, prompts))
        eft = EnsembleForCausalLM.from_config(model.config.replaced(rule="eft", alpha=1.1))
        assert_same(served(llm, prompts, rule="eft", alpha=1.1), expected(eft, prompts))
        of_ranks = llm.apply_model(watched)
        assert len(of_ranks) == 2
        for of_rank in of_ranks:
            assert of_rank["gathers"] == [(128 + 3, "torch.float32")] * of_rank["steps"]
            assert of_rank["steps"] >= 32

        llm.apply_model(fail_on_second_rank)
        from vllm import SamplingParams

        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], SamplingParams(max_tokens=1))
        number = list(RULES["base-change"].roles).index("source_pt")
        assert {output.outputs[0].token_ids[0] for output in outputs} == {WIDE + number}


@pytest.mark.parametrize(
    ("rule", "roles", "shared", "outside", "num_ranks", "padding"),
    [
        ("base-change", ("source_ft", "target_pt", "source_pt"), 190, "mask", 2, 256),
        ("base-change", ("source_ft", "target_pt", "source_pt"), 190, "mask", 3, 384),
        ("base-change", ("source_ft", "target_pt", "source_pt"), 190, "mask", 1, None),
        ("base-change", ("source_ft", "target_pt", "source_pt"), 190, "neutral", 2, None),
        ("contrastive", ("expert", "amateur"), 200, "mask", 2, None),
    ],
)
def test_which_ensembles_have_a_padding_in_common(
    rule: str,
    roles: tuple[str, ...],
    shared: int,
    outside: str,
    num_ranks: int,
    padding: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ensembler_kernels import Weights

    from ensembler.serving import vllm_shards

    monkeypatch.setattr(vllm_shards, "get_tensor_model_parallel_world_size", lambda: num_ranks)
    widths = dict(zip(roles, (200, 220, 195), strict=False))
    contract = VocabularyContract("", shared, widths, dict.fromkeys(roles, shared), dict.fromkeys(roles, 0))
    weights = Weights.of((make_combination(RULES[rule], contract, outside, roles), 1.0))
    assert vllm_shards.common_padding(weights, widths) == padding
