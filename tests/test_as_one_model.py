"""All that transformers, accelerate, PEFT, lm-eval and torch do with a model: the same on an ensemble, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_submodules
from helpers.adapter_cases import save_adapter
from helpers.commands import SaveMember
from helpers.tiny import VOCAB, make_model, make_tokenizer, random_ids, tables
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, Trainer, TrainingArguments, pipeline

from ensembler import EnsembleForCausalLM
from ensembler.engine.ensemble_cache import EnsembleCache
from ensembler.errors import ConfigError, InputError, LogitsError, OutputError, RunError

ROLES = ("source_ft", "source_pt", "target_pt")
Make = Callable[[], EnsembleForCausalLM]


def in_memory(alpha: float = 0.7, family: str = "llama") -> EnsembleForCausalLM:
    members = {role: make_model(family, seed) for seed, role in enumerate(ROLES)}
    return EnsembleForCausalLM.from_members(rule="base-change", alpha=alpha, members=members)


@pytest.fixture
def on_backbone(tmp_path: Path, save_member: SaveMember) -> EnsembleForCausalLM:
    """Two members on one copy of the weights, one of them with a LoRA."""
    base, other = save_member("base", "llama", 5), save_member("other", "llama", 6)
    adapter = save_adapter(base, tmp_path / "adapter", seed=3)
    members = {"source_ft": {"model": str(base), "adapter": str(adapter)}, "source_pt": base, "target_pt": other}
    return EnsembleForCausalLM.from_members(rule="base-change", alpha=0.7, members=members)


@pytest.fixture(params=["in memory", "on a backbone"])
def make(request: pytest.FixtureRequest) -> Make:
    """A function that returns the same ensemble each time it is called."""
    if request.param == "in memory":
        return in_memory
    model = request.getfixturevalue("on_backbone")
    return lambda: EnsembleForCausalLM.from_members(rule="base-change", alpha=0.7, members=model.config.members)


# -- forward ----------------------------------------------------------------------------------------------------------


def plain_loop(model: Any, ids: Tensor, num: int, mask: Tensor | None = None) -> Tensor:
    """The loop of transformers' documentation: the output's cache is handed on, nothing else is said about it."""
    step, past = ids, None
    with torch.no_grad():
        for _ in range(num):
            output = model(step, attention_mask=mask, past_key_values=past)
            past, step = output.past_key_values, output.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, step], 1)
            mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
    return ids


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "bloom", "gemma2"])
def test_a_plain_loop_hands_the_cache_on(family: str) -> None:
    """At α = 0 it writes the anchor's text, else that of generate; past the sliding windows."""
    for seed in range(4):
        ids = random_ids(2, 3 + seed, seed=seed)
        anchor = in_memory(0.0, family)
        assert plain_loop(anchor, ids, 9).tolist() == plain_loop(anchor.anchor, ids, 9).tolist()
        model = in_memory(0.9, family)
        options = {"max_new_tokens": 9, "eos_token_id": None, "pad_token_id": 3}
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
        assert plain_loop(model, ids, 9).tolist() == expected.tolist()


def test_a_plain_loop_with_padding_and_a_backbone(make: Make) -> None:
    ids = random_ids(2, 5)
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = 3, 0
    options = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 3, "use_cache": False}
    expected = make().generate(ids, attention_mask=mask, **options).tolist()
    assert plain_loop(make(), ids, 6, mask).tolist() == expected


def test_forward_makes_a_cache_as_transformers_does(base_change: EnsembleForCausalLM) -> None:
    ids = random_ids(2, 5)
    assert isinstance(base_change(ids).past_key_values, EnsembleCache)
    assert base_change(ids, use_cache=False).past_key_values is None
    assert base_change(ids, return_dict=False)[1].get_seq_length() == 5
    base_change.config.use_cache = base_change.config.return_dict = False
    try:
        assert len(base_change(ids)) == 1
    finally:
        base_change.config.use_cache = base_change.config.return_dict = True


