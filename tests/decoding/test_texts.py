"""Prompts in, texts out: batching, seeds, stops, results files, explanations."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ensembler import EnsembleForCausalLM
from ensembler.decoding.batching import batches_by_length
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.output_file import OutputFile, RunSettings
from ensembler.decoding.prompts import EncodedPrompt, Prompt, encode_prompts, read_prompts
from ensembler.decoding.texts import ENSEMBLE, complete_prompts, explain, next_tokens, run_settings
from ensembler.demo import demo_folder
from ensembler.errors import ConfigError, OutputError, PromptError
from ensembler.files import digest

TEXTS = ["abc", "a", "hello there", "x y z", "abcabc", "q"]


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[EncodedPrompt]:
    return encode_prompts([Prompt(i, text, f"prompt {i}") for i, text in enumerate(texts)], tokenizer)


def texts_of(
    model: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast, options: DecodingOptions, batch_size: int
) -> dict[int, list[str]]:
    completions = complete_prompts(model, tokenizer, encode(tokenizer, TEXTS), options, batch_size=batch_size)
    return {c.number: [sample.text for sample in c.samples] for c in completions}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 4, "num_return_sequences": 2}])
@pytest.mark.parametrize("batch_size", [2, 4, 6])
def test_batches_give_the_texts_of_one_by_one(
    base_change: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int, sampling: dict[str, Any]
) -> None:
    options = DecodingOptions(max_new_tokens=10, **sampling)
    assert texts_of(base_change, tokenizer, options, batch_size) == texts_of(base_change, tokenizer, options, 1)


def test_batches_are_of_similar_length_the_longest_first(
    base_change: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    batches = batches_by_length(base_change, encode(tokenizer, TEXTS), 2, 10)
    assert [[len(prompt.ids) for prompt in batch] for batch in batches] == [[11, 6], [5, 3], [1, 1]]


def test_a_long_prompt_does_not_cut_short_the_others_of_its_batch(
    base_change: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert base_change.shortest_context is not None
    prompts = [EncodedPrompt(0, [5] * (base_change.shortest_context[1] - 8)), EncodedPrompt(1, [9, 8])]
    base_change.generation_config.eos_token_id, own = None, base_change.generation_config.eos_token_id
    completions = complete_prompts(base_change, tokenizer, prompts, DecodingOptions(max_new_tokens=20), batch_size=2)
    counts = {c.number: c.samples[0].num_tokens for c in completions}
    base_change.generation_config.eos_token_id = own
    assert counts == {0: 8, 1: 20}


def test_what_the_anchors_authors_like_does_not_leak_in(
    fresh: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = texts_of(fresh, tokenizer, DecodingOptions(max_new_tokens=12), 2)
    fresh.generation_config.no_repeat_ngram_size = 1
    fresh.generation_config.min_p = 0.9
    assert texts_of(fresh, tokenizer, DecodingOptions(max_new_tokens=12), 2) == before
    assert fresh.generation_config.min_p == 0.9


def test_a_seed_reproduces_and_another_does_not(
    base_change: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    first, again, other = (
        texts_of(base_change, tokenizer, DecodingOptions(max_new_tokens=12, temperature=1.0, seed=seed), 3)
        for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other


def test_leaving_out_finished_prompts_does_not_change_the_others(
    base_change: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    options = DecodingOptions(max_new_tokens=12, temperature=1.0, seed=3)
    whole = texts_of(base_change, tokenizer, options, 2)
    rest = complete_prompts(
        base_change, tokenizer, encode(tokenizer, TEXTS), options, batch_size=2, done=frozenset({0, 2, 4})
    )
    found = {c.number: [sample.text for sample in c.samples] for c in rest}
    assert found == {number: whole[number] for number in (1, 3, 5)}


def test_a_stop_text_with_the_space_that_a_tokenizer_drops_ends_the_text_all_the_same() -> None:
    """Alone or beside others a row ends where the criterion ends it."""
    model = EnsembleForCausalLM.from_pretrained(demo_folder())
    tokenizer = model.tokenizer
    texts = ["Ben has 9 pens. Ida gives Ben 7 pens. Question: How many pens does Ben have now? Answer:", "9 - 2 ="]
    prompts = [EncodedPrompt(number, tokenizer(text)["input_ids"]) for number, text in enumerate(texts)]
    found = {}
    for batch_size in (1, 2):
        options = DecodingOptions(max_new_tokens=12, stop=(" 9", "so"))
        for one in complete_prompts(model, tokenizer, prompts, options, batch_size=batch_size):
            found[batch_size, one.number] = one.samples
    assert tokenizer.decode(found[1, 0][0].ids) == "9"
    assert (found[1, 0][0].text, found[1, 0][0].num_tokens, found[1, 0][0].finish_reason) == ("", 1, "stop")
    assert found[1, 0] == found[2, 0]
    assert found[1, 1] == found[2, 1]


def test_a_stop_text_is_cut_off_and_ends_the_count(
    base_change: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    whole = texts_of(base_change, tokenizer, DecodingOptions(max_new_tokens=12), 6)
    stop = whole[2][0][4]
    options = DecodingOptions(max_new_tokens=12, stop=(stop,))
    for completion in complete_prompts(base_change, tokenizer, encode(tokenizer, TEXTS), options, batch_size=6):
        text, sample = whole[completion.number][0], completion.samples[0]
        assert sample.text == text.split(stop)[0]
        if stop in text:
            assert sample.finish_reason == "stop"
            assert sample.num_tokens == text.index(stop) + 1


def test_several_sequences_are_distinct_samples(
    base_change: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    options = DecodingOptions(max_new_tokens=8, temperature=1.0, num_return_sequences=4, seed=0)
    (completion,) = complete_prompts(base_change, tokenizer, encode(tokenizer, ["abc"]), options)
    row = completion.to_row()
    assert row["number"] == 0
    assert len({sample["text"] for sample in row["samples"]}) > 1


def test_decoding_ends_at_the_shortest_context(
    base_change: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert base_change.shortest_context is not None
    length = base_change.shortest_context[1]
    prompt = [EncodedPrompt(0, [5] * (length - 3))]
    (completion,) = complete_prompts(base_change, tokenizer, prompt, DecodingOptions(max_new_tokens=50))
    assert completion.samples[0].num_tokens <= 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_return_sequences": 2}, "would be the same"),
        ({"top_p": 0.5}, "top_p needs sampling"),
        ({"top_k": 5}, "top_k needs sampling"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_p": float("nan")}, "top_p is nan"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
        ({"seed": 10**20}, "seed is"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"stop": ("",)}, "a stop text is empty"),
        ({"num_beams": 2, "num_return_sequences": 3, "temperature": 1.0}, "give as many beams"),
    ],
)
def test_options_that_contradict_each_other(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DecodingOptions(**settings)  # type: ignore[arg-type]


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_read_prompts_takes_objects_and_strings(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "one", "id": 7}\r\n"two \xe2\x80\xa8 lines"\n')
    assert [(p.number, p.text) for p in read_prompts(path)] == [(0, "one"), (1, "two \u2028 lines")]


@pytest.mark.parametrize("text", ["", " \n", "half \ud83d"])
def test_what_is_no_text_is_refused(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    with pytest.raises(PromptError, match=r"--prompt is (an empty prompt|not UTF-8 text)"):
        encode_prompts([Prompt(0, text, "--prompt")], tokenizer)


@pytest.mark.parametrize("bad", ["{oops", '{"text": "x"}', "[1]", '{"prompt": 3}'])
def test_a_broken_line_is_named_or_skipped(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'"one"\n{bad}\n"three"\n', encoding="utf-8")
    with pytest.raises(PromptError, match=r"p\.jsonl:2 "):
        read_prompts(path)
    skipped: list[str] = []
    assert [p.number for p in read_prompts(path, skip=skipped.append)] == [0, 2]
    assert len(skipped) == 1


def test_a_prompt_too_long_names_role_and_lengths(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(PromptError, match="has 40 tokens; the context of target_pt ends at 40"):
        encode_prompts([Prompt(0, "a" * 40, "--prompt")], tokenizer, context=("target_pt", 40))
    assert encode_prompts([Prompt(0, "a" * 39, "--prompt")], tokenizer, context=("target_pt", 40))


def test_chat_uses_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        encode_prompts([Prompt(0, "hi", "--prompt")], tokenizer, chat=True)
    templated = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>")
    templated.chat_template = "{% for m in messages %}{{ m.role[0] + ':' + m.content + '.' }}{% endfor %}a:"
    ids = encode_prompts([Prompt(0, "hi", "--prompt")], templated, chat=True, system="be kind")[0].ids
    assert templated.decode(ids) == "s:be kind.u:hi.a:"


# -- results ----------------------------------------------------------------------------------------------------------


def test_rows_arrive_at_once_and_end_in_input_order(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with OutputFile(path, {"seed": 1}) as results:
        results.append({"number": 2, "text": "c"})
        results.append({"number": 0, "text": "ä"})
        assert [json.loads(line)["number"] for line in path.read_text("utf-8").splitlines()] == [2, 0]
    assert [json.loads(line)["number"] for line in path.read_text("utf-8").splitlines()] == [0, 2]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.run.json"]


def interrupted(path: Path, row: dict[str, object]) -> None:
    """Write one row, then Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt), OutputFile(path, {"seed": 1}) as results:
        results.append(row)
        raise KeyboardInterrupt


