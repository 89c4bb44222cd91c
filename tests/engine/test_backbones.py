"""Members on one copy of the weights give what two copies give: every decoding mode, family and kind of adapter."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_cases import (
    Pair,
    alone,
    last_logits,
    make_pair,
    merged,
    roles_of_forwards,
    save_adapter,
    save_base,
    targets,
    weight_bytes,
)
from helpers.tiny import make_model, make_tokenizer, random_ids
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ensembler import EnsembleCache, EnsembleForCausalLM, MemberConfig
from ensembler.errors import MemberError, OutputError, RunError

GetPair = Callable[..., Pair]
IDS = random_ids(2, 7)
MORE = random_ids(2, 1, seed=6)
NUM_NEW = 9
PADDED = torch.cat([torch.tensor([[3, 3], [17, 30]]), IDS], 1)
MASK = (PADDED != 3).long()
TOGETHER = [("source_ft", "source_pt"), ("target_pt",)]

LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 7}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 24}, "rank_pattern": {"v_proj": 1}, "use_rslora": True},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "all-linear": {"target_modules": "all-linear"},
    "one layer": {"layers_to_transform": [1], "exclude_modules": ["v_proj"]},
    "rank above width": {"r": 40},
}
FAMILIES = ("llama", "mistral", "gemma2", "qwen2", "gpt2", "gpt_neox", "opt", "bloom")


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return make_model("qwen2", 3, hidden_size=24)


@pytest.fixture(scope="module")
def get_pair(tmp_path_factory: pytest.TempPathFactory, target: PreTrainedModel) -> GetPair:
    """A function that makes the pair of a family and a LoRA once."""
    made: dict[tuple[str, str, bool], Pair] = {}

    def get(family: str = "llama", lora: str = "plain", *, tied: bool = False) -> Pair:
        if (family, lora, tied) not in made:
            folder = tmp_path_factory.mktemp("pair")
            more = {"tie_word_embeddings": True} if tied else {}
            base = save_base(folder / "base", family, **more)
            made[family, lora, tied] = make_pair(base, save_adapter(base, folder / "adapter", **LORAS[lora]), target)
        return made[family, lora, tied]

    return get


@pytest.fixture
def pair(get_pair: GetPair) -> Pair:
    return get_pair()


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest logit.

    Which order a product is summed in depends on the CPU, and sliding windows of padded rows amplify what rounding
    leaves.
    """
    scale = max(1.0, expected.abs().max().item())
    assert_close(actual / scale, expected / scale, atol=1e-5, rtol=0)


def assert_equal(pair: Pair, ids: Tensor = IDS, **inputs: Any) -> None:
    assert_same(last_logits(pair.shared, ids, **inputs), last_logits(pair.copies, ids, **inputs))


def tokens(model: PreTrainedModel, ids: Tensor, seed: int = 11, **options: Any) -> list[list[int]]:
    torch.manual_seed(seed)
    options = {"attention_mask": (ids != 3).long(), "max_new_tokens": NUM_NEW, "eos_token_id": None, **options}
    result: list[list[int]] = model.generate(ids, pad_token_id=3, **options).tolist()
    return result


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


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "nucleus": {"do_sample": True, "top_p": 0.8, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "beam sample": {"num_beams": 3, "do_sample": True},
    "static": {"cache_implementation": "static"},
    "static beams": {"cache_implementation": "static", "num_beams": 3},
    "no cache": {"use_cache": False},
    "no cache, beams": {"use_cache": False, "num_beams": 3},
    "chunks": {"prefill_chunk_size": 4},
    "repetition": {"repetition_penalty": 1.4},
    "guidance": {"guidance_scale": 1.5},
}


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


def test_nan_of_one_adapter_names_its_member_alone(tmp_path: Path, target: PreTrainedModel) -> None:
    base = save_base(tmp_path / "base")
    pair = make_pair(base, save_adapter(base, tmp_path / "adapter"), target)
    layer: Any = pair.shared.members["source_ft"].model.layers[0].mlp.down_proj
    layer.up_source_ft.fill_(float("nan"))
    with pytest.raises(RunError, match=r"^source_ft computed NaN logits in torch.float32"):
        last_logits(pair.shared, IDS)


