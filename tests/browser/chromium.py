"""Chromium without a screen, spoken to over a pipe (Chrome DevTools Protocol)."""

import base64
import fcntl
import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.image
import numpy as np
from numpy.typing import NDArray

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars"
    " --no-first-run --remote-debugging-pipe"
).split()
# What a page may complain of; events of the protocol.
_COMPLAINTS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


def find() -> str | None:
    """The browser: what CHROMIUM names, or one on PATH."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Box(NamedTuple):
    """A part of a page, in pixels."""

    left: float
    top: float
    width: float
    height: float


@dataclass
class Tab:
    """A page in the browser.

    Attributes:
        complaints: errors and whatever was written to the console.
        requested: addresses that were asked for.
    """

    to_browser: Any
    from_browser: Any
    session: str = ""
    number: int = 0
    complaints: list[str] = field(default_factory=list)
    requested: list[str] = field(default_factory=list)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its answer."""
        self.number += 1
        request = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            request["sessionId"] = self.session
        self.to_browser.write(json.dumps(request).encode() + b"\0")
        self.to_browser.flush()
        while (answer := self._next()).get("id") != self.number:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, page: Path, width: int, scheme: str = "light", script: bool = True) -> None:
        """Show a file.

        Args:
            page: the file.
            width: of the screen; a narrow one is a phone's.
            scheme: `light` or `dark`.
            script: whether scripts run.
        """
        is_phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=is_phone,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.complaints.clear()
        self.requested.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def move_pointer(self, x: float, y: float) -> None:
        """To a place of the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def box(self, element: str) -> Box:
        """Where on the page an element is, which a JavaScript expression names."""
        places = "left + scrollX, top + scrollY, width, height"
        function = f"(({{left, top, width, height}}) => [{places}])"
        return Box(*self.evaluate(f"{function}(({element}).getBoundingClientRect())"))

    def png(self, box: Box | None = None, scale: float = 1) -> bytes:
        """A picture of a part of the page, or of all of it, as long as it is."""
        if box is None:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            box = Box(0, 0, size["width"], size["height"])
        clip = {"x": box.left, "y": box.top, "width": box.width, "height": box.height}
        clip["scale"] = scale
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def pixels(self, box: Box | None = None, scale: float = 1) -> NDArray[np.uint8]:
        """The same as numbers (height, width, 3)."""
        image = matplotlib.image.imread(io.BytesIO(self.png(box, scale)), format="png")
        return np.rint(255 * image[..., :3]).astype(np.uint8)

    def _next(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self.from_browser.read(1)) != b"\0":
            assert byte, "the browser has ended"
            message += byte
        answer: dict[str, Any] = json.loads(message)
        if answer.get("method") in _COMPLAINTS:
            self.complaints.append(json.dumps(answer["params"]))
        if answer.get("method") == "Network.requestWillBeSent":
            self.requested.append(answer["params"]["request"]["url"])
        return answer


@contextmanager
def browser(program: str, folder: Path) -> Iterator[Tab]:
    """Run the browser with one tab, and end it.

    Args:
        program: its path.
        folder: for its profile.
    """
    (its_in, our_out), (our_in, its_out) = os.pipe(), os.pipe()
    # It expects the pipe's ends as numbers 3 and 4; ours must not be in the way.
    high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (its_in, its_out)]
    os.close(its_in)
    os.close(its_out)
    start = f'exec "$0" "$@" 3<&{high[0]} 4>&{high[1]}'
    process = subprocess.Popen(
        ["bash", "-c", start, program, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
        pass_fds=high,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in high:
        os.close(end)
    with os.fdopen(our_out, "wb") as to_browser, os.fdopen(our_in, "rb") as from_browser:
        try:
            tab = Tab(to_browser, from_browser)
            target = tab.call("Target.createTarget", url="about:blank")["targetId"]
            attached = tab.call("Target.attachToTarget", targetId=target, flatten=True)
            tab.session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                tab.call(f"{domain}.enable")
            yield tab
        finally:
            process.terminate()
            process.wait()