def test_an_interruption_keeps_rows_and_a_torn_line_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    interrupted(path, {"number": 3, "text": "d"})
    with path.open("a") as file:
        file.write('{"number": 1, "te')
    with OutputFile(path, {"seed": 1}) as results:
        assert results.done == {3}
        results.append({"number": 1, "text": "b"})
    assert [json.loads(line)["number"] for line in path.read_text("utf-8").splitlines()] == [1, 3]


def test_other_settings_and_existing_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    interrupted(path, {"number": 0, "text": "a"})
    before = path.read_bytes()
    with pytest.raises(
        OutputError, match=r'begun with other settings: seed was 1, now 2, stop was null, now \["a"\]; '
    ):
        OutputFile(path, {"seed": 2, "stop": ["a"]})
    with pytest.raises(OutputError, match="the prompts are others"):
        OutputFile(path, {"seed": 1, "prompts": "a1b2"})
    for begun, advice in ((False, "without --verify-weights (leave it out)"), (True, "with --verify-weights (add it)")):
        verified = tmp_path / f"{begun}.jsonl"
        with OutputFile(verified, {"verify_weights": begun, "members": {"a": {"weight_files": 1}}}) as results:
            results.append({"number": 0})
        with pytest.raises(OutputError, match=re.escape(f"begun with other settings: {advice}; choose another")):
            OutputFile(verified, {"verify_weights": not begun, "members": {"a": {"weights_sha256": 2}}, "seed": 2})
    with pytest.raises(OutputError, match="is not a folder"):
        OutputFile(tmp_path / "none" / "out.jsonl", {})
    assert path.read_bytes() == before
    path.with_name("out.jsonl.run.json").unlink()
    with pytest.raises(OutputError, match=r"which ones is not known, as out\.jsonl\.run\.json is missing"):
        OutputFile(path, {"seed": 2})
    with OutputFile(path, {"seed": 2}, overwrite=True) as results:
        assert results.done == set()
    assert path.read_bytes() == b""
    with OutputFile(path, {"seed": 3}) as results:  # no row is there that could be lost
        results.append({"number": 0})
    assert json.loads(path.with_name("out.jsonl.run.json").read_text()) == {"seed": 3}