def test_the_loss_is_that_of_transformers() -> None:
    """At α = 0 every option of the loss gives the anchor's loss."""
    model = in_memory(0.0)
    ids = random_ids(3, 6)
    labels = ids.clone()
    labels[0, :3] = -100
    num_items = torch.tensor(11)
    for options in ({}, {"num_items_in_batch": num_items}, {"num_items_in_batch": 5}, {"shift_labels": ids.roll(1, 1)}):
        expected = model.anchor(ids, labels=labels, **options).loss
        assert_close(model(ids, labels=labels, **options).loss, expected, msg=str(options))


def test_what_transformers_lets_models_ignore(on_backbone: EnsembleForCausalLM) -> None:
    ids = random_ids(2, 5)
    given = {"token_type_ids": torch.zeros_like(ids), "cache_position": torch.arange(5)}
    assert torch.equal(on_backbone(ids, **given).logits, on_backbone(ids).logits)
    members = {"reference": make_model("llama", 1), "aligned": make_model("gpt2", 2)}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=1.0, members=members)
    with pytest.raises(InputError, match=r"no 'token_type_ids' here; of its members only aligned would read it"):
        model(ids, **given)
    members = {"reference": make_model("gpt2", 1), "aligned": make_model("gpt2", 2)}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=1.0, members=members)
    with pytest.raises(InputError, match=r"no 'token_type_ids' here; no member would get it; leave it out"):
        model(ids, **given)


@pytest.mark.parametrize(
    ("name", "reason"), [("output_attentions", "differ in hidden size"), ("attention_msk", "no member would get it")]
)
def test_other_arguments_are_refused(base_change: EnsembleForCausalLM, name: str, reason: str) -> None:
    with pytest.raises(InputError, match=rf"takes no '{name}' here; .*{reason}"):
        base_change(random_ids(1, 3), **{name: True})


def test_generate_takes_the_arguments_of_forward(base_change: EnsembleForCausalLM) -> None:
    ids = random_ids(2, 5)
    expected = base_change.generate(ids, max_new_tokens=4).tolist()
    assert base_change.generate(ids, max_new_tokens=4, logits_to_keep=0).tolist() == expected


# -- the Trainer ------------------------------------------------------------------------------------------------------


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    ids = random_ids(4, 6)
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **options)
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)


def test_trainer_evaluates_and_predicts(make: Make, tmp_path: Path) -> None:
    model = make()
    own = trainer(model, tmp_path / "out")
    ids = random_ids(4, 6)
    expected = model(ids, labels=ids)
    assert own.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), abs=1e-5)
    assert_close(
        torch.tensor(own.predict(own.eval_dataset).predictions), expected.logits.detach(), atol=1e-5, rtol=1e-5
    )


def test_trainer_trains_and_saves_what_it_trained(tmp_path: Path, save_member: SaveMember) -> None:
    """Members that were read from folders are copied: the folders still have the weights from before."""
    members = {role: save_member(role, "llama", seed) for seed, role in enumerate(ROLES)}
    model = EnsembleForCausalLM.from_members(rule="base-change", alpha=0.5, members=members)
    ids = random_ids(4, 6)
    before = model(ids, labels=ids).loss.item()
    trained = trainer(model, tmp_path / "out", max_steps=4, learning_rate=1e-2, save_steps=4)
    for folder in ("out/checkpoint-4", "out", "out"):  # which has the checkpoint in it, then an ensemble too
        trained.train() if folder != "out" else trained.save_model()
        model.eval()
        loaded = EnsembleForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert model(ids, labels=ids).loss.item() < before - 0.1
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        trained.train(resume_from_checkpoint=True)
    loaded.alpha = 0.1
    with pytest.raises(OutputError, match=r"exists already and has config\.json.*; choose another name"):
        loaded.save_pretrained(tmp_path / "out")  # it was not trained


def test_training_shared_weights_is_refused(on_backbone: EnsembleForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"source_ft cannot be trained: its weights are shared"):
        trainer(on_backbone, tmp_path, max_steps=1).train()
    assert not on_backbone.training


# -- transformers: caches, names, folders -----------------------------------------------------------------------------


def test_continuous_batching_is_refused(base_change: EnsembleForCausalLM) -> None:
    with pytest.raises(InputError, match=r"no continuous batching.*call generate on padded batches"):
        base_change.generate_batch([[5, 6], [7]], generation_config=GenerationConfig(max_new_tokens=2))


