"""A conversation reads what is new in each turn, and says what it would say without a memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_cases import save_adapter, save_base
from helpers.tiny import make_model, make_tokenizer, tables
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ensembler import EnsembleForCausalLM, MemberConfig
from ensembler.decoding.conversation import Conversation
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt, chat_ids
from ensembler.decoding.texts import complete_prompts, explain
from ensembler.engine.row_cache import common_length
from ensembler.errors import ConfigError, OutputError, PromptError, RunError

ROLES = ("source_ft", "source_pt", "target_pt")
TEXTS = ("hello", "why is that so", "x", "and then")
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '.' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
FORGETFUL = "{% for m in messages %}{{ m.role[0] + (loop.revindex | string) + m.content }}{% endfor %}"


def chat_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def ensemble(*families: str) -> EnsembleForCausalLM:
    members = {role: make_model(name, seed) for seed, (role, name) in enumerate(zip(ROLES, families, strict=True))}
    return EnsembleForCausalLM.from_members(alpha=0.7, members=members)


def on_a_backbone(tmp_path: Path, **settings: Any) -> EnsembleForCausalLM:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    members = {"source_ft": MemberConfig(str(base), adapter=str(adapter)), "source_pt": str(base)}
    return EnsembleForCausalLM.from_members(alpha=0.7, members={**members, "target_pt": make_model("gpt2", 3)})


@contextmanager
def widths(model: EnsembleForCausalLM, role: str = "target_pt") -> Iterator[list[int]]:
    """The positions of each forward of a member."""
    seen: list[int] = []
    embeddings = model.members[role].get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    yield seen
    handle.remove()


def replies_read_anew(
    model: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast, options: DecodingOptions, texts: tuple[str, ...]
) -> list[str]:
    """The reference: every turn from its first token on."""
    messages: list[dict[str, str]] = []
    for text in texts:
        messages.append({"role": "user", "content": text})
        prompt = EncodedPrompt(0, chat_ids(tokenizer, messages))
        (completion,) = complete_prompts(model, tokenizer, [prompt], options)
        messages.append({"role": "assistant", "content": completion.samples[0].text})
    return [message["content"] for message in messages[1::2]]


@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL], ids=["grows", "changes"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "seed": 4},
        {"temperature": 1.0, "seed": 4, "draft": "source_pt"},
        {"stop": ("a", "e", "1")},
        {"prefill_chunk": 3},
        {"repetition_penalty": 1.8},
    ],
    ids=lambda options: "+".join(options) or "greedy",
)
@pytest.mark.parametrize("kind", ["llama", "windows", "shared", "dora", "padded"])
def test_replies_are_those_of_turns_that_are_read_anew(
    tmp_path: Path, kind: str, options: dict[str, Any], template: str
) -> None:
    if kind in ("shared", "dora"):
        model = on_a_backbone(tmp_path, use_dora=kind == "dora")
    elif kind == "padded":
        members = {role: make_model("llama", i, vocab_size=64 + 4 * i) for i, role in enumerate(ROLES)}
        model = EnsembleForCausalLM.from_members(alpha=0.7, members=members)
    else:
        model = ensemble("llama", *{"llama": ("qwen2", "gpt2"), "windows": ("mistral", "gemma2")}[kind])
    tokenizer = chat_tokenizer(template)
    decoding = DecodingOptions(max_new_tokens=9, **options)
    conversation = Conversation(model, tokenizer, decoding)
    found = [conversation.reply(text) for text in TEXTS]
    assert found == replies_read_anew(model, tokenizer, decoding, TEXTS)


def test_a_turn_reads_only_what_is_new() -> None:
    model = ensemble("llama", "qwen2", "gpt2")
    model.generation_config.eos_token_id = None
    tokenizer = chat_tokenizer()
    conversation = Conversation(model, tokenizer, DecodingOptions(max_new_tokens=5, draft="none"))
    read_before = 0
    for text in TEXTS:
        with widths(model) as seen:
            conversation.reply(text)
        prompt = chat_ids(tokenizer, conversation.messages[:-1])
        assert seen[1:] == [1] * 4
        assert 0 < seen[0] <= len(prompt) - read_before, "the prompt of the turn before was read again"
        read_before = len(prompt)


def test_after_reset_the_system_message_is_not_read_again() -> None:
    model = ensemble("llama", "qwen2", "gpt2")
    conversation = Conversation(model, chat_tokenizer(), DecodingOptions(max_new_tokens=3), system="be very kind")
    conversation.reply("hello")
    conversation.reset()
    with widths(model) as seen:
        conversation.reply("bye")
    assert seen[0] == len("bye.a:")  # behind "s:be very kind.u:", a character a token


def test_a_template_that_changes_what_was_said_reads_from_there_on() -> None:
    model = ensemble("mistral", "gemma2", "llama")  # windows of 6 go back, too
    tokenizer = chat_tokenizer(FORGETFUL)
    conversation = Conversation(model, tokenizer, DecodingOptions(max_new_tokens=3))
    conversation.reply("hello you")
    before = chat_ids(tokenizer, conversation.messages[:-1])
    with widths(model) as seen:
        conversation.reply("bye")
    prompt = chat_ids(tokenizer, conversation.messages[:-1])
    assert 0 < common_length([before, prompt]) < len(before)
    assert seen[0] == len(prompt) - common_length([before, prompt])


def test_the_same_message_again_reads_one_token() -> None:
    model = ensemble("llama", "qwen2", "gpt2")
    conversation = Conversation(model, chat_tokenizer(), DecodingOptions(max_new_tokens=3))
    first = conversation.reply("hello")
    conversation.reset()
    with widths(model) as seen:
        assert conversation.reply("hello") == first
    assert seen[0] == 1


def test_a_turn_that_fails_leaves_nothing_behind() -> None:
    members = dict(zip(ROLES, tables(3), strict=True))
    model = EnsembleForCausalLM.from_members(rule="eft", alpha=0.5, members=members)
    tokenizer = chat_tokenizer()
    options = DecodingOptions(max_new_tokens=5)
    conversation = Conversation(model, tokenizer, options)
    first = conversation.reply("hello")
    members["source_pt"].fault = RuntimeError("boom")
    with pytest.raises(RunError, match="source_pt failed: RuntimeError: boom"):
        conversation.reply("why")
    assert [message["content"] for message in conversation.messages] == ["hello", first]
    assert conversation.reply("why") == replies_read_anew(model, tokenizer, options, ("hello", "why"))[1]


def recurrent() -> EnsembleForCausalLM:
    """An ensemble that keeps no rows, which transformers' own loop decodes."""
    settings = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
    settings.update(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = AutoConfig.for_model("falcon_h1", vocab_size=64, num_key_value_heads=2, initializer_range=0.5, **settings)
    torch.manual_seed(0)
    members = {"reference": AutoModelForCausalLM.from_config(config).eval(), "aligned": make_model("llama", 1)}
    return EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)


