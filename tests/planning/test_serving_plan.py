"""`ensembler plan` for vLLM: the arithmetic by hand, and what cannot be served with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.server_cases import HEADS, trio

from ensembler.cli.main import cli
from ensembler.errors import PlacementError
from ensembler.planning.vllm_plan import ACTIVATIONS, UTILISATION, propose_serving

GB = 10**9


def test_the_smallest_server_that_holds_the_weights_by_hand() -> None:
    found = propose_serving(trio(), HEADS, [80 * GB] * 8, context=4096)
    small, large = (group.model for group in trio())
    assert found.weight_bytes == small.num_bytes() + 2 * 10**7 + large.num_bytes()  # one copy, and a LoRA beside it
    assert found.cache_per_token == 2 * small.cache_per_token + large.cache_per_token == 2 * 524_288 + 262_144
    assert (found.num_gpus, found.num_servers) == (2, 4)  # 79 GB of weights are more than one GPU's 72
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
    assert one.num_gpus < many.num_gpus
    assert many.num_requests >= 60
    few_heads = {role: (attention, 2) for role, (attention, _) in HEADS.items()}
    message = refused(few_heads, [80 * GB] * 8, context=4096, batch_size=60)
    assert "each of 8 GPUs would hold 9.20 GiB of weights (a copy for each backbone), 150.00 GiB of KV cache" in message
    one_text = propose_serving(trio(), few_heads, [80 * GB] * 8, context=4096)
    assert (one_text.num_gpus, one_text.num_tokens) == (one.num_gpus, one.num_tokens)  # two heads, two GPUs


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(PlacementError) as error:
        propose_serving(trio(), *arguments, **options)
    return str(error.value)


def test_heads_that_no_number_of_gpus_divides_and_too_little_memory() -> None:
    odd = dict.fromkeys(HEADS, (9, 3))
    message = refused(odd, [80 * GB] * 8, context=4096)  # would need 2
    assert message.startswith("these members do not fit: the GPU would hold 73.60 GiB of weights")
    assert "67.06 GiB of it (90%)" in message  # 72 GB
    assert message.endswith("attention heads cannot be shared by more of the GPUs")
    message = refused(HEADS, [10 * GB] * 2, context=4096)
    assert "each of 2 GPUs would hold 36.80 GiB of weights" in message
    assert "2.50 GiB of KV cache (a text of 4,096 tokens, a cache for each member)" in message
    assert "--context" not in message
    assert "attention heads" not in message


def test_a_shorter_context_that_vllm_has_room_for_is_named() -> None:
    message = refused(HEADS, [48 * GB] * 2, context=4096, batch_size=2)
    longest = int(message.partition("; --context ")[2].partition(" fits")[0])
    assert propose_serving(trio(), HEADS, [48 * GB] * 2, context=longest, batch_size=2).num_requests >= 2
    refused(HEADS, [48 * GB] * 2, context=longest + 1, batch_size=2)


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
    assert "do not fit: the GPU would hold 12.74 MiB of weights" in plan("--budget", "1GiB")["reason"]


@pytest.mark.parametrize("arguments", [["--budget", "24GiB"], []])
def test_it_is_printed(arguments: list[str]) -> None:
    done = CliRunner().invoke(cli, ["plan", "demo", *arguments])
    assert ("run it with: ensembler serve demo -- --max-model-len 256" in done.stdout) == bool(arguments)
    assert ("\nvLLM, a server on 1 GPU\n" if arguments else "\nvLLM: there is no GPU; ") in done.stdout


@pytest.mark.parametrize(
    ("given", "served"),
    [(["demo", "--alpha", "0.4"], "demo --alpha 0.4"), (["demo", "--rule", "eft"], "FOLDER")],
)
def test_the_server_is_that_of_the_folder_where_it_can_be(given: list[str], served: str) -> None:
    done = CliRunner().invoke(cli, ["plan", *given, "--budget", "24GiB"])
    assert f"run it with: ensembler serve {served} -- --max-model-len 256" in done.stdout
