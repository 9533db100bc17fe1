"""A real browser for tests, spoken to over its own pipe: no driver, no port, no network."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Elements whose text, and curves, that have too little contrast with what is behind them, with the ratio: WCAG 2 asks
# for 4.5 and 3.
CONTRAST = """(() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = node => { for (; node; node = node.parentElement) {
    const color = rgb(getComputedStyle(node).backgroundColor);
    if (color.length === 3 || color[3] === 1) return color; } return [255, 255, 255]; };
  const read = 'h1,h2,h3,p,dt,dd,th,td,li,li strong,pre,code,mark,mark span,pre span,figcaption,sup,small,summary';
  const ink = (style, properties) => properties.map(name => style[name]).find(color => color !== 'none');
  const weak = (selector, properties, least) => [...document.querySelectorAll(selector)]
    .map(node => { const [a, b] = [light(rgb(ink(getComputedStyle(node), properties))), light(ground(node))];
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.tagName + '.' + node.getAttribute('class')]; })
    .filter(([ratio]) => ratio < least);
  return [...weak(read, ['color'], 4.5), ...weak('svg text', ['fill'], 4.5),
    ...weak('[style*="--line-"]', ['stroke', 'fill'], 3)];
})()"""

# Of every <figure>: its label, and of each shape that has a size whether it lies within its picture.
DRAWN = """[...document.querySelectorAll('figure')].map(figure => {
  const frame = figure.querySelector('svg').getBoundingClientRect();
  const shapes = [...figure.querySelectorAll('svg path, svg rect, svg use')]
    .filter(shape => !shape.closest('defs, clipPath'))
    .map(shape => shape.getBoundingClientRect()).filter(box => box.width + box.height > 0);
  const within = box => box.left >= frame.left - 1 && box.right <= frame.right + 1 && box.top >= frame.top - 1
    && box.bottom <= frame.bottom + 1;
  return [figure.getAttribute('aria-label'), frame.width > 100 && frame.height > 50 ? shapes.map(within) : []];
})"""

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")


def find_browser() -> str | None:
    """Path of an installed browser of the Chromium family."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One open page. evaluate runs JavaScript in it, whatever the page itself may run."""

    def __init__(self, to_browser: int, from_browser: int):
        self._to, self._from = to_browser, from_browser
        self._rest, self._calls, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the DevTools protocol and its answer."""
        self._calls += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._calls, "method": method, "params": parameters, **session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._calls:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, place: Path | str) -> None:
        """Load a file or an address and wait until it stands."""
        self.events.clear()
        self.call("Page.navigate", url=place if isinstance(place, str) else place.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def troubles(self) -> list[dict[str, Any]]:
        """Of the page that stands: errors, messages on the console, and requests but for the page itself."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.requestWillBeSent")
        return [event for event in self.events if event.get("method") in kinds][1:]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until a JavaScript expression holds; the time limit of a test ends what never does."""
        while not self.evaluate(expression):
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Put a text where the focus is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        """Press and release a key, as Enter."""
        text = {"text": "\r"} if key == "Enter" else {}
        codes = {"key": key, "code": key, "windowsVirtualKeyCode": {"Enter": 13, "Escape": 27}[key], **text}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, modifiers=8 * shift, **codes)

    def look(self, width: int = 1000, scheme: str = "light", height: int = 1000) -> None:
        """Set the width of the window in pixels, and the light or dark that its user prefers."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._from, 1 << 16)
            assert part, "the browser has gone"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextmanager
def open_browser(executable: str, profile: Path) -> Iterator[Page]:
    """A page of a fresh browser, which ends with the block."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # The protocol asks for file descriptors 3 and 4; a shell puts them there.
    flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe --no-first-run"
    shell = f'exec "$0" {flags} --user-data-dir="$1" 3<&{theirs_in} 4>&{theirs_out}'
    process = subprocess.Popen(
        ["bash", "-c", shell, executable, str(profile)],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Page(ours_out, ours_in)
    finally:
        process.kill()
        process.wait()
        os.close(ours_out)
        os.close(ours_in)
