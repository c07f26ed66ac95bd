"""Write the figures of README.md and docs/speed.md from the committed JSON, between their markers.

    python bench/report.py           # write
    python bench/report.py --check   # exit status 1 if a page and the JSON disagree

No figure there is typed by hand. A section is ``<!-- name: ... -->`` to ``<!-- /name -->``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from sections import benchmarks
from tables import OTHERS, demo, numerics, speed

ROOT = Path(__file__).parents[1]


def load(folder: Path, page: Path) -> dict[str, Any]:
    """The results folder's JSON by stem, and beside each which plots there are."""
    results = {}
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        if path.stem not in OTHERS:
            data["folder"] = Path(os.path.relpath(folder, page.parent)).as_posix()
            data["plots"] = [plot.name for plot in folder.glob(f"{path.stem}-*.png")]
        results[path.stem] = data
    return results


def rewritten(page: str, sections: dict[str, str | None]) -> tuple[str, list[str], list[str]]:
    """The page with the sections filled in; which changed, and which have no place in it.

    A section of None has no data: its place is left empty, and it needs none.
    """
    changed, missing = [], []
    for name, body in sections.items():
        pattern = re.compile(rf"(<!-- {name}:.*?-->\n)(.*?)(<!-- /{name} -->)", re.DOTALL)
        match = pattern.search(page)
        if match is None:
            missing += [name] if body is not None else []
            continue
        new = match[1] + (f"{body}\n" if body else "") + match[3]
        if new != match[0]:
            changed.append(name)
            page = page[: match.start()] + new + page[match.end() :]
    return page, changed, missing


def refresh(page: Path, sections: dict[str, str | None], check: bool) -> int:
    """Write the sections into the page, or only check that they stand there; the exit status."""
    text, changed, missing = rewritten(page.read_text(), sections)
    for name in missing:
        print(f"{page.name}: no markers for section '{name}', and there is data for it")
    if check:
        for name in changed:
            print(f"{page.name}: section '{name}' is not what the JSON says; run {sys.argv[0]}")
        return 1 if changed or missing else 0
    page.write_text(text)
    print(f"{page.name}: {', '.join(changed) or 'nothing'} rewritten")
    return 1 if missing else 0


def main() -> int:
    """Write or check; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--speed", type=Path, default=ROOT / "docs" / "speed.md")
    parser.add_argument("--summary", type=Path, default=ROOT / "docs" / "demo" / "summary.json")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args()
    results = load(args.results, args.speed)
    summary = json.loads(args.summary.read_text()) if args.summary.exists() else None
    of_readme = {"demo": demo(summary) if summary else None, "speed": speed(results)}
    of_readme["numerics"] = numerics(results["numerics"]) if "numerics" in results else None
    status = refresh(args.readme, of_readme, args.check)
    return refresh(args.speed, {"benchmarks": benchmarks(results)}, args.check) or status


if __name__ == "__main__":
    sys.exit(main())
