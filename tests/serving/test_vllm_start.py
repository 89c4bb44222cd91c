"""Start and end of `ensembler serve`: keys, SIGTERM, and input that it refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import Run
from helpers.vllm_server import post, start, stop

from ensembler.demo import demo_folder

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")
openai = pytest.importorskip("openai")
pytestmark = pytest.mark.vllm

PROMPT = (
    "There are 23 shells in the market. Gwen takes 16 shells. Question: How many shells are in the market now? Answer:"
)
LONG = 220  # new tokens, which take the engine a second or more


def test_a_key_is_asked_for_before_a_body_is_read_and_sigterm_ends_it_with_exit_code_0(tmp_path: Path) -> None:
    made = start(demo_folder(), tmp_path / "log", key="none")
    made.wait_until_ready()
    assert post(made, "/v1/completions", b'{"alpha": -1}') == (401, '{"error":"Unauthorized"}')
    with pytest.raises(openai.BadRequestError, match="alpha is -1"):
        made.client.completions.create(model="family", prompt="a", extra_body={"alpha": -1})
    (name, *_) = [model.id for model in made.client.models.list()]
    assert name == "family"
    stream = iter(
        made.client.completions.create(
            model=name, prompt=PROMPT, max_tokens=LONG, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
    )
    next(stream)
    made.process.send_signal(signal.SIGTERM)
    rest = list(stream)  # what is running goes on to its end
    assert rest[-1].choices[0].finish_reason == "length"
    assert stop(made) == 0, made.log.read_text()[-4000:]


def serve_badly(*arguments: str) -> str:
    """Return the last line of an `ensembler serve` that ends for bad input."""
    done = subprocess.run(
        [sys.executable, "-m", "ensembler", "serve", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    return done.stderr.strip().splitlines()[-1]


def test_bad_input_is_one_line() -> None:
    line = serve_badly("demo", "--", "--load_format", "dummy")
    assert line.startswith("Error: --load-format dummy was given; members are loaded from their own folders")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder"),
        (["demo", "--alpha", "nan"], "alpha is 'nan'; expected a number"),
        (["demo", "--alias", "0,-1"], "alpha is -1"),
        (["demo", "--", "--config", "x.yaml"], "--config was given"),
    ],
)
def test_bad_input_ends_before_vllm_starts(arguments: list[str], message: str, run: Run) -> None:
    done = run("serve", *arguments)
    assert done.code == 2
    assert message in done.error


def test_a_member_that_moved_is_named(tmp_path: Path, run: Run) -> None:
    content = json.loads((demo_folder() / "config.json").read_text())
    content["members"] = {role: {"model": str(demo_folder() / role)} for role in content["members"]}
    content["members"]["target_pt"]["model"] = "./gone"
    (tmp_path / "config.json").write_text(json.dumps(content))
    done = run("serve", tmp_path)
    assert done.code == 2
    assert "gone" in done.error
