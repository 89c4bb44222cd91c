"""The page of `ensembler serve --playground`, in headless Chromium against a server whose log-probs are known."""

from __future__ import annotations

import asyncio
import json
import math
import re
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from helpers.browser import CHROMIUM, Browser

from ensembler.demo import demo_folder
from ensembler.folder import read
from ensembler.preflight import check_ensemble
from ensembler.rules import RULE_NAMES, RULES
from ensembler.serving.playground import Playground, describe
from ensembler.serving.request_points import ServedRules

MARKUP = "<img src=x onerror=alert(1)>"
MEMBERS = {
    "source_ft": {" 6": 0.5, " 7": 0.3, "\n": 0.15, MARKUP: 0.05},
    "target_pt": {" 6": 0.1, " 7": 0.8, "\n": 0.08, MARKUP: 0.02},
    "source_pt": {" 6": 0.4, " 7": 0.4, "\n": 0.1, MARKUP: 0.1},
}
ANCHORS = {"base-change": "source_ft", "eft": "target_pt"}
ABOUT = {
    "model": "family",
    "rules": list(ANCHORS),
    "members": [{"role": role, "model": f"models/{role}"} for role in MEMBERS],
    "rule": "base-change",
    "alpha": 0.8,
    "anchors": ANCHORS,
    "formulas": {
        "base-change": "p_source_ft · (p_target_pt / p_source_pt)^α",
        "eft": "p_target_pt · (p_source_ft / p_source_pt)^α",
    },
}
UNSURE = "Few tokens"  # after which source_pt gives a single token


def mixture(rule: str, alpha: float) -> dict[str, float]:
    other = next(role for role in ANCHORS.values() if role != ANCHORS[rule])
    scores = {
        token: anchor * (MEMBERS[other][token] / MEMBERS["source_pt"][token]) ** alpha
        for token, anchor in MEMBERS[ANCHORS[rule]].items()
    }
    return {token: score / sum(scores.values()) for token, score in scores.items()}


class Server(ThreadingHTTPServer):
    """Keep requests in `asked`. An answer at an α of `held` waits until its event is set."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.answered: list[float | None] = []
        self.held: dict[float, threading.Event] = {}
        self.key: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        sent = get(self.path)
        self.reply(sent[0]["status"], sent[1]["body"], sent[0]["headers"])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert self.path == "/v1/completions"
        self.server.asked.append(body)
        event = self.server.held.get(body.get("alpha"))
        if self.server.key and self.headers["authorization"] != f"Bearer {self.server.key}":
            self.reply(401, b'{"error": "Unauthorized"}')
        elif body["prompt"] == "bad":
            self.reply(400, json.dumps({"error": {"message": f"prompt is 'bad'; {MARKUP}", "code": 400}}).encode())
        elif body.get("stream"):
            self.stream(event)
        else:
            if event is not None:
                event.wait(30)
            rule = body["rule"]
            found = MEMBERS[rule] if rule in MEMBERS else mixture(rule, body["alpha"])
            found = found | {" rare": 0.0004}  # likely in no column: not shown
            if body["prompt"] == UNSURE and rule == "source_pt":
                found = {" 6": 0.7}
            top = {token: math.log(probability) for token, probability in found.items()}
            answered = {"choices": [{"text": "", "logprobs": {"top_logprobs": [top]}}]}
            try:
                self.reply(200, json.dumps(answered).encode())
            finally:  # the page may have left
                self.server.answered.append(body.get("alpha"))

    def reply(self, status: int, body: bytes, headers: Any = ()) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name.decode(), value.decode())
        self.end_headers()
        self.wfile.write(body)

    def stream(self, event: threading.Event | None) -> None:
        self.reply(200, b"")
        for text, reason in ((" 7", None), (f" {MARKUP}é", None), (" shells.", "stop")):
            line = json.dumps({"choices": [{"text": text, "finish_reason": reason}]}, ensure_ascii=False)
            self.wfile.write(f"data: {line}\n\n".encode())
            if event is not None:
                event.wait(30)
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *given: Any) -> None:
        """Say nothing."""


def get(path: str, **scope: Any) -> list[dict[str, Any]]:
    """Return what Playground sends; the application behind it says that it was asked."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(dict(message))

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b"behind"})

    async def receive() -> Any:
        raise AssertionError("a GET has no body to wait for")

    given = {"type": "http", "method": "GET", "path": path, **scope}
    asyncio.run(Playground(behind, lambda scope: ABOUT)(given, receive, send))
    return sent


