"""Members on one copy of the weights give what two copies give: every decoding mode and family."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_cases import (
    FAMILIES,
    IDS,
    LORAS,
    MASK,
    MODES,
    PADDED,
    TOGETHER,
    GetPair,
    Pair,
    alone,
    assert_equal,
    assert_same,
    last_logits,
    make_pair,
    merged,
    roles_of_forwards,
    save_adapter,
    save_base,
    tokens,
)
from helpers.tiny import make_model, random_ids
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from ensembler.errors import RunError

MORE = random_ids(2, 1, seed=6)


# -- families, kinds of LoRA, decoding modes --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_families(get_pair: GetPair, family: str) -> None:
    """Logits padded and not, tokens beyond the windows, greedy and with beams."""
    pair = get_pair(family)
    assert roles_of_forwards(pair.shared) == TOGETHER
    assert (last_logits(pair.copies, IDS) - last_logits(pair.copies.members["source_pt"], IDS)).abs().max() > 0.1
    assert_equal(pair)
    assert_equal(pair, PADDED[:1], attention_mask=MASK[:1], logits_to_keep=3)
    for options in ({}, {"num_beams": 3}):
        assert tokens(pair.shared, PADDED, **options) == tokens(pair.copies, PADDED, **options)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("lora", LORAS)
def test_kinds_of_lora(get_pair: GetPair, lora: str, tied: bool) -> None:
    """The reference is PEFT's own forward: a merge into a head that is tied would change the embeddings too."""
    pair = get_pair("llama", lora, tied=tied)
    assert roles_of_forwards(pair.shared) == TOGETHER
    patched = PeftModel.from_pretrained(alone(pair.base), pair.adapter).eval()
    for ids in (IDS[:1, :1], IDS[:, :1], IDS):  # two and four rows go another way than many
        logits = {role: last_logits(pair.shared.members[role], ids) for role in ("source_ft", "source_pt")}
        assert_close(logits["source_ft"], last_logits(patched, ids), atol=1e-5, rtol=1e-5)
        assert_close(logits["source_pt"], last_logits(alone(pair.base), ids), atol=1e-5, rtol=1e-5)
        combined = logits["source_ft"] + 0.7 * (
            last_logits(pair.shared.members["target_pt"], ids) - logits["source_pt"]
        )
        assert_close(last_logits(pair.shared, ids), combined, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        *(("llama", mode) for mode in MODES),
        *(("mistral", mode) for mode in ("beams returned", "static beams", "chunks")),
    ],
)
def test_modes(get_pair: GetPair, family: str, mode: str) -> None:
    pair = get_pair(family)
    for ids in (IDS, PADDED):
        assert tokens(pair.shared, ids, **MODES[mode]) == tokens(pair.copies, ids, **MODES[mode])


@pytest.mark.parametrize(
    ("family", "drafts"),
    [
        *(("llama", drafts) for drafts in ("source_pt", "source_ft", "target_pt", "other", "prompt")),
        ("mistral", "source_pt"),
        ("mistral", "prompt"),
    ],
)
def test_speculation(get_pair: GetPair, family: str, drafts: str) -> None:
    """A member that drafts is a view of the backbone that verifies."""
    pair = get_pair(family)
    ids = random_ids(1, 4, seed=2).repeat(1, 3)
    if drafts == "prompt":
        extra: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    else:
        extra = {"assistant_model": make_model(seed=9) if drafts == "other" else pair.shared.members[drafts]}
    assert tokens(pair.shared, ids, max_new_tokens=14, **extra) == tokens(pair.copies, ids, max_new_tokens=14)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4]), torch.tensor([6])])
def test_logits_to_keep(pair: Pair, keep: int | Tensor) -> None:
    assert_equal(pair, logits_to_keep=keep)
    assert last_logits(pair.shared, IDS, logits_to_keep=keep).shape[1] == (keep if isinstance(keep, int) else len(keep))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("ids_rows", [1, 2])
def test_position_ids(get_pair: GetPair, family: str, num_rows: int, ids_rows: int) -> None:
    """One row of positions for all rows, or one for each."""
    positions = torch.arange(3, 10)[None].repeat(num_rows, 1)
    if num_rows == 2:
        positions[1] += 5
    if num_rows <= ids_rows:
        assert_equal(get_pair(family), IDS[:ids_rows], position_ids=positions)


def test_loss_and_gradients(pair: Pair) -> None:
    labels = IDS.clone()
    labels[1, :3] = -100
    ours, theirs = (model(IDS, labels=labels) for model in (pair.shared, pair.copies))
    assert_close(ours.loss, theirs.loss, atol=1e-5, rtol=1e-5)
    assert_same(ours.logits, theirs.logits)
    ours.loss.backward()  # a head alone has an own gradient in both; the backbone's flow through both blocks of rows
    theirs.loss.backward()
    grads = [
        sum(model.members[role].get_input_embeddings().weight.grad for role in roles)
        for model, roles in ((pair.shared, ["source_ft"]), (pair.copies, ["source_ft", "source_pt"]))
    ]
    assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-3)
    for model in (pair.shared, pair.copies):
        model.zero_grad()