def test_the_class_is_found_by_its_name(tmp_path: Path) -> None:
    """As `transformers serve` looks it up, and pipeline(assistant_model=)."""
    folder = tmp_path / "ensemble"
    model = in_memory()
    model.tokenizer = make_tokenizer()
    model.save_pretrained(folder)
    (name,) = AutoConfig.from_pretrained(folder).architectures
    found = getattr(transformers, name)
    ids = random_ids(1, 4)
    options = {"revision": None, "attn_implementation": None, "dtype": "auto", "device_map": "cpu"}
    loaded = found.from_pretrained(str(folder), trust_remote_code=False, tqdm_class=None, **options)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    target = make_model("llama", 8)
    drafted = pipeline("text-generation", target, tokenizer=make_tokenizer(), assistant_model=str(folder))
    alone = pipeline("text-generation", target, tokenizer=make_tokenizer())
    assert drafted("abc", max_new_tokens=6, do_sample=False) == alone("abc", max_new_tokens=6, do_sample=False)


def test_lm_eval_reads_a_folder(tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = in_memory()
    model.tokenizer = make_tokenizer()
    model.save_pretrained(tmp_path / "ensemble")
    requests = [Instance("loglikelihood", {}, ("abc", " de"), 0)]
    found, expected = (
        HFLM(pretrained=one, tokenizer=make_tokenizer(), device="cpu", dtype="float32").loglikelihood(requests)
        for one in (str(tmp_path / "ensemble"), model)
    )
    assert found == expected


def test_weights_are_saved_in_shards(make: Make, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "ensemble", copy_members=True, max_shard_size="4KB", safe_serialization=True)
    for role in ROLES:
        assert len(list((tmp_path / "ensemble" / role).glob("*.safetensors"))) > 1
    ids = random_ids(1, 4)
    assert_close(EnsembleForCausalLM.from_pretrained(tmp_path / "ensemble")(ids).logits, model(ids).logits)


def test_options_of_saving(base_change: EnsembleForCausalLM, tmp_path: Path) -> None:
    """Those of accelerate's recipe work; what would be ignored is refused."""
    base_change.save_pretrained(tmp_path / "other", is_main_process=False, save_function=torch.save, state_dict=None)
    assert not (tmp_path / "other").exists()
    for name, value in {"safe_serialization": False, "state_dict": {}, "push_to_hub": True, "variant": "x"}.items():
        with pytest.raises(ConfigError, match=f"save_pretrained of an ensemble takes no {name}=.*; leave it out"):
            base_change.save_pretrained(tmp_path / "other", **{name: value})


def test_tied_weights_and_whole_modules_are_those_of_the_members() -> None:
    members = {"reference": make_model("llama", 1, tie_word_embeddings=True), "aligned": make_model("opt", 2)}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    expected = {
        f"members.{role}.{name}": f"members.{role}.{source}"
        for role, member in members.items()
        for name, source in member.all_tied_weights_keys.items()
    }
    assert model.all_tied_weights_keys == expected
    assert "members.reference.lm_head.weight" in expected
    assert model._no_split_modules == {"LlamaDecoderLayer", "OPTDecoderLayer"}


def test_weights_of_members_survive(trio: dict[str, PreTrainedModel]) -> None:
    """Layers that were put into a member after it was made are not initialised anew."""
    member = make_model("llama", 4)
    member.lm_head = nn.Linear(16, VOCAB, bias=False)
    before = member.lm_head.weight.detach().clone()
    EnsembleForCausalLM.from_members(rule="base-change", alpha=1.0, members={**trio, "source_pt": member})
    assert torch.equal(member.lm_head.weight, before)


def test_the_attention_that_was_asked_for_is_in_the_configuration(tmp_path: Path) -> None:
    in_memory().save_pretrained(tmp_path / "ensemble")
    model = EnsembleForCausalLM.from_pretrained(tmp_path / "ensemble", attn_implementation="eager")
    assert {one.config._attn_implementation for one in (model, *model.members.values())} == {"eager"}


def test_embeddings_stay(base_change: EnsembleForCausalLM) -> None:
    with pytest.raises(InputError, match=r"cannot be replaced; replace those of a member"):
        base_change.set_input_embeddings(nn.Embedding(VOCAB, 16))


# -- accelerate, PEFT, torch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("is_used", [False, True])
def test_offloading_changes_nothing(make: Make, tmp_path: Path, place: str, is_used: bool) -> None:
    """accelerate's hooks leave parameters without data between forwards."""
    ids = random_ids(2, 5)
    expected = make()(ids).logits, make().generate(ids, max_new_tokens=4)
    model = make()
    if is_used:
        model(ids)
    device = torch.device("cpu")
    if place == "cpu":
        cpu_offload(model, execution_device=device)
    else:
        disk_offload(model, str(tmp_path / "away"), execution_device=device)
    assert model.device == device
    assert torch.equal(model(ids).logits, expected[0])
    assert torch.equal(model.generate(ids, max_new_tokens=4), expected[1])


def test_offloading_keeps_a_members_own_tensors(tmp_path: Path, save_member: SaveMember) -> None:
    """accelerate puts the backbone's head back at each forward; the member has a head of its own."""
    base = save_member("base", "llama", 5)
    adapter = save_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    members = {"reference": base, "aligned": {"model": str(base), "adapter": str(adapter)}}
    ids = random_ids(2, 5)
    found = []
    for is_offloaded in (False, True):
        model = EnsembleForCausalLM.from_members(rule="realign", alpha=1.0, members=members)
        assert model.member_set.backbones
        if is_offloaded:
            cpu_offload(model, execution_device=torch.device("cpu"))
        found.append(model(ids).logits)
    assert torch.equal(*found)


def test_offloading_does_not_compute_with_memory_that_is_away(tmp_path: Path, save_member: SaveMember) -> None:
    """The member has biases of its own, and the weights of their layers are away when they are used."""
    base = save_member("base", "qwen2", 5)
    adapter = save_adapter(base, tmp_path / "adapter", bias="all")
    members = {"reference": base, "aligned": {"model": str(base), "adapter": str(adapter)}}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=1.0, members=members)
    ids = random_ids(2, 5)
    expected = model(ids).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(RunError, match=r"aligned replaces the bias of a layer whose weight is on disk or offloaded"):
        model(ids)
    remove_hook_from_submodules(model)
    assert torch.equal(model(ids).logits, expected)


