"""The registry of rules, and every rule through the model's forward against six lines of float64."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Run
from helpers.noise_cases import shared_noise
from helpers.tiny import FAMILIES, make_model, member_logits, random_ids
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from ensembler import EnsembleForCausalLM
from ensembler.errors import ConfigError
from ensembler.rules import RULE_NAMES, RULES, Rule, get_rule, register_rule

LINEAR: dict[str, Any] = {  # two fine-tuned / base pairs on one target
    "constant": {"target": 1.0},
    "slope": {"ft_a": 1.0, "pt_a": -1.0, "ft_b": 0.5, "pt_b": -0.5},
}
OPTIONS: dict[str, dict[str, Any]] = {"linear": LINEAR, "contrastive": {"cutoff": 0.05}}


def reference(rule: str, z: dict[str, Tensor], alpha: float) -> Tensor:
    """Each rule as its paper writes it, on float64 logits by role."""
    if rule == "base-change":
        return z["source_ft"] + alpha * (z["target_pt"] - z["source_pt"])
    if rule == "eft":
        return z["target_pt"] + alpha * (z["source_ft"] - z["source_pt"])
    if rule == "realign":
        return (1 - alpha) * z["reference"] + alpha * z["aligned"]
    if rule == "reward":
        return z["target_pt"] + alpha * z["reward"]
    if rule == "linear":
        return z["target"] + alpha * (z["ft_a"] - z["pt_a"]) + 0.5 * alpha * (z["ft_b"] - z["pt_b"])
    p = z["expert"].softmax(-1)
    score = (1 + alpha) * z["expert"] - alpha * z["amateur"]
    return score.masked_fill(p < 0.05 * p.amax(-1, keepdim=True), -math.inf) if alpha else score


def members_of(rule: str, seed: int) -> dict[str, PreTrainedModel]:
    """A member of another family and size in each role."""
    return {
        role: make_model(
            FAMILIES[(seed + i) % len(FAMILIES)], seed + i, hidden_size=16 + 8 * (i % 3), num_layers=1 + i % 2
        )
        for i, role in enumerate(get_rule(rule, **OPTIONS.get(rule, {})).roles)
    }


@pytest.mark.parametrize("seed", [0, 3, 6])
@pytest.mark.parametrize("rule", RULE_NAMES)
def test_forward_equals_the_formula(rule: str, seed: int) -> None:
    members = members_of(rule, seed)
    model = EnsembleForCausalLM.from_members(rule=rule, members=members, **OPTIONS.get(rule, {}))
    ids = random_ids(2, 11, seed=seed)  # longer than the sliding windows
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    z = {role: member_logits(member, ids, mask) for role, member in members.items()}
    real = mask.bool()
    for alpha in (0.0, 0.3, 1.0, 2.5, *([-0.5] if rule == "linear" else [])):
        model.alpha = alpha
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
        assert logits.dtype == torch.float32
        assert_close(logits[real].double(), reference(rule, z, alpha)[real], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_zero_is_the_anchor_bit_for_bit(rule: str, dtype: torch.dtype) -> None:
    members = {role: member.to(dtype) for role, member in members_of(rule, 1).items()}
    model = EnsembleForCausalLM.from_members(rule=rule, alpha=0.0, members=members, **OPTIONS.get(rule, {}))
    anchor = members[model.rule.anchor]
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, anchor(ids).logits.float())
    if dtype == torch.float32:
        prompt = {"input_ids": ids[:1, :4], "attention_mask": torch.ones(1, 4, dtype=torch.long), "max_new_tokens": 8}
        for more in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}):
            torch.manual_seed(7)
            ours = model.generate(**prompt, **more)
            with shared_noise(7) if more == {"do_sample": True} else nullcontext():
                torch.manual_seed(7)
                assert ours.tolist() == anchor.generate(**prompt, **more).tolist(), more


def test_eft_with_equal_source_members_is_the_target(trio: dict[str, PreTrainedModel]) -> None:
    members = {**trio, "source_ft": trio["source_pt"]}
    model = EnsembleForCausalLM.from_members(rule="eft", alpha=1.7, members=members)
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, trio["target_pt"](ids).logits)


def test_base_change_and_eft_agree_at_alpha_one(trio: dict[str, PreTrainedModel]) -> None:
    ids = random_ids(2, 9)
    with torch.no_grad():
        logits = [
            EnsembleForCausalLM.from_members(rule=rule, alpha=1.0, members=trio)(ids).logits
            for rule in ("base-change", "eft")
        ]
    assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_named_rules_are_their_anchor_at_zero(rule: Any) -> None:
    weights = rule.weights(0.0)
    assert next(iter(weights)) == rule.anchor == rule.roles[0]
    assert {role: weight for role, weight in weights.items() if weight} == {rule.anchor: 1.0}
    assert rule.paper
    assert rule.formula


def test_weights_are_affine() -> None:
    assert get_rule("base-change").weights(0.25) == {"source_ft": 1.0, "target_pt": 0.25, "source_pt": -0.25}
    assert get_rule("realign").weights(0.25) == {"reference": 0.75, "aligned": 0.25}
    assert get_rule("contrastive").weights(0.5) == {"expert": 1.5, "amateur": -0.5}
    assert get_rule("reward").weights(2) == {"target_pt": 1.0, "reward": 2.0}
    assert get_rule("linear", **LINEAR).weights(2)["pt_b"] == -1.0


@pytest.mark.parametrize(
    "alpha", [math.nan, math.inf, -math.inf, -0.1, True, "1", None, pytest.param(10**400, id="huge")]
)
@pytest.mark.parametrize("name", RULES)
def test_alpha_that_has_no_meaning_is_refused(name: str, alpha: object) -> None:
    with pytest.raises(ConfigError, match="alpha is"):
        get_rule(name).check_alpha(alpha)


def test_linear_takes_a_negative_alpha_and_nothing_infinite() -> None:
    rule = get_rule("linear", constant={"a": 1}, slope={"b": 1})
    assert rule.check_alpha(-2) == -2.0
    with pytest.raises(ConfigError, match="finite"):
        rule.check_alpha(-math.inf)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "base_change"}, "unknown rule 'base_change'; did you mean base-change?"),
        ({"name": "eft", "slope": {"a": 1.0}}, "fixed numbers"),
        ({"name": "eft", "cutoff": 0.1}, "takes no cutoff"),
        ({"name": "linear"}, "no constant"),
        ({"name": "linear", "constant": {"a": 0.0}, "slope": {"b": 1.0}}, "no constant"),
        ({"name": "linear", "constant": {"a": math.nan}}, "constant of 'a' is nan"),
        ({"name": "linear", "constant": {"a": 1.0}, "slope": {"b": "1"}}, "slope of 'b' is '1'"),
        ({"name": "linear", "constant": {"a": True}}, "constant of 'a' is True"),
        ({"name": "contrastive", "cutoff": 0.0}, "cutoff is 0.0"),
        ({"name": "contrastive", "cutoff": 1.5}, "cutoff is 1.5"),
        ({"name": "contrastive", "cutoff": math.nan}, "cutoff is nan"),
    ],
)
def test_rules_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        get_rule(**arguments)
    assert "\n" not in str(caught.value)


def test_cutoff_one_and_default() -> None:
    assert get_rule("contrastive").cutoff == 0.1
    assert get_rule("contrastive", cutoff=1).cutoff == 1.0
    assert RULES["contrastive"].cutoff == 0.1


@pytest.fixture
def half() -> Iterator[Rule]:
    """A rule of one's own: base-change with half of the log-ratio, and a member of another name."""
    numbers = {"constant": {"source_ft": 1.0}, "slope": {"target_pt": 0.5, "source_pt": -0.5}}
    yield register_rule("half", **numbers, formula="p_source_ft · (p_target_pt / p_source_pt)^(α/2)")
    RULES.pop("half", None)


