"""Draws the figures of `how_it_works.md` and `performance.md`: `python docs/figures/draw.py`.

Each of the modules named below has a function `draw`. What they show is computed by the package, or
was measured and lies in `benchmarks/results`.
"""

import argparse
from importlib import import_module
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

NAMES = ("step", "low_rank", "error_feedback", "shards", "hops", "step_times")
IMAGES = Path(__file__).parent.parent / "images"

STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "legend.frameon": False,
    "svg.hashsalt": "megatron-dion",  # the same file whenever the picture is the same
}


def main() -> None:
    """Draw all figures, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--output", type=Path, default=IMAGES, help="folder for the SVG files")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update(STYLE)
    for name in args.names or NAMES:
        figure = import_module(name).draw()
        figure.savefig(args.output / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
