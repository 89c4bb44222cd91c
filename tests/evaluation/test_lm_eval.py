"""lm-evaluation-harness runs an ensemble as it runs any model: its numbers against ours, by hand, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lm_eval_tasks import CHOICE
from helpers.tiny import member_logits
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ensembler import EnsembleForCausalLM

pytest.importorskip("lm_eval")

QUESTIONS = [
    {"question": "abc", "choices": [" de", " f", " ghi"], "answer": 0},
    {"question": "the cat", "choices": [" sat", " r", " 42"], "answer": 1},
    {"question": "z", "choices": ["x", "yy", "zzz"], "answer": 2},
    {"question": "one and two", "choices": [" 3", " 4", " 55"], "answer": 0},
    {"question": "q", "choices": [" aa", " b", " c"], "answer": 1},
]
GENERATE = """
task: tiny_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def results(
    tmp_path: Path,
    base_change: EnsembleForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "tasks").mkdir()
    for name, text in (("choice", CHOICE), ("generate", GENERATE)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text.format(data=data))
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = simple_evaluate(
        HFLM(pretrained=base_change, tokenizer=tokenizer, batch_size=2, device="cpu"),
        tasks=["tiny_choice", "tiny_generate"],
        task_manager=manager,
        bootstrap_iters=0,
    )
    assert found is not None
    return dict(found)


def test_lm_eval(
    results: dict[str, Any],
    trio: dict[str, PreTrainedModel],
    base_change: EnsembleForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    num_right = 0
    samples = sorted(results["samples"]["tiny_choice"], key=lambda sample: sample["doc_id"])
    for question, sample in zip(QUESTIONS, samples, strict=True):
        expected = [log_prob(trio, tokenizer, question["question"], choice) for choice in question["choices"]]
        actual = [float(response[0]) for response in sample["filtered_resps"]]
        torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), atol=1e-3, rtol=1e-4)
        num_right += expected.index(max(expected)) == question["answer"]
    assert results["results"]["tiny_choice"]["acc,none"] == num_right / len(QUESTIONS)

    for sample in results["samples"]["tiny_generate"]:
        inputs = tokenizer(sample["doc"]["question"], return_tensors="pt")
        output = base_change.generate(**inputs, max_new_tokens=6, use_cache=False)[0, inputs.input_ids.shape[1] :]
        assert sample["filtered_resps"] == [tokenizer.decode(output, skip_special_tokens=True).split("e")[0]]


def log_prob(
    members: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast, context: str, continuation: str
) -> float:
    """log p(continuation | context) from the logits of the members, base-change at α = 0.7, in float64."""
    ids = tokenizer(context + continuation, return_tensors="pt").input_ids
    z = {role: member_logits(member, ids) for role, member in members.items()}
    log_probs = (z["source_ft"] + 0.7 * (z["target_pt"] - z["source_pt"])).log_softmax(-1)[0]
    start = len(context)
    return sum(float(log_probs[t - 1, ids[0, t]]) for t in range(start, ids.shape[1]))
