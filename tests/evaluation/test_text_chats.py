"""Chats of lm-eval where members have different tokenizers: each member reads them in its own template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from helpers.commands import Run
from helpers.sweep_cases import read_rows
from helpers.task_cases import write_tasks
from helpers.text_cases import save_text_members
from lm_eval.api.instance import Instance
from transformers import AutoTokenizer

from ensembler import EnsembleConfig, EnsembleForCausalLM
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import Prompt, encode_prompts
from ensembler.decoding.texts import complete_prompts
from ensembler.engine.grid import GridPoint
from ensembler.engine.text_member_set import TextMemberSet
from ensembler.errors import PromptError
from ensembler.evaluation.backends import TransformersBackend
from ensembler.evaluation.grid_lm import GridLM
from ensembler.preflight import check_ensemble

TURNS = "<s>{% for one in messages %}[{{ one.role }}]{{ one.content }}<|end|>{% endfor %}"
TEMPLATES = {  # with other words, and another end
    "source_ft": TURNS + "{{ '[assistant]\\n' if add_generation_prompt }}",
    "source_pt": TURNS + "{{ '[assistant]\\n' if add_generation_prompt }}",
    "target_pt": TURNS.replace("[", "(").replace("]", ")") + "{{ '(model) ' if add_generation_prompt }}",
}
MESSAGES = [{"role": "user", "content": "The quick brown"}]
ALPHA = 0.7


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("chats")
    save_text_members(home)
    for role, template in TEMPLATES.items():
        tokenizer = AutoTokenizer.from_pretrained(home / role)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(home / role)
    write_tasks(home / "tasks")
    return home


def loaded(home: Path, **settings: Any) -> GridLM:
    """An ensemble as a model of lm-eval, at one point."""
    members = {role: str(home / role) for role in TEMPLATES}
    checked = check_ensemble(EnsembleConfig(members=members, alpha=ALPHA, **settings))
    model = GridLM(checked, points=[GridPoint("base-change", ALPHA)])
    model.take(TransformersBackend(EnsembleForCausalLM.from_checked(checked), checked.tokenizer))
    return model


def log_prob_of(member: Any, context: list[int], answer: list[int]) -> float:
    logprobs = member(torch.tensor([context + answer])).logits[0].double().log_softmax(-1)
    return float(logprobs[range(len(context) - 1, len(context + answer) - 1), answer].sum())


@pytest.mark.parametrize("template", ["per-member", "anchor"])
def test_scores_are_of_each_members_own_chat(home: Path, template: str) -> None:
    lm = loaded(home, chat_template=template)
    text = lm.apply_chat_template(MESSAGES)
    assert text == "<s>[user]The quick brown<|end|>[assistant]\n"
    choices = ["fox", " dogs"]
    found = lm.loglikelihood([Instance("loglikelihood", {}, (text, one), at) for at, one in enumerate(choices)])

    own = AutoTokenizer.from_pretrained(home / "target_pt")
    if template == "per-member":
        chat = "<s>(user)The quick brown<|end|>(model) "
        read = own(chat, add_special_tokens=False)["input_ids"]
    else:
        read = own(text, split_special_tokens=True)["input_ids"]
    members = lm.model.member_set
    assert isinstance(members, TextMemberSet)
    context = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    members.text.prompts = {tuple(context): {"target_pt": read}}
    for choice, (log_prob, _) in zip(choices, found, strict=True):
        answer = lm.tokenizer(choice, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            ((of_text,),) = (one.values() for one in members.text.score([(context, answer)]))
            alone = {role: log_prob_of(lm.model.members[role], context, answer) for role in ("source_ft", "source_pt")}
        expected = alone["source_ft"] + ALPHA * (sum(of_text.log_probs) - alone["source_pt"])
        assert float(log_prob[0]) == pytest.approx(expected, abs=1e-4)


def test_texts_are_those_of_generate(home: Path) -> None:
    lm = loaded(home)
    text = lm.apply_chat_template(MESSAGES)
    settings = {"until": ["#"], "max_gen_toks": 8, "do_sample": False}
    ((answer,),) = lm.generate_until([Instance("generate_until", {}, (text, settings), 0, metadata=("t", 0, 1))])
    model, checked = lm.model, lm.checked
    prompt = Prompt(0, MESSAGES[0]["content"], "here")
    encoded = encode_prompts([prompt], checked.tokenizer, chat=True, plan=checked.text)
    (expected,) = complete_prompts(model, checked.tokenizer, encoded, DecodingOptions(8, stop=("#",)))
    assert answer == lm.tok_decode(expected.samples[0].ids).split("#")[0]
    assert answer


def test_a_prefix_of_the_answer_stays_behind_the_chat(home: Path) -> None:
    lm = loaded(home)
    text = lm.apply_chat_template([*MESSAGES, {"role": "assistant", "content": "It is"}], add_generation_prompt=False)
    assert text == "<s>[user]The quick brown<|end|>[assistant]It is"
    own = AutoTokenizer.from_pretrained(home / "target_pt")
    chat = "<s>(user)The quick brown<|end|>(assistant)It is"
    assert lm.chat_of(text) == {"target_pt": own(chat, add_special_tokens=False)["input_ids"]}
    assert lm.chat_of("It is") == {}


def test_special_tokens_of_no_chat_are_refused(home: Path) -> None:
    lm = loaded(home)
    with pytest.raises(PromptError, match=r"holds the special token '<\|end\|>'.*--apply-chat-template"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("The<|end|>quick", " fox"), 0)])


def test_a_sweep_of_a_task_with_chats(home: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    members = [f"--{role.replace('_', '-')}={home / role}" for role in TEMPLATES]
    command = ["sweep", *members, "--task", home / "tasks/choice.yaml", "--num-fewshot", 1, "--limit", 3]
    plain, chats = (
        run(*command, *options, "--alpha", "0,1", "--output", tmp_path / name)
        for name, options in (("plain", []), ("chats", ["--apply-chat-template=default"]))
    )
    assert chats.code == plain.code == 0, chats.err
    one, other = (read_rows(tmp_path / name) for name in ("plain", "chats"))
    assert len(one) == len(other) > 0
    assert one[0]["answers"] != other[0]["answers"]
