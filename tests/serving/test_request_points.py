"""The requests that can be had: rules, α, members alone; and the sentences for what cannot be had."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ensembler_kernels import combine

from ensembler import EnsembleForCausalLM
from ensembler.config import EnsembleConfig
from ensembler.demo import demo_folder
from ensembler.engine.grid import GridPoint
from ensembler.errors import ConfigError, LogitsError
from ensembler.folder import read
from ensembler.preflight import check_ensemble
from ensembler.serving.request_points import ServedRules

SaveMember = Callable[..., Path]


@pytest.fixture(scope="module")
def rules() -> ServedRules:
    return ServedRules(check_ensemble(read(demo_folder())))


@pytest.mark.parametrize(
    ("arguments", "point"),
    [
        (None, GridPoint("base-change", 0.8)),
        ({}, GridPoint("base-change", 0.8)),
        ({"alpha": None, "rule": None}, GridPoint("base-change", 0.8)),
        ({"alpha": 0}, GridPoint("base-change", 0.0)),
        ({"alpha": 1.5, "rule": "eft"}, GridPoint("eft", 1.5)),
        ({"rule": "eft"}, GridPoint("eft", 0.8)),
        ({"rule": "source_pt", "alpha": 2}, GridPoint("source_pt", 0.0)),
        ({"alpha": 3e38}, GridPoint("base-change", 3e38)),
        ({"kv_transfer_params": 1, "alpha": 1}, GridPoint("base-change", 1.0)),
    ],
)
def test_what_a_request_gets(arguments: Any, point: GridPoint, rules: ServedRules) -> None:
    assert rules.point_of(arguments) == point


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.1}, r"alpha is -0.1; the rule 'base-change' takes a number that is not negative"),
        ({"alpha": float("nan")}, r"alpha is nan; expected a finite number"),
        ({"alpha": float("inf")}, r"alpha is inf; expected a finite number"),
        ({"alpha": 10**400}, r"expected a finite number"),
        ({"alpha": 1e39}, r"alpha is 1e\+39; expected a number within float32, at most 3.4e\+38"),
        ({"alpha": "0.5"}, r"alpha is '0.5'; expected a finite number"),
        ({"alpha": True}, r"alpha is True; expected a finite number"),
        ({"alpha": [0.1, 0.9]}, r"alpha is a list of 2; a request has one alpha: send a request for each"),
        ({"rule": "contrastive"}, r"rule is 'contrastive', which cannot be served from these members; expected one of"),
        ({"rule": "etf"}, r"rule is 'etf', .*; did you mean eft\?"),
        ({"rule": 3}, r"rule is 3, which cannot be served"),
        ({"alhpa": 1}, r"unknown key 'alhpa'; did you mean alpha\?"),
        ({"alpha_": 1}, r"unknown key 'alpha_'; did you mean alpha\?"),
        ({"Alpha": 1}, r"unknown key 'Alpha'; did you mean alpha\?"),
        ({"alpha" + "x" * 10_000: 1}, r"unknown key 'alphax{3,60}; did you mean alpha\?"),
        ({"rules": "eft"}, r"unknown key 'rules'; did you mean rule\?"),
        ({"cutoff": 0.1}, r"cutoff cannot be set by a request; it belongs to the folder"),
    ],
)
def test_what_a_request_cannot_have_is_one_sentence(arguments: Any, message: str, rules: ServedRules) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        rules.point_of(arguments)
    assert "\n" not in str(found.value)


def test_weights_are_those_of_an_ensemble_of_that_rule_and_alpha(rules: ServedRules) -> None:
    """Random logits through the weights of requests, against each ensemble's own combination."""
    torch.manual_seed(0)
    logits = {role: torch.randn(5, 134) for role in rules.roles}
    ordered = [logits[role] for role in rules.roles]
    for point in [GridPoint(name, alpha) for name in ("base-change", "eft") for alpha in (0.0, 0.3, 2.0)]:
        weights = rules.weights.replace_table(torch.tensor([rules.weights_of(point)] * 5))
        rule = rules.find(point.rule)
        wanted = sum(weight * logits[role] for role, weight in rule.weights(point.alpha).items())
        torch.testing.assert_close(combine(ordered, weights), wanted)
    for role in rules.roles:
        weights = rules.weights.replace_table(torch.tensor([rules.weights_of(GridPoint(role, 0.0))] * 5))
        assert torch.equal(combine(ordered, weights), logits[role])


def test_the_folders_own_numbers_are_a_rule_beside_those_with_names() -> None:
    demo = read(demo_folder())
    members = {role: demo.members[role] for role in ("source_ft", "target_pt")}
    numbers = {"constant": {"source_ft": 1.0}, "slope": {"target_pt": 0.5}}
    config = demo.replaced(rule="linear", members=members, alpha=1, **numbers)
    served = ServedRules(check_ensemble(config), -2.0)
    assert served.names == ("linear", "source_ft", "target_pt")
    assert served.default == GridPoint("linear", -2.0)
    assert served.point_of({"rule": "source_ft"}) == GridPoint("source_ft", 0.0)
    assert served.weights_of(served.point_of({"alpha": 4})) == (1.0, 0.0, 0.0, 0.5, 4.0, float("-inf"))


def test_a_score_is_no_member_that_speaks_alone(save_member: SaveMember) -> None:
    members = {role: {"model": str(save_member(role, "llama", 1))} for role in ("target_pt", "reward")}
    served = ServedRules(check_ensemble(EnsembleConfig(rule="reward", members=members)))
    assert served.names == ("reward", "target_pt")
    assert served.weights.raw == (False, True)


def test_a_rule_whose_anchor_ends_its_texts_otherwise(save_member: SaveMember, tmp_path: Path) -> None:
    members = {role: {"model": str(save_member(role, "llama", 1))} for role in ("source_ft", "source_pt", "target_pt")}
    path = Path(members["target_pt"]["model"]) / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 7]}))
    EnsembleForCausalLM.from_members(rule="base-change", members=members).save_pretrained(tmp_path / "ensemble")
    served = ServedRules(check_ensemble(read(tmp_path / "ensemble")))
    message = (
        r"rule is 'eft', whose anchor target_pt ends its texts with .*add its id to eos_token_id in generation_con"
    )
    with pytest.raises(ConfigError, match=message):
        served.check_ends(served.point_of({"rule": "eft"}))
    served.check_ends(served.point_of({"rule": "target_pt"}))
    own = json.loads((tmp_path / "ensemble" / "generation_config.json").read_text())
    own["eos_token_id"] = sorted({7, 2, *([own["eos_token_id"]] if isinstance(own["eos_token_id"], int) else [])})
    (tmp_path / "ensemble" / "generation_config.json").write_text(json.dumps(own))
    ServedRules(check_ensemble(read(tmp_path / "ensemble"))).check_ends(GridPoint("eft", 1.0))


def test_a_member_that_failed_is_named(rules: ServedRules) -> None:
    assert rules.failures == {134: "source_ft", 135: "target_pt", 136: "source_pt"}
    rules.check_stops(["stop", None, 7])
    with pytest.raises(LogitsError, match="target_pt computed NaN logits, which ended this request"):
        rules.check_stops([None, 135])