def test_a_recurrent_member_is_read_anew() -> None:
    model, tokenizer, options = recurrent(), chat_tokenizer(), DecodingOptions(max_new_tokens=3)
    conversation = Conversation(model, tokenizer, options)
    found = [conversation.reply(text) for text in TEXTS[:2]]
    assert found == replies_read_anew(model, tokenizer, options, TEXTS[:2])


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 4}, {"draft": "source_pt"}], ids=str)
@pytest.mark.parametrize("point", [("base-change", 0.0), ("base-change", 1.6), ("eft", 0.7), ("eft", 1.6)], ids=str)
@pytest.mark.parametrize("kind", ["llama", "padded"])
def test_another_rule_or_alpha_answers_as_a_fresh_run_and_reads_only_what_is_new(
    kind: str, point: tuple[str, float], settings: dict[str, Any]
) -> None:
    rule, alpha = point
    widest = {"llama": 0, "padded": 4}[kind]
    members = {role: make_model("llama", i, vocab_size=64 + widest * i) for i, role in enumerate(ROLES)}
    model = EnsembleForCausalLM.from_members(alpha=0.7, members=members)
    fresh = EnsembleForCausalLM.from_members(rule=rule, alpha=alpha, members=members)
    tokenizer, options = chat_tokenizer(), DecodingOptions(max_new_tokens=9, **settings)
    conversation = Conversation(model, tokenizer, options)
    conversation.reply("hello")
    read_before = len(chat_ids(tokenizer, conversation.messages[:-1]))
    conversation.change(rule=rule)
    conversation.change(alpha=alpha)
    messages = [*conversation.messages, {"role": "user", "content": "why is that so"}]
    prompt = EncodedPrompt(0, chat_ids(tokenizer, messages))
    (expected,) = complete_prompts(fresh, tokenizer, [prompt], options)
    (unchanged,) = complete_prompts(model, tokenizer, [prompt], options)
    with widths(model) as seen:
        assert conversation.reply("why is that so") == expected.samples[0].text != unchanged.samples[0].text
    assert 0 < seen[0] <= len(prompt.ids) - read_before, "the turn before was read again"
    assert (model.rule.name, model.alpha) == ("base-change", 0.7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "realign"}, "'realign' combines aligned, reference; the members are source_ft, source_pt, target_pt"),
        ({"rule": "mean"}, "unknown rule 'mean'"),
        ({"rule": "linear"}, "the rule 'linear' has no numbers here"),
        ({"alpha": -1.0}, "alpha is -1"),
        ({"rule": "eft", "alpha": float("nan")}, "alpha is nan"),
    ],
)
def test_a_change_that_is_refused_changes_nothing(change: dict[str, Any], message: str) -> None:
    conversation = Conversation(ensemble("llama", "llama", "gpt2"), chat_tokenizer(), DecodingOptions())
    with pytest.raises(ConfigError, match=message):
        conversation.change(**change)
    assert (conversation.rule.name, conversation.alpha) == ("base-change", 0.7)


