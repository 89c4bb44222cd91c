"""A real server on loopback, asked by the real client: `ensembler serve` from start to SIGTERM."""

from __future__ import annotations

import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import CHROMIUM, Browser
from helpers.vllm_cases import spoil
from helpers.vllm_server import START_SECONDS, Server, post, start, stop

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import Prompt, encode_prompts
from ensembler.decoding.texts import complete_grid
from ensembler.demo import demo_folder
from ensembler.engine.grid import GridPoint, make_grid
from ensembler.serving.middleware import _DECODING

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")
openai = pytest.importorskip("openai")
pytestmark = pytest.mark.vllm

PROMPT = (
    "There are 23 shells in the market. Gwen takes 16 shells. Question: How many shells are in the market now? Answer:"
)
BROKEN = 77  # the id whose embedding is NaN in source PT
CONTEXT = 256  # that of the embedded family
LONG = 220  # new tokens, which take the engine a second or more
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %} 2"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    log = folder / "log"
    folder = spoil(folder / "family", "source_pt", BROKEN)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    made = start(folder, log, "--alpha", "0.7", "--alias", "0,1.5", "--playground", "--audit")
    try:
        made.wait_until_ready()
        yield made
    finally:
        stop(made)


def test_the_folder_is_named_once_and_its_aliases(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == ["family", "family@alpha=0", "family@alpha=1.5"]


def complete(server: Server, prompt: str, **body: Any) -> str:
    """Return the greedy text of a request with these keys of ours."""
    answer = server.client.completions.create(
        model=body.pop("model", "family"), prompt=prompt, max_tokens=16, temperature=0, extra_body=body
    )
    return str(answer.choices[0].text)


def texts_at(prompts: list[str], points: list[GridPoint]) -> list[dict[GridPoint, str]]:
    """Return what the transformers backend writes behind each prompt at each point."""
    model = EnsembleForCausalLM.from_pretrained(demo_folder())
    tokenizer = model.tokenizer
    encoded = encode_prompts([Prompt(n, text, "test", {}) for n, text in enumerate(prompts)], tokenizer)
    options = DecodingOptions(16)
    found = {one.number: one for one in complete_grid(model, tokenizer, encoded, points, options, batch_size=4)}
    return [{point: found[n].samples[point][0].text for point in points} for n in range(len(prompts))]


def test_64_at_once_of_16_alphas_and_two_rules_are_those_of_transformers(server: Server) -> None:
    points = make_grid(["base-change", "eft"], [round(0.15 * step, 2) for step in range(16)])
    prompts = [PROMPT, "Ben has 19 pens. Ida gives Ben 7 pens. Question: How many pens does Ben have now? Answer:"]
    asked = [(number, point) for number in range(len(prompts)) for point in points]
    random.Random(0).shuffle(asked)
    assert len(asked) == 64
    exact = texts_at(prompts, points)

    def ask(one: tuple[int, GridPoint]) -> str:
        number, point = one
        return complete(server, prompts[number], rule=point.rule, alpha=point.alpha)

    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(ask, asked))
    wrong = {(n, p): (text, exact[n][p]) for (n, p), text in zip(asked, found, strict=True) if text != exact[n][p]}
    assert not wrong
    assert len(set(found)) > 4


def test_alpha_from_a_key_vllm_xargs_an_alias_and_none(server: Server) -> None:
    (exact,) = texts_at([PROMPT], make_grid(["base-change", "eft"], [0.0, 0.7, 1.5]))
    for alpha in (0.0, 1.5):
        wanted = exact[GridPoint("base-change", alpha)]
        assert complete(server, PROMPT, alpha=alpha) == wanted
        assert complete(server, PROMPT, vllm_xargs={"alpha": alpha}) == wanted
        assert complete(server, PROMPT, model=f"family@alpha={alpha:g}") == wanted
    assert complete(server, PROMPT) == exact[GridPoint("base-change", 0.7)]
    assert complete(server, PROMPT, rule="eft") == exact[GridPoint("eft", 0.7)]
    assert complete(server, PROMPT, rule="source_ft") == exact[GridPoint("base-change", 0.0)]


def test_the_headers_of_an_answer_say_what_it_was_decoded_with(server: Server) -> None:
    create = server.client.completions.with_raw_response.create
    for body, point in (({}, ("base-change", "0.7")), ({"rule": "eft", "alpha": 2}, ("eft", "2"))):
        headers = create(model="family", prompt=PROMPT, max_tokens=1, extra_body=body).headers
        assert (headers["ensembler-rule"], headers["ensembler-alpha"]) == point


