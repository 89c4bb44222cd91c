"""A page in headless Chromium, as on a telephone: the DevTools protocol over a pipe, so nothing is listened to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

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
        self.call("Page.navigate", url=path.absolute().as_uri())
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
        if method == "Network.requestWillBeSent" and params["request"]["url"].partition(":")[0] not in ("file", "data"):
            self.said.append(params["request"]["url"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._in.close()  # without its pipe the browser ends, and its children with it
        self._out.close()
        self._process.wait(timeout=30)
