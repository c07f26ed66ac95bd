"""A picture of what ``vaekl check`` prints on this machine, for README.

python bench/check_picture.py docs/check.png
"""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout

from matplotlib.figure import Figure

from vaekl.__main__ import main


def draw(text: str, path: str) -> None:
    """Light text on a dark ground, as wide and high as it needs."""
    lines = text.rstrip().splitlines()
    size, width = 11, max(map(len, lines))
    inches = size / 72
    figure = Figure(figsize=(0.605 * inches * (width + 4), 1.45 * inches * (len(lines) + 2)))
    figure.set_facecolor("#1e1e1e")
    style = {"family": "monospace", "size": size, "color": "#e0e0e0", "linespacing": 1.4}
    figure.text(
        0.5, 0.5, "\n".join(lines), ha="center", va="center", multialignment="left", **style
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    output = io.StringIO()
    with redirect_stdout(output):
        status = main(["check"])
    draw("$ vaekl check\n" + output.getvalue(), sys.argv[1])
    sys.exit(status)