# -- more members on one backbone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_adapters", [2, 3])
@pytest.mark.parametrize("with_base", [False, True], ids=["adapters only", "with base"])
def test_several_adapters_on_one_backbone(tmp_path: Path, num_adapters: int, with_base: bool) -> None:
    """Of different ranks and targets; one of them is used by two members."""
    base = save_base(tmp_path / "base", "mistral")
    settings: list[dict[str, Any]] = [{"r": 2}, {"target_modules": ["lm_head", "k_proj"]}, {"use_rslora": True, "r": 9}]
    adapters = [save_adapter(base, tmp_path / f"adapter{i}", seed=i, **settings[i]) for i in range(num_adapters)]
    members: dict[str, Any] = {f"m{i}": MemberConfig(str(base), adapter=str(path)) for i, path in enumerate(adapters)}
    expected: dict[str, Any] = {f"m{i}": merged(base, path) for i, path in enumerate(adapters)}
    members["again"], expected["again"] = members["m0"], expected["m0"]
    if with_base:
        members["base"], expected["base"] = str(base), alone(base)
    numbers = {role: 1.0 / (i + 1) for i, role in enumerate(members)}
    options = {"rule": "linear", "alpha": 0.5, "constant": numbers, "slope": {"m1": -0.4}}
    pair = Pair(
        EnsembleForCausalLM.from_members(members=members, **options),
        EnsembleForCausalLM.from_members(members=expected, **options),
        base,
        adapters[0],
    )
    assert roles_of_forwards(pair.shared) == [tuple(members)]
    assert_equal(pair)
    assert_equal(pair, PADDED, attention_mask=MASK)
    for mode in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        assert tokens(pair.shared, PADDED, **mode) == tokens(pair.copies, PADDED, **mode)