def test_an_adapter_of_peft(make: Make, tmp_path: Path) -> None:
    """It changes the logits, is saved by itself, and gives the same on another ensemble of the same members."""
    ids = random_ids(2, 5)
    plain = make()(ids).logits
    settings = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    adapted = get_peft_model(make(), settings)
    logits = adapted(input_ids=ids).logits
    assert not torch.allclose(logits, plain, atol=1e-2)
    adapted.save_pretrained(tmp_path / "trained")
    loaded = PeftModel.from_pretrained(make(), tmp_path / "trained")
    assert_close(loaded(input_ids=ids).logits, logits)
    with pytest.raises(OutputError, match=r"have an adapter in their layers.*save the PeftModel, or merge"):
        adapted.get_base_model().save_pretrained(tmp_path / "ensemble")


def test_an_adapter_that_was_added_is_not_lost_in_silence(tmp_path: Path) -> None:
    model = in_memory()
    model.add_adapter(LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(OutputError, match="have an adapter in their layers"):
        model.save_pretrained(tmp_path / "ensemble")


def test_export_and_compile(make: Make) -> None:
    """The exported program computes the same, and so does the ensemble afterwards."""
    ids = random_ids(2, 5)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    expected = make()(**given).logits
    model = make()
    exported = torch.export.export(model, (), given, strict=False)
    assert_close(exported.module()(**given).logits, expected)
    assert torch.equal(model(**given).logits, expected)
    assert_close(torch.compile(model, backend="eager")(**given).logits, expected)


def test_not_a_number_is_still_found_after_an_export() -> None:
    members = dict(zip(ROLES, tables(3), strict=True))
    model = EnsembleForCausalLM.from_members(rule="base-change", alpha=0.5, members=members)
    ids = random_ids(1, 4)
    torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
    members["source_pt"].fault = float("nan")
    with pytest.raises(LogitsError, match="source_pt computed NaN"):
        model(ids)
