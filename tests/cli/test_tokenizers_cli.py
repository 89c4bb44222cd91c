"""Commands on ensembles whose members have different tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.commands import Run
from helpers.text_cases import save_text_members
from transformers import AutoTokenizer

from ensembler import EnsembleForCausalLM
from ensembler.errors import ConfigError
from ensembler.evaluation.results_file import open_results
from ensembler.folder import read
from ensembler.preflight import check_ensemble
from ensembler.serving.choice import check_servable

CHAT = "{% for one in messages %}[{{ one['role'] }}]{{ one['content'] }}<|end|>{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_members(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def with_chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target has a template of its own, with other words."""
    home = tmp_path_factory.mktemp("chats")
    save_text_members(home)
    for role in ("source_ft", "source_pt", "target_pt", "ensemble"):
        tokenizer = AutoTokenizer.from_pretrained(home / role)
        tokenizer.chat_template = CHAT if role != "target_pt" else CHAT.replace("[assistant]", "[model]")
        tokenizer.save_pretrained(home / role)
    return home


def test_inspect_says_that_it_compares_texts(folder: Path, run: Run) -> None:
    found = run("inspect", folder)
    assert found.code == 0, found.err
    assert (
        "vocabulary  text, the 900 ids of source_ft; different tokenizers, compared by what tokens spell" in found.out
    )
    shown = json.loads(run("inspect", folder, "--prompt", "The quick", "--json").out)
    assert shown["vocabulary"] == "text"
    assert {role: len(column) for role, column in shown["next_tokens"].items()} == {
        "ensemble": 5,
        "source_ft": 5,
        "target_pt": 5,
        "source_pt": 5,
    }
    assert all(0 <= one["probability"] <= 1.0001 for column in shown["next_tokens"].values() for one in column)


def test_generate_explains_and_says_what_it_cost(folder: Path, run: Run) -> None:
    found = run("generate", folder, "--prompt", "The quick brown", "--max-new-tokens", 6, "--stats", "--json")
    assert found.code == 0, found.err
    (stats,) = (json.loads(line)["stats"] for line in found.err.splitlines() if line.startswith('{"stats"'))
    text = stats["text"]
    assert set(text["evaluations"]) == {"target_pt"}  # the source pair has one tokenizer, and runs by ids
    assert all(0 < num < 20 for num in text["evaluations"].values())
    assert 0 <= text["mean_open"] <= text["largest_open"] <= 1
    assert 0 <= text["certain"] <= 1
    plain = run("generate", folder, "--prompt", "The quick brown", "--max-new-tokens", 6, "--explain", "--stats")
    assert plain.code == 0, plain.err
    assert "by text: evaluations per token: " in plain.err


def test_score_adds_up_and_does_not_say_greedy(folder: Path, run: Run, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "The quick", "choices": [" brown fox", " lazy dogs"]}) + "\n")
    found = run("score", folder, "--data", rows, "--alpha", "0,1", "--json")
    assert found.code == 0, found.err
    (row,) = map(json.loads, found.out.splitlines())
    assert [choice["greedy"] for choice in row["choices"]] == [[None, None]] * 2
    assert all(number < 0 for choice in row["choices"] for number in choice["log_prob"])
    assert run("score", folder, "--data", rows).code == 0


def test_results_carry_the_level_of_the_contract(folder: Path, run: Run, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "The quick", "continuation": " brown fox"}) + "\n")
    alike = [f"--{role}={folder.parent / 'target_pt'}" for role in ("source-ft", "source-pt", "target-pt")]
    for level, ensemble in {"text": [folder], "identical": alike}.items():
        for command, *options in (["score"], ["generate", "--max-new-tokens", 2]):
            out = tmp_path / f"{level}-{command}.jsonl"
            found = run(command, *ensemble, "--data", rows, *options, "--output", out, "--json")
            assert found.code == 0, found.err
            assert json.loads(found.out)["vocabulary"] == level
            assert json.loads(Path(f"{out}.run.json").read_text())["vocabulary"] == level
            assert "vocabulary" not in json.loads(out.read_text())


@pytest.mark.parametrize("alpha", [0, 1])
def test_a_folder_with_another_rule_writes_in_the_tokens_of_its_anchor(folder: Path, run: Run, alpha: int) -> None:
    """The folder holds the tokenizer of base-change's anchor; EFT's is the target."""
    options = ["--rule", "eft", "--alpha", alpha, "--prompt", "The quick brown", "--max-new-tokens", 6, "--json"]
    members = [f"--{role.replace('_', '-')}={folder.parent / role}" for role in ("source_ft", "source_pt", "target_pt")]
    found, expected = run("generate", folder, *options), run("generate", *members, *options)
    assert found.code == expected.code == 0, found.err
    texts = [json.loads(one.out) for one in (found, expected)]
    assert texts[0]["text"] == texts[1]["text"]
    assert texts[0]["num_tokens"] == texts[1]["num_tokens"]


