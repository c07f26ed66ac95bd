"""What a script shows: by rich where that is installed, else as plain lines."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

try:
    from rich.console import Console
    from rich.progress import track as rich_track
    from rich.table import Table
except ImportError:  # a machine with a GPU and little else
    Console = None

Item = TypeVar("Item")


def track(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """The items, with progress on a terminal's standard error."""
    if Console is None or not sys.stderr.isatty():
        yield from items
    else:
        yield from rich_track(items, label, total, transient=True, console=Console(stderr=True))


def table(
    title: str,
    headings: Sequence[str],
    rows: Iterable[Sequence[str] | None],
    *,
    words: int,
    caption: str = "",
    width: int = 120,
) -> None:
    """The first columns are `words`, the others numbers; a row that is None parts groups."""
    if Console is None:
        print(*plain_lines(title, headings, rows, words, caption), sep="\n")
        return
    shown = Table(title=title, caption=caption or None)
    for i, heading in enumerate(headings):
        shown.add_column(heading, no_wrap=True, justify="left" if i < words else "right")
    for row in rows:
        if row is None:
            shown.add_section()
        else:
            shown.add_row(*row)
    if sys.stdout.isatty():
        width = max(width, shutil.get_terminal_size().columns)
    Console(width=width, highlight=False).print(shown)


def plain_lines(
    title: str,
    headings: Sequence[str],
    rows: Iterable[Sequence[str] | None],
    words: int,
    caption: str,
) -> list[str]:
    """The table as lines of text."""
    cells = [[" ".join(heading.split()) for heading in headings], None, *rows]
    widths = [max(len(row[i]) for row in cells if row is not None) for i in range(len(headings))]
    ruler = ["-" * width for width in widths]
    lines = [title]
    for row in cells:
        aligned = [
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row or ruler, widths))
        ]
        lines.append("  ".join(aligned).rstrip())
    return [*lines, caption] if caption else lines