@pytest.mark.parametrize("kind", ["rows", "recurrent"])
def test_a_stopped_answer_counts_as_far_as_it_was_streamed(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = recurrent() if kind == "recurrent" else ensemble("llama", "qwen2", "gpt2")
    model.generation_config.eos_token_id = None
    tokenizer, options = chat_tokenizer(), DecodingOptions(max_new_tokens=20, draft="none")
    (whole,) = replies_read_anew(model, tokenizer, options, ("hello",))
    conversation = Conversation(model, tokenizer, options)
    num_forwards = 0

    def stop_in_the_fourth(*_: Any) -> None:
        nonlocal num_forwards
        num_forwards += 1
        if num_forwards == 4:
            conversation.stop()

    embeddings = next(iter(model.members.values())).get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(stop_in_the_fourth)
    answer = conversation.reply("hello")
    handle.remove()
    assert answer == whole[:4]  # a character a token
    assert capsys.readouterr().out.splitlines()[-1] == answer
    assert conversation.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer}]
    prompt = EncodedPrompt(0, chat_ids(tokenizer, [*conversation.messages, {"role": "user", "content": "why"}]))
    (expected,) = complete_prompts(model, tokenizer, [prompt], options)
    assert conversation.reply("why") == expected.samples[0].text
    assert conversation.answer is not None
    assert not conversation.answer.was_stopped
    assert len(conversation.answer.ids) == 20


def test_explain_shows_the_last_answer_at_its_own_alpha() -> None:
    model, tokenizer = ensemble("llama", "qwen2", "gpt2"), chat_tokenizer()
    conversation = Conversation(model, tokenizer, DecodingOptions(max_new_tokens=9))
    with pytest.raises(PromptError, match="no answer to explain"):
        conversation.explain()
    conversation.change(rule="eft", alpha=1.6)
    conversation.reply("hello")
    conversation.change(alpha=0.0)
    found = conversation.explain()
    fresh = EnsembleForCausalLM.from_members(rule="eft", alpha=1.6, members=dict(model.members))
    prompt = EncodedPrompt(0, chat_ids(tokenizer, conversation.messages[:1]))
    (completion,) = complete_prompts(fresh, tokenizer, [prompt], DecodingOptions(max_new_tokens=9))
    assert found == explain(fresh, prompt.ids, completion.samples[0].ids)
    assert any(choice.moved for choice in found)
    conversation.reset()
    with pytest.raises(PromptError, match="no answer to explain"):
        conversation.explain()


def test_save_writes_the_messages_and_replaces_no_file(tmp_path: Path) -> None:
    model, out = ensemble("llama", "llama", "gpt2"), tmp_path / "talk.jsonl"
    conversation = Conversation(model, chat_tokenizer(), DecodingOptions(max_new_tokens=3), system="be kind")
    with pytest.raises(PromptError, match="nothing to save yet"):
        conversation.save(out)
    conversation.reply("hellö\u2028")
    conversation.save(out)
    assert [json.loads(line) for line in out.read_text("utf-8").split("\n")[:-1]] == conversation.messages
    assert [message["role"] for message in conversation.messages] == ["system", "user", "assistant"]
    before = out.read_bytes()
    conversation.reply("x")
    with pytest.raises(OutputError, match="exists already; choose another name"):
        conversation.save(out)
    with pytest.raises(OutputError, match="cannot be written"):
        conversation.save(tmp_path / "nowhere" / "talk.jsonl")
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_half_a_surrogate_pair_is_no_message() -> None:
    conversation = Conversation(ensemble("llama", "llama", "gpt2"), chat_tokenizer(), DecodingOptions())
    with pytest.raises(PromptError, match="the message is not UTF-8 text"):
        conversation.reply("a\udc80")
    assert conversation.messages == []


def test_a_conversation_has_one_answer() -> None:
    options = DecodingOptions(temperature=1.0, num_return_sequences=2)
    with pytest.raises(ConfigError, match="num_return_sequences is 2; a conversation goes on with one answer"):
        Conversation(ensemble("llama", "llama", "gpt2"), chat_tokenizer(), options)
