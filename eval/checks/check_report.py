"""Open a report in headless Chromium: no console message, no request, nothing wider than the page.

python eval/checks/check_report.py DIR/report.html --out shots

Pictures at desktop and phone width, light and dark, and the printed page land in --out, for eyes.
Chromium is the Debian package or any other on the path; it is driven through its debugging pipe.
"""

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-default-apps", "--no-default-browser-check", "--remote-debugging-pipe"),
)
VIEWS = {
    "desktop": (1280, "light", False),
    "desktop-dark": (1280, "dark", False),
    "phone": (390, "light", True),
    "phone-dark": (390, "dark", True),
}
# Wide content may scroll inside its own box, never the page. Letters below this are too small.
WIDTH = "document.documentElement.scrollWidth"
SMALLEST = """Math.min(...[...document.querySelectorAll("svg text")].map(
    text => text.getBoundingClientRect().height))"""
LEAST_LETTERS = 9.0


class Browser:
    """A headless Chromium and the events it has told of."""

    def __init__(self, profile: str) -> None:
        path = next(filter(None, map(shutil.which, BROWSERS)), None)
        if path is None:
            sys.exit("Expected chromium on the path, found none: apt-get install chromium.")
        reads, self.to = os.pipe()
        self.back, writes = os.pipe()
        # Chromium reads commands on descriptor 3 and answers on 4.
        shell = ["bash", "-c", f'exec "$@" 3<&{reads} 4>&{writes}', "bash", path, *FLAGS]
        self.process = subprocess.Popen(
            [*shell, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(reads, writes),
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        self.pending, self.count, self.events = b"", 0, []
        targets = self.ask("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        self.session = None
        attached = self.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.ask(f"{domain}.enable")

    session: str | None = None

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command; its answer. Events on the way are kept."""
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def read(self) -> dict[str, Any]:
        """The next message."""
        while b"\0" not in self.pending:
            part = os.read(self.back, 1 << 16)
            if not part:
                sys.exit("Chromium ended early.")
            self.pending += part
        message, _, self.pending = self.pending.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        """Go to a page and wait until it is loaded."""
        self.ask("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is."""
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"][
            "value"
        ]

    def close(self) -> None:
        """End the browser."""
        self.session = None
        self.ask("Browser.close")
        self.process.wait(timeout=20)


def complaints(events: list[dict[str, Any]], url: str) -> list[str]:
    """Console messages, errors, and requests for anything but the page itself."""
    found = []
    for event in events:
        params = event.get("params", {})
        if event["method"] == "Network.requestWillBeSent":
            asked = params["request"]["url"]
            if asked != url and not asked.startswith("data:"):
                found.append(f"request: {asked}")
        elif event["method"] == "Log.entryAdded":
            found.append(f"log: {params['entry']['text']}")
        elif event["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            found.append(f"console: {params}")
    return found


def check(path: Path, out: Path) -> list[str]:
    """What is wrong with a report; pictures of it in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    url, found = path.resolve().as_uri(), []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        for name, (width, scheme, mobile) in VIEWS.items():
            browser.events.clear()
            browser.ask(
                "Emulation.setDeviceMetricsOverride",
                width=width, height=900, deviceScaleFactor=1 + mobile, mobile=mobile,
            )  # fmt: skip
            browser.ask(
                "Emulation.setEmulatedMedia",
                features=[{"name": "prefers-color-scheme", "value": scheme}],
            )
            browser.open(url)
            wide = browser.value(WIDTH)
            if wide > width:
                found.append(f"{name}: the page is {wide} pixels wide in a window of {width}")
            letters = browser.value(SMALLEST)
            if letters < LEAST_LETTERS:
                found.append(f"{name}: letters in pictures are {letters:.1f} pixels high")
            picture = browser.ask("Page.captureScreenshot", captureBeyondViewport=True)
            (out / f"{name}.png").write_bytes(base64.b64decode(picture["data"]))
            found += [f"{name}: {what}" for what in complaints(browser.events, url)]
        printed = browser.ask("Page.printToPDF", preferCSSPageSize=True)
        (out / "print.pdf").write_bytes(base64.b64decode(printed["data"]))
        browser.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, default=Path("report-shots"))
    options = parser.parse_args()
    found = check(options.report, options.out)
    print("\n".join(found) or f"nothing wrong; pictures in {options.out}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
