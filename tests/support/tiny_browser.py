"""A real browser without a driver: Chromium, spoken to over a pipe in its own DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """The browser: the one that RFT_CHROMIUM names, or the first on the PATH."""
    named = os.environ.get("RFT_CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. ``requests`` and ``errors`` gather what it asked of any network, and what it complained of."""

    def __init__(self, binary: str, folder: str) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()

        def pipes() -> None:  # the protocol wants descriptors 3 and 4
            read, write = os.dup(to_browser), os.dup(from_browser)
            os.dup2(read, 3)
            os.dup2(write, 4)

        switches = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                    "--no-first-run", "--disable-background-networking", "--disable-extensions",
                    "--hide-scrollbars",
                    "--disable-component-update", "--remote-debugging-pipe",
                    f"--user-data-dir={folder}"]  # fmt: skip
        self._process = subprocess.Popen(
            [binary, *switches, "about:blank"], close_fds=False, preexec_fn=pipes,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._rest, self._count, self._events = b"", 0, list[dict[str, Any]]()
        self.requests: list[str] = []
        self.errors: list[str] = []
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)  # else nothing is told of the focus

    _session: str | None = None

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._in, 1 << 20)
            if not more:
                raise RuntimeError("the browser is gone")
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        method, told = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(told["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(told["args"])[:500])
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.errors.append(told["entry"]["text"])

    def run(self, code: str) -> Any:
        """The value of an expression on the page; promises are waited for."""
        answer = self.send("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:800])
        return answer["result"].get("value")

    def show(self, width: int, height: int, dark: bool = False, phone: bool = False) -> None:
        """A window of so many pixels, in a theme that the system prefers."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", media="", features=[scheme])

    def open(self, file: Path) -> None:
        """Loads a page of ours, and waits until its script has run."""
        self.send("Page.navigate", url=file.absolute().as_uri())
        self.run("""new Promise((done) => { const look = () =>
            document.documentElement?.dataset.ready === "true" ? done() : setTimeout(look, 20); look(); })""")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, **_KEYS.get(key, {}), **text)

    def picture(self, whole: bool = False) -> bytes:
        clip: dict[str, Any] = {}
        if whole:
            size = self.send("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
        answer = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **clip)
        return base64.b64decode(answer["data"])

    def pdf(self) -> bytes:
        return base64.b64decode(
            self.send("Page.printToPDF", preferCSSPageSize=True, printBackground=True)["data"]
        )

    def close(self) -> None:
        try:
            self._session = None
            self.send("Browser.close")
        except (OSError, RuntimeError):
            self._process.kill()
        self._process.wait(30)
        os.close(self._out)
        os.close(self._in)


_KEYS = {
    "Tab": {"windowsVirtualKeyCode": 9},
    "Enter": {"windowsVirtualKeyCode": 13},
    "ArrowDown": {"windowsVirtualKeyCode": 40},
    "Escape": {"windowsVirtualKeyCode": 27},
}


@contextmanager
def browser() -> Iterator[Browser]:
    binary = find()
    assert binary is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        tab = Browser(binary, folder)
        try:
            yield tab
        finally:
            tab.close()
