"""A conversation reads what is new in each turn, and says what it would say without a memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_cases import save_adapter, save_base
from helpers.tiny import make_model, make_tokenizer, tables
from transformers import PreTrainedTokenizerFast

from ensembler import EnsembleForCausalLM, MemberConfig
from ensembler.decoding.conversation import Conversation
from ensembler.decoding.options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt, chat_ids
from ensembler.decoding.texts import complete_prompts
from ensembler.engine.row_cache import common_length
from ensembler.errors import ConfigError, RunError

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


def test_a_recurrent_member_is_read_anew() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
    settings.update(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = AutoConfig.for_model("falcon_h1", vocab_size=64, num_key_value_heads=2, initializer_range=0.5, **settings)
    torch.manual_seed(0)
    members = {"reference": AutoModelForCausalLM.from_config(config).eval(), "aligned": make_model("llama", 1)}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    tokenizer = chat_tokenizer()
    options = DecodingOptions(max_new_tokens=3)
    conversation = Conversation(model, tokenizer, options)
    found = [conversation.reply(text) for text in TEXTS[:2]]
    assert found == replies_read_anew(model, tokenizer, options, TEXTS[:2])


def test_a_conversation_has_one_answer() -> None:
    options = DecodingOptions(temperature=1.0, num_return_sequences=2)
    with pytest.raises(ConfigError, match="num_return_sequences is 2; a conversation goes on with one answer"):
        Conversation(ensemble("llama", "llama", "gpt2"), chat_tokenizer(), options)