def test_one_process_at_a_time_writes(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    late = OutputFile(path, {"seed": 1})
    with OutputFile(path, {"seed": 1}) as first:
        first.append({"number": 0})
        with pytest.raises(OutputError, match="another process writes"), OutputFile(path, {"seed": 1}):
            pass
        with pytest.raises(OutputError, match="another process writes"), OutputFile(path, {"seed": 2}, overwrite=True):
            pass
    with pytest.raises(OutputError, match="has written to .*out.jsonl meanwhile"), late:  # noqa: RUF043
        pass
    with OutputFile(path, {"seed": 1}) as again:
        assert again.done == {0}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.run.json"]


def test_a_link_is_followed_and_a_device_refused(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "there" / "real.jsonl")
    with OutputFile(link, {"seed": 1}) as results:
        results.append({"number": 0})
    assert link.is_symlink()
    assert json.loads((tmp_path / "there" / "real.jsonl").read_text())["number"] == 0
    os.mkfifo(tmp_path / "pipe")
    for device in (Path("/dev/null"), tmp_path / "pipe"):
        with pytest.raises(OutputError, match="is no ordinary file"):
            OutputFile(device, {"seed": 1})


def test_a_setting_that_was_not_there_before_is_a_difference(tmp_path: Path) -> None:
    RunSettings({"a": 1}).write(tmp_path / "run.json")
    assert RunSettings({"a": 1}).difference(tmp_path / "run.json") == ""
    assert RunSettings({"a": 1, "b": None}).difference(tmp_path / "run.json") == "b was null, now null"
    (tmp_path / "run.json").write_text("{")
    assert "missing or damaged" in RunSettings({"a": 1}).difference(tmp_path / "run.json")


@pytest.mark.parametrize("content", ["my notes", "my notes\n", '{"number": 0}\n', '{"a": 1}\nx\n'])
def test_a_file_of_something_else_is_not_resumed(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(OutputError, match="no row of a run"):
        OutputFile(path, {"seed": 1})
    assert path.read_text() == content


def test_a_line_torn_inside_a_character_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    interrupted(path, {"number": 0, "text": "line\u2028separator"})
    with path.open("ab") as file:
        file.write('{"number": 1, "text": "ä'.encode()[:-1])
    with OutputFile(path, {"seed": 1}) as results:
        assert results.done == {0}
        results.append({"number": 1, "text": "ä"})
    texts = [json.loads(line)["text"] for line in path.read_bytes().split(b"\n")[:-1]]
    assert texts == ["line\u2028separator", "ä"]


def test_a_run_is_told_apart_by_all_that_its_texts_depend_on(
    fresh: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts, options = encode(tokenizer, TEXTS), DecodingOptions(temperature=0.7)
    runs = [run_settings(fresh, prompts, options)]
    for same in ({}, {"draft": "none"}, {"draft_tokens": 3}, {"prefill_chunk": 9}):
        assert run_settings(fresh, prompts, DecodingOptions(temperature=0.7, **same)) == runs[0]
    runs.append(run_settings(fresh, prompts[:-1], options))
    runs.append(run_settings(fresh, prompts, options, backend={"name": "vllm"}))
    for other in ({"temperature": 0.8}, {"seed": 1}, {"stop": ("x",)}, {"max_new_tokens": 9}):
        runs.append(run_settings(fresh, prompts, DecodingOptions(**{"temperature": 0.7, **other})))
    fresh.alpha = 0.1
    runs.append(run_settings(fresh, prompts, options))
    fresh.generation_config.eos_token_id = [2, 7]
    runs.append(run_settings(fresh, prompts, options))
    assert len(set(map(digest, runs))) == len(runs)


# -- explanations -----------------------------------------------------------------------------------------------------


def test_next_tokens_are_the_members_probabilities(base_change: EnsembleForCausalLM) -> None:
    ids = [5, 9, 11]
    table = next_tokens(base_change, ids, top_k=4)
    assert list(table) == [ENSEMBLE, *base_change.rule.roles]
    for role, member in [(ENSEMBLE, base_change), *base_change.members.items()]:
        with torch.no_grad():
            p = member(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        expected = p.topk(4)
        assert [c.token for c in table[role]] == expected.indices.tolist()
        assert [c.probability for c in table[role]] == pytest.approx(expected.values.tolist(), rel=1e-5)


def test_explain_marks_where_the_choice_is_not_the_anchors(base_change: EnsembleForCausalLM) -> None:
    prompt = [5, 9, 11]
    new = base_change.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False)[0, 3:].tolist()
    choices = explain(base_change, prompt, new)
    for position, choice in enumerate(choices):
        seen = torch.tensor([[*prompt, *new[:position]]])
        with torch.no_grad():
            anchor = base_change.anchor(seen).logits[0, -1].softmax(-1)
            ensemble = base_change(seen).logits[0, -1].softmax(-1)
        assert choice.token == choice.ensemble_token == new[position] == ensemble.argmax().item()
        assert choice.anchor_token == anchor.argmax().item()
        assert choice.probability == pytest.approx(ensemble.max().item(), rel=1e-4)
        assert choice.anchor_probability == pytest.approx(anchor[choice.token].item(), rel=1e-4)
    assert any(choice.moved for choice in choices)