def test_a_registered_rule_generates_saves_and_loads(
    half: Rule, trio: dict[str, PreTrainedModel], tmp_path: Path
) -> None:
    model = EnsembleForCausalLM.from_members(rule="half", alpha=0.8, members=trio)
    same = EnsembleForCausalLM.from_members(rule="base-change", alpha=0.4, members=trio)
    ids = random_ids(2, 7)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "eos_token_id": None}
    model.save_pretrained(tmp_path / "ens")
    loaded = EnsembleForCausalLM.from_pretrained(tmp_path / "ens")
    assert (loaded.rule, loaded.alpha) == (half, 0.8)
    for each in (model, loaded):
        with torch.no_grad():
            assert_close(each(ids).logits, same(ids).logits, atol=1e-4, rtol=1e-5)
        assert each.generate(ids, **options).tolist() == same.generate(ids, **options).tolist()
    del RULES["half"]
    with pytest.raises(ConfigError, match=r"unknown rule 'half'; expected one of base-change"):
        EnsembleForCausalLM.from_pretrained(tmp_path / "ens")


def test_a_sweep_of_a_registered_rule(half: Rule, folders: dict[str, Path], run: Run, tmp_path: Path) -> None:
    """At twice the α its answers are those of base-change."""
    pytest.importorskip("lm_eval")
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"q": f"{i} + {i} =", "a": f" {2 * i}"}) + "\n" for i in range(6))
    )
    members = [part for role, folder in folders.items() for part in (f"--{role.replace('_', '-')}", folder)]
    task = ["--data", tmp_path / "d.jsonl", "--prompt", "{q}", "--answer", "{a}"]
    flags = [*members, *task, "--rule", "base-change,half", "--alpha", "0.4,0.8", "--output", tmp_path / "out"]
    result = run("sweep", *flags)
    assert result.code == 0, result.err
    assert run("export", tmp_path / "out", "--output", tmp_path / "rows.jsonl").code == 0
    found: dict[tuple[str, float], list[object]] = {}
    for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines()):
        found.setdefault((row["rule"], row["alpha"]), []).append((row["document"], row["predictions"]))
    assert len(found["half", 0.8]) == 6
    assert found["half", 0.8] == found["base-change", 0.4] != found["half", 0.4]