def test_page_and_description_are_answered_and_all_else_is_handed_on() -> None:
    start, body = get("/")
    headers = dict(start["headers"])
    policy = headers[b"content-security-policy"].decode()
    assert (start["status"], headers[b"content-type"]) == (200, b"text/html; charset=utf-8")
    assert int(headers[b"content-length"]) == len(body["body"])
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src 'self';" in policy
    assert "unsafe" not in policy
    assert json.loads(get("/ensembler")[1]["body"]) == ABOUT
    assert get("/x/", root_path="/x")[1] == body
    for scope in ({"method": "POST"}, {"method": "HEAD"}, {"type": "websocket"}):
        assert get("/", **scope)[1]["body"] == b"behind"
    assert get("/v1/models")[1]["body"] == b"behind"
    assert re.findall(r"(?:src|href)=\"(?!data:,)|https?://|@import|url\(", body["body"].decode()) == []


def test_the_description_of_the_embedded_family(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {name: rule for name, rule in RULES.items() if name in RULE_NAMES}  # without those other tests registered
    monkeypatch.setattr("ensembler.serving.request_points.RULES", named)
    about = describe(ServedRules(check_ensemble(read(demo_folder())), alpha=0.5), "family")
    assert about == {**ABOUT, "alpha": 0.5, "members": about["members"]}
    assert [member["role"] for member in about["members"]] == list(MEMBERS)
    assert all(member["model"] == member["role"] for member in about["members"])


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        for event in made.held.values():
            event.set()
        made.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: the page is not looked at in a browser")
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def page(browser: Browser, server: Server) -> Browser:
    browser.said.clear()
    browser.go(server.url)
    browser.until("$('status').textContent.startsWith('Type a prompt')")
    assert server.asked == []
    return browser


def enter(page: Browser, identity: str, value: str) -> None:
    """Set a control as a person would, who makes it tell of its change."""
    page.evaluate(f"$('{identity}').value = {json.dumps(value)}; $('{identity}').dispatchEvent(new Event('input'))")


def wait_for(page: Browser, alpha: float) -> None:
    page.until(f"!$('next').hidden && !$('next').ariaBusy && table.alpha === {alpha}")


def shown(page: Browser) -> list[list[str]]:
    found: list[list[str]] = page.evaluate("[...$('next').rows].map(row => [...row.cells].map(c => c.textContent))")
    return found


def expected(rule: str, alpha: float) -> list[list[str]]:
    signs = {" 6": "␣6", " 7": "␣7", "\n": "↵", MARKUP: MARKUP.replace(" ", "␣")}
    roles = sorted(MEMBERS, key=lambda role: role != ANCHORS[rule])
    heads = [f"{role} (anchor)" if role == ANCHORS[rule] else role for role in roles]
    columns = [mixture(rule, alpha), *(MEMBERS[role] for role in roles)]
    tokens = sorted(MEMBERS["source_ft"], key=lambda token: -columns[0][token])
    rows = [[signs[token], *(f"{column[token]:.1%}" for column in columns)] for token in tokens]
    return [["token", f"ensemble at α {alpha:g}", *heads], *rows]


def test_alpha_is_asked_of_the_server_and_the_members_once(page: Browser, server: Server) -> None:
    enter(page, "prompt", "23 - 16 =")
    wait_for(page, 0.8)
    assert shown(page) == expected("base-change", 0.8)
    assert page.evaluate("$('status').textContent") == 'α 0.8 moves the choice: " 6" → " 7"'
    assert sorted(one["rule"] for one in server.asked) == ["base-change", *sorted(MEMBERS)]
    assert {(one["model"], one["prompt"], one["max_tokens"], one["logprobs"]) for one in server.asked} == {
        ("family", "23 - 16 =", 1, 20)
    }
    server.asked.clear()
    page.evaluate("$('slider').focus()")
    page.press("ArrowRight")
    wait_for(page, 0.85)
    enter(page, "slider", "0")
    wait_for(page, 0)
    assert shown(page) == expected("base-change", 0)
    assert page.evaluate("$('status').textContent") == 'α 0 keeps the anchor\'s choice: " 6"'
    enter(page, "alpha", "3.3")  # beyond the slider
    wait_for(page, 3.3)
    assert [(one["rule"], one["alpha"]) for one in server.asked] == [("base-change", a) for a in (0.85, 0, 3.3)]
    page.evaluate("$('rule').value = 'eft'; $('rule').onchange()")
    page.until("table.rule === 'eft'")
    assert shown(page) == expected("eft", 3.3)
    assert page.evaluate("$('formula').textContent") == ABOUT["formulas"]["eft"]
    assert page.said == []


def test_a_late_answer_to_another_alpha_is_dropped(page: Browser, server: Server) -> None:
    server.held[1.0] = threading.Event()
    enter(page, "prompt", "23 - 16 =")
    wait_for(page, 0.8)
    enter(page, "slider", "1")
    page.until("$('next').getAttribute('aria-busy') === 'true'")
    while server.asked[-1]["alpha"] != 1:
        page.evaluate("0")
    enter(page, "slider", "1.5")
    wait_for(page, 1.5)
    server.held[1.0].set()
    while 1.0 not in server.answered:
        page.evaluate("0")
    page.evaluate("fetch('ensembler').then(() => { window.isLater = true; }) && 0")
    page.until("window.isLater")
    assert shown(page) == expected("base-change", 1.5)
    assert page.said == []


def test_a_token_is_text_and_is_appended(page: Browser, server: Server) -> None:
    enter(page, "prompt", "23 - 16 =")
    wait_for(page, 0.8)
    page.evaluate("document.querySelector('.token').focus()")
    page.press("Enter", "\r")
    page.until("table?.alone && members.prompt === '23 - 16 = 7' && !$('next').ariaBusy")
    assert page.evaluate("document.activeElement.dataset.token") == " 7"
    page.evaluate(f"[...document.querySelectorAll('.token')].find(b => b.dataset.token === {MARKUP!r}).click()")
    assert page.evaluate("$('prompt').value") == f"23 - 16 = 7{MARKUP}"
    page.until("members.prompt.endsWith('>')")
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    enter(page, "prompt", UNSURE)
    page.until("$('next').rows[1].cells[4].textContent === '< 70.0%'")  # not among what the server tells
    enter(page, "prompt", "")
    page.until("$('next').hidden && $('status').textContent.startsWith('Type a prompt')")
    assert page.evaluate("$('write').disabled")
    assert page.said == []


def test_an_error_is_shown_as_the_server_says_it(page: Browser, server: Server) -> None:
    enter(page, "prompt", "bad")
    page.until("!$('error').hidden")
    assert page.evaluate("[$('error').textContent, $('error').children.length]") == [f"prompt is 'bad'; {MARKUP}", 0]
    assert page.evaluate("$('next').hidden")
    server.key = "secret"
    enter(page, "prompt", "good")
    page.until("$('error').textContent.includes('API key') && !$('key-line').hidden")
    page.evaluate("$('key').value = 'secret'; $('key-line').requestSubmit()")
    wait_for(page, 0.8)
    assert page.evaluate("$('error').hidden")
    assert all("status of 40" in said for said in page.said)  # the browser's own words for the answers


def test_writing_streams_at_its_alpha_and_stops(page: Browser, server: Server) -> None:
    enter(page, "prompt", "It's <b>")
    wait_for(page, 0.8)
    page.evaluate("$('write').click()")
    page.until("$('writing').textContent === 'The text at α 0.8: ended.'")
    article = "document.querySelector('article').textContent"
    assert page.evaluate(article) == f"base-change at α 0.8, endedIt's <b> 7 {MARKUP}é shells."
    assert {name: server.asked[-1][name] for name in ("alpha", "rule", "max_tokens", "temperature", "stream")} == {
        "alpha": 0.8,
        "rule": "base-change",
        "max_tokens": 64,
        "temperature": 0,
        "stream": True,
    }
    enter(page, "slider", "1.5")
    wait_for(page, 1.5)
    server.held[1.5] = threading.Event()
    page.evaluate("$('write').click()")
    page.until(f"{article}.endsWith(' 7')")
    page.evaluate("$('stop').click()")
    page.until(f'{article} === "base-change at α 1.5, stoppedIt\'s <b> 7"')
    assert page.evaluate("$('stop').disabled")
    assert page.said == []
    words = shlex.split(page.evaluate("$('curl').textContent"))
    assert words[:3] == ["curl", "-s", f"{server.url}v1/completions"]
    assert json.loads(words[-1]) == next(one for one in server.asked if one.get("alpha") == 1.5)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1200, 900)])
def test_the_page_fits(page: Browser, server: Server, width: int, height: int, scheme: str) -> None:
    """No scrolling to the side, every control has a name, and ink differs from paper."""
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
    enter(page, "prompt", "23 - 16 =" * 30)
    wait_for(page, 0.8)
    page.evaluate("document.querySelector('details').open = true; $('write').click()")
    page.until("$('stop').disabled && !!document.querySelector('article')")
    assert page.evaluate("document.querySelector('article').getBoundingClientRect().bottom") < height
    assert page.evaluate("innerWidth") == width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelector('.wide').scrollWidth <= document.querySelector('.wide').clientWidth")
    controls = page.evaluate(
        "[...document.querySelectorAll('input, textarea, select')].filter(c => !c.labels.length && !c.ariaLabel).length"
    )
    assert controls == 0
    ink, paper = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (brightness[0] < brightness[1]) == (scheme == "light")
    assert page.said == []
