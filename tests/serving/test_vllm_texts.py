"""`generate --backend vllm` and the engine behind it: the other backend's texts, as they are finished."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.vllm_cases import prompts_for

from ensembler import EnsembleForCausalLM
from ensembler.cli.main import cli
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.samples import Sample
from ensembler.decoding.texts import complete_grid, complete_prompts
from ensembler.demo import demo_folder
from ensembler.engine.grid import GridPoint, make_grid
from ensembler.folder import read
from ensembler.preflight import CheckedEnsemble, check_ensemble
from ensembler.serving.vllm_engine import Engine, complete_in_engine

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm

ARGUMENTS = {"enforce_eager": True, "max_model_len": 96}
PROMPTS = [EncodedPrompt(number, ids) for number, ids in enumerate(prompts_for(134))]


@pytest.fixture(scope="module")
def checked() -> CheckedEnsemble:
    return check_ensemble(read(demo_folder()))


@pytest.fixture(scope="module")
def engine(checked: CheckedEnsemble) -> Iterator[Engine]:
    with Engine(checked, ARGUMENTS) as started:
        yield started


def by_vllm(engine: Engine, checked: CheckedEnsemble, options: DecodingOptions) -> dict[int, list[Sample]]:
    found = complete_in_engine(engine, checked.require_tokenizer(), PROMPTS, [engine.point], options)
    return {one.number: one.all_samples for one in found}


def by_transformers(checked: CheckedEnsemble, options: DecodingOptions) -> dict[int, list[Sample]]:
    model = EnsembleForCausalLM.from_checked(checked)
    found = complete_prompts(model, checked.require_tokenizer(), PROMPTS, options, batch_size=8)
    return {one.number: one.samples for one in found}


@pytest.mark.parametrize(
    "options",
    [
        DecodingOptions(24),
        DecodingOptions(24, stop=(" 1", "a")),
        DecodingOptions(24, repetition_penalty=1.7),
        DecodingOptions(200),  # more than there is room for
    ],
    ids=["plain", "stop", "penalty", "room"],
)
def test_greedy_texts_ends_and_reasons_are_those_of_transformers(
    options: DecodingOptions, engine: Engine, checked: CheckedEnsemble
) -> None:
    found = by_vllm(engine, checked, options)
    wanted = by_transformers(checked, options)
    if options.max_new_tokens == 200:  # the engine was started with 96 tokens, of the members' 256
        room = {prompt.number: 96 - len(prompt.ids) for prompt in PROMPTS}
        wanted = {n: [Sample("", room[n], "length", one.ids[: room[n]])] for n, (one,) in wanted.items()}
        found = {n: [Sample("", one.num_tokens, one.finish_reason, one.ids)] for n, (one,) in found.items()}
        ended = {n for n in found if found[n][0].num_tokens < room[n]}
        assert len(ended) < len(PROMPTS)
        found, wanted = ({n: each[n] for n in each if n not in ended} for each in (found, wanted))
    assert found == wanted


def test_what_is_sampled_depends_on_the_seed_and_the_prompt_alone(engine: Engine, checked: CheckedEnsemble) -> None:
    options = DecodingOptions(12, temperature=1.2, top_k=20, num_return_sequences=3, seed=5)
    one, other = by_vllm(engine, checked, options), by_vllm(engine, checked, options)
    assert one == other
    tokenizer = checked.require_tokenizer()
    others = [GridPoint("eft", 2.0), engine.point]  # beside it in the batch
    (mixed,) = complete_in_engine(engine, tokenizer, PROMPTS[7:8], others, options)
    assert mixed.samples[engine.point] == one[7] != mixed.samples[others[0]]
    (alone,) = complete_in_engine(engine, tokenizer, PROMPTS[7:8], [engine.point], options)
    assert alone.all_samples == one[7]
    assert all(len(samples) == 3 for samples in one.values())
    assert len({tuple(sample.ids) for sample in one[7]}) > 1
    unseeded = [by_vllm(engine, checked, DecodingOptions(12, temperature=1.2)) for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_a_grid_is_one_run_and_a_left_run_leaves_nothing(engine: Engine, checked: CheckedEnsemble) -> None:
    tokenizer = checked.require_tokenizer()
    leaving = complete_in_engine(engine, tokenizer, PROMPTS, [engine.point], DecodingOptions(80))
    next(leaving)
    leaving.close()  # type: ignore[attr-defined]
    points = [*make_grid(["base-change", "eft"], [0.0, 0.5, 1.5])]
    model = EnsembleForCausalLM.from_checked(checked)
    wanted = {one.number: one for one in complete_grid(model, tokenizer, PROMPTS, points, DecodingOptions(16))}
    found = list(complete_in_engine(engine, tokenizer, PROMPTS, points, DecodingOptions(16)))
    assert len(found) == len(PROMPTS)
    assert {one.number: one.samples for one in found} == {number: one.samples for number, one in wanted.items()}
    assert all(list(one.samples) == points for one in found)
    assert any(len({sample.text for sample in one.all_samples}) > 1 for one in found)


def generate(*arguments: object) -> Any:
    flags = [f"--engine-arg={name}={json.dumps(value)}" for name, value in ARGUMENTS.items()]
    return CliRunner().invoke(cli, ["generate", "demo", "--backend", "vllm", *flags, *map(str, arguments)])


def test_the_command_writes_rows_and_goes_on_with_them(tmp_path: Path) -> None:
    prompts = demo_folder() / "data" / "examples.jsonl"
    asked = ["--data", prompts, "--max-new-tokens", 16, "--output"]
    done = CliRunner().invoke(cli, ["generate", "demo", *map(str, [*asked, tmp_path / "plain.jsonl"])])
    assert done.exit_code == 0, done.stderr
    done = generate(*asked, tmp_path / "vllm.jsonl")
    assert done.exit_code == 0, done.stderr
    plain, ours = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("plain.jsonl", "vllm.jsonl")
    )
    assert [row["text"] for row in ours] == [row["text"] for row in plain]
    assert [row["number"] for row in ours] == list(range(len(plain)))

    whole = (tmp_path / "vllm.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "vllm.jsonl").write_text("".join(whole[:3]) + whole[3][:9])  # killed while a row was written
    done = generate(*asked, tmp_path / "vllm.jsonl")
    assert done.exit_code == 0, done.stderr
    assert f"texts: {len(whole) - 3}," in done.stderr
    again = [json.loads(line) for line in (tmp_path / "vllm.jsonl").read_text().splitlines()]
    assert [row["text"] for row in again] == [row["text"] for row in ours]
    assert again[:3] == ours[:3]
    grid = json.loads(generate("--prompt", "9 - 2 =", "--alpha", "0,1", "--max-new-tokens", 4, "--json").stdout)
    assert [point["alpha"] for point in grid["points"]] == [0.0, 1.0]
    for backend in ([], ["--backend", "vllm", "--seed", "1"]):
        other = CliRunner().invoke(cli, ["generate", "demo", *map(str, [*asked, tmp_path / "vllm.jsonl"]), *backend])
        assert "was begun with other settings" in str(other.exception)


def test_standard_output_holds_results_alone() -> None:
    command = [sys.executable, "-m", "ensembler", "generate", "demo", "--prompt", "9 - 2 =", "--json", "--backend=vllm"]
    environment = {key: value for key, value in os.environ.items() if key != "VLLM_LOGGING_LEVEL"}
    flags = [f"--engine-arg={name}={json.dumps(value)}" for name, value in ARGUMENTS.items()]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["finish_reason"] == "stop"
    assert "EngineCore" in done.stderr  # its log is what shows that something goes on


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine-arg", "max_num_seqs=nought"], "vLLM's engine did not start"),
        (["--engine-arg", "no_such_argument=1"], "no_such_argument"),
        (["--engine-arg", "max_model_len=4"], "max_model_len.* ends at 4"),
    ],
)
def test_an_engine_that_does_not_start_is_one_line(flags: list[str], message: str) -> None:
    done = generate("--prompt", "Ben has 9 pens and more.", *flags)
    assert done.exit_code != 0
    with pytest.raises(type(done.exception), match=message):
        raise done.exception
    assert "\n" not in str(done.exception)
