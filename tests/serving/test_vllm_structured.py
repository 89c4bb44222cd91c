"""Choices, patterns and JSON schemas with a rule and an α for each request of a batch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import make_model
from helpers.vllm_cases import WIDE, engine, save_members
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ensembler import EnsembleForCausalLM
from ensembler.engine.grid import GridPoint
from ensembler.preflight import check_ensemble
from ensembler.serving.request_points import ServedRules

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm

END = 256
"""The id behind those of the 256 bytes."""
BROKEN = "Z"
"""The letter whose embedding is NaN in source PT; no grammar here has it."""
ALPHAS = (0.0, 0.4, 1.0, 2.5)
POINTS = [GridPoint(rule, alpha) for rule in ("base-change", "eft") for alpha in ALPHAS]
PROMPTS = ("Is it warm?", "a", "The answer: ", "{7}")
CHOICES = ("yes", "no", "yesterday", "now and then", "3")
PATTERN = "[a-c]{2}-[0-9]{1,2}"
PATTERN_TEXTS = [f"{a}{b}-{n}" for a, b in product("abc", repeat=2) for n in [*range(10)]]
PATTERN_TEXTS += [f"{a}{b}-{m}{n}" for a, b in product("abc", repeat=2) for m, n in product(range(10), repeat=2)]
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["in", "out"]},
        "whole": {"type": "boolean"},
        "name": {"type": "string", "pattern": "^[a-z]{1,4}$"},
    },
    "required": ["kind", "whole", "name"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Served:
    """An engine, and the ensemble that it runs."""

    llm: Any
    model: EnsembleForCausalLM
    tokenizer: PreTrainedTokenizerFast


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes: the demo family's is none that xgrammar takes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder, tokenizer = tmp_path_factory.mktemp("bytes"), byte_tokenizer()
    assert tokenizer.eos_token_id == END
    members: dict[str, Path] = {}
    for seed, role in enumerate(("source_ft", "source_pt", "target_pt")):
        ids = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": END}
        model = make_model(seed=seed, vocab_size=END + 1, initializer_range=0.1, **WIDE, **ids)
        if role == "source_pt":
            with torch.no_grad():
                model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(BROKEN)] = torch.nan
        members[role] = folder / role
        model.save_pretrained(members[role])
        tokenizer.save_pretrained(members[role])
    model = save_members(folder / "ensemble", "base-change", members, alpha=0.8)
    grammars = {"backend": "xgrammar", "disable_any_whitespace": True}
    with engine(folder / "ensemble", load_format="ensembler", structured_outputs_config=grammars) as llm:
        yield Served(llm, model, tokenizer)


def ask(served: Served, asked: list[tuple[str, GridPoint]], grammar: dict[str, Any], **sampling: Any) -> list[Any]:
    """Return vLLM's outputs of prompts and points, all in one batch."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    params = [
        SamplingParams(
            **{"temperature": 0, "max_tokens": 60, "logprobs": 0, **sampling},
            structured_outputs=StructuredOutputsParams(**grammar),
            extra_args={"rule": point.rule, "alpha": point.alpha},
        )
        for _, point in asked
    ]
    prompts = [{"prompt_token_ids": served.tokenizer(prompt)["input_ids"]} for prompt, _ in asked]
    return [output.outputs[0] for output in served.llm.generate(prompts, params, use_tqdm=False)]


@torch.no_grad()
def by_hand(served: Served, prompt: str, point: GridPoint, language: list[str]) -> tuple[list[int], list[float]]:
    """Return the greedy tokens of the mixture among those that lead to a text of `language`, and their log-probs."""
    model: Any = EnsembleForCausalLM.from_config(served.model.config.replaced(rule=point.rule))
    model.alpha = point.alpha
    text, ids, logprobs = "", served.tokenizer(prompt)["input_ids"], []
    num_prompt = len(ids)
    while ids[-1] != END:
        following = {one[len(text)] for one in language if one.startswith(text) and one != text}
        permitted = served.tokenizer.convert_tokens_to_ids([character.replace(" ", "Ġ") for character in following])
        permitted += [END] if text in language else []
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()[permitted].log_softmax(-1)
        ids = [*ids, permitted[int(logits.argmax())]]
        logprobs.append(float(logits.max()))
        text = served.tokenizer.decode(ids[num_prompt:], skip_special_tokens=True)
    return ids[num_prompt:], logprobs