def test_rules_of_an_installed_package_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class EntryPoint:
        def load(self) -> None:
            register_rule("packaged", constant={"a": 1.0}, slope={"b": 1.0})

    asked = []
    monkeypatch.setattr("importlib.metadata.entry_points", lambda *, group: asked.append(group) or [EntryPoint()])
    try:
        assert get_rule("packaged").weights(0.5) == {"a": 1.0, "b": 0.5}
    finally:
        RULES.pop("packaged", None)
    get_rule("eft")
    assert asked == ["ensembler.rules"]  # a rule that is known asks for no package


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "eft"}, "there is a rule 'eft' already"),
        ({"name": "linear"}, "there is a rule 'linear' already"),
        ({"name": "a,b"}, "the name of a rule is 'a,b'"),
        ({"name": ""}, "the name of a rule is ''"),
        ({"constant": {}}, "the rule 'mine' has no constant"),
        ({"constant": {"a": math.inf}}, "constant of 'a' is inf"),
        ({"slope": {"not a role": 1.0}}, "'not a role' cannot be a role"),
        ({"raw_roles": {"c"}}, "raw_roles of the rule 'mine' has 'c'"),
        ({"cutoff": 2}, "cutoff is 2"),
    ],
)
def test_rules_that_cannot_be_registered(arguments: dict[str, Any], message: str) -> None:
    before = dict(RULES)
    with pytest.raises(ConfigError, match=message):
        register_rule(**{"name": "mine", "constant": {"a": 1.0}, "slope": {"b": 1.0}, **arguments})
    assert before == RULES