def test_alpha_changes_between_the_turns_of_a_conversation(server: Server) -> None:
    """Keys and values do not depend on α: the second turn finds the first in the cache."""
    messages = [{"role": "user", "content": PROMPT}]
    for alpha in (0.0, 2.0, 0.5):
        answer = server.client.chat.completions.create(
            model="family", messages=messages, max_tokens=12, temperature=0, extra_body={"alpha": alpha}
        )
        said = "".join(message["content"] for message in messages) + " 2"
        plain = server.client.completions.create(
            model="family",
            prompt=said,
            max_tokens=12,
            temperature=0,
            extra_body={"alpha": alpha, "add_special_tokens": False},
        )
        assert answer.choices[0].message.content == plain.choices[0].text
        messages += [{"role": "assistant", "content": answer.choices[0].message.content}]
        messages += [{"role": "user", "content": " Question: How many pens does Ben have now? Answer:"}]


def test_a_member_that_computes_nan_ends_its_request_and_no_other(server: Server) -> None:
    client = server.client
    broken = {"model": "family", "prompt": [5, BROKEN, 6], "max_tokens": 8, "temperature": 0}
    with pytest.raises(openai.InternalServerError, match="source_pt computed NaN logits, which ended this request"):
        client.completions.create(**broken)
    with pytest.raises(openai.APIError, match="source_pt computed NaN logits"):
        list(client.completions.create(**broken, stream=True))
    assert client.completions.create(**broken, extra_body={"rule": "source_ft"}).choices[0].finish_reason
    with ThreadPoolExecutor(8) as pool:
        good = [pool.submit(complete, server, PROMPT) for _ in range(4)]
        bad = [pool.submit(client.completions.create, **broken) for _ in range(4)]
        assert len({one.result() for one in good}) == 1
        assert all(isinstance(one.exception(), openai.InternalServerError) for one in bad)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_shows_what_alpha_does(server: Server, tmp_path: Path) -> None:
    with Browser(tmp_path) as page:
        page.go(f"http://127.0.0.1:{server.port}/")
        page.until("$('status').textContent.startsWith('Type a prompt')")
        page.evaluate(f"$('prompt').value = {json.dumps(PROMPT + ' 23 - 16 =')}")
        page.evaluate("$('prompt').dispatchEvent(new Event('input'))")
        page.until("table?.alpha === 0.7")
        first = "[...$('next').rows].slice(0, 2).map(row => [...row.cells].map(cell => cell.textContent))"
        heads, row = page.evaluate(first)
        assert heads[1:] == ["ensemble at α 0.7", "source_ft (anchor)", "target_pt", "source_pt"]
        assert row[0] == "␣7"
        mixed, *_ = [float(cell.rstrip("%")) for cell in row[1:]]
        for alpha in (0, 2):
            page.evaluate(f"$('slider').value = '{alpha}'; $('slider').dispatchEvent(new Event('input'))")
            page.until(f"table.alpha === {alpha}")
            seen = page.evaluate("[...$('next').rows].map(row => [...row.cells].map(cell => cell.textContent))")
            if alpha == 0:
                assert all(cells[1] == cells[2] for cells in seen[1:])  # the ensemble is its anchor
            at_7 = next(cells for cells in seen if cells[0] == "␣7")
            assert (float(at_7[1].rstrip("%")) > mixed) == (alpha > 0.7)
        assert page.said == []


def test_a_completion_with_logprobs_stop_n_and_seed(server: Server) -> None:
    client = server.client
    answer = client.completions.create(model="family", prompt=PROMPT, max_tokens=16, temperature=0, logprobs=2)
    assert answer.choices[0].text == " 23 - 16 = 7; so 7."
    assert answer.choices[0].finish_reason == "stop"
    assert all(value <= 0 for value in answer.choices[0].logprobs.token_logprobs)
    cut = client.completions.create(model="family", prompt=PROMPT, max_tokens=16, temperature=0, stop=[";"])
    assert cut.choices[0].text == " 23 - 16 = 7"
    asked = {"model": "family", "prompt": PROMPT, "max_tokens": 8, "temperature": 1.5, "n": 3, "seed": 7}
    one, other = ([choice.text for choice in client.completions.create(**asked).choices] for _ in range(2))
    assert one == other
    assert len(set(one)) > 1