@pytest.mark.parametrize(
    ("grammar", "language"),
    [({"choice": list(CHOICES)}, list(CHOICES)), ({"regex": PATTERN}, PATTERN_TEXTS)],
    ids=["choice", "regex"],
)
def test_texts_are_those_of_the_mixture_under_the_grammar(
    grammar: dict[str, Any], language: list[str], served: Served
) -> None:
    asked = [(prompt, point) for prompt in PROMPTS for point in POINTS]
    texts: dict[str, set[str]] = {}
    for (prompt, point), output in zip(asked, ask(served, asked, grammar), strict=True):
        ids, logprobs = by_hand(served, prompt, point, language)
        assert list(output.token_ids) == ids, (prompt, point, output.text)
        found = [step[token].logprob for step, token in zip(output.logprobs, ids, strict=True)]
        assert found == pytest.approx(logprobs, abs=1e-3)
        assert output.text in language
        assert (output.finish_reason, output.stop_reason) == ("stop", None)
        texts.setdefault(f"{prompt} {point.rule}", set()).add(output.text)
    assert max(len(one) for one in texts.values()) > 1  # α changes what is chosen


def test_json_and_texts_that_are_sampled(served: Served) -> None:
    asked = [(prompt, point) for prompt in PROMPTS for point in POINTS]
    width = served.model.config.vocab_size
    assert width == END + 1
    for options in ({}, {"temperature": 1.5, "seed": 3}):
        found = ask(served, asked, {"json": SCHEMA}, **options)
        for output in found:
            assert max(output.token_ids) < width  # no id of a member that failed
            said = json.loads(output.text)
            assert said.keys() == SCHEMA["properties"].keys()
            assert said["kind"] in ("in", "out")
            assert isinstance(said["whole"], bool)
            assert re.fullmatch("[a-z]{1,4}", said["name"])
        assert len({output.text for output in found}) > 4
    for output in ask(served, asked, {"regex": PATTERN}, temperature=1.5, seed=4):
        assert re.fullmatch(PATTERN, output.text)
        assert max(output.token_ids) < width


def test_grammars_beside_texts_without_one(served: Served) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    point = {"rule": "eft", "alpha": 2.5}
    grammars = [None, StructuredOutputsParams(choice=list(CHOICES)), None, StructuredOutputsParams(regex=PATTERN)]
    params = [
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=one is None, structured_outputs=one, extra_args=point)
        for one in grammars
    ]
    prompt: Any = {"prompt_token_ids": served.tokenizer(PROMPTS[0])["input_ids"]}
    outputs = served.llm.generate([prompt] * len(params), params, use_tqdm=False)
    found = [list(output.outputs[0].token_ids) for output in outputs]
    (alone,) = served.llm.generate([prompt], params[0], use_tqdm=False)
    assert found[0] == found[2] == list(alone.outputs[0].token_ids)
    assert len(found[0]) == 20
    asked = GridPoint("eft", 2.5)
    assert found[1] == by_hand(served, PROMPTS[0], asked, list(CHOICES))[0]
    assert found[3] == by_hand(served, PROMPTS[0], asked, PATTERN_TEXTS)[0]


@pytest.mark.parametrize(
    ("grammar", "options"),
    [
        ({"choice": list(CHOICES)}, {}),
        ({"regex": "[!a-z]*"}, {}),  # it permits the id 0, which is chosen where none is permitted
        ({"regex": "[!a-z]*"}, {"temperature": 1.0, "seed": 1}),
        ({"json": SCHEMA}, {"temperature": 1.0, "seed": 1, "min_tokens": 3}),
    ],
)
def test_a_member_that_computed_nan_is_named(grammar: dict[str, Any], options: dict[str, Any], served: Served) -> None:
    """The grammar forbids the member's id; the text ends there all the same, and others of the batch go on."""
    rules = ServedRules(check_ensemble(served.model.config))
    prompt = f"{BROKEN} is"
    asked = [(prompt, GridPoint("base-change", 0.8)), ("a is", GridPoint("base-change", 0.8))]
    asked += [(prompt, GridPoint("source_ft", 0.0))]  # which does not need the member
    failed, *whole = ask(served, asked, grammar, stop_token_ids=list(rules.failures), **options)
    assert (list(failed.token_ids), rules.failures[failed.stop_reason]) == ([failed.stop_reason], "source_pt")
    for output in whole:
        assert output.text
        assert max(output.token_ids) <= END
        assert output.finish_reason in ("stop", "length")


@pytest.mark.parametrize("options", [{"allowed_token_ids": [0, 64, 65]}, {"min_tokens": 3}])
def test_lists_of_permitted_ids_hide_no_member_that_computed_nan(options: dict[str, Any], served: Served) -> None:
    from vllm import SamplingParams

    rules = ServedRules(check_ensemble(served.model.config))
    params = SamplingParams(temperature=0, max_tokens=4, stop_token_ids=list(rules.failures), **options)
    prompts: Any = [{"prompt_token_ids": served.tokenizer(text)["input_ids"]} for text in (f"{BROKEN} is", "a is")]
    failed, whole = [output.outputs[0] for output in served.llm.generate(prompts, params, use_tqdm=False)]
    assert (list(failed.token_ids), rules.failures[failed.stop_reason]) == ([failed.stop_reason], "source_pt")
    assert len(whole.token_ids) == 4
    assert max(whole.token_ids) <= END
