"""A headless Chromium under a test's hand, through chromedriver: pages opened, looked into and photographed.

Owns the browser's process and the few WebDriver calls that are needed (W3C WebDriver; "goog/cdp" is Chromium's own), so that no client library
is. Must not know what the pages are.
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.e2e.checklist import CheckFailed, wait_for

START_S = 60.0  # a cold browser on a machine that does other things too
CALL_S = 120.0
# As a browser without a user, a screen or an outside needs them; --no-sandbox because CI is root.
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
]


class Browser:
    """One browser with a profile of its own under `folder`. Use it as a context."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._driver: subprocess.Popen[bytes] | None = None
        self._session = ""

    def __enter__(self) -> Self:
        profile = self._folder / "profile"
        shutil.rmtree(profile, ignore_errors=True)
        profile.mkdir(parents=True)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        with (self._folder / "chromedriver.log").open("ab") as log:
            self._driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self._base = f"http://127.0.0.1:{port}"
        try:
            wait_for(self._is_up, "chromedriver answers", START_S)
            options = {
                "goog:chromeOptions": {"args": [*FLAGS, f"--user-data-dir={profile}"]},
                "goog:loggingPrefs": {"browser": "ALL"},
                "pageLoadStrategy": "normal",
            }
            answer = self._call("POST", "/session", {"capabilities": {"alwaysMatch": options}})
            self._session = f"/session/{answer['sessionId']}"
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self._session:
                self._call("DELETE", self._session)
        finally:
            self._end()

    def screen(self, width: int, height: int, *, dark: bool = False, mobile: bool = False, colourless: bool = False) -> None:
        """What the page will think it is shown on. width, height: CSS pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if mobile else 1, "mobile": mobile}
        self._devtools("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._devtools("Emulation.setEmulatedMedia", {"features": [scheme]})
        self._devtools("Emulation.setEmulatedVisionDeficiency", {"type": "achromatopsia" if colourless else "none"})

    def open(self, url: str) -> None:
        """Goes to a page, and waits until it has loaded."""
        self._call("POST", f"{self._session}/url", {"url": url})

    def script(self, body: str, *arguments: Any) -> Any:
        """The value of a JavaScript function's body."""
        return self._call("POST", f"{self._session}/execute/sync", {"script": body, "args": list(arguments)})

    def text(self, selector: str = "body") -> str:
        """What a reader sees of the first element, its text as laid out; empty where there is none."""
        return str(self.script("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def texts(self, selector: str) -> list[str]:
        """The text content of every such element."""
        return list(self.script("return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", selector))

    def wait_text(self, selector: str, wanted: str, timeout_s: float = 60.0) -> str:
        """Waits until an element's text contains `wanted`; returns the text."""
        wait_for(lambda: wanted in self.text(selector), f"{selector} says {wanted!r}", timeout_s, lambda: self.text())
        return self.text(selector)

    def complaints(self) -> list[str]:
        """What the browser's console has complained of since the last call: errors of scripts, refusals by the content security policy."""
        entries = self._call("POST", f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def photograph(self, path: Path) -> None:
        """The whole page, from top to bottom, as a PNG."""
        taken = self._devtools("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(taken["data"]))

    def _devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._call("POST", f"{self._session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=CALL_S) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise CheckFailed(f"the browser refuses {method} {path}: {error.read().decode(errors='replace')[:2000]}") from None

    def _is_up(self) -> bool:
        try:
            return bool(self._call("GET", "/status")["ready"])
        except OSError:
            return False

    def _end(self) -> None:
        if self._driver is not None:
            self._driver.terminate()
            self._driver.wait(START_S)