def test_realign_with_two_adapters(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gemma2")
    paths = [save_adapter(base, tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b"))]
    members = {"reference": str(paths[0]), "aligned": str(paths[1])}  # a LoRA folder is a model too
    shared = EnsembleForCausalLM.from_members(rule="realign", alpha=0.3, members=members)
    assert roles_of_forwards(shared) == [("reference", "aligned")]
    expected = 0.7 * last_logits(merged(base, paths[0]), IDS) + 0.3 * last_logits(merged(base, paths[1]), IDS)
    assert_close(last_logits(shared, IDS), expected, atol=1e-5, rtol=1e-5)


def test_the_same_model_twice_without_adapters_is_two_models(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    model = EnsembleForCausalLM.from_members(rule="realign", members={"reference": str(base), "aligned": str(base)})
    assert roles_of_forwards(model) == [("reference",), ("aligned",)]
    assert weight_bytes(model) == 2 * weight_bytes(model.members["reference"])


@pytest.mark.parametrize(
    "other",
    [{"dtype": "bfloat16"}, {"quantization": "bnb-8bit"}, {"device_map": {"": "cpu"}}],
    ids=lambda o: next(iter(o)),
)
def test_members_that_are_loaded_in_another_way_are_another_backbone(tmp_path: Path, other: dict[str, Any]) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    members = {"reference": str(base), "aligned": MemberConfig(str(base), adapter=str(adapter), **other)}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=1.0, members=members)
    assert roles_of_forwards(model) == [("reference",), ("aligned",)]
    expected = last_logits(merged(base, adapter), IDS)
    error = (last_logits(model, IDS) - expected).norm() / expected.norm()
    assert error < (1e-5 if "device_map" in other else 0.15)


def test_paths_that_are_written_differently_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the adapter's config calls its base may be relative to where it was trained."""
    save_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    adapter = save_adapter(Path("base"), tmp_path / "adapter")
    members = {"reference": f"{tmp_path}/./base/", "aligned": str(adapter)}
    model = EnsembleForCausalLM.from_members(rule="realign", members=members)
    assert roles_of_forwards(model) == [("reference", "aligned")]


def test_a_tokenizer_of_the_adapter_with_extra_tokens(tmp_path: Path) -> None:
    """Ids that only source_ft holds: source_pt on the same backbone reads its substitute for them."""
    base = save_base(tmp_path / "base", vocab_size=72)  # padded: room for more tokens
    adapter = save_adapter(base, tmp_path / "adapter")
    tokenizer: PreTrainedTokenizerFast = make_tokenizer(4)
    tokenizer.save_pretrained(adapter)
    target = save_base(tmp_path / "target", seed=4)
    for outside in ("mask", "neutral"):
        members = {
            "source_ft": MemberConfig(str(base), adapter=str(adapter)),
            "source_pt": str(base),
            "target_pt": str(target),
        }
        shared = EnsembleForCausalLM.from_members(alpha=0.6, members=members, outside=outside)
        assert roles_of_forwards(shared) == TOGETHER
        ids = torch.tensor([[5, 66, 9, 67], [8, 9, 64, 30]])
        assert shared.contract.held == {"source_ft": 68, "source_pt": 64, "target_pt": 64}
        read = torch.where(ids < 64, ids, shared.contract.substitutes["source_pt"])
        z_ft, z_pt = last_logits(merged(base, adapter), ids), last_logits(alone(base), read)
        z_target = last_logits(alone(target), torch.where(ids < 64, ids, shared.contract.substitutes["target_pt"]))
        logits = last_logits(shared, ids)
        z = [values[..., :64].log_softmax(-1) for values in (z_ft, z_target, z_pt)]
        expected = (z[0] + 0.6 * (z[1] - z[2])).log_softmax(-1)
        assert_close(logits[..., :64].log_softmax(-1), expected, atol=1e-5, rtol=1e-5)
        assert logits[..., 64:68].isfinite().all() == (outside == "neutral")


@pytest.mark.parametrize("seed", range(6))
def test_random_cases(tmp_path: Path, target: PreTrainedModel, seed: int) -> None:
    """Families, ranks, targets, scalings, batches and modes drawn at random."""
    draw = random.Random(seed)
    family = draw.choice(FAMILIES)
    base = save_base(tmp_path / "base", family, seed=seed)
    chosen = draw.sample(targets(family), draw.randint(1, len(targets(family))))
    lora = {
        "r": draw.randint(1, 9),
        "lora_alpha": draw.choice([1, 4, 16]),
        "use_rslora": draw.random() < 0.5,
        "target_modules": chosen,
        "rank_pattern": {draw.choice(chosen): draw.randint(1, 5)},
        "lora_dropout": 0.3,
    }
    pair = make_pair(
        base, save_adapter(base, tmp_path / "adapter", seed=seed, **lora), target, alpha=draw.uniform(0, 2)
    )
    rows, positions = draw.randint(1, 4), draw.randint(1, 12)
    ids = random_ids(rows, positions, seed=seed)
    for row in range(rows):
        ids[row, : draw.randint(0, positions - 1)] = 3
    ids[0] = ids[0].clamp(min=4)
    mask = (ids != 3).long()
    actual, expected = (last_logits(model, ids, attention_mask=mask)[:, -1] for model in (pair.shared, pair.copies))
    assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    mode = MODES[draw.choice(list(MODES))]
    assert tokens(pair.shared, ids, **mode) == tokens(pair.copies, ids, **mode)


def test_pefts_own_mixed_batch(tmp_path: Path) -> None:
    """adapter_names with '__base__' is what the batched forward means."""
    base = save_base(tmp_path / "base", "qwen2")
    adapters = {role: save_adapter(base, tmp_path / role, seed=i, r=2 + i) for i, role in enumerate("ab")}
    patched = PeftModel.from_pretrained(alone(base), adapters["a"], adapter_name="a")
    patched.load_adapter(adapters["b"], adapter_name="b")
    names = ["a"] * 2 + ["b"] * 2 + ["__base__"] * 2
    expected = last_logits(patched.eval(), IDS.repeat(3, 1), adapter_names=names).split(2)
    members: dict[str, Any] = {role: MemberConfig(str(base), adapter=str(path)) for role, path in adapters.items()}
    numbers = {"a": 0.7, "b": -1.1, "base": 0.4}
    model = EnsembleForCausalLM.from_members(
        rule="linear", members={**members, "base": str(base)}, constant=numbers, alpha=0.0
    )
    combined = sum(weight * logits for weight, logits in zip(numbers.values(), expected, strict=True))
    assert_close(last_logits(model, IDS), combined, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_two_copies(get_pair: GetPair, dtype: str) -> None:
    """Unmerged, the update is rounded apart from the weights: no further from fp32 than a merged copy is."""
    pair = get_pair("llama")
    truth = last_logits(merged(pair.base, pair.adapter), IDS)
    members = {
        "reference": MemberConfig(str(pair.base), dtype=dtype),
        "aligned": MemberConfig(str(pair.base), dtype=dtype, adapter=str(pair.adapter)),
    }
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=1.0, members=members)
    assert {buffer.dtype for name, buffer in model.named_buffers() if "_aligned" in name} == {getattr(torch, dtype)}
    reference = last_logits(merged(pair.base, pair.adapter).to(getattr(torch, dtype)), IDS).float()
    own, other = ((logits - truth).norm() / truth.norm() for logits in (last_logits(model, IDS), reference))
    assert own <= 2 * other + 1e-3, (own, other)


# -- one copy of the weights ------------------------------------------------------------------------------------------


def test_weights_are_in_memory_once(pair: Pair) -> None:
    members = pair.shared.members
    layers = [members[role].model.layers[0] for role in ("source_ft", "source_pt")]
    assert layers[0].mlp.up_proj.weight.data_ptr() == layers[1].mlp.up_proj.weight.data_ptr()
    assert pair.shared.num_parameters() == sum(members[role].num_parameters() for role in ("source_pt", "target_pt"))
    ranks = 4 * sum(a + b for a, b in ((16, 16), (16, 16), (32, 16))) * 2 * 4  # r · (in + out), layers, bytes
    assert weight_bytes(pair.shared) == weight_bytes(alone(pair.base)) + weight_bytes(members["target_pt"]) + ranks
    assert weight_bytes(pair.copies) == 2 * weight_bytes(alone(pair.base)) + weight_bytes(members["target_pt"])


COPIES: dict[str, Callable[[EnsembleForCausalLM], EnsembleForCausalLM]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("lora", ["plain", "dora"])
def test_copies_are_whole_and_independent(tmp_path: Path, target: PreTrainedModel, how: str, lora: str) -> None:
    base = save_base(tmp_path / "base")
    pair = make_pair(base, save_adapter(base, tmp_path / "adapter", use_dora=lora == "dora"), target)
    before = last_logits(pair.shared, IDS)
    made = COPIES[how](pair.shared)
    assert roles_of_forwards(made) == roles_of_forwards(pair.shared)
    assert torch.equal(last_logits(made, IDS), before)
    for role in made.members:
        assert_same(last_logits(made.members[role], IDS), last_logits(pair.copies.members[role], IDS))
    assert weight_bytes(made) == weight_bytes(pair.shared)
    for tensor in made.parameters():
        tensor.data.mul_(1.1)
    assert (last_logits(made, IDS) - before).abs().max() > 0.1
    assert torch.equal(last_logits(pair.shared, IDS), before)


# -- adapters that are not plain LoRA ---------------------------------------------------------------------------------


def random_biases(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)


OTHERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "dora": ("llama", lambda family: LoraConfig(r=4, target_modules=targets(family), use_dora=True)),
    "bias all": ("qwen2", lambda family: LoraConfig(r=4, target_modules=targets(family), bias="all")),
    "bias lora_only": ("opt", lambda family: LoraConfig(r=4, target_modules=targets(family), bias="lora_only")),
    "lora_bias": ("opt", lambda family: LoraConfig(r=4, target_modules=targets(family), lora_bias=True)),
    "modules to save": (
        "llama",
        lambda family: LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ),
    "norm to save": ("llama", lambda family: LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"])),
    "embeddings": ("llama", lambda family: LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])),
    "tied embeddings": ("gemma2", lambda family: LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])),
    "ia3": (
        "llama",
        lambda family: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "loha": ("gpt_neox", lambda family: LoHaConfig(r=4, target_modules=targets(family))),
    "lokr": ("mistral", lambda family: LoKrConfig(r=4, target_modules=targets(family))),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_run_one_by_one_on_one_copy(
    tmp_path: Path, target: PreTrainedModel, said: list[str], kind: str
) -> None:
    family, config = OTHERS[kind]
    base = save_base(tmp_path / "base", family)
    adapter = save_adapter(base, tmp_path / "adapter", config(family))
    said.clear()
    members = {"source_ft": MemberConfig(str(base), adapter=str(adapter)), "source_pt": str(base), "target_pt": target}
    shared = EnsembleForCausalLM.from_members(alpha=0.7, members=members)
    assert [line for line in said if "share their weights and not their forward" in line] == said
    assert len(said) == 1
    assert roles_of_forwards(shared) == [("source_ft",), ("source_pt",), ("target_pt",)]
    patched = PeftModel.from_pretrained(alone(base), adapter).eval()
    z = {"source_pt": last_logits(alone(base), IDS), "source_ft": last_logits(patched, IDS)}
    assert (z["source_ft"] - z["source_pt"]).abs().max() > 0.1
    for _ in range(2):  # in any order, and again
        for role in ("source_pt", "source_ft", "source_pt"):
            assert_close(last_logits(shared.members[role], IDS), z[role], atol=1e-5, rtol=1e-5)
        combined = z["source_ft"] + 0.7 * (last_logits(target, IDS) - z["source_pt"])
        assert_close(last_logits(shared, IDS), combined, atol=2e-5, rtol=1e-5)
    copies = EnsembleForCausalLM.from_members(
        alpha=0.7, members={"source_ft": patched.base_model.model, "source_pt": alone(base), "target_pt": target}
    )
    for options in ({}, {"num_beams": 3}):
        assert tokens(shared, PADDED, **options) == tokens(copies, PADDED, **options)
    embeddings = [shared.members[role].get_input_embeddings() for role in ("source_ft", "source_pt")]
    assert len({getattr(layer, "base_layer", layer).weight.data_ptr() for layer in embeddings}) == 1
    num_bytes, own = weight_bytes(alone(base)), weight_bytes(patched) - weight_bytes(alone(base))
    assert weight_bytes(shared) - weight_bytes(target) == num_bytes + own
    assert len(said) == 1


def test_two_other_adapters_keep_to_themselves(tmp_path: Path) -> None:
    """Biases of two adapters and of the base: the last that was loaded must not be everyone's."""
    base = save_base(tmp_path / "base", "opt")
    paths = {
        role: save_adapter(base, tmp_path / role, LoraConfig(r=2, target_modules=["q_proj"], bias="all"), seed=seed)
        for seed, role in enumerate("ab")
    }
    plain = save_adapter(base, tmp_path / "plain")
    members: dict[str, Any] = {role: MemberConfig(str(base), adapter=str(path)) for role, path in paths.items()}
    members |= {"c": MemberConfig(str(base), adapter=str(plain)), "d": str(base)}
    model = EnsembleForCausalLM.from_members(rule="linear", members=members, constant=dict.fromkeys("abcd", 1.0))
    expected = {role: PeftModel.from_pretrained(alone(base), path).eval() for role, path in paths.items()}
    expected |= {"c": merged(base, plain), "d": alone(base)}
    for role in "dabcadbc":
        actual = last_logits(model.members[role], IDS)
        assert_close(actual, last_logits(expected[role], IDS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_embeddings_in_the_adapters_file_are_its_own(tmp_path: Path, shared: bool) -> None:
    """PEFT saves embeddings beside a LoRA where it is asked to: a member gets them, and its base does not."""
    base = save_base(tmp_path / "base")

    def train(model: PreTrainedModel) -> None:
        torch.nn.init.normal_(model.get_input_embeddings().weight)

    adapter = save_adapter(base, tmp_path / "adapter", change=train, save={"save_embedding_layers": True})
    other = base if shared else save_base(tmp_path / "other", seed=8)
    members = {"reference": str(other), "aligned": MemberConfig(str(base), adapter=str(adapter))}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    patched = PeftModel.from_pretrained(alone(base), adapter).eval()
    assert_close(last_logits(model.members["aligned"], IDS), last_logits(patched, IDS), atol=1e-5, rtol=1e-5)
    assert_close(last_logits(model.members["reference"], IDS), last_logits(alone(other), IDS), atol=1e-5, rtol=1e-5)


def test_embeddings_that_are_the_bases_do_not_keep_members_apart(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", save={"save_embedding_layers": True})
    members = {"reference": str(base), "aligned": MemberConfig(str(base), adapter=str(adapter))}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    assert roles_of_forwards(model) == [("reference", "aligned")]


def test_resized_embeddings_are_refused_before_loading(tmp_path: Path) -> None:
    """They were dropped once: the member would have run without what its new tokens had learnt."""
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", change=lambda model: model.resize_token_embeddings(66))
    for other in (base, save_base(tmp_path / "other")):
        members = {"reference": str(other), "aligned": MemberConfig(str(base), adapter=str(adapter))}
        with pytest.raises(MemberError, match=r"^aligned: .* in shape \(66, 16\); .*resized embeddings") as caught:
            EnsembleForCausalLM.from_members(rule="realign", members=members)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target_modules", [["lm_head", "q_proj"], ["embed_tokens", "q_proj"]])
def test_a_single_member_whose_tied_embeddings_are_adapted(
    tmp_path: Path, target: PreTrainedModel, target_modules: list[str]
) -> None:
    """Merged into tied weights, an update of the head would be one of the embeddings as well; and so on disk."""
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=target_modules)
    members = {"reference": target, "aligned": MemberConfig(str(base), adapter=str(adapter))}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=1.0, members=members)
    expected = last_logits(PeftModel.from_pretrained(alone(base), adapter).eval(), IDS)
    assert_close(last_logits(model.members["aligned"], IDS), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "saved", copy_members=True)
    saved = EnsembleForCausalLM.from_pretrained(tmp_path / "saved")
    assert_close(last_logits(saved.members["aligned"], IDS), expected, atol=1e-5, rtol=1e-5)


def test_prompt_tuning_is_refused_in_one_line(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    settings = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    get_peft_model(alone(base), settings).save_pretrained(tmp_path / "adapter")
    members = {"reference": str(base), "aligned": MemberConfig(str(base), adapter=str(tmp_path / "adapter"))}
    with pytest.raises(MemberError, match=r"^aligned: .* of kind PROMPT_TUNING, which adds tokens") as caught:
        EnsembleForCausalLM.from_members(rule="realign", members=members)
    assert "\n" not in str(caught.value)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "wider": ({"hidden_size": 24}, "shape"),
    "fewer layers": ({"num_layers": 1}, "which is not there"),
    "more layers": ({"num_layers": 3}, "lacks"),
    "another family": ({"family": "gpt2"}, "Target modules"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    "config", [None, IA3Config(target_modules=["q_proj"], feedforward_modules=[])], ids=["lora", "ia3"]
)
def test_an_adapter_for_another_base_is_one_line_with_the_role(tmp_path: Path, wrong: str, config: Any) -> None:
    settings, message = WRONG[wrong]
    adapter = save_adapter(save_base(tmp_path / "base"), tmp_path / "adapter", config)
    other = str(save_base(tmp_path / "other", **settings))
    members = {"reference": other, "aligned": MemberConfig(other, adapter=str(adapter))}
    with pytest.raises(MemberError, match=f"^aligned: .*{message}") as caught:
        EnsembleForCausalLM.from_members(rule="realign", members=members)
    assert "\n" not in str(caught.value)


def test_a_base_of_another_name_is_said(tmp_path: Path, said: list[str]) -> None:
    adapter = save_adapter(save_base(tmp_path / "base"), tmp_path / "adapter")
    other = save_base(tmp_path / "other", seed=9)
    said.clear()
    members = {"reference": str(other), "aligned": MemberConfig(str(other), adapter=str(adapter))}
    EnsembleForCausalLM.from_members(rule="realign", members=members)
    assert said == [f"aligned: the adapter {adapter} was made for {tmp_path / 'base'}, not {other}"]


# -- views ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["source_ft", "source_pt"])
def test_a_view_is_a_model_like_any_other(pair: Pair, role: str) -> None:
    view, plain = pair.shared.members[role], pair.copies.members[role]
    for mode in ("greedy", "sampling", "beams", "static"):
        assert tokens(view, PADDED, **MODES[mode]) == tokens(plain, PADDED, **MODES[mode])
    embeds = plain.get_input_embeddings()(IDS)
    with torch.no_grad():
        by_position, by_embeddings = view(IDS).logits, view(inputs_embeds=embeds).logits
        assert_close(by_position, plain(IDS).logits, atol=1e-5, rtol=1e-5)
        assert_close(by_embeddings, by_position, atol=1e-5, rtol=1e-5)
        hidden = [model(IDS, output_hidden_states=True).hidden_states[-1] for model in (view, plain)]
        assert_close(*hidden, atol=1e-5, rtol=1e-5)
    ids = random_ids(1, 6, seed=4)
    assert tokens(plain, ids, assistant_model=view) == tokens(plain, ids)
    assert tokens(view, ids, assistant_model=pair.shared) == tokens(plain, ids)


def test_generation_settings_of_views_are_their_own(pair: Pair) -> None:
    first, second = (pair.shared.members[role].generation_config for role in ("source_ft", "source_pt"))
    assert first is not second
    assert pair.shared.generation_config is not first


@pytest.mark.parametrize("role", ["source_ft", "source_pt", "target_pt"])
def test_a_replaced_member_is_the_one_that_runs(get_pair: GetPair, role: str) -> None:
    shared, copies = (copy.deepcopy(model) for model in (get_pair().shared, get_pair().copies))
    other = make_model("gpt_neox", 70)
    view = shared.members[role]
    shared.members[role] = copies.members[role] = other
    assert_close(last_logits(shared, IDS), last_logits(copies, IDS), atol=1e-5, rtol=1e-5)
    assert tokens(shared, PADDED, num_beams=3) == tokens(copies, PADDED, num_beams=3)
    shared.members[role] = view
    assert roles_of_forwards(shared) == TOGETHER
    assert_same(last_logits(shared, IDS), last_logits(get_pair().copies, IDS))


@pytest.mark.parametrize("compiled", [["source_ft"]], ids="+".join)
def test_compiled_views(get_pair: GetPair, compiled: list[str]) -> None:
    pair = get_pair()
    model = copy.deepcopy(pair.shared)
    cache = model.new_cache()
    for role in compiled:
        model.members[role] = torch.compile(model.members[role], backend="eager")
    assert_same(last_logits(model, IDS), last_logits(pair.copies, IDS))
    options = {"attention_mask": MASK[:1], "logits_to_keep": 1}
    assert_close(
        last_logits(model, PADDED[:1], **options), last_logits(pair.copies, PADDED[:1], **options), atol=1e-4, rtol=0
    )
    with pytest.raises(ValueError, match=r"the cache is for .*make one with new_cache"):
        model(IDS, past_key_values=cache, use_cache=True)


def test_to_casts_backbone_and_adapters(get_pair: GetPair) -> None:
    model = copy.deepcopy(get_pair().shared).to(torch.bfloat16)
    adapters = [tensor for name, tensor in model.named_buffers() if "_source_ft" in name]
    assert {tensor.dtype for tensor in (*model.parameters(), *adapters)} == {torch.bfloat16}
    expected = last_logits(get_pair().copies, IDS)
    assert (last_logits(model, IDS) - expected).norm() < 0.1 * expected.norm()


def test_to_casts_adapters_that_peft_runs(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "opt")
    adapter = save_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"], bias="all"))
    members = {"reference": str(base), "aligned": MemberConfig(str(base), adapter=str(adapter))}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    expected = last_logits(model, IDS)
    assert (last_logits(model.to(torch.bfloat16), IDS) - expected).norm() < 0.1 * expected.norm()
    assert_close(last_logits(model.float(), IDS), expected, atol=1.0, rtol=0.2)


def test_train_and_eval_reach_the_backbone(get_pair: GetPair) -> None:
    model = copy.deepcopy(get_pair().shared)
    model.train()
    assert model.members["source_ft"].model.layers[0].training
    model.eval()
    assert not any(module.training for module in model.modules())


# -- saving -----------------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[], Any]] = {
    "plain": lambda: None,
    "dora": lambda: LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
    "bias": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"], bias="all"),
    "lm_head": lambda: LoraConfig(r=4, target_modules=["lm_head"]),
}


@pytest.mark.parametrize("how", ["adapter", "as the model"])
@pytest.mark.parametrize("kind", KINDS)
def test_save_round_trips(tmp_path: Path, kind: str, how: str) -> None:
    """By reference and as copies; the copies need neither base nor adapter any more."""
    home = tmp_path / "home"
    base = save_base(home / "base", "qwen2")
    adapter = save_adapter(base, home / "adapter", KINDS[kind]())
    aligned = MemberConfig(str(base), adapter=str(adapter)) if how == "adapter" else MemberConfig(str(adapter))
    model = EnsembleForCausalLM.from_members(
        rule="realign", alpha=0.5, members={"reference": str(base), "aligned": aligned}
    )
    expected = last_logits(model, IDS)
    model.save_pretrained(tmp_path / "home" / "referenced")
    model.save_pretrained(tmp_path / "alone", copy_members=True)
    again = EnsembleForCausalLM.from_pretrained(home / "referenced")
    assert roles_of_forwards(again) == roles_of_forwards(model)
    assert torch.equal(last_logits(again, IDS), expected)
    if how == "adapter":  # relative paths: all of it can be moved together
        home.rename(tmp_path / "moved")
        assert_close(last_logits(EnsembleForCausalLM.from_pretrained(tmp_path / "moved" / "referenced"), IDS), expected)
    else:
        home.rename(tmp_path / "gone")
    saved = EnsembleForCausalLM.from_pretrained(tmp_path / "alone")
    assert not any((tmp_path / "alone" / role / "adapter_config.json").exists() for role in model.members)
    assert_close(last_logits(saved, IDS), expected, atol=1e-5, rtol=1e-5)
    assert not any("base." in name for name, _ in saved.named_parameters())


def test_a_compiled_view_is_saved_whole(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    members = {"reference": str(base), "aligned": MemberConfig(str(base), adapter=str(adapter))}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    expected = last_logits(model, IDS)
    model.members["aligned"] = torch.compile(model.members["aligned"], backend="eager")
    model.save_pretrained(tmp_path / "alone", copy_members=True)
    assert_close(
        last_logits(EnsembleForCausalLM.from_pretrained(tmp_path / "alone"), IDS), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("role", ["source_ft", "source_pt"])
def test_a_view_is_not_saved_by_itself(pair: Pair, tmp_path: Path, role: str) -> None:
    """Its layers have other names: what was written would be loaded with random weights in their place."""
    with pytest.raises(OutputError, match="copy_members=True"):
        pair.shared.members[role].save_pretrained(tmp_path / role)
    assert not (tmp_path / role).exists()


def test_a_cache_of_a_shared_backbone_is_not_one_of_two_copies(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"the cache is for source_ft, source_pt, target_pt; the members run as"):
        last_logits(pair.shared, IDS, past_key_values=pair.copies.new_cache(), use_cache=True)
    assert isinstance(pair.shared.new_cache(), EnsembleCache)
