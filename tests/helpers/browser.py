"""A page in headless Chromium, as on a telephone: the DevTools protocol over a pipe, so nothing is listened to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
_FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
_FLAGS += ["--remote-debugging-pipe"]


class Browser:
    """Chromium with one page of `width` × `height` CSS pixels. `profile`: an empty folder of its own."""

    def __init__(self, profile: Path, *, width: int = 390, height: int = 844) -> None:
        for name in ("in", "out"):
            os.mkfifo(profile / name)
        self._process = subprocess.Popen(
            [
                "sh",
                "-c",
                'exec "$@" 3<"$0/in" 4>"$0/out"',
                profile,
                str(CHROMIUM),
                *_FLAGS,
                f"--user-data-dir={profile}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._in, self._out = (profile / "in").open("wb", buffering=0), (profile / "out").open("rb", buffering=0)
        self._messages, self._number, self._session = b"", 0, None
        self._own: str | None = None
        self.said: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=width < 600
        )

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._number += 1
        session = {} if self._session is None else {"sessionId": self._session}
        message = {"id": self._number, "method": method, "params": params, **session}
        self._in.write(json.dumps(message).encode() + b"\0")
        number = self._number
        while (found := self._next()).get("id") != number:
            pass
        assert "error" not in found, found
        return dict(found["result"])

    def open(self, path: Path) -> None:
        """Load a file, and wait for it. `said` then holds errors, warnings and requests over the network."""
        self._own = None
        self._load(path.absolute().as_uri())

    def go(self, url: str) -> None:
        """Load a page of a server on 127.0.0.1, and wait for it. What it asks of that server is not in `said`."""
        assert urlsplit(url).hostname == "127.0.0.1", url
        self._own = _origin(url)
        self._load(url)

    def until(self, expression: str, seconds: float = 30) -> Any:
        """Wait until a JavaScript expression is true, and return its value; fail after so many seconds."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"never true: {expression}; {self.said}"
            time.sleep(0.02)
        return value

    def press(self, key: str, text: str = "") -> None:
        """Press a key where the focus is, by its name as in 'ArrowRight' or 'Enter' and the text that it types."""
        code = {"Enter": 13, "ArrowLeft": 37, "ArrowRight": 39}[key]
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text)

    def _load(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._messages:
            read = self._out.read(1 << 16)
            assert read, "the browser ended"
            self._messages += read
        line, _, self._messages = self._messages.partition(b"\0")
        message = json.loads(line)
        self._listen(message.get("method"), message.get("params", {}))
        return dict(message)

    def _listen(self, method: str | None, params: dict[str, Any]) -> None:
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.said.append(json.dumps(params))
        if method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if url.partition(":")[0] not in ("file", "data") and _origin(url) != self._own:
                self.said.append(url)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._in.close()  # without its pipe the browser ends, and its children with it
        self._out.close()
        self._process.wait(timeout=30)


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
