"""Draws docs/images/report.png, a report on a laptop and on a phone, with Chromium.

python -m tests.browser.picture RUN_DIR

RUN_DIR is the folder of a run of `make train` with --dion-log-interval, resumed once.
"""

import argparse
import tempfile
from pathlib import Path

import matplotlib.image
import numpy as np

from megatron_dion_tools.report.folder import read_folder
from megatron_dion_tools.report.page import render
from tests.browser import chromium
from tests.project import ROOT

PICTURE = ROOT / "docs" / "images" / "report.png"
WIDTHS = {"light": 1300, "dark": 390}
HEIGHT, SCALE = 1210, 0.7


def draw(tab: chromium.Tab, page: Path, picture: Path) -> None:
    """Both screens side by side, from the top of the page."""
    screens = []
    for scheme, width in WIDTHS.items():
        tab.open(page, width, scheme)
        screens.append(tab.pixels(chromium.Box(0, 0, width, HEIGHT), SCALE))
    matplotlib.image.imsave(picture, np.hstack(screens))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--output", type=Path, default=PICTURE, metavar="FILE.png")
    args = parser.parse_args()
    program = chromium.find()
    if program is None:
        parser.error("there is no Chromium: name one with CHROMIUM=path")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "report.html").write_text(render(read_folder(args.run_dir)))
        with chromium.browser(program, folder / "profile") as tab:
            draw(tab, folder / "report.html", args.output)


if __name__ == "__main__":
    main()