def test_alpha_per_row_and_alpha_0(pair: Pair) -> None:
    model = copy.deepcopy(pair.shared)
    model.alpha = 0.0
    assert_close(last_logits(model, IDS), last_logits(merged(pair.base, pair.adapter), IDS), atol=1e-5, rtol=1e-5)
    model.alpha = torch.tensor([0.0, 1.3])
    logits = last_logits(model, IDS)
    for row, alpha in enumerate((0.0, 1.3)):
        model.alpha = alpha
        assert_close(logits[row], last_logits(model, IDS)[row], atol=1e-6, rtol=1e-6)


# -- the cache of several members -------------------------------------------------------------------------------------

CHANGES: dict[str, tuple[Any, Any]] = {  # what is done to the cache, and the same to the tokens
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), lambda ids: ids[[1, 0]]),
    "reorder to one": (lambda cache: cache.reorder_cache(torch.tensor([1])), lambda ids: ids[[1]]),
    "reorder to three": (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), lambda ids: ids[[1, 1, 0]]),
    "crop": (lambda cache: cache.crop(-2), lambda ids: ids[:, :-2]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(3), lambda ids: ids.repeat_interleave(3, 0)),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), lambda ids: ids[[1]]),
    "select the last": (lambda cache: cache.batch_select_indices(torch.tensor([-1])), lambda ids: ids[[-1]]),
    "select by mask": (lambda cache: cache.batch_select_indices(torch.tensor([False, True])), lambda ids: ids[[1]]),
    "reset": (lambda cache: cache.reset(), lambda ids: ids[:, :0]),
    "copy": (copy.deepcopy, lambda ids: ids),
}


@pytest.mark.parametrize("change", CHANGES)
def test_cache_changes_act_on_every_block(pair: Pair, change: str) -> None:
    on_cache, on_ids = CHANGES[change]
    with torch.no_grad():
        cache = pair.shared(IDS, use_cache=True).past_key_values
        assert list(cache.caches) == [("source_ft", "source_pt"), ("target_pt",)]
        cache = on_cache(cache) or cache
        past = on_ids(IDS)
        token = random_ids(past.shape[0], 1, seed=8)
        logits = pair.shared(token, past_key_values=cache, use_cache=True).logits[:, -1]
    expected = last_logits(pair.copies, torch.cat([past, token], 1))[:, -1]
    assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_failed_step_is_undone_in_every_block(get_pair: GetPair) -> None:
    """The backbone has the token, the last member has not: a retry is right all the same."""
    pair = get_pair("llama")
    with torch.no_grad():
        cache = pair.shared(IDS, use_cache=True).past_key_values
        handle = pair.shared.members["target_pt"].model.layers[1].register_forward_pre_hook(fail)
        try:
            with pytest.raises(RunError, match=r"^target_pt failed: RuntimeError: boom$"):
                pair.shared(MORE, past_key_values=cache, use_cache=True)
        finally:
            handle.remove()
        assert set(cache.lengths().values()) == {7}
        logits = pair.shared(MORE, past_key_values=cache, use_cache=True).logits[:, -1]
    assert_close(logits, last_logits(pair.copies, torch.cat([IDS, MORE], 1))[:, -1], atol=1e-5, rtol=1e-5)


def test_an_error_of_the_backbone_names_all_its_members_and_leaves_no_routing(get_pair: GetPair) -> None:
    pair = get_pair("qwen2")
    before = last_logits(pair.shared, IDS)
    handle = pair.shared.members["source_ft"].model.layers[1].register_forward_pre_hook(fail)
    try:
        for _ in range(2):
            with pytest.raises(RunError, match=r"^source_ft and source_pt failed: RuntimeError: boom$"):
                last_logits(pair.shared, IDS)
    finally:
        handle.remove()
    assert_close(last_logits(pair.shared.members["source_pt"], IDS), last_logits(alone(pair.base), IDS))
    assert torch.equal(last_logits(pair.shared, IDS), before)


def fail(*_: Any) -> None:
    raise RuntimeError("boom")


def test_nan_of_one_adapter_names_its_member_alone(tmp_path: Path, pair_target: PreTrainedModel) -> None:
    base = save_base(tmp_path / "base")
    pair = make_pair(base, save_adapter(base, tmp_path / "adapter"), pair_target)
    layer: Any = pair.shared.members["source_ft"].model.layers[0].mlp.down_proj
    layer.adapters.up_source_ft.data.fill_(float("nan"))
    with pytest.raises(RunError, match=r"^source_ft computed NaN logits in torch.float32"):
        last_logits(pair.shared, IDS)
