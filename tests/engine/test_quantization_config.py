"""How quantisation and places are given: what a config.json keeps of them, and what is refused in one line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ensembler import EnsembleConfig, MemberConfig
from ensembler.errors import ConfigError
from ensembler.quantization import Quantization

GIVEN: list[dict[str, Any]] = [
    {"quantization": "bnb-8bit"},
    {"quantization": {"method": "bnb-nf4", "compute_dtype": "bfloat16", "double_quant": True}},
    {"quantization": {"method": "bnb-fp4", "compute_dtype": "float16"}},
    {"device_map": "auto", "max_memory": {"cpu": "10GiB", "cuda:0": "1.5GB"}, "offload_folder": "elsewhere"},
    {"device_map": {"model": "cpu", "lm_head": "disk"}, "offload_folder": "elsewhere", "dtype": "bfloat16"},
    {"device_map": "balanced_low_0"},
]


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: "+".join(given))
def test_config_json_round_trip(given: dict[str, Any]) -> None:
    config = EnsembleConfig(members={"source_ft": {"model": "a", **given}, "source_pt": "b", "target_pt": "c"})
    content = json.loads(config.to_json_string())
    assert content["members"]["source_ft"] == {"model": "a", **given}
    assert EnsembleConfig(**content).members == config.members
    assert config.replaced(alpha=2.0).members == config.members


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8bit", Quantization("bnb-8bit")),
        ("nf4", Quantization("bnb-nf4")),
        ("bnb-fp4:float16", Quantization("bnb-fp4", "float16")),
        ("nf4:double", Quantization("bnb-nf4", None, True)),
        ("nf4:bfloat16:double", Quantization("bnb-nf4", "bfloat16", True)),
    ],
)
def test_quantization_as_text(text: str, expected: Quantization) -> None:
    assert Quantization.parse(text) == expected
    assert Quantization.parse(str(expected)) == expected
    assert Quantization.parse(expected.to_dict()) == expected


UNKNOWN: list[tuple[dict[str, Any], str]] = [
    ({"quantization": "int3"}, "int3"),
    ({"quantization": ""}, "quantization"),
    ({"quantization": 4}, "quantization is 4"),
    ({"quantization": True}, "quantization is True"),
    ({"quantization": "nf4:int8"}, "compute dtype 'int8'"),
    ({"quantization": "nf4:"}, "'nf4:' is not of the form"),
    ({"quantization": "nf4:float16:bfloat16"}, "is not of the form"),
    ({"quantization": "nf4:double:double"}, "is not of the form"),
    ({"quantization": "8bit:float16"}, "bnb-8bit takes no compute dtype"),
    ({"quantization": "8bit:double"}, "bnb-8bit takes no compute dtype"),
    ({"quantization": {}}, "no 'method'"),
    ({"quantization": {"method": "bnb-nf4", "bits": 4}}, "unknown key 'bits'"),
    ({"quantization": {"method": "bnb-nf4", "double_quant": "yes"}}, "double_quant is 'yes'"),
    ({"quantization": {"method": "bnb-nf4", "compute_dtype": "float8"}}, "'float8'"),
    ({"device_map": "fastest"}, "unknown device map 'fastest'"),
    ({"device_map": 3}, "device_map of a member is 3"),
    ({"device_map": ["cpu"]}, "device_map of a member is"),
    ({"device_map": {}}, "device_map of a member is"),
    ({"device_map": "auto", "device": "cuda:0"}, "'cuda:0' and a device_map"),
    ({"max_memory": {"cpu": "1GiB"}}, "max_memory was given without"),
    ({"device_map": {"": "cpu"}, "max_memory": {"cpu": "1GiB"}}, "max_memory was given without"),
    ({"device_map": "auto", "max_memory": "1GiB"}, "max_memory of a member is '1GiB'"),
    ({"device_map": "auto", "max_memory": {"cpu": "lots"}}, "max_memory of 'cpu' is 'lots'"),
    ({"device_map": "auto", "max_memory": {"cpu": "-1GiB"}}, "max_memory of 'cpu' is '-1GiB'"),
    ({"device_map": "auto", "max_memory": {"cpu": None}}, "max_memory of 'cpu' is 'None'"),
    ({"offload_folder": 3}, "offload_folder of a member is 3"),
    ({"offload_folder": ""}, "offload_folder of a member is ''"),
    ({"quantisation": "nf4"}, "unknown key 'quantisation'"),
]


@pytest.mark.parametrize(("settings", "message"), UNKNOWN, ids=lambda value: str(value)[:50])
def test_unknown_values_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        MemberConfig.parse("source_ft", {"model": "m", **settings})
    assert "\n" not in str(caught.value)