def test_chat_goes_through_the_folders_template(server: Server) -> None:
    answer = server.client.chat.completions.create(
        model="family",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=16,
        temperature=0,
    )
    plain = server.client.completions.create(
        model="family", prompt=f"{PROMPT} 2", max_tokens=16, temperature=0, extra_body={"add_special_tokens": False}
    )
    assert answer.choices[0].message.content == plain.choices[0].text


def test_streaming_gives_the_text_in_pieces(server: Server) -> None:
    stream = server.client.completions.create(model="family", prompt=PROMPT, max_tokens=16, temperature=0, stream=True)
    pieces = [chunk.choices[0].text for chunk in stream]
    assert len(pieces) > 3
    assert "".join(pieces) == " 23 - 16 = 7; so 7."


def metric(server: Server, name: str) -> float:
    """A figure of vLLM's own metrics; 0 where it was never counted."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_32_at_once_are_as_one_by_one_and_a_client_may_leave(server: Server) -> None:
    prompts = [
        f"Ben has {number} pens. Ida gives Ben 7 pens. Question: How many pens does Ben have now? Answer:"
        for number in range(2, 34)
    ]

    def ask(prompt: str) -> str:
        answer = server.client.completions.create(model="family", prompt=prompt, max_tokens=16, temperature=0)
        return str(answer.choices[0].text)

    before = metric(server, "vllm:generation_tokens_total")
    leaving = server.client.completions.create(
        model="family", prompt=PROMPT, max_tokens=LONG, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(leaving))
    leaving.close()
    end = time.monotonic() + 20
    while metric(server, "vllm:num_requests_running") and time.monotonic() < end:
        time.sleep(0.1)
    assert metric(server, "vllm:num_requests_running") == 0
    assert metric(server, "vllm:generation_tokens_total") - before < LONG  # it was not decoded to its end
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, prompts))
    assert together == [ask(prompt) for prompt in prompts]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"alpha": -0.5}, "alpha is -0.5; the rule 'base-change' takes a number that is not negative"),
    ({"alpha": "0.5"}, "alpha is '0.5'; expected a finite number"),
    ({"alpha": True}, "alpha is True; expected a finite number"),
    ({"vllm_xargs": {"alpha": 1e39}}, "expected a number within float32"),
    ({"alpha": [0.5, 1], "n": 2}, "a request has one alpha: send a request for each"),
    ({"rule": "realign"}, "rule is 'realign', which cannot be served from these members"),
    ({"alhpa": 0.5}, "unknown key 'alhpa'; did you mean alpha"),
    ({"vllm_xargs": {"rules": "eft"}}, "unknown key 'rules'; did you mean rule"),
]


def test_tokens_are_counted_by_rule_and_alpha(server: Server) -> None:
    asked = {"model": "family", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    point = {"rule": "eft", "alpha": 2.125}  # of no other test
    answers = [server.client.completions.create(**asked, extra_body=point) for _ in range(2)]
    of_point = '{rule="eft",alpha="2.125"}'
    counted = metric(server, f"ensembler_tokens_total{of_point}")
    assert counted == sum(one.usage.completion_tokens for one in answers)
    assert 0 < metric(server, f"ensembler_changed_tokens_total{of_point}") < counted


def test_what_a_request_cannot_have_is_a_clear_400(server: Server) -> None:
    client = server.client
    with pytest.raises(openai.BadRequestError, match=str(CONTEXT)):
        client.completions.create(model="family", prompt=[5] * (CONTEXT + 1), max_tokens=4)
    for body, message in BAD:
        with pytest.raises(openai.BadRequestError, match=message):
            client.completions.create(model="family", prompt=PROMPT, max_tokens=4, extra_body=body)
        messages = [{"role": "user", "content": PROMPT}]
        with pytest.raises(openai.BadRequestError, match=message):
            client.chat.completions.create(model="family", messages=messages, max_tokens=4, extra_body=body)


def test_a_port_in_use_ends_it(server: Server, tmp_path: Path) -> None:
    other = start(demo_folder(), tmp_path / "log", port=server.port)
    assert other.process.wait(timeout=START_SECONDS) != 0
    assert "address already in use" in other.log.read_text().lower()


def test_every_other_path_refuses_an_alpha(server: Server) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/openapi.json", timeout=20) as answer:
        paths = [path for path, methods in json.load(answer)["paths"].items() if "post" in methods]
    others = [path for path in paths if not path.endswith(_DECODING)]
    assert {*_DECODING} == {*paths} - {*others}
    assert len(others) > 5
    for path in others:
        status, text = post(server, path, b'{"alpha": 0.5, "model": "family", "prompt": "a"}')
        assert (status, "alpha cannot be chosen at this path" in text) == (400, True), path
