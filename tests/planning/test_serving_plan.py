"""`ensembler plan` for vLLM: the arithmetic by hand, and what cannot be served with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.server_cases import HEADS, trio

from ensembler.cli.main import cli
from ensembler.planning.serving import ACTIVATIONS, UTILISATION, propose_serving

GB = 10**9


def test_the_smallest_server_that_holds_the_weights_by_hand() -> None:
    found = propose_serving(trio(), HEADS, [80 * GB] * 8, context=4096)
    assert found is not None
    small, large = (group.model for group in trio())
    assert found.weight_bytes == 2 * small.num_bytes() + large.num_bytes()  # vLLM keeps a copy for each member
    assert found.cache_per_token == 2 * small.cache_per_token + large.cache_per_token == 2 * 524_288 + 262_144
    assert (found.num_gpus, found.num_servers) == (2, 4)  # 92 GB of weights are more than one GPU's 72
    room = 80 * GB * UTILISATION - ACTIVATIONS - found.weight_bytes / 2
    assert found.num_tokens == int(room / (found.cache_per_token / 2))
    assert found.num_requests == found.num_tokens // 4096 > 0
    assert found.flags() == [
        *("--max-model-len", "4096", "--gpu-memory-utilization", "0.9"),
        *("--tensor-parallel-size", "2", "--data-parallel-size", "4"),
    ]


def test_more_texts_take_more_gpus_and_key_value_heads_are_not_cut_further_than_they_go() -> None:
    one = propose_serving(trio(), HEADS, [80 * GB] * 8, context=4096)
    many = propose_serving(trio(), HEADS, [80 * GB] * 8, context=4096, batch_size=60)
    assert one is not None
    assert many is not None
    assert one.num_gpus < many.num_gpus
    assert many.num_requests >= 60
    few_heads = {role: (attention, 2) for role, (attention, _) in HEADS.items()}
    few = propose_serving(trio(), few_heads, [80 * GB] * 8, context=4096, batch_size=60)
    assert few is None or few.num_gpus > many.num_gpus or few.num_tokens < many.num_tokens


def test_heads_that_no_number_of_gpus_divides_and_too_little_memory() -> None:
    odd = dict.fromkeys(HEADS, (9, 3))
    assert propose_serving(trio(), odd, [80 * GB] * 8, context=4096) is None  # would need 2
    assert propose_serving(trio(), HEADS, [10 * GB] * 2, context=4096) is None
    assert propose_serving(trio(), HEADS, [], context=4096) is None


def plan(*arguments: str) -> Any:
    done = CliRunner().invoke(cli, ["plan", "demo", *arguments, "--json"])
    assert done.exit_code == 0, done.exception
    return json.loads(done.stdout)["vllm"]


def test_the_command_says_flags_or_why_there_are_none(tmp_path: Path) -> None:
    found = plan("--budget", "24GiB", "--budget", "24GiB", "--context", "128")
    assert found["flags"] == [
        *("--max-model-len", "128", "--gpu-memory-utilization", "0.9"),
        *("--data-parallel-size", "2"),
    ]
    assert found["num_requests"] == found["num_tokens"] // 128
    assert "source_pt is quantised when loaded" in plan("--budget", "24GiB", "--quantize", "source_pt=nf4")["reason"]
    assert "float32 and bfloat16" in plan("--budget", "24GiB", "--dtype", "target_pt=bfloat16")["reason"]
    assert "do not fit" in plan("--budget", "1GiB")["reason"]


@pytest.mark.parametrize("arguments", [["--budget", "24GiB"], []])
def test_it_is_printed(arguments: list[str]) -> None:
    done = CliRunner().invoke(cli, ["plan", "demo", *arguments])
    assert ("vLLM flags: --max-model-len 256" in done.stdout) == bool(arguments)
    assert "\nvLLM: " in done.stdout
