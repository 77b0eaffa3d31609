"""Shows a page in Chromium without a screen: its pixels, and what JavaScript measures in it."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
from numpy.typing import NDArray

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# A window has at least 500 pixels, a phone less: so the page is in a frame of its own width.
_FRAME = """<!doctype html><style>body {{ margin: 0 }} iframe {{ border: 0 }}</style>
<iframe srcdoc="{page}" width="{width}" height="{height}"></iframe><pre></pre>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const measured = frame.contentWindow.eval({script});
  document.querySelector("pre").textContent = JSON.stringify(measured);
}};
</script>"""


def find() -> str | None:
    """The browser: what CHROMIUM names, or one on PATH."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def show(
    page: str, folder: Path, width: int, height: int, scheme: str, script: str = "null"
) -> tuple[NDArray[np.int64], Any]:
    """The upper part of a page (height, width, 3), and the value of a script that ran in it.

    Args:
        page: HTML.
        folder: for the browser's files.
        width: of the screen, in pixels.
        height: of the part of the page that is shown.
        scheme: `light` or `dark`.
        script: JavaScript; its value can be written as JSON.
    """
    frame, picture = folder / "frame.html", folder / "page.png"
    places = {"width": width, "height": height, "script": json.dumps(script)}
    frame.write_text(_FRAME.format(page=html.escape(page), **places))
    flags = (
        "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars"
        f" --window-size={max(width, 500)},{height} --screenshot={picture} --dump-dom"
        f" --blink-settings=preferredColorScheme={int(scheme == 'light')}"
        f" --user-data-dir={folder / 'profile'} {frame.as_uri()}"
    )
    command = [str(find()), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    [measured] = re.findall(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    pixels = np.rint(255 * matplotlib.image.imread(picture)[:, :width, :3]).astype(np.int64)
    return pixels, json.loads(html.unescape(measured))
