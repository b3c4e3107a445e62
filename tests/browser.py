"""A headless Chromium, driven by chromedriver's plain HTTP: opens a page from disk and says what became of it."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
    "--no-first-run", "--hide-scrollbars",
]  # fmt: skip

missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
"""What a test needs and this machine has not."""


class Browser:
    """One window."""

    def __init__(self, server: str, profile: Path) -> None:
        self._server = server
        options = {"binary": shutil.which("chromium"), "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        made = self._ask("session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"session/{made['sessionId']}"

    def open(self, path: Path, width: int = 1600, dark: bool = False) -> None:
        """Open the file and wait until its plots are drawn, or cannot be."""
        metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500}
        self.cdp("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", {"features": [scheme]})
        self._ask(f"{self._session}/url", {"url": path.resolve().as_uri()})
        for _ in range(1200):
            if self.run(
                "return 'drawn' in document.documentElement.dataset || !document.getElementById('trouble').hidden"
            ):
                return
            time.sleep(0.05)
        raise AssertionError("the plots are not drawn after a minute")

    def run(self, script: str) -> Any:
        """What the script returns."""
        return self._ask(f"{self._session}/execute/sync", {"script": script, "args": []})

    def cdp(self, command: str, params: dict[str, Any]) -> Any:
        """One of the browser's own commands."""
        return self._ask(f"{self._session}/goog/cdp/execute", {"cmd": command, "params": params})

    def log(self, kind: str) -> list[Any]:
        """What it noted since the last time: `browser`, its console; `performance`, among others its requests."""
        found: list[Any] = self._ask(f"{self._session}/se/log", {"type": kind})
        return found

    def requests(self) -> list[str]:
        """Addresses of what it asked for since the last time."""
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.cdp("Page.captureScreenshot", {"captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """End it."""
        self._ask(self._session, method="DELETE")

    def _ask(self, path: str, content: dict[str, Any] | None = None, method: str = "POST") -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"{self._server}/{path}", data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """One with a new profile in `folder`."""
    with subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        try:
            port = (
                next(line for line in driver.stdout if "started successfully on port" in line).rstrip(".\n").split()[-1]
            )
            made = Browser(f"http://127.0.0.1:{port}", folder / "profile")
            try:
                yield made
            finally:
                made.close()
        finally:
            driver.terminate()