def test_a_source_pair_of_two_tokenizers_is_warned_of(folder: Path, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    roles = {"source-ft": "source_ft", "source-pt": "target_pt", "target-pt": "source_pt"}
    members = [f"--{role}={folder.parent / name}" for role, name in roles.items()]
    found = run("inspect", *members)
    assert found.code == 0, found.err
    assert "source_ft and source_pt have different tokenizers" in found.err + caplog.text
    assert "source_ft and source_pt have different tokenizers" not in run("inspect", folder).err


def test_added_tokens_make_no_other_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the fine-tune beside its base, and in the folder, whose tokenizer may be changed by hand."""
    folder = save_text_members(tmp_path)
    for one in (tmp_path / "source_ft", folder):
        tokenizer = AutoTokenizer.from_pretrained(one)
        tokenizer.add_tokens(["<|mine|>"], special_tokens=True)
        tokenizer.save_pretrained(one)
    model = EnsembleForCausalLM.from_pretrained(folder)
    assert "<|mine|>" in model.tokenizer.get_vocab()
    assert "<|mine|>" not in EnsembleForCausalLM.from_pretrained(folder, rule="eft").tokenizer.get_vocab()
    assert "source_ft and source_pt have different tokenizers" not in caplog.text


@pytest.mark.parametrize("option", [["--offline-members"], ["--top-k-logits", 4]])
def test_logits_of_all_tokens_are_not_kept(folder: Path, run: Run, tmp_path: Path, option: list[object]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "The quick brown fox"}) + "\n")
    found = run("score", folder, "--data", rows, "--output", tmp_path / "out", *option)
    assert found.code == 2, found.err
    assert "the members have different tokenizers" in found.error
    assert str(option[0]) in found.error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--text-candidates", 0], "text_candidates is 0; expected a whole number of at least 1"),
        (["--text-tolerance", 1], "text_tolerance is 1; expected a number above 0 and below 1, as 0.02"),
        (["--text-tolerance", 0], "text_tolerance is 0; expected a number above 0 and below 1, as 0.02"),
        (["--chat-template", "mine"], "chat_template is 'mine'; expected one of: per-member, anchor"),
        (["--rule", "base-change,eft"], "the rule 'eft' writes in other tokens than 'base-change'"),
        (["--num-beams", 2], "an ensemble with different tokenizers keeps no cache of this kind"),
    ],
)
def test_bad_options_are_one_sentence(folder: Path, run: Run, options: list[object], said: str) -> None:
    found = run("generate", folder, "--prompt", "The", "--max-new-tokens", 2, *options)
    assert found.code == 2, found.err
    assert said in found.err.splitlines()[-1]


def test_vllm_refuses_them_by_name(folder: Path) -> None:
    with pytest.raises(ConfigError, match="the members have different tokenizers, which vLLM's one model cannot have"):
        check_servable(check_ensemble(read(folder)))


def test_a_rule_that_is_no_ratio_is_refused_with_those_that_are(folder: Path, run: Run) -> None:
    members = [f"--member=expert={folder.parent / 'source_ft'}", f"--member=amateur={folder.parent / 'target_pt'}"]
    found = run("inspect", "--rule", "contrastive", *members)
    assert found.code == 2
    assert "choose models of one tokenizer family, or the rule base-change or eft, which compare texts" in found.error


def test_text_that_a_member_cannot_write_names_the_character(tmp_path: Path, run: Run) -> None:
    folder = save_text_members(tmp_path, target="spaces without bytes")
    found = run("generate", folder, "--prompt", "ab 好 c", "--max-new-tokens", 2)
    assert found.code == 2, found.err
    assert "target_pt cannot read '好' at byte 3 of the prompt" in found.err.splitlines()[-1]


def test_each_member_reads_a_chat_in_its_own_template(with_chats: Path, run: Run) -> None:
    texts = {}
    for template in ("per-member", "anchor"):
        found = run(
            "generate",
            with_chats / "ensemble",
            *("--chat", "--prompt", "Who jumps?", "--max-new-tokens", 8, "--chat-template", template, "--json"),
        )
        assert found.code == 0, found.err
        texts[template] = json.loads(found.out)["text"]
    assert texts["per-member"]
    assert texts["per-member"] != texts["anchor"]
    checked = check_ensemble(read(with_chats / "ensemble"))
    end = checked.tokenizer.convert_tokens_to_ids("<|end|>")
    assert checked.text is not None
    assert end in checked.text.anchor.ends
    assert end in checked.generation_config.eos_token_id  # so that a text that members end does end
    talked = run("chat", with_chats / "ensemble", "--max-new-tokens", 4, stdin="Who jumps?\nAnd then?\n")
    assert talked.code == 0, talked.err


@pytest.mark.parametrize("metric", ["acc", "exact_match"])
def test_sweep_scores_choices_and_texts_at_every_alpha(folder: Path, run: Run, tmp_path: Path, metric: str) -> None:
    rows = [{"q": f"The quick {word}", "answer": "fox"} for word in ("brown", "x >", "lazy")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", data, "--prompt", "{q}", "--answer", "{answer}", "--alpha", "0,0.5,1", "--metric", metric]
    options += ["--choices", "fox,dogs"] if metric == "acc" else []
    found = run("sweep", folder, *options, "--output", tmp_path / "out", "--json")
    assert found.code == 0, found.err
    again = run("sweep", folder, *options, "--output", tmp_path / "out", "--json")
    assert again.out == found.out
    with open_results(tmp_path / "out") as results:
        assert results.settings["ensemble"]["vocabulary"] == "text"


def test_sweep_has_no_perplexity(folder: Path, run: Run, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"q": "The quick", "answer": "fox"}) + "\n")
    options = ["--data", data, "--prompt", "{q}", "--answer", "{answer}", "--metric", "perplexity"]
    found = run("sweep", folder, *options, "--output", tmp_path / "out")
    assert found.code == 2, found.err
    assert "scores of members with different tokenizers are not normalised" in found.err
